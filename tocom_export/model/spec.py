"""The architecture of a plain Vision Transformer, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from ..errors import InputError

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]
Pool = Literal["token", "avg"]
Size = Annotated[int, Meta(ge=1, le=1_000_000)]
"""No model has a dimension beyond it; keeps a bad file from costing memory."""
Count = Annotated[int, Meta(ge=0, le=1_000_000)]


@dataclass(frozen=True)
class VitSpec:
    """What fixes a ViT's graph and the names and shapes of its weights.

    Everything that timm's ``VisionTransformer`` (and ``VisionTransformerDistilled``) can
    vary and that we can express; what we can't is refused when the spec is made
    (:func:`tocom_export.model.from_timm.spec_from_timm`).
    """

    model: str
    """The model's name, timm's where it has one."""
    image_size: tuple[Size, Size]
    """Height and width, pixels."""
    patch_size: tuple[Size, Size]
    width: Size
    """Channels of a token, ``C``."""
    depth: Size
    """Number of layers, ``L``."""
    heads: Size
    mlp_width: Size
    classes: Count
    """Number of logits; 0 for a model without a head, whose pooled features are the output."""
    channels: Size = 3
    eps: Annotated[float, Meta(gt=0, lt=1)] = 1e-6
    """Epsilon of every LayerNorm."""
    activation: Activation = "gelu"
    qkv_bias: bool = True
    linear_bias: bool = True
    """Bias of the attention's projection and of both MLP layers."""
    patch_bias: bool = True
    class_token: bool = True
    distilled: bool = False
    """A distillation token after the class token; the two heads' logits are averaged."""
    registers: Count = 0
    prefix_positions: bool = True
    """Whether the position embedding has entries for the prefix tokens."""
    pre_norm: bool = False
    """A LayerNorm before the first layer (CLIP)."""
    layer_scale: bool = False
    qk_norm: bool = False
    pool: Pool = "token"
    final_norm: Literal["norm", "fc_norm"] | None = "norm"
    """LayerNorm before the pooling (``norm``), after it (``fc_norm``), or none."""
    adapter_width: Count = 0
    """Bottleneck of an AdaptFormer branch beside each MLP; 0 for none."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.model, re.ASCII):  # it becomes a folder's name
            raise InputError(f"model spec: {self.model!r} is no name for a model.")
        if self.width % self.heads:
            raise InputError(
                f"model spec: width {self.width} is no multiple of {self.heads} heads."
            )
        if not self.patches:
            raise InputError(f"model spec: image {self.image_size} is smaller than a patch.")
        if self.pool == "token" and not self.class_token:
            raise InputError("model spec: pool 'token' needs a class token.")
        plain = self.prefix_positions and not self.registers and self.final_norm != "fc_norm"
        if self.distilled and not (plain and self.class_token and self.pool == "token"):
            raise InputError(
                "model spec: a distilled model has a class token that is pooled, no registers, "
                "positions for its prefix, and its norm before the heads."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return (
            self.image_size[0] // self.patch_size[0],
            self.image_size[1] // self.patch_size[1],
        )

    @property
    def patches(self) -> int:
        """Number of patch tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Number of protected tokens before the patches: class, distillation, registers."""
        return int(self.class_token) + int(self.distilled) + self.registers

    @property
    def tokens(self) -> int:
        """Tokens that enter the first layer, prefix included."""
        return self.prefix + self.patches

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    def weights(self) -> dict[str, tuple[int, ...]]:
        """PyTorch name → shape of every tensor in a checkpoint of this model."""
        c, m = self.width, self.mlp_width
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, out: int, into: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (out, into)
            if bias:
                shapes[f"{name}.bias"] = (out,)

        def norm(name: str, width: int = c) -> None:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

        if self.class_token:
            shapes["cls_token"] = (1, 1, c)
        if self.distilled:
            shapes["dist_token"] = (1, 1, c)
        if self.registers:
            shapes["reg_token"] = (1, self.registers, c)
        positions = self.tokens if self.prefix_positions else self.patches
        shapes["pos_embed"] = (1, positions, c)
        shapes["patch_embed.proj.weight"] = (c, self.channels, *self.patch_size)
        if self.patch_bias:
            shapes["patch_embed.proj.bias"] = (c,)
        if self.pre_norm:
            norm("norm_pre")
        for layer in range(self.depth):
            block = f"blocks.{layer}"
            norm(f"{block}.norm1")
            linear(f"{block}.attn.qkv", 3 * c, c, self.qkv_bias)
            if self.qk_norm:
                norm(f"{block}.attn.q_norm", self.head_width)
                norm(f"{block}.attn.k_norm", self.head_width)
            linear(f"{block}.attn.proj", c, c, self.linear_bias)
            norm(f"{block}.norm2")
            linear(f"{block}.mlp.fc1", m, c, self.linear_bias)
            linear(f"{block}.mlp.fc2", c, m, self.linear_bias)
            if self.adapter_width:
                linear(f"{block}.mlp.adapter_down", self.adapter_width, c, True)
                linear(f"{block}.mlp.adapter_up", c, self.adapter_width, True)
            if self.layer_scale:
                shapes[f"{block}.ls1.gamma"] = shapes[f"{block}.ls2.gamma"] = (c,)
        if self.final_norm:
            norm(self.final_norm)
        if self.classes:
            linear("head", self.classes, c, True)
            if self.distilled:
                linear("head_dist", self.classes, c, True)
        return shapes
