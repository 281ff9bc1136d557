"""The compressed ViT in PyTorch: the definition that engines are judged against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tocom_export.compression.method import Method
from tocom_export.compression.schedule import Schedule
from tocom_export.errors import UnsupportedModelError
from tocom_export.model.from_timm import spec_from_timm
from tocom_export.model.spec import VitSpec

from .matching import match, merge
from .pruning import prune

Degrees = int | Sequence[int]
"""A degree for all layers, or one per layer."""


SidePaths = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""What a bank adds: a layer and its normalised input (B, N, C) → what q and v gain (B, N, C)."""


class CompressedVit(nn.Module):
    """A timm ViT run at any degree, its own code and weights untouched.

    The wrapped model's submodules do the work; only attention is spelt out here, because
    merging needs its keys (pruning its class attention) and the bank its queries and values.

    Args:
        vit: a timm ``VisionTransformer`` or ``VisionTransformerDistilled``.
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
        """Logits (B, classes) of images (B, C, H, W); without ``side`` uncompensated."""
        return self.head(*self.features(images, degree, side))

    def pooled(self, images: Tensor, degree: Degrees = 0, side: SidePaths | None = None) -> Tensor:
        """What the head reads (B, C): the features of a backbone without one."""
        return self.head(*self.features(images, degree, side), pre_logits=True)

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
        vit = self.vit
        schedule = Schedule.of(self.spec, degree)
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))  # (B, N, C)
        size: Tensor | None = None
        for layer, (block, remove) in enumerate(zip(vit.blocks, schedule.removed, strict=True)):
            normed = block.norm1(x)
            gain = side(layer, normed) if side else None
            out, metric = self._attention(block.attn, normed, size, gain, remove)
            x = x + block.drop_path1(block.ls1(out))
            if metric is not None and self.method.name == "tome":
                size = torch.ones_like(x[..., :1]) if size is None else size
                matching = self.match(metric, remove, self.spec.prefix)
                x, size = self.merge(matching, x, size)  # (B, N - r, C)
            elif metric is not None:
                x = prune(x, metric, remove, self.spec.prefix)  # (B, N - r, C)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return vit.norm(x), size

    def head(self, x: Tensor, size: Tensor | None, pre_logits: bool = False) -> Tensor:
        """Logits, or (B, C) before them; averages weigh a merged token by its size."""
        vit = self.vit
        if self.spec.pool == "token" or size is None:
            logits: Tensor = vit.forward_head(x, pre_logits=pre_logits)
            return logits
        size = size[:, self.spec.prefix :]
        x = (x[:, self.spec.prefix :] * size).sum(dim=1) / size.sum(dim=1)
        x = vit.head_drop(vit.fc_norm(x))
        return x if pre_logits else vit.head(x)

    def _attention(
        self,
        attn: Any,
        x: Tensor,
        size: Tensor | None,
        gain: tuple[Tensor, Tensor] | None,
        remove: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention's output (B, N, C), and by what tokens are removed, averaged over heads.

        That is the keys (B, N, D) for merging, the class token's attention (B, N) for pruning.
        """
        batch, tokens, width = x.shape
        heads = (batch, tokens, attn.num_heads, attn.head_dim)
        q, k, v = attn.qkv(x).split(width, dim=-1)
        if gain is not None:
            q, v = q + gain[0], v + gain[1]
        q, k, v = (t.reshape(heads).transpose(1, 2) for t in (q, k, v))  # (B, H, N, D)
        q, k = attn.q_norm(q), attn.k_norm(k)

        bias = None
        if size is not None and self.method.proportional:
            bias = size.log().to(q.dtype).reshape(batch, 1, 1, tokens)
        out = F.scaled_dot_product_attention(
            q, k, v, bias, dropout_p=attn.attn_drop.p if self.training else 0.0
        )
        out = attn.proj_drop(attn.proj(out.transpose(1, 2).reshape(batch, tokens, width)))

        if not remove:
            return out, None
        if self.method.name == "tome":
            return out, k.mean(dim=1)
        with torch.autocast(q.device.type, enabled=False):  # tokens are ranked in float32
            scaled = q[:, :, :1].float() * attn.scale
            scores = scaled @ k.float().transpose(-2, -1)  # (B, H, 1, N)
        return out, scores.softmax(dim=-1).mean(dim=1)[:, 0]
