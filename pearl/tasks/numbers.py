"""The number that an answer in words comes to. Knows how numbers are written, and nothing of problems.

The answer is $1,234.50.   ->  1234.5
#### 18 eggs               ->  18
9 * 2 = 18, so she makes \\boxed{18} dollars.  ->  18
I don't know.              ->  None
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property

# The number of an answer stands right after one of these, if it has one; else the last number of the text is meant.
_MARKER = r"(?:####|\\boxed\s*\{|\banswer\s+is\b|\banswer\s*:)"
_BETWEEN = r"[\s:*=$€£¥₹฿\\({\[]*"
_SIGN = r"(?:(?<![\w)])[-−])?(?:[$€£¥₹฿]\s?)?"  # a minus after a number or a bracket subtracts


@dataclass(frozen=True)
class Style:
    """How a language writes numbers. Between digits, `groups` may separate thousands, `points` the decimals."""

    groups: str
    points: str

    @cached_property
    def number(self) -> str:
        # Only whole groups of three are thousands: 3,5 are two numbers in English, and 2.5 is one in German too.
        grouped = rf"(?!0)\d{{1,3}}(?:[{self.groups}]\d{{3}})+(?!\d)(?:[{self.points}]\d+)?"
        return rf"{_SIGN}(?:{grouped}|\d+(?:[{self.points}]\d+)?|[{self.points}]\d+)"

    def value(self, written: str) -> Decimal:
        """Of one number, found by `number`."""
        negative = written.lstrip().startswith(("-", "−"))
        digits = re.sub(r"[^\d.,\u00a0\u202f ]", "", written).strip()
        whole = re.fullmatch(rf"((?!0)\d{{1,3}}(?:[{self.groups}]\d{{3}})+)(?:[{self.points}](\d+))?", digits)
        if whole:
            digits = re.sub(r"\D", "", whole[1]) + ("." + whole[2] if whole[2] else "")
        return (-1 if negative else 1) * Decimal(digits.replace(",", "."))


ENGLISH = Style(groups=",\u00a0\u202f", points=".")
CONTINENTAL = Style(groups=".,\u00a0\u202f ", points=",.")


def final_number(text: str, style: Style = ENGLISH) -> Decimal | None:
    """The number that `text` gives as its answer; None if there is no number in it."""
    text = text.replace("{,}", ",")  # as LaTeX writes it
    marked = list(re.finditer(_MARKER, text, re.IGNORECASE))
    if marked:
        rest, _, _ = text[marked[-1].end() :].partition("\n")
        rest = rest[rest.rfind("=") + 1 :]  # The answer is 5 + 3 = 8.
        if direct := re.match(rf"{_BETWEEN}(?P<number>{style.number})", rest):
            return style.value(direct["number"])
    found = re.findall(style.number, text)
    return style.value(found[-1]) if found else None
