"""What a student says of the tokens that it drafts from: the target's head, cut to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pearl.errors import UsageError

_PROBE = 8  # tokens that are read to see what the model makes of its head's products
_APART = 1e-3  # of the largest logit, which rounding may make


class StudentHead:
    """Logits of the draft vocabulary, as the model itself makes them of its last hidden states: with the head's bias
    (Phi, GPT-J), its scale (Granite, Cohere) and its cap (Gemma 2)."""

    def __init__(self, model: PreTrainedModel, vocabulary: Tensor):
        """vocabulary: int64 [V]. Raises `UsageError` for a model that makes its logits in yet another way."""
        head: Any = model.get_output_embeddings()
        ids = vocabulary.to(head.weight.device)
        bias = getattr(head, "bias", None)
        self._weight = head.weight.detach()[ids]
        self._bias = None if bias is None else bias.detach()[ids]
        self._cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._scale = 1.0
        hidden, logits = _probe(model)
        if hidden is None or not self._fit(hidden, logits[..., ids]):
            raise UsageError(
                f"{type(model).__name__} makes its logits in a way that pearl distill does not know: train a head for "
                "it instead, with pearl train."
            )

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden: [*, H]; returns [*, V]"""
        logits = hidden @ self._weight.T.to(hidden.dtype)
        if self._bias is not None:
            logits = logits + self._bias.to(hidden.dtype)
        if self._scale != 1:
            logits = logits * self._scale
        return self._cap * torch.tanh(logits / self._cap) if self._cap else logits

    def _fit(self, hidden: Tensor, wanted: Tensor) -> bool:
        """Finds the scale; whether the logits, [n, V], are then those that are wanted."""
        if not self._cap:
            made = self(hidden)
            scale = float((made * wanted).sum() / made.square().sum())
            self._scale = 1.0 if abs(scale - 1) < _APART else scale
        return torch.allclose(self(hidden), wanted, rtol=0, atol=_APART * float(wanted.abs().max()))


@torch.no_grad()
def _probe(model: PreTrainedModel) -> tuple[Tensor | None, Tensor]:
    """The hidden states of a few tokens, [n, H], None if the model does not tell them, and its logits, [n, tokens]."""
    tokens = torch.arange(_PROBE, device=model.device)[None]
    base: Any = model.base_model
    hidden = getattr(base(input_ids=tokens, use_cache=False), "last_hidden_state", None)
    return None if hidden is None else hidden[0], model(tokens, use_cache=False).logits[0]
