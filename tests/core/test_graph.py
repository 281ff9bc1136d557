"""Graphs in ONNX Runtime against the PyTorch model, and the graphs' own form."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import save_file

from tocom_export.compression.method import Method
from tocom_export.compression.schedule import Schedule
from tocom_export.errors import UnsupportedModelError
from tocom_export.graph.writer import write_graph
from tocom_export.io.tensors import read_header
from tocom_export.model.spec import VitSpec
from tocom_export.training.model import CompressedVit
from tocom_export.training.timm_models import spec_of_name

TOME, PLAIN, EVIT = Method("tome"), Method("tome", proportional=False), Method("evit")
NO_CLASS = {"class_token": False, "pool": "avg"}

VARIANTS: dict[str, dict[str, Any]] = {
    "deit": {},
    "distilled": {"distilled": True},
    "clip": {"pre_norm": True, "patch_bias": False, "activation": "quick_gelu", "eps": 1e-5},
    "pre-norm with bias": {"pre_norm": True},
    "average": {"pool": "avg", "final_norm": "fc_norm"},
    "average, norm first": {"pool": "avg"},
    "siglip gap": {**NO_CLASS, "final_norm": "fc_norm", "activation": "gelu_tanh"},
    "no final norm": {**NO_CLASS, "final_norm": None},
    "deit3": {"layer_scale": True, "prefix_positions": False},
    "registers": {"registers": 4, "layer_scale": True},
    "registers, odd, positions of patches": {"registers": 3, "prefix_positions": False},
    "registers alone": {**NO_CLASS, "registers": 4},
    "qk-norm": {"qk_norm": True},
    "no biases": {"qkv_bias": False, "linear_bias": False, "patch_bias": False},
    "relu": {"activation": "relu"},
    "token, fc_norm": {"final_norm": "fc_norm"},
    "adapter": {"adapter_width": 8},
    "adapter, layer scale, no biases": {
        "adapter_width": 5, "layer_scale": True, "linear_bias": False,
    },
    "no head": {"classes": 0},
    "no head, average": {"classes": 0, "pool": "avg"},
    "no head, distilled": {"classes": 0, "distilled": True},
    "one channel, not square": {
        "channels": 1, "image_size": [60, 37], "patch_size": [8, 4], "heads": 2,
    },
}  # fmt: skip


class Case:
    """One model in PyTorch and its weights in a file, at which graphs can point."""

    def __init__(self, folder: Path, spec: VitSpec, vit: Any) -> None:
        self.folder, self.spec, self.vit = folder, spec, vit
        tensors = {name: tensor.numpy() for name, tensor in vit.state_dict().items()}
        save_file(tensors, folder / "weights.safetensors")
        self.weights, _ = read_header(folder / "weights.safetensors")

    def write(self, degree: Any, method: Method = TOME, name: str = "graph.onnx") -> Path:
        schedule = Schedule.of(self.spec, degree)
        model = write_graph(self.spec, schedule, method, self.weights, {"a": "b"})
        ir.save(model, self.folder / name)
        return self.folder / name

    def differs(self, run: Callable, degree: Any, method: Method, images: np.ndarray) -> float:
        """Largest difference of the logits, relative to the largest logit."""
        found = run(self.write(degree, method), images)
        with torch.inference_mode():
            model = CompressedVit(self.vit, method, self.spec.model).eval()
            expected = model(torch.from_numpy(images), degree).numpy()
        assert found.shape == expected.shape == (len(images), self.spec.classes or self.spec.width)
        assert (found.argmax(1) == expected.argmax(1)).all()
        return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture
def make_case(tmp_path: Path, make_vit: Callable[..., Any]) -> Any:
    def make(spec: VitSpec) -> Case:
        return Case(tmp_path, spec, make_vit(spec))

    yield make
    (tmp_path / "weights.safetensors").unlink(missing_ok=True)  # up to 350 MB


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_kind_of_model(make_case, make_spec, make_images, run_graph, variant: str):
    case = make_case(make_spec(**VARIANTS[variant]))
    images = make_images(case.spec, 2)
    for method, degree in itertools.product((TOME, EVIT), (0, 7, 16, (5, 0, 16, 3))):
        if method == TOME or case.spec.class_token:
            assert case.differs(run_graph, degree, method, images) <= 1e-4, (method, degree)


@pytest.mark.parametrize(
    ("batch", "degrees"),
    [(1, (0, 1, 4, 8, 16, (0, 0, 0, 16), (40, 40, 40, 40))), (8, (*range(17), (16, 0, 2, 1)))],
    ids=["1", "8"],
)
@pytest.mark.parametrize("method", [TOME, PLAIN, EVIT], ids=["tome", "not proportional", "evit"])
def test_each_degree(
    make_case, make_spec, make_images, run_graph, method: Method, batch: int, degrees: Any
):
    case = make_case(make_spec())
    images = make_images(case.spec, batch)
    for degree in degrees:
        assert case.differs(run_graph, degree, method, images) <= 1e-4, degree


@pytest.mark.parametrize("changes", [{}, NO_CLASS, {"distilled": True}, {"registers": 4}])
@pytest.mark.parametrize("size", [32, 40])
def test_down_to_the_last_tokens(
    make_case, make_spec, make_images, run_graph, changes: dict, size: int
):
    case = make_case(make_spec(image_size=[size, size], depth=6, **changes))
    images = make_images(case.spec, 2)
    assert Schedule.of(case.spec, 16).tokens_out[-1] == case.spec.prefix + 1
    for method in (TOME, EVIT):
        if method == TOME or case.spec.class_token:
            assert case.differs(run_graph, 16, method, images) <= 1e-4, method


@pytest.mark.parametrize(
    ("name", "degrees", "batch"),
    [
        ("deit_tiny_patch16_224", (0, 16), 2),
        ("deit_tiny_distilled_patch16_224", (tuple(i % 7 for i in range(12)),), 2),
        ("deit_small_patch16_224", (8,), 2),
        ("deit_base_patch16_224", (16,), 1),
        ("vit_tiny_patch16_384", (16,), 1),
        ("vit_small_patch14_reg4_dinov2", (16,), 1),
    ],
)
def test_models_of_timm(make_case, make_images, run_graph, name: str, degrees: Any, batch: int):
    spec = spec_of_name(name)
    case = make_case(spec)
    images = make_images(spec, batch)
    for degree in degrees:
        assert case.differs(run_graph, degree, TOME, images) <= 1e-4, degree
    if name == "deit_tiny_patch16_224":
        assert case.differs(run_graph, 16, EVIT, images) <= 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", [TOME, EVIT], ids=["tome", "evit"])
def test_the_form_of_a_graph(make_case, make_spec, variant: str, method: Method):
    case = make_case(make_spec(**VARIANTS[variant]))
    spec = case.spec
    if method == EVIT and not spec.class_token:
        with pytest.raises(UnsupportedModelError, match="EViT without a class token"):
            case.write(8, method)
        return
    file = case.write(8, method)
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(file, load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert {(e.key, e.value) for e in model.metadata_props} == {("a", "b")}

    external = [t for t in model.graph.initializer if t.external_data]
    assert Counter(t.name for t in external) == Counter(spec.weights().keys())
    for tensor in external:
        assert tuple(tensor.dims) == spec.weights()[tensor.name]
        place = {e.key: e.value for e in tensor.external_data}
        stored = case.weights[tensor.name]
        assert place["location"] == "weights.safetensors"
        assert (int(place["offset"]), int(place["length"])) == (stored.offset, stored.length)
    names = Counter(t.name for t in model.graph.initializer)
    assert set(names.values()) == {1}
    used = {name for node in model.graph.node for name in node.input}
    assert set(names) <= used

    (images,), (given,) = model.graph.input, model.graph.output
    assert (images.name, given.name) == ("images", "logits" if spec.classes else "embedding")
    dims = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert dims == ["batch", spec.channels, *spec.image_size]
    dims = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert dims == ["batch", spec.classes or spec.width]

    nodes = Counter(node.name.rpartition("/")[0] for node in model.graph.node)
    assert len({node.name for node in model.graph.node}) == nodes.total()
    for layer in range(spec.depth):
        assert 0 < nodes[f"blocks.{layer}.{method.name}"] <= 34
    operators = {node.op_type for node in model.graph.node}
    assert operators.isdisjoint({"ScatterElements", "ScatterND", "NonZero", "Compress", "Loop"})


def test_a_layer_that_removes_nothing_has_no_such_nodes(make_case, make_spec):
    model = onnx.load(make_case(make_spec()).write((0, 4, 0, 4)), load_external_data=False)
    scopes = {node.name.rpartition("/")[0] for node in model.graph.node}
    assert {s for s in scopes if s.endswith("tome")} == {"blocks.1.tome", "blocks.3.tome"}


def test_a_graph_is_small(make_case, make_spec):
    assert make_case(make_spec(depth=12)).write(4).stat().st_size < 120_000


@pytest.mark.parametrize("degree", [0, 16])
def test_bytes_are_reproducible(make_case, make_spec, degree: int):
    case = make_case(make_spec())
    first, second = case.write(degree, name="a.onnx"), case.write(degree, name="b.onnx")
    assert first.read_bytes() == second.read_bytes()
