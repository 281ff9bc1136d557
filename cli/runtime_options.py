"""The options that say what runs an engine, and how."""

from __future__ import annotations

from typing import Any

import click

from .options import add_options

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


class Backends(click.ParamType[tuple[str, ...]]):
    """One or several backends, or ``auto``, or ``trtexec`` alone."""

    name = "LIST"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        found = tuple(dict.fromkeys(map(str.strip, value.split(","))))
        if found in (("auto",), ("trtexec",)) or set(found) <= set(BACKENDS):
            return found
        known = ", ".join(BACKENDS)
        self.fail(f"{value!r} is no list of {known}, nor auto or trtexec alone.", param, ctx)


run_options = add_options(
    click.option(
        "--backend",
        type=click.Choice(["auto", *BACKENDS]),
        default="auto",
        help="What runs it; auto is what bench --pick found fastest here, else ONNX Runtime.",
    ),
    device_option,
    precision_option,
    threads_option,
)
