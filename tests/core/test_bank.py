from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tocom_export.compression.bank import FACTORS, ToComBank
from tocom_export.compression.bank_groups import Arithmetic, groups_of
from tocom_export.compression.metadata import METADATA_KEY
from tocom_export.compression.method import Method
from tocom_export.errors import BankError, DegreeError
from tocom_export.model.spec import VitSpec

degrees = st.integers(0, 16)


@pytest.fixture(scope="module")
def spec(make_spec: Callable[..., VitSpec]) -> VitSpec:
    return make_spec(width=16, heads=2, depth=3)


@pytest.fixture(scope="module")
def bank(make_bank: Callable[..., ToComBank], spec: VitSpec) -> ToComBank:
    return make_bank(spec)


def slow_gap(
    bank: ToComBank, layer: int, source: int, target: int, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """The paper's sums, a step at a time."""
    q, v = np.zeros((bank.width, bank.width)), np.zeros((bank.width, bank.width))
    sign = 1 if target > source else -1
    for g in range(min(source, target), max(source, target)):
        q += sign * scale * (bank.q_up[layer, g].astype(float) @ bank.q_down[layer, g])
        v += sign * scale * (bank.v_up[layer, g].astype(float) @ bank.v_down[layer, g])
    return q, v


@given(layer=st.integers(0, 2), source=degrees, target=degrees, scale=st.floats(0.01, 1))
def test_gap_is_the_signed_sum_of_its_steps(
    bank: ToComBank, layer: int, source: int, target: int, scale: float
):
    gap = bank.gap(layer, source, target, scale)
    for found, expected in zip(gap, slow_gap(bank, layer, source, target, scale), strict=True):
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@given(source=degrees, target=degrees)
def test_gap_is_antisymmetric(bank: ToComBank, source: int, target: int):
    there, back = bank.gap(1, source, target, 0.1), bank.gap(1, target, source, 0.1)
    for a, b in zip(there, back, strict=True):
        np.testing.assert_array_equal(a, -b)
        assert a.any() == (source != target)


@given(source=degrees, middle=degrees, target=degrees)
def test_gap_telescopes(bank: ToComBank, source: int, middle: int, target: int):
    first, second = bank.gap(2, source, middle, 0.1), bank.gap(2, middle, target, 0.1)
    for a, b, whole in zip(first, second, bank.gap(2, source, target, 0.1), strict=True):
        np.testing.assert_allclose(a + b, whole, rtol=0, atol=1e-12)


@given(layer=st.integers(0, 2), source=degrees, low=st.integers(0, 15), share=st.floats(0, 1))
def test_between_whole_degrees_the_gap_is_interpolated(
    bank: ToComBank, layer: int, source: int, low: int, share: float
):
    found = bank.gap(layer, source, low + share, 0.1)
    below, above = (bank.gap(layer, source, low + end, 0.1) for end in (0, 1))
    for gap, a, b in zip(found, below, above, strict=True):
        np.testing.assert_allclose(gap, (1 - share) * a + share * b, rtol=0, atol=1e-12)


@given(source=degrees, middle=degrees, target=st.floats(0, 16))
def test_gap_telescopes_to_any_target(bank: ToComBank, source: int, middle: int, target: float):
    first, second = bank.gap(2, source, middle, 0.1), bank.gap(2, middle, target, 0.1)
    for a, b, whole in zip(first, second, bank.gap(2, source, target, 0.1), strict=True):
        np.testing.assert_allclose(a + b, whole, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def ablated(make_bank: Callable[..., ToComBank], spec: VitSpec) -> Callable[..., ToComBank]:
    """A bank of the paper's ablation, its groups all different."""

    def make(arithmetic: Any) -> ToComBank:
        return replace(make_bank(spec, groups=groups_of(arithmetic)), arithmetic=arithmetic)

    return make


@given(source=degrees, target=degrees)
def test_a_shared_banks_gap_knows_no_degrees(ablated: Callable, source: int, target: int):
    bank = ablated("shared")
    whole = 0.3 * (bank.q_up[1, 0].astype(float) @ bank.q_down[1, 0].astype(float))
    q, _ = bank.gap(1, source, target, 0.3)
    np.testing.assert_allclose(q, whole if source != target else 0 * whole, rtol=0, atol=1e-12)


@given(source=degrees, target=degrees, scale=st.floats(0.01, 1))
def test_without_inversion_the_way_down_has_groups_of_its_own(
    ablated: Callable, source: int, target: int, scale: float
):
    bank = ablated("no-inversion")
    low, high = sorted((source, target))
    offset = 16 if source > target else 0
    q, v = bank.gap(2, source, target, scale)
    wanted_q, wanted_v = np.zeros_like(q), np.zeros_like(v)
    for g in range(offset + low, offset + high):
        wanted_q += scale * (bank.q_up[2, g].astype(float) @ bank.q_down[2, g])
        wanted_v += scale * (bank.v_up[2, g].astype(float) @ bank.v_down[2, g])
    np.testing.assert_allclose(q, wanted_q, rtol=0, atol=1e-9)
    np.testing.assert_allclose(v, wanted_v, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("arithmetic", "holds"), [("steps", True), ("shared", False), ("no-inversion", False)]
)
def test_only_steps_add_up_and_turn_round(ablated: Callable, arithmetic: str, holds: bool):
    bank = ablated(arithmetic)
    there, back = bank.gap(0, 3, 11, 1.0)[0], bank.gap(0, 11, 3, 1.0)[0]
    assert np.allclose(there, -back) == holds
    past = bank.gap(0, 3, 14, 1.0)[0] + bank.gap(0, 14, 11, 1.0)[0]
    assert np.allclose(past, there) == holds


@pytest.mark.parametrize("arithmetic", get_args(Arithmetic))
def test_the_arithmetic_is_saved(tmp_path: Path, ablated: Callable, spec: VitSpec, arithmetic: Any):
    bank = ablated(arithmetic)
    bank.save(tmp_path / "bank.safetensors")
    loaded = ToComBank.load(tmp_path / "bank.safetensors")
    loaded.check(spec, Method("tome"))
    assert (loaded.arithmetic, loaded.groups) == (arithmetic, groups_of(arithmetic))
    assert loaded.max_degree == 16
    for pair in ((2, 9), (9, 2)):
        for a, b in zip(bank.gap(1, *pair, 0.1), loaded.gap(1, *pair, 0.1), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_bank_that_doesnt_say_is_of_steps(tmp_path: Path, bank: ToComBank):
    file = tmp_path / "bank.safetensors"
    meta = {"method": {"name": "tome"}, "model": "m"}
    save_file(bank.factors(), file, {METADATA_KEY: json.dumps(meta)})
    assert ToComBank.load(file).arithmetic == "steps"


@pytest.mark.parametrize("arithmetic", ["shared", "no-inversion"])
def test_groups_of_another_arithmetic_are_refused(
    make_bank: Callable[..., ToComBank], spec: VitSpec, arithmetic: Any
):
    bank = replace(make_bank(spec), arithmetic=arithmetic)
    with pytest.raises(BankError, match=rf"groups 16.* {groups_of(arithmetic)};"):
        bank.check(spec, Method("tome"))


@pytest.mark.parametrize(("source", "target"), [(-1, 4), (0, 17), (17, 17), (4, -1)])
@pytest.mark.parametrize("arithmetic", ["shared", "no-inversion"])
def test_an_ablations_degrees_end_at_16_too(
    ablated: Callable, arithmetic: str, source: int, target: int
):
    with pytest.raises(DegreeError, match=r"0\.\.16"):
        ablated(arithmetic).gap(0, source, target, 0.1)


@pytest.mark.parametrize(
    ("source", "target"),
    [(-1, 4), (0, 17), (17, 17), (4, -1), (0, 16.1), (0, -0.1), (0, float("nan"))],
)
def test_gap_out_of_range(bank: ToComBank, source: int, target: float):
    with pytest.raises(DegreeError, match=r"0\.\.16"):
        bank.gap(0, source, target, 0.1)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_rank_of_one_step(make_bank: Callable[..., ToComBank], spec: VitSpec, rank: int):
    bank = make_bank(spec, rank=rank)
    for gap in bank.gap(0, 4, 5, 1.0):
        assert np.linalg.matrix_rank(gap) == rank == bank.rank


def test_parameters_of_deit_base(make_bank: Callable[..., ToComBank]):
    spec = VitSpec("deit_b", (224, 224), (16, 16), 768, 12, 12, 3072, 1000)
    assert make_bank(spec).parameters == 1_179_648


@pytest.mark.parametrize("method", [Method("tome"), Method("tome", False), Method("evit")])
def test_save_and_load(tmp_path: Path, bank: ToComBank, method: Method):
    file = tmp_path / "folder" / "bank.safetensors"
    ToComBank(**dict(zip(("q_down", "q_up", "v_down", "v_up"), bank.factors().values(),
              strict=True)), method=method, model="m").save(file)  # fmt: skip
    loaded = ToComBank.load(file)
    assert (loaded.method, loaded.model) == (method, "m")
    assert (loaded.depth, loaded.groups, loaded.rank, loaded.width) == (3, 16, 2, 16)
    for name, factor in bank.factors().items():
        np.testing.assert_array_equal(loaded.factors()[name], factor)
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_saved_bank_is_reproducible(tmp_path: Path, bank: ToComBank):
    for name in ("a", "b"):
        bank.save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("other", "method", "what", "ours", "theirs"),
    [
        ({"width": 32}, "tome", "width", 16, 32),
        ({"depth": 12}, "tome", "depth", 3, 12),
        ({}, "evit", "method", "tome", "evit"),
    ],
)
def test_another_model_is_refused_saying_both_sides(
    bank: ToComBank, spec: VitSpec, make_spec, other: dict, method: Any, what: str, ours, theirs
):
    theirs_spec = make_spec(**{"width": spec.width, "heads": 2, "depth": spec.depth, **other})
    with pytest.raises(BankError) as caught:
        bank.check(theirs_spec, Method(method), "bank.safetensors")
    for part in ("bank.safetensors", what, str(ours), str(theirs), theirs_spec.model):
        assert part in str(caught.value)


def test_another_number_of_groups_is_refused(make_bank: Callable[..., ToComBank], spec: VitSpec):
    with pytest.raises(BankError, match=r"groups 12.* 16"):
        make_bank(spec, groups=12).check(spec, Method("tome"))


def test_a_fitting_bank_passes(bank: ToComBank, spec: VitSpec):
    bank.check(spec, Method("tome"))
    with pytest.raises(BankError, match="without proportional attention"):
        bank.check(spec, Method("tome", proportional=False))


def broken(bank: ToComBank, tmp_path: Path, change: Callable, meta: Any = None) -> tuple[Path, str]:
    file = tmp_path / "bank.safetensors"
    bank.save(file)
    tensors = load_file(file)
    change(tensors)
    meta = {"method": {"name": "tome"}, "model": "m"} if meta is None else meta
    save_file(tensors, file, {METADATA_KEY: meta if isinstance(meta, str) else json.dumps(meta)})
    with pytest.raises(BankError) as caught:
        ToComBank.load(file)
    assert str(file) in str(caught.value)
    return file, str(caught.value)


def put(name: str, value: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


@pytest.mark.parametrize("name", FACTORS)
def test_not_finite(tmp_path: Path, bank: ToComBank, name: str):
    _, message = broken(bank, tmp_path, put(name, lambda t: np.where(t == t.max(), np.nan, t)))
    assert name in message


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (put("v.up", lambda t: t[:, :, :, :1].copy()), "v.up"),
        (put("v.down", lambda t: t[:1].copy()), "v.down"),
        (put("q.up", lambda t: t[0].copy()), "q.up"),
        (put("q.down", lambda t: (t * 9).astype(np.int32)), "q.down"),
        (lambda tensors: tensors.pop("q.up"), "q.up"),
        (lambda tensors: tensors.update(k=np.ones(1, np.float32)), "q.up"),
        (lambda tensors: tensors.update(x=tensors.pop("v.down")), "v.down"),
    ],
)
def test_wrong_names_shapes_or_types(tmp_path: Path, bank: ToComBank, change, part: str):
    _, message = broken(bank, tmp_path, change)
    assert part in message


@pytest.mark.parametrize(
    "meta",
    [
        "{",
        "[]",
        "3",
        {},
        {"model": "m"},
        {"method": "tome", "model": "m"},
        {"method": {"name": "topk"}, "model": "m"},
        {"method": {"name": "tome", "proportional": 1}, "model": "m"},
        {"method": {"name": "tome"}, "model": 3},
        {"method": {"name": "tome"}, "model": "m", "arithmetic": "sums"},
        {"method": {"name": "tome"}, "model": "m", "rank": 2},
    ],
)
def test_bad_metadata(tmp_path: Path, bank: ToComBank, meta: Any):
    _, message = broken(bank, tmp_path, lambda _: None, meta)
    assert "is not a ToCom bank: its metadata" in message


def test_a_bank_without_metadata(tmp_path: Path, bank: ToComBank):
    save_file(bank.factors(), tmp_path / "bank.safetensors")
    with pytest.raises(BankError, match="is not a ToCom bank: its metadata"):
        ToComBank.load(tmp_path / "bank.safetensors")


def test_a_checkpoint_is_not_a_bank(tmp_path: Path, make_checkpoint, spec: VitSpec):
    file = make_checkpoint(tmp_path, spec)
    with pytest.raises(BankError, match=r"not a ToCom bank") as caught:
        ToComBank.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["none.safetensors", "none.pth"])
def test_missing_file(tmp_path: Path, name: str):
    with pytest.raises(BankError, match=f"{name}: no such file"):
        ToComBank.load(tmp_path / name)


@pytest.mark.parametrize("name", ["bank.safetensors", "bank.pth"])
def test_truncated_file(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(BankError) as caught:
        ToComBank.load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_factors_must_fit_together(bank: ToComBank):
    factors = list(bank.factors().values())
    with pytest.raises(BankError, match=r"q\.up.*\(3, 16, 16, 2\)"):
        ToComBank(factors[0], factors[0], *factors[2:], method=Method("tome"))


def authors_state(spec: VitSpec, rank: int, seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in range(spec.depth):
        for projection in "qv":
            name = f"blocks.{layer}.attn.{projection}_tocom.adapter"
            for end, shape in (
                ("down", (16 * rank, spec.width)), ("up", (spec.width, 16 * rank))
            ):  # fmt: skip
                state[f"{name}_{end}.weight"] = torch.randn(shape, generator=generator).double()
    return state


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_authors_layout(tmp_path: Path, spec: VitSpec, rank: int, wrapped: bool):
    state = authors_state(spec, rank)
    torch.save({"model": state, "epoch": 9} if wrapped else state, tmp_path / "bank.pth")
    bank = ToComBank.load(tmp_path / "bank.pth")
    bank.check(spec, Method("tome"))
    assert bank.rank == rank
    for layer in range(spec.depth):
        for degree in range(1, 17):
            gaps = bank.gap(layer, 0, degree, 1.0)
            for projection, gap in zip("qv", gaps, strict=True):
                name = f"blocks.{layer}.attn.{projection}_tocom.adapter"
                down = state[f"{name}_down.weight"].numpy()[-degree * rank :]
                up = state[f"{name}_up.weight"].numpy()[:, -degree * rank :]
                np.testing.assert_allclose(gap, up @ down, rtol=0, atol=1e-9)


def test_the_authors_layout_survives_our_own(tmp_path: Path, spec: VitSpec):
    torch.save(authors_state(spec, 2), tmp_path / "bank.pth")
    bank = ToComBank.load(tmp_path / "bank.pth")
    bank.save(tmp_path / "bank.safetensors")
    again = ToComBank.load(tmp_path / "bank.safetensors")
    for a, b in zip(bank.gap(1, 3, 11, 0.1), again.gap(1, 3, 11, 0.1), strict=True):
        np.testing.assert_array_equal(a, b)


def drop(name: str) -> Callable[[dict], Any]:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        drop("blocks.0.attn.q_tocom.adapter_down.weight"),
        drop("blocks.2.attn.v_tocom.adapter_up.weight"),
        lambda state: state.update({"blocks.1.attn.q_tocom.adapter_up.weight": torch.ones(3, 4)}),
        lambda state: state.update({k: v[:, :30] for k, v in state.items() if "_up" in k}),
        lambda state: state.update({k: v * torch.nan for k, v in state.items()}),
        lambda state: state.clear(),
    ],
    ids=["no first", "no last", "misshapen", "no 16 groups", "NaN", "empty"],
)
def test_broken_authors_file(tmp_path: Path, spec: VitSpec, change: Callable[[dict], Any]):
    state = authors_state(spec, 2)
    change(state)
    torch.save({"model": state}, tmp_path / "bank.pth")
    with pytest.raises(BankError) as caught:
        ToComBank.load(tmp_path / "bank.pth")
    assert str(tmp_path / "bank.pth") in str(caught.value)


class Malicious:
    """Unpickling it runs code."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path):
    torch.save({"model": Malicious(tmp_path / "witness")}, tmp_path / "bank.pth")
    with pytest.raises(BankError):
        ToComBank.load(tmp_path / "bank.pth")
    assert not (tmp_path / "witness").exists()
