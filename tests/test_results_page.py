"""What the documents say of the study, held against its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tocom_export.study.markdown import format_page
from tocom_export.study.results import Results
from tocom_export.study.summary import measure_gains, measure_gap_share

ROOT = Path(__file__).parent.parent
SETS = {"caltech101", "cifar10", "gtsrb", "imagenette"}


@pytest.fixture(scope="module")
def results() -> Results:
    return Results.load(ROOT / "docs" / "results.json")


def test_the_page_is_what_the_rows_give(results: Results):
    plots = {
        "Accuracy against target degree": "accuracy.svg",
        "Accuracy against throughput": "throughput.svg",
    }
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    assert page == format_page(results, plots)
    assert all((ROOT / "docs" / file).is_file() for file in plots.values())


def test_the_headline_rows_are_of_three_seeds(results: Results):
    for source, target in ((0, 12), (0, 16), (16, 0)):
        rows = [
            row
            for row in results.rows
            if (row.source, row.target, row.method, row.variant)
            == (source, target, "tome", "tocom")
        ]
        assert {(row.dataset, row.seed) for row in rows} == {(d, s) for d in SETS for s in range(3)}
        assert all(row.tocom is not None for row in rows)


def test_the_figures_that_are_told_elsewhere(results: Results):
    told = (ROOT / "benchmarks" / "RESULTS.md").read_text("utf-8")
    share = measure_gap_share(results.rows)
    assert set(share.gains) == SETS
    assert share.each_gains
    assert f"| {share.share:.2f}; Caltech-101 {share.gains['caltech101']:+.2f}" in told
    gains = [sum(measure_gains(results.rows, *pair).values()) for pair in ((0, 12), (16, 0))]
    assert "{:+.2f} and {:+.2f} points".format(*gains) in told
