"""One Triton model for all variants of a bundle: a pool, in Triton's Python backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tocom_export.bundle.file_hashes import read_recorded
from tocom_export.bundle.manifest import MANIFEST, WEIGHTS, graph_name, seal, weights_name
from tocom_export.bundle.opening import Bundle, read_manifest
from tocom_export.errors import PlanError, TocomError

from ..tensorrt.plan import check_plan, open_plan, record_path
from .triton_model import BUNDLE

PROGRAM = "model.py"
_CODE = """\
# Written by tocom-export triton, which may replace it. Needs tocom-export in the environment that
# Triton's Python backend uses, and in it what runs the bundle.
from tocom_export.engines.serving.triton_model import TritonPythonModel  # noqa: F401
"""
_TOLD = [("variant", "TYPE_STRING"), ("source", "TYPE_INT32"), ("scale", "TYPE_FP32")]
"""What is told of each image beside its logits, and its type."""


def configure_pool(config: dict[str, Any], parameters: dict[str, str | None]) -> dict[str, Any]:
    """A model's configuration, of one variant under another backend, made the pool's.

    Args:
        parameters: for :class:`~.triton_requests.Settings`; None leaves one out.
    """
    told = [{"name": name, "data_type": kind, "dims": [1]} for name, kind in _TOLD]
    # All that waits, at once: it is run by variant. Nothing is left to warm up, either: a pool has
    # run each of its engines.
    delay = config["dynamic_batching"]["max_queue_delay_microseconds"]
    values = {key: {"string_value": v} for key, v in parameters.items() if v is not None}
    return {
        **{name: value for name, value in config.items() if name != "model_warmup"},
        "output": [*config["output"], *told],
        # Of several, each would be a process with weights of its own, that a change doesn't reach.
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "dynamic_batching": {"max_queue_delay_microseconds": delay},
        "parameters": {**config["parameters"], **values},
    }


def narrow(bundle: Bundle, variants: Sequence[str], *, plans: bool) -> Bundle:
    """A bundle as it is with some of its variants alone, and with their plans or without any."""
    names = {WEIGHTS, *map(graph_name, variants), *map(weights_name, variants)}
    kept = set(variants)
    return dataclasses.replace(
        bundle,
        variants={name: v for name, v in bundle.variants.items() if name in kept},
        files={name: record for name, record in bundle.files.items() if name in names},
        plans=tuple(name for name in bundle.plans if name in kept and plans),
        refitted=tuple(name for name in bundle.refitted if name in kept),
        accuracy={name: found for name, found in bundle.accuracy.items() if name in kept},
    )


def find_largest(bundle: Bundle, runtime: str) -> int | None:
    """The largest batch that all of a bundle's plans take; None where it isn't run by plans.

    Raises:
        DegreeError, PlanError: a plan is missing, of another backend, or takes no single image.
    """
    if runtime not in ("tensorrt", "tensorrt-rtx"):
        return None
    largest = []
    for name in bundle.variants:
        plan = bundle.plan(name)
        _, record = open_plan(plan)
        check_plan(bundle, name, record)
        if record.backend != runtime:
            raise PlanError(f"{plan} is of {record.backend}, `runtime` is {runtime}.")
        smallest, optimal, most = record.batch
        if smallest > 1:
            raise PlanError(
                f"{plan} takes {smallest} images or more, and Triton sends single ones too; build "
                f"it with --batch 1,{optimal},{most}."
            )
        largest.append(most)
    return min(largest)


def write_pool(version: Path, bundle: Bundle) -> None:
    """The program, and a copy of the bundle, whose files are held against its manifest."""
    folder = version / BUNDLE
    folder.mkdir(parents=True)
    (version / PROGRAM).write_text(_CODE, "utf-8", newline="\n")
    for name, record in bundle.files.items():
        (folder / name).write_bytes(read_recorded(bundle.path / name, record))
    for variant in bundle.plans:
        plan = bundle.plan(variant)
        (folder / plan.name).write_bytes(open_plan(plan)[0])
        record_path(folder / plan.name).write_bytes(record_path(plan).read_bytes())
    (folder / MANIFEST).write_bytes(seal(bundle.to_json()).encode())


def is_ours(version: Path) -> bool:
    """Whether a folder holds what :func:`write_pool` wrote, or Python beside it, and no more."""
    folder = version / BUNDLE
    try:
        manifest = read_manifest(folder)
        known = version / PROGRAM
        found = {p.name for p in version.iterdir()}, {p.name for p in folder.iterdir()}
        text = known.read_text("utf-8")
    except (OSError, UnicodeDecodeError, TocomError):
        return False
    plans = {f"{name}.plan{end}" for name in manifest.plans for end in ("", ".json")}
    beside, inside = found
    return (
        text == _CODE
        and beside <= {PROGRAM, BUNDLE, "__pycache__"}
        and inside <= {MANIFEST, *manifest.files, *plans}
    )
