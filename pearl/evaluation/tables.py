"""Figures as tables, for people and for other programs: which there are, what they are called, how they are written.

A row is a label and the figures of one mode (`metrics.summarise`).
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pearl.errors import UsageError
from pearl.options import did_you_mean

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    heading: str
    form: str
    means: str
    between: str = " "  # the numbers of a list

    def cell(self, value: Any) -> str:
        """`value`, a number or a list of them (an interval, a row of depths), as a person reads it."""
        if value is None or value == []:
            return "-"
        if isinstance(value, list | tuple) and isinstance(value[0], list | tuple):
            return " ".join("/".join(map(self.cell, one)) for one in value)
        if isinstance(value, list | tuple):
            return self.between.join(map(self.cell, value))
        return self.form.format(value)


COLUMNS: dict[str, Column] = {
    "tokens_per_second": Column("tok/s", "{:.2f}", "tokens a second"),
    "speedup_vs_ar": Column("x ar", "{:.2f}", "so many times ar's"),
    "speedup_interval_95": Column("95 %", "{:.2f}", "its interval", " to "),
    "speedup_vs_ar_all": Column("x ar-all", "{:.2f}", "times ar's on all devices"),
    "decode_speedup_vs_ar": Column("x ar, decoding", "{:.2f}", "times ar's without prompts"),
    "predicted_speedup": Column("expected", "{:.2f}", "speed-up by theory"),
    "identical_to_ar": Column("same", "{:.0%}", "texts equal to ar's"),
    "tokens_per_pass": Column("tok/pass", "{:.2f}", "tokens a target forward"),
    "tokens_per_rejection": Column("tok/miss", "{:.2f}", "tokens to the next wrong guess"),
    "acceptance_length": Column("AL", "{:.2f}", "acceptance length, tokens a verification"),
    "acceptance_length_interval_95": Column("AL 95 %", "{:.2f}", "its interval", " to "),
    "acceptance": Column("acc", "{:.2f}", "share of tested guesses that were right"),
    "draft_acceptance_rate": Column("acc of drafted", "{:.2f}", "share of verified rows that were right"),
    "acceptance_by_depth": Column("acc by depth", "{:.2f}", "conditional acceptance, guess by guess"),
    "counts_by_depth": Column("counts by depth", "{:.0f}", "accepted of verified, guess by guess"),
    "misses_prepared": Column("ready", "{:.0%}", "misses with another guess ready"),
    "target_busy": Column("target", "{:.0%}", "of the time in its forwards"),
    "drafter_busy": Column("drafter", "{:.0%}", "of the time drafting"),
    "ttft_ms": Column("first ms", "{:.0f}", "until the first token"),
    "tpot_ms_p50": Column("p50", "{:.0f}", "ms that half of the tokens took at most"),
    "tpot_ms_p95": Column("p95", "{:.0f}", "ms that 95 % of the tokens took at most"),
    "tpot_ms_p99": Column("p99", "{:.0f}", "ms that 99 % of the tokens took at most"),
    "millijoules_per_token": Column("mJ/tok", "{:.0f}", "millijoules of the machine a token"),
    "ms_per_token_of_each": Column("ms of each", "{:.1f}", "ms a token of one text, others beside it"),
    "peak_memory_mb": Column("MB", "{:.0f}", "memory of both"),
    "bytes_per_pass": Column("B/pass", "{:.0f}", "bytes sent a pass"),
    "score": Column("score", "{:.2f}", "share of right answers"),
}
# Of a run: these fit 80 letters beside the longest name of a mode; the others with --wide
NARROW = (
    "tokens_per_second",
    "speedup_vs_ar",
    "identical_to_ar",
    "tokens_per_pass",
    "acceptance_length",
    "acceptance",
    "score",
)
OF_A_RUN = (
    *NARROW[:-1],
    "misses_prepared",
    "target_busy",
    "drafter_busy",
    "ttft_ms",
    "tpot_ms_p50",
    "tpot_ms_p95",
    "bytes_per_pass",
    "millijoules_per_token",
    "score",
)
Row = tuple[Sequence[str], Figures]  # its labels, one a leading column


def choose(words: str) -> list[str]:
    """The columns of a comma-separated list. Raises UsageError for an unknown one."""
    names = [name for name in words.split(",") if name]
    for name in names:
        if name not in COLUMNS:
            raise UsageError(
                f"There is no column {name!r}{did_you_mean(name, COLUMNS)} Choose from {', '.join(COLUMNS)}."
            )
    return names


def cells(labels: Sequence[str], columns: Sequence[str], rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The headings and the lines of a table, as a person reads them."""
    head = [*labels, *(COLUMNS[name].heading for name in columns)]
    return head, [[*names, *(COLUMNS[name].cell(figures.get(name)) for name in columns)] for names, figures in rows]


def show(title: str, modes: Mapping[str, Figures], wide: bool = False) -> None:
    """Prints a run's figures and what the headings mean: as many as fit 80 letters, or more; none that no mode has."""
    from pearl.machine.display import show_table

    columns = [
        name
        for name in (OF_A_RUN if wide else NARROW)
        if any(figures.get(name) is not None for figures in modes.values())
    ]
    print(title)
    show_table(*cells(["mode"], columns, [([mode], figures) for mode, figures in modes.items()]))
    legend = "; ".join(f"{COLUMNS[name].heading}: {COLUMNS[name].means}" for name in columns)
    print(textwrap.fill(f"{legend}." if wide else f"{legend}. More columns: --wide.", 80))


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> str:
    """A table in Markdown; the first columns, `labels`, are words and the others numbers.

    A label may hold a line break or a `|` (of a file's categories, a folder's name): neither ends a cell."""
    lines = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in (head, *rows)]
    rule = ["---"] * labels + ["---:"] * (len(head) - labels)
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def comma_separated(labels: Sequence[str], columns: Sequence[str], rows: Sequence[Row]) -> str:
    """The same with all digits, under the keys of `summary.json`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*labels, *columns])
    for names, figures in rows:
        values = (figures.get(name) for name in columns)
        writer.writerow([*names, *(" ".join(map(str, v)) if isinstance(v, list) else v for v in values)])
    return text.getvalue()
