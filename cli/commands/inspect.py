"""``tocom-export inspect``."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import BundleError, InputError, brief

from ..output import FILE, Command, Output, common_options, megabytes, output_of

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Refitted


@click.command("inspect", cls=Command)
@click.argument("path", type=FILE)
@click.option("--layers", is_flag=True, help="Also what is in each layer.")
@common_options
def inspect_command(path: Path, layers: bool, as_json: bool, verbose: int, quiet: bool) -> None:
    """Say what a bundle, an engine, a bank or a checkpoint is.

    A bundle's files are compared with the hashes in its manifest, its plans with those in
    their JSON.

    \b
    Example:
      tocom-export inspect reference-source0 --layers
      tocom-export inspect reference-source0/r08.onnx
    """
    output = output_of(as_json, verbose, quiet)
    if path.is_dir():
        _bundle(path, layers, output)
    elif not path.exists():
        raise InputError(f"{path}: no such file or folder.")
    elif path.suffix == ".onnx":
        _graph(path, layers, output)
    elif path.suffix == ".plan":
        _plan(path, layers, output)
    elif path.name.endswith(".plan.json"):
        raise InputError(f"{path} says what a plan is; inspect {path.with_suffix('')}.")
    elif path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        _weights(path, layers, output)
    else:
        raise InputError(
            f"{path}: bundles (folders), .onnx, .plan, .safetensors, .pth, .pt and .bin files are "
            "inspected."
        )


def _show(output: Output, title: str, facts: dict[str, Any]) -> None:
    """Facts as two columns."""
    rows = [(name, value) for name, value in facts.items() if value is not None]
    output.table([title, ""], rows, "")


def _bundle(path: Path, layers: bool, output: Output) -> None:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.compression.schedule import TokenSchedule
    from tocom_export.engines.tensorrt.plan import open_plan

    bundle = Bundle.open(path, hashes=True)
    for target in bundle.plans:
        open_plan(bundle.plan(target))
    output.document({"kind": "bundle", "path": str(path), **bundle.to_json()})
    spec = bundle.spec
    _show(
        output,
        "bundle",
        {
            "model": spec.model,
            "images": f"{spec.channels}×{spec.image_size[0]}×{spec.image_size[1]}",
            "layers": spec.depth,
            "tokens": f"{spec.tokens} of width {spec.width}, {spec.heads} heads",
            "classes": spec.classes,
            "method": bundle.method.name,
            "source degree": bundle.source,
            "compensated": f"yes, scale {bundle.scale}" if bundle.compensated else "no",
            "precision": bundle.precision,
            "plans": ", ".join(bundle.plan(target).name for target in bundle.plans) or None,
            "refitted": "; ".join(
                f"r{target:02d}: source {r.source}, "
                + (f"scale {r.scale}" if r.compensated else "not compensated")
                for target, r in bundle.refitted.items()
            )
            or None,
            "size": megabytes(bundle.size()),
            "hashes": "all as in the manifest" + (" and the plans' JSON" if bundle.plans else ""),
        },
    )
    rows = []
    for target, tokens in bundle.targets.items():
        cost = TokenSchedule.of(spec, target).multiply_adds(spec)
        shown = " ".join(map(str, tokens)) if layers else f"{spec.tokens} → {tokens[-1]}"
        own = sum(bundle.files[f.name].bytes for f in bundle.weight_files(target)[1:])
        rows.append(
            [bundle.graph(target).name, target, shown, f"{cost / 1e6:.1f} M", megabytes(own)]
        )
    columns = [
        "engine",
        "degree",
        "tokens after each layer" if layers else "tokens",
        "multiply-adds",
        "own weights",
    ]
    output.table(columns, rows, "")


def _graph(path: Path, layers: bool, output: Output) -> None:
    import onnx_ir as ir

    from tocom_export.bundle.file_hashes import record_files

    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many types on a broken file
        raise BundleError(f"{path} is not an ONNX model ({brief(error)}).") from None
    if not model.graph.outputs:
        raise BundleError(f"{path} is not an ONNX model: it has no outputs.")
    counts = Counter(node.op_type for node in model.graph)
    tensors = [v.const_value for v in model.graph.initializers.values()]
    files = sorted({str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)})
    facts = {
        "inputs": {v.name: str(v.shape) for v in model.graph.inputs},
        "outputs": {v.name: str(v.shape) for v in model.graph.outputs},
        "opset": model.opset_imports.get(""),
        "nodes": len(model.graph),
        "weights": sum(isinstance(t, ir.ExternalTensor) for t in tensors),
        "weight files": files,
        "size": megabytes(path.stat().st_size),
        "sha256": record_files(path.parent, [path.name])[path.name].sha256,
    }
    metadata, refitted = dict(model.metadata_props), _refitted(path)
    scopes = Counter((node.name or "").rpartition("/")[0] for node in model.graph)
    extra = {"operators": dict(counts.most_common()), "scopes": dict(scopes)} if layers else {}
    output.document(
        {
            "kind": "engine",
            "path": str(path),
            **facts,
            "metadata": metadata,
            "refitted": dataclasses.asdict(refitted) if refitted else None,
            **extra,
        }
    )
    if refitted:  # the graph's own words are those of the build
        now = {name: json.dumps(value) for name, value in dataclasses.asdict(refitted).items()}
        metadata |= {**now, "refitted": "yes"}
    _show(output, "engine", {**facts, **metadata})
    if layers:
        output.table(["operator", "nodes"], counts.most_common(), "")
        output.table(["part", "nodes"], list(scopes.items()), "")


def _refitted(path: Path) -> Refitted | None:
    """What became of a graph's weights, by the manifest of the bundle that it lies in, if any."""
    from tocom_export.bundle.opening import Bundle, graph_name

    with suppress(BundleError):
        entries = Bundle.open(path.parent).refitted.items()
        return next((entry for target, entry in entries if graph_name(target) == path.name), None)
    return None


def _plan(path: Path, layers: bool, output: Output) -> None:
    from tocom_export.engines.tensorrt.plan import open_plan

    content, record = open_plan(path)
    output.document({"kind": "plan", "path": str(path), **record.to_json()})
    smallest, optimal, largest = record.batch
    facts = {
        "model": record.spec.model,
        "degree": record.target,
        "source degree": record.source,
        "compensated": f"yes, scale {record.scale}" if record.compensated else "no",
        "method": record.method.name,
        "precision": record.precision,
        "batches": f"{smallest} to {largest}, made for {optimal}",
        "refit": f"{record.refit}: {len(record.refittable)} weights",
        "stripped": "yes; refit it before it runs" if record.stripped else "no",
        "library": f"{record.library} {record.version}",
        "built on": record.gpu or "no GPU",
        "flags": " ".join(record.flags) or None,
        "size": megabytes(len(content)),
        "sha256": record.sha256,
    }
    _show(output, "plan", facts)
    if layers and record.refittable:
        rows = [[name, t.dtype, list(t.shape)] for name, t in record.refittable.items()]
        output.table(["refittable", "type", "shape"], rows, "")


def _weights(path: Path, layers: bool, output: Output) -> None:
    from tocom_export.compression.bank import FACTORS, ToComBank
    from tocom_export.compression.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(path)
    names = list(checkpoint.tensors)
    if sorted(names) == sorted(FACTORS) or any("_tocom." in name for name in names):
        _bank(path, ToComBank.load(path), layers, output)
        return
    info = checkpoint.info
    shapes = {name: list(t.shape) for name, t in checkpoint.tensors.items()}
    facts = {
        "model": info.spec.model if info.spec else None,
        "images": f"{info.spec.channels}×{info.spec.image_size[0]}×{info.spec.image_size[1]}"
        if info.spec
        else None,
        "adapters": (info.spec.adapter_width or None) if info.spec else None,
        "source degree": info.source,
        "method": info.method.name if info.method else None,
        "classes": len(info.classes) if info.classes else None,
        "tensors": len(shapes),
        "parameters": sum(t.size for t in checkpoint.tensors.values()),
        "dtypes": ", ".join(sorted({str(t.dtype) for t in checkpoint.tensors.values()})),
        "size": megabytes(path.stat().st_size),
    }
    output.document(
        {
            "kind": "checkpoint",
            "path": str(path),
            **facts,
            **({"shapes": shapes} if layers else {}),
        }
    )
    _show(output, "checkpoint", facts)
    if layers:
        output.table(["tensor", "shape"], list(shapes.items()), "")


def _bank(path: Path, bank: Any, layers: bool, output: Output) -> None:
    import numpy as np

    facts = {
        "model": bank.model or None,
        "method": bank.method.name,
        "layers": bank.depth,
        "width": bank.width,
        "arithmetic": bank.arithmetic,
        "groups": bank.groups,
        "rank": bank.rank,
        "parameters": bank.parameters,
        "size": megabytes(path.stat().st_size),
    }
    norms = []
    if layers:
        for layer in range(bank.depth):
            gaps = bank.gap(layer, 0, bank.max_degree, 1.0)
            norms.append([round(float(np.linalg.norm(gap)), 4) for gap in gaps])
    output.document(
        {"kind": "bank", "path": str(path), **facts, **({"gap_norms": norms} if layers else {})}
    )
    _show(output, "bank", facts)
    if layers:
        rows = [[f"layer {layer}", *pair] for layer, pair in enumerate(norms)]
        title = f"Frobenius norm of the gap 0 → {bank.max_degree} at scale 1"
        output.table(["", "query", "value"], rows, title)
