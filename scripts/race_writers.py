"""Let two commands write one bundle at once, and see whether it is what both of them said.

python scripts/race_writers.py PAIRS [--seed N]

Each pair is two of: refit of one variant or another, refit of the bundle, build --force. Both must
end well, the bundle be whole, and each variant have the weights that one of the
two gave it, or that it had before. Prints what came out; exits with 1 where anything didn't hold.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import combinations_with_replacement
from pathlib import Path

from tocom_export.bundle.opening import Bundle
from tocom_export.errors import TocomError
from tocom_export.exporting import export

CLI = (sys.executable, "-m", "tocom_export.cli.main")
SCALES = ("0.2", "0.3")
"""Of the first command and of the second; before it was 0.1."""


def make_command(kind: str, scale: str) -> list[str]:
    """A command that leaves the scale in what it writes."""
    return {
        "refit r08": ["refit", "made/r08.onnx", "--scale", scale, "--no-verify"],
        "refit r16": ["refit", "made/r16.onnx", "--scale", scale, "--no-verify"],
        "refit all": ["refit", "made", "--scale", scale, "--no-verify"],
        "build --force": [
            "build", "--targets", "0,8,16", "--scale", scale, "--out", "made", "--no-verify",
            "--force",
        ],
    }[kind]  # fmt: skip


KINDS = ("refit r08", "refit r16", "refit all", "build --force")


def look(folder: Path, kinds: tuple[str, str], said: list[tuple[int, str]]) -> str:
    """What is wrong after both have ended; empty where nothing is."""
    for kind, (status, text) in zip(kinds, said, strict=True):
        if status:
            return f"{kind}: status {status}: {text}"
    try:
        bundle = Bundle.open(folder / "made", hashes=True)
    except TocomError as error:
        return str(error)
    last = {name: variant.scale for name, variant in bundle.variants.items()}
    allowed = {0.1, *map(float, SCALES)}
    if not set(last.values()) <= allowed:
        return f"scales {last}"
    for kind, scale in zip(kinds, map(float, SCALES), strict=True):
        for name in ("r08", "r16"):
            touched = kind.endswith(("all", "force", name))
            others = [k for k in kinds if k != kind and k.endswith(("all", "force", name))]
            if touched and not others and kinds[0] != kinds[1] and last[name] != scale:
                return f"{name} has the scale {last[name]}, {kind} said {scale}"
    if hidden := [file.name for file in folder.rglob(".*")]:
        return f"left {', '.join(hidden)}"
    for name in ("r08", "r16"):
        fresh = folder.parent / f"scale{last[name]}"
        if (fresh / f"{name}.safetensors").read_bytes() != (
            folder / "made" / f"{name}.safetensors"
        ).read_bytes():
            return f"{name}'s weights are not those of the scale {last[name]}"
    return ""


def main() -> int:
    """Exit status 1 where a pair did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, counts, wrong = random.Random(options.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for scale in ("0.1", *SCALES):
            export(out=root / f"scale{scale}", targets=(0, 8, 16), scale=float(scale), verify=False)
        for _ in range(options.pairs):
            kinds = rng.choice(list(combinations_with_replacement(KINDS, 2)))
            folder = root / "run"
            folder.mkdir()
            shutil.copytree(root / "scale0.1", folder / "made")
            children = [
                subprocess.Popen(
                    [*CLI, *make_command(kind, scale)], cwd=folder, stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE, text=True,
                )
                for kind, scale in zip(kinds, SCALES, strict=True)
            ]  # fmt: skip
            said = [(child.communicate()[1], child.returncode) for child in children]
            fault = look(folder, kinds, [(status, text) for text, status in said])
            waited = any("Waiting for another" in text for text, _ in said)
            counts["one waited" if waited else "one after the other"] += 1
            if fault:
                wrong += 1
                print(f"{' & '.join(kinds)}: {fault}", flush=True)
            shutil.rmtree(folder)
    print(f"{options.pairs} pairs ({dict(counts)}): {wrong} ended wrongly")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
