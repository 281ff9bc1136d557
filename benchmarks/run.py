"""Run benchmarks and print a Markdown table.

python benchmarks/run.py [starting] [accepting] [parity] [kinds] [running] [building]
                         [distilling] [serving] [overhead] [peers]
"""

from __future__ import annotations

import datetime
import importlib
import sys

from common import describe_machine

ALL = (
    "starting", "accepting", "parity", "kinds", "running", "building", "distilling", "serving",
    "overhead",
    "peers",
)  # fmt: skip


def main() -> None:
    """The benchmarks named on the command line; all of them without a name."""
    rows = []
    for name in sys.argv[1:] or ALL:
        rows += importlib.import_module(name).measure()
    print(f"\n{datetime.date.today()}, {describe_machine()}\n")
    print("| what | measured | bar |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
