"""POST /v1/completions: prompts in, what follows them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pearl.core.logits.logprobs import Logprobs
from pearl.server.api.answers import Answer, Asked
from pearl.server.api.logprobs import Offset, completion_logprobs
from pearl.server.api.sampling import limit_of
from pearl.server.api.schemas import MOST_TEXTS, CompletionRequest
from pearl.server.api.token_names import TokenNames
from pearl.server.errors import bad
from pearl.server.texts import Text


def prompts(request: CompletionRequest) -> list[str | list[int]]:
    """A list of one or several."""
    given: Any = request.prompt
    several = isinstance(given, list) and (not given or not isinstance(given[0], int))
    found: list[str | list[int]] = given if several else [given]
    if not found or not all(found):
        raise bad("The prompt is empty: give at least one token.", "prompt")
    if len(found) * (request.n or 1) > MOST_TEXTS:
        raise bad(f"A request may ask for {MOST_TEXTS} texts at most, not {len(found) * (request.n or 1)}.", "prompt")
    return found


class CompletionAnswer(Answer):
    """For each prompt n texts."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    request: CompletionRequest

    def __init__(
        self,
        request: CompletionRequest,
        asked: Asked,
        model: str,
        names: TokenNames,
        metrics: str | None,
        echoed: Sequence[str],
    ):
        """`echoed`: the text of each prompt, where it is to be said again."""
        super().__init__(request, asked, model, names, metrics)
        self._echoed = echoed
        self._none = limit_of(request) == 0  # a token is written all the same, and nobody sees it
        self._offsets: dict[Text, Offset] = {}  # of log-probabilities

    def shown(self, tokens: int) -> int:
        return 0 if self._none else tokens

    def _echo(self, text: Text) -> str:
        return self._echoed[text.index // self._n] if self.request.echo else ""

    def _choice(self, text: Text) -> dict[str, Any]:
        whole = self.ended(text)
        tokens = [] if self._none else whole.tokens
        said = self._echo(text) + ("" if self._none else whole.text)
        logprobs = self._logprobs(text, 0, tokens, prompt=bool(self.request.echo))
        choice = {"index": text.index, "text": said, "logprobs": logprobs} | self.finish(text)
        return choice | self._ids(text, tokens, prompt=True)

    def opening(self, text: Text) -> dict[str, Any] | None:
        return None  # the prompt's log-probabilities come with the first pass, and so does the prompt

    def delta(self, text: Text, piece: str, tokens: Sequence[int]) -> dict[str, Any] | None:
        first = bool(tokens) and text.told == len(tokens)
        said = "" if self._none else piece
        new = [] if self._none else tokens
        if first:
            said = self._echo(text) + said
        if not said and not (tokens and (self.wants_logprobs(text) or self._with_ids)):
            return None
        logprobs = None
        if tokens:
            logprobs = self._logprobs(text, text.told - len(tokens), new, prompt=first and bool(self.request.echo))
        choice = {"index": text.index, "text": said, "logprobs": logprobs, "finish_reason": None, "stop_reason": None}
        return choice | self._ids(text, new, prompt=first)

    def closing(self, text: Text) -> dict[str, Any]:
        return {"index": text.index, "text": "", "logprobs": None} | self.finish(text)

    def finish(self, text: Text) -> dict[str, Any]:
        return {"finish_reason": "length", "stop_reason": None} if self._none else super().finish(text)

    def _logprobs(self, text: Text, first: int, tokens: Sequence[int], prompt: bool) -> dict[str, Any] | None:
        """`prompt`: with those of the prompt's tokens before them."""
        if not self.wants_logprobs(text):
            return None
        if text not in self._offsets:
            self._offsets[text] = Offset(self.names, self.request.skip_special_tokens is not False, begins=prompt)
        found: list[Logprobs | None] = list(self.logprobs_of(text, first, tokens))
        if prompt:
            state = text.handle.request.sequence
            tokens = [*self.prompt(text), *tokens]
            found = [*((state and state.prompt_logprobs) or ()), *found]
        return completion_logprobs(tokens, found, self.names, self._as_ids, self._offsets[text])

    def _ids(self, text: Text, tokens: Sequence[int], prompt: bool) -> dict[str, Any]:
        if not self._with_ids:
            return {}
        return {"token_ids": list(tokens)} | ({"prompt_token_ids": self.prompt(text)} if prompt else {})
