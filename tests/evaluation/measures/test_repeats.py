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
    runs = {SampleKey("a"): run(1, 1, 3, 2, 4)}
    left = repeats.left_out(runs, lambda *_: (5, 11), decode)[SampleKey("a")]
    assert [one.committed for one in left.passes] == [1, 1, 4] and left.tokens == (0, 1, 7, 8, 9, 10)
    assert left.seconds == 3.0
    assert repeats.left_out(runs, lambda *_: (0, 0), decode) == runs
    assert repeats.left_out(runs, lambda *_: (0, 22), decode) == {}


def test_what_is_left_is_compared_with_what_is_left_of_ar():
    ar, mine = ({SampleKey("a"): run(*committed)} for committed in ([1] * 8, [2, 2, 2, 2]))
    parts = {mode: repeats.left_out(runs, lambda *_: (0, 8), decode) for mode, runs in (("ar", ar), ("sd", mine))}
    assert metrics.summarise(parts)["sd"]["speedup_vs_ar"] == 2.0
