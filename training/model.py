"""The compressed ViT in PyTorch: the definition that engines are judged against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tocom_export.compression.method import Method
from tocom_export.compression.schedule import Schedule
from tocom_export.errors import UnsupportedModelError
from tocom_export.model.from_timm import spec_from_timm
from tocom_export.model.outputs import DENSE, OutputName, check_method
from tocom_export.model.spec import VitSpec
from tocom_export.model.weight_names import layer_scale_name

from .attention import Positions, attend
from .matching import follow, match, merge, take, token_map, unmerge
from .pruning import drop_map, prune

Degrees = int | Sequence[int]
"""A degree for all layers, or one per layer."""


SidePaths = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""What a bank adds: a layer and its normalised input (B, N, C) → what q and v gain (B, N, C)."""


class CompressedVit(nn.Module):
    """A timm ViT run at any degree, its own code and weights untouched.

    The wrapped model's submodules do the work; only attention is spelt out, because merging
    needs its keys (pruning its class attention) and the bank its queries and values.

    Args:
        vit: a timm ``VisionTransformer`` or one of its relatives.
        name: what to call the model; default: timm's name for it.

    Raises:
        UnsupportedModelError: a part of the model that can't be exported either.
    """

    match = staticmethod(match)
    merge = staticmethod(merge)

    def __init__(self, vit: nn.Module, method: Method | None = None, name: str | None = None):
        super().__init__()
        self.spec: VitSpec = spec_from_timm(vit, name)
        self.method = method or Method("tome")
        if self.method.name == "evit" and not self.spec.class_token:
            raise UnsupportedModelError(self.spec.model, "EViT without a class token")
        self.vit: Any = vit

    def forward(self, images: Tensor, degree: Degrees = 0, side: SidePaths | None = None) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W); without ``side`` uncompensated.

        Of a model without classes its embedding (B, channels).
        """
        return self.head(*self.features(images, degree, side))

    def embedding(
        self, images: Tensor, degree: Degrees = 0, side: SidePaths | None = None
    ) -> Tensor:
        """What a classifier reads, or a projection makes of that (B, channels)."""
        x, size = self.features(images, degree, side)
        return self.head(x, size, pre_logits=not self.spec.projection)

    def give(
        self,
        images: Tensor,
        names: Iterable[OutputName],
        degree: Degrees = 0,
        side: SidePaths | None = None,
        *,
        unit_embedding: bool = False,
    ) -> dict[str, Tensor]:
        """What a bundle's engines give of images (B, C, H, W), by name; of one forward.

        ``logits`` (B, classes), ``embedding`` (B, features), ``tokens`` (B, patches, C), all
        float32, and ``map`` (B, patches), int32.

        Raises:
            InputError: the method leaves no such output.
        """
        names = tuple(names)
        check_method(names, self.method)
        x, size, places = self._run(images, degree, side, follows=bool({*names} & {*DENSE}))
        bare = {"logits": False, "embedding": not self.spec.projection}
        found: dict[str, Tensor] = {
            name: self._spread(name, x, places)
            if name in DENSE
            else self.head(x, size, bare[name]).float()
            for name in names
        }
        if unit_embedding and "embedding" in found:
            found["embedding"] = nn.functional.normalize(found["embedding"], dim=-1)
        return found

    def no_weight_decay(self) -> set[str]:
        """Names that timm's optimizers leave without weight decay: tokens and positions."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    @property
    def drop_path(self) -> float:
        """Probability, while training, that the last layer's branches are left out."""
        probability = getattr(self.vit.blocks[-1].drop_path1, "drop_prob", None) or 0.0
        return round(float(probability), 6)  # timm spaces them in float32

    def compile(self) -> None:
        """Compile the MLPs, once for any number of tokens.

        A graph of the whole model would be another for each degree that distillation draws.
        """
        for block in self.vit.blocks:
            block.mlp.compile(dynamic=True)

    def features(
        self, images: Tensor, degree: Degrees = 0, side: SidePaths | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The last layer's normalised tokens (B, N', C), and their sizes (B, N', 1) if merged."""
        x, size, _ = self._run(images, degree, side)
        return x, size

    def _run(
        self, images: Tensor, degree: Degrees, side: SidePaths | None, follows: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same, and if they are followed where the first tokens went (B, N).

        None where all are still where they were.
        """
        vit, spec = self.vit, self.spec
        went: Tensor | None = None
        schedule = Schedule.of(spec, degree, self.method.merge)
        x = self._embed(images)  # (B, N, C)
        positions = Positions.of(vit, spec)
        size: Tensor | None = None
        places: Tensor | None = None
        for layer, (block, remove) in enumerate(zip(vit.blocks, schedule.removed, strict=True)):
            normed = x if spec.post_norm else block.norm1(x)
            gain = side(layer, normed) if side else None
            out, metric = attend(
                block.attn, normed, spec, self.method, positions, layer, size, places, gain, remove
            )
            x = x + self._finish(block, 1, out)
            if metric is not None and self.method.merge == "ffn":
                matching = self.match(metric, remove, spec.prefix)
                merged, _ = self.merge(matching, x, torch.ones_like(x[..., :1]))  # (B, N - r, C)
                x = x + unmerge(matching, self._feed(block, merged))
                continue
            if metric is not None and self.method.name == "tome":
                size = torch.ones_like(x[..., :1]) if size is None else size
                matching = self.match(metric, remove, spec.prefix)
                x, size = self.merge(matching, x, size)  # (B, N - r, C)
                places = matching.keep(places) if spec.positional else None
                went = follow(went, token_map(matching)) if follows else None
            elif metric is not None:
                before = x.shape[1]
                x, kept = prune(x, metric, remove, spec.prefix)  # (B, N - r, C)
                went = follow(went, drop_map(kept, before)) if follows else None
                places = kept if places is None else places.gather(1, kept)
            x = x + self._feed(block, x)
        return vit.norm(x), size, went

    def _spread(self, name: OutputName, x: Tensor, places: Tensor | None) -> Tensor:
        """Of each patch the token that it went into (B, patches, C), float32; or which that is."""
        first = self.spec.prefix
        if places is None:
            places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        patches = places[:, first:]
        if name == "map":
            return (patches - first).clamp(min=-1).int()
        return take(x, patches).float()

    def _embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → tokens (B, N, C)."""
        vit = self.vit
        x = vit.patch_embed(images)
        if self.spec.family == "vit":
            embedded: Tensor = vit.norm_pre(vit._pos_embed(x))
        elif self.spec.family == "eva":
            embedded = vit.norm_pre(vit._pos_embed(x)[0])
        else:  # they do it in their forward
            token = getattr(vit, "cls_token", None)
            x = x if token is None else torch.cat([token.expand(len(x), -1, -1), x], dim=1)
            embedded = x + vit.pos_embed if self.spec.positions else x
        return embedded

    def _feed(self, block: Any, x: Tensor) -> Tensor:
        """What a layer's MLP adds to tokens (B, N, C)."""
        return self._finish(block, 2, block.mlp(x if self.spec.post_norm else block.norm2(x)))

    def _finish(self, block: Any, which: int, branch: Tensor) -> Tensor:
        """What a branch (B, N, C) adds to the tokens: scaled, or normed, or as it is."""
        if self.spec.post_norm:
            branch = getattr(block, f"norm{which}")(branch)
        elif which in self.spec.scaled:
            scale = layer_scale_name(self.spec, 0, which).removeprefix("blocks.0.")
            scaled = getattr(block, scale.removesuffix(".gamma"))
            branch = scaled(branch) if scale.endswith(".gamma") else scaled * branch
        dropped: Tensor = getattr(block, f"drop_path{which}")(branch)
        return dropped

    def head(self, x: Tensor, size: Tensor | None, pre_logits: bool = False) -> Tensor:
        """Logits, or (B, C) before them; averages weigh a merged token by its size."""
        vit, spec = self.vit, self.spec
        if spec.pool != "token_avg" and (spec.pool == "token" or size is None):
            logits: Tensor = vit.forward_head(x, pre_logits=pre_logits)
            return logits
        if spec.pool == "map":
            assert size is not None
            first = spec.pooled_from
            weight = size[:, first:].log().to(x.dtype).transpose(1, 2)[:, None]  # (B, 1, 1, N)
            pooled = vit.attn_pool(x[:, first:], attn_mask=weight)
        else:
            size = torch.ones_like(x[..., :1]) if size is None else size
            weight = size[:, spec.prefix :]
            pooled = (x[:, spec.prefix :] * weight).sum(dim=1) / weight.sum(dim=1)
            if spec.pool == "token_avg":
                pooled = torch.cat([x[:, 0], pooled], dim=-1)
        pooled = vit.head_drop(vit.fc_norm(pooled))
        found: Tensor = pooled if pre_logits else vit.head(pooled)
        return found
