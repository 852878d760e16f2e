"""What a drafter that begins anew has to be told of the texts under way.

It is told each as if it had begun late: the same start, and one verdict that holds all tokens committed since.

Knows: what was said. Refuses to know: to whom, and when.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pearl.config.engine_config import MAX_SEQUENCES
from pearl.core.messages import DraftStats, End, Features, Message, SentSeparately, Start, Verdict, joined


@dataclass
class _Told:
    """A text under way, as the drafter was told it."""

    start: Start
    tokens: list[int] = field(default_factory=list)  # committed after the prompt
    features: list[Features] = field(default_factory=list)
    last: Verdict | None = None

    def again(self) -> Iterator[Message]:
        yield self.start
        if self.last:
            yield replace(self.last, tokens=tuple(self.tokens), features=joined(self.features))


class ReplayLog:
    """The texts under way, and those that have ended but whose report may still come."""

    def __init__(self) -> None:
        self._texts: dict[int, _Told] = {}
        self._ended: set[int] = set()

    def __len__(self) -> int:
        """Texts under way."""
        return len(self._texts)

    def said(self, message: Message) -> None:
        """Keeps what the target has said."""
        if isinstance(message, Start):
            self._texts[message.sequence_id] = _Told(message)
        elif isinstance(message, Verdict):
            told = self._texts[message.sequence_id]
            told.last = message
            told.tokens += message.tokens
            if message.features is not None:
                assert not isinstance(message.features, SentSeparately), "the target says features, not where they are"
                told.features.append(message.features)
        elif isinstance(message, End):
            self._texts.pop(message.sequence_id, None)
            self._ended = {message.sequence_id, *sorted(self._ended)[-MAX_SEQUENCES:]}

    def heard(self, message: Message) -> bool:
        """Whether the drafter's message is of a text that somebody still wants to hear of."""
        known = message.sequence_id in self._texts or message.sequence_id in self._ended
        if isinstance(message, DraftStats):
            self._ended.discard(message.sequence_id)
        return known

    def roots(self, sequence_id: int) -> tuple[int, int] | None:
        """The positions that the root of a text under way has had: the first and the last."""
        if told := self._texts.get(sequence_id):
            first = len(told.start.prompt) - 1
            return first, first + len(told.tokens)
        return None

    def again(self) -> Iterator[list[Message]]:
        """All that a new drafter is told, text by text. Of texts that have ended it knows nothing, and says so in its
        report."""
        for told in self._texts.values():
            yield list(told.again())
        for sequence_id in sorted(self._ended):
            yield [End(sequence_id)]
