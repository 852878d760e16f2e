"""`pearl trace`: the passes around a miss as a picture. Viewers of Chrome traces (ui.perfetto.dev) show the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pearl.config import cli, outputs
from pearl.evaluation.trace import frame, panels, read
from pearl.evaluation.trace_picture import draw


def parser() -> cli.Parser:
    made = cli.Parser("trace", "results/RUN/trace.json --png trace.png", "trace.json --png trace.png --mode tree")
    add = made.add_argument
    add("trace", metavar="FILE", type=Path, help="what --trace has written")
    add("--png", metavar="OUT", type=outputs.file, required=True, help="where the picture goes")
    add("--mode", metavar="NAME", nargs="+", default=[], help="default: all that the trace holds")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    events = read(found.trace)
    outputs.write(found.png, draw(events, *frame(panels(events, found.mode))))
    print(f"written to {found.png}")
    return 0
