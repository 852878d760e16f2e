"""Reads prompts a piece at a time, and keeps the hidden states of what was read for a drafter that wants them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pearl.core.logits.logprobs import logprobs
from pearl.core.messages import Features, joined
from pearl.core.token_buckets import PREFILL_CHUNK
from pearl.core.trie import Node
from pearl.roles.sequence import SequenceState
from pearl.roles.target_model import TargetModel
from pearl.roles.verification import PassWalk
from pearl.wire.channel import Clock


class PromptReader:
    """Works between the passes of the other sequences. A prompt is read in pieces of `PREFILL_CHUNK` tokens whatever
    the budget is, as its bits depend on where they end; the budget says how many there are a turn."""

    def __init__(self, model: TargetModel, clock: Clock, budget: int = PREFILL_CHUNK):
        """`budget`: tokens that may be read between two passes of texts that are further, on the average."""
        self._model, self._clock, self._budget = model, clock, budget
        self._left = 0  # of it; below 0: later turns read nothing until it is earned

    def turns(self, reading: Sequence[SequenceState], alone: bool) -> Iterator[SequenceState]:
        """Whose piece is read next, in one turn of the loop: who has read least, so that nobody waits for the whole of
        a long prompt. `alone`: no other text waits for its pass. Then it is one piece, and who has come meanwhile may
        have the next."""
        left = list(reading)
        self._left = min(self._left, 0) + self._budget if left and not alone else 0
        while left and (self._left > 0 or alone):
            one = min(left, key=_read)
            before = _read(one)
            yield one
            read = _read(one) - before
            self._left -= read or len(one.request.prompt) - one.read  # nothing yet: its first pass reads the rest
            left = [one for one in left if not (one.passes or alone)]

    def restore(self, sequence: SequenceState) -> bool:
        """Goes on in a prompt by what was read of it in earlier texts; its end is read in any case. False: nothing
        was, or all of it is to be read for its log-probabilities first."""
        if _to_score(sequence):
            return False
        began = self._clock()
        if count := self._model.restore(sequence.trie.tokens[:-1], sequence.batch_slot):
            self._gather(sequence, range(1 - count, 1))
            sequence.read += count
            sequence.cached += count
            sequence.reading_s += self._clock() - began
        return count > 0

    def read_on(self, sequence: SequenceState) -> bool:
        """Reads a piece of a prompt, or scores one, while others wait. True, and nothing is read: only the last piece
        is left, which is for the first pass."""
        if _to_score(sequence):
            self._score(sequence)
            return False
        end, prompt = sequence.read + PREFILL_CHUNK, sequence.trie.tokens
        if end >= len(prompt):
            return True
        began = self._clock()
        self._model.read(prompt[:end], 1, batch_slot=sequence.batch_slot)
        self._gather(sequence, range(1 - PREFILL_CHUNK, 1))
        sequence.read = end
        sequence.reading_s += self._clock() - began
        return False

    def _score(self, sequence: SequenceState) -> None:
        """The log-probabilities of a piece of a prompt, the first token of which follows nothing. A reading of its own,
        of which nothing is kept: more rows of a head would change the bits of the one that the text begins with."""
        found, most = sequence.prompt_logprobs, sequence.params.prompt_logprobs
        assert found is not None and most is not None, "one whose log-probabilities are asked for"
        prompt, slot, first = sequence.request.prompt, sequence.batch_slot, len(found) - 1
        after = prompt[first + 1 : first + 1 + PREFILL_CHUNK]
        began = self._clock()
        logits = self._model.read(prompt[: first + len(after)], len(after), batch_slot=slot)
        found += logprobs(logits, after, most)
        sequence.reading_s += self._clock() - began
        if len(found) == len(prompt):
            self._model.forget(batch_slot=slot)

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


def _read(sequence: SequenceState) -> int:
    """Tokens that were read of its prompt, as often as they were."""
    return sequence.read - sequence.cached + len(sequence.prompt_logprobs or ())


def _to_score(sequence: SequenceState) -> bool:
    """Whether log-probabilities of its prompt are still to be found."""
    return sequence.prompt_logprobs is not None and len(sequence.prompt_logprobs) < len(sequence.request.prompt)
