"""ONNX files that others write, in ONNX Runtime as it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tocom_export.errors import DeviceError
from tocom_export.io.telemetry import decline_telemetry
from tocom_export.study.accuracy import Run


def open_onnx(file: Path, device: str, threads: int | None) -> Run:
    """A file with one input and one output."""
    decline_telemetry()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # As it comes but for this: threads that spin on would slow what is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    provider: Any = "CPUExecutionProvider"
    if device == "cuda":
        provider = ("CUDAExecutionProvider", {"use_tf32": "0"})
    session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise DeviceError("this ONNX Runtime has no CUDA; onnxruntime-gpu has")
    (name,) = (entry.name for entry in session.get_inputs())
    return lambda images: np.asarray(session.run(None, {name: images})[0])
