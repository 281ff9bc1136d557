"""Other ways to choose and to mix the tokens that go, at equal token counts, without training.

python benchmarks/methods.py CHECKPOINT... --data FOLDER... --bank FILE

Each checkpoint (of a ViT with a class token, trained at degree 0) is measured on the test images of
the folder in the same place. All rules remove what ToMe removes in each layer, so that all cost the
same but for a little in the matching itself:

    merge       ToMe: similarity merges, sizes weigh
    prune a     of what goes, a share a are the tokens that the class token attends to least, which
                are dropped; the rest merges (DiffRate's combination)
    energy      those merge that have many alike, half of them into the other half (PiToMe)
    attention   ToMe's merges, with means weighted by the class token's attention

Prints a Markdown table of accuracies in percent, with the bank, and in brackets without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tocom_export.compression.bank import ToComBank
from tocom_export.compression.method import Method
from tocom_export.compression.schedule import Schedule
from tocom_export.loading import load_model
from tocom_export.study.accuracy import measure_accuracy
from tocom_export.training.attention import Positions, project
from tocom_export.training.data.evaluation import open_test_data
from tocom_export.training.lora import TrainableBank
from tocom_export.training.matching import match, merge, merge_sum, take
from tocom_export.training.model import CompressedVit, SidePaths
from tocom_export.training.starting import make_network

DEGREES = (8, 12, 16)


@dataclass(frozen=True)
class Layer:
    """What a rule is told of a layer, behind its attention."""

    metric: Tensor
    """Keys, averaged over heads (B, N, D)."""
    attention: Tensor
    """The class token's, averaged over heads (B, N)."""
    depth: float
    """0 for the first layer, 1 for the last."""
    prefix: int


Reduced = tuple[Tensor, Tensor]
"""Tokens (B, N - r, C) and their sizes (B, N - r, 1)."""
Rule = Callable[[Layer, Tensor, Tensor, int], Reduced]
"""A layer, tokens (B, N, C), sizes (B, N, 1), and how many are to go."""


def merge_alike(layer: Layer, x: Tensor, size: Tensor, remove: int) -> Reduced:
    """ToMe."""
    return merge(match(layer.metric, remove, layer.prefix), x, size)


def prune_and_merge(share: float, layer: Layer, x: Tensor, size: Tensor, remove: int) -> Reduced:
    """Drop a share of those that go, the least attended, and merge the rest."""
    drop, p = round(share * remove), layer.prefix
    order = layer.attention[:, p:].argsort(dim=1, descending=True, stable=True)
    kept = order[:, : order.shape[1] - drop].sort(dim=1).values + p
    first = torch.arange(p).expand(len(kept), -1)
    kept = torch.cat([first, kept], dim=1)
    metric, x, size = (take(t, kept) for t in (layer.metric, x, size))
    # What is left may be too few to merge as many: half of them can go.
    left = min(remove - drop, (x.shape[1] - p) // 2)
    x, size = merge(match(metric, left, p), x, size)
    return x, size


def merge_by_energy(layer: Layer, x: Tensor, size: Tensor, remove: int) -> Reduced:
    """Merge the 2r tokens with the most alike, every other one of them into its best match."""
    p = layer.prefix
    keys = torch.nn.functional.normalize(layer.metric[:, p:], dim=-1)
    alike = keys @ keys.transpose(1, 2)  # (B, N, N)
    margin = 0.9 - 0.9 * layer.depth
    energy = torch.where(alike >= margin, alike, torch.expm1(alike - margin)).mean(dim=-1)
    order = energy.argsort(dim=1, descending=True, stable=True)
    goes, stays = order[:, : 2 * remove], order[:, 2 * remove :].sort(dim=1).values
    a, b = goes[:, ::2], goes[:, 1::2]
    rows = alike.gather(1, a[..., None].expand(-1, -1, alike.shape[2]))
    into = rows.gather(2, b[:, None].expand(-1, a.shape[1], -1)).argmax(dim=-1)  # (B, r)

    def add(tokens: Tensor) -> Tensor:
        own = tokens[:, p:]
        sums = take(own, b).scatter_add(
            1, into[..., None].expand(-1, -1, tokens.shape[2]), take(own, a)
        )
        return torch.cat([tokens[:, :p], take(own, stays), sums], dim=1)

    total = add(size)
    return add(x * size) / total, total


def weigh_by_attention(layer: Layer, x: Tensor, size: Tensor, remove: int) -> Reduced:
    """ToMe's merges, with means in which those count that the class token attends to."""
    matching = match(layer.metric, remove, layer.prefix)
    weight = layer.attention[..., None].clamp(min=1e-8)
    mixed = merge_sum(matching, x * weight) / merge_sum(matching, weight)
    return mixed, merge_sum(matching, size)


RULES: dict[str, Rule] = {
    "merge": merge_alike,
    "prune 0.25": partial(prune_and_merge, 0.25),
    "prune 0.5": partial(prune_and_merge, 0.5),
    "energy": merge_by_energy,
    "attention": weigh_by_attention,
}


def run(
    network: CompressedVit, rule: Rule, degree: int, side: SidePaths | None, images: Tensor
) -> Tensor:
    """Logits (B, classes) where a rule says what goes."""
    vit, spec = network.vit, network.spec
    schedule, positions = Schedule.of(spec, degree), Positions.of(vit, spec)
    x = network._embed(images)
    size = torch.ones_like(x[..., :1])
    for index, (block, remove) in enumerate(zip(vit.blocks, schedule.removed, strict=True)):
        normed = block.norm1(x)
        gain = side(index, normed) if side else None
        q, k, v = project(block.attn, normed, spec, gain)
        scores = q @ k.transpose(-2, -1) * spec.head_width**-0.5
        weights = (scores + size.log().transpose(1, 2)[:, None]).softmax(dim=-1)
        out = (weights @ v).transpose(1, 2).flatten(2)
        x = x + network._finish(block, 1, block.attn.proj(out))
        if remove:
            attention = weights[:, :, 0].mean(dim=1)
            layer = Layer(k.mean(dim=1), attention, index / (spec.depth - 1), spec.prefix)
            x, size = rule(layer, x, size, remove)
        x = x + network._finish(block, 2, block.mlp(block.norm2(x)))
    assert positions.rotary is None
    assert x.shape[1] == schedule.tokens_out[-1]
    return network.head(vit.norm(x), size)


@torch.inference_mode()
def measure(checkpoint: Path, data: str, bank: Path) -> dict[str, list[str]]:
    """Accuracies of all rules at all degrees, as they are printed."""
    model = load_model(checkpoint=checkpoint)
    network = make_network(model, Method("tome"), 0.0).eval()
    steps = TrainableBank.from_bank(ToComBank.load(bank), model.spec)
    images = open_test_data(data, model.spec, model.preprocess)
    chosen = [(rule, d, c) for rule in RULES.values() for d in DEGREES for c in (True, False)]

    def make(rule: Rule, degree: int, compensated: bool) -> Callable[..., object]:
        side = steps.side(0, degree) if compensated else None

        def call(pixels: object) -> object:
            return run(network, rule, degree, side, torch.as_tensor(pixels)).numpy()

        return call

    whole = measure_accuracy([make(merge_alike, 0, False)], images)[0]
    scores = measure_accuracy([make(*each) for each in chosen], images)
    print(f"{data}: {whole.accuracy:.2f} % at degree 0, {whole.total} images", flush=True)
    found = [f"{score.accuracy:.2f}" for score in scores]
    cells = iter(zip(found[::2], found[1::2], strict=True))
    return {
        name: [f"{own} ({bare})" for own, bare in (next(cells) for _ in DEGREES)] for name in RULES
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--bank", type=Path, required=True)
    options = parser.parse_args()
    print(f"| set | rule | {' | '.join(f'r = {degree}' for degree in DEGREES)} |")
    print("|---|---|" + "---:|" * len(DEGREES))
    for checkpoint, data in zip(options.checkpoints, options.data, strict=True):
        for name, cells in measure(checkpoint, data, options.bank).items():
            print(f"| {Path(data).parent.name} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
