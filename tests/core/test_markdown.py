from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tocom_export.study import paper
from tocom_export.study.markdown import GENERATED, NONE, format_page
from tocom_export.study.results import Results, Row

ROWS = (
    Row("cifar", "tome", 0, 0, 80.0, None, None, 0, images=10_000),
    Row("cifar", "tome", 0, 12, 78.0, 79.0, 79.25, 0),
    Row("cifar", "tome", 0, 16, 76.0, 77.5, 78.0, 0),
    Row("cifar", "tome", 16, 0, 79.0, 78.75, None, 0),
    Row("cars", "tome", 0, 0, 60.0, None, None, 0),
    Row("cars", "tome", 0, 16, 56.0, 57.5, 58.0, 0),
)


def cells(page: str, first: str) -> list[str]:
    """The other cells of the first table line that starts so."""
    (line, *_) = [line for line in page.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.split(" | ")[1:-1]] + [line.split(" | ")[-1].strip(" |")]


def page(rows: Sequence[Row] = ROWS) -> str:
    return format_page(Results(tuple(rows)), {})


def section(text: str, title: str) -> str:
    return text.split(f"# {title}\n")[1].split("\n#")[0]


def test_the_first_line_says_where_the_page_comes_from():
    assert page().splitlines()[0] == GENERATED
    assert "`tocom-export evaluate --out`" in GENERATED


def test_about_plots_and_notes_as_they_are():
    notes = ("First *note*.", "| a | b |\n|---|---|")
    text = format_page(
        Results(ROWS, {"model": "DeiT-T\na|b"}, notes), {"Accuracy against degree": "a/b.svg"}
    )
    assert "| model | DeiT-T a\\|b |" in text
    assert "![Accuracy against degree](a/b.svg)" in text
    assert text.endswith("## Notes\n\nFirst *note*.\n\n| a | b |\n|---|---|\n")


def test_a_page_without_rows():
    assert format_page(Results(), {}) == f"{GENERATED}\n\n# Accuracy\n"


COUNTED = "ToCom's gains on the data sets that count: "


def test_the_headline_beside_the_paper():
    text = page()
    assert section(text, "In short").strip().splitlines()[0] == "|  | Here | Paper |"
    assert cells(text, "Share of the gap closed, 0 → 16") == ["0.75", "1.17, 1.00, 0.57 by group"]
    gains = ["+1.00 (+1.00 on average)", "+0.8 on average"]
    assert cells(text, "Sum of gains, 0 → 12") == gains
    gains = ["-0.25 (-0.25 on average)", "+0.9 on average"]
    assert cells(text, "Sum of gains, 16 → 0") == gains
    assert f"{COUNTED}cifar +1.50, cars +1.50 points; each of them gains." in text
    assert "don't count" not in text


def test_the_headline_without_measurements():
    text = page(ROWS[:1])
    for line in ("Share of the gap closed, 0 → 16", "Sum of gains, 16 → 0"):
        assert cells(text, line)[0] == NONE
    assert "Data sets that don't count: cifar: 0 → 16 is not measured." in text
    assert COUNTED not in text


def test_a_loss_is_said():
    text = page([*ROWS[:2], replace(ROWS[2], tocom=75.0)])
    assert cells(text, "Share of the gap closed, 0 → 16")[0] == "-0.50"
    assert f"{COUNTED}cifar -1.00 points; not each of them gains." in text


def test_a_data_set():
    cifar = section(page(), "ToMe, cifar")
    assert "10,000 test images: the 95 % interval of one accuracy is ± 0.80 at most." in cifar
    assert cells(cifar, "0 → 0") == ["80.00", NONE, NONE, NONE, NONE]
    assert cells(cifar, "0 → 16") == ["76.00", "77.50", "+1.50", "78.00", "67.9 → 69.9 (+2.0)"]
    assert cells(cifar, "16 → 0")[2:] == ["-0.25", NONE, "70.0 → 70.9 (+0.9)"]


def test_the_average_says_where_data_sets_are_missing():
    average = section(page(), "ToMe, average of 2 data sets")
    assert cells(average, "0 → 16")[:4] == ["66.00", "67.50", "+1.50", "68.00"]
    assert cells(average, "0 → 12 (1 of 2 data sets)")[0] == "78.00"
    assert "average of" not in page(ROWS[:4])


def test_several_seeds_have_a_spread():
    text = page([*ROWS, replace(ROWS[1], seed=1, baseline=80.0, tocom=82.0)])
    assert cells(text, "0 → 12")[:4] == [
        "79.00 ± 1.41", "80.50 ± 2.12", "+1.50 ± 0.71", "79.25 ± 0.00",
    ]  # fmt: skip


def test_the_paper_s_figures_are_of_tome():
    text = page([*ROWS, *(replace(row, method="evit") for row in ROWS)])
    assert cells(section(text, "ToMe, cifar"), "0 → 16")[-1] == "67.9 → 69.9 (+2.0)"
    assert cells(section(text, "EViT, cifar"), "0 → 16")[-1] == NONE
    assert "## In short" not in page([replace(row, method="evit") for row in ROWS])


def test_ablations():
    other = [
        replace(ROWS[2], variant="shared", tocom=77.0),
        replace(ROWS[5], variant="shared", tocom=56.5),
        replace(ROWS[2], variant="a|b", tocom=76.5),
    ]
    found = section(page([*ROWS, *other]), "Ablations, ToMe")
    assert "0 → 16 on cifar; 16 → 0 on cifar." in found
    assert cells(found, "Compression alone") == ["78.00", "70.1", "76.00", "67.9", "79.00", "70.0"]
    assert cells(found, "One LoRA shared by all pairs") == [
        NONE, "70.6 (+0.5)", "77.00 (+1.00)", "69.2 (+1.3)", NONE, "70.1 (+0.1)",
    ]  # fmt: skip
    assert cells(found, "a\\|b") == [NONE, NONE, "76.50 (+0.50)", NONE, NONE, NONE]
    assert cells(found, "ToCom")[2:4] == ["77.50 (+1.50)", "69.9 (+2.0)"]
    assert [line for line in found.splitlines() if line][-1].startswith("| ToCom |")


def test_no_ablations_no_table():
    assert "Ablations" not in page()


def test_schedules():
    fast = replace(ROWS[2], target=None, reference=None, schedule="fa|st")
    text = page([*ROWS, fast])
    found = section(text, "Schedules")
    assert cells(found, "fa\\|st") == [
        "cifar", "ToMe", "ToCom", "0", "76.00", "77.50", "+1.50",
    ]  # fmt: skip
    assert text.replace(f"\n## Schedules\n{found}", "") == page()
    seeds = [
        fast,
        replace(fast, seed=1, baseline=78.0),
        replace(fast, variant="rank 1", tocom=None),
    ]
    text = page(seeds)
    assert cells(text, "fa\\|st")[4:] == ["77.00 ± 1.41", "77.50 ± 0.00", "+0.50 ± 1.41"]
    assert f"| fa\\|st | cifar | ToMe | rank 1 | 0 | 76.00 | {NONE} | {NONE} |" in text
    assert "In short" not in text
    assert "Accuracies" not in text


def test_no_schedules_no_table():
    assert "Schedules" not in page()


@pytest.mark.parametrize("index", range(3))
def test_the_paper_s_tables_agree_with_each_other(index: int):
    baseline, tocom = paper.VTAB[paper.ABLATION_PAIRS[index]]
    assert round(baseline, 1) == paper.ABLATION[""][index]
    assert round(tocom, 1) == paper.ABLATION["tocom"][index]


def test_what_needs_no_labels_has_a_table_of_its_own():
    """Its shares are of all sets together: (78 - 76 + 57 - 56) of 4 points."""
    assert "Without labels" not in page()
    rows = [
        replace(row, local=row.baseline + gain, searched=row.baseline - 1)
        if (row.source, row.target) == (0, 16)
        else row
        for row, gain in zip(ROWS, (0, 0, 2, 0, 0, 1), strict=True)
    ]
    text = section(page(rows), "Without labels")
    assert cells(text, "cifar") == ["76.00", "77.50", "78.00", "75.00", NONE, NONE, "78.00"]
    assert cells(text, "Share of the gap") == ["0", "0.75", "0.75", "-0.50", NONE, NONE, "1"]
