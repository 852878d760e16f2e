"""A figure of every mode against what a sweep varies, with its 95 % intervals.

input_length    prompt tokens          categories of one run
draft_length    guesses a block        modes of one run (sd:1, sd:2, ...); what finds its length itself: a level
temperature     temperature            a run each
concurrency     texts side by side     a run each: tokens a second of all against time per token of each

A curve is of one mode and one pair; runs that are not plain say what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pearl.core.schedule import MODES, Schedule
from pearl.errors import UsageError
from pearl.evaluation import tables
from pearl.evaluation.plots import legend, line_styles, note, panels_of, png_of, spread
from pearl.evaluation.report import Run


class Label(NamedTuple):
    """Of a curve."""

    name: str  # the mode, with the pair where there are several
    mode: str  # whose colour it has


Point = tuple[float, tables.Figures]
Curves = dict[Label, list[Point]]  # each in order


def models(run: Run) -> tuple[str, ...]:
    """Its target and its draft."""
    return tuple(str(run.resolved.get(name)) for name in ("target", "draft"))


def short_name(pair: Sequence[str]) -> str:
    return " <- ".join(Path(name).name for name in pair)


def labels(runs: Sequence[Run]) -> Callable[..., Label]:
    """What the curve of a mode of a run is called; with `how` where the mode has several."""
    pairs = {models(run) for run in runs}
    short = {one: short_name(one) for one in pairs}
    if len(set(short.values())) < len(pairs):
        short = {one: " <- ".join(one) for one in pairs}

    tasks = {_task(run) for run in runs}

    def label(run: Run, mode: str, how: str = "") -> Label:
        kind = f" ({', '.join(run.kind)})" if run.kind else ""
        kind += f", {_task(run)}" if len(tasks) > 1 else ""
        return Label(f"{short[models(run)]}, {mode}{how}{kind}" if len(pairs) > 1 else f"{mode}{how}{kind}", mode)

    return label


def _task(run: Run) -> str:
    return " ".join(str(told) for name in ("suite", "prompt_format") if (told := run.config.get(name)))


def by_category(runs: Sequence[Run]) -> Curves:
    """Of categories that are numbers."""
    curves: Curves = {}
    label = labels(runs)
    for run in runs:
        for mode, figures in run.modes.items():
            for category, some in (figures.get("by_category") or {}).items():
                if category.isdecimal():
                    curves.setdefault(label(run, mode), []).append((float(category), some))
    return _sorted(curves)


def by_gamma(runs: Sequence[Run]) -> Curves:
    """Of modes with a block length in their name; one that finds its own is the same at all of them. What drafts
    nothing, or not in our blocks, has no place here."""
    lengths = sorted({length for run in runs for mode in run.modes if (length := block(mode)) is not None})
    curves: Curves = {}
    label = labels(runs)
    for run in runs:
        for mode, figures in run.modes.items():
            plain, length = mode.partition(":")[0], block(mode)
            if length is not None:
                curves.setdefault(label(run, plain), []).append((length, figures))
            elif plain in MODES and Schedule.of(plain).drafts:
                curves[label(run, mode, ", auto")] = [(length, figures) for length in lengths]
    return _sorted(curves)


def block(mode: str) -> float | None:
    """The block length in its name; behind `tree:` stands another number."""
    plain, _, number = mode.partition(":")
    return float(number) if number.isdecimal() and plain != "tree" else None


def by_temperature(runs: Sequence[Run]) -> Curves:
    return _by(lambda run, _: run.config.get("temperature") or 0, runs)


def by_texts(runs: Sequence[Run]) -> Curves:
    """By texts that were side by side, which may be fewer than were asked for; earlier runs do not tell."""
    return _by(lambda run, figures: figures.get("most_side_by_side") or run.config.get("batch_size") or 1, runs)


def _by(value: Callable[[Run, tables.Figures], float], runs: Sequence[Run]) -> Curves:
    """Of runs that differ in a value."""
    found: Curves = {}
    label = labels(runs)
    for run in runs:
        for mode, figures in run.modes.items():
            found.setdefault(label(run, mode), []).append((float(value(run, figures)), figures))
    return _sorted(found)


def _sorted(curves: Curves) -> Curves:
    return {label: sorted(points, key=lambda point: point[0]) for label, points in curves.items()}


def curve(curves: Curves, runs: Sequence[Run], x: str, logarithmic: bool = False) -> bytes | None:
    """The speed-up over `ar`, and below it the acceptance length."""
    figure, upper = panels_of(7.0, 6.0, 2)
    drawn: list[Any] = []  # intervals
    styles = list(line_styles([mode for _, mode in curves], runs))
    for axes, key, label in zip(
        upper, ("speedup_vs_ar", "acceptance_length"), ("speed-up over ar", "acceptance length"), strict=True
    ):
        for ((name, _), points), style in zip(curves.items(), styles, strict=True):
            told = [(at, figures) for at, figures in points if figures.get(key)]
            if told:
                values = [figures[key] for _, figures in told]
                intervals = [figures.get(_INTERVAL[key]) for _, figures in told]
                drawn += intervals
                axes.errorbar(
                    [at for at, _ in told], values, yerr=spread(values, intervals), capsize=2, **style, label=name
                )
        axes.axhline(1.0, color="#333333", linewidth=0.8, linestyle="--")
        axes.set_ylabel(label)
        if logarithmic:
            axes.set_xscale("log", base=2)
    upper[1].set_xlabel(x)
    if not drawn:
        return None
    legend(figure)
    note(upper[0], drawn)
    return png_of(figure)


_INTERVAL = {"speedup_vs_ar": "speedup_interval_95", "acceptance_length": "acceptance_length_interval_95"}


def pareto(runs: Sequence[Run]) -> bytes | None:
    """Tokens a second of all texts against milliseconds a token of each, a line a mode, by texts side by
    side. `ar` is one of them."""
    points = by_texts(runs)
    figure, (axes,) = panels_of(7.0, 4.4, 1)
    drawn: list[Any] = []  # intervals
    styles = line_styles([mode for _, mode in points], runs)
    for ((name, _), some), style in zip(points.items(), styles, strict=True):
        told = [(size, figures) for size, figures in some if figures.get("ms_per_token_of_each")]
        if told:
            each = [figures["ms_per_token_of_each"] for _, figures in told]
            rate = [figures["tokens_per_second"] for _, figures in told]
            of_each = [figures.get("ms_per_token_of_each_interval_95") for _, figures in told]
            of_rate = [figures.get("tokens_per_second_interval_95") for _, figures in told]
            across, up = spread(each, of_each), spread(rate, of_rate)
            drawn += of_rate
            axes.errorbar(each, rate, xerr=across, yerr=up, capsize=2, **style, label=name)
            for at, (size, _) in enumerate(told):
                axes.annotate(f"{size:g}", (each[at], rate[at]), textcoords="offset points", xytext=(4, 4), fontsize=7)
    if not drawn:
        return None
    axes.set_xlabel("ms a token of each text (numbers: texts side by side)")
    axes.set_ylabel("tokens a second of all")
    legend(figure)
    note(axes, drawn)
    return png_of(figure)


def _beside_ar(runs: Sequence[Run]) -> list[Run]:
    """Without `ar`, which the others are compared with."""
    return [replace(run, modes={mode: some for mode, some in run.modes.items() if mode != "ar"}) for run in runs]


@dataclass(frozen=True)
class Sweep:
    title: str
    varied: str  # what stands along its figure
    points: Callable[[Sequence[Run]], Curves]
    option: tuple[str, ...] = ()  # of evaluations, in which the runs of one sweep differ
    logarithmic: bool = False
    of_texts: bool = False  # whether it shows what many texts cost each other, beside `ar`; else speed-ups over `ar`

    def curves(self, runs: Sequence[Run]) -> Curves:
        return self.points(runs if self.of_texts else _beside_ar(runs))

    def picture(self, runs: Sequence[Run]) -> bytes | None:
        """As PNG; None where there is no figure to show."""
        return pareto(runs) if self.of_texts else curve(self.curves(runs), runs, self.varied, self.logarithmic)


SWEEPS = {
    "input_length": Sweep("Length of the prompt", "tokens of the prompt", by_category, logarithmic=True),
    "draft_length": Sweep("Length of the draft", "guesses a block", by_gamma),
    "temperature": Sweep("Temperature", "temperature", by_temperature, ("temperature",)),
    "concurrency": Sweep("Texts side by side", "texts side by side", by_texts, ("batch_size",), of_texts=True),
}


def named(name: str) -> Sweep:
    """Raises `UsageError` for a sweep that there is not."""
    if name not in SWEEPS:
        raise UsageError(f"There is no sweep {name!r}: choose from {', '.join(SWEEPS)}.")
    return SWEEPS[name]
