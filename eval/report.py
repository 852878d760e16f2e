"""Any set of results as one HTML page that needs no other file.

    python eval/report.py results --output report.html

Tables, plots, the exact commands, configs and versions; and, on top, why figures should not be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.config import cli
from pearl.evaluation import plots, report, tables


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(description="Results as one HTML page.", allow_abbrev=False)
    add = parser.add_argument
    add("folders", metavar="FOLDER", nargs="+", type=Path, help="results of a run, or of many below it")
    add("--title", default="pearl: results")
    add("--columns", default=",".join(tables.OF_A_RUN), help=f"of {', '.join(tables.COLUMNS)}")
    add("--plots", nargs="*", default=list(plots.PLOTS), help=f"of {', '.join(plots.PLOTS)}")
    add("--output", metavar="FILE", type=Path, default=Path("report.html"))
    found = parser.parse_args(argv)
    columns, runs = tables.choose(found.columns), report.load(found.folders)
    pictures = plots.of(runs, found.plots)
    found.output.parent.mkdir(parents=True, exist_ok=True)
    found.output.write_text(report.page(found.title, runs, columns, pictures), encoding="utf-8")
    print(f"written to {found.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
