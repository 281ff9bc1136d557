from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tocom_export.training.pruning import prune


@settings(deadline=None)
@given(
    patches=st.integers(2, 24), prefix=st.integers(1, 6), share=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_pruning_is_what_the_method_says(patches: int, prefix: int, share: float, seed: int):
    remove = round(share * (patches // 2))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, prefix + patches, 5, generator=g, dtype=torch.float64)
    attention = torch.rand(2, prefix + patches, generator=g)
    found, _ = prune(x, attention, remove, prefix)
    for image in range(2):
        scores = attention[image].tolist()
        order = sorted(range(prefix, prefix + patches), key=lambda p: scores[p])
        kept = [*range(prefix), *order[remove:][::-1]]
        assert torch.equal(found[image], x[image, kept])


@pytest.mark.parametrize("value", [0, 0.25, torch.nan])
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_of_equally_attended_tokens_the_last_ones_go(prefix: int, value: float):
    x = torch.arange(60.0).reshape(1, 60, 1)
    attention = torch.full((1, 60), value)
    assert torch.equal(prune(x, attention, 20, prefix)[0], x[:, :40])
