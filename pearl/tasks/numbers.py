"""The number that an answer in words comes to. Knows how people write numbers, and nothing of problems.

The answer is $1,234.50.                               ->  1234.5
The answer is 20 because 10 + 5 = 15 is too few.       ->  20
#### 18 eggs                                           ->  18
9 * 2 = 18, so she makes \\boxed{\\frac{3}{4}} dollars.  ->  0.75
I don't know.                                          ->  None

What a model thinks is no answer (`pearl.tasks.scoring.reasoning`). A number stands right after the last mark of an
answer, or in the sentence that the mark begins; without any it is in the last sentence that holds a number.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property

from pearl.tasks.scoring import reasoning

# What a number stands right after. The first begin a sentence that has it; a heading may have a whole solution below.
_SENTENCE = r"\banswer\s+is\b|\b(?:the|final|correct|my|our)\s+answer(?:\s+[^\s.:]+){0,6}?\s+(?:is|was|comes\s+to|"
_SENTENCE += r"(?:would|should|must|will)\s+be)\b|\bantwort\s+(?:ist|lautet|beträgt)\b|\brespuesta\s+(?:final\s+)?es\b"
_SENTENCE += r"|\bréponse\s+(?:finale\s+)?est\b|\bответ\s+(?:равен|составляет)\b|\bjibu\s+ni\b|答案(?:是|为|為)|答えは"
_SENTENCE += r"|คำตอบคือ|উত্তর\s+হল"
_HEADING = r"####|\\f?boxed\s*\{|<answer>|\banswer(?:\s*\([^()\n]*\))?[\s*_]*[:=]|\bответ[\s*_]*[:—–-]"
_HEADING += r"|(?:\b(?:antwort|respuesta|réponse|jibu)|答案|答え|คำตอบ|উত্তর|సమాధానం)[\s*_]*:"
_MARK = re.compile(rf"(?P<sentence>{_SENTENCE})|{_HEADING}", re.IGNORECASE)
_BETWEEN = re.compile(r"[\s:*_`=≈~(\[{\\\"'“]*(?:\\?[A-Za-z][\w ]{0,30}=)?[\s*_`$(\[{]*(?:\$(?=\d))?")  # also x =

_CURRENCY = r"(?:[A-Z]{1,3})?[$€£¥₹฿₽₩]\s?|(?:USD|EUR|GBP|INR|CHF|Rs\.?)\s?"
_SIGN = (
    r"(?P<sign>(?<![\w)\]}%])[-−]|\b(?:minus|negative)\s)|(?<![A-WYZa-wyz\d^])(?<!\w_)(?<!\d/)"  # no 2 of H2O or of m^2
)
_SCALES = {
    2: "hundred",
    3: "thousand tausend mille mil тысячи тысяча тысяч হাজার వేలు వేల พัน 千",
    4: "หมื่น 万 萬",
    5: "lakhs lakh লক্ষ লাখ లక్షలు లక్షల లక్ష แสน",
    6: "million millions millionen millones millón миллион миллиона миллионов ล้าน",
    7: "crores crore",
    8: "億 亿",
    9: "billion milliarden milliarde milliards milliard миллиард миллиарда миллиардов",
    12: "trillion",
}
_POWERS = {word: power for power, words in _SCALES.items() for word in words.split()}
_SCALE = rf"\s{{0,2}}(?P<scale>{'|'.join(sorted(_POWERS, key=len, reverse=True))})(?![^\W\d_]*[a-zà-ÿа-я]|克|米|瓦)"
_VULGAR = "".join(map(chr, (*range(0xBC, 0xBF), *range(0x2150, 0x215F))))
_AFTER = (
    r"[eE](?P<e>[+-]?\d{1,3})(?!\w)",
    r"\s?[×·*x]\s?10\s?(?:\^|\*\*)\s?\{?(?P<times>[-−]?\d{1,3})\}?",
    rf"(?i:{_SCALE})(?P<more>(?<=[万萬億亿])\d+千?)?",
    r"(?:\s(?P<above>\d+))?[/⁄](?P<below>[1-9]\d*)(?![\d/])",
    rf"\s?(?P<vulgar>[{_VULGAR}])",
)

# What goes on after a number: a sum and its result, or the other end of a range
_GOES_ON = re.compile(
    r"(?:\^\{?\d+\}?)?(?:[^\S\n]+[^\W\d_]+|%|[^\S\n]?/[^\S\n]?[^\W\d_]+){0,3}?(?:[^\S\n]|[)\]}$*])*"
    r"(?:\s*(?P<result>=|≈|equals\b|is\s+equal\s+to\b)|(?P<range>[-−–—]|to\b)"  # a result may stand in the next line
    r"|\*\*|[+*/×÷·x]|of\b|times\b|plus\b|minus\b|divided\s+by\b)[\s*([{$]*(?=[A-Z]{0,3}[^\w\s]*\d)"
)
_ENDS = re.compile(r"[.!?][\"'”)*_$]*\s+(?=\D)|\n|[。！？।]")
_SOLUTION = re.compile(r"[\s*:]*\n.*=.*\n[^=]*\S.*=")  # below a heading: several lines of sums
_ASIDE = re.compile(r"\s\([^()]*\)(?!\s*[-+*/×=])")
_NOT = re.compile(
    r"\b(?:not|instead\s+of|rather\s+than)\s+[$€£]?\d[\d.,]*"
    r"|[$€£]?\b\d[\d.,]*(?:\s+[^\W\d_]+){0,2}?\s+(?:is|are|was|were|would\s+be)\s+(?:too\s|not\s+enough\b|wrong\b)"
)
_REASON = re.compile(r"(?<!and )\b(?:because|since|given\s+that|weil|porque|parce\s+que|потому\s+что)\b", re.IGNORECASE)
_OF_WHAT = re.compile(r"(?:\s+[^\W\d_]+){0,3}?\s+(?:in|for|per|over|after|from|with|by|on|at|during|within)\b[^,;=]*")

_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_TEENS = ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_WORDS = {word: value for value, word in enumerate((*_ONES, *_TEENS))}
_WORDS |= dict(zip(_TENS, range(20, 100, 10), strict=True))
_WORD = "|".join([*sorted(_WORDS, key=len, reverse=True), "hundred", "thousand", "million"])
_WORDED = re.compile(rf"(minus\s+|negative\s+)?((?:{_WORD})(?:(?:[\s-]+|\s+and\s+)(?:{_WORD}))*)\b", re.IGNORECASE)

_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}
_MARKUP = (
    (r"</?(?:b|strong|i|em|u|span|p|br)\b[^>]*>|\\(?:left|right)\b", ""),
    (r"\{,\}", ","),
    (r"\\[,!;:]", ""),
    (r"\\([$%#])", r"\1"),
    (r"\\(?:text|textbf|mathbf|mathrm|mbox|bm)\s*\{([^{}]*)\}", r"\1"),
    (r"(?<=\d)\s*(?=\\[dt]?frac)", " "),
    (r"\\[dt]?frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))", r"\1\2/\3\4"),
    (r"\\(?:times|cdot|ast)\b", "×"),
    (r"\\div\b", "÷"),
    (r"\\approx\b", "≈"),
    (r"(?m)^[ \t]*(?:\*\*)?\d{1,2}[.)][ \t]+(?=\S)", ""),  # numbers of a list
    (r"(?m)^([ \t]*#{1,6}[ \t]*)(?:\*\*)?\d{1,2}[.)][ \t]+(?=\S.*\n\s*\S)", r"\1"),  # and of headings with text below
)


@dataclass(frozen=True)
class Style:
    """How a language writes numbers. Between digits, `groups` may separate thousands, `points` the decimals."""

    groups: str
    points: str
    scales: bool = True  # 5 million are 5,000,000, and not 5 of what is counted in millions

    @cached_property
    def _grouped(self) -> tuple[str, ...]:
        # Only whole groups of three are thousands: 3,5 are two numbers in English, and 2.5 is one in German too.
        # 12,34,567 is how India writes it, and 1.234,50 can only be one number in any language.
        after = rf"(?!\d)(?:[{self.points}](\d+))?"
        indian, continental = r"(\d{1,2}(?:,\d{2})+,\d{3})", r"((?!0)\d{1,3}(?:\.\d{3})+),(\d{1,2})(?!\d)"
        return continental, rf"((?!0)\d{{1,3}}(?:[{self.groups}]\d{{3}})+){after}", rf"{indian}{after}"

    @cached_property
    def number(self) -> re.Pattern[str]:
        grouped = "|".join(re.sub(r"(?<!\\)\((?!\?)", "(?:", one) for one in self._grouped)
        digits = rf"(?P<digits>{grouped}|\d+(?:[{self.points}]\d+)?|[{self.points}]\d+)"
        either = rf"{digits}(?:{'|'.join(_AFTER)})?|(?P<alone>[{_VULGAR}])"
        return re.compile(rf"(?:{_SIGN})(?:{_CURRENCY})?(?P<late>(?<=[$€£])[-−])?(?:{either})")

    def value(self, found: re.Match[str]) -> Decimal:
        """Of one number, found by `number`."""
        value = self._digits(found["digits"]) if found["digits"] else Decimal(0)
        if power := found["e"] or found["times"]:
            value = value.scaleb(int(power.replace("−", "-")))
        if found["scale"] and self.scales:
            value = value.scaleb(_POWERS[found["scale"].lower()])
        if (more := found["more"]) and self.scales:
            value += Decimal(more.rstrip("千")) * (1000 if more.endswith("千") else 1)
        if found["below"]:
            whole, above = (value, Decimal(found["above"])) if found["above"] else (Decimal(0), value)
            value = whole + above / Decimal(found["below"])
        if vulgar := found["vulgar"] or found["alone"]:
            value += Decimal(str(unicodedata.numeric(vulgar)))
        return -value if found["sign"] or found["late"] else value

    def _digits(self, written: str) -> Decimal:
        for grouped in self._grouped:
            if whole := re.fullmatch(grouped, written):
                return Decimal(re.sub(r"\D", "", whole[1]) + ("." + whole[2] if whole[2] else ""))
        return Decimal(written.replace(",", "."))


ENGLISH = Style(groups=",'’\u00a0\u2009\u202f", points=".")
CONTINENTAL = Style(groups=".,'’\u00a0\u2009\u202f ", points=",.")


def final_number(text: str, style: Style = ENGLISH) -> Decimal | None:
    """The number that `text` gives as its answer; None if there is no number in it, or a range and no number."""
    text = reasoning.answer(text).translate(_FULL_WIDTH)
    for written, plain in _MARKUP:
        text = re.sub(written, plain, text)
    marks = [(mark["sentence"], text[mark.end() :]) for mark in _MARK.finditer(text)]
    for begins, rest in reversed(marks):
        first = style.number.match(rest, _BETWEEN.match(rest).end())  # type: ignore[union-attr]  # it may be empty
        if first and (begins or not _SOLUTION.match(rest)):
            return _result(rest, first, style)
        sentence = _ENDS.split(rest, maxsplit=1)[0]
        if begins and style.number.search(sentence):
            return _of_sentence(sentence, style)
    for _, rest in reversed(marks):
        if (worded := _WORDED.match(rest, _BETWEEN.match(rest).end())) and not re.search(r"\d", rest):  # type: ignore[union-attr]
            return _of_words(worded)
    return next((_of_sentence(one, style) for one in reversed(_ENDS.split(text)) if style.number.search(one)), None)


def _result(rest: str, first: re.Match[str], style: Style) -> Decimal | None:
    """What a sum comes to that begins with the number `first`: The answer is 5 + 3 = 8. The answer is 8 = 5 + 3."""
    rest = rest[: first.end()] + _NOT.sub("", rest[first.end() :])
    last, found, alone, is_range, equal = first, first, True, False, False
    while (sign := _GOES_ON.match(rest, last.end())) and (after := style.number.match(rest, sign.end())):
        found = last if sign["result"] and alone else found
        is_range, equal = is_range or bool(sign["range"]), equal or bool(sign["result"])
        last, alone = after, bool(sign["result"]) and not rest.startswith("^", after.end())
    found = last if alone else found
    return None if is_range and not equal else style.value(found)


def _of_sentence(sentence: str, style: Style) -> Decimal | None:
    """The number that a sentence with numbers comes to: what is bold, or the last before a reason is given."""
    for aside in (_ASIDE, _NOT):
        if style.number.search(less := aside.sub("", sentence)):
            sentence = less
    numbers = list(style.number.finditer(sentence))
    reason = _REASON.search(sentence)
    if reason and ", " not in sentence[reason.end() :]:  # behind a comma goes on what the reason was for
        given = [one for one in numbers if one.start() < reason.start()]
        proved = [one for one in given if style.value(one) == style.value(numbers[-1])]
        numbers = proved or given if len(given) == 1 else proved or numbers
    for found in reversed(numbers):
        bold = re.search(r"(?<!\*)\*\*\s*$", sentence[: found.start()])
        if bold and re.match(r"(?:\s*[^\W\d_]+|%){0,3}[.!]?\s*\*\*", sentence[found.end() :]):
            return style.value(found)
    for found in numbers[:-1]:  # 10 + 10 = 20 apples in 2 baskets
        if re.search(r"=\s*$", sentence[: found.start()]) and _OF_WHAT.fullmatch(sentence[found.end() :]):
            return style.value(found)
    return style.value(numbers[-1])


def _of_words(found: re.Match[str]) -> Decimal:
    """Twenty-five; one hundred and five thousand."""
    total = part = 0
    for word in re.findall(_WORD, found[2].lower()):
        if word in _WORDS:
            part += _WORDS[word]
        elif word == "hundred":
            part = max(1, part) * 100
        else:
            total, part = total + max(1, part) * 10 ** _POWERS[word], 0
    return Decimal(-(total + part) if found[1] else total + part)
