"""Logits of rows, given the tokens before each: `SamplingParams`' built-in processors, all rows at once.

    bias            logit_bias                                      in transformers' order; the ends of vLLM's sampler
    penalties       repetition, then frequency, then presence       (bias, penalties) are in the same one
    bans            n-grams, bad words, min_tokens, suppressed, not allowed
    callables       `pearl.core.logits.custom`, on what is left
    warpers         temperature, top-k, top-p, min-p: `pearl.core.sampling.methods.warp`

A row's numbers are a function of its logits and of the tokens before it, bit by bit, wherever the border lies between
the text and the path to the row's node: so the text is the target's own, whatever a pass holds beside it.

Where vLLM differs: it looks for the beginning of a bad word in the new text only, here (as in transformers) the prompt
counts too; and the end of a text is no bad word. Masks commute with penalties, so their place does not matter.

Shapes: R rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pearl.core.logits.bans import Bans
from pearl.core.logits.penalties import Penalties
from pearl.core.params import SamplingParams
from pearl.machine.transfers import sent

Path = Sequence[int]  # the tokens between the end of the text and what follows a row, its own token included


class LogitsProcessing:
    """The built-in processors of one sequence; it counts what the text holds as the text grows."""

    def __init__(self, penalties: Penalties | None, bans: Bans | None, bias: dict[int, float]):
        self._penalties, self._bans, self._bias = penalties, bans, bias
        self._biased: tuple[Tensor, Tensor] | None = None  # tokens and their bias

    @staticmethod
    def of(params: SamplingParams, prompt: int, eos: Collection[int] = ()) -> LogitsProcessing | None:
        """None: nothing is to be done. `prompt`: its tokens. `eos`: what ends a text beside `stop_token_ids`."""
        penalties, bans = Penalties.of(params, prompt), Bans.of(params, prompt, eos)
        if penalties or bans or params.logit_bias:
            return LogitsProcessing(penalties, bans, dict(params.logit_bias))
        return None

    def __call__(self, logits: Tensor, text: Sequence[int], paths: Sequence[Path]) -> Tensor:
        """float32 [R, V], a copy. `text`: the committed tokens, those of the last call and perhaps more. `paths[r]`:
        what comes between them and what row r predicts."""
        assert len(paths) == len(logits), "a path a row"
        scores = logits.to(torch.float32, copy=True)
        if self._bias:
            tokens, bias = self._biased = self._biased or _tensors(self._bias, scores)
            scores[:, tokens] += bias
        if self._penalties:
            self._penalties.apply(scores, text, paths)
        if self._bans:
            self._bans.apply(scores, text, paths)
        return scores

    def of_guesses(self, logits: Tensor, text: Sequence[int], paths: Sequence[Path]) -> Tensor:
        """A drafter's logits, with the same done to them; where that leaves no token, whatever it guesses is wrong, and
        they stay as they are."""
        scores = self(logits, text, paths)
        return torch.where(scores.amax(-1, keepdim=True) == -torch.inf, logits, scores)

    def forbids(self, text: Sequence[int], path: Path, token: int) -> bool:
        """Whether `token` can't follow, for a source of guesses that has no logits."""
        return self._bans is not None and self._bans.forbids(text, path, token)


def _tensors(bias: dict[int, float], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Without tokens that a drafter's smaller vocabulary does not have."""
    known = {token: one for token, one in bias.items() if token < scores.shape[-1]}
    return (
        sent(torch.tensor(list(known), dtype=torch.long), scores.device),
        sent(torch.tensor(list(known.values()), dtype=torch.float32), scores.device),
    )
