"""The architecture of a plain Vision Transformer, as data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import InputError

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]
Pool = Literal["token", "avg"]


@dataclass(frozen=True)
class VitSpec:
    """What fixes a ViT's graph and the names and shapes of its weights.

    Everything that timm's ``VisionTransformer`` (and ``VisionTransformerDistilled``) can
    vary and that we can express; what we can't is refused when the spec is made
    (:func:`tocom_export.model.from_timm.spec_from_timm`).
    """

    model: str
    """The model's name, timm's where it has one."""
    image_size: tuple[int, int]
    """Height and width, pixels."""
    patch_size: tuple[int, int]
    width: int
    """Channels of a token, ``C``."""
    depth: int
    """Number of layers, ``L``."""
    heads: int
    mlp_width: int
    classes: int
    """Number of logits; 0 for a model without a head, whose pooled features are the output."""
    channels: int = 3
    eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    activation: Activation = "gelu"
    qkv_bias: bool = True
    linear_bias: bool = True
    """Bias of the attention's projection and of both MLP layers."""
    patch_bias: bool = True
    class_token: bool = True
    distilled: bool = False
    """A distillation token after the class token; the two heads' logits are averaged."""
    registers: int = 0
    prefix_positions: bool = True
    """Whether the position embedding has entries for the prefix tokens."""
    pre_norm: bool = False
    """A LayerNorm before the first layer (CLIP)."""
    layer_scale: bool = False
    qk_norm: bool = False
    pool: Pool = "token"
    final_norm: Literal["norm", "fc_norm"] | None = "norm"
    """LayerNorm before the pooling (``norm``), after it (``fc_norm``), or none."""
    adapter_width: int = 0
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

    def to_json(self) -> dict[str, Any]:
        """A JSON object; fields at their default are left out."""
        return {
            f.name: list(value) if isinstance(value, tuple) else value
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VitSpec:
        """The inverse of :meth:`to_json`.

        Raises:
            InputError: a field is missing, unknown, of a wrong type or out of range.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - set(fields)):
            raise InputError(f"model spec: unknown field {unknown[0]!r}.")
        values: dict[str, Any] = {}
        for name, field in fields.items():
            if name in data:
                values[name] = _parse(name, field.type, data[name])
            elif field.default is dataclasses.MISSING:
                raise InputError(f"model spec: field {name!r} is missing.")
        return cls(**values)


_LARGEST = 1_000_000  # no model has a dimension beyond it; keeps a bad file from costing memory
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "activation": ("gelu", "gelu_tanh", "quick_gelu", "relu"),
    "pool": ("token", "avg"),
    "final_norm": ("norm", "fc_norm", None),
}


def _parse(name: str, kind: Any, value: Any) -> Any:
    """One JSON value as the type that the field ``name`` is annotated with."""
    if name in _CHOICES:
        if value in _CHOICES[name]:
            return value
    elif kind == "bool":
        if isinstance(value, bool):
            return value
    elif kind == "str":
        if isinstance(value, str):
            return value
    elif kind == "float":
        if type(value) is float and 0 < value < 1:
            return float(value)
    elif kind == "int":
        least = 0 if name in ("classes", "registers", "adapter_width") else 1
        if type(value) is int and least <= value <= _LARGEST:
            return value
    elif (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(type(v) is int and 0 < v <= _LARGEST for v in value)
    ):
        return tuple(value)
    raise InputError(f"model spec: field {name!r} can't be {value!r}.")
