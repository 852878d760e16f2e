"""`pearl report`: any set of results as one HTML page that needs no other file.

Tables, plots, the exact commands, configs and versions; and, on top, why figures should not be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pearl.config import cli, outputs
from pearl.evaluation import plots, report, tables


def parser() -> cli.Parser:
    made = cli.Parser("report", "results --output report.html")
    add = made.add_argument
    add("folders", metavar="FOLDER", nargs="+", type=Path, help="results of a run, or of many below it")
    add("--title", default="pearl: results", help="of the page")
    add("--columns", default=",".join(tables.OF_A_RUN), help=f"of {', '.join(tables.COLUMNS)}")
    add("--plots", nargs="*", default=list(plots.PLOTS), help=f"of {', '.join(plots.PLOTS)}")
    add("--output", metavar="FILE", type=outputs.file, default="report.html", help="the page")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    columns, runs = tables.choose(found.columns), report.load(found.folders)
    pictures = plots.of(runs, found.plots)
    outputs.write(found.output, report.page(found.title, runs, columns, pictures))
    print(f"written to {found.output}")
    return 0
