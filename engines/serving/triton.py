"""A Triton Inference Server model repository of a bundle: one model for each degree."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tocom_export.bundle.opening import WEIGHTS, Bundle
from tocom_export.errors import InputError, MissingPackageError, OutputError, PlanError
from tocom_export.io.atomic import replaced_folder

from ..tensorrt.plan import open_plan

CONFIG, LABELS = "config.pbtxt", "labels.txt"
_GRAPH, _PLAN = "model.onnx", "model.plan"  # the names that Triton looks for
_HEADER = "# Written by tocom-export triton, which may replace it.\n"
_INPUT, _OUTPUT = "images", "logits"


@dataclass(frozen=True)
class TritonOptions:
    """How Triton is to run a bundle."""

    engine: Literal["onnx", "tensorrt"] = "onnx"
    name: str | None = None
    """What the models' names begin with; None is the bundle's model name."""
    device: Literal["cpu", "gpu"] | None = None
    """None is a CPU for ONNX graphs, a GPU for plans."""
    max_batch: int | None = None
    """None is 32 for ONNX graphs, a plan's own largest batch for plans."""
    instances: int = 1
    """Of each model; on each GPU, where there are several."""
    max_delay_ms: float = 1.0
    """How long a request waits for others to fill a batch with."""
    threads: int | None = None
    """Within an operator of ONNX Runtime; None leaves it to the runtime."""

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[\w-]+", self.name, re.ASCII):
            raise InputError(f"--name {self.name!r}: letters, digits, '-' and '_' make a name.")
        if self.engine == "tensorrt" and self.device == "cpu":
            raise InputError("--device cpu: TensorRT plans run on a GPU; leave --device out.")
        if self.engine == "tensorrt" and self.threads is not None:
            raise InputError("--threads is for --engine onnx; a plan has no threads to set.")
        if not 0 <= self.max_delay_ms <= 60_000:
            raise InputError(f"--max-delay-ms {self.max_delay_ms:g}: it is 0 to 60000, a minute.")


@dataclass(frozen=True)
class Model:
    """One model of a repository."""

    name: str
    target: int
    max_batch: int
    files: Mapping[str, int]
    """Path within the repository → bytes."""


def write_repository(
    bundle: Bundle,
    out: Path,
    options: TritonOptions,
    targets: Sequence[int] = (),
    *,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Model]:
    """Write ``out/<name>_rNN/{config.pbtxt,labels.txt,1/...}`` for some targets of a bundle.

    A model takes ``images`` (B, C, H, W) float32, normalised, and gives ``logits`` (B, classes)
    float32. Each has a copy of its weights: recent versions of onnx refuse to load links.

    Args:
        targets: none are all that the bundle has an engine for.
        force: replace a repository that is already there.
        progress: called with the name of each model before it is written.

    Raises:
        MissingPackageError: tritonclient is not installed.
        DegreeError: the bundle has no such target, or no plan for it.
        PlanError: a plan is damaged, or can't run under Triton.
        InputError: the options don't fit the bundle.
        OutputError: ``out`` exists and ``force`` is off, or it can't be written.
    """
    _protobuf()
    _check_out(out, force)
    plans = bundle.plans if options.engine == "tensorrt" else ()
    prefix = options.name or re.sub(r"[^\w-]", "_", bundle.spec.model, flags=re.ASCII)
    configs, engines = {}, {}
    for target in targets or plans or tuple(bundle.targets):
        engines[target], largest, preferred = _engine(bundle, target, options)
        name = f"{prefix}_r{target:02d}"
        configs[target] = _config(bundle, name, options, largest, preferred)

    models = []
    with replaced_folder(out) as folder:
        for target, config in configs.items():
            if progress:
                progress(config.name)
            place = folder / config.name
            _write(place, bundle, target, engines[target], config)
            written = sorted(file for file in place.rglob("*") if file.is_file())
            files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in written}
            models.append(Model(config.name, target, config.max_batch_size, files))
    return models


def _engine(
    bundle: Bundle, target: int, options: TritonOptions
) -> tuple[Path, int, tuple[int, ...]]:
    """A target's file, its largest batch, and the batches that are worth a short wait."""
    if options.engine == "onnx":
        graph = bundle.graph(target)
        if bundle.precision == "bf16" and options.device != "gpu":
            raise InputError(
                f"{bundle.path} is bf16, which ONNX Runtime has no operators for on a CPU; "
                "--device gpu, or a bundle of another precision."
            )
        largest = options.max_batch or 32
        return graph, largest, tuple(sorted({max(1, largest // 4), largest}))
    plan = bundle.plan(target)
    _, record = open_plan(plan)
    smallest, optimal, most = record.batch
    if record.library != "tensorrt":
        raise PlanError(f"{plan} is {record.library}'s; Triton runs those of --engine tensorrt.")
    if record.stripped:
        raise PlanError(f"{plan} is stripped of weights; tocom-export refit {plan} puts them in.")
    if smallest > 1:
        raise PlanError(
            f"{plan} takes {smallest} images or more, and Triton sends single ones too; build it "
            f"with --batch 1,{optimal},{most}."
        )
    largest = options.max_batch or most
    if largest > most:
        raise InputError(f"--max-batch {largest}: {plan} takes {most} images at most.")
    return plan, largest, tuple(sorted({min(optimal, largest), largest}))


def _config(
    bundle: Bundle, name: str, options: TritonOptions, largest: int, preferred: tuple[int, ...]
) -> Any:
    """The ``ModelConfig`` of one model."""
    pb, _ = _protobuf()
    spec, image = bundle.spec, [bundle.spec.channels, *bundle.spec.image_size]
    onnx, gpu = options.engine == "onnx", options.engine == "tensorrt" or options.device == "gpu"
    config = pb.ModelConfig(
        name=name, backend="onnxruntime" if onnx else "tensorrt", max_batch_size=largest
    )
    # Without the batch, here and in the warm-ups: Triton puts it in front.
    config.input.add(name=_INPUT, data_type=pb.TYPE_FP32, dims=image)
    output = config.output.add(
        name=_OUTPUT, data_type=pb.TYPE_FP32, dims=[spec.classes or spec.width]
    )
    if bundle.classes:
        output.label_filename = LABELS
    group = pb.ModelInstanceGroup
    config.instance_group.add(
        count=options.instances, kind=group.KIND_GPU if gpu else group.KIND_CPU
    )
    config.dynamic_batching.preferred_batch_size.extend(preferred)
    config.dynamic_batching.max_queue_delay_microseconds = round(1000 * options.max_delay_ms)
    for batch in sorted({1, preferred[-1]}):
        warmup = config.model_warmup.add(name=f"batch_{batch}", batch_size=batch)
        # Triton's random data are random bytes, among them floats that are not numbers.
        zeros = pb.ModelWarmup.Input(data_type=pb.TYPE_FP32, dims=image, zero_data=True)
        warmup.inputs[_INPUT].CopyFrom(zeros)
    # Of what engines/session.py sets, Triton's back end passes on the threads and the options of
    # CUDA. Prepacking and spinning can't be set: it knows one session.* entry, an allocator's.
    if onnx and gpu:  # else float32 products are rounded to TF32
        accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
        accelerators.add(name="cuda").parameters["use_tf32"] = "0"
    if options.threads is not None:
        config.parameters["intra_op_thread_count"].string_value = str(options.threads)
    for key, value in _image_statistics(bundle).items():
        config.parameters[key].string_value = value
    return config


def _image_statistics(bundle: Bundle) -> dict[str, str]:
    """What a client must know to make ``images`` of a picture; Triton itself reads none of it."""
    known = bundle.preprocess
    return {
        "mean": ",".join(map(str, known.mean)),
        "std": ",".join(map(str, known.std)),
        "size": ",".join(map(str, bundle.spec.image_size)),
        "crop_pct": str(known.crop_pct),
        "interpolation": known.interpolation,
    }


def _write(place: Path, bundle: Bundle, target: int, engine: Path, config: Any) -> None:
    """One model's folder; ONNX Runtime wants a graph's weights within the graph's own folder."""
    _, text_format = _protobuf()
    version = place / "1"
    version.mkdir(parents=True)
    if engine.suffix == ".onnx":
        shutil.copyfile(engine, version / _GRAPH)
        for file in bundle.weight_files(target):
            shutil.copyfile(file, version / file.name)
    else:
        shutil.copyfile(engine, version / _PLAN)
    if bundle.classes:  # a line each: a line break within a name would shift those after it
        lines = "".join(" ".join(name.split()) + "\n" for name in bundle.classes)
        (place / LABELS).write_text(lines, "utf-8", newline="\n")
    text = _HEADER + text_format.MessageToString(config)
    (place / CONFIG).write_text(text, "utf-8", newline="\n")


def _protobuf() -> tuple[Any, Any]:
    """Triton's messages, and protobuf's text format."""
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except (ImportError, RuntimeError):  # the second where it was installed without [grpc]
        raise MissingPackageError("tritonclient", "triton") from None
    return model_config_pb2, text_format


def _check_out(out: Path, force: bool) -> None:
    """Raise OutputError where a repository can't be written to ``out`` for what is there."""
    if out.is_file():
        raise OutputError(f"{out} is a file; a model repository is a folder.")
    if out.exists() and not force:
        raise OutputError(f"{out} exists; add --force to replace it.")
    if out.exists() and not all(map(_is_ours, out.iterdir())):
        raise OutputError(
            f"{out} holds other files than tocom-export triton's; remove it yourself, or name "
            "another folder."
        )


def _is_ours(model: Path) -> bool:
    """Whether a folder holds a model that this file wrote, and nothing besides."""
    try:
        with (model / CONFIG).open(encoding="utf-8") as config:
            ours = config.readline() == _HEADER
        inside = {file.name for file in (model / "1").iterdir()}
        beside = {file.name for file in model.iterdir()}
    except (OSError, UnicodeDecodeError):
        return False
    weights = {name for name in inside if re.fullmatch(r"r\d\d\.safetensors", name)}
    return ours and beside <= {CONFIG, LABELS, "1"} and inside <= {_GRAPH, _PLAN, WEIGHTS, *weights}
