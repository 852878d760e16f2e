"""Log-probabilities as the two endpoints shape them: of the target's own logits, before temperature and processors."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from pearl.core.logits.logprobs import Logprobs
from pearl.server.api.token_names import TokenNames

LEAST = -9999.0  # what stands for minus infinity, which JSON has no word for


class Offset:
    """Characters of a growing text that is shown. What is half a character counts with the bytes that complete it."""

    def __init__(self, names: TokenNames, skip_special_tokens: bool = True, begins: bool = True):
        """`begins`: the first token is that of a text; else of one that goes on behind another."""
        self._names, self._skips, self._count, self._begins = names, skip_special_tokens, 0, begins
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def after(self, token: int) -> int:
        """Those before this token, which is added."""
        before = self._count
        if self._skips and self._names.is_special(token):
            return before
        spelt = self._names.bytes_of(token)
        if self._begins and self._names.drops_space(token):
            spelt = spelt[1:]
        self._begins = False
        self._count += len(self._decoder.decode(spelt))
        return before


def chat_logprobs(
    tokens: Sequence[int], found: Sequence[Logprobs], most: int, names: TokenNames, as_ids: bool = False
) -> dict[str, Any]:
    """`most`: alternatives shown for each token; the token itself is among them only if it is one of the likeliest."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        shown = names.key(token, as_ids)
        return {"token": shown, "logprob": max(logprob, LEAST), "bytes": list(names.bytes_of(token))}

    content = []
    for token, row in zip(tokens, found, strict=True):
        best = sorted(row.items(), key=lambda one: -one[1])[:most]
        content.append(entry(token, row[token]) | {"top_logprobs": [entry(*one) for one in best]})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[int],
    found: Sequence[Logprobs | None],
    names: TokenNames,
    as_ids: bool,
    offset: Offset,
) -> dict[str, Any]:
    """One entry for each token; a prompt's first token follows nothing and has none. The float of a token is the same
    in both lists. `offset`: where the first token begins, moved on to the end."""
    return {
        "tokens": [names.key(token, as_ids) for token in tokens],
        "token_logprobs": [row and max(row[token], LEAST) for token, row in zip(tokens, found, strict=True)],
        "top_logprobs": [row and _by_text(row, names, as_ids) for row in found],
        "text_offset": [offset.after(token) for token in tokens],
    }


def _by_text(row: Logprobs, names: TokenNames, as_ids: bool) -> dict[str, float]:
    """Two tokens may have one text: the second is named by its number."""
    made: dict[str, float] = {}
    for token, value in row.items():
        name = names.key(token, as_ids)
        made[f"token_id:{token}" if name in made else name] = max(value, LEAST)
    return made
