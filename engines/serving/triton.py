"""A Triton model repository of a bundle: a model for each variant, or one of all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tocom_export.bundle.file_hashes import read_recorded
from tocom_export.bundle.manifest import WEIGHTS, weights_name
from tocom_export.bundle.opening import Bundle
from tocom_export.errors import InputError, MissingPackageError, OutputError, PlanError
from tocom_export.io.atomic import replace_folder

from ..tensorrt.plan import check_plan, open_plan
from .triton_options import TritonOptions
from .triton_pool import PROGRAM, configure_pool, find_largest, is_ours, narrow, write_pool

CONFIG, LABELS = "config.pbtxt", "labels.txt"
_HEADER = "# Written by tocom-export triton, which may replace it.\n"
_INPUT = "images"
_TYPES = {"float32": "TYPE_FP32", "int32": "TYPE_INT32"}


@dataclass(frozen=True)
class Model:
    """One model of a repository."""

    name: str
    variant: str | None
    """None: all of them, of which each request may choose."""
    max_batch: int
    files: Mapping[str, int]
    """Path within the repository → bytes."""


def write_repository(
    bundle: Bundle,
    out: Path,
    options: TritonOptions,
    variants: Sequence[str | int] = (),
    *,
    force: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Model]:
    """Write ``out/<name>_<variant>/{config.pbtxt,labels.txt,1/...}`` for variants of a bundle.

    A model takes ``images`` (B, C, H, W) float32, normalised, and gives what the bundle's engines
    do, under the same names. Each has a copy of its weights: recent versions of onnx refuse to
    load links. With ``backend`` python there is one, ``out/<name>``, with a copy of the bundle: a
    pool of all.

    Args:
        variants: names or bare degrees; none are all that the bundle has a file for.
        force: replace a repository that is already there.
        progress: called with the name of each model before it is written.

    Raises:
        MissingPackageError: tritonclient is not installed.
        DegreeError, PlanError: a variant is missing, or its plan can't run under Triton.
        BundleError: a file is missing, or not what the bundle's manifest says.
        InputError: the options don't fit the bundle.
        OutputError: ``out`` exists and ``force`` is off, or it can't be written.
    """
    format_config = _load_formatter()
    _check_out(out, force)
    plans = bundle.plans if "tensorrt" in (options.backend, options.runtime) else ()
    names = [bundle.variant(v).name for v in variants or plans or bundle.variants]
    prefix = options.name or re.sub(r"[^\w-]", "_", bundle.spec.model, flags=re.ASCII)
    chosen: dict[str | None, tuple[Callable[[Path], None], dict[str, Any]]] = {}
    if options.backend == "python":
        chosen[None] = _choose_pool(bundle, prefix, options, names)
    else:
        for name in names:
            engine, batches = _choose_engine(bundle, name, options)
            config = _configure(bundle, f"{prefix}_{name}", options, batches)
            chosen[name] = partial(_write_engine, bundle, name, engine), config

    models = []
    with replace_folder(out) as folder:
        for variant, (write, config) in chosen.items():
            name = config["name"]
            progress(name)
            write(folder / name / "1")
            _describe(folder / name, bundle, format_config(config))
            written = sorted(file for file in (folder / name).rglob("*") if file.is_file())
            files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in written}
            models.append(Model(name, variant, config["max_batch_size"], files))
    return models


def _choose_pool(
    bundle: Bundle, name: str, options: TritonOptions, variants: Sequence[str]
) -> tuple[Callable[[Path], None], dict[str, Any]]:
    """What writes a pool of these variants, and its configuration."""
    runtime = options.runtime or "auto"
    kept = narrow(bundle, variants, plans=runtime.startswith("tensorrt"))
    most = find_largest(kept, runtime)
    largest = options.max_batch or most or 32
    if most is not None and largest > most:
        raise InputError(f"`max_batch` {largest}: the plans take {most} images at most.")
    gpu = {"openvino": "GPU", "onnx": "cuda", "auto": "cuda"}
    parameters = {
        "runtime": runtime,
        "device": gpu.get(runtime) if options.device == "gpu" else None,
        "slo_ms": None if options.slo_ms is None else f"{options.slo_ms:g}",
        "control": "on" if options.control else None,
    }
    config = configure_pool(_configure(kept, name, options, [largest]), parameters)
    return partial(write_pool, bundle=kept), config


def _choose_engine(bundle: Bundle, variant: str, options: TritonOptions) -> tuple[Path, list[int]]:
    """A variant's file, and the batches that are worth a short wait, the largest it takes last."""
    if options.backend != "tensorrt":
        graph = bundle.graph(variant)
        on_cpu = options.backend == "onnxruntime" and options.device != "gpu"
        if bundle.precision == "bf16" and on_cpu:
            raise InputError(
                f"{bundle.path} is bf16, which ONNX Runtime has no operators for on a CPU; choose "
                "`device` gpu, `backend` openvino, or a bundle of another precision."
            )
        largest = options.max_batch or 32
        return graph, sorted({max(1, largest // 4), largest})
    plan = bundle.plan(variant)
    _, record = open_plan(plan)
    check_plan(bundle, variant, record)
    smallest, optimal, most = record.batch
    if record.backend != "tensorrt":
        raise PlanError(f"{plan} is of {record.backend}; Triton runs plans of tensorrt.")
    if record.refit == "identical":
        raise PlanError(
            f"{plan} takes its weights from its bundle when it is opened, and Triton opens it by "
            "itself; build it with --refit none, qkv or all."
        )
    if record.stripped:
        raise PlanError(f"{plan} is stripped of weights; tocom-export refit {plan} puts them in.")
    if smallest > 1:
        raise PlanError(
            f"{plan} takes {smallest} images or more, and Triton sends single ones too; build it "
            f"with --batch 1,{optimal},{most}."
        )
    largest = options.max_batch or most
    if largest > most:
        raise InputError(f"`max_batch` {largest}: {plan} takes {most} images at most.")
    return plan, sorted({min(optimal, largest), largest})


def _configure(
    bundle: Bundle, name: str, options: TritonOptions, batches: list[int]
) -> dict[str, Any]:
    """The fields of one model's ``ModelConfig``."""
    spec = bundle.spec
    gpu = options.device == "gpu" or options.backend == "tensorrt"
    kind = "KIND_GPU" if gpu and options.backend != "openvino" else "KIND_CPU"
    # Without the batch, here and in the warm-ups: Triton puts it in front.
    images = {"data_type": "TYPE_FP32", "dims": [spec.channels, *spec.image_size]}
    outputs: list[dict[str, Any]] = [
        {"name": name, "data_type": _TYPES[form.dtype], "dims": list(form.shape)}
        for name, form in bundle.forms.items()
    ]
    if bundle.has_logits and bundle.classes:
        outputs[bundle.outputs.index("logits")]["label_filename"] = LABELS
    # Triton's random data are random bytes, among them floats that are not numbers.
    zeros = {_INPUT: {**images, "zero_data": True}}
    config: dict[str, Any] = {
        "name": name,
        "backend": options.backend,
        "max_batch_size": batches[-1],
        "input": [{"name": _INPUT, **images}],
        "output": outputs,
        "instance_group": [{"count": options.instances, "kind": kind}],
        "dynamic_batching": {
            "preferred_batch_size": batches,
            "max_queue_delay_microseconds": round(1000 * options.max_delay_ms),
        },
        "model_warmup": [
            {"name": f"batch_{batch}", "batch_size": batch, "inputs": zeros}
            for batch in sorted({1, batches[-1]})
        ],
    }
    # Of what engines/onnx/session.py sets, Triton's back end passes on the threads and the options
    # of CUDA. Prepacking and spinning can't be set: it knows one session.* entry, an allocator's.
    if options.backend == "onnxruntime" and gpu:  # else float32 products are rounded to TF32
        cuda = [{"name": "cuda", "parameters": {"use_tf32": "0"}}]
        config["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": cuda}}
    parameters = describe_preprocess(bundle)
    if options.backend == "openvino":
        config["default_model_filename"] = "model.onnx"  # it looks for its own format
        hint = "LATENCY" if options.instances == 1 else "THROUGHPUT"
        parameters |= {"NUM_STREAMS": str(options.instances), "PERFORMANCE_HINT": hint}
        parameters["TARGET_DEVICE"] = "GPU" if gpu else "CPU"
    if options.threads is not None:
        named = {"openvino": "INFERENCE_NUM_THREADS", "python": "threads"}
        parameters[named.get(options.backend, "intra_op_thread_count")] = str(options.threads)
    config["parameters"] = {key: {"string_value": value} for key, value in parameters.items()}
    return config


def describe_preprocess(bundle: Bundle) -> dict[str, str]:
    """What a client must know to make images of a picture; Triton itself reads none of it."""
    known = bundle.preprocess
    return {
        "mean": ",".join(map(str, known.mean)),
        "std": ",".join(map(str, known.std)),
        "size": ",".join(map(str, bundle.spec.image_size)),
        "crop_pct": str(known.crop_pct),
        "interpolation": known.interpolation,
        "crop_mode": known.crop_mode,
    }


def _write_engine(bundle: Bundle, variant: str, engine: Path, version: Path) -> None:
    """One variant's files; ONNX Runtime wants a graph's weights within the graph's own folder."""
    version.mkdir(parents=True)
    model = version / f"model{engine.suffix}"  # the name that Triton looks for
    if engine.suffix == ".plan":
        model.write_bytes(open_plan(engine)[0])
    else:  # what is copied is what the manifest says, or Triton would be the one to find out
        model.write_bytes(read_recorded(engine, bundle.files[engine.name]))
        for file in bundle.weight_files(variant):
            (version / file.name).write_bytes(read_recorded(file, bundle.files[file.name]))


def _describe(place: Path, bundle: Bundle, config: str) -> None:
    """What lies beside a model's files."""
    # A line each: a line break within a name would shift those after it.
    if bundle.has_logits and bundle.classes:
        lines = "".join(" ".join(name.split()) + "\n" for name in bundle.classes)
        (place / LABELS).write_text(lines, "utf-8", newline="\n")
    (place / CONFIG).write_text(_HEADER + config, "utf-8", newline="\n")


def _load_formatter() -> Callable[[dict[str, Any]], str]:
    """What writes a ``ModelConfig`` as text, by Triton's own messages."""
    try:
        from google.protobuf import json_format, text_format
        from tritonclient.grpc import model_config_pb2
    except (ImportError, RuntimeError):  # the second where it was installed without [grpc]
        raise MissingPackageError("tritonclient", "triton") from None

    def format_config(config: dict[str, Any]) -> str:
        message = json_format.ParseDict(config, model_config_pb2.ModelConfig())
        return str(text_format.MessageToString(message))

    return format_config


def _check_out(out: Path, force: bool) -> None:
    """Raise OutputError where a repository can't be written to ``out`` for what is there."""
    if out.is_file():
        raise OutputError(f"{out} is a file; a model repository is a folder.")
    if out.exists() and not force:
        raise OutputError(f"{out} exists; add `force` to replace it.")
    if out.exists() and not all(map(_is_ours, out.iterdir())):
        raise OutputError(
            f"{out} holds other files than tocom-export triton's; remove it yourself, or choose "
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
    if (model / "1" / PROGRAM).exists():
        return ours and beside <= {CONFIG, LABELS, "1"} and is_ours(model / "1")
    parts = model.name.split("_")  # the variant's name is its last one, or its last few
    own = {weights_name("_".join(parts[first:])) for first in range(1, len(parts))}
    engines = {"model.onnx", "model.plan", WEIGHTS, *own}
    return ours and beside <= {CONFIG, LABELS, "1"} and inside <= engines
