"""``tocom-export evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tocom_export.errors import CheckFailed, InputError

from ..accuracy_table import show_checks
from ..evaluate_options import check_usage, evaluate_options, is_bundle
from ..options import FILE, common_options, take_output, wait_option
from ..output import Command, Output
from ..training_options import require_torch

if TYPE_CHECKING:
    from tocom_export.engines.accuracy import AccuracyCheck
    from tocom_export.study.evaluate import Measured
    from tocom_export.study.results import Row
    from tocom_export.study.subject import Subject


@click.command("evaluate", cls=Command)
@click.argument("paths", type=FILE, nargs=-1, metavar="[CHECKPOINT|BUNDLE]...")
@evaluate_options
@wait_option
@common_options
def evaluate_command(paths: tuple[Path, ...], **options: Any) -> None:
    """Accuracy over sources × variants, with and without ToCom.

    Each checkpoint is run in PyTorch at every target degree, each bundle in its engines. A
    checkpoint's source degree is in its metadata; one trained at a target degree also gives
    the reference for it. ± is the farther end of an accuracy's 95 % interval (Wilson).

    --check runs PyTorch beside a bundle's engines, and exits with 1 where the accuracy of one
    differs by more than 0.1 points in fp32, or is lower by more than 0.3 points with 95 %
    certainty in another precision, by the images that one of the two gets right and the other
    wrong. PyTorch has float32 weights where these are at hand, else the bundle's own.

    --knn TRAIN measures embeddings, with or without a head, as DINO does: the 20 images of TRAIN
    of the largest cosine similarity vote, each with exp(similarity / 0.07); both sets are embedded
    by the same variant. A bundle needs an embedding for it (build --output embedding).

    \b
    Examples:
      tocom-export evaluate r00.safetensors r16.safetensors --bank bank.safetensors \\
        --data cifar10/test --scale auto --held-out cifar10/held-out --out results
      tocom-export evaluate reference-source0 --data cifar10/test --check --record
      tocom-export evaluate backbone.safetensors --bank none --knn cifar10/train \\
        --data cifar10/test
      tocom-export evaluate --out results
    """
    from tocom_export.study.publish import open_results, publish

    output, out = take_output(options), options["out"]
    check_usage(paths, options)
    if options["record"]:
        from tocom_export.study.rows import check_recordable

        check_recordable(paths, wait=options["wait"], tell=output.note)
    # What is wrong with earlier results is to be said before hours of work.
    known = open_results(out, required=not paths).rows if out else ()
    measured, rows = _measure(paths, known, options, output) if paths else ([], [])
    checks = _check(measured) if measured else []
    if measured:
        _show(measured, rows, checks, output)
    ran = {
        row.key: (found.subject.precision, found.subject.backend)
        for found, row in zip(measured, rows, strict=True)
    }
    everything = publish(out, rows, tell=output.note).rows if out else rows  # of earlier runs, too
    document = {"rows": [row.describe(*ran.get(row.key, ())) for row in everything]}
    described = [_describe_check(path, check) for path, check in checks]
    output.document({**document, **({"checks": described} if checks else {})})
    if failed := [f"{path} at {c.variant}: {c.failure}" for path, c in checks if not c.passed]:
        raise CheckFailed(f"{'; '.join(failed)}.")
    if options["record"]:
        from tocom_export.study.rows import record_accuracy

        for path, names in record_accuracy(
            measured, wait=options["wait"], tell=output.note
        ).items():
            output.note(f"Recorded the accuracy of {path} at {', '.join(names)}.")


def _check(measured: Sequence[Measured]) -> list[tuple[Path, AccuracyCheck]]:
    """The judgement of each engine that PyTorch was run beside, with its bundle."""
    from tocom_export.engines.accuracy import check_accuracy

    return [(found.subject.path, check_accuracy(found)) for found in measured if found.oracle]


def _describe_check(path: Path, check: AccuracyCheck) -> dict[str, Any]:
    differ = check.engine.count_differences(check.pytorch)
    more = {"engine": check.engine.accuracy, "images_that_differ": differ}
    return {"bundle": str(path), **check.to_json(), **more}


def _measure(
    paths: Sequence[Path], known: Sequence[Row], options: Mapping[str, Any], output: Output
) -> tuple[list[Measured], list[Row]]:
    require_torch()
    from tocom_export.study.evaluate import measure
    from tocom_export.study.neighbours import NEIGHBOURS, Neighbours
    from tocom_export.study.rows import check_conflicts, make_rows
    from tocom_export.study.subject import check_subjects
    from tocom_export.training.data.evaluation import EvalData, open_test_data
    from tocom_export.training.data.opening import name_data, name_voters
    from tocom_export.training.loop.out_of_memory import explain_out_of_memory

    scale, held_out = options["scale"], options["held_out"]
    names = (options["name"] or name_data(options["data"]), options["bank_name"], options["seed"])
    knn = options["knn"]
    count = (options["neighbours"] or NEIGHBOURS) if knn else None
    voters = name_voters(knn) if knn else ""
    subjects = _open_subjects(paths, options, output)
    check_conflicts(subjects, *names, known, count, voters)
    check_subjects(subjects, options["data"], held_out, scaled=scale is not None, heads=knn is None)

    def open_batches(place: str, split: str = "test") -> EvalData:
        first = subjects[0]  # the others take the same images
        given = {n: options[n] for n in ("batch", "workers", "data_root", "download")}
        return open_test_data(
            place, first.spec, first.preprocess, warn=output.note, split=split, **given
        )

    used = f"`batch` {options['batch']}"
    with explain_out_of_memory(used, "lower it, or evaluate fewer models at a time"):
        measured = measure(
            subjects,
            open_batches(options["data"]),
            open_batches(held_out) if held_out else None,
            scale=None if scale == "auto" else scale,
            check=options["check"],
            progress=output.progress,
            neighbours=Neighbours(open_batches(knn, "train"), count) if knn and count else None,
        )
    return measured, make_rows(measured, *names, count, voters)


def _open_subjects(
    paths: Sequence[Path], options: Mapping[str, Any], output: Output
) -> list[Subject]:
    """Bundles where paths are folders that transformers didn't save, else checkpoints."""
    from tocom_export.bundle.opening import Bundle
    from tocom_export.engines.subject import make_subject
    from tocom_export.preparing import TARGETS
    from tocom_export.training.loop.distributed import choose_device
    from tocom_export.training.subject import open_subject
    from tocom_export.training.torch_engine import Float32Oracle

    device, schedules = choose_device(options["device"]), options["schedules"]
    targets = options["targets"] or (() if schedules else TARGETS)
    output_name: Any = "embedding" if options["knn"] else "logits"
    subjects = []
    for path in paths:
        if is_bundle(path):
            bundle = Bundle.open(path)
            if options["knn"] and options["record"] and bundle.has_logits:
                raise InputError(
                    f"`record`: {path} gives logits, and what is recorded of it is their accuracy; "
                    "leave `knn` or `record` out."
                )
            given = bundle.find_output(output_name)
            oracle = Float32Oracle(bundle, given) if options["check"] else None
            backend: Any = options["backend"] or "onnx"
            found = make_subject(bundle, options["variants"], oracle, backend=backend, output=given)
        else:
            found = open_subject(
                path, targets=targets, schedules=schedules, bank=options["bank"],
                method=options["method"], merge=options["merge"], device=device,
                weights_key=options["weights_key"], output=output_name, tell=output.note,
            )  # fmt: skip
        subjects.append(found)
    return subjects


def _show(
    measured: Sequence[Measured],
    rows: Sequence[Row],
    checks: Sequence[tuple[Path, AccuracyCheck]],
    output: Output,
) -> None:
    """The table, and that of the check against PyTorch."""
    from tocom_export.study.accuracy import format_accuracy

    table = [
        [
            found.subject.path.stem,
            f"{row.source} → {row.schedule or row.target}",
            format_accuracy(row.baseline, row.images),
            format_accuracy(row.tocom, row.images),
            "-" if row.gain is None else f"{row.gain:+.2f}",
            format_accuracy(row.reference, row.images),
            "-" if row.scale is None else f"{row.scale:g}",
            f"{row.throughput:.0f}",
        ]
        for found, row in zip(measured, rows, strict=True)
    ]
    columns = ["", "degrees", "reduced", "with ToCom", "gain", "trained there", "scale", "images/s"]
    first = rows[0]
    near = f", {first.neighbours} nearest neighbours in {first.knn}" if first.neighbours else ""
    output.table(columns, table, f"{first.dataset}, {first.images} images, {first.method}{near}")
    if chosen := [(found, found.unlabelled) for found in measured if found.unlabelled]:
        means = (
            sum(found.served.accuracy for found, _ in chosen) / len(chosen),
            sum(score.accuracy for _, (_, score) in chosen) / len(chosen),
        )
        scales = ", ".join(f"{scale:g}" for _, (scale, _) in chosen)
        output.note(
            f"Scales chosen by divergence, without labels, would be {scales}: {means[1]:.2f} % in "
            f"the mean, where these give {means[0]:.2f}."
        )
    if unusable := sum(found.served.unusable for found in measured):
        output.note(f"{unusable} outputs hold values that are no numbers; they count as wrong.")
    if checks:
        show_checks([(path.name, check) for path, check in checks], "engines", output)
