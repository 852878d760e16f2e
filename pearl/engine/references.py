"""What the target alone writes after a prompt, for a drafter that has to know it (`pearl.drafters.synthetic`).

Such a drafter is an instrument: before one of its texts is written, the target writes the same text alone. Nobody sees
that text, and its time is in no record.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from pearl.core.params import SamplingParams
from pearl.engine.handle import GenerationHandle

KEPT = 4096  # texts; the oldest is forgotten


class References:
    """Of one engine. `wanted`: its drafter has to know them."""

    def __init__(self, wanted: bool):
        self._wanted = wanted
        self._texts: dict[Hashable, tuple[int, ...]] = {}

    def missing(self, handle: GenerationHandle) -> bool:
        return self._wanted and handle.run.schedule.drafts and _key(handle.prompt, handle.params) not in self._texts

    def learn(self, handle: GenerationHandle, tokens: Sequence[int]) -> None:
        """The target alone has written them."""
        if self._wanted:
            self._texts[_key(handle.prompt, handle.params)] = tuple(tokens)
            while len(self._texts) > KEPT:
                del self._texts[next(iter(self._texts))]

    def of(self, handle: GenerationHandle) -> tuple[int, ...]:
        return self._texts.get(_key(handle.prompt, handle.params), ()) if self._wanted else ()


def _key(prompt: Sequence[int], params: SamplingParams) -> Hashable:
    return tuple(prompt), repr(params)
