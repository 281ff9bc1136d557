"""The reference program: what it would run, without running it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from tocom_export.cli.main import cli

RECIPE = Path(__file__).parent.parent / "recipes" / "reference"


@pytest.fixture(params=["full", "standard", "reduced"])
def programme(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Any]]:
    sys.path.insert(0, str(RECIPE))
    try:
        from program import tasks
        from tuned import tuned

        form = json.loads((RECIPE / f"{request.param}.json").read_text("utf-8"))
        places = (form, tmp_path / "data", tmp_path)
        yield [*tasks(*places), *tuned(*places)]
    finally:
        sys.path.remove(str(RECIPE))


def test_each_command_has_options_that_exist(programme: list[Any]):
    # As the command line opens it: commands remember the names of their help option.
    root = click.Context(cli, **cli.context_settings)
    for task in programme:
        name, *arguments = task.command
        command = cli.get_command(root, name)
        assert command is not None
        command.make_context(name, arguments, parent=root)  # raises where an option is wrong


def test_each_task_makes_a_file_of_its_own_from_earlier_ones(programme: list[Any]):
    made: set[Path] = set()
    for task in programme:
        assert set(task.needs) <= made, task.name
        assert task.made not in made, task.name
        made.add(task.made)


def test_every_ablation_of_the_paper_is_measured_in_both_directions(programme: list[Any]):
    rows = [task.command for task in programme if task.stage == "rows"]
    measured = {c[c.index("--bank-name") + 1] for c in rows if "--bank-name" in c}
    wanted = {"shared", "classes", "no-inversion", "rank 1", "rank 4", "scale 0.01", "scale 1"}
    assert wanted < measured
    for variant in measured:
        own = [c for c in rows if "--bank-name" in c and c[c.index("--bank-name") + 1] == variant]
        assert {c[c.index("--targets") + 1] for c in own} == {"12,16", "0"}
