"""What ``build`` says at its end: one table of all variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .options import format_megabytes
from .output import Output

if TYPE_CHECKING:
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.verify import Comparison
    from tocom_export.variant import Variant


def report_build(
    bundle: Bundle,
    checks: Mapping[str, Comparison],
    times: Mapping[str, float],
    seconds: float,
    output: Output,
) -> None:
    """The table, or the JSON document, and what a person would want to know beside it.

    Args:
        times: variant → milliseconds of a quick look; empty where none was taken.
    """
    names = list(bundle.variants)
    rows = [_describe(bundle, name, checks.get(name), times.get(name)) for name in names]
    output.document(
        {
            "bundle": str(bundle.path),
            "model": bundle.spec.model,
            "precision": bundle.precision,
            "method": bundle.method.label,
            "outputs": list(bundle.outputs),
            "bytes": bundle.size(),
            "seconds": round(seconds, 3),
            "variants": rows,
        }
    )
    _show(bundle, rows, output)
    for check in checks.values():
        if check.beyond:
            output.note(
                f"{check.variant}: {check.beyond} of {check.images} images differ by more than "
                "rounding; two pairs of tokens are equally similar there, and either may be merged."
            )
    if checks and all(check.max_difference is None for check in checks.values()):
        output.note(
            "Engines run, outputs are finite; without torch there is nothing to compare them with."
        )
    if times:
        output.note("ms: a quick look at single images on this machine; bench measures.")
    output.note(f"Wrote {bundle.path}: {format_megabytes(bundle.size())} in {seconds:.1f} s.")


def _describe(
    bundle: Bundle, name: str, check: Comparison | None, milliseconds: float | None
) -> dict[str, Any]:
    variant = bundle.variants[name]
    schedule = variant.schedule(bundle.spec)
    return {
        "variant": name,
        "degrees": list(variant.degrees),
        "source": variant.source,
        "scale": variant.scale,
        "compensated": variant.baked,
        "graph": str(bundle.graph(name)),
        "tokens": list(schedule.tokens_out),
        "macs": schedule.macs(bundle.spec),
        "bytes": _size_of(bundle, name),
        "quick_look_ms": milliseconds,
        "accuracy": bundle.accuracy.get(name),
        "check": check.to_json() if check else None,
    }


def _size_of(bundle: Bundle, name: str) -> int:
    """Bytes of what is a variant's alone."""
    from tocom_export.bundle.manifest import graph_name, weights_name

    files = (graph_name(name), weights_name(name))
    own = sum(bundle.files[file].bytes for file in files if file in bundle.files)
    return own + (bundle.plan(name).stat().st_size if name in bundle.plans else 0)


def _show(bundle: Bundle, rows: list[dict[str, Any]], output: Output) -> None:
    from tocom_export.compression.schedule import Schedule

    spec, variants = bundle.spec, list(bundle.variants.values())
    dense = Schedule.of(spec, 0).macs(spec)
    columns: dict[str, list[str]] = {
        "variant": [row["variant"] for row in rows],
        "tokens": [f"{spec.tokens} → {row['tokens'][-1]}" for row in rows],
        "MACs": [f"{row['macs'] / 1e6:,.1f} M" for row in rows],
        "saved": [f"{100 * (1 - row['macs'] / dense):.0f} %" for row in rows],
        "own files": [format_megabytes(row["bytes"]) for row in rows],
        "ms": [_format(row["quick_look_ms"], ".2f") for row in rows],
        "accuracy": [_format(row["accuracy"], ".2f", " %") for row in rows],
        "max |Δ|": [_format((row["check"] or {}).get("max_difference"), ".1e") for row in rows],
        "worst output": [_name_worst(bundle, row["check"]) for row in rows],
        "same top-1": [_format((row["check"] or {}).get("agreement"), ".0f", " %") for row in rows],
    }
    known = {head: cells for head, cells in columns.items() if {*cells} != {"-"}}
    table = [list(row) for row in zip(*known.values(), strict=True)]
    output.table(list(known), table, _make_title(bundle, variants))


def _name_worst(bundle: Bundle, check: dict[str, Any] | None) -> str:
    """Which output the difference is of, where there is one and there are several outputs."""
    told = check and check["max_difference"] is not None and len(bundle.outputs) > 1
    return str(check["output"]) if check and told else "-"


def _make_title(bundle: Bundle, variants: list[Variant]) -> str:
    first = variants[0]
    compensated = any(variant.compensated for variant in variants)
    bank = f"ToCom scale {first.scale}" if compensated else "not compensated"
    return f"{bundle.spec.model}, source {first.source}, {bank}"


def _format(number: float | None, form: str, unit: str = "") -> str:
    return "-" if number is None else f"{number:{form}}{unit}"
