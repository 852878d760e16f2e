"""What answers have in common: who they are, what was used, and what is told beside the text."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pearl.core.logits.logprobs import Logprobs
from pearl.core.params import SamplingParams
from pearl.engine import Generation
from pearl.server.api.schemas import ChatRequest, CompletionRequest
from pearl.server.api.token_names import TokenNames
from pearl.server.metrics import FINISH, speculation
from pearl.server.texts import Text

SUMMARY, DETAILED = "summary", "detailed"


@dataclass(frozen=True)
class Asked:
    """A request made ready. `params`: of each prompt, with n samples."""

    prompts: list[list[int]]
    params: list[SamplingParams]

    @cached_property
    def texts(self) -> list[tuple[list[int], SamplingParams]]:
        """In the order of the choices: the samples of the first prompt, those of the second, ..."""
        pairs = zip(self.prompts, self.params, strict=True)
        return [(prompt, sample) for prompt, own in pairs for sample in own.samples()]


class Answer(ABC):
    """To one request. `chunk` objects have the same id, time and model."""

    prefix = kind = chunk_kind = ""

    def __init__(
        self, request: ChatRequest | CompletionRequest, asked: Asked, model: str, names: TokenNames, metrics: str | None
    ):
        """`metrics`: how much is told of the drafting, `SUMMARY` or `DETAILED`."""
        self.request, self.asked, self.names = request, asked, names
        self.prediction: Sequence[int] | None = None  # tokens of a text that the answer may repeat
        self._metrics = metrics if len(asked.texts) == 1 else None
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._n = asked.params[0].n
        self._as_ids, self._with_ids = bool(request.return_tokens_as_token_ids), bool(request.return_token_ids)
        options = request.stream_options
        self.with_usage = bool(options and options.include_usage)
        self._running_usage = self.with_usage and bool(options and options.continuous_usage_stats)

    def params(self, text: Text) -> SamplingParams:
        return self.asked.params[text.index // self._n]

    def prompt(self, text: Text) -> list[int]:
        return self.asked.prompts[text.index // self._n]

    def wants_logprobs(self, text: Text) -> bool:
        return self.params(text).logprobs is not None

    def shown(self, tokens: int) -> int:
        """Of so many tokens written, those that were asked for."""
        return tokens

    # A whole answer

    def whole(self, texts: Sequence[Text]) -> dict[str, Any]:
        """Of texts that are all over."""
        body = self._head | {"object": self.kind, "choices": [self._choice(one) for one in texts]}
        return body | {"usage": self._used(texts)} | self._told(texts)

    @abstractmethod
    def _choice(self, text: Text) -> dict[str, Any]: ...

    # A stream

    @abstractmethod
    def opening(self, text: Text) -> dict[str, Any] | None:
        """A choice before any token; None: nothing is said there."""

    @abstractmethod
    def delta(self, text: Text, piece: str, tokens: Sequence[int]) -> dict[str, Any] | None:
        """A choice with what a pass has added; None: nothing that a client could see."""

    @abstractmethod
    def closing(self, text: Text) -> dict[str, Any]:
        """A choice of no text, with the reason."""

    def chunk(self, choices: list[dict[str, Any]], texts: Sequence[Text]) -> dict[str, Any]:
        made = self._head | {"object": self.chunk_kind, "choices": choices}
        if self.with_usage:
            made["usage"] = self.usage(texts) if self._running_usage else None
        return made

    def last(self, texts: Sequence[Text]) -> dict[str, Any]:
        """The chunk with what was used."""
        return self.chunk([], texts) | {"usage": self._used(texts)} | self._told(texts)

    # Both

    def usage(self, texts: Sequence[Text]) -> dict[str, Any]:
        """Of a text that is not over, so far."""
        prompts = sum(map(len, self.asked.prompts))
        written = sum(self.shown(one.told) for one in texts)
        return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}

    def _used(self, texts: Sequence[Text]) -> dict[str, Any]:
        """Of texts that are all over: also tokens of prompts that earlier texts had read, and tokens of a prediction
        that the texts hold, or do not."""
        ended = [self.ended(one) for one in texts]
        used = self.usage(texts) | {"prompt_tokens_details": {"cached_tokens": 0}}
        used["prompt_tokens_details"]["cached_tokens"] = sum(one.stats.cached_tokens for one in ended[:: self._n])
        if self.prediction:
            written = Counter(token for one in ended for token in one.tokens[: self.shown(len(one.tokens))])
            accepted = (Counter(self.prediction) & written).total()
            rejected = len(self.prediction) - accepted
            details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
            used["completion_tokens_details"] = details
        return used

    def finish(self, text: Text) -> dict[str, Any]:
        ended = self.ended(text)
        return {
            "finish_reason": FINISH.get(ended.finish_reason, ended.finish_reason),
            "stop_reason": ended.stop_reason,
        }

    def ended(self, text: Text) -> Generation:
        assert text.ended, "a text that is over"
        return text.ended

    def logprobs_of(self, text: Text, first: int, tokens: Sequence[int]) -> Sequence[Logprobs]:
        """Of the tokens from number `first` on."""
        state = text.handle.request.sequence
        assert state, "a text that was begun"
        return state.logprobs[first : first + len(tokens)]

    def _told(self, texts: Sequence[Text]) -> dict[str, Any]:
        if not self._metrics:
            return {}
        drafting = speculation(self.ended(texts[0]).stats.passes, self._metrics == DETAILED)
        return {"metrics": {"speculative_decoding": drafting}}
