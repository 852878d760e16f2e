"""Pictures of runs, as PNG: speed-ups, acceptance, energy and latencies, all with 95 % intervals, and a timeline.

Where a figure has no interval (of fewer than three problems) its mark has no whisker, and the picture says so.
"""

from __future__ import annotations

import io
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from pearl.config.cli import BASELINES
from pearl.core.schedule import MODES
from pearl.errors import UsageError
from pearl.evaluation.measures import uncertainty
from pearl.evaluation.report import Run
from pearl.evaluation.trace import frame, panels, read
from pearl.evaluation.trace_picture import draw

# Okabe and Ito's colours, which colour-blind readers can tell apart; marks beside them for what has one in common.
# A mode has the colour of its place in ORDER, which is that of docs/pictures.
COLOURS = ("#009E73", "#999999", "#56B4E9", "#0072B2", "#E69F00", "#CC79A7", "#D55E00", "#F0E442")
HATCHES = ("", "////", "....", "xxxx", "----", "oo")
LINES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (1, 4)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
ORDER = tuple(dict.fromkeys(("ar", "ar-all", "sd", "pearl", "tree", *BASELINES, *MODES)))
TRACE = "trace.json"  # in the folder of a run that was traced


def speedup(runs: Sequence[Run]) -> bytes | None:
    """Bars: the speed-up over `ar` of every mode of every run, with its 95 % interval."""
    modes = [mode for mode in dict.fromkeys(m for run in runs for m in run.modes) if mode != "ar"]
    return _bars(runs, modes, "speedup_vs_ar", "speedup_interval_95", "speed-up over ar")


def length(runs: Sequence[Run]) -> bytes | None:
    """The same of acceptance lengths."""
    modes = list(dict.fromkeys(m for run in runs for m in run.modes))
    modes = [mode for mode in modes if any(run.modes.get(mode, {}).get("acceptance_length") for run in runs)]
    return _bars(runs, modes, "acceptance_length", "acceptance_length_interval_95", "acceptance length")


def equal_devices(runs: Sequence[Run]) -> bytes | None:
    """The speed-up over `ar` on all devices together: equal hardware on both sides."""
    modes = [mode for mode in dict.fromkeys(m for run in runs for m in run.modes) if mode != "ar-all"]
    return _bars(runs, modes, "speedup_vs_ar_all", "speedup_vs_ar_all_interval_95", "speed-up over ar-all")


def energy(runs: Sequence[Run]) -> bytes | None:
    """Of the whole machine, where it tells it."""
    modes = list(dict.fromkeys(m for run in runs for m in run.modes))
    return _bars(runs, modes, "millijoules_per_token", "millijoules_per_token_interval_95", "millijoules a token", 0.0)


def _bars(
    runs: Sequence[Run], modes: Sequence[str], key: str, interval_key: str, label: str, line: float = 1.0
) -> bytes | None:
    if not any(run.modes.get(mode, {}).get(key) for run in runs for mode in modes):
        return None
    figure, axes = _axes(max(6.0, 1.5 + 0.35 * len(modes) * len(runs)), 3.8)
    width, told, places = 0.8 / len(modes), [], places_of(runs)
    for place, mode in enumerate(modes):
        for at, run in enumerate(runs):
            figures = run.modes.get(mode, {})
            if (value := figures.get(key)) is None:
                continue
            told.append(figures.get(interval_key))
            axes.bar(
                at + (place - (len(modes) - 1) / 2) * width,
                value,
                0.9 * width,
                **bar_style(places[mode]),
                yerr=spread([value], [figures.get(interval_key)]),
                capsize=2,
                label=mode if mode not in axes.get_legend_handles_labels()[1] else None,
            )
    axes.axhline(line, color="#333333", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(runs)), [run.label for run in runs], rotation=20 if len(runs) > 3 else 0)
    axes.set_ylabel(label)
    legend(figure)
    note(axes, told)
    return png_of(figure)


def spread(values: Sequence[float], intervals: Sequence[Sequence[float] | None]) -> list[list[float]] | None:
    """How far intervals reach below and above their values, as matplotlib takes it: not a number where there is none,
    as a line without length would say that nothing is uncertain. None where there are none at all."""
    if not any(intervals):
        return None
    low = [max(0.0, value - one[0]) if one else math.nan for value, one in zip(values, intervals, strict=True)]
    high = [max(0.0, one[1] - value) if one else math.nan for value, one in zip(values, intervals, strict=True)]
    return [low, high]


def note(axes: Any, intervals: Sequence[Sequence[float] | None]) -> None:
    """Says of how many of the marks in a picture nothing is known but the value."""
    if without := sum(one is None for one in intervals):
        said = f"{without} of {len(intervals)} without an interval (fewer than three problems, or none to count)"
        axes.set_title(said, fontsize=7, color="#555555", loc="right")


def depth(runs: Sequence[Run]) -> bytes | None:
    """Lines: of the guesses at each depth whose parents were accepted, the share that was."""
    curves = {
        (run.label, mode): (shares, figures.get("acceptance_by_depth_interval_95") or [None] * len(shares))
        for run in runs
        for mode, figures in run.modes.items()
        if (shares := figures.get("acceptance_by_depth"))
    }
    if not curves:
        return None
    figure, axes = _axes(7.0, 3.8)
    styles = line_styles([mode for _, mode in curves], runs)
    for ((name, mode), (shares, intervals)), style in zip(curves.items(), styles, strict=True):
        reach = spread(shares, intervals)
        axes.errorbar(range(1, len(shares) + 1), shares, yerr=reach, capsize=2, **style, label=f"{name}, {mode}")
    note(axes, [one for _, intervals in curves.values() for one in intervals])
    axes.set_xlabel("depth below the root")
    axes.set_ylabel("accepted")
    axes.set_ylim(0, 1.02)
    legend(figure)
    return png_of(figure)


def latency(runs: Sequence[Run]) -> bytes | None:
    """Lines: the share of tokens that took at most so long, each pass spread evenly over the tokens it committed; the
    band is that share's interval."""
    curves = {
        (run.label, mode): found
        for run in runs
        for mode, texts in run.texts.items()
        if (found := uncertainty.shares_by_latency(texts))
    }
    if not curves:
        return None
    figure, axes = _axes(7.0, 3.8)
    styles = line_styles([mode for _, mode in curves], runs)
    for ((name, mode), (times, shares, band)), style in zip(curves.items(), styles, strict=True):
        axes.step(times, shares, where="post", markevery=0.1, **style, label=f"{name}, {mode}")
        if band is not None:
            axes.fill_between(times, *band, step="post", color=style["color"], alpha=0.2, linewidth=0)
    note(axes, [None if band is None else (0.0, 1.0) for *_, band in curves.values()])
    axes.set_xscale("log")
    axes.set_xlabel("ms a token, after the first")
    axes.set_ylabel("share of tokens")
    legend(figure)
    return png_of(figure)


def timeline(runs: Sequence[Run]) -> bytes | None:
    """What both processes did around a miss, of the first run that was traced."""
    traced = next((run.folder / TRACE for run in runs if (run.folder / TRACE).exists()), None)
    if traced is None:
        return None
    events = read(traced)
    return draw(events, *frame(panels(events)))


PLOTS: dict[str, Callable[[Sequence[Run]], bytes | None]] = {
    "speedup": speedup,
    "length": length,
    "equal_devices": equal_devices,
    "energy": energy,
    "depth": depth,
    "latency": latency,
    "timeline": timeline,
}


def of(runs: Sequence[Run], names: Sequence[str]) -> dict[str, bytes]:
    """The PNG of each plot that these runs have the facts for. Raises UsageError for an unknown one."""
    for name in names:
        if name not in PLOTS:
            raise UsageError(f"There is no plot {name!r}: choose from {', '.join(PLOTS)}.")
    made = {name: PLOTS[name](runs) for name in names}
    return {name: png for name, png in made.items() if png}


def tell_missing(asked: Iterable[str], drawn: Collection[str]) -> None:
    """Says on standard error which pictures that were asked for there are none of."""
    for name in asked:
        if name not in drawn:
            print(f"no picture of {name}: none of these runs has what it shows", file=sys.stderr)


def panels_of(width: float, height: float, count: int) -> tuple[Any, list[Any]]:
    """A picture of so many panels, one below the other, that share what is on the x axis."""
    from matplotlib.figure import Figure  # no window, and no state of pyplot's

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    figure, (axes,) = panels_of(width, height, 1)
    return figure, axes


def legend(figure: Any) -> None:
    """All names beside the axes, where they hide nothing: the picture is so much wider, and high enough for them."""
    handles = {name: one for axes in figure.axes for one, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = figure.legend(handles.values(), handles, fontsize=8, frameon=False, loc="outside right upper")
    width, height = figure.get_size_inches()
    needed = names.get_window_extent()
    figure.set_size_inches(width + needed.width / figure.dpi, max(height, needed.height / figure.dpi + 0.2))


def places_of(runs: Sequence[Run]) -> dict[str, int]:
    """The place of each mode among all there are, then of those with a number of their own. It decides the colour: a
    mode without a number has the same one in every picture, whatever is left out there."""
    return {mode: place for place, mode in enumerate(dict.fromkeys((*ORDER, *(m for run in runs for m in run.modes))))}


def bar_style(place: int) -> dict[str, Any]:
    row, column = divmod(place, len(COLOURS))
    return {"color": COLOURS[column], "hatch": HATCHES[row % len(HATCHES)], "edgecolor": "white", "linewidth": 0}


def line_styles(modes: Sequence[str], runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Of a line for each mode; those of one colour differ in dashes and marks."""
    places, seen = places_of(runs), Counter[str]()
    for mode in modes:
        colour = COLOURS[places[mode] % len(COLOURS)]
        line, marker = LINES[seen[colour] % len(LINES)], MARKERS[seen[colour] % len(MARKERS)]
        seen[colour] += 1
        yield {"color": colour, "linestyle": line, "marker": marker, "markersize": 3, "linewidth": 1.2}


def png_of(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()
