"""Keys and values of the beginnings of texts, kept over texts: what has been read is not read again.

A prompt is read in pieces of `PREFILL_CHUNK` tokens from its beginning on, each by a forward of its own. So the bits
of a piece's keys and values are a function of the tokens up to its end and of nothing else, and putting them back is
reading them: caches, logits and texts keep their bits. Whatever is read in another way (the rest of a prompt, tokens
that were written) is not kept.

A piece is known by a hash of all tokens up to its end. A store serves one model in one process, so model, dtype and
options are the same for all that is in it. It is bounded; what was not used for longest goes first, and of a text its
last piece, as a piece is of no use without those before it.

An evaluation compares modes on the same prompts, and the first to read one would pay for all. There the pieces that are
read in a *round* are found from the next one on (`begin_round`), so each mode of a problem reads the same; the first
round finds nothing.

Knows: tensors. Refuses to know: models, sequences, where in a cache a piece lies.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Digest = bytes
EMPTY: Digest = b""  # of no tokens


@dataclass(frozen=True)
class Piece:
    """What a forward of a piece has left."""

    stacks: Sequence[Tensor]  # [layers, kv heads, tokens, head_dim] each
    states: Tensor | None = None  # of the hooked layers, [tokens, F]

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in (*self.stacks, *([] if self.states is None else [self.states])))


def digest(before: Digest, tokens: Sequence[int]) -> Digest:
    """Of the tokens whose digest is `before`, and of these."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class PrefixCache:
    """Of one model."""

    def __init__(self, limit: int):
        """`limit`: bytes of tensors at most."""
        self.limit, self.nbytes = limit, 0
        self._pieces: OrderedDict[Digest, Piece] = OrderedDict()  # least recently used first
        self._waiting: dict[Digest, Piece] = {}  # that were read in this round
        self._in_rounds = False

    def begin_round(self, forget: bool = False) -> None:
        """What is added from now on is found from the next round on, whoever asks; nothing is dropped before.
        `forget`: what was added in the last round."""
        if not self._in_rounds:
            self._in_rounds, self.nbytes = True, 0
            self._pieces.clear()
        if forget:
            self.nbytes -= sum(piece.nbytes for piece in self._waiting.values())
        else:
            self._pieces |= dict(reversed(self._waiting.items()))  # the beginning of a text is the last of it to go
        self._waiting = {}
        self._shrink(3 * self.limit // 4)

    def __contains__(self, key: Digest) -> bool:
        return key in self._pieces or key in self._waiting

    def add(self, key: Digest, piece: Piece, before: Sequence[Digest] = ()) -> None:
        """`before`: those of the pieces before it."""
        if key in self:
            return
        self.nbytes += piece.nbytes
        if not self._in_rounds:
            self._pieces[key] = piece
            self._touch(before)
            self._shrink(self.limit)
        elif self.nbytes <= self.limit:
            self._waiting[key] = piece
        else:
            self.nbytes -= piece.nbytes

    def find(self, keys: Sequence[Digest]) -> list[Piece]:
        """The pieces of the beginning of a text, one after the other, as far as they are there."""
        found = []
        for key in keys:
            if key not in self._pieces:
                break
            found.append(self._pieces[key])
        self._touch(keys[: len(found)])
        return found

    def _touch(self, keys: Sequence[Digest]) -> None:
        """The beginning of a text is the last of it to go."""
        for key in reversed(keys):
            if key in self._pieces:
                self._pieces.move_to_end(key)

    def _shrink(self, limit: int) -> None:
        while self.nbytes > limit and self._pieces:
            _, piece = self._pieces.popitem(last=False)
            self.nbytes -= piece.nbytes
