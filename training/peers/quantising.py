"""ONNX Runtime's own quantiser, on a float32 file that others wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tocom_export.io.telemetry import decline_telemetry

from .running import Images

PRODUCTS = ["Conv", "Gemm", "MatMul"]
"""What is quantised. With all that ONNX Runtime would take, DeiT-S is a tenth faster, but its
logits correlate with float32's by 0.8 in place of 0.999."""


class _Reader:
    """Images, one by one, as a ``CalibrationDataReader`` gives them."""

    def __init__(self, images: Images, name: str) -> None:
        self._feeds: Iterator[dict[str, Images]] = iter({name: image[None]} for image in images)

    def get_next(self) -> dict[str, Images] | None:
        return next(self._feeds, None)


def quantise_static(source: Path, images: Images, file: Path) -> None:
    """``quantize_static``: ranges from images, Q and DQ around products, weights per channel."""
    decline_telemetry()
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    prepared = _prepare(source, file)
    graph = onnx.load(prepared, load_external_data=False).graph
    quantize_static(
        prepared,
        file,
        _Reader(images, graph.input[0].name),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=PRODUCTS,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def quantise_dynamic(source: Path, images: Images, file: Path) -> None:
    """``quantize_dynamic``, which takes ranges as it runs: DeiT-S is a tenth faster so."""
    decline_telemetry()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        _prepare(source, file),
        file,
        op_types_to_quantize=["Gemm", "MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )


def _prepare(source: Path, file: Path) -> Path:
    """The model after the step that ONNX Runtime asks for first: shapes known, nodes fused."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = file.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared)
    return prepared


QUANTISERS: dict[str, Callable[[Path, Images, Path], None]] = {
    "int8 by its quantiser": quantise_static,
    "int8 by its quantiser, dynamic": quantise_dynamic,
}
"""What it is called, and how: (file, images to take ranges from, new file)."""
