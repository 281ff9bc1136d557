"""Which patches of an image become one token in a variant, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from tocom_export.bundle.extending import read_input_scales
from tocom_export.bundle.opening import Bundle
from tocom_export.errors import BundleError, brief
from tocom_export.graph.precision import TYPES
from tocom_export.graph.writer import write_graph
from tocom_export.io.tensors import StoredTensor, Tensors, read_header
from tocom_export.model.outputs import OutputName, choose_outputs, list_forms
from tocom_export.variant import Variant

from .engine import Images, Outputs, check_finite, check_images, check_outputs
from .onnx.session import open_session

Maps = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Trace:
    """What a variant makes of some images, and of which patches."""

    outputs: Outputs
    """Each of the bundle's, by name."""
    maps: Maps
    """(B, layers, patches): the patch token that each patch is part of after a layer, counted from
    0; -1 where it was pruned. Patches go row by row."""


class Tracer:
    """A variant that also says which patches became one token; runs in ONNX Runtime on the CPU.

    The graph is written anew, with that output, beside the bundle's own: any bundle has it.

    Args:
        weights: the variant's tensors, to run in place of those in the bundle's files.

    Raises:
        MissingPackageError: ONNX Runtime isn't installed.
        BundleError: the bundle can't be opened.
    """

    def __init__(
        self,
        bundle: Bundle,
        variant: Variant | str | int,
        *,
        threads: int | None = None,
        weights: Tensors | None = None,
    ) -> None:
        self.bundle = bundle
        self.variant = variant if isinstance(variant, Variant) else bundle.variant(variant)
        graph = write_traced(bundle, self.variant)
        self._forms = list_forms(bundle.spec, _list_outputs(bundle))
        self._opened = open_session(
            bundle, self.variant.name, "cpu", threads, graph=graph, weights=weights
        )

    def run(self, images: Images) -> Trace:
        """The trace of normalised images (B, C, H, W) float32.

        Raises:
            ImageError: the images are of another form, or have pixels that are no numbers.
        """
        check_images(images, self.bundle.spec)
        check_finite(images, self.bundle.precision)
        try:
            *found, maps = self._opened[0].run([*self._forms, "maps"], {"images": images})
        except Exception as error:  # of many types, as in opening one
            raise BundleError(
                f"{self.bundle.path}: ONNX Runtime can't run {self.variant.name} ({brief(error)}); "
                "inspect tells whether the bundle is damaged."
            ) from error
        outputs = dict(zip(self._forms, found, strict=True))
        return Trace(check_outputs(outputs, images, self._forms), maps)


def write_traced(bundle: Bundle, variant: Variant) -> bytes:
    """A variant's graph with the output ``maps``, on the weights in the bundle's files.

    Raises:
        BundleError: its graph, from which the ranges of int8 are read, is damaged.
    """
    weights: dict[str, StoredTensor] = {}
    for file in bundle.weight_files(variant.name):
        weights |= read_header(file)[0]
    scales = read_input_scales(bundle, variant)
    model = write_graph(
        bundle.spec, variant.schedule(bundle.spec), bundle.method, weights, {},
        TYPES[bundle.precision], scales, _list_outputs(bundle), bundle.unit_embedding, trace=True,
    )  # fmt: skip
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def _list_outputs(bundle: Bundle) -> tuple[OutputName, ...]:
    """What its graphs give; of a model without a head older bundles call that logits."""
    earlier = bundle.outputs == ("logits",) and not bundle.spec.classes
    return choose_outputs(bundle.spec, ("embedding",) if earlier else bundle.outputs)
