"""What a local bank and a searched schedule are worth to models of source 0: more of the study."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from program import DOWNSTREAM, SEEDS, Task

from tocom_export.compression.schedule import Schedule
from tocom_export.io.json_codec import decode
from tocom_export.model.spec import VitSpec
from tocom_export.study.results import Row, parse_row

TARGET = 16
CLASSES = {"caltech101": 101, "imagenette": 10, "gtsrb": 43, "cifar10": 10}
ADAPTER = 32
"""Width of AdaptFormer's branches, which are part of the cost."""


def tuned(form: Mapping[str, Any], data: Path, out: Path) -> Iterator[Task]:
    """Local banks, searched schedules, and what both give on the test splits.

    No labels are used: a bank is distilled on the images that the model was tuned on, a schedule
    is searched on those that were held out.
    """
    for seed, dataset in product(SEEDS, DOWNSTREAM):
        model, folder = out / dataset / f"tome00-s{seed}.safetensors", out / dataset
        banks = {
            "none": "none",
            "tocom": str(out / "tome-bank.safetensors"),
            "local": str(folder / f"local-s{seed}.safetensors"),
        }
        local = Path(banks["local"])
        yield Task(
            f"local bank of {dataset}, seed {seed}", "tuned",
            [
                "train", "--checkpoint", str(model), "--from", banks["tocom"],
                "--data", str(data / dataset / "tune"), "--seed", str(seed),
                *shlex.split(form.get("local", "")), "--out", str(local),
                *(["--no-flip"] if "--no-flip" in form[dataset] else []),
            ],
            local, (model, out / "tome-bank.safetensors"),
        )  # fmt: skip
        yield evaluate("local", model, ["--bank", str(local), "--targets", str(TARGET)],
                       data, out, dataset, seed, local)  # fmt: skip
        for kind, bank in banks.items():
            bundle = folder / f"searched-{kind}-s{seed}"
            made, found = bundle / "manifest.json", bundle / "searched.onnx"
            need = () if bank == "none" else (Path(bank),)
            yield Task(
                f"bundle of {dataset}, bank {kind}, seed {seed}", "tuned",
                [
                    "build", "--checkpoint", str(model), "--bank", bank, "--targets", "0,16",
                    "--no-verify", "--out", str(bundle),
                ],
                made, (model, *need),
            )  # fmt: skip
            yield Task(
                f"schedule of {dataset}, bank {kind}, seed {seed}", "tuned",
                [
                    "tune", str(bundle), "--images", str(data / dataset / "held-out"),
                    "--macs", f"{share_of(form['spec'], dataset):.9f}", "--name", "searched",
                    *([] if bank == "none" else ["--bank", bank]),
                ],
                found, (made,),
            )  # fmt: skip
            column = "searched" if kind == "none" else f"searched_{kind}"
            yield evaluate(column, bundle, ["--variants", "searched"], data, out, dataset, seed,
                           found)  # fmt: skip


def evaluate(
    column: str, what: Path, options: list[str], data: Path, out: Path, dataset: str, seed: int,
    need: Path,
) -> Task:  # fmt: skip
    """Measure one column of one row."""
    return Task(
        f"measuring {column} on {dataset}, seed {seed}", "tuned",
        [
            "evaluate", str(what), *options, "--data", str(data / dataset / "test"),
            "--name", dataset, "--seed", str(seed), "--json",
        ],
        out / "columns" / f"{dataset}-s{seed}-{column}.json", (need,), prints=True,
    )  # fmt: skip


def share_of(spec: Mapping[str, Any], dataset: str) -> float:
    """The cost of degree 16, of that of degree 0; rounded up, so that it is allowed itself."""
    known = decode(VitSpec, {**spec, "classes": CLASSES[dataset], "adapter_width": ADAPTER})
    whole, merged = (Schedule.of(known, degree).macs(known) for degree in (0, TARGET))
    return merged / whole + 1e-8


def add_columns(rows: Iterable[Row], out: Path) -> list[Row]:
    """Rows of the study with what was measured for them."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for file in sorted((out / "columns").glob("*.json")):
        column = file.stem.rpartition("-")[2]
        for described in json.loads(file.read_text())["rows"]:
            row = parse_row(described)
            found.setdefault((row.dataset, row.seed), {})[column] = row.accuracy
    return [
        replace(row, **found.get((row.dataset, row.seed), {})) if _is_headline(row) else row
        for row in rows
    ]


def _is_headline(row: Row) -> bool:
    ends = (row.method, row.source, row.target, row.variant)
    return ends == ("tome", 0, TARGET, "tocom")
