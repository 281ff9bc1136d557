"""From a checkpoint and a bank to a bundle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir
from safetensors.numpy import save_file

from .._version import __version__
from ..compression.bake import bake
from ..compression.bank import ToComBank
from ..compression.checkpoint import Checkpoint
from ..compression.metadata import METADATA_KEY, ModelInfo
from ..compression.method import Method
from ..compression.schedule import TokenSchedule
from ..errors import OutputError
from ..graph.precision import TYPES, Precision
from ..graph.quantising import quantized_layers, stored_form
from ..graph.writer import write_graph
from ..io.atomic import replaced_folder
from ..io.tensors import read_header
from ..model.preprocess import Preprocess
from ..model.spec import VitSpec
from .file_hashes import FileRecord, record_files
from .opening import (
    FORMAT,
    MANIFEST,
    WEIGHTS,
    Bundle,
    graph_name,
    plan_name,
    weights_name,
)

TOOLS = {"tocom-export": __version__, "onnx_ir": ir.__version__}


@dataclass(frozen=True)
class BuildPlan:
    """Everything that a build needs, checked; :func:`write_bundle` carries it out.

    ``spec`` is the one that :meth:`Checkpoint.fit` returned for ``checkpoint``.
    """

    spec: VitSpec
    checkpoint: Checkpoint
    bank: ToComBank | None
    """None exports uncompensated engines."""
    method: Method
    source: int
    targets: tuple[int, ...]
    scale: float
    preprocess: Preprocess
    classes: tuple[str, ...] | None = None
    precision: Precision = "fp32"

    def compensates(self, target: int) -> bool:
        """Whether a target has weights of its own."""
        return self.bank is not None and target != self.source

    def files(self) -> list[str]:
        """Names of the files that will be written."""
        own = [weights_name(t) for t in self.targets if self.compensates(t)]
        return [MANIFEST, WEIGHTS, *own, *map(graph_name, self.targets)]


Calibrate = Callable[[Bundle, int], Mapping[str, float]]
"""An fp32 bundle and a target → layer → what one step of its int8 input stands for."""


def write_bundle(
    plan: BuildPlan,
    out: Path,
    *,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
    extend: Callable[[Bundle], Bundle] | None = None,
    check: Callable[[Bundle], None] | None = None,
    calibrate: Calibrate | None = None,
) -> Bundle:
    """Write a bundle beside ``out`` and rename it there once it is complete.

    Args:
        force: replace a bundle that is already there.
        progress: called with the name of each file before it is written.
        extend: adds files to the bundle, and says what it then is.
        check: called with the finished bundle before it is renamed; what it raises leaves
            nothing behind.
        calibrate: measures the inputs of each layer; needed for int8 alone.

    Raises:
        OutputError: ``out`` exists and ``force`` is off, or it can't be written.
        CheckpointError: weights are beyond the range of the precision.
    """
    check_out(out, force)
    tell = progress or (lambda _: None)
    with replaced_folder(out) as folder:
        scales = {}
        if plan.precision == "int8":
            assert calibrate is not None
            with TemporaryDirectory(dir=folder) as exact:
                wide = _write(dataclasses.replace(plan, precision="fp32"), Path(exact), tell)
                scales = {target: calibrate(wide, target) for target in plan.targets}
        bundle = _write(plan, folder, tell, scales)
        if extend:
            bundle = extend(bundle)
            bundle.save_manifest()
        if check:
            check(bundle)
    return dataclasses.replace(bundle, path=out)


def check_out(out: Path, force: bool) -> None:
    """Raise OutputError where a bundle can't be written to ``out`` for what is there."""
    if out.is_file():
        raise OutputError(f"--out {out} is a file; a bundle is a folder.")
    if out.exists() and not force:
        raise OutputError(f"--out {out} exists; add --force to replace it.")
    if out.exists() and not _is_replaceable(out):
        raise OutputError(
            f"--out {out} holds other files than a bundle's, or its manifest is damaged; "
            "remove it yourself, or name another folder."
        )


def _is_replaceable(folder: Path) -> bool:
    """Whether a folder holds nothing but what the manifest in it lists, or nothing at all.

    A bundle with a damaged file still counts.
    """
    if not folder.is_dir():
        return False
    names = {file.name for file in folder.iterdir()}
    if not names:
        return True
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        plans = {plan_name(int(target)) for target in manifest.get("plans", ())}
        known = {MANIFEST, *manifest["files"], *plans, *(f"{name}.json" for name in plans)}
        return manifest["format"] == FORMAT and names <= known
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _write(
    plan: BuildPlan,
    folder: Path,
    progress: Callable[[str], None],
    input_scales: Mapping[int, Mapping[str, float]] | None = None,
) -> Bundle:
    spec = plan.spec
    schedules = {t: TokenSchedule.of(spec, t) for t in plan.targets}
    own = {t: weights_name(t) for t in plan.targets if plan.compensates(t)}
    files: dict[str, FileRecord] = {}
    with ThreadPoolExecutor(2) as pool:  # one file is baked and hashed while another is written
        jobs = {WEIGHTS: pool.submit(_write_weights, plan, folder)}
        jobs |= {name: pool.submit(_write_weights, plan, folder, t) for t, name in own.items()}
        for name, job in jobs.items():
            progress(name)
            files[name] = job.result()
    shared, _ = read_header(folder / WEIGHTS)
    for target, schedule in schedules.items():
        progress(graph_name(target))
        weights = shared | (read_header(folder / own[target])[0] if target in own else {})
        metadata = _metadata(plan, target, schedule)
        scales = input_scales[target] if input_scales else None
        types = TYPES[plan.precision]
        model = write_graph(spec, schedule, plan.method, weights, metadata, types, scales)
        ir.save(model, folder / graph_name(target))
    files |= record_files(folder, [graph_name(t) for t in plan.targets])
    progress(MANIFEST)
    bundle = Bundle(
        path=folder,
        spec=spec,
        method=plan.method,
        source=plan.source,
        scale=plan.scale,
        compensated=plan.bank is not None,
        precision=plan.precision,
        targets={t: s.tokens_out for t, s in schedules.items()},
        files={name: files[name] for name in plan.files()[1:]},
        preprocess=plan.preprocess,
        classes=plan.classes,
        tools=TOOLS,
    )
    bundle.save_manifest()
    return bundle


def _write_weights(plan: BuildPlan, folder: Path, target: int | None = None) -> FileRecord:
    """Write the shared weights, or those that differ at a target, in the plan's precision."""
    tensors = {name: plan.checkpoint.tensors[name] for name in plan.spec.weights()}
    if target is None or plan.bank is None:
        name = WEIGHTS
        info = ModelInfo(plan.spec, plan.source, plan.method, plan.classes, plan.preprocess)
        metadata = info.to_metadata()
    else:
        name = weights_name(target)
        tensors = bake(tensors, plan.spec, plan.bank, plan.source, target, plan.scale)
        metadata = {METADATA_KEY: json.dumps({"target": target})}
    arrays = stored_form(tensors, plan.precision, quantized_layers(plan.spec))
    save_file(arrays, folder / name, metadata)
    return record_files(folder, [name])[name]


def _metadata(plan: BuildPlan, target: int, schedule: TokenSchedule) -> dict[str, str]:
    """The graph's ``metadata_props``: strings, as ONNX has it."""
    numbers: dict[str, int | float | Iterable[float]] = {
        "source": plan.source,
        "target": target,
        "scale": plan.scale,
        "schedule": list(schedule.tokens_out),
        "image_mean": list(plan.preprocess.mean),
        "image_std": list(plan.preprocess.std),
    }
    return {
        "model": plan.spec.model,
        "method": plan.method.name,
        "precision": plan.precision,
        "proportional": json.dumps(plan.method.proportional),
        "compensated": json.dumps(plan.compensates(target)),
        **{name: json.dumps(number) for name, number in numbers.items()},
        **TOOLS,
    }
