"""The addresses under which texts are asked for, and tokens are made and read."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from pearl.core.params import SamplingParams
from pearl.errors import PearlError, UsageError
from pearl.server import streaming
from pearl.server.api import chat, completions, sampling
from pearl.server.api.answers import Answer, Asked
from pearl.server.api.chat import ChatAnswer
from pearl.server.api.completions import CompletionAnswer
from pearl.server.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Error,
    Prediction,
    TokenizeRequest,
)
from pearl.server.api.token_names import TokenNames
from pearl.server.errors import TOO_LONG, bad, from_engine
from pearl.server.life import EACH, Service, beside

_LONG_WORD = 64  # characters of a token at most, on average over a text
LABEL = "X-Pearl-Label"  # by which a page that watches knows its texts again
_MEANINGS = {
    400: "A value that can't be carried out.",
    401: "The API key is missing or wrong.",
    404: "The model is not here.",
    408: "The body did not come.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "The queue is full; see Retry-After.",
    500: "An error of the server's own.",
    503: "It is being loaded, is shutting down, or has failed.",
    504: "The request has taken too long.",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error, "description": _MEANINGS[status]} for status in statuses}


_TEXTS = _errors(*_MEANINGS)
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
_TOKENS = _errors(400, 404, 408, 413, 415, 500, 503)


def make_router(service: Service) -> APIRouter:
    router = APIRouter()
    writer = Writer(service)

    @router.get("/v1/models", responses=_errors(401, 503))
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_card(service)]})

    @router.get("/v1/models/{model:path}", responses=_errors(401, 404, 503))
    async def model(model: str) -> Response:
        service.check_model(model or "/")  # an address that ends before the name; in a body "" is no name, as in vLLM
        return JSONResponse(_card(service))

    @router.post("/v1/chat/completions", responses=_TEXTS | _STREAM)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The answer to a conversation, whole or as a stream."""
        return await writer.answer(request, body, writer.chat)

    @router.post("/v1/completions", responses=_TEXTS | _STREAM)
    async def text_completions(body: CompletionRequest, request: Request) -> Response:
        """What follows one prompt or several, whole or as a stream."""
        return await writer.answer(request, body, writer.completion)

    @router.post("/tokenize", responses=_TOKENS)
    async def tokenize(body: TokenizeRequest) -> Response:
        return JSONResponse(await writer.tokenize(body))

    @router.post("/detokenize", responses=_TOKENS)
    async def detokenize(body: DetokenizeRequest) -> Response:
        return JSONResponse({"prompt": await writer.detokenize(body)})

    @router.get("/tokenizer_info", responses=_errors(503))
    async def tokenizer_info() -> Response:
        return JSONResponse(writer.tokenizer_info())

    return router


def _card(service: Service) -> dict[str, Any]:
    length = service.max_length
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "pearl",
        "root": service.model,
        "max_model_len": length,
    }


class Writer:
    """Makes requests ready, and has them answered."""

    def __init__(self, service: Service):
        self._service = service
        self._names: TokenNames | None = None

    @property
    def names(self) -> TokenNames:
        self._names = self._names or TokenNames(self._service.engine.tokenizer)
        return self._names

    async def answer(
        self, request: Request, body: ChatRequest | CompletionRequest, make: Callable[[Any, float], Awaitable[Answer]]
    ) -> Response:
        arrived, service = time.perf_counter(), self._service
        size = math.inf if body.bad_words else float(request.headers.get("content-length", "inf"))
        service.check_open()
        service.check_model(body.model)
        sampling.refuse(body)
        try:
            answer = await make(body, size)
            answer.prediction = await self._prediction(body.prediction)
            label = request.headers.get(LABEL, "")[:64]
            texts, guesses = answer.asked.texts, answer.prediction
            feed = await service.submit(texts, body.mode, body.gamma, guesses, arrived, label, size)
        except PearlError as error:
            raise from_engine(error, sampling.FIELDS) from None
        if body.stream:
            return streaming.stream(feed, answer, service.release)
        return await streaming.whole(request, feed, answer, service.release)

    async def chat(self, body: ChatRequest, size: float) -> Answer:
        """`size`: bytes of the request, which what it asks for is no larger than."""
        if body.echo:
            raise bad("echo is for /v1/completions: leave it out.", "echo")
        service, given = self._service, chat.messages(body.messages)
        ids = await service.encode([given], at_most=service.max_length, **chat.template(body))
        asked = await self._asked(body, ids, size)
        return ChatAnswer(body, asked, service.model, self.names, self._metrics(body))

    async def completion(self, body: CompletionRequest, size: float) -> Answer:
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise bad("best_of must be n: this server shows every text that it writes.", "best_of")
        service, special = self._service, body.add_special_tokens is not False
        ids = await service.encode(completions.prompts(body), special, service.max_length)
        asked = await self._asked(body, ids, size)
        echoed = await beside(size, lambda: [self._spelt(one, body) for one in ids]) if body.echo else ()
        return CompletionAnswer(body, asked, self._service.model, self.names, self._metrics(body), echoed)

    async def _asked(self, body: ChatRequest | CompletionRequest, prompts: list[list[int]], size: float) -> Asked:
        def made() -> Asked:
            asked = Asked(prompts, [self._params(body, one) for one in prompts])
            asked.texts  # noqa: B018 (made once, here)
            return asked

        return await beside(size + EACH * len(prompts) * (body.n or 1), made)

    def _spelt(self, ids: list[int], body: CompletionRequest) -> str:
        text: str = self._service.engine.tokenizer.decode(
            ids, skip_special_tokens=body.skip_special_tokens is not False, clean_up_tokenization_spaces=False
        )
        return text

    def _params(self, body: ChatRequest | CompletionRequest, ids: list[int]) -> SamplingParams:
        length, needed = self._service.max_length, sampling.needs(body)
        if len(ids) + needed > length:
            raise bad(
                f"This model's maximum context length is {length} tokens. The prompt has {len(ids)}, and {needed} are "
                "to be written: shorten one of them.",
                "messages" if isinstance(body, ChatRequest) else "prompt",
                TOO_LONG,
            )
        return sampling.sampling(body, length - len(ids), self._service.engine.defaults.served)

    async def _prediction(self, given: Prediction | None) -> list[int] | None:
        text = chat.text_of(given.content, "prediction.content") if given else None
        if not text:
            return None
        length = self._service.max_length  # an answer holds no more of it, in however long words
        return (await self._service.encode([text[: _LONG_WORD * length]], special=False))[0][:length]

    def _metrics(self, body: ChatRequest | CompletionRequest) -> str | None:
        wanted = body.spec_decode_metrics or self._service.config.per_request_spec_decode_metrics
        return None if wanted == "off" else wanted

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        service = self._service
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad("Give either prompt or messages.", "prompt")
        sampling.refuse(body)
        if body.messages is not None and body.add_special_tokens:
            raise bad("add_special_tokens is for a prompt: a chat template writes its own.", "add_special_tokens")
        try:
            if body.messages is not None:
                (ids,) = await service.encode([chat.messages(body.messages)], **chat.template(body))
            else:
                (ids,) = await service.encode([body.prompt], body.add_special_tokens is not False)
        except UsageError as error:
            raise from_engine(error) from None
        found = {"count": len(ids), "max_model_len": service.max_length, "tokens": ids}
        if not body.return_token_strs:
            return found | {"token_strs": None}
        return found | {"token_strs": await beside(len(ids), lambda: list(map(self.names.text_of, ids)))}

    async def detokenize(self, body: DetokenizeRequest) -> str:
        service = self._service
        service.check_model(body.model)
        size = service.engine.runtime.checked.vocabulary
        if (highest := max(body.tokens, default=0)) >= size:
            raise bad(f"tokens must be below {size}, the vocabulary, not {highest}.", "tokens")
        decode = partial(service.engine.tokenizer.decode, body.tokens, clean_up_tokenization_spaces=False)
        text: str = await beside(len(body.tokens), decode)
        return text

    def tokenizer_info(self) -> dict[str, Any]:
        tokenizer = self._service.engine.tokenizer
        specials = {name: getattr(tokenizer, name) for name in ("eos_token", "bos_token", "pad_token", "unk_token")}
        return {
            "tokenizer_class": type(tokenizer).__name__,
            **specials,
            "chat_template": tokenizer.chat_template,
            "model_max_length": self._service.max_length,
        }
