"""``tocom-export evaluate``."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import CheckFailed, InputError
from tocom_export.io.atomic import replaced

from ..output import (
    FILE,
    Command,
    Degrees,
    FiniteFloat,
    Output,
    common_options,
    installed,
    output_of,
)
from ..training_options import DATA_HELP, require_torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tocom_export.study.evaluate import Measured
    from tocom_export.study.results import Results, Row

RESULTS, TABLE, PAGE = "results.json", "results.csv", "results.md"


class Scale(click.ParamType[float | str]):
    """A number, or ``auto``."""

    name = "S|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | str:
        try:
            return value if value == "auto" else FiniteFloat().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is neither a finite number nor 'auto'.", param, ctx)


@click.command("evaluate", cls=Command)
@click.argument("paths", type=FILE, nargs=-1, metavar="[CHECKPOINT|BUNDLE]...")
@click.option("--data", metavar="DATA", help=f"Test images with labels. {DATA_HELP}")
@click.option("--data-root", type=FILE, metavar="DIR", help="Where a timm data set lies.")
@click.option("--download", is_flag=True, help="Let timm download the data set.")
@click.option(
    "--bank",
    metavar="FILE",
    help="ToCom bank; default for 'reference' models: the shipped one; 'none' measures token "
    "reduction alone.",
)
@click.option(
    "--method",
    type=click.Choice(["tome", "evit"]),
    help="Merge or prune; default: the bank's, else the checkpoint's.",
)
@click.option(
    "--targets", type=Degrees(), help="Degrees to run at; default: 0,4,8,12,16, or the bundle's."
)
@click.option(
    "--scale",
    type=Scale(),
    help="ToCom scale, default 0.1; 'auto' takes for each pair of degrees the paper's value that "
    "does best on --held-out. A bundle's is baked in.",
)
@click.option("--held-out", metavar="DATA", help="Images, not of the test split, for --scale auto.")
@click.option("--check", is_flag=True, help="Run PyTorch (CPU) beside a bundle's engines.")
@click.option(
    "--record",
    is_flag=True,
    help="Write the accuracy into a bundle's manifest, where steering and bench --plot find it.",
)
@click.option("--name", metavar="TEXT", help="What to call the data set; default: from --data.")
@click.option(
    "--variant", default="tocom", show_default=True, help="What to call the bank in the rows."
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of training, for the rows.")
@click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Images.")
@click.option(
    "--workers", type=click.IntRange(0), default=0, show_default=True, help="Loading processes."
)
@click.option("--device", metavar="NAME", help="Of PyTorch; default: CUDA if any.")
@click.option(
    "--out",
    type=FILE,
    metavar="DIR",
    help=f"Add the rows to {RESULTS} in this folder, and write {TABLE}, {PAGE} and, with "
    "matplotlib, two pictures from it; without a checkpoint or bundle only the latter.",
)
@common_options
def evaluate_command(
    paths: tuple[Path, ...],
    data: str | None,
    data_root: Path | None,
    download: bool,
    bank: str | None,
    method: str | None,
    targets: tuple[int, ...] | None,
    scale: float | str | None,
    held_out: str | None,
    check: bool,
    record: bool,
    name: str | None,
    variant: str,
    seed: int,
    batch: int,
    workers: int,
    device: str | None,
    out: Path | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Accuracy over sources × targets, with and without ToCom.

    Each checkpoint is run in PyTorch at every target degree, each bundle in its engines. A
    checkpoint's source degree is in its metadata; one trained at a target degree also gives
    the reference for it. --check holds a bundle's engines against PyTorch image by image, and
    exits with 1 where their accuracy differs by more than 0.1 points.

    \b
    Examples:
      tocom-export evaluate r00.safetensors r16.safetensors --bank bank.safetensors \\
        --data cifar10/test --scale auto --held-out cifar10/held-out --out results
      tocom-export evaluate reference-source0 --data cifar10/test --check --record
      tocom-export evaluate --out results
    """
    output = output_of(as_json, verbose, quiet)
    if not paths and (data or check or record or not out):
        raise InputError("name a checkpoint or a bundle, or --out alone to show its results anew.")
    # What is wrong with earlier results is to be said before hours of work.
    known = _results(out, bool(paths)).rows if out else ()
    measured: list[Measured] = []
    rows: list[Row] = []
    if paths:
        if data is None:
            raise InputError("--data: name the test images.")
        if (scale == "auto") != (held_out is not None):
            raise InputError("--scale auto and --held-out DATA need each other.")
        require_torch()
        from tocom_export.study.evaluate import Images, check_rows, measure, rows_of
        from tocom_export.training.loop.distributed import placed

        from ..subjects import open_subject

        with placed(device) as placement:
            subjects = [
                open_subject(
                    path, bank=bank, method=method, targets=targets, device=placement.device
                )
                for path in paths
            ]
        bundles = [subject.reference is not None for subject in subjects]
        if check and not any(bundles):
            raise InputError("--check holds a bundle's engines against PyTorch; name a bundle.")
        if record and not any(bundles):
            raise InputError("--record writes into a bundle's manifest; name a bundle.")
        for option, value in (("--bank", bank), ("--method", method)):
            if value and all(bundles):
                raise InputError(f"{option} is for checkpoints; a bundle has its own baked in.")
        images = Images(data, held_out, data_root, download, batch, workers)
        name = name or _name_of(data)
        check_rows(subjects, name, variant, seed, known)
        measured = measure(subjects, images, scale, check, output)
        rows = rows_of(measured, name, variant, seed)
        _show(measured, rows, output)
    if out:
        rows = _write(out, rows, output)
    document: dict[str, Any] = {"rows": [row.to_json() for row in rows]}
    if check:
        document["checks"] = [m.check_json() for m in measured if m.reference]
    output.document(document)
    if failed := [m for m in measured if not m.passed]:
        where = ", ".join(f"{m.subject.path} at {m.target}" for m in failed)
        raise CheckFailed(
            f"{where}: engine and PyTorch differ by more than 0.1 points, or give no numbers."
        )
    if record:
        _record(measured, output)


def _name_of(data: str) -> str:
    """A data set's name from where it lies: ``cifar10`` of ``data/cifar10/test``."""
    parts = [p for p in Path(data.split(":")[0]).parts if p not in ("test", "val", "validation")]
    return parts[-1] if parts else data


def _show(measured: Sequence[Measured], rows: Sequence[Row], output: Output) -> None:
    """The table, and that of the check against PyTorch."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f} %"

    table = [
        [
            m.subject.path.stem,
            f"{row.source} → {row.target}",
            percent(row.baseline),
            percent(row.tocom),
            "-" if row.tocom is None else f"{row.tocom - row.baseline:+.2f}",
            percent(row.reference),
            "-" if row.scale is None else f"{row.scale:g}",
            f"{row.throughput:.0f}",
        ]
        for m, row in zip(measured, rows, strict=True)
    ]
    columns = ["", "degrees", "reduced", "with ToCom", "gain", "trained there", "scale", "images/s"]
    title = f"{rows[0].dataset}, {rows[0].images} images, {rows[0].method}"
    output.table(columns, table, title)
    if unusable := sum(m.engine.unusable for m in measured):
        output.note(f"{unusable} outputs hold values that are no numbers; they count as wrong.")
    checks = [m.check_json() for m in measured if m.reference]
    if checks:
        output.table(
            ["bundle", "degree", "engine", "PyTorch", "images that differ", ""],
            [
                [
                    c["bundle"],
                    c["target"],
                    percent(c["engine"]),
                    percent(c["pytorch"]),
                    f"{c['images_that_differ']} of {c['images']}",
                    "passed" if c["passed"] else "FAILED",
                ]
                for c in checks
            ],
            "engines against PyTorch",
        )


def _record(measured: Sequence[Measured], output: Output) -> None:
    """Each bundle's accuracy into its manifest, beside that of targets that weren't measured."""
    from tocom_export.bundle.opening import Bundle

    for path in dict.fromkeys(m.subject.path for m in measured if m.subject.reference):
        bundle = Bundle.open(path)
        found = {m.target: m.engine.accuracy for m in measured if m.subject.path == path}
        known = {**bundle.accuracy, **found}
        dataclasses.replace(bundle, accuracy=dict(sorted(known.items()))).save_manifest()
        output.note(f"Recorded the accuracy of {path} at {', '.join(map(str, found))}.")


def _results(out: Path, measuring: bool) -> Results:
    """What the folder holds so far."""
    from tocom_export.study.results import Results

    file = out / RESULTS
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is no folder; name another.")
    if not measuring and not file.exists():
        raise InputError(f"--out {out} holds no {RESULTS}; name a checkpoint or a bundle, too.")
    return Results.load(file) if file.exists() else Results()


def _write(out: Path, rows: Sequence[Row], output: Output) -> list[Row]:
    """Add rows to the folder's results and write everything that is made of them; all rows."""
    from tocom_export.study.markdown import markdown
    from tocom_export.study.plots import accuracy_picture, throughput_picture

    file = out / RESULTS
    results = _results(out, bool(rows))
    if rows:
        results = results.merge(rows).with_references()
        results.save(file)
    _write_csv(results.rows, out / TABLE)
    pictures = {}
    drawn = [row for row in results.rows if row.variant == "tocom"]  # ablations are a table
    if not installed("matplotlib"):
        output.note("No pictures: matplotlib is not installed (pip install 'tocom-export[plot]').")
        drawn = []
    if drawn:
        pictures["Accuracy against target degree"] = "accuracy.svg"
        accuracy_picture(drawn, out / "accuracy.svg")
    if any(row.throughput for row in drawn):
        pictures["Accuracy against throughput"] = "throughput.svg"
        throughput_picture(drawn, out / "throughput.svg")
    with replaced(out / PAGE) as beside:
        beside.write_text(markdown(results, pictures), "utf-8")
    output.note(f"Wrote {', '.join((str(file), TABLE, PAGE, *pictures.values()))}.")
    return list(results.rows)


def _write_csv(rows: Sequence[Row], file: Path) -> None:
    """A line per row, under the names of its fields."""
    from tocom_export.study.results import Row

    with replaced(file) as beside, beside.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))
