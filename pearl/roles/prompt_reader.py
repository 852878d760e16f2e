"""Reads prompts a piece at a time, and keeps the hidden states of what was read for a drafter that wants them."""

from __future__ import annotations

from collections.abc import Sequence

from pearl.core.logits.logprobs import Logprobs, logprobs
from pearl.core.messages import Features, joined
from pearl.core.trie import Node
from pearl.models.language_model import PREFILL_CHUNK
from pearl.roles.sequence import SequenceState
from pearl.roles.target_model import TargetModel
from pearl.roles.verification import PassWalk
from pearl.wire.channel import Clock


class PromptReader:
    """Works between the passes of the other sequences."""

    def __init__(self, model: TargetModel, clock: Clock):
        self._model, self._clock = model, clock

    def restore(self, sequence: SequenceState) -> bool:
        """Goes on in a prompt by what was read of it in earlier texts; its end is read in any case. False: nothing
        was."""
        began = self._clock()
        if count := self._model.restore(sequence.trie.tokens[:-1], sequence.batch_slot):
            self._gather(sequence, range(1 - count, 1))
            sequence.read += count
            sequence.cached += count
            sequence.reading_s += self._clock() - began
        return count > 0

    def read_on(self, sequence: SequenceState) -> bool:
        """Reads a piece of a prompt, while other sequences wait. True: but the last, which is for the first pass."""
        end, prompt = sequence.read + PREFILL_CHUNK, sequence.trie.tokens
        if end >= len(prompt):
            return True
        began = self._clock()
        self._model.read(prompt[:end], 1, batch_slot=sequence.batch_slot)
        self._gather(sequence, range(1 - PREFILL_CHUNK, 1))
        sequence.read = end
        sequence.reading_s += self._clock() - began
        return False

    def logprobs(self, prompt: Sequence[int], most: int, batch_slot: int) -> list[Logprobs | None]:
        """Of each token of a prompt, the first of which follows nothing. A reading of its own, of which nothing is
        kept: more rows of a head would change the bits of the one that the text begins with."""
        found: list[Logprobs | None] = [None]
        self._model.forget(batch_slot=batch_slot)
        for first in range(0, len(prompt) - 1, PREFILL_CHUNK):
            after = prompt[first + 1 : first + 1 + PREFILL_CHUNK]
            logits = self._model.read(prompt[: first + len(after)], len(after), batch_slot=batch_slot)
            found += logprobs(logits, after, most)
        self._model.forget(batch_slot=batch_slot)
        return found

    def features(self, sequence: SequenceState, nodes: Sequence[Node], walked: PassWalk) -> Features | None:
        """What the drafter is told of the tokens that a pass has read for good: the root and every committed token but
        the last; in the first pass also of all tokens before them. `nodes`: of the rows of the pass."""
        if not self._model.gives_features:
            return None
        rows = {node: row for row, node in enumerate(nodes)}
        passed = [rows[node] for node in walked.nodes]
        if sequence.passes:
            return self._gather(sequence, passed)
        rest = len(sequence.request.prompt) - sequence.read
        self._gather(sequence, [*range(1 - rest, 0), *passed])
        return joined(sequence.features)

    def _gather(self, sequence: SequenceState, rows: Sequence[int]) -> Features | None:
        features = self._model.features(rows, sequence.batch_slot)
        if features is not None:
            sequence.features.append(features)
        return features
