"""Pictures of runs, as PNG: speed-ups with their intervals, acceptance by depth, latencies, a timeline."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from pearl.errors import UsageError
from pearl.evaluation.report import Run
from pearl.evaluation.trace import frame, panels, read
from pearl.evaluation.trace_picture import draw

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#999999")
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


def _bars(runs: Sequence[Run], modes: Sequence[str], key: str, interval_key: str, label: str) -> bytes | None:
    if not any(run.modes.get(mode, {}).get(key) for run in runs for mode in modes):
        return None
    figure, axes = _axes(max(6.0, 1.5 + 0.35 * len(modes) * len(runs)), 3.8)
    width = 0.8 / len(modes)
    for place, mode in enumerate(modes):
        for at, run in enumerate(runs):
            figures = run.modes.get(mode, {})
            if (value := figures.get(key)) is None:
                continue
            axes.bar(
                at + (place - (len(modes) - 1) / 2) * width,
                value,
                0.9 * width,
                color=colour(place),
                yerr=spread([value], [figures.get(interval_key)]),
                capsize=2,
                label=mode if mode not in axes.get_legend_handles_labels()[1] else None,
            )
    axes.axhline(1.0, color="#333333", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(runs)), [run.name for run in runs], rotation=20 if len(runs) > 3 else 0)
    axes.set_ylabel(label)
    figure.legend(ncols=4, fontsize=8, frameon=False, loc="outside upper center")  # over no bar
    return png_of(figure)


def spread(values: Sequence[float], intervals: Sequence[Sequence[float] | None]) -> list[list[float]] | None:
    """How far intervals reach below and above their values, as matplotlib takes it. None where there are none: a line
    without length would say that nothing is uncertain."""
    if not any(intervals):
        return None
    low = [max(0.0, value - one[0]) if one else 0.0 for value, one in zip(values, intervals, strict=True)]
    high = [max(0.0, one[1] - value) if one else 0.0 for value, one in zip(values, intervals, strict=True)]
    return [low, high]


def depth(runs: Sequence[Run]) -> bytes | None:
    """Lines: of the guesses at each depth whose parents were accepted, the share that was."""
    curves = {
        f"{run.name}, {mode}": figures["acceptance_by_depth"]
        for run in runs
        for mode, figures in run.modes.items()
        if figures.get("acceptance_by_depth")
    }
    if not curves:
        return None
    figure, axes = _axes(7.0, 3.8)
    for place, (name, shares) in enumerate(curves.items()):
        axes.plot(range(1, len(shares) + 1), shares, marker="o", markersize=3, color=colour(place), label=name)
    axes.set_xlabel("depth below the root")
    axes.set_ylabel("accepted")
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=8, frameon=False)
    return png_of(figure)


def latency(runs: Sequence[Run]) -> bytes | None:
    """Lines: the share of tokens that took at most so long, each pass spread evenly over the tokens it committed."""
    curves = {}
    for run in runs:
        for mode, texts in run.texts.items():
            passes = [p for text in texts.values() for p in text.passes[1:] if p.committed]
            times = [1e3 * p.seconds / p.committed for p in passes for _ in range(p.committed)]
            curves[f"{run.name}, {mode}"] = sorted(times)
    curves = {name: times for name, times in curves.items() if times}
    if not curves:
        return None
    figure, axes = _axes(7.0, 3.8)
    for place, (name, times) in enumerate(curves.items()):
        shares = [(i + 1) / len(times) for i in range(len(times))]
        axes.step(times, shares, where="post", color=colour(place), label=name)
    axes.set_xscale("log")
    axes.set_xlabel("ms a token, after the first")
    axes.set_ylabel("share of tokens")
    axes.legend(fontsize=8, frameon=False)
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


def colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def png_of(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=130)
    return data.getvalue()
