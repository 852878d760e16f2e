"""Prompt lookup: guesses from the text itself, without weights."""

from __future__ import annotations

from collections.abc import Sequence

from pearl.drafters.draft_source import Chain, DraftSource


class NgramSource(DraftSource):
    """Prompt lookup (Saxena 2023): what followed the last few tokens the last time they occurred. No weights."""

    origin = "suffix"

    def __init__(self, longest: int = 4, shortest: int = 2, most: int = 8):
        """Matches at most `longest` of the last tokens, at least `shortest`; proposes at most `most` at a time."""
        self._longest, self._shortest, self._most = longest, shortest, most

    def propose(self, tokens: Sequence[int], room: int) -> Chain:
        _, guesses = self.look_up(tokens)
        return [(token, ()) for token in guesses[:room]]

    def look_up(self, text: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """How many of the last tokens occurred before, and what followed them then; (0, ()) if too few did."""
        best, where = self._shortest - 1, 0
        for end in range(len(text) - 1, 0, -1):  # the latest occurrence of the longest match
            if text[end - 1] == text[-1] and (size := self._match(text, end)) > best:
                best, where = size, end
                if size == self._longest:
                    break
        return (best, tuple(text[where : where + self._most])) if where else (0, ())

    def _match(self, text: Sequence[int], end: int) -> int:
        """How many tokens before `end` are those before the end of the text, up to `longest`."""
        size = 1
        while size < min(self._longest, end) and text[end - 1 - size] == text[-1 - size]:
            size += 1
        return size
