"""The output head of a draft model, cut to the tokens that matter: a forward then reads a fraction of its weights.

For a small model the head is much of a forward (Qwen2.5-0.5B: 136 of 494 million weights). A draft model that we have
trained brings the ids of its frequent tokens. Of others: byte-level and SentencePiece BPE number their tokens by how
early, that is how often, they were merged, so the first N ids are the frequent ones. To these come the special tokens
and every token of the text so far, as far as it is known; so a rare name can be drafted from its second occurrence on.
Where the text keeps leaving the vocabulary (another script, say), all of it is read. A token that can't be drafted
costs a guess, never the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pearl.trie import shared_prefix

FRESH = 0.1  # share of new rare tokens in the text of late, above which the whole head is read


class DraftHead(nn.Module):
    """Logits of the frequent tokens and of some rare ones; the others have -inf."""

    def __init__(self, head: nn.Linear, frequent: Tensor, always: Sequence[int] = ()):
        """frequent: int64 [N], ids; `always`: others beside them."""
        super().__init__()
        self.frequent = _layer(head.weight.detach()[frequent])
        self.all = _layer(head.weight.detach())
        self._head = [head]  # in a list, so that it is no submodule: only rows of it are used
        self._ids, self._size = frequent, head.out_features
        self._always = [token for token in always if token < head.out_features]
        self.forget()

    def __len__(self) -> int:
        return len(self._ids)

    def forget(self) -> None:
        """A new text begins. Until `follow` has told which, the whole head is read."""
        self.whole = True
        self._rare: list[int] = []
        self._known: set[int] = set(self._ids.tolist())
        self._weight: Tensor | None = None  # [rare tokens, hidden]
        self._text: list[int] | None = None
        self._fresh = 0.0
        self._add(self._always)

    def follow(self, text: Sequence[int]) -> None:
        """Tokens of the text become draftable; too many new ones call for the whole head."""
        before = self._text or []
        fresh = text[shared_prefix(before, text) :]
        new = {token for token in fresh if token not in self._known}
        if self._text is not None:  # a prompt's own tokens say nothing about what is being written
            for token in fresh:
                self._fresh += 0.03 * ((token in new) - self._fresh)
        self._text = list(text)
        self._add(new)
        self.whole = self._fresh > FRESH

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            return self.all(x)
        logits = x.new_full((*x.shape[:-1], self._size), -torch.inf)
        logits[..., self._ids] = self.frequent(x)
        if self._weight is not None:
            logits[..., self._rare] = (x.to(self._weight.dtype) @ self._weight.T).to(logits.dtype)
        return logits

    def _add(self, tokens: Iterable[int]) -> None:
        new = [token for token in dict.fromkeys(tokens) if token not in self._known and token < self._size]
        if not new:
            return
        self._known |= set(new)
        self._rare += new
        weight = self._head[0].weight.detach()
        rows = weight[new].float() if weight.device.type == "cpu" else weight[new]
        self._weight = rows if self._weight is None else torch.cat([self._weight, rows])


def _layer(weight: Tensor) -> nn.Linear:
    """A head of these rows, without a copy."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def cut(model: nn.Module, frequent: Tensor | int, always: Sequence[int] = ()) -> DraftHead | None:
    """Replaces the model's head by one that is cut to the tokens `frequent`, a number of them or their ids.

    None where that is not possible.
    """
    head = model.get_output_embeddings()
    ids = torch.arange(frequent) if isinstance(frequent, int) else frequent
    if type(head) is not nn.Linear or head.bias is not None or head.out_features <= len(ids):
        return None
    made = DraftHead(head, ids.to(head.weight.device), always)
    model.lm_head = made
    return made if model.get_output_embeddings() is made else None
