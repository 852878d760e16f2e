"""Texts that the role loops might have recorded: 12 passes of 100 ms each, that read `ROWS` rows.

`pearl` misses in its fifth pass and its sixth has the root alone; `tree` misses at the same token, has a branch ready
and goes on as before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pearl.machine.timeline import Trace, merge

PASS_S, DRAFT_S, PROMPT = 0.1, 0.03, 40
ROWS = {"pearl": [4, 4, 4, 4, 4, 1, 4, 4, 4, 4, 4, 4], "tree": [4] * 12, "ar": [1] * 12}
MISS = 4  # the pass


def live(target: Trace, drafter: Trace, mode: str, sequence: int, at: float, passes: int = 12, skip: int = 0) -> float:
    """One text, as the role loops record it; `skip`: tokens of a longer prompt. Returns when it ended."""
    target.instant("sequence", at, sequence=sequence, mode=mode)
    target.span("prefill", at, at + PASS_S, sequence=sequence, position=PROMPT + skip - 1, rows=1)
    at, position = at + PASS_S, PROMPT + skip
    for which, rows in enumerate(ROWS[mode][:passes]):
        message, ended, missed = 100 * sequence + which, at + 0.98 * PASS_S, mode != "ar" and which == MISS
        facts = dict(position=position, rows=rows, offered=rows - 1, committed=(rows + 1) // 2)
        facts["origins"] = ["draft"] * (facts["committed"] - 1) + ["recycled" if mode == "tree" and missed else ""]
        hit = mode == "tree" or not missed
        target.span("verify", at, ended, sequence=sequence, hit=hit, **facts)
        position += facts["committed"]
        if mode != "ar":
            facts = {"sequence": sequence, "position": position, "prepared": hit and missed}
            target.instant("hit" if hit else "miss", ended, **facts)
            target.flow("verdict", message, ended, sent=True)
            for n in range(3):
                began = at + n * DRAFT_S
                drafter.span("draft", began, began + DRAFT_S, sequence=sequence, rows=3 if mode == "tree" else 1)
            drafter.span("wait", at + 3 * DRAFT_S, ended + 0.001)
            drafter.flow("verdict", message, ended + 0.001, sent=False)
        at += PASS_S
    return at


def lived(path: Path, *texts: str | tuple[Any, ...], began: float = 5000.0) -> Path:
    """A trace of such texts one after the other: modes, or tuples of what `live` takes after its `at`."""
    target, drafter, at = Trace("target"), Trace("drafter"), began
    for sequence, text in enumerate(texts, start=1):
        mode, *more = (text,) if isinstance(text, str) else text
        at = live(target, drafter, mode, sequence, at, *more) + 0.05
    target.write(path)
    drafter.write(path)
    merge(path)
    return path
