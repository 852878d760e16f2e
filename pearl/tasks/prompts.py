"""How a model is asked: a plain text for base models, a chat for instruction-tuned ones."""

from collections.abc import Sequence
from typing import Literal, Protocol

from pearl.config.inputs import brief
from pearl.errors import UsageError

Format = Literal["completion", "chat"]
FORMATS = ("completion", "chat")


class ChatTokenizer(Protocol):
    """What of a transformers tokenizer a chat prompt needs."""

    chat_template: str | dict[str, str] | None

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


def check(format: str) -> None:
    if format not in FORMATS:
        raise UsageError(f"There is no prompt format {format!r}; use 'completion' or 'chat'.")


def chat(turns: Sequence[str], tokenizer: ChatTokenizer) -> str:
    """The chat in which the user and the model take turns, up to where the model begins. The user has the first and the
    last turn.

    It has its special tokens in it: encode it with ``add_special_tokens=False``. Raises UsageError for a tokenizer
    without a chat template.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            "This tokenizer has no chat template; use the format 'completion' or an instruction-tuned model."
        )
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and says in its own way what it does not take
        raise UsageError(
            f"The chat template does not take these messages ({brief(error)}): use the format 'completion'."
        ) from error
