"""The one protocol of engines, and the one check of what goes into them and comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tocom_export.errors import BundleError, ImageError
from tocom_export.graph.precision import Precision
from tocom_export.io.tensors import Tensors
from tocom_export.model.outputs import Form, pluralise
from tocom_export.model.spec import VitSpec
from tocom_export.variant import Variant

Backend = Literal["onnx", "openvino", "tensorrt", "tensorrt-rtx"]
Images = npt.NDArray[np.float32]
"""Normalised images (B, C, H, W)."""
Logits = npt.NDArray[np.float32]
"""(B, classes); where a bundle gives something else first, that: an embedding (B, features), the
tokens of all patches (B, patches, C)."""
Outputs = dict[str, npt.NDArray[Any]]
"""All that a bundle's engines give, by name, in the manifest's order."""
Forms = Mapping[str, Form]
"""What each of them has to be, of one image."""


class Engine(Protocol):
    """A variant on one backend, ready to run. Safe to share among threads."""

    spec: VitSpec
    variant: Variant

    @property
    def precision(self) -> Precision:
        """What it computes in, which may be less than its bundle's graphs say."""

    @property
    def arithmetic(self) -> str:
        """The same for people, where the rest is in another: ``int8+bf16``."""

    @property
    def about(self) -> str:
        """The runtime, where it runs and what it computes in, for people."""

    @property
    def largest(self) -> int | None:
        """Images in a batch at the most; None is any number."""

    def run(self, images: Images) -> Logits:
        """The first output, logits (B, classes) as a rule, of images; as of :meth:`run_all`."""

    def run_all(self, images: Images) -> Outputs:
        """Every output of normalised images (B, C, H, W) float32, of one run, in its type.

        Raises:
            ImageError: as :func:`check_images` and :func:`check_outputs` say.
        """

    def refit(self, weights: Tensors) -> None:
        """Exchange the weights; runs under way end with the old ones, or a plan refuses meanwhile.

        Args:
            weights: all tensors of the variant (of a plan, all that it lets go of), of the shapes
                and types that they have; they must not be changed later.
        """


def check_images(images: Images, spec: VitSpec, largest: int | None = None) -> None:
    """Raise ImageError where an array is no batch of a model's images, or a too large one."""
    expected = (spec.channels, *spec.image_size)
    if not isinstance(images, np.ndarray):
        raise ImageError(
            f"images are a {type(images).__name__}; a NumPy array (B, "
            f"{', '.join(map(str, expected))}) of float32 is expected."
        )
    if images.ndim != 4 or images.shape[1:] != expected or not len(images):
        raise ImageError(
            f"images have shape {images.shape}; (B, {', '.join(map(str, expected))}) with B ≥ 1 "
            "is expected."
        )
    if largest is not None and len(images) > largest:
        raise ImageError(
            f"a batch of {len(images)} images; the plan takes {largest} at most (tocom-export "
            "build --batch MIN,OPT,MAX)."
        )
    if images.dtype != np.float32:
        raise ImageError(f"images are {images.dtype}; float32 is expected.")


def check_finite(images: Images, precision: Precision) -> None:
    """Raise ImageError where int8 would make numbers of pixels that are none."""
    if precision == "int8" and not np.isfinite(images).all():
        _name_bad_pixels(images)


def check_outputs(found: Outputs, images: Images, forms: Forms) -> Outputs:
    """What an engine gave, once it is of the model's shapes, and of images of numbers.

    A NaN or infinite value reaches what its image gives in floats, so pixels are looked at where
    that isn't finite; for int8 see :func:`check_finite`.

    Raises:
        ImageError: an image has such a value.
        BundleError: an output is of another shape: the graph is damaged.
    """
    for name, form in forms.items():
        shape, expected = found[name].shape, (len(images), *form.shape)
        if shape != expected:
            raise BundleError(
                f"the engine gave {name} of shape {shape} where {expected} is expected: its graph "
                "is damaged; build the bundle again."
            )
    if name_unusable(found):
        _name_bad_pixels(images)
    return found


def check_usable(found: Outputs, images: Images) -> None:
    """Raise ImageError where an output is NaN or infinite, whatever made it so."""
    if name := name_unusable(found):
        _name_bad_pixels(images)
        raise ImageError(
            f"{pluralise(name)} are NaN or Inf, though all pixels are finite; are the images "
            "normalised?"
        )


def name_unusable(found: Outputs) -> str:
    """The first output that holds a NaN or an infinite value; empty where none does."""
    return next((name for name, array in found.items() if not np.isfinite(array).all()), "")


def take_first(found: Outputs) -> Logits:
    """The first of an engine's outputs."""
    first: Logits = next(iter(found.values()))
    return first


def _name_bad_pixels(images: Images) -> None:
    bad = ~np.isfinite(images.reshape(len(images), -1)).all(axis=1)
    if bad.any():
        which = ", ".join(map(str, np.flatnonzero(bad)))
        raise ImageError(f"image {which} of the batch has pixels that are NaN or Inf.")
