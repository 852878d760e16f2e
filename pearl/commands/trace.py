"""`pearl trace`: a timeline as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pearl.config import cli
from pearl.errors import UsageError
from pearl.evaluation.trace import PASSES_SHOWN, frame, panels, read
from pearl.evaluation.trace_picture import draw


def parser() -> cli.Parser:
    made = cli.Parser("trace", "results/RUN/trace.json --png trace.png", "trace.json --png trace.png --mode tree")
    add = made.add_argument
    add("trace", metavar="FILE", type=Path, help="what --trace has written")
    add("--png", metavar="OUT", type=Path, required=True, help="where the picture goes")
    add("--from", dest="start_s", metavar="SECONDS", type=float, help="since the text began; default: before a miss")
    add("--seconds", metavar="N", type=float, help=f"to draw; default: {PASSES_SHOWN} passes")
    add("--sequence", metavar="N", type=int, nargs="+", default=[], help="default: the longest text of each mode")
    add("--mode", metavar="NAME", nargs="+", default=[], help="default: all that the trace holds")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    if found.start_s is not None and not 0 <= found.start_s < math.inf:
        raise UsageError(f"--from must be at least 0 seconds, not {found.start_s:g}.")
    if found.seconds is not None and not 0 < found.seconds < math.inf:
        raise UsageError(f"--seconds must be more than 0, not {found.seconds:g}.")
    events = read(found.trace)
    shown, window = frame(panels(events, found.sequence, found.mode), found.start_s, found.seconds)
    draw(events, shown, window, found.png)
    print(f"written to {found.png}")
    return 0
