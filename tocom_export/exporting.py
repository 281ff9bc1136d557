"""From a model and some variants to a bundle: what ``tocom-export build`` calls.

Looks up at ``engines`` and ``training``, where they are installed, to build plans, to measure
ranges for int8, and to hold what was written against the PyTorch model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bundle.opening import Bundle
from .bundle.writing import Blueprint, Calibrate, check_out, write_bundle
from .compression.bank import ToComBank
from .compression.method import Merge
from .errors import InputError
from .export_checks import GRAPH_BACKENDS, Progress, Tell, add_plans, check, find_missing
from .graph.precision import Precision
from .loading import is_installed
from .model.preprocess import choose_spread, find_images
from .model.spec import Pool
from .preparing import TARGETS, default_out, prepare

if TYPE_CHECKING:
    from tocom_export.engines.tensorrt.building import PlanOptions
    from tocom_export.engines.tensorrt.library import Library
    from tocom_export.engines.verify import Comparison

UNCALIBRATED = "none"
CALIBRATION_IMAGES, FEW_IMAGES = 512, 32  # at the most, and below how many that is said


def export(
    model: str | Any | None = None,
    out: Path | str | None = None,
    *,
    checkpoint: Path | str | None = None,
    weights_key: str | None = None,
    image_size: tuple[int, int] | int | None = None,
    pool: Pool | None = None,
    targets: Iterable[int] = TARGETS,
    schedules: Mapping[str, Sequence[int] | str] | None = None,
    source: int | None = None,
    bank: ToComBank | Path | str | None = None,
    scale: float = 0.1,
    method: str | None = None,
    proportional: bool | None = None,
    merge: Merge | None = None,
    precision: Precision = "fp32",
    classes: Sequence[str] | Path | str | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    calibrate: Path | str | None = None,
    outputs: Sequence[str] | str = (),
    unit_embedding: bool = False,
    backends: Sequence[str] = ("onnx",),
    verify: bool | None = None,
    force: bool = False,
) -> Bundle:
    """Write a bundle: a variant for each target degree and each schedule.

    Args:
        model: a timm model name, ``reference``, or a live timm model; default: what the
            checkpoint's metadata say, else ``reference``.
        out: the bundle's folder; default: ``<model>-source<source>``.
        checkpoint: .safetensors, .pth, .pt, .bin or .tar, or a folder of Hugging Face's or
            timm's; default: timm's pretrained weights, those of the live model, or those inside
            the package.
        weights_key: the entry of a pickled checkpoint that is taken; default: as timm, averaged
            (EMA) weights where there are any.
        image_size: pixels, one number, or height and width, to which positions are resampled;
            default: what the weights are for.
        pool: what the head reads, where the weights don't say: ``token`` or ``avg``.
        targets: degrees for all layers; they become the variants r00, r04, ...
        schedules: a variant's name → a degree for each layer, or a rule: ``every:3``, ``keep:0.5``.
        source: degree that the weights were trained at; default: what their metadata say, else 0.
        bank: a bank or its file; ``none`` for no compensation; default: for the model inside the
            package its own.
        scale: what the bank's gap is multiplied by.
        method: ``tome`` or ``evit``; default: the bank's, else the checkpoint's.
        proportional: whether a merged token weighs as much as those it stands for; MAE models
            want it off.
        merge: what merged tokens are spared: ``block``, all that follows in this layer and the
            next ones, or ``ffn``, the layer's MLP alone, so that each token keeps its place.
        precision: fp32, fp16, bf16 or int8.
        classes: their names, or a file of them (one a line, or JSON).
        mean, std, crop_pct, interpolation: image statistics, in place of the model's.
        calibrate: for int8, a folder of images like those that it will see; ``none`` finds the
            ranges at each run, which ONNX Runtime alone is fast at.
        outputs: what engines give, in that order: ``logits``, ``embedding`` (what the head reads),
            ``tokens`` (the features of each patch), ``map`` (the token that each patch went into);
            default: logits where the model has classes, else the embedding.
        unit_embedding: divide each embedding by its length, in the graph.
        backends: what the engines are checked in: ``onnx``, ``openvino``.
        verify: run the engines against the PyTorch model; default where torch is installed.
        force: replace an existing bundle.

    Raises:
        TocomError: the input can't be used, or an engine fails its check; nothing is written.
    """
    blueprint = prepare(
        model, checkpoint, targets, schedules, source, bank, scale, method, proportional, precision,
        weights_key=weights_key, image_size=image_size, pool=pool, classes=classes, mean=mean,
        std=std, crop_pct=crop_pct, interpolation=interpolation, outputs=outputs,
        unit_embedding=unit_embedding, merge=merge,
    )  # fmt: skip
    out = Path(out) if out else default_out(blueprint)
    return write(blueprint, out, calibrate=calibrate, backends=backends, verify=verify, force=force)


def check_write(
    blueprint: Blueprint,
    out: Path,
    *,
    calibrate: Path | str | None = None,
    backends: Sequence[str] = ("onnx",),
    verify: bool | None = None,
    force: bool = False,
    plans: tuple[Library, PlanOptions] | None = None,
) -> None:
    """Raise InputError for what :func:`write` would refuse on any machine."""
    if unknown := [name for name in backends if name not in GRAPH_BACKENDS]:
        known = ", ".join(GRAPH_BACKENDS)
        raise InputError(f"`backends` {unknown[0]!r}: graphs are checked in {known}.")
    runtimes, extras = zip(*(GRAPH_BACKENDS[name] for name in backends), strict=True)
    if verify and not is_installed("torch", "timm", *runtimes):
        raise InputError(
            f"`verify` needs torch, timm and {' and '.join(runtimes)}: pip install "
            f"'tocom-export[{','.join(extras)},torch]'."
        )
    if verify is None and tuple(backends) != ("onnx",) and (missing := find_missing(backends)):
        raise missing
    precision = blueprint.weights.precision
    if precision == "int8" and calibrate is None:
        raise InputError(
            "`precision` int8 needs `calibrate`: a folder of images like those it will see, or "
            "none, to find ranges at each run."
        )
    if precision != "int8" and calibrate is not None:
        raise InputError(f"`calibrate` is for `precision` int8 alone; this is {precision}.")
    if plans and str(calibrate) == UNCALIBRATED:
        raise InputError(
            "`calibrate` none: TensorRT wants ranges that were measured; name a folder of images."
        )
    check_out(out, force)
    if plans:
        from tocom_export.engines.tensorrt.building import check_options

        check_options(*plans)


def write(
    blueprint: Blueprint,
    out: Path,
    *,
    calibrate: Path | str | None = None,
    backends: Sequence[str] = ("onnx",),
    verify: bool | None = None,
    force: bool = False,
    plans: tuple[Library, PlanOptions] | None = None,
    wait: bool = True,
    progress: Progress = lambda title, steps: nullcontext(lambda step: None),
    tell: Tell = lambda _: None,
    detail: Tell = lambda _: None,
    checked: Callable[[Comparison], None] = lambda _: None,
) -> Bundle:
    """Write a bundle, with plans if asked for, and check it before it gets its name.

    Args:
        backends: what the engines are checked in, beside their plans.
        plans: also build a plan for each variant, by that backend.
        wait: for another that writes ``out``.
        tell: called with a line that a person would want to know.
        detail: called with a line that a person may want to know.
        checked: called with each comparison with the PyTorch model.

    Raises:
        TocomError: it can't be written, or an engine fails its check; nothing is left behind.
    """
    asked: dict[str, Any] = {"calibrate": calibrate, "backends": backends, "verify": verify}
    check_write(blueprint, out, **asked, force=force, plans=plans)
    if plans:  # what is missing is to be said before the work
        from tocom_export.engines.tensorrt.building import check_can_build
        from tocom_export.engines.tensorrt.library import open_library

        check_can_build(open_library(plans[0]), plans[1])

    def extend(bundle: Bundle) -> Bundle:
        assert plans is not None
        return add_plans(bundle, *plans, verify is not False, progress, tell, detail)

    with progress("writing", len(blueprint.files())) as advance:

        def step(name: str) -> None:
            advance(name)
            detail(f"writing {out / name}")

        return write_bundle(
            blueprint,
            out,
            force=force,
            wait=wait,
            tell=tell,
            progress=step,
            extend=extend if plans else None,
            check=lambda new: check(blueprint, new, backends, verify, progress, tell, checked),
            calibrate=_calibrate(blueprint, calibrate, tell),
        )


def _calibrate(blueprint: Blueprint, place: Path | str | None, tell: Tell) -> Calibrate | None:
    """What measures the ranges of int8 on the images in a folder; None where nothing shall."""
    if place is None or str(place) == UNCALIBRATED:
        return None
    folder = Path(place)
    from tocom_export.engines.onnx.calibration import measure_input_scales

    files = find_images(folder)
    chosen = choose_spread(files, CALIBRATION_IMAGES)
    if len(chosen) < FEW_IMAGES:
        tell(
            f"{folder} has {len(chosen)} images to calibrate on: what others need may be cut off; "
            "some hundreds are better."
        )
    images = blueprint.preprocess.load_batch(chosen, blueprint.weights.spec.image_size)
    return lambda bundle, variant: measure_input_scales(bundle, variant.name, images)
