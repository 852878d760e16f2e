"""Figures as tables, for people and for other programs: which there are, what they are called, how they are written.

A row is a label and the figures of one mode (`metrics.summarise`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pearl.errors import UsageError

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    heading: str
    form: str

    def cell(self, value: Any) -> str:
        """`value`, a number or a list of them (an interval, a row of depths), as a person reads it."""
        if value is None or value == []:
            return "-"
        if isinstance(value, list | tuple):
            return " to ".join(map(self.cell, value)) if len(value) == 2 else " ".join(map(self.cell, value))
        return self.form.format(value)


COLUMNS: dict[str, Column] = {
    "tokens_per_second": Column("tok/s", "{:.2f}"),
    "speedup_vs_ar": Column("x ar", "{:.2f}"),
    "speedup_interval_95": Column("95 %", "{:.2f}"),
    "speedup_vs_ar_all": Column("x ar-all", "{:.2f}"),
    "decode_speedup_vs_ar": Column("x ar, decoding", "{:.2f}"),
    "predicted_speedup": Column("expected", "{:.2f}"),
    "identical_to_ar": Column("same", "{:.0%}"),
    "tokens_per_pass": Column("tok/pass", "{:.2f}"),
    "tokens_per_rejection": Column("tok/miss", "{:.2f}"),
    "acceptance": Column("accept", "{:.2f}"),
    "acceptance_by_depth": Column("accept by depth", "{:.2f}"),
    "misses_prepared": Column("ready", "{:.0%}"),
    "target_busy": Column("target", "{:.0%}"),
    "drafter_busy": Column("drafter", "{:.0%}"),
    "ttft_ms": Column("first ms", "{:.0f}"),
    "tpot_ms_p50": Column("p50", "{:.0f}"),
    "tpot_ms_p95": Column("p95", "{:.0f}"),
    "tpot_ms_p99": Column("p99", "{:.0f}"),
    "peak_memory_mb": Column("MB", "{:.0f}"),
    "bytes_per_pass": Column("B/pass", "{:.0f}"),
    "score": Column("score", "{:.2f}"),
}
OF_A_RUN = (
    "tokens_per_second",
    "speedup_vs_ar",
    "identical_to_ar",
    "tokens_per_pass",
    "acceptance",
    "misses_prepared",
    "target_busy",
    "drafter_busy",
    "ttft_ms",
    "tpot_ms_p50",
    "tpot_ms_p95",
    "bytes_per_pass",
    "score",
)
Row = tuple[Sequence[str], Figures]  # its labels, one a leading column


def choose(words: str) -> list[str]:
    """The columns of a comma-separated list. Raises UsageError for an unknown one."""
    names = [name for name in words.split(",") if name]
    for name in names:
        if name not in COLUMNS:
            raise UsageError(f"There is no column {name!r}: choose from {', '.join(COLUMNS)}.")
    return names


def markdown(labels: Sequence[str], columns: Sequence[str], rows: Sequence[Row]) -> str:
    head = [*labels, *(COLUMNS[name].heading for name in columns)]
    body = [[*names, *(COLUMNS[name].cell(figures.get(name)) for name in columns)] for names, figures in rows]
    rule = ["---"] * len(labels) + ["---:"] * len(columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def comma_separated(labels: Sequence[str], columns: Sequence[str], rows: Sequence[Row]) -> str:
    """The same with all digits, under the keys of `summary.json`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*labels, *columns])
    for names, figures in rows:
        values = (figures.get(name) for name in columns)
        writer.writerow([*names, *(" ".join(map(str, v)) if isinstance(v, list) else v for v in values)])
    return text.getvalue()
