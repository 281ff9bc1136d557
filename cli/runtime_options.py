"""The options that say what runs an engine, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from .options import add_options

F = TypeVar("F", bound=Callable[..., Any])
BACKENDS = ("onnx", "openvino", "tensorrt", "tensorrt-rtx")

device_option = click.option(
    "--device",
    metavar="NAME",
    help="Where it runs; ONNX Runtime: cpu (the default), cuda, tensorrt; OpenVINO: CPU (the "
    "default), GPU, NPU, AUTO.",
)
precision_option = click.option(
    "--inference-precision",
    type=click.Choice(["auto", "f32", "bf16"]),
    default="auto",
    help="What OpenVINO computes in where the graph says float32; auto leaves it to the device, "
    "which takes bf16 where it can.",
)
threads_option = click.option("--threads", type=click.IntRange(1), help="Of a CPU.")
tuning_options = add_options(
    click.option(
        "--hint",
        type=click.Choice(["latency", "throughput"]),
        default="latency",
        help="What OpenVINO is tuned for.",
    ),
    click.option(
        "--streams", type=click.IntRange(1), help="Runs side by side in OpenVINO; default: by hint."
    ),
)


def backend_option(default: str | None = None, **more: Any) -> Callable[[F], F]:
    """``--backend``, of one backend.

    Args:
        default: None where what is left out means something of its own.
    """
    kinds = ["auto", *BACKENDS] if default == "auto" else list(BACKENDS)
    return click.option("--backend", type=click.Choice(kinds), default=default, **more)


run_options = add_options(
    backend_option(
        "auto",
        help="What runs it; auto is what bench --pick found fastest here, else ONNX Runtime.",
    ),
    device_option,
    precision_option,
    threads_option,
)
