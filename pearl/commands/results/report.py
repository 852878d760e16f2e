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
    add("--plots", nargs="*", help=f"of {', '.join(plots.PLOTS)}; default: all there are facts for")
    add("--others", nargs="*", default=[], metavar="FILE", help="results of other engines, as JSON")
    add("--output", metavar="FILE", type=outputs.file, default="report.html", help="the page")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    columns, runs = tables.choose(found.columns), report.load(found.folders)
    kinds = report.by_kind(runs)
    asked = list(plots.PLOTS) if found.plots is None else found.plots
    drawn: set[str] = set()
    pictures: dict[str, bytes] = {}
    for kind, some in kinds.items():
        of_kind = f" ({', '.join(kind)})" if kind else ""
        made = plots.of(some, asked)
        pictures |= {f"{name}{of_kind}": png for name, png in made.items()}
        drawn |= set(made)
    plots.tell_missing(found.plots or (), drawn)
    engines, real = others.load(found.others), [some for kind, some in kinds.items() if "synthetic" not in kind]
    ours = real[0] if real else []  # plain ones, or warm ones that say so
    beside = others.rows(engines, ours) if engines else [], list(others.doubts(engines, ours))
    outputs.write(found.output, report.page(found.title, runs, columns, pictures, beside))
    print(f"written to {found.output}")
    return 0
