"""`pearl table`: a table of runs, printed as Markdown. The scripts end with it.

With --output, table.md, table.csv and a PNG a plot go into that folder. Says on standard error why runs should not be
compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pearl.config import cli, outputs
from pearl.errors import UsageError
from pearl.evaluation import plots, report, tables
from pearl.evaluation.pages import sweeps

COLUMNS = ",".join(
    ("tokens_per_second", "speedup_vs_ar", "speedup_interval_95", "identical_to_ar", "tokens_per_pass")
    + ("acceptance_length", "acceptance", "score")
)


def parser() -> cli.Parser:
    made = cli.Parser(
        "table", "results/smollm2-135m --columns speedup_vs_ar,tokens_per_pass --plots speedup --output table"
    )
    add = made.add_argument
    add("folders", metavar="FOLDER", nargs="+", type=Path, help="results of a run")
    add("--title", default="Results", help="of the table")
    add("--columns", default=COLUMNS, help=f"of {', '.join(tables.COLUMNS)}")
    add("--by-category", action="store_true", help="a row a category, where a run has any")
    add("--plots", nargs="*", default=[], help=f"of {', '.join(plots.PLOTS)}")
    add("--sweep", help=f"a plot against what was varied, of {', '.join(sweeps.SWEEPS)}")
    add("--output", metavar="DIR", type=outputs.folder, help="table.md, table.csv and the plots go there")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    if (found.plots or found.sweep) and not found.output:
        raise UsageError("Say by --output which folder the plots go to.")
    sweep = sweeps.named(found.sweep) if found.sweep else None
    columns, runs = tables.choose(found.columns), report.load(found.folders)
    report.all_of_a_kind(runs)
    pictures = plots.of(runs, found.plots)
    if sweep and (picture := sweep.picture(runs)):
        pictures[found.sweep] = picture
    plots.tell_missing([*found.plots, *filter(None, [found.sweep])], pictures)
    for doubt in report.doubts(runs, sweep.option if sweep else ()):
        print(f"not comparable: {doubt}", file=sys.stderr)
    rows = report.rows(runs, found.by_category)
    labels = ("run", "category", "mode") if found.by_category else ("run", "mode")
    table = tables.markdown(*tables.cells(labels, columns, rows), labels=len(labels))
    print(f"{found.title}\n\n{table}")
    if found.output:
        outputs.write(found.output / "table.md", f"{found.title}\n\n{table}\n")
        outputs.write(found.output / "table.csv", tables.comma_separated(labels, columns, rows))
        for name, png in pictures.items():
            outputs.write(found.output / f"{name}.png", png)
        print(f"\nwritten to {found.output}")
    return 0
