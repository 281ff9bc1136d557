"""From a checkpoint, a bank and some variants to a bundle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
from safetensors.numpy import save_file

from .._version import __version__
from ..compression.metadata import ModelInfo, to_metadata
from ..compression.method import Method
from ..errors import InputError, OutputError
from ..graph.precision import TYPES
from ..graph.writer import write_graph
from ..io.atomic import replace_folder
from ..io.json_codec import encode, read_json
from ..io.locking import hear_nothing, is_left
from ..io.tensors import read_header
from ..model.outputs import OutputName, choose_outputs
from ..model.preprocess import Preprocess
from ..variant import Variant
from .file_hashes import FileRecord, record_files
from .manifest import FORMAT, LARGEST, MANIFEST, WEIGHTS, graph_name, plan_name, weights_name
from .opening import Bundle
from .weights import ModelWeights

TOOLS = {"tocom-export": __version__, "onnx_ir": ir.__version__}


@dataclass(frozen=True)
class Blueprint:
    """Everything that a bundle is made of, checked; :func:`write_bundle` carries it out."""

    weights: ModelWeights
    method: Method
    variants: Mapping[str, Variant]
    preprocess: Preprocess
    classes: tuple[str, ...] | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)
    """Top-1 accuracy in percent of the variants where it is known already."""
    outputs: tuple[OutputName, ...] = ()
    """What engines give, in their order; none is what the model is for."""
    unit_embedding: bool = False
    """Whether embeddings are divided by their length."""

    def __post_init__(self) -> None:
        if not self.outputs:
            object.__setattr__(self, "outputs", choose_outputs(self.weights.spec))

    def files(self) -> list[str]:
        """Names of the files that will be written."""
        own = [weights_name(v.name) for v in self.variants.values() if v.baked]
        return [MANIFEST, WEIGHTS, *own, *map(graph_name, self.variants)]


Calibrate = Callable[[Bundle, Variant], Mapping[str, float]]
"""An fp32 bundle and a variant → layer → what one step of its int8 input stands for."""


def write_bundle(
    blueprint: Blueprint,
    out: Path,
    *,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
    extend: Callable[[Bundle], Bundle] | None = None,
    check: Callable[[Bundle], None] | None = None,
    calibrate: Calibrate | None = None,
    wait: bool = True,
    tell: Callable[[str], None] = hear_nothing,
) -> Bundle:
    """Write a bundle beside ``out`` and rename it there once it is complete.

    Args:
        force: replace a bundle that is already there.
        progress: called with the name of each file before it is written.
        extend: adds files to the bundle, and says what it then is.
        check: called with the finished bundle before it is renamed; what it raises leaves
            nothing behind.
        calibrate: measures the inputs of each layer, for int8; without it their ranges are
            found at each run.
        wait: for another that writes ``out``.
        tell: called with a line for people before it waits.

    Raises:
        BusyError: another writes ``out``, and isn't waited for.
        OutputError: ``out`` exists and ``force`` is off, or it can't be written.
        CheckpointError: weights are beyond the range of the precision.
    """
    check_out(out, force)
    name_file = progress or hear_nothing
    weights = blueprint.weights
    with replace_folder(out, wait=wait, tell=tell) as folder:
        check_out(out, force)  # another may have written it meanwhile
        scales = {}
        if weights.precision == "int8" and calibrate:
            exact = dataclasses.replace(weights, precision="fp32")
            with TemporaryDirectory(dir=folder) as place:
                wide = _write(dataclasses.replace(blueprint, weights=exact), Path(place), name_file)
                scales = {name: calibrate(wide, v) for name, v in blueprint.variants.items()}
        bundle = _write(blueprint, folder, name_file, scales)
        if extend:
            bundle = extend(bundle)
            bundle.save_manifest()
        if check:
            check(bundle)
    return dataclasses.replace(bundle, path=out)


def check_out(out: Path, force: bool) -> None:
    """Raise OutputError where a bundle can't be written to ``out`` for what is there."""
    if out.is_file():
        raise OutputError(f"`out` {out} is a file; a bundle is a folder.")
    if out.exists() and not force:
        raise OutputError(f"`out` {out} exists; add `force` to replace it.")
    if out.exists() and not _is_replaceable(out):
        raise OutputError(
            f"`out` {out} holds other files than a bundle's, or its manifest is damaged; "
            "remove it yourself, or choose another folder."
        )


def _is_replaceable(folder: Path) -> bool:
    """Whether a folder holds nothing but what the manifest in it lists, or nothing at all.

    A bundle with a damaged file still counts, and one that a killed writer left something in.
    """
    if not folder.is_dir():
        return False
    names = {file.name for file in folder.iterdir()}
    if not names:
        return True
    try:
        manifest = read_json(folder / MANIFEST, LARGEST)
        plans = set(map(plan_name, manifest.get("plans", ())))
        known = {MANIFEST, *manifest["files"], *plans, *(f"{name}.json" for name in plans)}
        others = {name for name in names - known if not is_left(name, known)}
        return manifest["format"] == FORMAT and not others
    except (OSError, InputError, LookupError, TypeError, AttributeError):
        return False


def _write(
    blueprint: Blueprint,
    folder: Path,
    progress: Callable[[str], None],
    input_scales: Mapping[str, Mapping[str, float]] | None = None,
) -> Bundle:
    weights, spec = blueprint.weights, blueprint.weights.spec
    baked = [variant for variant in blueprint.variants.values() if variant.baked]
    files: dict[str, FileRecord] = {}
    with ThreadPoolExecutor(2) as pool:  # one file is baked and hashed while another is written
        jobs = {WEIGHTS: pool.submit(_write_shared, blueprint, folder)}
        jobs |= {weights_name(v.name): pool.submit(write_own, weights, v, folder) for v in baked}
        for name, job in jobs.items():
            progress(name)
            files[name] = job.result()
    for name, variant in blueprint.variants.items():
        progress(graph_name(name))
        _write_graph(blueprint, variant, folder, input_scales[name] if input_scales else None)
    files |= record_files(folder, map(graph_name, blueprint.variants))
    progress(MANIFEST)
    bundle = Bundle(
        path=folder,
        spec=spec,
        method=blueprint.method,
        precision=weights.precision,
        variants=blueprint.variants,
        files={name: files[name] for name in blueprint.files()[1:]},
        preprocess=blueprint.preprocess,
        classes=blueprint.classes,
        bank=weights.bank.sha256 if weights.bank else None,
        accuracy=blueprint.accuracy,
        tools=TOOLS,
        outputs=blueprint.outputs,
        unit_embedding=blueprint.unit_embedding,
    )
    bundle.save_manifest()
    return bundle


def _write_shared(blueprint: Blueprint, folder: Path) -> FileRecord:
    """Write the weights that all variants read."""
    save_file(blueprint.weights.shared(), folder / WEIGHTS, describe_shared(blueprint))
    return record_files(folder, [WEIGHTS])[WEIGHTS]


def write_variant(
    blueprint: Blueprint, variant: Variant, folder: Path, input_scales: Mapping[str, float] | None
) -> None:
    """Write what is a variant's alone beside the weights that all of them share.

    Args:
        input_scales: of an int8 graph: layer → what one step of its int8 input stands for.
    """
    if variant.baked:
        write_own(blueprint.weights, variant, folder)
    _write_graph(blueprint, variant, folder, input_scales)


def _write_graph(
    blueprint: Blueprint, variant: Variant, folder: Path, input_scales: Mapping[str, float] | None
) -> None:
    """Write a variant's graph, whose weights are there already."""
    spec = blueprint.weights.spec
    shared, _ = read_header(folder / WEIGHTS)
    own = read_header(folder / weights_name(variant.name))[0] if variant.baked else {}
    model = write_graph(
        spec,
        variant.schedule(spec),
        blueprint.method,
        {**shared, **own},
        describe_graph(blueprint, variant),
        TYPES[blueprint.weights.precision],
        input_scales,
        blueprint.outputs,
        blueprint.unit_embedding,
    )
    ir.save(model, folder / graph_name(variant.name))


def write_own(weights: ModelWeights, variant: Variant, folder: Path) -> FileRecord:
    """Write the weights in which a variant differs, under the name of its file."""
    name = weights_name(variant.name)
    save_file(weights.own(variant), folder / name, to_metadata(ModelInfo(variant=variant.name)))
    return record_files(folder, [name])[name]


def describe_shared(blueprint: Blueprint) -> dict[str, str]:
    """The metadata of the weights that all variants read.

    A source of 0 that nobody has said isn't said here either: it may be corrected.
    """
    sources = {variant.source for variant in blueprint.variants.values()}
    source = sources.pop() if len(sources) == 1 else None
    info = ModelInfo(
        blueprint.weights.spec,
        source or blueprint.weights.checkpoint.info.source,
        blueprint.method,
        blueprint.classes,
        blueprint.preprocess,
    )
    return to_metadata(info)


def describe_graph(blueprint: Blueprint, variant: Variant) -> dict[str, str]:
    """The graph's ``metadata_props``: strings, as ONNX has it."""
    spec = blueprint.weights.spec
    facts: dict[str, Any] = {
        "model": spec.model,
        "method": blueprint.method.name,
        "proportional": blueprint.method.proportional,
        "precision": blueprint.weights.precision,
        **encode(variant),
        "compensated": variant.baked,
        "tokens": variant.schedule(spec).tokens_out,
        "image_mean": blueprint.preprocess.mean,
        "image_std": blueprint.preprocess.std,
    }
    facts["variant"] = facts.pop("name")
    if blueprint.unit_embedding:
        facts["unit_embedding"] = True
    texts = {
        key: fact if isinstance(fact, str) else json.dumps(fact) for key, fact in facts.items()
    }
    return {**texts, **TOOLS}
