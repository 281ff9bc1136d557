from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tocom_export.training.matching import follow, match, merge, merge_sum, token_map, unmerge

Rows = list[list[float]]


def merge_slowly(
    x: Rows, size: list[float], keys: Rows, remove: int, prefix: int
) -> tuple[Rows, list[float], list[int]]:
    """One image, token by token, as the method is described: tokens, sizes, where each went."""

    def cosine(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(keys[i], keys[j], strict=True))
        return dot / math.hypot(*keys[i]) / math.hypot(*keys[j])

    a = [p for p in range(prefix, len(x)) if p % 2 == 0]
    b = [p for p in range(prefix, len(x)) if p % 2 == 1]
    partner = {i: max(b, key=lambda j: cosine(i, j)) for i in a}
    merged = sorted(a, key=lambda i: cosine(i, partner[i]), reverse=True)[:remove]
    tokens, sizes, places = [], [], [-1] * len(x)
    for position in [*range(prefix), *(i for i in a if i not in merged), *b]:
        group = [position, *(i for i in merged if partner[i] == position)]
        for member in group:
            places[member] = len(tokens)
        total = sum(size[i] for i in group)
        channels = range(len(x[0]))
        tokens.append([sum(x[i][c] * size[i] for i in group) / total for c in channels])
        sizes.append(total)
    return tokens, sizes, places


def draw(batch: int, tokens: int, seed: int, channels: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=g, dtype=torch.float64)
    size = torch.randint(1, 6, (batch, tokens, 1), generator=g).double()
    return x, size, torch.randn(batch, tokens, 4, generator=g, dtype=torch.float64)


any_merge = given(
    patches=st.integers(2, 24),
    prefix=st.integers(0, 6),
    share=st.floats(0, 1),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)


@settings(deadline=None)
@any_merge
def test_merging_is_what_the_method_says(
    patches: int, prefix: int, share: float, batch: int, seed: int
):
    remove = round(share * (patches // 2))
    x, size, keys = draw(batch, prefix + patches, seed)
    matching = match(keys, remove, prefix)
    found, sizes = merge(matching, x, size)
    assert found.shape == (batch, prefix + patches - remove, x.shape[2])
    for image in range(batch):
        expected, expected_sizes, places = merge_slowly(
            x[image].tolist(), size[image, :, 0].tolist(), keys[image].tolist(), remove, prefix
        )
        torch.testing.assert_close(found[image], torch.tensor(expected, dtype=torch.float64))
        assert sizes[image, :, 0].tolist() == expected_sizes
        assert token_map(matching)[image].tolist() == places


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("remove", [1, 5, 10])
def test_merging_keeps_the_total(prefix: int, remove: int):
    x, size, keys = draw(3, prefix + 21, 0)
    found, sizes = merge(match(keys, remove, prefix), x, size)
    torch.testing.assert_close(sizes.sum(dim=1), size.sum(dim=1))
    torch.testing.assert_close((found * sizes).sum(dim=1), (x * size).sum(dim=1))
    torch.testing.assert_close(found[:, :prefix], x[:, :prefix])


@settings(deadline=None)
@any_merge
def test_a_matching_says_where_each_token_is(
    patches: int, prefix: int, share: float, batch: int, seed: int
):
    """Kept, merged, prefix and set B are all tokens; the map is onto what is left."""
    tokens, remove = prefix + patches, round(share * (patches // 2))
    matching = match(draw(batch, tokens, seed)[2], remove, prefix)
    assert (matching.tokens, matching.prefix) == (tokens, prefix)
    assert matching.merged.shape == matching.into.shape == (batch, remove)
    places = token_map(matching)
    assert (places.shape, places.dtype) == ((batch, tokens), torch.int64)
    b = [p for p in range(prefix, tokens) if p % 2 == 1]
    for image in range(batch):
        kept, merged = matching.kept[image].tolist(), matching.merged[image].tolist()
        assert sorted([*range(prefix), *kept, *merged, *b]) == list(range(tokens))
        assert kept == sorted(kept)
        left = [*range(prefix), *kept, *b]
        assert places[image, left].tolist() == list(range(tokens - remove))
        partners = [b[index] for index in matching.into[image].tolist()]
        assert places[image, merged].tolist() == places[image, partners].tolist()


@settings(deadline=None)
@any_merge
def test_unmerging_copies_a_token_to_all_that_went_into_it(
    patches: int, prefix: int, share: float, batch: int, seed: int
):
    tokens, remove = prefix + patches, round(share * (patches // 2))
    x, size, keys = draw(batch, tokens, seed)
    matching = match(keys, remove, prefix)
    merged, sizes = merge(matching, x, size)
    back, places = unmerge(matching, merged), token_map(matching)
    assert back.shape == x.shape
    for image, position in torch.cartesian_prod(torch.arange(batch), torch.arange(tokens)):
        assert torch.equal(back[image, position], merged[image, places[image, position]])
    # What is spread out again and merged once more is what was merged.
    torch.testing.assert_close(merge(matching, back, size)[0], merged)
    alone = (unmerge(matching, sizes) == size)[..., 0]
    torch.testing.assert_close(back[alone], x[alone])
    assert torch.equal(back[:, :prefix], merged[:, :prefix])


@settings(deadline=None)
@any_merge
def test_merging_undone_is_exact_where_equal_tokens_merge(
    patches: int, prefix: int, share: float, batch: int, seed: int
):
    """Whole numbers, of which each pair's tokens hold the same; r = 0 is the least of these."""
    tokens, remove = prefix + patches, round(share * (patches // 2))
    matching = match(draw(batch, tokens, seed)[2], remove, prefix)
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-99, 99, (batch, tokens - remove, 3), generator=g).float()
    size = torch.randint(1, 6, (batch, tokens, 1), generator=g).float()
    wide = unmerge(matching, x)
    assert torch.equal(merge(matching, wide, size)[0], x)
    assert torch.equal(unmerge(matching, merge(matching, wide, size)[0]), wide)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_matching_nothing_moves_set_b_behind_set_a(prefix: int):
    x, _, keys = draw(2, prefix + 9, 0)
    matching = match(keys, 0, prefix)
    merged, size = merge(matching, x, torch.ones_like(x[..., :1]))
    a, b = prefix + prefix % 2, prefix + 1 - prefix % 2
    assert torch.equal(merged, torch.cat([x[:, :prefix], x[:, a::2], x[:, b::2]], dim=1))
    assert torch.equal(size, torch.ones_like(size))
    assert torch.equal(unmerge(matching, merged), x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64])
def test_any_tensor_with_a_token_dimension_is_summed_and_spread(dtype: torch.dtype):
    keys = draw(2, 13, 1)[2]
    matching = match(keys, 5, 1)
    x = torch.arange(2 * 13 * 3).reshape(2, 13, 3).to(dtype)
    found, places = merge_sum(matching, x), token_map(matching)
    assert found.dtype == unmerge(matching, found).dtype == dtype
    expected = torch.zeros(2, 8, 3).to(dtype)
    for image in range(2):
        expected[image] = expected[image].index_add(0, places[image], x[image])
    assert torch.equal(found, expected)


def test_the_example_of_the_page():
    """The picture above the code: 2 goes into 5."""
    keys = torch.tensor([[1.0, 1], [1, 0], [-1, 0.1], [0, 1], [1, 1], [-1, 0], [1, -1]])[None]
    matching = match(keys, 1, 1)
    assert token_map(matching).tolist() == [[0, 3, 5, 4, 1, 5, 2]]
    x = torch.arange(7.0)[None, :, None]
    merged, size = merge(matching, x, torch.ones(1, 7, 1))
    assert merged.flatten().tolist() == [0, 4, 6, 1, 3, 3.5]
    assert size.flatten().tolist() == [1, 1, 1, 1, 1, 2]
    assert unmerge(matching, merged).flatten().tolist() == [0, 1, 3.5, 3, 4, 3.5, 6]


def test_a_matching_cannot_be_changed():
    matching = match(draw(1, 9, 0)[2], 2, 1)
    with pytest.raises(AttributeError):
        matching.prefix = 2  # type: ignore[misc]


def test_equal_tokens_merge_into_themselves():
    x = torch.arange(4.0).repeat(1, 1).T[None].repeat(1, 1, 3)[:, [0, 1, 1, 2, 2, 3, 3]]
    keys = torch.eye(4)[[0, 1, 1, 2, 2, 3, 3]][None]
    matching = match(keys, 3, 1)
    found, sizes = merge(matching, x, torch.ones(1, 7, 1))
    assert found[0, :, 0].tolist() == [0, 1, 2, 3]
    assert sizes[0, :, 0].tolist() == [1, 2, 2, 2]
    assert torch.equal(unmerge(matching, found), x)


def test_several_tokens_may_go_into_one():
    keys = torch.tensor([[9.0, 9], [1, 0], [1, 0.1], [0, 1], [1, 0.2], [0, 1], [-1, 0]])[None]
    matching = match(keys, 2, 1)
    assert matching.kept.tolist() == [[6]]
    assert matching.merged.tolist() == [[2, 4]]
    assert matching.into.tolist() == [[0, 0]]
    assert token_map(matching).tolist() == [[0, 2, 2, 3, 2, 4, 1]]


def test_the_length_of_a_key_does_not_matter():
    x, size, keys = draw(2, 20, 3)
    first, _ = merge(match(keys, 6, 1), x, size)
    scale = torch.linspace(0.1, 9, 20, dtype=torch.float64)[:, None]
    second, _ = merge(match(keys * scale, 6, 1), x, size)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_token_without_keys_is_like_no_other(dtype: torch.dtype):
    """It is merged last, and nothing is merged into it while there is anything more alike."""
    keys = draw(1, 13, 0)[2].abs().to(dtype)
    keys[0, [2, 5]] = 0  # one of set A, one of set B
    matching = match(keys, 5, 1)
    assert 2 not in matching.merged
    assert 2 not in matching.into  # 5 is the third of set B
    keys[:] = 0
    matching = match(keys, 5, 1)
    assert matching.merged.tolist() == [[2, 4, 6, 8, 10]]
    assert matching.into.tolist() == [[0] * 5]


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
    for part in ("kept", "merged", "into"):
        assert torch.equal(getattr(got, part), getattr(wanted, part))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("remove", [0, 1, 7, 16])
def test_nothing_is_lost_of_tokens_that_are_equal_in_pairs(prefix: int, remove: int):
    """To the last bit; of any tokens where none is merged."""
    g = torch.Generator().manual_seed(remove)
    pairs = torch.randn(3, 16, 9, generator=g).repeat_interleave(2, dim=1)
    x = torch.cat([torch.randn(3, prefix, 9, generator=g), pairs], dim=1)
    if prefix % 2:  # the first patch is of set B then, and so begins a pair all the same
        assert x[:, prefix].equal(x[:, prefix + 1])
    matching = match(x, remove, prefix)
    merged, size = merge(matching, x, torch.ones_like(x[..., :1]))
    assert merged.shape[1] == prefix + 32 - remove
    assert torch.equal(unmerge(matching, merged), x)
    assert int((size == 2).sum()) == 3 * remove
    other = torch.randn(x.shape, generator=g)
    nothing = match(x, 0, prefix)
    assert torch.equal(
        unmerge(nothing, merge(nothing, other, torch.ones(3, 1, 1).expand(-1, prefix + 32, 1))[0]),
        other,
    )


def test_following_several_steps():
    first, second = torch.tensor([[0, 2, -1, 1]]), torch.tensor([[1, -1, 0]])
    assert follow(None, first).equal(first)
    assert follow(first, second).tolist() == [[1, 0, -1, -1]]
