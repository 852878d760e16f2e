"""`pearl report`: any set of results as one HTML page that needs no other file.

Tables, plots, the exact commands, configs and versions; and, on top, why figures should not be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pearl.config import cli, outputs
from pearl.evaluation import plots, report, tables
from pearl.evaluation.pages import others


def parser() -> cli.Parser:
    made = cli.Parser("report", "results --output report.html")
    add = made.add_argument
    add("folders", metavar="FOLDER", nargs="+", type=Path, help="results of a run, or of many below it")
    add("--title", default="pearl: results", help="of the page")
    add("--columns", default=",".join(tables.OF_A_RUN), help=f"of {', '.join(tables.COLUMNS)}")
    add("--plots", nargs="*", default=list(plots.PLOTS), help=f"of {', '.join(plots.PLOTS)}")
    add("--others", nargs="*", default=[], metavar="FILE", help="results of other engines, as JSON")
    add("--output", metavar="FILE", type=outputs.file, default="report.html", help="the page")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    columns, runs = tables.choose(found.columns), report.load(found.folders)
    real = [run for run in runs if not run.synthetic]
    pictures = plots.of(real or runs, found.plots)
    if not real:
        pictures = {f"{name} (synthetic)": png for name, png in pictures.items()}
    engines = others.load(found.others)
    beside = others.rows(engines, real) if engines else [], list(others.doubts(engines, real))
    outputs.write(found.output, report.page(found.title, runs, columns, pictures, beside))
    print(f"written to {found.output}")
    return 0
