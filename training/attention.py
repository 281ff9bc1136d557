"""Attention of timm's ViTs, spelt out: merging needs its keys, a bank its queries and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from tocom_export.compression.method import Method
from tocom_export.model.spec import VitSpec

Gain = tuple[Tensor, Tensor]
"""What a bank adds to queries and values (B, N, C) each."""


@dataclass(frozen=True)
class Positions:
    """What attention reads of where tokens are, of all first tokens N0; None where it doesn't."""

    rotary: Sequence[Tensor] | None
    """Of each layer sines and cosines side by side (1 or H, N0, 2D); 0 and 1 of prefix tokens."""
    bias: Sequence[Tensor] | None
    """Of each layer (H, N0, N0)."""

    @classmethod
    def of(cls, vit: Any, spec: VitSpec) -> Positions:
        """Those of a timm model."""
        rotary = bias = None
        if spec.rotary is not None:
            found = vit.rope.get_embed()
            found = found if spec.rotary.kind == "mixed" else found[None, None]  # (L, H, P, 2D)
            still = found.new_zeros(*found.shape[:2], spec.prefix, found.shape[-1])
            still[..., spec.head_width :] = 1
            rotary = list(torch.cat([still, found], dim=2).expand(spec.depth, -1, -1, -1))
        if spec.relative == "shared_mlp":
            bias = [vit.shared_rel_pos.get_bias()[0]] * spec.depth
        elif spec.family == "beit" and spec.relative:
            bias = [block.attn._get_rel_pos_bias()[0] for block in vit.blocks]
        elif spec.relative:
            bias = [block.attn.rel_pos.get_bias()[0] for block in vit.blocks]
        return cls(rotary, bias)

    def rotate(self, x: Tensor, layer: int, half: bool, places: Tensor | None) -> Tensor:
        """Queries or keys (B, H, N, D), turned by where each token was first.

        Args:
            places: which first token each one is (B, N); None where none has gone yet.
        """
        assert self.rotary is not None
        table = self.rotary[layer][None]  # (1, H, N0, 2D)
        if places is not None:
            table = table[0][:, places].transpose(0, 1)  # (B, H, N, 2D)
        turned: Tensor = apply_rot_embed_cat(x, table, half=half)
        return turned

    def find_bias(self, layer: int, places: Tensor | None) -> Tensor:
        """What attention gains (1 or B, H, N, N)."""
        assert self.bias is not None
        table = self.bias[layer]
        if places is None:
            return table[None]
        return table[:, places[:, :, None], places[:, None, :]].transpose(0, 1)


def project(attn: Any, x: Tensor, spec: VitSpec, gain: Gain | None) -> list[Tensor]:
    """Queries, keys and values (B, H, N, D) of normalised tokens (B, N, C)."""
    if spec.split_qkv:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        qkv = attn.qkv(x)
        if spec.qkv_bias and not spec.k_bias:
            qkv = qkv + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        q, k, v = qkv.split(spec.width, dim=-1)
    if gain is not None:
        q, v = q + gain[0], v + gain[1]
    shape = (*x.shape[:2], spec.heads, spec.head_width)
    q, k, v = (t.reshape(shape).transpose(1, 2) for t in (q, k, v))
    return [attn.q_norm(q), attn.k_norm(k), v] if spec.qk_norm else [q, k, v]


def _mix(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Values (B, H, N, D), mixed by how well queries and keys agree.

    PyTorch's fused attention takes 2 to 5 times as long as its three products where a CPU
    trains in bfloat16 (54 to 201 tokens, forward and backward); elsewhere it is no slower.
    """
    if not (q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
    scores = scores if bias is None else scores + bias
    return F.dropout(scores.softmax(dim=-1).to(v.dtype), dropout) @ v


def attend(
    attn: Any,
    x: Tensor,
    spec: VitSpec,
    method: Method,
    positions: Positions,
    layer: int,
    size: Tensor | None,
    places: Tensor | None,
    gain: Gain | None,
    remove: int,
) -> tuple[Tensor, Tensor | None]:
    """Attention's output (B, N, C), and by what tokens are removed, averaged over heads.

    That is the keys (B, N, D) for merging, as attention compares them: rotated where the model does
    so (docs/positions.md); for pruning the class token's attention (B, N).
    """
    batch, tokens, width = x.shape
    q, k, v = project(attn, x, spec, gain)
    if spec.rotary is not None:
        q = positions.rotate(q, layer, spec.rotary.half, places)
        k = positions.rotate(k, layer, spec.rotary.half, places)
    bias = None if spec.relative is None else positions.find_bias(layer, places).to(q.dtype)
    if size is not None and method.proportional:
        weight = size.log().to(q.dtype).reshape(batch, 1, 1, tokens)
        bias = weight if bias is None else bias + weight
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = _mix(q, k, v, bias, dropout)
    out = out.transpose(1, 2).reshape(batch, tokens, width)
    out = attn.norm(out) if spec.attention_norm else out
    out = attn.proj_drop(attn.proj(out))
    if not remove:
        return out, None
    if method.name == "tome":
        return out, k.mean(dim=1)
    with torch.autocast(q.device.type, enabled=False):  # tokens are ranked in float32
        scaled = q[:, :, :1].float() * spec.head_width**-0.5
        scores = scaled @ k.float().transpose(-2, -1)  # (B, H, 1, N)
        if spec.relative is not None:
            scores = scores + positions.find_bias(layer, places)[:, :, :1].float()
    return out, scores.softmax(dim=-1).mean(dim=1)[:, 0]
