"""``tocom-export inspect``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from tocom_export.errors import BundleError, InputError, brief
from tocom_export.io.json_codec import encode
from tocom_export.io.pickles import SUFFIXES, load_pickle

from ..options import FILE, common_options, format_megabytes, take_output
from ..output import Command

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.model.spec import VitSpec
    from tocom_export.variant import Variant


class Table(NamedTuple):
    """What :meth:`Output.table` prints."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""


@dataclass(frozen=True)
class Finding:
    """What a file or folder turned out to be."""

    kind: str
    document: Mapping[str, Any]
    """For machines."""
    facts: Mapping[str, Any]
    """For people; None is not shown."""
    tables: Sequence[Table] = ()


@click.command("inspect", cls=Command)
@click.argument("path", type=FILE)
@click.option("--layers", is_flag=True, help="Also what is in each layer.")
@common_options
def inspect_command(path: Path, layers: bool, **options: Any) -> None:
    """Say what a bundle, an engine, a bank or a checkpoint is.

    A bundle's files are compared with the hashes in its manifest, its plans with those in
    their JSON.

    \b
    Example:
      tocom-export inspect reference-source0 --layers
      tocom-export inspect reference-source0/r08.onnx
    """
    output = take_output(options)
    found = _inspect(path, layers)
    output.document({"kind": found.kind, "path": str(path), **found.document})
    facts = [(name, fact) for name, fact in found.facts.items() if fact is not None]
    for table in [Table((found.kind, ""), facts), *found.tables]:
        output.table(*table)


def _inspect(path: Path, layers: bool) -> Finding:
    if path.is_dir():
        from tocom_export.model.huggingface.folder import is_folder

        if is_folder(path):
            return _inspect_weights(path, layers)
        return _inspect_bundle(path, layers)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder.")
    if path.suffix == ".onnx":
        return _inspect_graph(path, layers)
    if path.suffix == ".plan":
        return _inspect_plan(path, layers)
    if path.name.endswith(".plan.json"):
        raise InputError(f"{path} says what a plan is; inspect {path.with_suffix('')}.")
    if path.suffix in (".safetensors", *SUFFIXES):
        return _inspect_weights(path, layers)
    raise InputError(
        f"{path}: bundles (folders), .onnx, .plan, .safetensors, .pth, .pt, .bin and .tar files "
        "are inspected."
    )


def _inspect_bundle(path: Path, layers: bool) -> Finding:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.tensorrt.plan import open_plan
    from tocom_export.model.outputs import format_outputs
    from tocom_export.model.statistics import format_statistics

    bundle = Bundle.open(path, hashes=True)
    for name in bundle.plans:
        open_plan(bundle.plan(name))
    spec = bundle.spec
    facts = {
        "model": spec.model,
        "images": _format_images(spec),
        "image statistics": format_statistics(bundle.preprocess),
        "layers": spec.depth,
        "tokens": f"{spec.tokens} of width {spec.width}, {spec.heads} heads",
        "classes": spec.classes,
        "outputs": format_outputs(bundle.forms, bundle.unit_embedding),
        "method": bundle.method.label,
        "precision": bundle.precision,
        "plans": ", ".join(bundle.plan(name).name for name in bundle.plans) or None,
        "refitted": ", ".join(bundle.refitted) or None,
        "size": format_megabytes(bundle.size()),
        "hashes": "all as in the manifest" + (" and the plans' JSON" if bundle.plans else ""),
    }
    return Finding("bundle", bundle.to_json(), facts, _list_variants(bundle, layers))


def _list_variants(bundle: Bundle, layers: bool) -> list[Table]:
    """The variants of a bundle; with ``layers`` also what each layer is compensated for."""
    spec = bundle.spec
    rows = []
    for name, variant in bundle.variants.items():
        left = (schedule := variant.schedule(spec)).tokens_out
        tokens = " ".join(map(str, left)) if layers else f"{spec.tokens} → {left[-1]}"
        own = sum(bundle.files[file.name].bytes for file in bundle.weight_files(name)[1:])
        scale = f"{variant.scale:g}" if variant.baked else "-"
        row = [name, variant.label, variant.source, scale, tokens]
        row += [f"{schedule.macs(spec) / 1e6:.1f} M", format_megabytes(own)]
        if bundle.accuracy:
            row.append(f"{bundle.accuracy[name]:.2f} %" if name in bundle.accuracy else "-")
        rows.append(row)
    head = "tokens after each layer" if layers else "tokens"
    columns = ["variant", "degree", "source", "scale", head, "MACs", "own weights"]
    tables = [Table([*columns, "accuracy"] if bundle.accuracy else columns, rows)]
    if layers:
        variants = bundle.variants.values()
        targets = [(v.name, " ".join(f"{target:.3g}" for target in v.targets)) for v in variants]
        tables.append(Table(("variant", "degree that each layer is compensated for"), targets))
    return tables


def _inspect_graph(path: Path, layers: bool) -> Finding:
    import onnx_ir as ir

    from tocom_export.bundle.file_hashes import record_files

    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many types on a broken file
        raise BundleError(f"{path} is not an ONNX model ({brief(error)}).") from None
    if not model.graph.outputs:
        raise BundleError(f"{path} is not an ONNX model: it has no outputs.")
    tensors = [v.const_value for v in model.graph.initializers.values()]
    files = sorted({str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)})
    facts = {
        "inputs": {v.name: str(v.shape) for v in model.graph.inputs},
        "outputs": {v.name: str(v.shape) for v in model.graph.outputs},
        "opset": model.opset_imports.get(""),
        "nodes": len(model.graph),
        "weights": sum(isinstance(t, ir.ExternalTensor) for t in tensors),
        "weight files": files,
        "size": format_megabytes(path.stat().st_size),
        "sha256": record_files(path.parent, [path.name])[path.name].sha256,
    }
    metadata, refitted = dict(model.metadata_props), _find_refitted(path)
    document = {
        **facts,
        "metadata": metadata,
        "refitted": encode(refitted) if refitted else None,
    }
    now: dict[str, str] = {}
    if refitted:  # the graph's own words are those of the build
        now = {
            "source": str(refitted.source),
            "scale": str(refitted.scale),
            "compensated": json.dumps(refitted.baked),
            "refitted": "yes",
        }
    tables: list[Table] = []
    if layers:
        operators = Counter(node.op_type for node in model.graph).most_common()
        scopes = Counter((node.name or "").rpartition("/")[0] for node in model.graph)
        document |= {"operators": dict(operators), "scopes": dict(scopes)}
        tables = [
            Table(("operator", "nodes"), operators),
            Table(("part", "nodes"), list(scopes.items())),
        ]
    return Finding("engine", document, {**facts, **metadata, **now}, tables)


def _find_refitted(path: Path) -> Variant | None:
    """What a graph's variant became, by the manifest of the bundle that it lies in, if any."""
    from tocom_export.bundle.opening import Bundle

    with suppress(BundleError):
        bundle = Bundle.open(path.parent)
        return bundle.variants[path.stem] if path.stem in bundle.refitted else None
    return None


def _inspect_plan(path: Path, layers: bool) -> Finding:
    from tocom_export.engines.tensorrt.plan import open_plan
    from tocom_export.model.outputs import format_outputs

    content, record = open_plan(path)
    (smallest, optimal, largest), variant = record.batch, record.variant
    whole = "its bundle gives it back the weights it was built with when it is opened"
    then = whole if record.refit == "identical" else "refit it before it runs"
    facts = {
        "model": record.spec.model,
        "variant": variant.name,
        "degree": variant.label,
        "source degree": variant.source,
        "compensated": f"yes, scale {variant.scale}" if variant.baked else "no",
        "method": record.method.label,
        "outputs": format_outputs(record.forms, record.unit_embedding),
        "precision": record.precision,
        "batches": f"{smallest} to {largest}, made for {optimal}",
        "refit": f"{record.refit}: {len(record.refittable)} weights",
        "stripped": f"yes; {then}" if record.stripped else "no",
        "backend": f"{record.backend} {record.version}",
        "built on": record.gpu or "no GPU",
        "flags": " ".join(record.flags) or None,
        "size": format_megabytes(len(content)),
        "sha256": record.sha256,
    }
    rows = [(name, t.dtype, list(t.shape)) for name, t in record.refittable.items()]
    tables = [Table(("refittable", "type", "shape"), rows)] if layers and rows else []
    return Finding("plan", encode(record), facts, tables)


def _inspect_weights(path: Path, layers: bool) -> Finding:
    from tocom_export.compression.bank import holds_bank
    from tocom_export.compression.checkpoint import Checkpoint
    from tocom_export.io.tensors import read_header
    from tocom_export.model.statistics import format_statistics

    pickled = load_pickle(path) if path.suffix in SUFFIXES else None
    if path.is_file() and holds_bank(pickled.tensors if pickled else read_header(path)[0]):
        return _inspect_bank(path, layers)
    checkpoint = Checkpoint.open(path)
    info, tensors = checkpoint.info, checkpoint.tensors
    facts = {
        "model": info.spec.model if info.spec else None,
        "variant": info.variant,
        "images": _format_images(info.spec) if info.spec else None,
        "image statistics": format_statistics(info.preprocess) if info.preprocess else None,
        "adapters": (info.spec.adapter_width or None) if info.spec else None,
        "source degree": info.source,
        "method": info.method.label if info.method else None,
        "classes": len(info.classes) if info.classes else None,
        "entry": (pickled and pickled.key) or None,
        "other entries": (pickled and ", ".join(pickled.others)) or None,
        "tensors": len(tensors),
        "parameters": sum(t.size for t in tensors.values()),
        "dtypes": ", ".join(sorted({str(t.dtype) for t in tensors.values()})),
        "size": format_megabytes(sum(t.nbytes for t in tensors.values())),
    }
    if not layers:
        return Finding("checkpoint", facts, facts)
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    table = Table(("tensor", "shape"), list(shapes.items()))
    return Finding("checkpoint", {**facts, "shapes": shapes}, facts, [table])


def _inspect_bank(path: Path, layers: bool) -> Finding:
    import numpy as np

    from tocom_export.compression.bank import ToComBank

    bank = ToComBank.load(path)
    facts = {
        "model": bank.model or None,
        "method": bank.method.label,
        "layers": bank.depth,
        "width": bank.width,
        "arithmetic": bank.arithmetic,
        "groups": bank.groups,
        "rank": bank.rank,
        "parameters": bank.parameters,
        "size": format_megabytes(path.stat().st_size),
    }
    if not layers:
        return Finding("bank", facts, facts)
    norms = [
        [round(float(np.linalg.norm(gap)), 4) for gap in bank.gap(layer, 0, bank.max_degree, 1.0)]
        for layer in range(bank.depth)
    ]
    title = f"Frobenius norm of the gap 0 → {bank.max_degree} at scale 1"
    rows = [(f"layer {layer}", *pair) for layer, pair in enumerate(norms)]
    table = Table(("", "query", "value"), rows, title)
    return Finding("bank", {**facts, "gap_norms": norms}, facts, [table])


def _format_images(spec: VitSpec) -> str:
    return f"{spec.channels}×{spec.image_size[0]}×{spec.image_size[1]}"
