"""A timeline as a picture: some passes around a miss, a panel for each mode.

    pearl trace FILE --png OUT

Reads what `pearl.core.timeline` has written; draws the target's lane above the drafter's, and the messages between
them.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pearl.core.timeline import PHASES, ROLES
from pearl.errors import UsageError

PASSES_BEFORE, PASSES_SHOWN = 3, 12  # of the default window: before the pass that misses, and in all
WIDTH, LEFT, RIGHT, HEAD, LANES, FOOT = 13.0, 0.8, 0.2, 0.4, 1.8, 1.2  # inches; head and lanes are a panel's
# Heights in lanes. The target's bars grow up from the gap between the lanes, the drafter's down; messages cross it.
HALF_GAP, THIN, HEADROOM = 0.2, 0.4, 0.3
# Okabe and Ito's colours (the green is paler), which colour-blind readers can tell apart
FILL = {
    "prefill": "#999999",
    "hit": "#0072B2",
    "prepared": "#E69F00",
    "miss": "#D55E00",
    "plain": "#56B4E9",
    "draft": "#5DBB9D",
}
INK, PALE, BUBBLE = "#333333", "#B0B0B0", "#F5EDBE"
WAIT: dict[str, Any] = dict(facecolor="white", edgecolor=PALE, hatch="////", linewidth=0)
LEGEND = {
    "prefill": "prefill",
    "hit": "pass that ends in a hit",
    "miss": "in a miss",
    "prepared": "in a hit, but of a second branch",
    "plain": "pass without a drafter",
    "draft": "draft",
    "wait": "wait",
}
CAPTION = "A bar is as high as its forward has rows. The number is how many tokens the pass commits."


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
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"The trace {path} can't be read: {error.strerror}; give a file that --trace wrote.") from None
    try:
        return [_event(event) for event in json.loads(text)["traceEvents"] if event["ph"] in PHASES]
    except json.JSONDecodeError:
        raise UsageError(f"{path} is not JSON; give a file that --trace wrote.") from None
    except (KeyError, TypeError, IndexError, ValueError):
        raise UsageError(f"{path} is not a trace of pearl; give a file that --trace wrote.") from None


def _event(event: dict[str, Any]) -> Event:
    began = event["ts"] / 1e3
    facts = {"id": event["id"]} if event["ph"] in "sf" else dict(event["args"])
    return Event(ROLES[event["pid"]], event["ph"], event["name"], began, began + event.get("dur", 0.0) / 1e3, facts)


def passes(events: Sequence[Event]) -> list[Verify]:
    """The target's passes. A `hit` that was `prepared` tells of the last pass that began before it."""
    spans = [event for event in events if (event.role, event.phase, event.name) == ("target", "X", "verify")]
    begins = [span.began for span in spans]
    prepared = {
        bisect_right(begins, event.began) - 1
        for event in events
        if (event.role, event.phase, event.name) == ("target", "i", "hit") and event.facts.get("prepared")
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
        made.append(Verify(sequence, span.began, span.ended, position, rows, committed, outcome))
    return made


def panels(events: Sequence[Event], sequences: Sequence[int] = (), modes: Sequence[str] = ()) -> list[Panel]:
    """The texts to draw, those of `modes` if any are named: `sequences`, or else the longest text of each mode."""
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
    _refuse_absent("sequence", sequences, texts)
    _refuse_absent("mode", modes, mode.values())

    chosen = [sequence for sequence in texts if not modes or mode[sequence] in modes]
    if sequences:
        chosen = [sequence for sequence in chosen if sequence in sequences]
    else:
        shortest_first = sorted(chosen, key=lambda n: (sum(verify.committed for verify in texts[n]), -n))
        longest = {mode[sequence]: sequence for sequence in shortest_first}
        chosen = [sequence for sequence in chosen if longest[mode[sequence]] == sequence]
    if not chosen:
        raise UsageError("No sequence that --sequence names is of a mode that --mode names; leave one of them out.")
    made = []
    for sequence in chosen:
        start = next(e.facts["position"] for e in parts[sequence] if e.role == "target" and "position" in e.facts)
        drafted = any(event.role == "drafter" for event in parts[sequence])
        began = min(event.began for event in parts[sequence])
        ended = max(event.ended for event in parts[sequence])
        made.append(Panel(mode[sequence], sequence, tuple(texts[sequence]), start, drafted, began, ended, zero=began))
    return made


def _refuse_absent(what: str, asked: Iterable[Any], there: Iterable[Any]) -> None:
    there = list(dict.fromkeys(there))
    for thing in asked:
        if thing not in there:
            raise UsageError(f"The trace holds no {what} {thing}; choose from {', '.join(map(str, there))}.")


@dataclass(frozen=True)
class Window:
    """The time that is drawn: from `low` to `high` ms after each panel's zero, and what stands there."""

    low: float
    high: float
    zero: str


def frame(shown: list[Panel], start_s: float | None = None, seconds: float | None = None) -> tuple[list[Panel], Window]:
    """The panels with their zeros where they can be compared, and the window around that.

    The lead is the first panel with a bubble, or else the first with a miss; its zero is the end of the pass that
    missed. Texts of one prompt are the same in every mode, so the others' zeros are where they reached that token;
    texts of several prompts stand at a miss each. Given `start_s`, or without a miss, zero is where each text began.
    """
    missed = [(panel, panel.miss) for panel in shown if panel.miss is not None]
    if missed and start_s is None:
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
        lead, zero = max(shown, key=lambda panel: panel.ended - panel.began), "ms since the text began"
        began = lead.began + 1e3 * (start_s or 0.0)
        first = next((which for which, verify in enumerate(lead.passes) if verify.ended > began), -1)
    low = lead.passes[first].began - lead.zero if start_s is None else 1e3 * start_s
    last = lead.passes[first:][:PASSES_SHOWN][-1]
    return shown, Window(low, last.ended - lead.zero if seconds is None else low + 1e3 * seconds, zero)


def draw(events: Sequence[Event], shown: Sequence[Panel], window: Window, png: Path) -> None:
    """A picture of the panels, one below the other: two lanes each, the target's above the drafter's."""
    from matplotlib.figure import Figure  # takes a second, which the roles, who only record, must not spend

    inside = {panel: [event for event in events if _visible(event, panel, window)] for panel in shown}
    spans = [event for found in inside.values() for event in found if event.phase == "X"]
    if not spans:
        lasts = max(panel.ended - panel.began for panel in shown) / 1e3
        raise UsageError(f"Nothing happens in this window; the longest text to draw lasts {lasts:.3g} s.")
    most = {role: max((_rows(span) for span in spans if span.role == role), default=1) for role in ROLES}

    height = len(shown) * (HEAD + LANES) + FOOT
    figure = Figure((WIDTH, height), dpi=150)
    for place, (panel, found) in enumerate(inside.items(), start=1):
        floor = height - place * (HEAD + LANES)
        axes = figure.add_axes((LEFT / WIDTH, floor / height, (WIDTH - LEFT - RIGHT) / WIDTH, LANES / height))
        _draw_lanes(axes, panel, window)
        _draw_bubbles(axes, panel, window)
        _draw_spans(axes, panel, window, [event for event in found if event.phase == "X"], most)
        _draw_verdicts(axes, panel, found, events)
        axes.tick_params(labelbottom=place == len(shown))
    axes.set_xlabel(window.zero, color=INK)
    kinds = {_kind(event, panel) for panel, found in inside.items() for event in found}
    _draw_legend(figure, kinds, any(panel.bubbles() for panel in shown), height)
    try:
        figure.savefig(png, format="png")
    except OSError as error:
        raise UsageError(f"The picture can't be written to {png}: {error.strerror}.") from None


def _visible(event: Event, panel: Panel, window: Window) -> bool:
    """Whether it falls into the window and into the text; the window may reach into the next text."""
    began, ended = max(panel.began, panel.zero + window.low), min(panel.ended, panel.zero + window.high)
    return event.began < ended and event.ended > began


def _rows(span: Event) -> int:
    """Of a forward over guesses; a prefill reads a whole prompt, beside which all others would be flat."""
    return span.facts.get("rows", 1) if span.name in ("verify", "draft") else 1


def _last_pass(panel: Panel, at: float) -> Verify:
    """The last one that began by then, or else the first."""
    return panel.passes[max(0, bisect_right([verify.began for verify in panel.passes], at) - 1)]


def _kind(event: Event, panel: Panel) -> str:
    """Its name, and of a pass how it ended."""
    if (event.role, event.phase, event.name) != ("target", "X", "verify"):
        return event.name
    return _last_pass(panel, event.began).outcome if panel.drafted else "plain"


def _draw_lanes(axes: Any, panel: Panel, window: Window) -> None:
    done = [verify for verify in panel.passes if window.low < verify.ended - panel.zero <= window.high]
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", color=INK)
    tokens = sum(verify.committed for verify in done)
    axes.set_title(f"{tokens} tokens in {len(done)} passes", loc="right", fontsize=10, color=INK)
    axes.set_xlim(window.low, window.high)
    axes.set_ylim(-HALF_GAP - 1, HALF_GAP + 1 + HEADROOM)
    axes.set_yticks([HALF_GAP + 0.5, -HALF_GAP - 0.5], ROLES, color=INK, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALE)


def _draw_spans(axes: Any, panel: Panel, window: Window, spans: Sequence[Event], most: dict[str, int]) -> None:
    for span in spans:
        kind, up = _kind(span, panel), 1 if span.role == "target" else -1
        if kind not in LEGEND:
            continue
        share = (_rows(span) - 1) / (most[span.role] - 1) if most[span.role] > 1 else 0.0
        high = 1.0 if kind == "prefill" else THIN + (1 - THIN) * share
        began, ended = span.began - panel.zero, span.ended - panel.zero
        look = WAIT if kind == "wait" else dict(facecolor=FILL[kind], edgecolor="white", linewidth=0.6)
        axes.broken_barh([(began, ended - began)], (up * HALF_GAP, up * high), zorder=2, **look)
        if span.name == "verify":
            left, right, text = max(began, window.low), min(ended, window.high), str(span.facts["committed"])
            if (right - left) * _points_per_ms(window) > 6 * len(text) + 3:
                colour = INK if kind in ("prepared", "plain") else "white"
                middle = ((left + right) / 2, HALF_GAP + high / 2)
                axes.text(*middle, text, ha="center", va="center", color=colour, fontsize=9, fontweight="bold")


def _draw_bubbles(axes: Any, panel: Panel, window: Window) -> None:
    for first, last in panel.bubbles():
        left, right = max(first.began - panel.zero, window.low), min(last.ended - panel.zero, window.high)
        if left < right:
            axes.axvspan(left, right, color=BUBBLE, linewidth=0, zorder=0)
        if (right - left) * _points_per_ms(window) > 56:
            where = ((left + right) / 2, HALF_GAP + 1.08)
            axes.text(*where, "root alone", ha="center", va="bottom", color=INK, fontsize=9)


def _draw_verdicts(axes: Any, panel: Panel, found: Sequence[Event], events: Sequence[Event]) -> None:
    """From where the target sent it to where the drafter took it: late, where the drafter was in a forward."""
    arrived = {event.facts["id"]: event.began for event in events if (event.phase, event.name) == ("f", "verdict")}
    for event in found:
        if (event.phase, event.name) == ("s", "verdict") and event.facts["id"] in arrived:
            times = [event.began - panel.zero, arrived[event.facts["id"]] - panel.zero]
            colour = FILL[_last_pass(panel, event.began).outcome]
            axes.plot(times, [HALF_GAP, -HALF_GAP], color=colour, linewidth=1.2, zorder=3)
            axes.plot(times[1:], [-HALF_GAP + 0.06], color=colour, marker="v", markersize=5, zorder=3)


def _points_per_ms(window: Window) -> float:
    return 72 * (WIDTH - LEFT - RIGHT) / (window.high - window.low)


def _draw_legend(figure: Any, kinds: set[str], bubbles: bool, height: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    looks: dict[str, dict[str, Any]] = {**{kind: dict(facecolor=fill) for kind, fill in FILL.items()}, "wait": WAIT}
    handles: list[Any] = [Patch(label=LEGEND[kind], **looks[kind]) for kind in LEGEND if kind in kinds]
    if bubbles:
        handles.append(Patch(facecolor=BUBBLE, label="root alone: no guess to verify"))
    if "verdict" in kinds:
        handles.append(Line2D([], [], color=INK, linewidth=1.2, marker="v", markersize=5, label="verdict"))
    centre = (LEFT + WIDTH - RIGHT) / 2 / WIDTH
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(centre, 0.28 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        handlelength=1.4,
        columnspacing=1.6,
        labelcolor=INK,
    )
    figure.text(centre, 0.14 / height, CAPTION, ha="center", fontsize=9, color=INK)
