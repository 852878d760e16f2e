"""A timeline that is read back: passes and how they ended, and which of them are worth a look, around a miss.

Reads what `pearl.machine.timeline` has written. `trace_picture` draws it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pearl.config.inputs import parse_json, read_text, sound
from pearl.errors import UsageError
from pearl.machine.timeline import PHASES, ROLES

PASSES_BEFORE, PASSES_SHOWN = 3, 12  # of the default window: before the pass that misses, and in all


@dataclass(frozen=True)
class Event:
    """Of a trace that is read back. Times in ms; an instant and a message end when they begin."""

    role: str
    phase: str
    name: str
    began: float
    ended: float
    facts: dict[str, Any]  # of a message: its id


@dataclass(frozen=True)
class Verify:
    """A pass of the target, and how it ended: in a hit, in a hit of another branch than the first, or in a miss."""

    sequence: int
    began: float
    ended: float
    position: int  # of the root before it
    rows: int
    committed: int
    outcome: str  # hit, prepared (a hit, but not of the first guess) or miss
    origins: tuple[str, ...] = ()  # of each token that it commits, see pearl.core.trie

    @property
    def reached(self) -> int:
        """The position of the root after it."""
        return self.position + self.committed

    @property
    def alone(self) -> bool:
        """It read the root and no guess. In a mode that drafts this is PEARL's bubble."""
        return self.rows == 1


@dataclass(frozen=True)
class Panel:
    """One text to draw: its passes, when it was decoded, and the moment that stands at 0 in the picture. In ms."""

    mode: str
    sequence: int
    passes: tuple[Verify, ...]
    start: int  # the position of its first root, by which texts of one prompt know each other
    drafted: bool  # there was a drafter
    began: float
    ended: float
    zero: float

    @property
    def title(self) -> str:
        return f"{self.mode}, sequence {self.sequence}" if self.mode else f"sequence {self.sequence}"

    @property
    def miss(self) -> int | None:
        """The first pass that contradicted what it had read; one that a bubble follows, if there is any."""
        found = [which for which, verify in enumerate(self.passes) if verify.outcome != "hit" and not verify.alone]
        return min(found, key=lambda which: (not self.bubble_after(which), which), default=None)

    def when(self, position: int) -> float:
        """The end of the pass that brought the text to this position, or of the last one."""
        return next((verify.ended for verify in self.passes if verify.reached >= position), self.passes[-1].ended)

    def bubble_after(self, which: int) -> bool:
        return any(verify.alone for verify in self.passes[which + 1 : which + 2])

    def bubbles(self) -> list[tuple[Verify, Verify]]:
        """Runs of passes on the root alone, as the first and the last of each. None where there is no drafter."""
        runs: list[tuple[Verify, Verify]] = []
        for before, verify in zip((None, *self.passes), self.passes, strict=False):
            if verify.alone and self.drafted:
                first = runs.pop()[0] if before and before.alone else verify
                runs.append((first, verify))
        return runs


def read(path: Path) -> list[Event]:
    """The events of a trace that `merge` wrote, by time."""
    trace = parse_json(read_text(path, "The trace"), f"The trace {path}")
    with sound(f"The trace {path}", "give a file that --trace wrote"):
        return [_event(event) for event in trace["traceEvents"] if event["ph"] in PHASES]


def _event(event: dict[str, Any]) -> Event:
    began = event["ts"] / 1e3
    facts = {"id": event["id"]} if event["ph"] in "sf" else dict(event["args"])
    return Event(ROLES[event["pid"]], event["ph"], event["name"], began, began + event.get("dur", 0.0) / 1e3, facts)


def passes(events: Sequence[Event]) -> list[Verify]:
    """The target's passes. A `hit` that was `prepared` tells of the last pass of its text that began before it."""
    spans = [event for event in events if (event.role, event.phase, event.name) == ("target", "X", "verify")]
    own: dict[Any, list[int]] = {}  # by sequence: which of the spans
    for which, span in enumerate(spans):
        own.setdefault(span.facts.get("sequence"), []).append(which)
    prepared = {
        mine[max(0, bisect_right(mine, event.began, key=lambda which: spans[which].began) - 1)]
        for event in events
        if (event.role, event.phase, event.name) == ("target", "i", "hit")
        and event.facts.get("prepared")
        and (mine := own.get(event.facts.get("sequence")))
    }
    made = []
    for which, span in enumerate(spans):
        try:
            sequence, position, rows, committed, hit = (
                int(span.facts[name]) for name in ("sequence", "position", "rows", "committed", "hit")
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"A verify span of the trace lacks a fact ({error}); trace the run again.") from None
        outcome = "miss" if not hit else "prepared" if which in prepared else "hit"
        origins = tuple(map(str, span.facts.get("origins", ())))
        made.append(Verify(sequence, span.began, span.ended, position, rows, committed, outcome, origins))
    return made


def panels(events: Sequence[Event], modes: Sequence[str] = ()) -> list[Panel]:
    """The texts to draw: the longest of each mode, or of each of `modes` if any are named."""
    texts: dict[int, list[Verify]] = {}
    for verify in passes(events):
        texts.setdefault(verify.sequence, []).append(verify)
    if not texts:
        raise UsageError("The trace holds no pass of a target; trace a run that decodes a text.")
    mode = dict.fromkeys(texts, "")
    parts: dict[int, list[Event]] = {sequence: [] for sequence in texts}
    for event in events:
        if (sequence := event.facts.get("sequence")) in texts:
            parts[sequence].append(event)
            mode[sequence] = event.facts.get("mode", mode[sequence])
    there = list(dict.fromkeys(mode.values()))
    for name in modes:
        if name not in there:
            raise UsageError(f"The trace holds no mode {name}; choose from {', '.join(there)}.")

    shortest_first = sorted(texts, key=lambda n: (sum(verify.committed for verify in texts[n]), -n))
    longest = {mode[sequence]: sequence for sequence in shortest_first if not modes or mode[sequence] in modes}
    made = []
    for sequence in sorted(longest.values()):
        start = next(e.facts["position"] for e in parts[sequence] if e.role == "target" and "position" in e.facts)
        drafted = any(event.role == "drafter" for event in parts[sequence])
        began = min(event.began for event in parts[sequence])
        ended = max(event.ended for event in parts[sequence])
        some = tuple(map(_in_blocks, texts[sequence])) if mode[sequence].startswith("sd") else tuple(texts[sequence])
        made.append(Panel(mode[sequence], sequence, some, start, drafted, began, ended, zero=began))
    return made


def _in_blocks(verify: Verify) -> Verify:
    """A pass of `sd` whose whole block was accepted. Its new root is no node, as nobody guesses beyond a block there;
    but no guess was wrong."""
    whole = verify.outcome == "miss" and verify.committed == verify.rows
    return replace(verify, outcome="hit") if whole else verify


@dataclass(frozen=True)
class Window:
    """The time that is drawn: from `low` to `high` ms after each panel's zero, and what stands there."""

    low: float
    high: float
    zero: str


def frame(shown: list[Panel]) -> tuple[list[Panel], Window]:
    """The panels with their zeros where they can be compared, and the window around that.

    The lead is the first panel with a bubble, or else the first with a miss; its zero is the end of the pass that
    missed. Texts of one prompt are the same in every mode, so the others' zeros are where they reached that token;
    texts of several prompts stand at a miss each. Without a miss, zero is where each text began.
    """
    missed = [(panel, panel.miss) for panel in shown if panel.miss is not None]
    if missed:
        lead, which = next(((panel, which) for panel, which in missed if panel.bubble_after(which)), missed[0])
        zero = "ms after the miss"
        if len({panel.start for panel in shown}) == 1:
            shown = [replace(panel, zero=panel.when(lead.passes[which].reached)) for panel in shown]
            zero += f" of {lead.title}, and in the other texts after the same token" if len(shown) > 1 else ""
        else:
            shown = [replace(panel, zero=panel.passes[panel.miss or 0].ended) for panel in shown]
        lead = replace(lead, zero=lead.passes[which].ended)
        first = max(0, which - PASSES_BEFORE)
    else:
        lead, zero, first = max(shown, key=lambda panel: panel.ended - panel.began), "ms since the text began", 0
    some = lead.passes[first:][:PASSES_SHOWN]
    return shown, Window(some[0].began - lead.zero, some[-1].ended - lead.zero, zero)
