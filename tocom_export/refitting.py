"""Other weights for an engine or a bundle: what ``tocom-export refit`` calls.

Looks up at ``engines`` and ``training``, as ``exporting.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .bundle.manifest import WEIGHTS
from .bundle.opening import Bundle
from .bundle.refitting import Changes, refit_bundle
from .bundle.weights import ModelWeights, check_same_model, recover_checkpoint
from .compensation import load_bank
from .compression.bank import ToComBank
from .compression.checkpoint import Checkpoint
from .compression.method import Method
from .errors import BankError, InputError
from .export_checks import GRAPH_BACKENDS, Tell
from .graph.precision import Precision
from .image_size import resize_for
from .io.locking import hear_nothing
from .loading import is_installed
from .model.outputs import OutputName
from .model.spec import VitSpec
from .variant import Variant

if TYPE_CHECKING:
    from tocom_export.engines.engine import Backend
    from tocom_export.engines.verify import Comparison, Oracle


class Refittable(Protocol):
    """A bundle, or what is written beside a plan."""

    @property
    def spec(self) -> VitSpec:
        """The model."""

    @property
    def method(self) -> Method:
        """How it reduces tokens."""

    @property
    def precision(self) -> Precision:
        """Of its weights."""

    @property
    def outputs(self) -> tuple[OutputName, ...]:
        """What its engines give."""

    @property
    def unit_embedding(self) -> bool:
        """Whether embeddings are of length 1."""


@dataclasses.dataclass(frozen=True)
class Refit:
    """What a refit made."""

    bundle: Bundle
    weights: ModelWeights
    """What the new ones are made of."""
    variants: Mapping[str, Variant]
    comparisons: Mapping[str, Comparison]
    """Of the variants that were run, by their names."""


def refit(
    bundle: Bundle | Path | str,
    variants: Iterable[str | int] | None = None,
    *,
    checkpoint: Path | str | None = None,
    weights_key: str | None = None,
    bank: ToComBank | Path | str | None = None,
    source: int | None = None,
    scale: float | None = None,
    verify: bool | None = None,
    wait: bool = True,
    tell: Tell = hear_nothing,
) -> Refit:
    """Put other weights into a bundle's files, for some variants or all, in one step.

    Engines that are open go on with the old weights until their own ``refit`` is called. Plans
    are left as they are.

    Args:
        variants: names or bare degrees; default: all, which may then get all weights of another
            checkpoint. Otherwise those that the variants share must stay what they are.
        checkpoint: default: the bundle's own weights, which are rounded unless it is in fp32.
            Positions of weights for another image size are resampled, as :func:`export` does.
        weights_key: the entry of a pickled checkpoint that is taken; default: averaged weights
            (EMA) where there are any, as timm.
        bank: a bank or its file; ``none`` for no compensation; default: none where no variant
            is compensated, for the model inside the package its own.
        source: degree that the weights were trained at; default: what the checkpoint's metadata
            say, else as before. The bundle's own weights, too, may say that it is another.
        scale: what the bank's gap is multiplied by; default: as before.
        verify: run the new engines against the PyTorch model before anything is kept; default
            where torch is installed. Unless it is off they are run anyway, and must give finite
            numbers, where a runtime is installed.
        wait: for another that writes the bundle.
        tell: called with a line that a person would want to know.

    Raises:
        BundleError: no bundle, or there are no weights that a variant doesn't share.
        BankError, CheckpointError, DegreeError, InputError: as :func:`prepare_refit` says.
        BusyError, OutputError: another is writing the bundle, or it can't be written.
        CheckFailed: an engine differs from the model, or gives what is NaN or Inf; the bundle is
            left as it was.
    """
    backend = _choose_backend(verify)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    wanted = None if variants is None else [opened.variant(name).name for name in variants]
    made: list[Changes] = []
    found: dict[str, Comparison] = {}

    def decide(now: Bundle) -> Changes:
        present = list(now.variants.values()) if wanted is None else [*map(now.variant, wanted)]
        made.append(
            prepare_refit(
                now, present, now.path / WEIGHTS,
                checkpoint=checkpoint, weights_key=weights_key, bank=bank, source=source,
                scale=scale, tell=tell,
            )
        )  # fmt: skip
        return made[0]

    def check(new: Bundle, changed: Mapping[str, Variant]) -> None:
        if backend is None:
            return
        from tocom_export.engines import verify as judge

        images = judge.sample_images(new.spec)
        oracle = make_oracle(new, made[0][0]) if verify is not False else None
        for comparison in judge.verify(new, images, oracle, backend=backend, variants=changed):
            found[comparison.variant] = comparison
            comparison.require("the PyTorch model", f"{opened.path} was left as it was.")

    after = refit_bundle(opened.path, decide, check, wait=wait, tell=tell)
    whole = checkpoint is not None and wanted is None
    for line in _list_notes(after, *made[0], whole, scale is not None, backend is not None):
        tell(line)
    return Refit(after, *made[0], found)


def prepare_refit(
    now: Refittable,
    present: Sequence[Variant],
    own: Path,
    *,
    checkpoint: Path | str | None = None,
    weights_key: str | None = None,
    bank: ToComBank | Path | str | None = None,
    source: int | None = None,
    scale: float | None = None,
    tell: Tell = hear_nothing,
) -> Changes:
    """The weights that are asked for, and the variants that they make of the present ones.

    Args:
        present: whose sources and scales hold where neither the arguments nor the file name one.
        own: the weights file that the engines were made of, where ``checkpoint`` is None.
        weights_key, tell: as :func:`refit` has them.
        bank: a bank or its file, or ``none``; default: none for variants that have none, for the
            model inside the package its own.

    Raises:
        BankError, CheckpointError: one is missing, broken, or of another model; the weights say
            that they were trained at another source.
        DegreeError, InputError: source or scale is out of range.
    """
    opened, resampled = Checkpoint.open(checkpoint or own, weights_key, now.spec), ""
    if opened.note:
        tell(opened.note)
    if checkpoint is None:
        opened = recover_checkpoint(opened, now.spec, now.precision)
    else:
        opened, resampled = resize_for(now.spec, opened)
    steps = choose_bank(now, present, bank)
    check_same_model(opened, now.spec)
    if resampled:
        tell(resampled)

    def change(variant: Variant) -> Variant:
        trained = variant.source
        if checkpoint or source not in (None, trained):
            trained = opened.choose_source(source, trained)
        used = variant.scale if scale is None else scale
        compensated = steps is not None
        return dataclasses.replace(variant, source=trained, scale=used, compensated=compensated)

    weights = ModelWeights(now.spec, opened, steps, now.precision)
    return weights, {variant.name: change(variant) for variant in present}


def choose_bank(
    now: Refittable, present: Iterable[Variant], bank: ToComBank | Path | str | None
) -> ToComBank | None:
    """The bank that is asked for, or the one that the variants were compensated with.

    Raises:
        BankError: it has to be named, is broken, or doesn't fit.
    """
    if bank is None and not any(variant.compensated for variant in present):
        return None
    steps, known = load_bank(bank, now.spec, now.method), getattr(now, "bank", None)
    if bank is None and steps and known not in (None, steps.sha256):
        raise BankError(
            "the bundle was compensated with another bank than the one inside the package: name "
            "the `bank`."
        )
    return steps


def make_oracle(now: Refittable, weights: ModelWeights) -> Oracle | None:
    """PyTorch with a checkpoint's weights and the bank beside them; None without torch and timm."""
    if not is_installed("torch", "timm"):
        return None
    from tocom_export.training.torch_engine import BankOracle, load_model

    model = load_model(now.spec, weights.checkpoint.tensors, now.method)
    return BankOracle(model, weights.bank, now.outputs, now.unit_embedding).run_all


def _list_notes(
    after: Bundle,
    weights: ModelWeights,
    changed: Mapping[str, Variant],
    whole: bool,
    scaled: bool,
    run: bool,
) -> Iterator[str]:
    """What a person would want to know of a refit.

    Args:
        whole: the bundle is of another checkpoint now.
        scaled: a scale was given.
        run: the new engines were run.
    """
    info, file = weights.checkpoint.info, weights.checkpoint.file
    kept = ["image statistics"] * (info.preprocess is None)
    kept += ["names of classes"] * (info.classes is None and after.classes is not None)
    if whole and kept:
        yield f"Kept from the bundle, as {file} says none: {' and '.join(kept)}."
    if scaled and weights.bank is None:
        yield "Not compensated: without a `bank` the `scale` is of no effect."
    if not run:
        yield "Not run: neither onnxruntime nor openvino is installed."
    if stale := [name for name in changed if name in after.plans]:
        yield f"Plans go on with the old weights: refit {', '.join(stale)} by .plan too."


def _choose_backend(verify: bool | None) -> Backend | None:
    """What refitted graphs are run in: the first that is installed."""
    installed = (name for name, need in GRAPH_BACKENDS.items() if is_installed(need[0]))
    found: Backend | None = next(installed, None)  # type: ignore[arg-type]
    if verify and not (found and is_installed("torch", "timm")):
        raise InputError(
            "`verify` needs torch, timm and onnxruntime: pip install 'tocom-export[cpu,torch]'."
        )
    return found
