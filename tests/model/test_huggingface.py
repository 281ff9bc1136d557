"""Hugging Face folders, made by hand as transformers 5 writes them; scripts/check_huggingface.py
runs the models beside transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from tocom_export import EnginePool, export, load, refit
from tocom_export.cli.main import cli
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.metadata import to_metadata
from tocom_export.compression.method import Method
from tocom_export.errors import CheckpointError, InputError, UnsupportedModelError
from tocom_export.loading import load_model
from tocom_export.model.huggingface.folder import name_model
from tocom_export.model.preprocess import Preprocess
from tocom_export.model.resampling import resample_positions

C, M, L, P = 16, 24, 2, 16  # width, MLP width, layers, patches of 4 by 4 in 16 by 16 pixels
Shapes = dict[str, tuple[int, ...]]
Config = dict[str, Any]
Write = Callable[..., Path]
SIZES: Config = {
    "hidden_size": C, "num_hidden_layers": L, "num_attention_heads": 2, "intermediate_size": M,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip


def linear(name: str, out: int, into: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, into), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name: str) -> Shapes:
    return {f"{name}.weight": (C,), f"{name}.bias": (C,)}


def classic(prefix: str, **more: tuple[int, ...]) -> Shapes:
    """ViT, DeiT and DINOv2, which name tokens and attention alike."""
    shapes: Shapes = {f"embeddings.{name}": shape for name, shape in more.items()}
    shapes["embeddings.cls_token"] = (1, 1, C)
    shapes["embeddings.patch_embeddings.projection.weight"] = (C, 3, 4, 4)
    shapes["embeddings.patch_embeddings.projection.bias"] = (C,)
    for i in range(L):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            shapes |= linear(f"{layer}.attention.attention.{part}", C, C)
        shapes |= linear(f"{layer}.attention.output.dense", C, C)
    return {f"{prefix}{name}": shape for name, shape in {**shapes, **norm("layernorm")}.items()}


def vit(prefix: str = "vit.", tokens: int = 1, **more: tuple[int, ...]) -> Shapes:
    shapes = classic(prefix, position_embeddings=(1, P + tokens, C), **more)
    for i in range(L):
        layer = f"{prefix}encoder.layer.{i}"
        shapes |= {**norm(f"{layer}.layernorm_before"), **norm(f"{layer}.layernorm_after")}
        shapes |= linear(f"{layer}.intermediate.dense", M, C)
        shapes |= linear(f"{layer}.output.dense", C, M)
    return shapes


def dinov2(prefix: str, gated: bool = False, **more: tuple[int, ...]) -> Shapes:
    shapes = classic(prefix, position_embeddings=(1, P + 1, C), mask_token=(1, C), **more)
    names = ("weights_in", "weights_out") if gated else ("fc1", "fc2")
    hidden = 24 if gated else 32  # two thirds of 32, a multiple of 8
    for i in range(L):
        layer = f"{prefix}encoder.layer.{i}"
        shapes |= {**norm(f"{layer}.norm1"), **norm(f"{layer}.norm2")}
        shapes |= linear(f"{layer}.mlp.{names[0]}", hidden * (2 if gated else 1), C)
        shapes |= linear(f"{layer}.mlp.{names[1]}", C, hidden)
        shapes |= {f"{layer}.layer_scale{which}.lambda1": (C,) for which in (1, 2)}
    return shapes


def dinov3(registers: int, gated: bool, k_bias: bool = False) -> Shapes:
    shapes: Shapes = {
        "embeddings.cls_token": (1, 1, C), "embeddings.mask_token": (1, 1, C),
        "embeddings.register_tokens": (1, registers, C),
        "embeddings.patch_embeddings.weight": (C, 3, 4, 4),
        "embeddings.patch_embeddings.bias": (C,), **norm("norm"),
    }  # fmt: skip
    for i in range(L):
        for part in "qkvo":
            shapes |= linear(f"layer.{i}.attention.{part}_proj", C, C, part != "k" or k_bias)
        for part in ("gate", "up") if gated else ("up",):
            shapes |= linear(f"layer.{i}.mlp.{part}_proj", M, C)
        shapes |= linear(f"layer.{i}.mlp.down_proj", C, M)
        shapes |= {**norm(f"layer.{i}.norm1"), **norm(f"layer.{i}.norm2")}
        shapes |= {f"layer.{i}.layer_scale{which}.lambda1": (C,) for which in (1, 2)}
    return shapes


def tower(prefix: str, clip: bool) -> Shapes:
    """CLIP's and SigLIP's image side."""
    shapes: Shapes = {
        "embeddings.patch_embedding.weight": (C, 3, 4, 4),
        "embeddings.position_embedding.weight": (P + clip, C), **norm("post_layernorm"),
    }  # fmt: skip
    if clip:
        shapes |= {"embeddings.class_embedding": (C,), **norm("pre_layrnorm")}
    else:
        shapes |= {"embeddings.patch_embedding.bias": (C,), "head.probe": (1, 1, C)}
        shapes["head.attention.in_proj_weight"] = (3 * C, C)
        shapes["head.attention.in_proj_bias"] = (3 * C,)
        shapes |= {**linear("head.attention.out_proj", C, C), **norm("head.layernorm")}
        shapes |= {**linear("head.mlp.fc1", M, C), **linear("head.mlp.fc2", C, M)}
    for i in range(L):
        layer = f"encoder.layers.{i}"
        for part in ("q", "k", "v", "out"):
            shapes |= linear(f"{layer}.self_attn.{part}_proj", C, C)
        shapes |= {**norm(f"{layer}.layer_norm1"), **norm(f"{layer}.layer_norm2")}
        shapes |= {**linear(f"{layer}.mlp.fc1", M, C), **linear(f"{layer}.mlp.fc2", C, M)}
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def beit(prefix: str, own: bool = True, **more: tuple[int, ...]) -> Shapes:
    shapes = vit(prefix, **more)
    for i in range(L):
        layer = f"{prefix}encoder.layer.{i}"
        del shapes[f"{layer}.attention.attention.key.bias"]
        shapes |= {f"{layer}.lambda_{which}": (C,) for which in (1, 2)}
        if own:
            place = f"{layer}.attention.attention.relative_position_bias"
            shapes[f"{place}.relative_position_bias_table"] = (52, 2)
    if not own:
        shapes[f"{prefix}encoder.relative_position_bias.relative_position_bias_table"] = (52, 2)
    del shapes[f"{prefix}embeddings.position_embeddings"]
    return shapes


def average(shapes: Shapes, prefix: str) -> Shapes:
    """With a norm behind the pooling in place of the one before it."""
    for leaf in ("weight", "bias"):
        shapes[f"{prefix}pooler.layernorm.{leaf}"] = shapes.pop(f"{prefix}layernorm.{leaf}")
    return shapes


HEAD, WIDE = linear("classifier", 5, C), linear("classifier", 5, 2 * C)
TEXT: Shapes = {
    "text_model.final_layer_norm.weight": (8,), "text_projection.weight": (8, 8), "logit_scale": (),
}  # fmt: skip
TOKEN = {"distillation_token": (1, 1, C)}
VISION = {"vision_config": SIZES}
RATIO = {**SIZES, "mlp_ratio": 2}
CASES: dict[str, tuple[Config, Shapes, dict[str, Any]]] = {
    "vit": (
        {**SIZES, "model_type": "vit"}, {**vit(), **HEAD},
        {"classes": 5, "eps": 1e-12, "pool": "token", "mlp_width": M},
    ),
    "vit bare": (
        {**SIZES, "model_type": "vit"}, {**vit(""), **linear("pooler.dense", C, C)}, {"classes": 0},
    ),
    "deit": (
        {**SIZES, "model_type": "deit"}, {**vit("deit.", 2, **TOKEN), **HEAD},
        {"registers": 1, "distilled": False, "prefix_positions": True},
    ),
    "deit with teacher": (
        {**SIZES, "model_type": "deit"},
        {**vit("deit.", 2, **TOKEN), **linear("cls_classifier", 5, C),
         **linear("distillation_classifier", 5, C)},
        {"distilled": True, "registers": 0},
    ),
    "dinov2": (
        {**RATIO, "model_type": "dinov2"}, {**dinov2("dinov2."), **WIDE},
        {"pool": "token_avg", "layer_scale": True, "eps": 1e-6, "mlp_width": 32},
    ),
    "dinov2 gated": (
        {**RATIO, "model_type": "dinov2", "use_swiglu_ffn": True}, dinov2("", True),
        {"pool": "token", "mlp": "packed", "mlp_width": 24, "activation": "silu"},
    ),
    "dinov2 with registers": (
        {**RATIO, "model_type": "dinov2_with_registers"},
        {**dinov2("dinov2_with_registers.", register_tokens=(1, 4, C)), **WIDE},
        {"registers": 4, "prefix_positions": False},
    ),
    "dinov3": (
        {**SIZES, "model_type": "dinov3_vit", "num_register_tokens": 4}, dinov3(4, False),
        {"family": "eva", "registers": 4, "positions": False, "k_bias": False, "eps": 1e-5},
    ),
    "dinov3 gated": (
        {**SIZES, "model_type": "dinov3_vit", "use_gated_mlp": True, "hidden_act": "silu"},
        dinov3(0, True), {"registers": 0, "mlp": "gated"},
    ),
    "dinov3 with biases of keys": (
        {**SIZES, "model_type": "dinov3_vit", "key_bias": True}, dinov3(0, False, True),
        {"k_bias": True, "qkv_bias": True},
    ),
    "clip": (
        {**VISION, "model_type": "clip"}, {**tower("vision_model.", True), **HEAD},
        {"pool": "avg", "final_norm": None, "activation": "quick_gelu", "pre_norm": True},
    ),
    "clip whole": (
        {**VISION, "model_type": "clip"},
        {**tower("vision_model.", True), **linear("visual_projection", 6, C, False), **TEXT},
        {"classes": 0, "projection": 6, "embedding": 6, "head_bias": False, "pool": "token"},
    ),
    "clip bare": (
        {**SIZES, "model_type": "clip_vision_model", "hidden_act": "gelu"}, tower("", True),
        {"classes": 0, "activation": "gelu", "eps": 1e-5},
    ),
    "siglip": (
        {**VISION, "model_type": "siglip"}, {**tower("vision_model.", False), **HEAD},
        {"pool": "avg", "final_norm": "norm", "class_token": False},
    ),
    "siglip bare": (
        {**SIZES, "model_type": "siglip_vision_model"}, tower("", False),
        {"pool": "map", "pool_heads": 2, "pool_mlp_width": M, "activation": "gelu_tanh"},
    ),
    "beit": (
        {**SIZES, "model_type": "beit", "use_relative_position_bias": True},
        {**average(beit("beit.", mask_token=(1, 1, C)), "beit."), **HEAD},
        {"family": "beit", "relative": "table", "k_bias": False, "pool": "avg",
         "final_norm": "fc_norm", "positions": False, "layer_scale": True},
    ),
    "beit bare": (
        {**SIZES, "model_type": "beit", "use_mean_pooling": False,
         "use_shared_relative_position_bias": True},
        beit("", own=False), {"pool": "token", "final_norm": "norm", "relative": "table"},
    ),
    "data2vec-vision": (
        {**SIZES, "model_type": "data2vec-vision", "use_relative_position_bias": True},
        {**average(beit("data2vec_vision."), "data2vec_vision."), **HEAD}, {"family": "beit"},
    ),
    "vit_mae": (
        {**SIZES, "model_type": "vit_mae"},
        {**vit(), "decoder.mask_token": (1, 1, 8), "decoder.decoder_pred.weight": (48, 8)},
        {"classes": 0, "pool": "token"},
    ),
}  # fmt: skip


def draw(shapes: Shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a folder of a case; ``config`` adds to its config, ``files`` are further JSON files."""

    def make(case: str = "vit", files: Config | None = None, **config: Any) -> Path:
        folder = tmp_path / "my-model"
        folder.mkdir()
        for name, record in {"config.json": {**CASES[case][0], **config}, **(files or {})}.items():
            (folder / name).write_text(json.dumps(record))
        save_file(draw(CASES[case][1]), folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_its_name_and_shape(write: Write, case: str):
    opened = load_model(checkpoint=write(case))
    spec, tensors = opened.spec, opened.checkpoint.tensors
    assert {name: tensor.shape for name, tensor in tensors.items()} == spec.weights()
    expected = CASES[case][2]
    assert {name: getattr(spec, name) for name in expected} == expected
    assert spec.model == "my-model"
    assert opened.checkpoint.info.classes is None


def test_clip_s_projection_makes_the_embedding(write: Write, tmp_path: Path):
    """No classes, then; a bundle in which it passed for a classifier is refitted all the same."""
    torch = pytest.importorskip("torch")
    folder, places = write("clip whole"), {"bank": "none", "targets": [0, 4], "verify": False}
    bundle = export(checkpoint=folder, out=tmp_path / "b", unit_embedding=True, **places)
    assert (bundle.outputs, bundle.has_logits, bundle.classes) == (("embedding",), False, None)
    assert bundle.find_output("embedding") == "embedding"
    opened = load_model(checkpoint=folder)
    images = np.random.default_rng(1).standard_normal((2, 3, 16, 16), np.float32)
    from tocom_export.training.torch_engine import load_model as load_network

    network = load_network(opened.spec, opened.checkpoint.tensors, Method("tome"))
    with torch.inference_mode():
        x, size = network.features(torch.from_numpy(images), 4)
        wanted = network.head(x, size, pre_logits=True).numpy()
    wanted = wanted @ draw(CASES["clip whole"][1])["visual_projection.weight"].T
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    engine = load(bundle.path).engine(4, threads=1)
    np.testing.assert_allclose(engine.run(images), wanted, atol=1e-4)
    refit(bundle.path, checkpoint=folder)
    with pytest.raises(InputError, match="`outputs` logits: my-model has no head that gives them"):
        export(checkpoint=folder, out=tmp_path / "c", outputs=["logits"], **places)
    old = replace(opened.spec, classes=6, projection=0)
    info = replace(opened.checkpoint.info, spec=old)
    tensors = {name: np.array(t) for name, t in opened.checkpoint.tensors.items()}
    save_file(tensors, tmp_path / "old.safetensors", to_metadata(info))
    before = export(checkpoint=tmp_path / "old.safetensors", out=tmp_path / "old", **places)
    assert before.outputs == ("logits",)
    refit(before.path, checkpoint=folder, verify=False)


def test_queries_keys_and_values_are_one_after_another(write: Write):
    stored = draw(CASES["vit"][1])
    tensors = Checkpoint.open(write("vit")).tensors
    for leaf in ("weight", "bias"):
        place = "vit.encoder.layer.1.attention.attention"
        parts = [stored[f"{place}.{part}.{leaf}"] for part in ("query", "key", "value")]
        assert np.array_equal(tensors[f"blocks.1.attn.qkv.{leaf}"], np.concatenate(parts))


def test_a_class_tokens_position_is_in_the_token(write: Write):
    stored = draw(CASES["dinov2 with registers"][1])
    tensors = Checkpoint.open(write("dinov2 with registers")).tensors
    place = "dinov2_with_registers.embeddings"
    positions = stored[f"{place}.position_embeddings"]
    assert np.array_equal(tensors["cls_token"], stored[f"{place}.cls_token"] + positions[:, :1])
    assert np.array_equal(tensors["pos_embed"], positions[:, 1:])


def test_a_gate_is_told_from_what_it_lets_through(write: Write):
    stored, tensors = draw(CASES["dinov3 gated"][1]), Checkpoint.open(write("dinov3 gated")).tensors
    for ours, theirs in {"fc1_g": "gate_proj", "fc1_x": "up_proj", "fc2": "down_proj"}.items():
        name = f"layer.0.mlp.{theirs}.weight"
        assert np.array_equal(tensors[f"blocks.0.mlp.{ours}.weight"], stored[name])


def test_attention_pooling_is_split(write: Write):
    stored, tensors = draw(CASES["siglip bare"][1]), Checkpoint.open(write("siglip bare")).tensors
    whole = stored["head.attention.in_proj_weight"]
    assert np.array_equal(tensors["attn_pool.q.weight"], whole[:C])
    assert np.array_equal(tensors["attn_pool.kv.weight"], whole[C:])


def test_shared_biases_are_each_layers(write: Write):
    stored, tensors = draw(CASES["beit bare"][1]), Checkpoint.open(write("beit bare")).tensors
    shared = stored["encoder.relative_position_bias.relative_position_bias_table"]
    for layer in range(L):
        own = tensors[f"blocks.{layer}.attn.relative_position_bias_table"]
        assert np.array_equal(own, shared)


def test_a_masked_autoencoder_isnt_proportional(write: Write):
    assert Checkpoint.open(write("vit_mae")).info.method == Method("tome", proportional=False)


def test_half_precision_and_positions_that_are_integers(write: Write):
    folder = write("clip bare")
    tensors: dict[str, Any] = draw(CASES["clip bare"][1])
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    tensors["embeddings.position_ids"] = np.arange(17)[None]
    save_file(tensors, folder / "model.safetensors")
    opened = load_model(checkpoint=folder)
    assert {tensor.dtype.name for tensor in opened.checkpoint.tensors.values()} == {"bfloat16"}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({str(i): f"LABEL_{i}" for i in range(5)}, None),
        ({str(i): f"bird {i}" for i in reversed(range(5))}, tuple(f"bird {i}" for i in range(5))),
    ],
)
def test_classes(write: Write, labels: Config, expected: tuple[str, ...] | None):
    assert Checkpoint.open(write(id2label=labels)).info.classes == expected


@pytest.mark.parametrize(
    ("case", "prefix"),
    [("vit", 1), ("dinov2 with registers", 0), ("clip bare", 1), ("siglip bare", 0), ("dinov3", 0)],
)
def test_images_of_another_size(write: Write, case: str, prefix: int):
    """The config says what the weights are for; the bundle, what it was resampled to."""
    folder = write(case)
    own, wide = load_model(checkpoint=folder), load_model(checkpoint=folder, image_size=(24, 40))
    assert wide.spec == replace(own.spec, image_size=(24, 40))
    found, before = (m.checkpoint.tensors.get("pos_embed") for m in (wide, own))
    done = "computed for 6×10 patches, and the weights are of 4×4"
    if before is not None:
        np.testing.assert_array_equal(found, resample_positions(before, prefix, (4, 4), (6, 10)))
        done = "resampled from 4×4 to 6×10 patches"
    assert wide.resampled.startswith(f"{folder}: positions are {done}; accuracy at another size")
    with pytest.raises(InputError, match="patches of 4×4, which must fill them; 16×20 would do"):
        load_model(checkpoint=folder, image_size=(17, 20))


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
EDGE = {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": {"height": 16}}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"size": {"height": 16, "width": 16}, "resample": 2, **IMAGENET},
         Preprocess(crop_mode="squash", interpolation="bilinear")),
        ({**EDGE, "resample": 3, **IMAGENET}, Preprocess(crop_pct=0.8)),
        ({"size": 16}, Preprocess(*HALF, 1.0, "bilinear", "squash")),
        ({"size": 20, "do_center_crop": True, "crop_size": 16, "resample": 3},
         Preprocess(*HALF, 0.8)),
        ({"size": {"height": 20, "width": 20}, "do_center_crop": True, "crop_size": 16},
         Preprocess(*HALF, 0.8, "bilinear", "squash")),
        ({**EDGE, "do_normalize": False},
         Preprocess((0.0,) * 3, (1.0,) * 3, 0.8, "bilinear")),
        ({**EDGE, "do_rescale": False, "image_mean": [255.0] * 3, "image_std": [51.0] * 3},
         Preprocess((1.0,) * 3, (0.2,) * 3, 0.8, "bilinear")),
    ],
)  # fmt: skip
def test_image_statistics(write: Write, said: Config, expected: Preprocess):
    opened = load_model(checkpoint=write(files={"preprocessor_config.json": said}))
    assert opened.preprocess == expected
    assert opened.preprocess_from == "by the preprocessor of my-model"


def test_image_statistics_beside_a_texts(write: Write):
    files = {"processor_config.json": {"image_processor": {**EDGE, **IMAGENET}}}
    opened = load_model(checkpoint=write("clip bare", files))
    assert opened.preprocess == Preprocess(crop_pct=0.8)


def test_beit_resizes_both_sides(write: Write):
    """Where its file is of the time before sizes had names, also if it crops then."""
    said = {"size": 20, "do_center_crop": True, "crop_size": 16}
    opened = load_model(checkpoint=write("beit", {"preprocessor_config.json": said}))
    assert opened.preprocess == Preprocess(*HALF, 0.8, "bicubic", "squash")


def test_no_image_statistics(write: Write):
    found = load_model(checkpoint=write())
    assert "transformers' for its model_type" in found.preprocess_from
    assert found.preprocess == Preprocess(HALF[0], HALF[1], 1.0, "bilinear", "squash")


def test_a_type_that_says_no_image_statistics(write: Write):
    assert "nothing says which" in load_model(checkpoint=write("deit")).preprocess_from


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models--facebook--dinov2-base/snapshots/f9e44c814b77203eaa57a6bdbbd535f21ede1415",
         "dinov2-base"),
        ("my model (2)", "my-model-2"),
        ("reference", ""),
        ("...", ""),
    ],
)  # fmt: skip
def test_what_a_model_is_called(folder: str, name: str):
    assert name_model(Path("/hub", folder)) == name


def shard(folder: Path) -> Config:
    """Split the weights of a folder in two; the index."""
    tensors = draw(CASES["vit"][1])
    (folder / "model.safetensors").unlink()
    places: Config = {}
    for number in (0, 1):
        part = {name: tensors[name] for name in sorted(tensors)[number::2]}
        save_file(part, folder / f"model-{number}.safetensors")
        places |= dict.fromkeys(part, f"model-{number}.safetensors")
    return {"metadata": {"total_size": 1}, "weight_map": places}


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(write: Write):
    folder = write()
    whole = {name: np.array(t) for name, t in Checkpoint.open(folder).tensors.items()}
    write_index(folder, shard(folder))
    for named in (folder, folder / "model-0.safetensors"):
        parts = Checkpoint.open(named).tensors
        assert parts.keys() == whole.keys()
        assert all(np.array_equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "place", ["../model-0.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "passwd"]
)
def test_an_index_that_leads_astray(write: Write, place: str):
    folder = write()
    index = shard(folder)
    index["weight_map"]["vit.layernorm.bias"] = place
    write_index(folder, index)
    with pytest.raises(CheckpointError, match="is no safetensors file in this folder"):
        Checkpoint.open(folder)


def test_shards_that_are_missing_or_lack_a_tensor(write: Write):
    folder = write()
    index = shard(folder)
    index["weight_map"]["vit.more"] = "model-0.safetensors"
    write_index(folder, index)
    with pytest.raises(CheckpointError, match=r"model-0.safetensors lacks vit.more, which"):
        Checkpoint.open(folder)
    (folder / "model-1.safetensors").unlink()
    del index["weight_map"]["vit.more"]
    write_index(folder, index)
    with pytest.raises(CheckpointError, match=r"model-1.safetensors, which .* names, is missing"):
        Checkpoint.open(folder)
    write_index(folder, {})
    with pytest.raises(CheckpointError, match=r"index.json: weight_map: "):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "bert"}, r"model_type 'bert' is not supported; known are vit, deit, .*"),
        ({"model_type": "clip_text_model"}, "a text model is not supported"),
        ({"model_type": "siglip2"}, r"siglip2\): images of varying size \(NaFlex\) is not"),
        ({"model_type": "beit"}, "a model without positions"),
        ({"quantization_config": {"bits": 8}}, "quantized weights"),
        ({"hidden_act": "mish"}, "activation 'mish'"),
        ({"model_type": None}, "config.json has no model_type, nor timm's architecture"),
        ({"image_size": 32}, "17 positions, but images of 32x32, as .* need 65"),
        ({"hidden_size": "many"}, "config.json: width: expected `?int"),
        ({"num_hidden_layers": 0}, "config.json: depth: expected `?int`? >= 1"),
        ({"num_attention_heads": 3}, "config.json: model spec: width 16 is no multiple"),
        ({"num_hidden_layers": 3}, "the weights have 2 layers, not 3 as config.json says"),
        ({"num_hidden_layers": 10**6}, "the weights have 2 layers, not 1000000 as config.json"),
        ({"image_size": 10**6}, "62,500,000,000 patches; 65,536 is the most"),
        ({"id2label": {"0": "cat"}}, "names 1 classes, but the head has 5"),
        ({"id2label": dict.fromkeys("01235", "cat")}, "doesn't name classes 0 to 4"),
    ],
)
def test_configs_that_are_refused(write: Write, config: Config, says: str):
    with pytest.raises((CheckpointError, UnsupportedModelError), match=says) as caught:
        load_model(checkpoint=write(**config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "config", "says"),
    [
        ("dinov3", {"value_bias": False}, "biases of queries or values only"),
        ("dinov3", {"mlp_bias": False}, "biases on some"),
        ("dinov3", {"use_gated_mlp": True}, "another gate than SiLU"),
        ("siglip bare", {"vision_use_head": False}, "SigLIP without its attention pooling"),
        ("beit", {"image_size": [16, 32]}, "relative positions in images that are no square"),
        ("dinov2", {"mlp_ratio": "two"}, "config.json: a number is missing or none"),
    ],
)
def test_forms_that_are_refused(write: Write, case: str, config: Config, says: str):
    with pytest.raises(InputError, match=says):
        load_model(checkpoint=write(case, **config))


def test_preprocessors_that_are_refused(write: Write):
    folder = write()
    said = {
        '{"resample": 1}': r"resample 1 is not known; 2 \(bilinear\)",
        '{"image_mean": 3}': "a size, mean or std can't be read",
        '{"image_std": [0, 0, 0]}': "image statistics can't be",
        "[]": "preprocessor_config.json: ",
    }
    for text, says in said.items():
        (folder / "preprocessor_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=says):
            Checkpoint.open(folder)


def test_folders_that_lack_files(write: Write, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"has no config.json, so it is no folder that"):
        Checkpoint.open(tmp_path)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(CheckpointError, match=r"looks like a bundle; its weights.safetensors can"):
        Checkpoint.open(tmp_path)
    folder = write()
    (folder / "model.safetensors").unlink()
    index = folder / "pytorch_model.bin.index.json"
    index.touch()
    with pytest.raises(CheckpointError, match="has pickled weights in several files"):
        Checkpoint.open(folder)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"has no model.safetensors, nor pytorch_model.bin.$"):
        Checkpoint.open(folder)
    (folder / "config.json").write_text(" " * 20_000_001)
    with pytest.raises(CheckpointError, match="more than 20000000 bytes"):
        Checkpoint.open(folder)


def test_a_folder_has_no_entries(write: Write):
    with pytest.raises(CheckpointError, match=r"`weights_key` ema: .* has no entries"):
        Checkpoint.open(write(), "ema")


def test_a_file_needs_its_config(write: Write):
    file = write() / "model.safetensors"
    assert load_model(checkpoint=file).spec == load_model(checkpoint=file.parent).spec
    (file.parent / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"names of Hugging Face's .* config.json"):
        Checkpoint.open(file)


def test_a_file_beside_another(write: Write):
    folder = write()
    tensors = {name: 2 * tensor for name, tensor in draw(CASES["vit"][1]).items()}
    save_file(tensors, folder / "epoch-2.safetensors")
    opened = Checkpoint.open(folder / "epoch-2.safetensors").tensors
    assert np.array_equal(opened["norm.bias"], tensors["vit.layernorm.bias"])


def test_a_tensor_that_is_there_twice(write: Write):
    folder = write()
    tensors = draw(CASES["vit"][1])
    tensors["vit.norm.bias"] = tensors["vit.layernorm.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"two tensors are norm.bias"):
        Checkpoint.open(folder)


def test_a_tensor_that_nothing_reads(write: Write):
    folder = write()
    save_file({**draw(CASES["vit"][1]), "adapter.weight": np.ones(3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter.weight"):
        load_model(checkpoint=folder)


def test_build_and_refit(write: Write, tmp_path: Path):
    folder = write(
        files={"preprocessor_config.json": {"size": 16, **IMAGENET}},
        id2label={str(i): f"bird {i}" for i in range(5)},
    )
    out = tmp_path / "out"
    options = ["--bank", "none", "--targets", "0,2", "--no-verify", "--out", out]
    done = CliRunner().invoke(cli, ["build", "--checkpoint", str(folder), *map(str, options)])
    assert done.exit_code == 0, done.output
    assert "by the preprocessor of my-model" in done.output
    opened = load_model(checkpoint=folder)
    bundle = export(checkpoint=folder, bank="none", targets=[0, 2], out=tmp_path / "two")
    assert bundle.classes == tuple(f"bird {i}" for i in range(5))
    assert bundle.spec == opened.spec
    assert bundle.preprocess.crop_mode == "squash"
    images = np.random.default_rng(1).standard_normal((2, 3, 16, 16), np.float32)
    before = bundle.engine("r02").run(images)
    assert before.shape == (2, 5)
    assert np.isfinite(before).all()
    tensors = draw(CASES["vit"][1])
    tensors["classifier.bias"] = tensors["classifier.bias"] + np.float32(1)
    save_file(tensors, folder / "model.safetensors")
    refit(bundle.path, checkpoint=folder)
    after = load(bundle.path).engine("r02").run(images)
    assert np.allclose(after, before + 1, atol=1e-5)


def test_refit_with_a_model_of_another_form(write: Write, tmp_path: Path):
    folder = write()
    bundle = export(checkpoint=folder, bank="none", targets=[0], out=tmp_path / "b", verify=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(CheckpointError, match="has activation relu, the bundle gelu"):
        refit(bundle, checkpoint=folder)


def test_a_folder_is_inspected_as_a_checkpoint(write: Write):
    done = CliRunner().invoke(cli, ["inspect", str(write()), "--layers"])
    assert done.exit_code == 0, done.output
    assert "checkpoint" in done.output
    assert "blocks.0.attn.qkv.weight" in done.output


def test_a_folder_is_evaluated_as_a_checkpoint(write: Write):
    pytest.importorskip("torch")
    folder = write()
    command = ["evaluate", str(folder), "--data", "nowhere", "--bank", "none", "--targets", "0"]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code != 0
    assert "nowhere" in done.output
    done = CliRunner().invoke(cli, ["evaluate", str(folder), "--data", "nowhere", "--check"])
    assert "--check holds a bundle's engines against PyTorch; name a bundle" in done.output
    assert done.exit_code == 2


@pytest.mark.parametrize("case", ["siglip", "siglip bare"])
def test_a_pool_that_isnt_the_weights(write: Write, case: str):
    folder = write(case)
    pool = load_model(checkpoint=folder).spec.pool
    with pytest.raises(InputError, match=f"it is {pool}; leave `pool` out"):
        load_model(checkpoint=folder, pool="token")


def bare(tmp_path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A file without a config beside it."""
    (tmp_path / "elsewhere").mkdir()
    save_file(tensors, tmp_path / "elsewhere" / "weights.safetensors")
    return tmp_path / "elsewhere" / "weights.safetensors"


@pytest.mark.parametrize("case", CASES)
def test_a_spec_names_a_bare_files_tensors(write: Write, tmp_path: Path, case: str):
    folder = load_model(checkpoint=write(case))
    file = bare(tmp_path, draw(CASES[case][1]))
    found = Checkpoint.open(file, spec=folder.spec).tensors
    assert found.keys() == folder.checkpoint.tensors.keys()
    for name, tensor in folder.checkpoint.tensors.items():
        assert np.array_equal(found[name], tensor)


def test_a_bare_file_refits_a_bundle_and_a_pool(
    write: Write, tmp_path: Path, make_images: Callable[..., Any]
):
    folder = write("clip")
    bundle = export(checkpoint=folder, bank="none", targets=[2], out=tmp_path / "b", verify=False)
    images = make_images(bundle.spec)
    before = bundle.engine("r02").run(images)
    tensors = draw(CASES["clip"][1])
    tensors["classifier.bias"] = tensors["classifier.bias"] + np.float32(1)
    file = bare(tmp_path, tensors)
    with EnginePool(bundle.path, threads=1) as pool:
        pool.refit(checkpoint=file)
        assert np.allclose(pool.run(images), before + 1, atol=1e-4)
    refit(bundle, checkpoint=file, verify=False)
    assert np.allclose(load(bundle.path).engine("r02").run(images), before + 1, atol=1e-4)


def test_a_bare_file_of_another_model(write: Write, tmp_path: Path):
    spec = load_model(checkpoint=write("vit")).spec
    file = bare(tmp_path, draw(CASES["siglip bare"][1]))
    with pytest.raises(CheckpointError, match=r"weights.safetensors: \d+ of \d+ tensors of my-mod"):
        Checkpoint.open(file, spec=spec).check(spec)


def test_names_of_a_parallel_model(write: Write, tmp_path: Path):
    spec = load_model(checkpoint=write("vit")).spec
    tensors = draw(CASES["vit"][1])
    file = bare(tmp_path, {f"module.{name}": tensor for name, tensor in tensors.items()})
    assert Checkpoint.open(file, spec=spec).check(spec) == spec
    save_file({**tensors, "module.vit.layernorm.bias": np.ones(C, np.float32)}, file)
    with pytest.raises(CheckpointError, match=r"has both vit.layernorm.bias and module.vit.l"):
        Checkpoint.open(file, spec=spec)


@pytest.mark.parametrize("case", ["clip", "beit"])
def test_pickled_weights(write: Write, tmp_path: Path, case: str):
    torch = pytest.importorskip("torch")
    folder = write(case)
    expected = {name: np.array(t) for name, t in Checkpoint.open(folder).tensors.items()}
    spec = load_model(checkpoint=folder).spec
    state = {name: torch.from_numpy(tensor) for name, tensor in draw(CASES[case][1]).items()}
    for name in ("vision_model.embeddings.position_ids", "beit.x.relative_position_index"):
        state[name] = torch.arange(17)  # older versions wrote them
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    torch.save(state, tmp_path / "alone.bin")
    for opened in (
        Checkpoint.open(folder), Checkpoint.open(folder / "pytorch_model.bin"),
        Checkpoint.open(tmp_path / "alone.bin", spec=spec),
    ):  # fmt: skip
        assert opened.check(spec) == spec
        assert all(np.array_equal(opened.tensors[name], expected[name]) for name in expected)
    with pytest.raises(CheckpointError, match=r"alone.bin has the names .* config.json"):
        Checkpoint.open(tmp_path / "alone.bin")
