"""`pearl table`: a table of runs, printed as Markdown, written as CSV, with plots beside it. The scripts end with it.

Writes table.md, table.csv and a PNG a plot into --output. Says on standard error why runs should not be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pearl.config import cli, outputs
from pearl.evaluation import plots, report, tables
from pearl.evaluation.pages import sweeps

COLUMNS = ",".join(
    ("tokens_per_second", "speedup_vs_ar", "speedup_interval_95", "identical_to_ar", "tokens_per_pass")
    + ("acceptance_length", "acceptance", "score")
)


def parser() -> cli.Parser:
    made = cli.Parser("table", "results/smollm2-135m --columns speedup_vs_ar,tokens_per_pass --plots speedup")
    add = made.add_argument
    add("folders", metavar="FOLDER", nargs="+", type=Path, help="results of a run")
    add("--title", default="Results", help="of the table")
    add("--columns", default=COLUMNS, help=f"of {', '.join(tables.COLUMNS)}")
    add("--by-category", action="store_true", help="a row a category, where a run has any")
    add("--plots", nargs="*", default=[], help=f"of {', '.join(plots.PLOTS)}")
    add("--sweep", help=f"a plot against what was varied, of {', '.join(sweeps.SWEEPS)}")
    add("--output", metavar="DIR", type=outputs.folder, help="default: the folder that holds the first")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    columns, runs = tables.choose(found.columns), report.load(found.folders)
    report.all_of_a_kind(runs)
    pictures = plots.of(runs, found.plots)
    if found.sweep and (picture := sweeps.draw(found.sweep, runs)):
        pictures[found.sweep] = picture
    for doubt in report.doubts(runs):
        print(f"not comparable: {doubt}", file=sys.stderr)
    rows = report.rows(runs, found.by_category)
    labels = ("run", "category", "mode") if found.by_category else ("run", "mode")
    table = tables.markdown(*tables.cells(labels, columns, rows), labels=len(labels))
    print(f"{found.title}\n\n{table}")
    output = found.output or found.folders[0].parent
    outputs.write(output / "table.md", f"{found.title}\n\n{table}\n")
    outputs.write(output / "table.csv", tables.comma_separated(labels, columns, rows))
    for name, png in pictures.items():
        outputs.write(output / f"{name}.png", png)
    print(f"\nwritten to {output}")
    return 0
