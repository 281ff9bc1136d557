"""What an engine can give: names, forms, and which a model has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import pytest

from tocom_export.bundle.manifest import Manifest
from tocom_export.bundle.writing import Blueprint, write_bundle
from tocom_export.compression.schedule import Schedule
from tocom_export.errors import InputError
from tocom_export.io.json_codec import decode, encode
from tocom_export.model.outputs import (
    FORMS,
    Form,
    OutputName,
    choose_outputs,
    format_outputs,
    list_forms,
    pluralise,
)
from tocom_export.preparing import prepare

MakeSpec = Callable[..., Any]


def test_each_name_has_a_form():
    assert tuple(FORMS) == get_args(OutputName)


def test_forms(make_spec: MakeSpec):
    spec = make_spec()
    both = list_forms(spec, ("embedding", "logits"))
    assert list(both.items()) == [("embedding", Form((64,))), ("logits", Form((10,)))]
    wide = make_spec(pool="token_avg")
    assert list_forms(wide, ("embedding",)) == {"embedding": Form((128,))}
    assert format_outputs(both, True) == "embedding (64, of length 1), logits (10)"
    assert format_outputs(both, False) == "embedding (64), logits (10)"
    assert [pluralise(name) for name in both] == ["embeddings", "logits"]


def test_what_a_model_is_for(make_spec: MakeSpec):
    spec, bare = make_spec(), make_spec(classes=0)
    assert choose_outputs(spec) == ("logits",)
    assert choose_outputs(bare) == ("embedding",)
    assert choose_outputs(spec, ["embedding", "logits", "embedding"]) == ("embedding", "logits")
    assert choose_outputs(spec, "embedding") == ("embedding",)
    with pytest.raises(InputError, match="`outputs` logits: small has no head that gives them"):
        choose_outputs(bare, ["embedding", "logits"])
    known = r"logits, embedding, tokens, map\."
    with pytest.raises(InputError, match=f"`outputs` 'probs': it is {known}"):
        choose_outputs(spec, ["probs"])


def test_what_is_prepared():
    assert prepare(targets=(0,)).outputs == ("logits",)
    both = prepare(targets=(0,), outputs=("embedding", "logits"), unit_embedding=True)
    assert (both.outputs, both.unit_embedding) == (("embedding", "logits"), True)
    assert both.accuracy  # the head is still there
    alone = prepare(targets=(0,), outputs=["embedding"])
    assert alone.accuracy == {}  # that is the head's
    assert alone.weights.spec.classes == 200
    with pytest.raises(InputError, match=r"`unit_embedding` is of embeddings; .* `outputs`"):
        prepare(targets=(0,), unit_embedding=True)


def test_a_manifest_keeps_them(make_blueprint: Callable[..., Blueprint], tmp_path: Any):
    plain = write_bundle(make_blueprint(tmp_path, targets=(0,)), tmp_path / "plain")
    assert not {"outputs", "unit_embedding"} & encode(plain).keys()  # as before there were others
    made = dataclasses.replace(
        make_blueprint(tmp_path, targets=(0,)), outputs=("embedding",), unit_embedding=True
    )
    bundle = write_bundle(made, tmp_path / "bundle")
    data = bundle.to_json()
    assert (data.pop("outputs"), data.pop("unit_embedding")) == (["embedding"], True)
    assert data.pop("format")
    old = decode(Manifest, data)
    assert (old.outputs, old.unit_embedding) == (("logits",), False)
    for wrong in ((), ("logits", "logits")):
        with pytest.raises(InputError, match="outputs: there is none, or one twice"):
            dataclasses.replace(old, outputs=wrong)
    with pytest.raises(InputError, match=r"outputs\[0\]: invalid enum value 'x'"):
        decode(Manifest, {**data, "outputs": ["x"]})


def test_what_a_bundle_gives(make_blueprint: Callable[..., Blueprint], tmp_path: Any):
    made = make_blueprint(tmp_path, targets=(0,))
    bundle = write_bundle(made, tmp_path / "bundle")
    assert (bundle.find_output("logits"), bundle.has_logits) == ("logits", True)
    with pytest.raises(InputError, match=r"bundle gives no embedding \(logits alone\); build it"):
        bundle.find_output("embedding")
    alone = dataclasses.replace(bundle, outputs=("embedding",))
    assert (alone.find_output("embedding"), alone.has_logits) == ("embedding", False)
    with pytest.raises(InputError, match=r"no logits \(embedding alone\); .*--output logits, too"):
        alone.find_output("logits")
    assert alone.reads("norm.weight") and bundle.reads("head.weight")
    assert not alone.reads("head.weight") and not alone.reads("head_dist.bias")


def test_a_head_that_makes_an_embedding(make_spec: MakeSpec):
    """It belongs to the embedding: no classes, its weights are read, and its products count."""
    spec, bare = make_spec(classes=0, projection=24, head_bias=False), make_spec(classes=0)
    assert choose_outputs(spec) == ("embedding",)
    assert list_forms(spec, ("embedding",)) == {"embedding": Form((24,))}
    assert {*spec.weights()} - {*bare.weights()} == {"head.weight"}
    macs = [Schedule.of(each, 0).macs(each) for each in (spec, bare)]
    assert macs[0] - macs[1] == 24 * 64
    with pytest.raises(InputError, match="`outputs` logits: small has no head that gives them"):
        choose_outputs(spec, ["logits"])
    for more in ({"classes": 3}, {"distilled": True}):
        with pytest.raises(InputError, match="a head that makes an embedding stands alone"):
            make_spec(**{"classes": 0, "projection": 24, **more})
