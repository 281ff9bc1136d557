"""How Triton Inference Server is to run a bundle."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from tocom_export.errors import InputError

from ..engine import Backend


@dataclass(frozen=True)
class TritonOptions:
    """How Triton is to run a bundle."""

    backend: Literal["python", "onnxruntime", "openvino", "tensorrt"] = "onnxruntime"
    """Triton's: of the bundle's graphs, or of its plans (tensorrt); or python, of a pool."""
    name: str | None = None
    """What the models' names begin with, or is a pool's; None is the bundle's model name."""
    device: Literal["cpu", "gpu"] | None = None
    """None is a CPU for ONNX graphs, a GPU for plans."""
    max_batch: int | None = None
    """None is 32 for ONNX graphs, a plan's own largest batch for plans."""
    instances: int = 1
    """Of each model; on each GPU, where there are several."""
    max_delay_ms: float = 1.0
    """How long a request waits for others to fill a batch with."""
    threads: int | None = None
    """Of an instance on a CPU; None leaves it to the runtime."""
    runtime: Backend | Literal["auto"] | None = None
    """What runs the engines of a pool; None is ``auto``."""
    slo_ms: float | None = None
    """Latency wanted, for which a pool's variant is picked by load; None doesn't."""
    control: bool = False
    """Whether a pool may be switched and refitted by requests."""

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[\w-]+", self.name, re.ASCII):
            raise InputError(f"`name` {self.name!r}: letters, digits, '-' and '_' make a name.")
        if self.backend == "tensorrt" and self.device == "cpu":
            raise InputError("`device` cpu: TensorRT plans run on a GPU; leave `device` out.")
        if self.backend == "tensorrt" and self.threads is not None:
            raise InputError("`threads` is for graphs on a CPU; plans have none to set.")
        if self.device == "gpu" and self.threads is not None:
            raise InputError("`threads` is for a CPU; leave it out, or choose `device` cpu.")
        if self.backend != "python":
            for name in ("runtime", "slo_ms", "control"):
                if getattr(self, name) not in (None, False):
                    raise InputError(f"`{name}` is for `backend` python.")
        elif self.instances > 1:
            raise InputError(
                f"`instances` {self.instances}: with `backend` python each would be a process with "
                "weights of its own; set `threads`."
            )
        if self.slo_ms is not None and not 0 < self.slo_ms < math.inf:
            raise InputError(f"`slo_ms` {self.slo_ms:g}: a positive number is expected.")
        if not 0 <= self.max_delay_ms <= 60_000:
            raise InputError(f"`max_delay_ms` {self.max_delay_ms:g}: it is 0 to 60000, a minute.")
