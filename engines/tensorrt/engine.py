"""A TensorRT or TensorRT-RTX plan, ready to run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tocom_export.errors import DeviceError, ImageError, PlanError
from tocom_export.io.tensors import Tensors
from tocom_export.model.outputs import Form

from ..engine import (
    Images,
    Logits,
    Outputs,
    check_finite,
    check_images,
    check_outputs,
    take_first,
)
from . import refitter
from .cuda import find_gpu, why_no_gpu
from .lane import Lane
from .library import Nvidia, open_library
from .plan import PlanRecord, check_host_code, check_weights, open_plan


class TensorRtEngine:
    """A deserialized plan. Safe to share among threads, whose runs follow each other.

    Images are copied through page-locked memory; a batch below the plan's smallest is filled up.
    What runs is recorded as a CUDA graph where the engine allows that, and launched as one for as
    long as batches are of the same size (TensorRT-RTX does so by itself).

    Args:
        plan: a ``.plan`` with its JSON beside it.
        cuda_graphs: False launches each kernel by itself.
        host_code: let a version-compatible plan of people you trust run the code that it brings.
        unsaved: what a plan's file and its JSON will hold; ``plan`` is then not read.

    Raises:
        PlanError: the plan is damaged, or of another GPU or another version of the library.
        DeviceError: there is no GPU, or too little memory on it.
        MissingPackageError: the library or cuda-python is not installed.
    """

    def __init__(
        self,
        plan: Path,
        *,
        cuda_graphs: bool = True,
        host_code: bool = False,
        unsaved: tuple[bytes, PlanRecord] | None = None,
    ) -> None:
        content, record = unsaved or open_plan(plan)
        self.record = record
        self.spec, self.variant, self.largest = record.spec, record.variant, record.batch[2]
        self.precision = self.arithmetic = record.precision
        self._nvidia = open_library(record.backend)
        self._engine = _deserialize(self._nvidia, plan, content, record, host_code)
        self._changing, self._running = threading.Lock(), threading.Lock()
        self._lane: Lane | None = None
        self._cuda_graphs = cuda_graphs
        self._why_not = "the plan is stripped of its weights; tocom-export refit gives it some."
        if record.refit == "identical":
            self._why_not = "the plan has no weights; open it with its bundle, which gives it them."
        if not record.stripped:
            self._make_ready()

    @property
    def about(self) -> str:
        """``tensorrt 10.3.0, fp16``."""
        return f"{self.record.backend} {self.record.version}, {self.precision}"

    def run(self, images: Images) -> Logits:
        """The first output of images; as of :meth:`run_all`."""
        return take_first(self.run_all(images))

    def run_all(self, images: Images) -> Outputs:
        """Each output of normalised images (B, C, H, W) float32, by name.

        Raises:
            ImageError: they are of another form, or more than the plan's largest batch.
            PlanError: the plan is stripped and was not refitted yet, or a refit failed.
        """
        check_images(images, self.spec, self.largest)
        check_finite(images, self.record.precision)
        with self._running:
            found = self._ready_lane().run(images, max(self.record.batch[0], len(images)))
        return check_outputs(found, images, self.record.forms)

    def run_again(self, batch: int) -> None:
        """Run what lies on the GPU as a batch of so many, without copies: to time the GPU alone."""
        smallest, _, largest = self.record.batch
        if not smallest <= batch <= largest:
            raise ImageError(f"a batch of {batch}; the plan takes {smallest} to {largest}.")
        with self._running:
            self._ready_lane().launch(batch, copies=False)

    def refit(self, weights: Tensors) -> None:
        """Exchange all refittable weights, for absolute values.

        Args:
            weights: of an identical plan all tensors, those in its graph included.

        Raises:
            PlanError: inference is in flight; a weight is missing, or of another form, or not the
                one that an identical plan was built with.
        """
        with self._idle():
            check_weights(self.record, weights)
            self._why_not = "a refit failed, and left the engine with mixed weights; refit it."
            refitter.refit(self._nvidia, self._engine, self.record, weights)
            self._make_ready()

    def serialize(self) -> bytes:
        """The plan with the weights it has now, which from TensorRT 10.14 can be refitted again."""
        with self._idle():
            return refitter.serialize(self._nvidia, self._engine, self.record.stripped)

    @property
    def refittable(self) -> bool:
        """Whether the library can refit it; TensorRT before 10.14 may save a plan that it can't."""
        return bool(self._engine.refittable)

    def _make_ready(self) -> None:
        if self._lane:
            self._lane.forget_graph()
        else:
            self._lane = Lane(self._nvidia, self._engine, self.record, self._cuda_graphs)
        self._why_not = ""

    def _ready_lane(self) -> Lane:
        if self._why_not or not self._lane:
            raise PlanError(self._why_not)
        return self._lane

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """Nothing can run meanwhile; an error where something does."""
        with self._changing:
            if not self._running.acquire(blocking=False):
                why = "inference is in flight; an engine is refitted or saved while it is idle."
                raise PlanError(why)
            try:
                yield
            finally:
                self._running.release()


def _deserialize(
    nvidia: Nvidia, plan: Path, content: bytes, record: PlanRecord, host_code: bool
) -> Any:
    """The library's engine of a plan; where it is refused, an error that says what differs."""
    gpu = find_gpu()
    if gpu is None:
        raise DeviceError(f"{plan}: no GPU that CUDA can use ({why_no_gpu()}); plans run on one.")
    check_host_code(plan, record, host_code)
    try:
        engine = refitter.open_engine(nvidia, content, host_code)
    except PlanError as error:
        differs = []
        if record.version != nvidia.version:
            differs.append(f"built by {record.backend} {record.version}, this is {nvidia.version}")
        if record.compute_capability not in (None, gpu.capability):
            differs.append(f"built for {record.gpu}, this is {gpu.name}")
        # The difference may not be the reason, which can be a lack of memory, say.
        why = "; ".join([*differs, str(error)] if nvidia.logger.errors or not differs else differs)
        raise PlanError(f"{plan} can't be opened here ({why}); build it here.") from None
    _check_form(nvidia, engine, plan, record)
    return engine


def _check_form(nvidia: Nvidia, engine: Any, plan: Path, record: PlanRecord) -> None:
    """Buffers are made after the record: an engine of other shapes would write beyond them."""
    spec, kinds = record.spec, nvidia.trt.DataType
    types = {"float32": kinds.FLOAT, "int32": kinds.INT32}
    forms = {"images": Form((spec.channels, *spec.image_size)), **record.forms}
    wanted = {name: form.shape for name, form in forms.items()}
    # A plan for one batch alone may say which.
    first = {-1, record.batch[0]} if record.batch[0] == record.batch[2] else {-1}
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    found = {name: tuple(engine.get_tensor_shape(name)) for name in names}
    shapes = engine.get_tensor_profile_shape("images", 0) if "images" in names else ()
    batch = tuple(shape[0] for shape in shapes)
    if (
        (batch, {name: shape[1:] for name, shape in found.items()}) != (record.batch, wanted)
        or not {shape[0] for shape in found.values()} <= first
        or any(engine.get_tensor_dtype(name) != types[forms[name].dtype] for name in names)
    ):
        raise PlanError(
            f"{plan} takes {found} in batches of {batch}, its JSON says {wanted} in batches of "
            f"{record.batch}; the two are not of one build."
        )
