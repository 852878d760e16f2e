"""Tokens that can't follow: never, or not after the tokens before them.

    suppressed, not allowed     never
    bad words                   the last token of one, where all before it have just been said
    n-grams                     what followed the last n - 1 tokens before (`no_repeat_ngram_size`)
    min_tokens                  what would end the text, while it is shorter

Shapes: R rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from pearl.core.params import SamplingParams
from pearl.machine.transfers import sent


class Bans:
    """Of one sequence."""

    def __init__(
        self, never: Iterable[int], allowed: Collection[int] | None, words: Iterable[tuple[int, ...]], ngram: int
    ):
        self._never, self._allowed = frozenset(never), None if allowed is None else frozenset(allowed)
        self._words: dict[int, list[tuple[int, ...]]] = {}  # by the last token before the one that is bad
        for word in words:
            self._words.setdefault(word[-2], []).append(word)
        self._reach = max((len(word) - 1 for group in self._words.values() for word in group), default=0)
        self._ngram = ngram
        self._followed: dict[tuple[int, ...], set[int]] = {}  # by n - 1 tokens
        self._read = 0  # tokens of the text whose n-grams are in there
        self._ends: tuple[int, ...] = ()
        self._ends_from = 0  # length of a text that may end
        self._mask: Tensor | None = None  # bool [V], what is never said

    @staticmethod
    def of(params: SamplingParams, prompt: int, eos: Collection[int] = ()) -> Bans | None:
        """`prompt`: its tokens."""
        ends = {*eos, *params.stop_token_ids} if params.min_tokens else set()
        words = [word for word in params.bad_words_ids or () if len(word) > 1 or word[0] not in eos]
        never = {*(params.suppress_tokens or ()), *(word[0] for word in words if len(word) == 1)}
        longer = [word for word in words if len(word) > 1]
        if not (never or longer or ends or params.allowed_token_ids is not None or params.no_repeat_ngram_size):
            return None
        bans = Bans(never, params.allowed_token_ids, longer, params.no_repeat_ngram_size or 0)
        bans._ends, bans._ends_from = tuple(sorted(ends)), prompt + (params.min_tokens or 0)
        return bans

    def apply(self, scores: Tensor, text: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """In place.  scores: [R, V]"""
        size = scores.shape[-1]
        if self._never or self._allowed is not None:
            if self._mask is None:
                self._mask = sent(self._never_said(size), scores.device)
            scores.masked_fill_(self._mask, -math.inf)
        pairs = [(row, t) for row, path in enumerate(paths) for t in self._after(text, path) if t < size]
        if pairs:
            rows, tokens = sent(torch.tensor(pairs), scores.device).T
            scores[rows, tokens] = -math.inf

    def forbids(self, text: Sequence[int], path: Sequence[int], token: int) -> bool:
        never = token in self._never or (self._allowed is not None and token not in self._allowed)
        return never or token in self._after(text, path)

    def _never_said(self, size: int) -> Tensor:
        never = torch.zeros(size, dtype=torch.bool)
        if self._allowed is not None:
            never.fill_(True)
            never[[token for token in self._allowed if token < size]] = False
        never[[token for token in self._never if token < size]] = True
        return never

    def _after(self, text: Sequence[int], path: Sequence[int]) -> set[int]:
        """What can't follow a text and a path, of all that depends on them."""
        found: set[int] = set()
        if len(text) + len(path) < self._ends_from:
            found.update(self._ends)
        if self._words:
            said = (*text[-self._reach :], *path)
            for word in self._words.get(said[-1], ()):
                if said[1 - len(word) :] == word[:-1]:
                    found.add(word[-1])
        if self._ngram:
            found |= self._repeated(text, path)
        return found

    def _repeated(self, text: Sequence[int], path: Sequence[int]) -> set[int]:
        before = self._ngram - 1
        for end in range(max(self._read, before), len(text)):
            self._followed.setdefault(tuple(text[end - before : end]), set()).add(text[end])
        self._read = len(text)
        said = (*text[max(0, len(text) - before) :], *path)
        now = said[len(said) - before :]
        if len(now) < before:
            return set()
        own = {said[end] for end in range(before, len(said)) if said[end - before : end] == now}
        return self._followed.get(now, set()) | own
