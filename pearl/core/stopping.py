"""Where a text ends: at an end-of-sequence id, at a stop string, or at the most tokens asked for.

Judged token by token in the order of the text, never pass by pass, so a block that runs over the end is cut where the
target alone would have stopped. Refuses to know how the tokens came about.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from pearl.core.params import SamplingParams

Decode = Callable[[list[int]], str]
_WINDOW = 16  # tokens of context that a byte-level decoder needs to render the next one


class Stopper:
    """Watches one sequence. `finish` is None while it goes on, then "eos", "stop" or "length"."""

    def __init__(self, params: SamplingParams, eos_ids: Collection[int], decode: Decode):
        self.tokens: list[int] = []
        self.finish: str | None = None
        self._params, self._decode = params, decode
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_ids)

    def take(self, tokens: Sequence[int]) -> list[int]:
        """The tokens up to the end of the text; `finish` says whether that was reached."""
        kept: list[int] = []
        for token in tokens:
            assert self.finish is None, "tokens after the end"
            self.tokens.append(token)
            kept.append(token)
            if token in self._eos:
                self.finish = "eos"
            elif self._params.stop and self._at_stop_string():
                self.finish = "stop"
            elif len(self.tokens) >= self._params.max_new_tokens:
                self.finish = "length"
            if self.finish:
                break
        return kept

    @property
    def text(self) -> str:
        """The text so far, without the stop string that ended it."""
        text = self._decode(self.tokens)
        ends = [text.find(s) for s in self._params.stop if s in text]
        return text[: min(ends)] if ends and self.finish == "stop" else text

    def _at_stop_string(self) -> bool:
        # A stop string of n characters lies in the last n tokens that have characters of their own; special tokens have
        # none, and a multi-byte character may need several tokens, hence the window around it.
        window = _WINDOW + 4 * max(map(len, self._params.stop))
        tail = self._decode(self.tokens[-window:])
        return any(stop in tail for stop in self._params.stop)
