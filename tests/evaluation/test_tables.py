"""A table of figures fits a terminal and says what its words mean."""

from __future__ import annotations

import pytest

from pearl.config.cli import BASELINES
from pearl.core.schedule import MODES
from pearl.evaluation import tables

FIGURES = {
    "tokens_per_second": 12345.678,
    "speedup_vs_ar": 12.345,
    "identical_to_ar": 1.0,
    "tokens_per_pass": 12.345,
    "acceptance_length": 12.345,
    "acceptance": 1.0,
    "score": 1.0,
}


def test_a_run_fits_eighty_letters_in_every_mode(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    tables.show("HumanEval", dict.fromkeys((*MODES, *BASELINES), FIGURES))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and "…" not in said
    assert all(mode in said for mode in (*MODES, *BASELINES))
    assert "12345.68" in said and said.endswith("--wide.\n")


def test_a_column_that_no_mode_fills_is_left_out(capsys):
    tables.show("MT-bench", {"ar": FIGURES | {"score": None, "acceptance": None}, "pearl": FIGURES | {"score": None}})
    said = capsys.readouterr().out
    assert "score" not in said and "acc:" in said


def test_every_column_says_what_it_means():
    assert all(column.means for column in tables.COLUMNS.values())
    assert set(tables.NARROW) < set(tables.OF_A_RUN) <= set(tables.COLUMNS)


@pytest.mark.parametrize(
    "value, cell",
    [
        (None, "-"),
        ([], "-"),
        (1.234, "1.23"),
        ([1.0, 2.0], "1.00 2.00"),
        ([1.0, None, 0.5], "1.00 - 0.50"),
        ([[2, 3]], "2.00/3.00"),
    ],
)
def test_cells_are_written_for_people(value, cell):
    assert tables.Column("x", "{:.2f}", "").cell(value) == cell


def test_words_end_no_cell_of_a_table_in_markdown():
    told = tables.markdown(["a|b", "x"], [["c\n| d", "1"], ["", "-"]])
    assert told == "| a\\|b | x |\n| --- | ---: |\n| c \\| d | 1 |\n|  | - |"


def test_an_interval_reaches_from_to_and_two_depths_are_two_figures():
    interval, depths = "speedup_interval_95", "acceptance_by_depth"
    _, ((_, *cells),) = tables.cells(
        ["mode"], [interval, depths], [(["sd:2"], {interval: [1, 2], depths: [0.85, 0.7]})]
    )
    assert cells == ["1.00 to 2.00", "0.85 0.70"]
