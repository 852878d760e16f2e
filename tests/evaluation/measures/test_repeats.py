"""HumanEval's third line: a chat answer without the part that writes the prompt again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from evaluations import ONE, text

from pearl.core.records import SampleKey
from pearl.evaluation import metrics
from pearl.evaluation.measures import repeats
from pearl.tasks import humaneval

PROMPT = 'from typing import List\n\n\ndef f(x: int) -> int:\n    """ Adds one.\n    >>> f(1)\n    2\n    """\n'
PROBLEM = humaneval.Problem("HumanEval/0", PROMPT, "f", "", "")


def test_what_a_chat_answer_repeats_is_the_head_that_the_prompt_has():
    answer = f"Here it is:\n\n```python\n{PROMPT}    return x + 1\n```\nIt adds one.\n"
    begin, end = humaneval.repeated(PROBLEM, answer)
    assert answer[begin:end] == PROMPT
    begin, end = humaneval.repeated(PROBLEM, "```\ndef f(x: int) -> int:\n    return x + 1\n    2\n```")
    assert (begin, end) == (4, 26), "a line that comes later is none of the head"


@pytest.mark.parametrize("answer", ["", "I can't.", "```python\ndef g(x):\n    return 1\n```", "def f(y): return y"])
def test_an_answer_that_repeats_nothing_is_whole(answer):
    assert humaneval.repeated(PROBLEM, answer) == (0, 0)


def decode(tokens) -> str:
    """Two letters a token."""
    return "".join(f"{token:02}" for token in tokens)


def run(*committed: int):
    passes = tuple(replace(ONE, committed=n, seconds=1.0) for n in committed)
    tokens = tuple(range(sum(committed)))
    return replace(text("sd", (1,)), tokens=tokens, text=decode(tokens), passes=passes)


def test_passes_that_wrote_a_token_of_it_are_left_out_whole():
    """Characters 5 to 11 are tokens 2 to 5."""
    runs = {"sd": {SampleKey("a"): run(1, 1, 3, 2, 4)}}
    left = repeats.left_out(runs, lambda *_: (5, 11), decode)["sd"][SampleKey("a")]
    assert [one.committed for one in left.passes] == [1, 1, 4] and left.tokens == (0, 1, 7, 8, 9, 10)
    assert left.seconds == 3.0
    assert repeats.left_out(runs, lambda *_: (0, 0), decode) == runs
    assert repeats.left_out(runs, lambda *_: (0, 22), decode) == {}


def test_the_time_that_a_prompt_takes_stays_in_every_mode_however_much_the_first_pass_commits():
    """transformers' assisted generation guesses in it already. Its tokens and guesses of the part do not count."""
    modes = {mode: {SampleKey("a"): run(*committed)} for mode, committed in (("ar", [1] * 8), ("hf", [6, 2]))}
    left = repeats.left_out(modes, lambda *_: (2, 8), decode)
    ar, hf = (left[mode][SampleKey("a")] for mode in ("ar", "hf"))
    assert ar.tokens == hf.tokens == (0, 4, 5, 6, 7) and (ar.seconds, hf.seconds) == (5.0, 2.0)
    assert [one.committed for one in hf.passes] == [3, 2] and hf.passes[0].verified == 0
    from_the_start = repeats.left_out(modes, lambda *_: (0, 8), decode)
    assert [[one.committed for one in runs[SampleKey("a")].passes] for runs in from_the_start.values()] == [
        [0, 1, 1, 1, 1],
        [2, 2],
    ]


def test_all_modes_are_told_of_the_same_texts():
    """One mode wrote the end of the part and all that follows it in one pass."""
    keys = SampleKey("a"), SampleKey("b")
    modes = {"ar": {key: run(*[1] * 8) for key in keys}, "sd": {keys[0]: run(2, 6), keys[1]: run(2, 4, 2)}}
    left = repeats.left_out(modes, lambda *_: (0, 8), decode)
    assert {mode: set(runs) for mode, runs in left.items()} == {"ar": {keys[1]}, "sd": {keys[1]}}


def test_what_is_left_is_compared_with_what_is_left_of_ar():
    """Five passes of a token against the prompt's pass and two of two tokens."""
    modes = {mode: {SampleKey("a"): run(*committed)} for mode, committed in (("ar", [1] * 8), ("sd", [2] * 4))}
    parts = repeats.left_out(modes, lambda *_: (2, 8), decode)
    assert metrics.summarise(parts)["sd"]["speedup_vs_ar"] == pytest.approx(5 / 3)
