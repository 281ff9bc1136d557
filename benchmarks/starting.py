"""How quickly the command line answers, and what it imports."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import Row, make_bank, make_checkpoint

MODEL = "deit_tiny_patch16_224"


def time_help() -> float:
    """``tocom-export --help``: median of ten."""
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        subprocess.run(["tocom-export", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def list_imports_of_build(folder: Path) -> list[str]:
    """Heavy packages among the modules that ``build --no-verify`` imports."""
    arguments = ["build", "--model", MODEL, "--checkpoint", str(make_checkpoint(MODEL, folder)),
                 "--bank", str(make_bank(MODEL, folder)), "--no-verify", "-q",
                 "--out", str(folder / "bundle")]  # fmt: skip
    code = (
        "import sys\nfrom tocom_export.cli.main import cli\n"
        f"try: cli({arguments!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
        "print(*[m for m in ('torch', 'timm', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1].split()


def measure() -> list[Row]:
    """Both."""
    with tempfile.TemporaryDirectory() as name:
        imported = list_imports_of_build(Path(name))
    return [
        ("`tocom-export --help`", f"{time_help():.2f} s", "≤ 0.3 s"),
        (
            "`build --no-verify` of a safetensors checkpoint imports",
            ", ".join(imported) or "no torch, timm or onnxruntime",
            "no torch",
        ),
    ]
