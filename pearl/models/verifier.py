"""The target's side of a model: it verifies chains and trees of guesses, of one sequence or of several in one forward.

Every row of logits has the bits that it would have in any other verification: forwards are padded to row counts whose
bits are equal (`pearl.core.token_buckets`). Refuses to know what the logits are for (`pearl.roles.target`).

Letters: V tokens of the vocabulary, F numbers of the hooked layers' hidden states.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pearl.core.messages import Features
from pearl.core.token_buckets import ANY, LIMIT, BatchedTokenBuckets, Check, TokenBuckets
from pearl.machine.device_features import DeviceFeatures
from pearl.machine.transfers import select_rows
from pearl.models.hidden_states import HiddenStateHooks
from pearl.models.language_model import LanguageModel, SideRow
from pearl.models.static_shapes.one_text import ForwardRows

# rows of a sequence in the attention of a shared forward: few kinds, so that many share a call
QUERY_COUNTS = (4, 8)
Part = tuple[int, ForwardRows]  # of a forward that several sequences share: a batch slot, and its rows


@dataclass(frozen=True)
class SequenceQuery:
    """What is asked of one sequence in a forward that several have together; see `LanguageModel.read`."""

    batch_slot: int
    tokens: Sequence[int]
    keep: int
    side_rows: Sequence[SideRow] = ()


class VerifierModel(LanguageModel):
    """A target on one device, or with layers on several."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: int,
        max_length: int,
        buckets: TokenBuckets = ANY,
        hooks: HiddenStateHooks | None = None,
        max_sequences: int = 1,
        coarse: bool = False,
    ):
        super().__init__(model, vocabulary, max_length, max_sequences, coarse, hooks)
        self.buckets = buckets
        # row counts of shared forwards; None: each sequence has its own
        self.batched_buckets: BatchedTokenBuckets | None = None
        self.checks: tuple[Check, ...] = ()  # what was found of its bits (`pearl.models.numerics_check`)
        self.gives_features = hooks is not None
        self.features_stay = False  # on the device, for a transport that takes them from there

    @property
    def verifies_trees(self) -> bool:
        """Whether `read` takes side rows."""
        return self.buckets.branches and self.shares_forwards

    @property
    def trial(self) -> SharedForwardTrial:
        """For the calibration of shared forwards."""
        return SharedForwardTrial(self)

    @torch.inference_mode()
    def with_a_row_at(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits [len(tokens), V] of a text read from its beginning, beside a row at `position` that nobody sees."""
        self.forget()
        laid = self.place_rows(list(tokens), 0, pads=1)
        return self.run(laid.tokens, [*laid.positions[:-1], position], laid.cache)[:-1, : self.vocabulary]

    @torch.inference_mode()
    def read_together(self, queries: Sequence[SequenceQuery]) -> list[Tensor]:
        """As `read`, for several sequences in one forward, each with the bits that it has alone."""
        if len(queries) == 1 or self.batched_buckets is None:
            return [self.read(one.tokens, one.keep, one.side_rows, one.batch_slot) for one in queries]
        found: dict[int, Tensor] = {}  # [rows, V] by batch slot
        parts: list[Part] = []
        for one in sorted(queries, key=lambda one: one.batch_slot):
            tokens = list(one.tokens)
            new, sides = self.begin(one.batch_slot, tokens, one.keep, one.side_rows, LIMIT)
            count, first = len(new) + len(sides), len(tokens) - len(new)
            most = min(LIMIT, self.batched_buckets.most) if self.shared else self.batched_buckets.most
            if count > most:  # no shared one is that wide
                pads = self.buckets.pad(count) - count
                logits = self.forward(new, first, count + pads, sides, pads, one.batch_slot)
                found[one.batch_slot] = logits[:count]
                continue
            if _rows(parts) + count > self.batched_buckets.most:
                found |= self.forward_together(parts, self.batched_buckets)
                parts = []
            parts.append((one.batch_slot, self.note_rows(new, first, sides, one.batch_slot)))
        found |= self.forward_together(parts, self.batched_buckets) if parts else {}
        for one in queries:
            chain = len(found[one.batch_slot]) - len(one.side_rows)
            sides = [(chain - one.keep + parent, token) for parent, token in one.side_rows]
            self._slots[one.batch_slot].done(list(one.tokens), chain, sides)
        return [found[one.batch_slot][-one.keep - len(one.side_rows) :, : self.vocabulary] for one in queries]

    @torch.inference_mode()
    def prepare(self, query: SequenceQuery) -> None:
        """Fills the buffers of a read that is likely to be the next one."""
        count = query.keep + len(query.side_rows)
        if self.static and self.static.supports(self.buckets.pad(count)) and not self._slots[query.batch_slot].tree:
            first, tokens = len(query.tokens) - query.keep, list(query.tokens[-query.keep :])
            if first + count <= self.max_length:
                rows = self.forward_rows(tokens, first, query.side_rows, self.buckets.pad(count))
                self.static.prepare(self._slots[query.batch_slot].cache, rows)

    def forward_together(self, parts: Sequence[Part], buckets: BatchedTokenBuckets) -> dict[int, Tensor]:
        """One forward of the rows of several sequences, of a row count of `buckets`: logits [rows, V] by batch slot."""
        count, lengths = buckets.pad(_rows(parts)), [len(rows.tokens) for _, rows in parts]
        queries = [self.buckets.least(next((most for most in QUERY_COUNTS if most >= n), n)) for n in lengths]
        if self.shared and self.shared.supports(count):
            logits, states = self.shared(parts, max(queries), count)
            logits, states = logits.clone(), None if states is None else states.clone()
            ends = list(itertools.accumulate(lengths))
            places = {slot: slice(end - n, end) for (slot, _), n, end in zip(parts, lengths, ends, strict=True)}
        else:
            placed = [self.place(rows, 0, batch_slot) for batch_slot, rows in parts]
            logits, places = self.run_together(placed, queries, count - sum(lengths))
            states = self._hooks.states()[0] if self._hooks else None
        for batch_slot, place in places.items():
            if states is not None:
                self._slots[batch_slot].states.append(states[place])
        return {batch_slot: logits[place] for batch_slot, place in places.items()}

    def features(self, rows: Sequence[int], batch_slot: int = 0) -> Features | None:
        """The hooked layers' hidden states at rows of the last read; None without hooks.

        Rows are numbered as its logits are; those before the first one, as far as they were read, are negative. Returns
        [rows, F]: int16, the bits of bfloat16, or what stays on the device if `features_stay`.
        """
        if self._hooks is None:
            return None
        slot = self._slots[batch_slot]
        states = torch.cat(slot.states) if len(slot.states) > 1 else slot.states[0]
        features = DeviceFeatures(select_rows(states, [slot.before + row for row in rows]).to(torch.bfloat16))
        return features if self.features_stay else features.bits()


def _rows(parts: Sequence[Part]) -> int:
    return sum(len(rows.tokens) for _, rows in parts)


class SharedForwardTrial:
    """Forwards of chosen row counts that all batch slots share, for the calibration of their bits and times."""

    def __init__(self, model: VerifierModel):
        self._model = model

    @torch.inference_mode()
    def copy_first(self, tokens: int) -> None:
        """Gives all batch slots the keys and values that the first has of so many tokens."""
        self._model.buffers.copy_first(tokens)

    @torch.inference_mode()
    def read(self, tokens: Sequence[int], first: int, lengths: Sequence[int], count: int) -> list[Tensor]:
        """Logits [lengths[i], V] of a forward in which batch slot i reads so many of `tokens` at the positions from
        `first`, and which has `count` rows."""
        model = self._model
        parts = [(slot, model.note_rows(list(tokens[:n]), first, (), slot)) for slot, n in enumerate(lengths) if n]
        found = model.forward_together(parts, BatchedTokenBuckets((count,), (0.0,)))
        return [logits[:, : model.vocabulary] for logits in found.values()]
