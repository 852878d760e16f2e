"""Prompts as users have them (texts, ids, arrays, messages of a chat), made token ids; and ids made text again.

Knows: a tokenizer and its chat template. Refuses to know: models. May be used from several threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypedDict, Unpack

from pearl.core.detokenizer import TextDecoder
from pearl.engine.generation import Prompt
from pearl.errors import UsageError


class ChatTemplate(TypedDict, total=False):
    """What messages may be written with; see transformers' `apply_chat_template`."""

    tools: Sequence[Any] | None  # functions that the model may call: JSON schemas, or Python functions
    add_generation_prompt: bool | None  # None: unless the final message is continued
    continue_final_message: bool  # the last message is the beginning of the answer
    chat_template: str | None  # in place of the tokenizer's own
    chat_template_kwargs: Mapping[str, Any] | None  # what else the template takes, such as enable_thinking


class PromptTooLong(UsageError):
    """It has more tokens than it may have."""


class PromptEncoder:
    """One tokenizer, both ways."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._turn = tokenizer, threading.Lock()  # a call of a tokenizer may set its truncation

    def encode(
        self, prompt: Prompt, special: bool = True, at_most: int | None = None, **template: Unpack[ChatTemplate]
    ) -> list[int]:
        """The token ids. `special`: with those that the tokenizer puts around a text. `at_most`: a text that is sure to
        have more tokens is refused before it is read. Raises `UsageError`."""
        if is_chat(prompt):
            messages: Any = prompt
            return self._ids(self._written(messages, **template), False, at_most)
        if given := [name for name, value in template.items() if value not in (None, False)]:
            raise UsageError(f"{given[0]} is for the messages of a chat: this prompt holds none.")
        if template:
            raise UsageError("A chat is a list of messages, each with a role and content: this prompt is none.")
        if isinstance(prompt, str):
            return self._ids(prompt, special, at_most)
        return token_ids(prompt)

    def at_once(self, prompt: str | Sequence[int], special: bool = True) -> list[int] | None:
        """The same for an event loop, which can't wait: None while another thread is at a text."""
        if not isinstance(prompt, str):
            return token_ids(prompt)
        if not self._turn.acquire(blocking=False):
            return None
        try:
            return self._read(prompt, special)
        finally:
            self._turn.release()

    def _ids(self, text: str, special: bool, at_most: int | None = None) -> list[int]:
        if at_most is not None and self._least(text) > at_most:
            raise PromptTooLong(
                f"The prompt has {len(text)} characters, which is more than the {at_most} tokens that a text may have "
                "can stand for: shorten it."
            )
        with self._turn:
            return self._read(text, special)

    def _read(self, text: str, special: bool, what: str = "The prompt") -> list[int]:
        check_text(text, what)
        return list(self._tokenizer(text, add_special_tokens=special).input_ids)

    def _least(self, text: str) -> float:
        """Tokens that a text has at least, without reading it; 0 where nobody can say."""
        longest, dropped = self._bounds
        return (len(text) - sum(map(text.count, dropped))) / longest

    @cached_property
    def _bounds(self) -> tuple[float, str]:
        """Characters that a token stands for at most, and those that stand in no token. Byte-level tokenizers have a
        letter for each byte; a token of others may stand for a word that is not known, or for a run of spaces."""
        inside, known = getattr(self._tokenizer, "backend_tokenizer", None), self._tokenizer.get_vocab()
        if inside is None or type(inside.model).__name__ != "BPE":
            return math.inf, ""
        pieces, composed = str(inside.pre_tokenizer), {"None": 1, "NFC()": 4}  # of four characters at most
        strips = any(one.lstrip or one.rstrip for one in self._tokenizer.added_tokens_decoder.values())
        unknown = {byte for letter, byte in byte_alphabet().items() if letter not in known}
        drops = strips or "Removed" in pieces or any(0x80 <= byte < 0xC0 for byte in unknown)  # a character's last byte
        if drops or "ByteLevel" not in pieces or str(inside.normalizer) not in composed:
            return math.inf, ""
        longest = composed[str(inside.normalizer)] * max(map(len, known))
        return longest, "".join(chr(byte) for byte in unknown if byte < 0x80)

    def _written(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages as the text that the model knows conversations by."""
        if not (chat_template or self._tokenizer.chat_template):
            raise UsageError("This tokenizer has no chat template: give the prompt as text.")
        turns: Any = [_message(one) for one in messages]
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        try:
            return self._tokenizer.apply_chat_template(
                turns,
                tools=list(tools) if tools else None,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(chat_template_kwargs or {}),
            )
        except Exception as error:  # a template is a program, and says in its own way what it does not take
            raise UsageError(f"The chat template does not take these messages ({error}).") from error

    def bad_word_ids(self, text: str) -> list[int]:
        """Without the special tokens of a beginning."""
        with self._turn:
            return self._read(text, False, "bad_words")


def check_text(text: str, what: str) -> None:
    """Raises `UsageError` for half a character, which no tokenizer takes. `what`: of the request."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} holds half a character at {error.start}: it is no text.") from None


def byte_alphabet() -> dict[str, int]:
    """The byte of each letter that byte-level tokenizers write it with: printable ones are themselves, the others
    follow one another from 256 on (Radford et al. 2019, GPT-2's encoder)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def decoder(tokenizer: Any) -> TextDecoder:
    """Not of the engine, which a text that is kept would then keep, models and all. A text that grows is decoded twice
    a token, so what transformers does around its tokenizer, and nothing of which changes these texts, is left out."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]  # one byte each, as in tokenizers after SentencePiece
    numbers = tokenizer.convert_tokens_to_ids(names)
    known = zip(names, numbers, strict=True)
    single = frozenset(
        number for name, number in known if number is not None and tokenizer.convert_ids_to_tokens(number) == name
    )
    inside = _plain_inside(tokenizer)
    *word, last = tokenizer("a b", add_special_tokens=False).input_ids or [0]

    def decode(tokens: Sequence[int], skip: bool = True) -> str:
        if inside is not None:
            text: str = inside.decode(list(tokens), skip_special_tokens=skip)
            return text
        return tokenizer.decode(list(tokens), skip_special_tokens=skip, clean_up_tokenization_spaces=False)

    drops = bool(word) and decode([last]) == "b" and decode([*word, last]).endswith(" b")
    return TextDecoder(
        decode, lambda tokens: decode(tokens, skip=False), single.__contains__, tuple(word) if drops else ()
    )


def _plain_inside(tokenizer: Any) -> Any:
    """The tokenizer of `tokenizers` whose texts are those of this one as they are; None where a class has its own."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(tokenizer)
    if issubclass(kind, Fast) and kind.decode is Fast.decode and kind._decode is Fast._decode:
        return tokenizer.backend_tokenizer
    return None


def are_several(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether these are prompts; one is a text, or holds numbers or messages. An empty list has none."""
    if not isinstance(prompt, list | tuple) or is_chat(prompt):
        return False
    return not prompt or any(isinstance(one, str | list | tuple) or (_is_array(one) and one.shape) for one in prompt)


def is_chat(prompt: Prompt) -> bool:
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def token_ids(prompt: Any) -> list[int]:
    """Those of a list, or of an array or tensor [L] or [1, L]. Whether they are in the vocabulary, the model knows."""
    if _is_array(prompt):
        if "int" not in str(prompt.dtype):
            raise UsageError(f"A prompt's token ids must be whole numbers, not {prompt.dtype}.")
        shape = tuple(prompt.shape)
        if len(shape) == 2 and shape[0] == 1:
            return list(prompt[0].tolist())
        if len(shape) != 1:
            raise UsageError(
                f"An array of token ids must have the shape [L] or [1, L], not {list(shape)}: of several prompts "
                "give a list, each without its padding."
            )
        return list(prompt.tolist())
    if not isinstance(prompt, list | tuple):
        raise UsageError(f"The prompt must be text, token ids or messages, not {type(prompt).__name__}.")
    return [one.item() if _is_array(one) and not one.shape else one for one in prompt]


def _is_array(value: object) -> bool:
    """A numpy array or a torch tensor, also a single number of one."""
    return hasattr(value, "dtype") and hasattr(value, "tolist") and hasattr(value, "shape")


def _message(message: Any) -> dict[str, Any]:
    """As templates take it: its content one text, which a client may have given in parts. One that only calls has an
    empty text: templates read it all the same."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "\n".join(str(part.get("text", "")) for part in content)
    if content is None and isinstance(message, Mapping) and (message.get("tool_calls") or message.get("function_call")):
        content = ""
    if not isinstance(content, str):
        raise UsageError("Every message must be a mapping with the texts role and content.")
    return {**message, "content": content}
