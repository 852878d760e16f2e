"""Texts without the part that repeats their prompt: a chat model writes a function's head again before its body.

That part is easy to guess, and flatters whoever guesses. A pass that committed any token of it is left out, with all of
its tokens; what is left has its own passes and seconds. Only the first pass, which reads the prompt, stays in every
mode, with the tokens of it that are outside: in one mode it commits one token, in another the whole part. Texts count
that have something left in every mode, so that all modes are told of the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pearl.core.records import GenerationStats, SampleKey

Runs = Mapping[SampleKey, GenerationStats]
Decode = Callable[[Sequence[int]], str]
_NO_GUESS: dict[str, Any] = {"offered": 0, "tested": 0, "accepted": 0, "verified": 0, "accepted_rows": 0, "judged": ()}


def left_out(
    modes: Mapping[str, Runs], spans: Callable[[SampleKey, str], tuple[int, int]], decode: Decode
) -> dict[str, dict[SampleKey, GenerationStats]]:
    """`spans`: of a text, where the part begins and ends, in characters. Empty where no text has anything left."""
    found = {
        mode: {key: _without(text, _tokens(text, spans(key, text.text), decode)) for key, text in runs.items()}
        for mode, runs in modes.items()
    }
    some = set.intersection(*({key for key, text in runs.items() if text.tokens} for runs in found.values()))
    return {mode: {key: text for key, text in runs.items() if key in some} for mode, runs in found.items() if some}


def _tokens(text: GenerationStats, span: tuple[int, int], decode: Decode) -> tuple[int, int]:
    """The same in tokens: the first that belongs to it, and the first after it."""
    begin, end = span
    if begin >= end:
        return 0, 0
    return _first(text.tokens, begin + 1, decode) - 1, _first(text.tokens, end, decode)


def _first(tokens: Sequence[int], characters: int, decode: Decode) -> int:
    """How many tokens it takes to write so many characters."""
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(decode(tokens[:middle])) >= characters else (middle + 1, high)
    return low


def _without(text: GenerationStats, span: tuple[int, int]) -> GenerationStats:
    tokens: list[int] = []
    passes, at = [], 0
    for one in text.passes:
        committed = range(at, at + one.committed)
        at += one.committed
        if committed.stop <= span[0] or committed.start >= span[1]:
            passes.append(one)
            tokens += text.tokens[committed.start : committed.stop]
        elif not committed.start:  # no guess of it counts
            outside = [text.tokens[place] for place in committed if not span[0] <= place < span[1]]
            passes.append(replace(one, committed=len(outside), **_NO_GUESS))
            tokens += outside
    return replace(text, tokens=tuple(tokens), passes=tuple(passes))
