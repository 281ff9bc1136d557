"""The reference model, its banks and the study, stage by stage.

python recipes/reference/run.py full DATA OUT      on a GPU; sized for half an hour, not run yet
python recipes/reference/run.py reduced DATA OUT   on two CPU cores, some hours
python recipes/reference/run.py standard DATA OUT   on two CPU cores with bfloat16, about a day

DATA is what prepare.py makes. What is finished is not done again, and what was broken off goes on
where it was: run the same command again. --stages backbone,tome-bank does part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path

from program import Task, tasks
from tuned import add_columns, tuned

from tocom_export.study.results import Results, parse_row

HERE = Path(__file__).resolve().parent
PARALLEL = ("downstream", "ablation", "rows")
CHILDREN: list[subprocess.Popen[bytes]] = []


def stop(*_: object) -> None:
    """On SIGTERM: let what runs save its state, and start nothing more."""
    for child in CHILDREN:
        child.terminate()
    os._exit(1)


def run(task: Task, threads: int | None) -> str:
    """Run one command, on so many threads; what became of it in a line."""
    if task.made.exists():
        return f"{task.name}: done before"
    if missing := [str(f) for f in task.needs if not f.exists()]:
        return f"{task.name}: waits for {', '.join(missing)}"
    task.made.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with task.made.with_suffix(".log").open("a") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "tocom_export.cli.main", *task.command],
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None,
        )
        CHILDREN.append(child)
        printed, _ = child.communicate()
    if child.returncode:
        return f"{task.name}: FAILED, see {log.name}"
    if task.prints:
        beside = task.made.with_suffix(".part")
        beside.write_bytes(printed)
        beside.rename(task.made)
    if not task.made.exists():
        return f"{task.name}: stopped, and goes on when it is started again"
    return f"{task.name}: {(time.monotonic() - began) / 60:.1f} min"


def processors() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def collect(out: Path) -> None:
    """All rows measured so far, as one document, and the page of it."""
    rows = [
        parse_row(row if file.parent.name == "timed" else {**row, "throughput": None})
        for file in sorted((out / "rows").glob("*/*.json"))
        for row in json.loads(file.read_text())["rows"]
    ]  # what ran beside others says nothing of speed
    if rows:
        target = out / "study" / "results.json"
        target.parent.mkdir(exist_ok=True)
        known = Results.load(target) if target.exists() else Results()
        merged = known.merge(rows)
        replace(merged, rows=tuple(add_columns(merged.rows, out))).save(target)
        command = [sys.executable, "-m", "tocom_export.cli.main", "evaluate", "--out"]
        subprocess.run([*command, str(target.parent)], check=True)


def main() -> int:
    """Exit status 1 where a task failed or waits for one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("form", choices=("full", "standard", "reduced"))
    parser.add_argument("data", type=lambda name: Path(name).resolve())
    parser.add_argument("out", type=lambda name: Path(name).resolve())
    parser.add_argument("--stages", help="comma-separated; default: all")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    form = json.loads((HERE / f"{options.form}.json").read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = options.stages.split(",") if options.stages else None
    failed = False
    planned = chain(*(plan(form, options.data, options.out) for plan in (tasks, tuned)))
    for stage, group in groupby(planned, lambda task: task.stage):
        if wanted and stage not in wanted:
            continue
        jobs = form["jobs"] if stage in PARALLEL else 1
        threads = max(1, processors() // jobs) if jobs > 1 else None
        with ThreadPoolExecutor(jobs) as pool:
            for line in pool.map(partial(run, threads=threads), group):
                print(line, flush=True)
                failed |= any(word in line for word in ("FAILED", "waits for", "stopped"))
    collect(options.out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
