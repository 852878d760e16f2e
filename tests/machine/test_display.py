"""Long work shows how far it is, on a terminal and in a log; a table's words are whole at any width."""

from __future__ import annotations

from pearl.machine import display
from pearl.machine.display import Progress, show_table


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    with Progress("decoding", 12, done=2) as progress:
        for second in range(1, 66):
            now[0] = 100.0 + second
            if second % 13 == 0:
                progress.advance()
            progress.show(f"T/{second // 13} pearl")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "4 of 12 in 0:00:30, about 0:02:00 left: T/2 pearl",
        "6 of 12 in 0:01:00, about 0:01:30 left: T/4 pearl",
    ]


def test_short_work_and_quiet_work_leave_no_line(monkeypatch, capsys):
    with Progress("decoding", 3) as progress:
        progress.advance()
    monkeypatch.setattr(display, "LINE_EVERY_S", 0.0)
    with Progress("decoding", 3, quiet=True) as progress:
        progress.advance()
    assert capsys.readouterr().err == ""


def test_what_is_printed_beside_it_goes_where_results_go(monkeypatch, capsys):
    with Progress("decoding", 3):
        print("a result")
    assert capsys.readouterr().out == "a result\n"


def test_no_cell_is_cut_however_narrow_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    show_table(["mode", "tokens/s"], [["hf-prompt-lookup", "1234.56"], ["a-very-long-name-of-a-pair", "7.00"]])
    said = capsys.readouterr().out
    for words in ("tokens/s", "hf-prompt-lookup", "1234.56", "a-very-long-name-of-a-pair"):
        assert words in said
    assert "…" not in said
