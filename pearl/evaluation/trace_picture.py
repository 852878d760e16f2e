"""A timeline as a picture: some passes around a miss, a panel for each mode.

    pearl trace FILE --png OUT

Draws the target's lane above the drafter's, and the messages between them. What is drawn is `trace`'s choice.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from pearl.core.trie import ORIGINS, OWN
from pearl.evaluation.trace import Event, Panel, Verify, Window
from pearl.machine.timeline import ROLES

WIDTH, LEFT, RIGHT, HEAD, LANES, FOOT = 13.0, 0.8, 0.2, 0.4, 1.8, 1.4  # inches; head and lanes are a panel's
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
BY = {"draft": "#5DBB9D", "feature": "#CC79A7", "suffix": "#F0E442", "recycled": "#8C6BB1"}
BY_OTHERS, STRIP = "#5DBB9D", 0.14  # an origin without a colour of its own; lanes that the committed tokens take
INK, PALE, BUBBLE = "#333333", "#B0B0B0", "#F5EDBE"
WAIT: dict[str, Any] = dict(facecolor="white", edgecolor=PALE, hatch="////", linewidth=0)
LEGEND = {
    "prefill": "prefill",
    "hit": "pass that ends in a hit (sd: its whole block was right)",
    "miss": "in a miss",
    "prepared": "in a hit, but of a second branch",
    "plain": "pass without a drafter",
    "draft": "forward of the drafter",
    "wait": "wait",
}
CAPTION = (
    "A bar is as high as its forward has rows. The number is how many tokens the pass commits; above, who guessed them."
)


def draw(events: Sequence[Event], shown: Sequence[Panel], window: Window) -> bytes:
    """The panels as PNG, one below the other: two lanes each, the target's above the drafter's."""
    from matplotlib.figure import Figure  # takes a second, which the roles, who only record, must not spend

    inside = {panel: [event for event in events if _visible(event, panel, window)] for panel in shown}
    spans = [event for found in inside.values() for event in found if event.phase == "X"]
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
    there = {origin for span in spans for origin in span.facts.get("origins", ())}
    origins = [origin for origin in ORIGINS if origin in there]
    _draw_legend(figure, kinds, origins, any(panel.bubbles() for panel in shown), height)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


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
            _draw_tokens(axes, began, ended, HALF_GAP + high, span.facts.get("origins", ()))
            left, right, text = max(began, window.low), min(ended, window.high), str(span.facts["committed"])
            if (right - left) * _points_per_ms(window) > 6 * len(text) + 3:
                colour = INK if kind in ("prepared", "plain") else "white"
                middle = ((left + right) / 2, HALF_GAP + high / 2)
                axes.text(*middle, text, ha="center", va="center", color=colour, fontsize=9, fontweight="bold")


def _draw_tokens(axes: Any, began: float, ended: float, floor: float, origins: Sequence[str]) -> None:
    """The tokens that a pass commits, on top of its bar: each in the colour of who guessed it, white if nobody."""
    width = (ended - began) / max(1, len(origins))
    for place, origin in enumerate(origins):
        colour = "white" if origin == OWN else BY.get(origin, BY_OTHERS)
        spot = [(began + place * width, width)], (floor, STRIP)
        axes.broken_barh(*spot, zorder=2, facecolor=colour, edgecolor=PALE, linewidth=0.5)


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


def _draw_legend(figure: Any, kinds: set[str], origins: Sequence[str], bubbles: bool, height: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    looks: dict[str, dict[str, Any]] = {**{kind: dict(facecolor=fill) for kind, fill in FILL.items()}, "wait": WAIT}
    handles: list[Any] = [Patch(label=LEGEND[kind], **looks[kind]) for kind in LEGEND if kind in kinds]
    handles += [Patch(facecolor=BY.get(origin, BY_OTHERS), label=f"by {origin}") for origin in origins]
    if bubbles:
        handles.append(Patch(facecolor=BUBBLE, label="root alone: no guess to verify"))
    if "verdict" in kinds:
        handles.append(Line2D([], [], color=INK, linewidth=1.2, marker="v", markersize=5, label="verdict"))
    centre = (LEFT + WIDTH - RIGHT) / 2 / WIDTH
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(centre, 0.28 / height),
        ncols=len(handles) if len(handles) <= 5 else -(-len(handles) // 2),  # in two lines
        frameon=False,
        fontsize=9,
        handlelength=1.4,
        columnspacing=1.6,
        labelcolor=INK,
    )
    figure.text(centre, 0.14 / height, CAPTION, ha="center", fontsize=9, color=INK)
