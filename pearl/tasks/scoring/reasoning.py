"""What of a text is the answer. A reasoning model thinks first, and what it thinks of is not what it says.

Knows the marks that models put around their thoughts: tags (`<think>`, `[THINK]` and their like, of which chat
templates often write the first one themselves), and the channels of gpt-oss, with their special tokens or without.
"""

from __future__ import annotations

import re

_OPEN = re.compile(
    r"<(?:seed:)?(?:think|thinking|thoughts?|reasoning)>|\[THINK\]|◁think▷|<\|(?:begin_of_thought|START_THINKING)\|>"
)
_CLOSE = re.compile(
    r"</(?:seed:)?(?:think|thinking|thoughts?|reasoning)>|\[/THINK\]|◁/think▷|<\|(?:end_of_thought|END_THINKING)\|>"
)
_THOUGHT = re.compile(rf"(?:{_OPEN.pattern})(?:(?!{_OPEN.pattern}).)*?(?:{_CLOSE.pattern})", re.DOTALL)
_MESSAGE = re.compile(
    r"<\|channel\|>\s*(\w+)(?:[^\n]*?<\|message\|>)?(.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)", re.DOTALL
)
_UNMARKED = re.compile(r"\s*analysis.*assistant\s*final", re.DOTALL)  # the same where special tokens were left out


def opened(prompt: str) -> str:
    """The mark at the end of a prompt behind which a model thinks; empty: it answers at once."""
    found = re.search(rf"(?:{_OPEN.pattern})\s*\Z", prompt)
    return found[0] if found else ""


def answer(text: str) -> str:
    """`text` without its reasoning; nothing of a text that ended before its reasoning did."""
    if messages := _MESSAGE.findall(text):
        text = "\n".join(said for channel, said in messages if channel == "final")
    elif unmarked := _UNMARKED.match(text):
        text = text[unmarked.end() :]
    while (shorter := _THOUGHT.sub("\n", text)) != text:  # thoughts may hold thoughts
        text = shorter
    *_, text = _CLOSE.split(text)  # the chat template opened it
    return _OPEN.split(text)[0]
