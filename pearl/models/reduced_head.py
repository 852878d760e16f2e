"""The output head of a draft model, cut to the tokens that matter: a forward then reads a fraction of its weights.

For a small model the head is much of a forward (Qwen2.5-0.5B: 136 of 494 million weights). A draft model that we have
trained brings the ids of its frequent tokens. Of others: byte-level and SentencePiece BPE number their tokens by how
early, that is how often, they were merged, so the first N ids are the frequent ones. To these come the special tokens
and every token of the text so far, as far as it is known; so a rare name can be drafted from its second occurrence on.
Where the text keeps leaving the vocabulary (another script, say), all of it is read. A token that can't be drafted
costs a guess, never the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pearl.core.control.averages import ema
from pearl.core.trie import shared_prefix
from pearl.machine.transfers import sent
from pearl.models.linear import linear_of

_ROOM = 512  # rare tokens, at first
FRESH = 0.1  # share of new rare tokens in the text of late, above which the whole head is read
_FRESH_WEIGHT = 0.03  # of one more token in that share


@dataclass
class _Observed:
    tokens: list[int]
    fresh: float  # share of new rare tokens of late
    over: bool = False  # nothing is drafted for it until it goes on


class ReducedVocabHead(nn.Module):
    """Logits of the frequent tokens and of some rare ones; the others have -inf."""

    def __init__(self, head: nn.Linear, frequent: Tensor, always: Sequence[int] = ()):
        """frequent: int64 [N], ids; `always`: others beside them."""
        super().__init__()
        self.frequent = linear_of(head.weight.detach()[frequent])
        self.all = linear_of(head.weight.detach())
        self._head = [head]  # in a list, so that it is no submodule: only rows of it are used
        self._ids, self._size = frequent, head.out_features
        self._frequent = frozenset(frequent.tolist())  # here: a text that begins does not wait for the device
        self._always = [token for token in always if token < head.out_features]
        self._sequences: dict[int, _Observed] = {}
        self._settled = False  # a recorded forward reads the tensors of rare tokens, all of them
        self._rare: list[int] = []
        self._make_room(_ROOM)
        self.forget()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def draftable(self) -> set[int]:
        """Tokens that have a logit before they have come."""
        return {*self._frequent, *self._always}

    def forget(self, batch_slot: int = 0) -> None:
        """A new text begins. What is rare in one is draftable in those beside it too: it does no harm there. Until
        `observe_tokens` has told of a text, the whole head is read."""
        self._sequences.pop(batch_slot, None)
        self._rare = []
        self._known: set[int] = set(self._frequent)
        self._place(0)
        self._add(self._always)
        for other in self._sequences.values():
            if not other.over:
                self._add(other.tokens)
        self._choose()

    def end(self, batch_slot: int = 0) -> None:
        """A text is over, and calls for nothing any more; it may go on."""
        if observed := self._sequences.get(batch_slot):
            observed.over = True
            self._choose()

    def observe_tokens(self, tokens: Sequence[int], batch_slot: int = 0) -> None:
        """Tokens of the text become draftable; too many new ones call for the whole head."""
        before = self._sequences.get(batch_slot)
        fresh = tokens[shared_prefix(before.tokens, tokens) :] if before else tokens
        unknown = tokens if before and before.over else fresh  # texts that began meanwhile have left its own out
        new = {token for token in unknown if token not in self._known}
        rate = before.fresh if before else 0.0
        if before:  # a prompt's own tokens say nothing about what is being written
            for token in fresh:
                rate = ema(rate, token in new, weight=_FRESH_WEIGHT)
        self._sequences[batch_slot] = _Observed(list(tokens), rate)
        self._add(new)
        self._choose()

    @property
    def layout(self) -> tuple[bool, int]:
        """What a recorded forward can't change: whether the whole head is read, and how many rare tokens fit."""
        return self.whole, len(self._rare_ids)

    def settle(self) -> None:
        """From here on a forward reads the same tensors until there are more rare tokens than fit."""
        self._settled = True

    def _make_room(self, room: int) -> None:
        head = self._head[0].weight.detach()
        kind = torch.float32 if head.device.type == "cpu" else head.dtype
        self._rare_ids = torch.full((room,), self._size, device=head.device)  # beyond the vocabulary: nothing
        self._rare_rows = head.new_zeros(room, head.shape[1], dtype=kind)
        self._place(0)

    def _place(self, first: int) -> None:
        """The rare tokens from the one numbered `first` on, into the tensors that stay."""
        if len(self._rare) > len(self._rare_ids):
            self._make_room(2 * len(self._rare))
            return
        self._rare_ids[first:] = self._size
        if new := self._rare[first:]:
            ids = sent(torch.tensor(new), self._rare_ids.device)
            self._rare_ids[first : len(self._rare)] = ids
            rows = self._head[0].weight.detach()[ids]
            self._rare_rows[first : len(self._rare)] = rows.to(self._rare_rows.dtype)

    def _choose(self) -> None:
        live = [observed for observed in self._sequences.values() if not observed.over]
        self.whole = not self._sequences or any(observed.fresh > FRESH for observed in live)

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            return self.all(x)
        count = len(self._rare_ids) if self._settled else len(self._rare)
        ids, rows = self._rare_ids[:count], self._rare_rows[:count]
        logits = x.new_full((*x.shape[:-1], self._size + 1), -torch.inf)
        logits.index_copy_(-1, self._ids, self.frequent(x))
        logits.index_copy_(-1, ids, (x.to(rows.dtype) @ rows.T).to(logits.dtype))
        return logits[..., : self._size]

    def _add(self, tokens: Iterable[int]) -> None:
        new = [token for token in dict.fromkeys(tokens) if token not in self._known and token < self._size]
        if new:
            self._known |= set(new)
            self._rare += new
            self._place(len(self._rare) - len(new))


def reduce_vocab(model: PreTrainedModel, frequent: Tensor | int, always: Sequence[int] = ()) -> ReducedVocabHead | None:
    """Replaces the model's head by one that is cut to the tokens `frequent`, a number of them or their ids.

    None where that is not possible.
    """
    head = model.get_output_embeddings()
    ids = torch.arange(frequent) if isinstance(frequent, int) else frequent
    if type(head) is not nn.Linear or head.bias is not None or head.out_features <= len(ids):
        return None
    made = ReducedVocabHead(head, ids.to(head.weight.device), always)
    model.lm_head = made
    return made if model.get_output_embeddings() is made else None


def scatter_vocabulary(logits: Tensor, ids: Tensor, size: int) -> Tensor:
    """Over the whole vocabulary, [R, size], -inf where a head of fewer tokens has none.  logits: [R, D]; ids: int64
    [D], of its tokens in the whole."""
    return logits.new_full((len(logits), size), -torch.inf).index_copy_(1, ids, logits)
