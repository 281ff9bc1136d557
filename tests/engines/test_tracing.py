"""Which patches became one token, by the graph, against PyTorch's own matchings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.writing import Calibrate, write_bundle
from tocom_export.compression.method import Method
from tocom_export.compression.schedule import Schedule
from tocom_export.engines.onnx.calibration import measure_input_scales
from tocom_export.engines.tracing import Tracer, write_traced
from tocom_export.errors import BundleError, ImageError
from tocom_export.model.spec import VitSpec
from tocom_export.training import model as definition
from tocom_export.training.matching import token_map
from tocom_export.training.model import CompressedVit
from tocom_export.training.pruning import prune

Make = Callable[..., Any]


def follow(model: CompressedVit, images: Any, degrees: Any) -> np.ndarray[Any, Any]:
    """The maps of the PyTorch model (B, layers, patches), by its matchings and prunings."""
    steps: list[torch.Tensor | None] = []
    spec, match = model.spec, model.match

    def note_matching(*given: Any) -> Any:
        found = match(*given)
        steps.append(token_map(found))
        return found

    def note_pruning(x: torch.Tensor, attention: torch.Tensor, *given: Any) -> Any:
        left, kept = prune(x, attention, *given)
        step = torch.full(x.shape[:2], -1)
        step.scatter_(1, kept, torch.arange(kept.shape[1]).expand(len(kept), -1))
        steps.append(step)
        return left, kept

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(model, "match", note_matching, raising=False)
        patch.setattr(definition, "prune", note_pruning)
        model(torch.from_numpy(images), degrees)
    places = torch.arange(spec.tokens).expand(len(images), -1)
    maps, taken = [], iter(steps)
    for removed in Schedule.of(spec, degrees).removed:
        if removed:
            step = next(taken)
            assert step is not None
            places = torch.where(places < 0, -1, step.gather(1, places.clamp(min=0)))
        maps.append((places - spec.prefix).clamp(min=-1)[:, spec.prefix :])
    return torch.stack(maps, 1).numpy()


@pytest.mark.parametrize(
    ("method", "changes"),
    [("tome", {}), ("evit", {}), ("tome", {"registers": 3}), ("evit", {"image_size": (40, 72)})],
)
def test_maps_are_those_of_the_model(
    method: Any, changes: Any, tmp_path: Path, make_spec: Make,
    make_blueprint: Make, make_images: Make, make_vit: Make,
):  # fmt: skip
    spec: VitSpec = make_spec(**changes)
    given = {"bank": None, "method": Method(method), "schedules": {"fast": (20, 0, 7, 3)}}
    bundle = write_bundle(make_blueprint(tmp_path, spec, **given), tmp_path / "bundle")
    images, model = make_images(spec, 3), CompressedVit(make_vit(spec), Method(method))
    for name, variant in bundle.variants.items():
        trace = Tracer(bundle, name).run(images)
        assert (trace.maps.dtype, trace.maps.shape) == (np.int32, (3, spec.depth, spec.patches))
        np.testing.assert_array_equal(trace.maps, follow(model, images, variant.degrees))
        for layer, count in enumerate(variant.schedule(spec).tokens_out):
            for row in trace.maps[:, layer]:
                assert set(row.tolist()) - {-1} == set(range(count - spec.prefix))
        np.testing.assert_array_equal(trace.outputs["logits"], bundle.engine(name).run(images))


def test_without_a_class_token(tmp_path: Path, make_spec: Make, make_blueprint: Make,
                               make_images: Make, make_vit: Make):  # fmt: skip
    spec = make_spec(class_token=False, pool="avg")
    bundle = write_bundle(make_blueprint(tmp_path, spec, bank=None), tmp_path / "bundle")
    images = make_images(spec)
    wanted = follow(CompressedVit(make_vit(spec)), images, 8)
    np.testing.assert_array_equal(Tracer(bundle, 8).run(images).maps, wanted)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_logits_are_the_engines_in_every_precision(
    precision: Any, tmp_path: Path, make_blueprint: Make, make_images: Make
):
    blueprint = make_blueprint(tmp_path, precision=precision)
    images = make_images(blueprint.weights.spec, 4)
    calibrate: Calibrate | None = None
    if precision == "int8":
        calibrate = lambda wide, v: measure_input_scales(wide, v.name, images)  # noqa: E731
    bundle = write_bundle(blueprint, tmp_path / "bundle", calibrate=calibrate)
    trace = Tracer(bundle, "r16").run(images)
    np.testing.assert_array_equal(trace.outputs["logits"], bundle.engine("r16").run(images))
    left = bundle.variant("r16").schedule(bundle.spec).tokens_out[-1]
    assert trace.maps[:, -1].max() == left - bundle.spec.prefix - 1


def test_the_graph_runs_in_openvino_too(tmp_path: Path, make_blueprint: Make, make_images: Make):
    openvino = pytest.importorskip("openvino")
    bundle = write_bundle(make_blueprint(tmp_path), tmp_path / "bundle")
    images = make_images(bundle.spec)
    traced = bundle.path / "traced.onnx"
    traced.write_bytes(write_traced(bundle, bundle.variant("r08")))
    compiled = openvino.Core().compile_model(traced, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([images])
    np.testing.assert_array_equal(found["maps"], Tracer(bundle, 8).run(images).maps)


def test_wrong_images_and_damaged_graphs(tmp_path: Path, make_blueprint: Make, make_images: Make):
    bundle: Bundle = write_bundle(make_blueprint(tmp_path, precision="int8"), tmp_path / "bundle")
    tracer = Tracer(bundle, "r08")
    with pytest.raises(ImageError, match="shape"):
        tracer.run(make_images(bundle.spec)[:, :1])
    bundle.graph("r08").write_bytes(b"none")
    with pytest.raises(BundleError, match=r"r08\.onnx can't be read"):
        Tracer(bundle, "r08")
