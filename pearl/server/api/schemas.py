"""The bodies of requests, with the types and limits that a client may rely on; what they mean is in `sampling`.

Unknown fields are let through, as clients send many that say nothing of the text. Null is everywhere the same as
nothing. `None` in a field that the engine has a default for leaves it to the checkpoint.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pearl.core.schedule import MAX_GAMMA

MOST_LOGPROBS, MOST_CHOICES, MOST_TEXTS = 20, 128, 2048
_TOKEN = Annotated[int, Field(ge=0, lt=1 << 31)]
_COUNT = Annotated[int, Field(ge=0, lt=1 << 31)]
_PENALTY = Annotated[float, Field(ge=-2, le=2)]
_INT64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
_ONE_FAULT = Field(fail_fast=True)  # of a list: one that is wrong all through has a fault for each item
_TOKENS = Annotated[list[_TOKEN], _ONE_FAULT]
_TEXTS = Annotated[list[str], _ONE_FAULT]


def _biases(given: dict[str, Any]) -> dict[str, float]:
    for value in given.values():
        if not (type(value) in (int, float) and abs(value) <= 100):
            raise ValueError("the numbers must be from -100 to 100")
    return given


class Body(BaseModel):
    """Numbers are numbers: "3" is none, and neither is true."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(Body):
    type: str


class TextPart(Body):
    type: str
    text: str | None = None


_Content = str | Annotated[list[TextPart], _ONE_FAULT]


class Message(Body):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: _Content | None = None


class Prediction(Body):
    """What the text will be for the most part: it is drafted from, and changes no token."""

    type: str | None = None
    content: _Content


class Sampled(Body):
    """What both endpoints take."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: _INT64 | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: str | _TEXTS | None = None
    stop_token_ids: _TOKENS | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: _COUNT | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: _PENALTY | None = None
    frequency_penalty: _PENALTY | None = None
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    no_repeat_ngram_size: _COUNT | None = None
    logit_bias: Annotated[dict[str, Any], AfterValidator(_biases)] | None = None
    bad_words: _TEXTS | None = None
    allowed_token_ids: _TOKENS | None = None
    suppress_tokens: _TOKENS | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    prediction: Prediction | None = None
    mode: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="how it is decoded: ar, sd, pearl, tree, ...; the text is the same"
    )
    gamma: Annotated[int, Field(ge=0, le=MAX_GAMMA)] | str | None = None
    spec_decode_metrics: Literal["off", "summary", "detailed"] | None = Field(
        None, description="tell what was drafted and accepted, in vLLM's shape"
    )
    user: str | None = None


class ChatRequest(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(Sampled):
    prompt: str | _TOKENS | _TEXTS | Annotated[list[_TOKENS], _ONE_FAULT]
    max_tokens: _COUNT | None = None
    max_completion_tokens: _COUNT | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None


class TokenizeRequest(Body):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: _TOKENS


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every answer that is not 2xx."""

    error: ErrorFacts
