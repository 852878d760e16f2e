"""What the target's role asks of its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from pearl.core.messages import Features
from pearl.core.token_buckets import BatchedTokenBuckets, TokenBuckets
from pearl.models.language_model import SideRow
from pearl.models.verifier import SequenceQuery


class TargetModel(Protocol):
    """A model that verifies; each row of logits has bits of its own, whatever else is in the forward."""

    @property
    def buckets(self) -> TokenBuckets:
        """The row counts of forwards."""

    @property
    def batched_buckets(self) -> BatchedTokenBuckets | None:
        """Those of forwards that several sequences share; None: each has its own."""

    @property
    def max_sequences(self) -> int:
        """How many sequences it can hold side by side."""

    @property
    def verifies_trees(self) -> bool:
        """Whether `read` takes side rows."""

    @property
    def gives_features(self) -> bool:
        """Whether layers are hooked, whose hidden states a drafter wants."""

    def read(self, tokens: Sequence[int], keep: int, side_rows: Sequence[SideRow] = (), batch_slot: int = 0) -> Tensor:
        """Logits [keep + len(side_rows), V] of what follows each of the last `keep` of `tokens`, and each side row."""

    def read_together(self, queries: Sequence[SequenceQuery]) -> list[Tensor]:
        """As `read`, for several sequences, with bits identical to separate calls."""

    def prepare(self, query: SequenceQuery) -> None:
        """A read that is likely to be the next one: what can be done for it beforehand is done."""

    def forget(self, but: Sequence[int] = (), batch_slot: int = 0) -> int:
        """Empties the cache of a batch slot, but for what it holds of the tokens `but`, from their beginning. Returns
        how many of them it does hold."""

    def restore(self, tokens: Sequence[int], batch_slot: int = 0) -> int:
        """Goes on with what is cached of `tokens`, without reading: by so many tokens, which were read in earlier
        texts. With the bits, and the features, that reading them would have."""

    def features(self, rows: Sequence[int], batch_slot: int = 0) -> Features | None:
        """Hidden states [rows, F] at rows of the last read; None without `gives_features`."""
