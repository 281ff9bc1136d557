from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tocom_export.compression.method import Method
from tocom_export.training.matching import Matching, match, merge, token_map
from tocom_export.training.model import CompressedVit
from tocom_export.training.scatter_merge import ScatterMergeVit, scatter_match, scatter_merge

PATCHES = {"class_token": False, "pool": "avg"}
"""A model without a protected token."""


@pytest.fixture
def batch(make_images: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    return lambda spec, size: torch.from_numpy(make_images(spec, size, seed=3))


@pytest.mark.parametrize("degree", [0, 1, 4, 8, 16, (0, 16, 3, 40)], ids=str)
@pytest.mark.parametrize("changes", [{}, PATCHES, {"pool": "avg"}], ids=str)
@pytest.mark.parametrize("proportional", [True, False])
def test_the_same_logits(
    make_vit, make_spec, batch, changes: dict[str, Any], degree: Any, proportional: bool
):
    vit, method = make_vit(make_spec(**changes)), Method("tome", proportional)
    images = batch(make_spec(**changes), 8)
    scatter, ours = ScatterMergeVit(vit, method).eval(), CompressedVit(vit, method).eval()
    assert scatter.spec.prefix == (0 if changes is PATCHES else 1)
    with torch.inference_mode():
        found, expected = scatter(images, degree), ours(images, degree)
        dense = ours(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not degree or (dense - expected).abs().max() > 1e-2  # or the above would say little


def test_its_own_merging_is_what_runs(make_vit, make_spec, batch, monkeypatch):
    matched: list[int] = []
    merged: list[int] = []

    def count_match(metric: Tensor, remove: int, prefix: int) -> Matching:
        matched.append(remove)
        return scatter_match(metric, remove, prefix)

    def count_merge(matching: Matching, x: Tensor, size: Tensor) -> Any:
        merged.append(matching.merged.shape[1])
        return scatter_merge(matching, x, size)

    monkeypatch.setattr(ScatterMergeVit, "match", staticmethod(count_match))
    monkeypatch.setattr(ScatterMergeVit, "merge", staticmethod(count_merge))
    ScatterMergeVit(make_vit(make_spec())).eval()(batch(make_spec(), 1), 8)
    assert matched == merged == [8] * 4


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("tokens", [12, 13])
def test_the_same_tokens(prefix: int, tokens: int):
    """One by one, in the same order, from one merged away to all that can be."""
    draw = torch.Generator().manual_seed(tokens)
    x = torch.randn(3, tokens, 8, generator=draw)
    size = torch.randint(1, 5, (3, tokens, 1), generator=draw).float()
    metric = torch.randn(3, tokens, 6, generator=draw)
    metric[1, 3] = 0  # a token of set B without keys
    for remove in range(1, (tokens - prefix) // 2 + 1):
        theirs, ours = (how(metric, remove, prefix) for how in (scatter_match, match))
        assert torch.equal(token_map(theirs), token_map(ours))
        found, expected = scatter_merge(theirs, x, size), merge(ours, x, size)
        assert found[0].shape == (3, tokens - remove, 8)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
        assert torch.equal(found[1], expected[1])
        assert (found[1].sum(dim=1) == size.sum(dim=1)).all()
        if prefix:
            assert torch.equal(found[1][:, 0], size[:, 0])
