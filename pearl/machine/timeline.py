"""The timeline of a run, as it is recorded: what both processes did when, on one clock.

Knows: spans, instants and messages of two roles, and that `time.perf_counter` is one clock for all processes of a
machine (CLOCK_MONOTONIC on Linux); a drafter on another one is told how far the target's is ahead. Refuses to know:
tries, models and channels; a name with facts is all that it is told. The roles only record, each into a list of its
own, and write between texts, where nobody waits for them.

    FILE.target, FILE.drafter     each role's part, rewritten after each text; a Chrome trace by itself
    FILE.drafter.1, ...           those of a drafter that was started anew, or connected again
    FILE                          both, joined at the end of the run: open it in ui.perfetto.dev or chrome://tracing
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pearl.errors import UsageError
from pearl.machine.files import atomic_write

ROLES = ("target", "drafter")  # the place of a role is its rank, and its pid in the trace
PHASES = "fXis"  # arrival, span, instant, departure: in which order they stand where they happen at once


class Trace:
    """One role's timeline. Times are seconds of `time.perf_counter`; facts are whatever JSON can hold."""

    def __init__(
        self, role: str, path: Path | None = None, ahead_s: Callable[[], float] = lambda: 0.0, connection: int = 0
    ):
        """`path`: of the run's trace, for `save`. `ahead_s`: seconds that are added to all times of a part when it is
        written. `connection`: of a drafter's, each of which has a part of its own."""
        assert role in ROLES, f"a role is one of {ROLES}"
        self._role, self._path, self._ahead_s, self.connection = role, path, ahead_s, connection
        self._events: list[dict[str, Any]] = []  # since the last `write`
        self._lines: list[str] = []  # those before, as they stand in the file

    def span(self, name: str, began: float, ended: float, **facts: Any) -> None:
        """Something that took its time."""
        self._add("X", name, began, dur=(ended - began) * 1e6, args=facts)

    def instant(self, name: str, at: float, **facts: Any) -> None:
        """Something that took none."""
        self._add("i", name, at, s="t", args=facts)

    def flow(self, name: str, id: int, at: float, sent: bool) -> None:
        """A message leaves this role, or arrives. Both ends give it the same `id`, which no other of its name has.

        A viewer ties the departure to the span around it, and the arrival to the next span, the first that can use it.
        """
        self._add("s" if sent else "f", name, at, id=id)

    def save(self) -> None:
        """Writes this role's part; called between texts."""
        if self._path:
            self.write(self._path)

    def write(self, path: Path) -> None:
        """This role's part of `path`, all there is so far. A reader finds the old one or the new one, never a half."""
        ahead = self._ahead_s() * 1e6
        self._lines += [json.dumps(event | {"ts": event["ts"] + ahead}, allow_nan=False) for event in self._events]
        self._events.clear()
        with atomic_write(_part(path, self._role, self.connection)) as partial:
            partial.write_text("[" + ",\n".join(self._lines) + "]", encoding="utf-8")

    def _add(self, phase: str, name: str, at: float, **more: Any) -> None:
        rank = ROLES.index(self._role)
        self._events.append({"ph": phase, "name": name, "cat": "pearl", "ts": at * 1e6, "pid": rank, "tid": 0, **more})


class _Off(Trace):
    """Of a run that is not traced."""

    def span(self, name: str, began: float, ended: float, **facts: Any) -> None: ...

    def instant(self, name: str, at: float, **facts: Any) -> None: ...

    def flow(self, name: str, id: int, at: float, sent: bool) -> None: ...

    def write(self, path: Path) -> None: ...


OFF = _Off("target")


def flow_id(sequence: int, number: int, connection: int = 0) -> int:
    """A number for one message of a run. `number`: of it, as the drafter of that connection counts."""
    return connection << 60 | sequence << 20 | number


def prepare(path: Path) -> None:
    """Refuses a path that can't become a trace, and removes the parts that a run which broke off has left there. Its
    folder is made: it may be that of a run which is about to begin."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"The trace can't be written to {path} ({error.strerror}): name another file.") from None
    if path.is_dir():
        raise UsageError(f"The trace can't be written to {path}, which is a folder: name a file.")
    for _, part in _parts(path):
        part.unlink(missing_ok=True)


def merge(path: Path) -> None:
    """Joins the parts into one trace, whose time 0 is the earliest event, and removes them.

    The drafter's part may be absent: `ar` has no drafter. Without the target's no text was written, and there is no
    trace. Raises `UsageError` where a part is damaged, and keeps both.
    """
    parts = _parts(path)
    if "target" not in dict(parts):
        for _, part in parts:
            part.unlink()
        return
    events = sorted((event for _, part in parts for event in _read_part(part)), key=_when)
    zero = events[0]["ts"] if events else 0.0
    messages: dict[tuple[str, int], int] = {}
    for event in events:
        event["ts"] = round(event["ts"] - zero, 3)
        if "dur" in event:
            event["dur"] = round(event["dur"], 3)
        if "id" in event:  # chrome://tracing, unlike Perfetto, asks for numbers that no two names share
            event["id"] = messages.setdefault((event["name"], event["id"]), len(messages))
    names = []
    for role in dict(parts):
        rank = ROLES.index(role)
        for name, fact in (("process_name", role), ("process_sort_index", rank), ("thread_name", f"{role}'s loop")):
            args = {"sort_index" if name == "process_sort_index" else "name": fact}
            names.append({"ph": "M", "name": name, "pid": rank, "tid": 0, "args": args})
    other = {"clock": "time.perf_counter", "zero_s": zero / 1e6}
    with atomic_write(path) as partial:
        made = {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": other}
        partial.write_text(json.dumps(made), encoding="utf-8")
    for _, part in parts:
        part.unlink()


def _part(path: Path, role: str, connection: int = 0) -> Path:
    return path.with_name(f"{path.name}.{role}{f'.{connection}' if connection else ''}")


def _parts(path: Path) -> list[tuple[str, Path]]:
    """Those that are there, each with its role: the target's first."""
    there = [(role, _part(path, role)) for role in ROLES]
    more = path.parent.glob(f"{glob.escape(path.name)}.drafter.*")
    there += [("drafter", part) for part in sorted(more) if part.suffix[1:].isdigit()]
    return [(role, part) for role, part in there if part.exists()]


def _when(event: dict[str, Any]) -> tuple[float, int, float]:
    """Where an event stands in a trace: by time, and of two spans that begin at once the longer first."""
    return event["ts"], PHASES.index(event["ph"]), -event.get("dur", 0.0)


def _read_part(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UsageError(f"{path}, a part of a trace, is damaged; remove it and trace the run again.") from None
