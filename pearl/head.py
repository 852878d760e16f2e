"""The output head of a draft model, cut to the tokens that matter: a forward then reads a fraction of its weights.

For a small model the head is much of a forward (Qwen2.5-0.5B: 136 of 494 million weights). Byte-level and SentencePiece
BPE number their tokens by how early, that is how often, they were merged, so the first N ids are the frequent ones. To
these come the special tokens and every token of the text so far, as far as it is known; so a rare name can be drafted
from its second occurrence on. Where the text keeps leaving the vocabulary (another script, say), all of it is read. A
token that can't be drafted costs a guess, never the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FRESH = 0.1  # share of new rare tokens in the text of late, above which the whole head is read


class DraftHead(nn.Module):
    """Logits of the frequent tokens and of some rare ones; the others have -inf."""

    def __init__(self, head: nn.Linear, frequent: int, always: Sequence[int] = ()):
        """`frequent`: how many ids from 0 on; `always`: ids beyond them."""
        super().__init__()
        self.first, self.rest = _rows(head, 0, frequent), _rows(head, frequent, head.out_features)
        self._head = [head]  # in a list, so that it is no submodule: only rows of it are used
        self._frequent, self._size = frequent, head.out_features
        self._always = [token for token in always if frequent <= token < head.out_features]
        self.whole = True
        self.forget()

    def forget(self) -> None:
        """A new text begins."""
        self._rare: list[int] = []
        self._known: set[int] = set()
        self._weight: Tensor | None = None  # [rare tokens, hidden]
        self._seen, self._prompt = 0, True
        self._fresh = 0.0
        self._add(self._always)

    def follow(self, text: Sequence[int]) -> None:
        """Tokens of the text become draftable; too many new ones call for the whole head."""
        new = [token for token in text[self._seen :] if token >= self._frequent and token not in self._known]
        if not self._prompt:
            for token in text[self._seen :]:
                self._fresh += 0.03 * ((token in new) - self._fresh)
        self._seen, self._prompt = len(text), False
        self._add(new)
        self.whole = self._fresh > FRESH

    def forward(self, x: Tensor) -> Tensor:
        frequent = self.first(x)
        if self.whole:
            return torch.cat([frequent, self.rest(x)], -1)
        logits = frequent.new_full((*x.shape[:-1], self._size), -torch.inf)
        logits[..., : self._frequent] = frequent
        if self._weight is not None:
            logits[..., self._rare] = (x.to(self._weight.dtype) @ self._weight.T).to(logits.dtype)
        return logits

    def _add(self, tokens: Sequence[int]) -> None:
        new = [token for token in dict.fromkeys(tokens) if token not in self._known and token < self._size]
        if not new:
            return
        self._known |= set(new)
        self._rare += new
        weight = self._head[0].weight.detach()
        rows = weight[new].float() if weight.device.type == "cpu" else weight[new]
        self._weight = rows if self._weight is None else torch.cat([self._weight, rows])


def _rows(head: nn.Linear, first: int, last: int) -> nn.Linear:
    """Some rows of a head as a layer, without a copy."""
    assert head.bias is None, "a head with a bias is left whole"
    layer = nn.Linear(head.in_features, last - first, bias=False, device="meta")
    layer.weight = nn.Parameter(head.weight.detach()[first:last], requires_grad=False)
    return layer


def cut(model: nn.Module, frequent: int, always: Sequence[int] = ()) -> DraftHead | None:
    """Replaces the model's head by one that is cut to `frequent` tokens; None where that is not possible."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head.out_features <= frequent:
        return None
    made = DraftHead(head, frequent, always)
    model.lm_head = made
    return made if model.get_output_embeddings() is made else None
