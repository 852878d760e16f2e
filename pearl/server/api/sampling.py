"""What a request asks for, as the engine takes it; or the error that says why it can't be had.

A field is honoured, or refused where leaving it out would change the text, or ignored where it changes none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pearl.core.params import SamplingParams
from pearl.server.api.schemas import Body, ChatRequest, CompletionRequest
from pearl.server.errors import bad

COMPLETION_TOKENS = 16  # of a completion that does not say, as OpenAI has it
MOST_LETTERS = 1 << 14  # of all stop strings, and of all bad words
MOST_BAD_WORDS = 1024  # each is made tokens, and looked for at every row of a pass
_SAME = (  # names and meanings are the engine's
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "bad_words",
    "allowed_token_ids",
    "suppress_tokens",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)
_REFUSED = (  # fields that would change the text, and that nothing here carries out
    "tools",
    "functions",
    "suffix",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "structural_tag",
    "chat_template",
    "documents",
    "audio",
    "web_search_options",
    "use_beam_search",
    "length_penalty",
    "typical_p",
    "truncate_prompt_tokens",
    "logits_processors",
    "prompt_embeds",
    "kv_transfer_params",
    "vllm_xargs",
    "add_special_tokens",  # of a chat, whose template writes its own
    "best_of",  # of a chat too
)
_NEUTRAL = {"length_penalty": 1, "typical_p": 1, "best_of": 1}
FIELDS = frozenset((*_SAME, "stop", "seed", "n", "logprobs", "mode", "gamma", "max_tokens"))


def refuse(request: Body) -> None:
    """Raises for what would change the text and can't be had."""
    extra: dict[str, Any] = request.model_extra or {}
    for name in _REFUSED:
        value = extra.get(name)
        if value not in (None, False, "", [], {}) and value != _NEUTRAL.get(name):
            raise bad(f"{name} is not supported by this server: leave it out.", name)
    if (modalities := extra.get("modalities")) not in (None, ["text"], []):
        raise bad(f"modalities must be text, not {str(modalities)[:100]!r}.", "modalities")
    wanted = getattr(request, "response_format", None)
    if wanted and wanted.type != "text":
        raise bad("response_format must be text: this server does not force a shape on texts.", "response_format")


def sampling(request: ChatRequest | CompletionRequest, room: int, defaults: Mapping[str, Any]) -> SamplingParams:
    """`room`: tokens that the context has behind the prompt; `defaults`: of fields that the request leaves out. Raises
    `UsageError` and `APIError`."""
    values = {**defaults} | {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    values["stop"] = tuple(one for one in _listed(request.stop) if one)
    if (letters := sum(map(len, values["stop"]))) > MOST_LETTERS:
        raise bad(f"stop must have {MOST_LETTERS} characters at most, all strings together, not {letters}.", "stop")
    if len(words := values.get("bad_words", ())) > MOST_BAD_WORDS or sum(map(len, words)) > MOST_LETTERS:
        raise bad(f"bad_words must be {MOST_BAD_WORDS} at most, of {MOST_LETTERS} characters in all.", "bad_words")
    if request.seed not in (None, -1):  # as vLLM has it, -1 is none
        values["seed"] = request.seed & (1 << 63) - 1
    limit = limit_of(request)
    if "min_tokens" in values and limit is not None and values["min_tokens"] > max(limit, 1):
        raise bad(f"min_tokens must be at most max_tokens, which is {limit}.", "min_tokens")
    most, shown = _logprobs(request)
    if shown and isinstance(request, CompletionRequest) and request.echo:
        values["prompt_logprobs"] = most
    return SamplingParams(
        **values,
        n=request.n or 1,
        max_new_tokens=max(1, room if limit is None else limit),
        leading_space=isinstance(request, CompletionRequest),
        logprobs=most if shown else None,
    )


def limit_of(request: ChatRequest | CompletionRequest) -> int | None:
    """Tokens of an answer at most; None: what the context has room for."""
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    return COMPLETION_TOKENS if limit is None and isinstance(request, CompletionRequest) else limit


def needs(request: ChatRequest | CompletionRequest) -> int:
    """Tokens of the context that must be free behind the prompt."""
    return max(1, limit_of(request) or 1)


def _logprobs(request: ChatRequest | CompletionRequest) -> tuple[int, bool]:
    """How many of the likeliest tokens, and whether log-probabilities are wanted at all."""
    if isinstance(request, CompletionRequest):
        return request.logprobs or 0, request.logprobs is not None
    if request.top_logprobs and not request.logprobs:
        raise bad("top_logprobs needs logprobs to be true.", "top_logprobs")
    return request.top_logprobs or 0, bool(request.logprobs)


def _listed(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []
