"""``tocom-export tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import InputError

from ..options import FILE, FiniteFloat, common_options, take_output, wait_option
from ..output import Command, Output
from ..runtime_options import run_options

if TYPE_CHECKING:
    from tocom_export.engines.tuning.budget import Found


@click.command("tune", cls=Command)
@click.argument("bundle", type=FILE)
@click.option(
    "--images",
    type=FILE,
    required=True,
    metavar="DIR",
    help="Pictures like those that it will see, some hundreds; labels aren't needed.",
)
@click.option(
    "--speedup", type=FiniteFloat(1), multiple=True, help="Times as fast as uncompressed."
)
@click.option("--budget-ms", type=FiniteFloat(0), multiple=True, help="Milliseconds of a batch.")
@click.option(
    "--macs",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    multiple=True,
    help="Share of the uncompressed model's multiply-adds; nothing is timed.",
)
@run_options
@click.option("--batch", type=click.IntRange(1), default=1, help="Images in a run that is timed.")
@click.option("--name", help="Of the variant; default: fast2x, in8ms, macs50.")
@click.option(
    "--bank",
    metavar="FILE",
    help="The one that the bundle is compensated with; default for the model inside the package: "
    "its own.",
)
@click.option("--scale", "scales", is_flag=True, help="Choose the bank's scale, too.")
@click.option(
    "--labelled",
    is_flag=True,
    help="--images are folders of classes; judge by accuracy in place of divergence.",
)
@click.option("--limit", type=click.IntRange(1), default=512, help="Pictures at the most.")
@click.option(
    "--trials", type=click.IntRange(1), default=200, help="Schedules to try for a budget."
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Of the search.")
@click.option("--plot", type=FILE, metavar="FILE", help="A picture of cost against divergence.")
@wait_option
@common_options
def tune_command(
    bundle: Path,
    images: Path,
    speedup: tuple[float, ...],
    budget_ms: tuple[float, ...],
    macs: tuple[float, ...],
    name: str | None,
    plot: Path | None,
    **options: Any,
) -> None:
    """Find the schedule that loses least at a cost, and add it to a bundle as a variant.

    Each layer gets a degree of its own. What is lost is the divergence of a variant's classes from
    those of the model as it was trained, on pictures without labels: half of them are searched
    with, the others judge what was found. Costs are measured on this machine, unless --macs names
    a share of the multiply-adds. A search that was stopped goes on when it is run again.

    \b
    Examples:
      tocom-export tune reference-source0 --images photos --speedup 2
      tocom-export tune reference-source0 --images photos --budget-ms 8 --backend openvino
      tocom-export tune reference-source0 --images photos --macs 0.5 --macs 0.35 --plot found.svg
    """
    from tocom_export.engines.tuning.adding import tune_bundle
    from tocom_export.engines.tuning.budget import Budget

    output = take_output(options)
    budgets = [Budget("speedup", amount) for amount in speedup]
    budgets += [Budget("ms", amount) for amount in budget_ms]
    budgets += [Budget("macs", amount) for amount in macs]
    if not budgets:
        raise InputError("name a `speedup`, a `budget_ms` or a share of `macs`.")
    if name is not None and len(budgets) > 1:
        raise InputError("`name` is for one budget; these are several.")
    found = tune_bundle(
        bundle, images, budgets, name=name, progress=output.open_bar, tell=output.note, **options
    )
    if plot:
        from tocom_export.engines.tuning.plot import draw_search

        draw_search(found, plot)
        output.note(f"Wrote {plot}.")
    _report(bundle, found, output)


def _report(bundle: Path, found: list[Found], output: Output) -> None:
    output.document({"variants": [one.to_json() for one in found]})
    rows = []
    for one in found:
        beside = one.constant
        rows.append(
            [
                one.variant.name,
                one.variant.label,
                f"{one.macs / 1e6:,.1f} M",
                _format(one.median_ms, ".2f"),
                f"{one.divergence:.4f}",
                f"r{beside.degree:02d}" if beside else "-",
                _format(beside.median_ms if beside else None, ".2f"),
                _format(beside.divergence if beside else None, ".4f"),
            ]
        )
    columns = [
        "variant",
        "degrees",
        "MACs",
        "ms",
        "divergence",
        "constant",
        "ms of it",
        "divergence",
    ]
    output.table(columns, rows, "")
    names = ", ".join(one.variant.name for one in found)
    output.note(f"Added {names} to {bundle}; evaluate measures their accuracy.")


def _format(number: float | None, form: str) -> str:
    return "-" if number is None else f"{number:{form}}"
