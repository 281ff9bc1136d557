from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tocom_export.training.matching import match, merge, prune

Rows = list[list[float]]


def slow_merge(
    x: Rows, size: list[float], keys: Rows, remove: int, prefix: int
) -> tuple[Rows, list[float]]:
    """One image, token by token, as the method is described."""

    def cosine(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(keys[i], keys[j], strict=True))
        return dot / math.hypot(*keys[i]) / math.hypot(*keys[j])

    a = [p for p in range(prefix, len(x)) if p % 2 == 0]
    b = [p for p in range(prefix, len(x)) if p % 2 == 1]
    partner = {i: max(b, key=lambda j: cosine(i, j)) for i in a}
    merged = sorted(a, key=lambda i: cosine(i, partner[i]), reverse=True)[:remove]
    tokens, sizes = [], []
    for position in [*range(prefix), *(i for i in a if i not in merged), *b]:
        group = [position, *(i for i in merged if partner[i] == position)]
        total = sum(size[i] for i in group)
        channels = range(len(x[0]))
        tokens.append([sum(x[i][c] * size[i] for i in group) / total for c in channels])
        sizes.append(total)
    return tokens, sizes


def draw(batch: int, tokens: int, seed: int, channels: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=g, dtype=torch.float64)
    size = torch.randint(1, 6, (batch, tokens, 1), generator=g).double()
    return x, size, torch.randn(batch, tokens, 4, generator=g, dtype=torch.float64)


@settings(deadline=None)
@given(
    patches=st.integers(2, 24),
    prefix=st.integers(0, 6),
    share=st.floats(0, 1),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_merging_is_what_the_method_says(
    patches: int, prefix: int, share: float, batch: int, seed: int
):
    remove = round(share * (patches // 2))
    x, size, keys = draw(batch, prefix + patches, seed)
    found, sizes = merge(x, size, keys, remove, prefix)
    assert found.shape == (batch, prefix + patches - remove, x.shape[2])
    for image in range(batch):
        expected, expected_sizes = slow_merge(
            x[image].tolist(), size[image, :, 0].tolist(), keys[image].tolist(), remove, prefix
        )
        torch.testing.assert_close(found[image], torch.tensor(expected, dtype=torch.float64))
        assert sizes[image, :, 0].tolist() == expected_sizes


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("remove", [1, 5, 10])
def test_merging_keeps_the_total(prefix: int, remove: int):
    x, size, keys = draw(3, prefix + 21, 0)
    found, sizes = merge(x, size, keys, remove, prefix)
    torch.testing.assert_close(sizes.sum(dim=1), size.sum(dim=1))
    torch.testing.assert_close((found * sizes).sum(dim=1), (x * size).sum(dim=1))
    torch.testing.assert_close(found[:, :prefix], x[:, :prefix])


def test_equal_tokens_merge_into_themselves():
    x = torch.arange(4.0).repeat(1, 1).T[None].repeat(1, 1, 3)[:, [0, 1, 1, 2, 2, 3, 3]]
    keys = torch.eye(4)[[0, 1, 1, 2, 2, 3, 3]][None]
    found, sizes = merge(x, torch.ones(1, 7, 1), keys, 3, 1)
    assert found[0, :, 0].tolist() == [0, 1, 2, 3]
    assert sizes[0, :, 0].tolist() == [1, 2, 2, 2]


def test_several_tokens_may_go_into_one():
    keys = torch.tensor([[9.0, 9], [1, 0], [1, 0.1], [0, 1], [1, 0.2], [0, 1], [-1, 0]])[None]
    kept, merged, into = match(keys, 2, 1)
    assert kept.tolist() == [[6]]
    assert merged.tolist() == [[2, 4]]
    assert into.tolist() == [[0, 0]]


def test_the_length_of_a_key_does_not_matter():
    x, size, keys = draw(2, 20, 3)
    first, _ = merge(x, size, keys, 6, 1)
    scale = torch.linspace(0.1, 9, 20, dtype=torch.float64)[:, None]
    second, _ = merge(x, size, keys * scale, 6, 1)
    torch.testing.assert_close(first, second)


@settings(deadline=None)
@given(
    patches=st.integers(2, 24), prefix=st.integers(1, 6), share=st.floats(0, 1),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_pruning_is_what_the_method_says(patches: int, prefix: int, share: float, seed: int):
    remove = round(share * (patches // 2))
    x, _, _ = draw(2, prefix + patches, seed)
    attention = torch.rand(2, prefix + patches, generator=torch.Generator().manual_seed(seed))
    found = prune(x, attention, remove, prefix)
    for image in range(2):
        scores = attention[image].tolist()
        order = sorted(range(prefix, prefix + patches), key=lambda p: scores[p])
        kept = [*range(prefix), *sorted(order[remove:])]
        assert torch.equal(found[image], x[image, kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_blur_similarities(dtype: torch.dtype):
    """Keys that are much alike, as those of neighbouring patches: bfloat16 can't rank them."""
    g = torch.Generator().manual_seed(0)
    keys = (torch.randn(4, 1, 16, generator=g) + 0.05 * torch.randn(4, 41, 16, generator=g)).to(
        dtype
    )
    wanted = match(keys.float(), 8, 1)
    with torch.autocast("cpu", torch.bfloat16):
        got = match(keys, 8, 1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))
