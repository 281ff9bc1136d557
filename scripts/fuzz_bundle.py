"""Flip bytes of a bundle's files and see what reads them.

python scripts/fuzz_bundle.py FLIPS [--seed N] [--bundle DIR]

Each flip changes one byte of one file of a copy of a bundle (default: of the shipped model with two
variants), which then goes through inspect, run, verify and a pool, in a process that is watched.
Each has to work or to answer in a line with status 1 or 2; ``run --check-hashes`` has to refuse.
Prints what came out, and exits with 1 where anything crashed, hung, showed a traceback or asked
to be reported.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from tocom_export.cli.main import cli
from tocom_export.engines.serving.pool import EnginePool
from tocom_export.errors import TocomError
from tocom_export.exporting import export

SECONDS = 120
"""That a flip may take."""


def flip(file: Path, rng: random.Random) -> tuple[int, int]:
    """Change one byte, in the header of large files as often as beyond it; where, and by what."""
    data = bytearray(file.read_bytes())
    at = rng.randrange(min(len(data), 4096) if rng.random() < 0.5 else len(data))
    bits = rng.randrange(1, 256)
    data[at] ^= bits
    file.write_bytes(data)
    return at, bits


def look(arguments: Sequence[str]) -> str:
    """Run a command; what is wrong with its answer, empty where nothing is."""
    result = CliRunner().invoke(cli, list(arguments))
    if not isinstance(result.exception, (SystemExit, type(None))):
        return repr(result.exception)
    if result.exit_code not in (0, 1, 2):
        return f"status {result.exit_code}"
    said = result.stderr
    if "Traceback" in said or "please report" in said:
        return said
    errors = [line for line in said.splitlines() if line.startswith("Error")]
    return said if result.exit_code and len(errors) != 1 else ""


def use_pool(bundle: Path, images: np.ndarray) -> str:
    """Open a pool, run each variant and refit it."""
    try:
        with EnginePool(bundle, threads=1) as pool:
            for name in pool.variants:
                pool.run(images, name)
            pool.refit(bank="none")
            pool.run(images)
    except TocomError:
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def try_bundle(bundle: Path, picture: Path) -> int:
    """What a watched process does: all that reads a bundle; exit status 1 with what is wrong."""
    images = np.zeros((1, 3, 32, 32), np.float32)
    commands = {
        "inspect": ("inspect", str(bundle), "--layers"),
        "inspect a graph": ("inspect", str(bundle / "r08.onnx")),
        "run": ("run", str(bundle), str(picture), "--variant", "r08", "--threads", "1"),
        "verify": ("verify", str(bundle)),
    }
    wrong = [f"{name}: {fault}" for name, words in commands.items() if (fault := look(words))]
    if fault := use_pool(bundle, images):
        wrong.append(f"pool: {fault}")
    hashes = CliRunner().invoke(cli, [*commands["run"], "--check-hashes"])
    if hashes.exit_code != 2:
        wrong.append(f"--check-hashes: status {hashes.exit_code}")
    print("\n".join(wrong))
    return 1 if wrong else 0


def watch(bundles: Path, picture: Path, count: int) -> Counter[str]:
    """Try each of some bundles in one child, again from the next where one takes it down."""
    found: Counter[str] = Counter()
    at = 0
    while at < count:
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); " + (
            "import fuzz_bundle; from pathlib import Path\n"
            f"for at in range({at}, {count}):\n"
            "    print('BEGIN', at, flush=True)\n"
            f"    fuzz_bundle.try_bundle(Path({str(bundles)!r}, str(at)), Path({str(picture)!r}))\n"
            "    print('END', at, flush=True)\n"
        )
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True,
                timeout=SECONDS + 5 * (count - at),
            )  # fmt: skip
            text, why = done.stdout, f"status {done.returncode}: {done.stderr[-300:]}"
        except subprocess.TimeoutExpired as error:
            text, why = (error.stdout or b"").decode(), "it hung"
        for block in text.split("BEGIN ")[1:]:
            number, *lines = block.splitlines()
            at = int(number) + 1
            if lines and lines[-1] == f"END {number}":
                wrong = [line for line in lines[:-1] if line]
            else:
                wrong = [*lines, f"crashed: {why}"]
            found["wrong" if wrong else "well"] += 1
            for line in wrong:
                print(f"{(bundles / f'{number}.flip').read_text()}: {line}", flush=True)
        if "BEGIN " not in text:
            raise SystemExit(why)
    return found


def main() -> int:
    """Exit status 1 where a flip was not answered well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flips", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path)
    options = parser.parse_args()
    rng, found = random.Random(options.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        source = options.bundle or export(out=root / "source", targets=(0, 8), verify=False).path
        names = sorted(file.name for file in source.iterdir())
        picture = root / "picture.png"
        Image.fromarray(np.full((32, 32, 3), 99, np.uint8)).save(picture)
        for begin in range(0, options.flips, 50):
            bundles = root / "bundles"
            count = min(50, options.flips - begin)
            for number in range(count):
                copy = bundles / str(number)
                shutil.copytree(source, copy)
                name = names[rng.randrange(len(names))]
                at, bits = flip(copy / name, rng)
                (bundles / f"{number}.flip").write_text(f"{name} at {at} by {bits}")
            found += watch(bundles, picture, count)
            shutil.rmtree(bundles)
    print(f"{options.flips} flips: {found['well']} answered well, {found['wrong']} not")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
