"""What is asked for, and what is returned: a request, and the text that came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from pearl.core import records
from pearl.core.logits.logprobs import Logprobs
from pearl.core.params import SamplingParams
from pearl.machine import memory
from pearl.roles.sequence import SequenceState


class TokenArray(Protocol):
    """A numpy array or a torch tensor of token ids, [L] or [1, L]."""

    @property
    def dtype(self) -> Any: ...

    @property
    def shape(self) -> Any: ...

    def tolist(self) -> Any: ...


Prompt = str | Sequence[int] | TokenArray | Sequence[Mapping[str, Any]]  # a text, its ids, or the messages of a chat
ABORTED, REFUSED = "abort", "error"  # ends of a text, beside those of `pearl.core.stopping`


class Usage(NamedTuple):
    """Tokens that were read and written."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class Generation:
    """One text. `tokens` are the new ones, with the end-of-sequence token if it came; `stats` is its record. Printed,
    it is its text."""

    tokens: list[int] = field(repr=False)
    text: str
    finish_reason: str  # "eos", "stop" or "length"; "abort"; "error" of one that failed alone
    stats: records.GenerationStats = field(repr=False)
    stop_reason: str | int | None = field(default=None, repr=False)  # the stop string or stop token that ended it
    seed: int | None = field(default=None, repr=False)  # of its sample, also where nobody has chosen one
    logprobs: Sequence[Logprobs] | None = field(default=None, repr=False)  # of each token, if they were asked for
    prompt_logprobs: Sequence[Logprobs | None] | None = field(default=None, repr=False)  # the first token has none
    others: tuple[Generation, ...] = field(default=(), repr=False)  # the other samples, of params with n above 1
    error: Exception | None = field(default=None, repr=False)  # why it was refused, or ended

    def __str__(self) -> str:
        return self.text

    @property
    def usage(self) -> Usage:
        return Usage(self.stats.prompt_tokens, sum(len(one.tokens) for one in self.outputs))

    @property
    def outputs(self) -> list[Generation]:
        """All n samples, itself the first."""
        return [self, *self.others]


@dataclass(eq=False)
class GenerationRequest:
    """A text to be written, one of several. `after`: one that the prompt begins with, so that what was read of its text
    need not be read again. `label`: by which somebody who watches the engine knows it."""

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    after: GenerationRequest | None = None
    label: str = ""
    sequence: SequenceState | None = field(default=None, repr=False)  # what became of it


Written = tuple[GenerationRequest, list[int] | Generation]  # the tokens of a pass; at last the whole text


def written(text: SequenceState, batch_size: int, sent: int) -> Generation:
    """A text that is over. `batch_size`: texts that could be under way; `sent`: its share of the bytes on the wire."""
    stopper, drafter = text.stopper, text.draft_stats
    stats = records.GenerationStats(
        mode=text.schedule.mode,
        prompt_tokens=len(text.request.prompt),
        tokens=tuple(stopper.tokens),
        text=stopper.text,
        finish=stopper.finish or ABORTED,
        passes=tuple(text.passes),
        drafter=drafter,
        bytes_on_wire=sent,
        peak_memory=memory.peak() + (drafter.memory if drafter else 0),
        cached_tokens=0 if text.prompt_logprobs is not None else text.cached,  # to be scored, it was read whole
        places=batch_size,
        began_s=text.placed,
        ended_s=text.ended,
    )
    return Generation(
        list(stopper.tokens),
        stats.text,
        stats.finish,
        stats,
        stopper.reason,
        None if text.params.greedy else text.params.seed,
        text.logprobs if text.params.logprobs is not None else None,
        text.prompt_logprobs,
    )


def unwritten(mode: str, prompt_tokens: int = 0, error: Exception | None = None) -> Generation:
    """A text that was never begun: nobody wants it any more, or its prompt was refused."""
    finish = REFUSED if error else ABORTED
    stats = records.GenerationStats(mode, prompt_tokens, (), "", finish, (), None, 0, 0)
    return Generation([], "", finish, stats, error=error)


def gathered(texts: Sequence[Sequence[Generation]]) -> list[Generation]:
    """Of each prompt's samples the first, with the others. Raises what the first has met if all have failed."""
    errors = [one.error for samples in texts for one in samples]
    if errors and all(errors) and errors[0]:
        raise errors[0]
    return [replace(first, others=tuple(others)) if others else first for first, *others in texts]
