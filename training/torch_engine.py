"""The PyTorch model of a checkpoint or a bundle: what engines are held against."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from tocom_export.bundle.manifest import WEIGHTS, weights_name
from tocom_export.bundle.opening import Bundle
from tocom_export.bundle.weights import ModelWeights, recover_checkpoint
from tocom_export.compensation import load_bank
from tocom_export.compression.bank import ToComBank
from tocom_export.compression.checkpoint import Checkpoint
from tocom_export.compression.method import Method
from tocom_export.errors import BankError
from tocom_export.graph.precision import Precision
from tocom_export.graph.quantising import dequantize
from tocom_export.io.tensors import Tensors, map_tensors, read_header
from tocom_export.model.outputs import OutputName
from tocom_export.model.spec import VitSpec
from tocom_export.study.accuracy import Run, measure_accuracy
from tocom_export.variant import Variant

from .building import vit_from_spec
from .lora import TrainableBank
from .model import CompressedVit, Degrees, SidePaths

Images = npt.NDArray[np.float32]


def load_model(spec: VitSpec, tensors: Tensors, method: Method) -> CompressedVit:
    """A compressed ViT with those weights, float32, in evaluation mode."""
    # Without weights of its own; tables of positions aren't weights, and have to be made.
    with torch.device("meta" if spec.family == "vit" else "cpu"):
        vit = vit_from_spec(spec)
    vit.load_state_dict(_to_torch(tensors), assign=True)
    return CompressedVit(vit, method, spec.model).eval()


def load_shared(bundle: Bundle) -> CompressedVit:
    """The model with the weights that all variants of a bundle share, uncompensated."""
    return load_model(bundle.spec, dequantize(load_file(bundle.path / WEIGHTS)), bundle.method)


def load_weights(vit: nn.Module, tensors: Tensors) -> None:
    """Copy weights into a model; a tensor that isn't given stays as it is."""
    vit.load_state_dict(_to_torch(tensors), strict=False)


def _to_torch(tensors: Tensors) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(t, np.float32)) for name, t in tensors.items()}


def make_runner(model: nn.Module, *arguments: Any) -> Run:
    """A model, in evaluation mode: images (B, C, H, W) → logits (B, classes) float32, as arrays.

    Args:
        arguments: what it takes beside the images: of a compressed ViT degrees and side paths.
    """
    weight = next(model.eval().parameters())

    @torch.inference_mode()
    def run(images: Images) -> Images:
        logits = model(torch.from_numpy(images).to(weight.device, weight.dtype), *arguments)
        found: Images = logits.float().cpu().numpy()
        return found

    return run


@dataclass(frozen=True)
class _Give:
    """What a model's engines give, of images (B, C, H, W): each output by name, as arrays."""

    model: CompressedVit
    names: Sequence[OutputName]
    unit_embedding: bool
    degrees: Degrees
    side: SidePaths | None = None

    @torch.inference_mode()
    def __call__(self, images: Images) -> dict[str, Images]:
        weight = next(self.model.parameters())
        pixels = torch.from_numpy(images).to(weight.device, weight.dtype)
        found = self.model.give(
            pixels, self.names, self.degrees, self.side, unit_embedding=self.unit_embedding
        )
        return {name: output.cpu().numpy() for name, output in found.items()}


class _Oracle(ABC):
    """What engines are held against.

    Args:
        outputs, unit_embedding: of the engines, as a bundle has them.
    """

    def __init__(self, outputs: Sequence[OutputName], unit_embedding: bool) -> None:
        self.outputs, self.unit_embedding = tuple(outputs), unit_embedding

    def runner(self, variant: Variant, output: OutputName | None = None) -> Run:
        """One variant's run, of one output; default: the first."""
        name = output or self.outputs[0]
        give = self._open(variant, (name,))
        return lambda images: give(images)[name]

    def __call__(self, variant: Variant, images: Images) -> Images:
        """The first output of normalised images (B, C, H, W)."""
        return self.run_all(variant, images)[self.outputs[0]]

    def run_all(self, variant: Variant, images: Images) -> dict[str, Images]:
        """Each output by name."""
        return self._open(variant, self.outputs)(images)

    @abstractmethod
    def _open(self, variant: Variant, names: Sequence[OutputName]) -> _Give:
        """Some outputs of one variant."""


class BankOracle(_Oracle):
    """What variants of a checkpoint should give, compensated by a bank, if any.

    The gap is added as low-rank side paths, so that engines held against it show whether the
    baking is right, too.
    """

    def __init__(
        self,
        model: CompressedVit,
        bank: ToComBank | None,
        outputs: Sequence[OutputName] = ("logits",),
        unit_embedding: bool = False,
    ) -> None:
        super().__init__(outputs, unit_embedding)
        self.model = model
        device = next(model.parameters()).device
        self._bank = TrainableBank.from_bank(bank, model.spec).to(device) if bank else None

    def _open(self, variant: Variant, names: Sequence[OutputName]) -> _Give:
        side = None
        if self._bank is not None and variant.baked:
            side = self._bank.side(variant.source, variant.targets, variant.scale)
        return _Give(self.model.eval(), names, self.unit_embedding, variant.degrees, side)


class StoredOracle(_Oracle):
    """What a bundle's own weights should give; int8 is what it stands for."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle.outputs, bundle.unit_embedding)
        self._bundle = bundle
        self._opened: dict[str, CompressedVit] = {}

    def run_all(self, variant: Variant, images: Images) -> dict[str, Images]:
        """Each output by name; one variant's weights are kept at a time."""
        if variant.name not in self._opened:
            self._opened.clear()
            self._opened[variant.name] = self._load(variant)
        model = self._opened[variant.name]
        return _Give(model, self.outputs, self.unit_embedding, variant.degrees)(images)

    def _open(self, variant: Variant, names: Sequence[OutputName]) -> _Give:
        """It keeps the weights, so that several can take turns."""
        return _Give(self._load(variant), names, self.unit_embedding, variant.degrees)

    def _load(self, variant: Variant) -> CompressedVit:
        tensors = dequantize(self._bundle.tensors(variant.name))
        return load_model(self._bundle.spec, tensors, self._bundle.method)


class Float32Oracle:
    """What accuracy a bundle should have: the model with the weights that it was made of.

    A bundle's own weights are rounded to its precision, and what that costs is to be seen. Where
    the others aren't at hand, which only the model inside the package always is, these do.

    Args:
        output: what accuracy is measured by, as the bundle calls it.
    """

    def __init__(self, bundle: Bundle, output: OutputName = "logits") -> None:
        self._bundle, self._stored, self._output = bundle, StoredOracle(bundle), output
        own = Checkpoint.open(bundle.path / WEIGHTS)
        checkpoint = recover_checkpoint(own, bundle.spec, bundle.precision)
        self._weights: ModelWeights | None = None
        if checkpoint is not own:
            bank = None
            with suppress(BankError):  # none is for that method
                bank = load_bank(None, bundle.spec, bundle.method)
            self._weights = ModelWeights(bundle.spec, checkpoint, bank, bundle.precision)

    @cached_property
    def _whole(self) -> BankOracle:
        """One model for all variants."""
        assert self._weights is not None
        tensors = self._weights.checkpoint.tensors
        model = load_model(self._bundle.spec, tensors, self._bundle.method)
        return BankOracle(model, self._weights.bank)

    def stored_as(self, variant: Variant) -> Precision:
        """What the weights that it has for a variant were rounded to; ``fp32`` is not at all."""
        return "fp32" if self._is_known(variant) else self._bundle.precision

    def runner(self, variant: Variant) -> Run:
        """One variant's run."""
        oracle = self._whole if self._is_known(variant) else self._stored
        return oracle.runner(variant, self._output)

    def _is_known(self, variant: Variant) -> bool:
        """Whether the bundle's weights are the rounded ones of a checkpoint and a bank at hand."""
        if self._weights is None:
            return False
        name = weights_name(variant.name)
        held = name in self._bundle.files
        stored = map_tensors(read_header(self._bundle.path / name)[0]) if held else {}
        rounded = self._weights.own(variant)
        return stored.keys() == rounded.keys() and all(
            np.array_equal(tensor, stored[key]) for key, tensor in rounded.items()
        )


def make_oracle(bundle: Bundle, bank: ToComBank | None = None) -> StoredOracle | BankOracle:
    """What a bundle's engines are held against.

    Args:
        bank: added as side paths to the weights that the variants share; None takes each
            variant's own weights as they are stored.
    """
    if bank is None:
        return StoredOracle(bundle)
    return BankOracle(load_shared(bundle), bank, bundle.outputs, bundle.unit_embedding)


def evaluate_model(
    model: CompressedVit, batches: Iterable[tuple[Tensor, Tensor]], degree: Degrees = 0
) -> float:
    """Top-1 accuracy in percent over batches of images (B, C, H, W) and labels (B,)."""
    return measure_accuracy([make_runner(model, degree)], batches)[0].accuracy
