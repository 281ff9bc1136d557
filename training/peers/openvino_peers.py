"""The dense model in OpenVINO: converted from PyTorch, and quantised by NNCF."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tocom_export.io.telemetry import decline_telemetry
from tocom_export.model.spec import VitSpec
from tocom_export.study.accuracy import Run

from .running import Images


@cache
def _open_core() -> Any:
    """One for all peers, never let go: see :func:`engines.openvino.library.open_core`."""
    decline_telemetry()
    import openvino

    return openvino.Core()


def convert(vit: Any, spec: VitSpec, file: Path) -> None:
    """``openvino.convert_model`` of a torch model, for any batch, in float32."""
    decline_telemetry()
    import openvino
    import torch

    image = (spec.channels, *spec.image_size)
    images = torch.zeros(2, *image)
    model = openvino.convert_model(vit, example_input=images, input=[-1, *image])
    openvino.save_model(model, file, compress_to_fp16=False)


def quantise_by_nncf(source: Path, images: Images, file: Path) -> None:
    """NNCF's post-training quantisation of a converted model.

    Args:
        images: from which it takes the ranges, normalised.
    """
    decline_telemetry()
    import nncf
    import openvino

    quantised = nncf.quantize(
        _open_core().read_model(source),
        nncf.Dataset([image[None] for image in images]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
    )
    openvino.save_model(quantised, file, compress_to_fp16=False)


def has_bfloat16() -> bool:
    """Whether OpenVINO finds instructions for bfloat16 on this processor."""
    return "BF16" in _open_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def open_openvino(file: Path, precision: str, threads: int | None) -> Run:
    """A converted model on the processor, compiled for each batch when it first comes.

    For one batch it runs faster than for any: DeiT-S in int8 by 9 %, else by up to 3. Around
    int8 products it computes as OpenVINO chooses, in bf16 where the processor has it.
    """
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if precision != "int8":
        config["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[precision]
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    core = _open_core()
    compiled: dict[tuple[int, ...], Any] = {}

    def run(images: Images) -> Images:
        if images.shape not in compiled:
            model = core.read_model(file)
            model.reshape(list(images.shape))
            compiled[images.shape] = core.compile_model(model, "CPU", config)
        # Its memory is written again by the next run.
        return np.array(compiled[images.shape](images, share_inputs=True)[0])

    return run
