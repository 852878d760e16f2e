"""Pictures can be read, however many modes and runs are in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex

from pearl.evaluation import plots
from pearl.evaluation.pages import sweeps
from pearl.evaluation.report import Run

FIGURES: dict[str, Any] = dict.fromkeys(("speedup_vs_ar", "speedup_vs_ar_all", "acceptance_length"), 2.0)
FIGURES |= {"speedup_interval_95": [1.5, 2.5], "acceptance_by_depth": [0.8, 0.7]}
GAMMAS = ("ar", *(f"sd:{n}" for n in (1, 2, 3, 4, 6, 8)), "sd", *(f"pearl:{n}" for n in (1, 2, 3, 4, 6, 8)), "pearl")


@pytest.fixture(autouse=True)
def figures_for_pngs(monkeypatch):
    for module in (plots, sweeps):
        monkeypatch.setattr(module, "png_of", lambda figure: figure)


def runs_of(*modes: str, count: int = 1) -> list[Run]:
    some = {mode: FIGURES | ({"acceptance_length": None} if mode.startswith("ar") else {}) for mode in modes}
    return [Run(Path(f"r{n}"), f"a long name of a run, {n}", {"temperature": float(n)}, {}, some) for n in range(count)]


def colours(figure: Any) -> dict[str, str]:
    """Of bars or lines, by mode."""
    marks, names = figure.axes[0].get_legend_handles_labels()
    drawn = [mark[0].get_facecolor() if hasattr(mark, "patches") else mark[0].get_color() for mark in marks]
    return {name.rpartition(", ")[2]: to_hex(colour) for name, colour in zip(names, drawn, strict=True)}


@pytest.mark.parametrize(
    "draw, runs",
    [
        (plots.speedup, runs_of(*GAMMAS)),
        (plots.depth, runs_of("ar", "sd", "pearl", "tree", count=10)),
        (sweeps.SWEEPS["draft_length"].picture, runs_of(*GAMMAS)),
    ],
)
def test_the_names_hide_nothing_and_are_not_cut_off(draw, runs):
    figure = draw(runs)
    figure.draw_without_rendering()
    names, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert len(figure.legends[0].get_texts()) > 3
    assert not any(names.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert whole.x0 <= names.x0 and names.x1 <= whole.x1 and whole.y0 <= names.y0 and names.y1 <= whole.y1
    assert all(axes.get_window_extent().width > 400 for axes in figure.axes)


def test_no_two_marks_of_a_picture_look_alike():
    bars = plots.speedup(runs_of(*GAMMAS)).axes[0].patches
    assert len({(to_hex(bar.get_facecolor()), bar.get_hatch()) for bar in bars}) == len(GAMMAS) - 1
    lines = list(plots.line_styles(["sd", "pearl"] * 12, runs_of("sd", "pearl", count=12)))
    assert len({(line["color"], line["linestyle"], line["marker"]) for line in lines}) == 24


def test_a_mode_has_one_colour_in_every_picture():
    """Whichever modes stand beside it, and whichever a picture leaves out."""
    runs, few = runs_of("ar", "ar-all", "sd", "pearl", "tree"), runs_of("pearl", "ar", "tree")
    made = [draw(some) for some in (runs, few) for draw in (plots.speedup, plots.length, plots.equal_devices)]
    made += [sweeps.SWEEPS["temperature"].picture(some) for some in (runs, few)]
    assert len({colours(figure)["tree"] for figure in made} | {colours(plots.depth(few))["tree"]}) == 1
    assert len(set(colours(made[0]).values())) == 4
