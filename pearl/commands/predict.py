"""`pearl predict`: the speed-up to expect of every mode, by replaying a recorded run, or from numbers by hand."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pearl.config import cli, outputs
from pearl.errors import UsageError
from pearl.evaluation import results

_BY_HAND = ("tokens", "row_cost", "beside", "beside_cost", "beside_depths")


def parser() -> cli.Parser:
    made = cli.Parser("predict", "results/RUN", "--a 0.8 --c 3 --modes sd:4 pearl tree")
    add = made.add_argument
    add("run", nargs="?", metavar="RUN_FOLDER", help="what an evaluation has written")
    add("--mode", help="of the run: whose guesses to replay (default: the one with most of them)")
    add("--modes", nargs="+", metavar="MODE", help="to predict; default: the run's own and the usual ones")
    add("--a", type=float, help="by hand: the acceptance")
    add("--c", type=float, help="by hand: the time of a pass over that of a drafter forward")
    add("--latency", type=float, help="of a message; of a run in seconds (default: 0.0003), by hand in passes (0)")
    add("--tokens", type=int, help="by hand: of the text (default: 2000)")
    add("--row-cost", type=float, help="by hand: of each further row, as part of a forward (default: 0)")
    add("--beside", type=float, help="by hand: the acceptance of a source beside the target (default: there is none)")
    add("--beside-cost", type=float, help="by hand: its forward, as part of a pass (default: 0, it answers at once)")
    add("--beside-depths", type=int, help="by hand: tokens that a forward of it guesses (default: 1)")
    add("--seed", type=int, default=0, help="of what a run does not say")
    add("--json", metavar="FILE", type=outputs.file, help="write the figures there too")
    return made


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = parser().parse_args(argv)
    by_numbers = found.a is not None or found.c is not None
    if bool(found.run) == by_numbers:
        raise UsageError("Name the folder of a run, or give both --a and --c.")
    if by_numbers and (found.a is None or found.c is None):
        raise UsageError("Give both --a and --c: how often a guess is right, and drafter forwards per pass.")

    unused = [name for name in (_BY_HAND if found.run else ("mode",)) if getattr(found, name) is not None]
    if unused:
        kind, other = ("numbers by hand", "a run") if found.run else ("a recorded run", "numbers by hand")
        near = ", or give --modes" if unused == ["mode"] else ""
        raise UsageError(f"--{unused[0].replace('_', '-')} is for {kind}, not for {other}: leave it out{near}.")
    if found.beside is None and (found.beside_cost is not None or found.beside_depths is not None):
        raise UsageError("--beside-cost and --beside-depths say more of a source: give its acceptance by --beside.")
    if found.run and not (Path(found.run) / results.SUMMARY).is_file():
        raise UsageError(f"{found.run} holds no finished run: name a folder with a {results.SUMMARY}.")
    from pearl.machine.display import show_table
    from pearl.predict.prediction import HEAD, MODES, cells, predict

    case = _case(found)
    ours = [mode for mode in case.measured if mode.partition(":")[0] in MODES]
    modes = found.modes or [*dict.fromkeys([*MODES, *ours])]
    figures = predict(case, modes, found.seed)
    print(f"expected of {case.source}")
    show_table(HEAD, cells(case, figures))
    for note in case.notes:
        print(note)
    if found.json:
        facts = {"source": case.source, "notes": case.notes, "measured": case.measured, "modes": figures}
        outputs.write_json(found.json, facts)
    return 0


def _case(found: argparse.Namespace) -> Any:
    from pearl.predict.prediction import by_hand
    from pearl.predict.replay import LATENCY_S, read_run

    if found.latency is not None and not 0 <= found.latency < math.inf:
        raise UsageError(f"--latency must be a number from 0, not {found.latency}.")
    if found.run:
        latency_s = LATENCY_S if found.latency is None else found.latency
        return read_run(Path(found.run), found.mode, latency_s, found.seed)
    beside = None
    if found.beside is not None:
        depths = 1 if found.beside_depths is None else found.beside_depths
        beside = (found.beside, found.beside_cost or 0.0, depths)
    tokens = 2000 if found.tokens is None else found.tokens
    return by_hand(found.a, found.c, found.latency or 0.0, tokens, found.row_cost or 0.0, found.seed, beside)
