"""What we use of CUDA's runtime, held against cuda-python as it is installed; no GPU is needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOM = Path(__file__).parents[3] / "engines" / "tensorrt"


def test_every_name_is_there(nvidia: Any, monkeypatch: pytest.MonkeyPatch):
    pretended = type(nvidia.cuda)
    monkeypatch.undo()  # the pretended module must not stand in the way of the real one
    runtime = pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
    text = "".join(file.read_text("utf-8") for file in sorted(ROOM.glob("*.py")))
    asked = set(re.findall(r"\b(?:cuda|_cuda|runtime\(\))\.(cuda[A-Z]\w+)", text))
    assert [name for name in asked if not hasattr(runtime, name)] == []
    assert len(asked) > 15
    assert {name for name in vars(pretended) if name.startswith("cuda")} <= {*dir(runtime)}
    kinds = runtime.cudaMemcpyKind
    assert {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"} <= kinds.__members__.keys()
    modes = runtime.cudaStreamCaptureMode.__members__
    assert "cudaStreamCaptureModeThreadLocal" in modes
