"""What the study trains and measures, as commands: each makes one file from earlier ones."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

DOWNSTREAM = ("caltech101", "imagenette", "gtsrb", "cifar10")
TARGETS = "0,4,8,12,16"
SEEDS = (0, 1, 2)
HEADLINE = (0, 16)
"""Sources trained with every seed; the others, which are references, with the first."""
ABLATIONS = {
    "tocom": "",
    "shared": "--arithmetic shared",
    "classes": "--loss classes",
    "no-inversion": "--arithmetic no-inversion",
    "rank 1": "--rank 1",
    "rank 4": "--rank 4",
    "scale 0.01": "--scale 0.01",
    "scale 1": "--scale 1",
}
"""What the paper compares (section 5.4), each a bank trained as long as the others."""


@dataclass(frozen=True)
class Task:
    """One command, and the file whose presence says that it was run."""

    name: str
    stage: str
    command: list[str]
    made: Path
    needs: tuple[Path, ...] = ()
    prints: bool = False
    """Whether the file is what the command prints."""


def tasks(form: dict[str, Any], data: Path, out: Path) -> Iterator[Task]:
    """The whole programme in an order in which it can be run."""
    spec = form["spec"]
    pretraining = data / "tiny-imagenet" / "train"
    before: Path | None = None
    for step in form["pretrain"]:
        made = out / f"{step['name']}.safetensors"
        if before is None:
            size = step.get("image_size", spec["image_size"][0])
            file = out / f"{step['name']}.json"
            file.write_text(json.dumps({**spec, "image_size": [size, size]}))
            start = ["--init", "random", "--model", str(file)]
        else:
            start = ["--checkpoint", str(before)]
        yield Task(
            f"pretraining, {step['name']}", "backbone",
            [
                "finetune", *start, "--data", str(pretraining), *shlex.split(step["options"]),
                "--out", str(made),
            ],
            made, (before,) if before else (),
        )  # fmt: skip
        before = made
    assert before is not None
    yield Task(
        "what degrees cost the backbone", "drop",
        [
            "evaluate", str(before), "--bank", "none", "--targets", TARGETS, "--json",
            "--data", str(data / "tiny-imagenet" / "test"),
        ],
        out / "drop.json", (before,), prints=True,
    )  # fmt: skip
    distil = ["train", "--checkpoint", str(before), "--data", str(pretraining)]
    for method in ("tome", "evit"):
        made = out / f"{method}-bank.safetensors"
        command = [*distil, "--method", method, *shlex.split(form["bank"]), "--out", str(made)]
        yield Task(f"{method} bank", f"{method}-bank", command, made, (before,))
    for dataset in DOWNSTREAM:
        for method, source, seed in models():
            made = out / dataset / f"{method}{source:02d}-s{seed}.safetensors"
            yield Task(
                f"{dataset}, {method}, source {source}, seed {seed}", "downstream",
                [
                    "finetune", "--checkpoint", str(before), "--data", str(data / dataset / "tune"),
                    "--method", method, "--source", str(source), "--seed", str(seed),
                    *shlex.split(f"{form['downstream']} {form[dataset]}"), "--out", str(made),
                ],
                made, (before,),
            )  # fmt: skip
    distil[-1] = str(data / "tiny-imagenet" / form["ablation_data"])
    for name, change in ABLATIONS.items():
        made = out / "ablation" / f"{name.replace(' ', '-')}.safetensors"
        command = [*distil, *shlex.split(f"{form['ablation']} {change}"), "--out", str(made)]
        yield Task(f"ablation, {name}", "ablation", command, made, (before,))
    yield from measurements(data, out)


def models() -> Iterator[tuple[str, int, int]]:
    """Method, source and seed of the models tuned on each downstream set.

    At degree 0 the methods are one and the same.
    """
    for source in (0, 4, 8, 12, 16):
        for seed in SEEDS if source in HEADLINE else SEEDS[:1]:
            yield "tome", source, seed
    for source in (8, 16):
        yield "evit", source, 0


def measurements(data: Path, out: Path) -> Iterator[Task]:
    """The evaluate commands; their rows are put together afterwards."""

    def evaluate(
        stage: str, name: str, dataset: str, bank: Path, models: list[str], targets: str, *more: str
    ) -> Task:
        checkpoints = [out / dataset / f"{model}.safetensors" for model in models]
        return Task(
            f"measuring {name} on {dataset}", stage,
            [
                "evaluate", *map(str, checkpoints), "--bank", str(bank), "--targets", targets,
                "--data", str(data / dataset / "test"), "--name", dataset, *more, "--json",
            ],
            out / "rows" / stage / f"{dataset}-{name.replace(' ', '-')}.json",
            (*checkpoints, bank), prints=True,
        )  # fmt: skip

    seeds = {"tome": SEEDS, "evit": SEEDS[:1]}
    for stage, dataset in product(("timed", "rows"), DOWNSTREAM):
        auto = ("--scale", "auto", "--held-out", str(data / dataset / "held-out"))
        for method, seed in ((m, s) for m in seeds for s in seeds[m]):
            if (stage == "timed") != ((method, seed) == ("tome", 0)):
                continue
            bank = out / f"{method}-bank.safetensors"
            ends = [f"tome00-s{seed}", f"{method}16-s{seed}"]
            targets = {"evit": "0,8,16"}.get(method, "0,12,16" if seed else TARGETS)
            more = ("--method", method, "--seed", str(seed), *auto)
            yield evaluate(stage, f"{method} s{seed}", dataset, bank, ends, targets, *more)
    for dataset, method in product(DOWNSTREAM, seeds):
        bank = out / f"{method}-bank.safetensors"
        for source in sorted({s for m, s, _ in models() if m == method} - set(HEADLINE)):
            name, model = f"{method} at {source}", f"{method}{source:02d}-s0"
            more = ("--method", method)
            yield evaluate("rows", name, dataset, bank, [model], str(source), *more)
    for dataset, (name, change) in product(DOWNSTREAM, ABLATIONS.items()):
        bank_name = "ToCom, trained as briefly" if name == "tocom" else name
        scale = change.split()[-1] if change.startswith("--scale") else "0.1"
        bank = out / "ablation" / f"{name.replace(' ', '-')}.safetensors"
        more = ("--bank-name", bank_name, "--scale", scale)
        yield evaluate("rows", f"{name} from 0", dataset, bank, ["tome00-s0"], "12,16", *more)
        yield evaluate("rows", f"{name} from 16", dataset, bank, ["tome16-s0"], "0", *more)
