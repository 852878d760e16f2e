"""POST /v1/chat/completions: messages in, the answer of the assistant out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pearl.engine.prompts import check_text
from pearl.errors import UsageError
from pearl.server.api.answers import Answer
from pearl.server.api.logprobs import chat_logprobs
from pearl.server.api.schemas import ChatRequest, Message, TextPart, TokenizeRequest
from pearl.server.errors import bad
from pearl.server.texts import Text

_TAKEN = {  # what `apply_chat_template` decides for itself, or what other fields say
    *("conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


def messages(given: Sequence[Message]) -> list[dict[str, Any]]:
    """As chat templates know them. What only newer interfaces call developer is the system."""
    made = []
    for number, one in enumerate(given):
        message = one.model_dump(exclude_none=True)
        message["role"] = "system" if one.role == "developer" else one.role
        content = text_of(one.content, f"messages.{number}.content")
        calls = message.get("tool_calls")
        if calls is not None and not isinstance(calls, list):
            raise bad(f"messages.{number}.tool_calls must be a list.", "messages")
        for call in calls or ():
            _parse_arguments(call)
        if content is None and not (calls or message.get("function_call")):
            raise bad(f"messages.{number} has no content: give it a text.", "messages")
        message["content"] = content
        made.append(message)
    return made


def text_of(content: str | Sequence[TextPart] | None, where: str) -> str | None:
    """The text of content, which may come in parts."""
    if content is None:
        return None
    field = where.split(".")[0]
    if not isinstance(content, str):
        for part in content:
            if part.type not in ("text", "input_text", "output_text"):
                raise bad(f"{where} holds a part of type {part.type[:50]!r}: this model reads text.", field)
            if part.text is None:
                raise bad(f"{where} holds a part without its text.", field)
        content = "\n".join(part.text or "" for part in content)
    try:
        check_text(content, where)
    except UsageError as error:
        raise bad(str(error), field) from None
    return content


def _parse_arguments(call: Any) -> None:
    """Clients send a call's arguments as JSON in a string; templates want what that means."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            return


def template(request: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """What messages are written with, as `Engine.encode` takes it."""
    more = request.chat_template_kwargs or {}
    if taken := _TAKEN.intersection(more):
        raise bad(f"chat_template_kwargs can't set {min(taken)}.", "chat_template_kwargs")
    return {
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": bool(request.continue_final_message),
        "chat_template_kwargs": more,
    }


class ChatAnswer(Answer):
    """One message for each of n samples."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, text: Text) -> dict[str, Any]:
        whole = self.ended(text)
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        choice = {"index": text.index, "message": message, "logprobs": self._logprobs(text, 0, whole.tokens)}
        return choice | self.finish(text) | self._ids(whole.tokens)

    def opening(self, text: Text) -> dict[str, Any]:
        more = {"prompt_token_ids": self.prompt(text)} if self._with_ids else {}
        return self._delta(text, {"role": "assistant", "content": ""}) | more

    def delta(self, text: Text, piece: str, tokens: Sequence[int]) -> dict[str, Any] | None:
        if not piece and not (tokens and (self.wants_logprobs(text) or self._with_ids)):
            return None
        logprobs = self._logprobs(text, text.told - len(tokens), tokens) if tokens else None
        return self._delta(text, {"content": piece}, logprobs) | self._ids(tokens)

    def closing(self, text: Text) -> dict[str, Any]:
        return self._delta(text, {}) | self.finish(text)

    def whole(self, texts: Sequence[Text]) -> dict[str, Any]:
        more = {"prompt_token_ids": self.asked.prompts[0]} if self._with_ids else {}
        return super().whole(texts) | more

    def _delta(self, text: Text, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
        return {"index": text.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, text: Text, first: int, tokens: Sequence[int]) -> dict[str, Any] | None:
        if not self.wants_logprobs(text):
            return None
        found, most = self.logprobs_of(text, first, tokens), self.params(text).logprobs or 0
        return chat_logprobs(tokens, found, most, self.names, self._as_ids)

    def _ids(self, tokens: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(tokens)} if self._with_ids else {}
