"""The architecture of a plain Vision Transformer, as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from ..errors import InputError
from ..io.json_codec import LATER
from .rotary import Rotary
from .weight_names import list_weights

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
Pool = Literal["token", "avg", "map", "token_avg"]
"""What the head reads: the class token, the mean of the patches, what a learned query attends to
(SigLIP), or the first two side by side (DINOv2)."""
Size = Annotated[int, Meta(ge=1, le=1_000_000)]
"""No model has a dimension beyond it; keeps a bad file from costing memory."""
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
MOST_PATCHES = 65_536
"""Of an image: 4,096 pixels on a side in patches of 16. Keeps a slip from costing all memory."""
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu", "gelu_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu",
    "swish": "silu",
}  # fmt: skip
"""What timm and transformers call them."""


@dataclass(frozen=True)
class VitSpec:
    """What fixes a ViT's graph and the names and shapes of its weights.

    Everything that timm's ``VisionTransformer``, ``VisionTransformerDistilled``, ``Eva``, ``Beit``
    and ``VisionTransformerRelPos`` can vary and that we can express; what we can't is refused when
    the spec is made (:func:`tocom_export.model.from_timm.spec_from_timm`).
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
    """Number of logits; 0 for a model without a classifier, whose embedding is the output."""
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
    family: Literal["vit", "eva", "beit", "relpos"] = field(default="vit", metadata=LATER)
    """timm's class, by which some weights are named."""
    norms: Literal["layer", "rms"] = field(default="layer", metadata=LATER)
    """What every norm is: LayerNorm, or RMSNorm, which has no bias."""
    positions: bool = field(default=True, metadata=LATER)
    """An embedding of absolute positions."""
    rotary: Rotary | None = field(default=None, metadata=LATER)
    """Rotary positions of queries and keys."""
    relative: Literal["table", "mlp", "shared_mlp"] | None = field(default=None, metadata=LATER)
    """Biases of attention by relative position: each layer's own table (BEiT), or made by a small
    MLP of log distances, each layer's own or shared by all."""
    relative_width: Count = field(default=0, metadata=LATER)
    """Hidden width of that MLP."""
    patch_norm: bool = field(default=False, metadata=LATER)
    """A norm of the patches before positions are added (AIMv2)."""
    post_norm: bool = field(default=False, metadata=LATER)
    """A layer's norms come after its branches, before they are added."""
    k_bias: bool = field(default=True, metadata=LATER)
    """Whether keys have a bias where queries and values have one."""
    split_qkv: bool = field(default=False, metadata=LATER)
    """Weights of queries, keys and values by themselves, not in one ``qkv``."""
    attention_norm: bool = field(default=False, metadata=LATER)
    """A norm of what attention leaves, before its projection."""
    mlp: Literal["plain", "packed", "gated"] = field(default="plain", metadata=LATER)
    """Two layers; or SwiGLU, gate and value in one ``fc1``, or in ``fc1_g`` and ``fc1_x``."""
    mlp_norm: bool = field(default=False, metadata=LATER)
    """A norm of the MLP's hidden values."""
    pool_mlp_width: Count = field(default=0, metadata=LATER)
    """Hidden width of the MLP behind attention pooling."""
    pool_heads: Count = field(default=0, metadata=LATER)
    """Heads of attention pooling."""
    head_bias: bool = field(default=True, metadata=LATER)
    pool_prefix: bool = field(default=False, metadata=LATER)
    """Whether attention pooling of a plain ViT reads the prefix tokens, too."""
    mlp_scale: bool = field(default=True, metadata=LATER)
    """Whether LayerScale, where there is one, scales the MLP's branch beside attention's."""
    projection: Count = field(default=0, metadata=LATER)
    """Channels of an embedding that the head makes of what it reads (CLIP); 0 where none does."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.+-]*", self.model, re.ASCII):  # it becomes a folder's name
            raise InputError(f"model spec: {self.model!r} is no name for a model.")
        if self.width % self.heads:
            raise InputError(
                f"model spec: width {self.width} is no multiple of {self.heads} heads."
            )
        if not self.patches:
            raise InputError(f"model spec: image {self.image_size} is smaller than a patch.")
        if self.patches > MOST_PATCHES:
            raise InputError(
                f"model spec: image {self.image_size} is {self.patches:,} patches; "
                f"{MOST_PATCHES:,} is the most."
            )
        if self.adapter_width and self.mlp != "plain":
            raise InputError("model spec: adapters stand beside an MLP that isn't gated.")
        if self.pool in ("token", "token_avg") and not self.class_token:
            raise InputError(f"model spec: pool {self.pool!r} needs a class token.")
        if {self.pool == "map"} != {bool(self.pool_mlp_width), bool(self.pool_heads)}:
            raise InputError("model spec: pool 'map', its heads and its MLP need one another.")
        if self.pool_prefix and self.pool != "map":
            raise InputError(f"model spec: pool {self.pool!r} reads no prefix tokens beside it.")
        if self.pool_heads and self.width % self.pool_heads:
            raise InputError(
                f"model spec: {self.pool_heads} heads can't share {self.width} channels."
            )
        if self.rotary is not None and self.head_width % 4:
            raise InputError(
                f"model spec: heads of {self.head_width} can't be rotated by two axes."
            )
        if self.projection and (self.classes or self.distilled):
            raise InputError("model spec: a head that makes an embedding stands alone.")
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
    def features(self) -> int:
        """Channels of what the head reads."""
        return self.width * (2 if self.pool == "token_avg" else 1)

    @property
    def embedding(self) -> int:
        """Channels of an embedding: what the head makes, or what one would read."""
        return self.projection or self.features

    @property
    def positional(self) -> bool:
        """Whether attention itself reads where tokens are, in every layer."""
        return self.rotary is not None or self.relative is not None

    @property
    def scaled(self) -> tuple[int, ...]:
        """The branches that LayerScale scales: 1 of attention, 2 of the MLP."""
        return ((1, 2) if self.mlp_scale else (1,)) if self.layer_scale else ()

    @property
    def outputs(self) -> int:
        """Numbers per image: classes, or an embedding's channels where there are none."""
        return self.classes or self.embedding

    @property
    def pooled_from(self) -> int:
        """The first token that attention pooling reads: timm's Eva reads its prefix, too."""
        return 0 if self.family == "eva" or self.pool_prefix else self.prefix

    @property
    def pool_activation(self) -> Activation:
        """Of the MLP behind attention pooling, which is never gated."""
        return "gelu" if self.family == "eva" else self.activation

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    def weights(self) -> dict[str, tuple[int, ...]]:
        """PyTorch name → shape of every tensor in a checkpoint of this model."""
        return list_weights(self)
