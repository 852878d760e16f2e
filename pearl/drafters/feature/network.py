"""A network over the target's hidden states, in every published form: EAGLE-3, P-EAGLE, EAGLE-1, and our own of before.

    a row            the token of position i, its embedding e, beside x: what the target's layers said at position i - 1
    x                fc(features); where they are not there yet, the network's own hidden state of the row before
    1 to 4 layers    the first of EAGLE-3 reads the pair [e ; x], of the others a mix of both
    norm and head    its own, or the target's

The feature of position i - 1 meets the token that was picked from it, so a row says what follows its token (EAGLE, Li
et al. 2024). Several tokens of one forward are read from rows whose token is not known, *slots*: P-EAGLE puts a mask
token beside a learned feature there, and ours of before two learned vectors (ParallelSpec, Xiao et al. 2024).

Knows: what is computed, by the options of a `DrafterShape`. Refuses to know: files (`pearl.checkpoints.drafts`).
Shapes: B texts, R rows, H hidden, W numbers of a row (H or 2 H), F features, D draft vocabulary, K depths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pearl.drafters.feature.layers import Rotary, layers_of
from pearl.drafters.feature.shape import EAGLE, EAGLE3, OURS, PEAGLE, DrafterShape
from pearl.errors import UsageError
from pearl.models.draft_model import read_unknown_tokens
from pearl.models.fingerprint import model_fingerprint, wrong_target_message
from pearl.models.hidden_states import final_norm
from pearl.models.kv_cache.slot_cache import KeyValue
from pearl.models.linear import linear_of


class FeatureDrafter(nn.Module):
    """What is loaded or trained. Of the target's parts those that it lacks are attached (`attach`)."""

    vocabulary: Tensor

    def __init__(self, shape: DrafterShape, vocabulary: Tensor):
        """vocabulary: int64 [D], the target's ids of the tokens that can be drafted."""
        super().__init__()
        assert len(vocabulary) == shape.vocabulary, "a draft vocabulary of the size that was said"
        self.shape = shape
        self.register_buffer("vocabulary", vocabulary.clone())
        hidden, kind = shape.hidden, shape.kind
        if shape.features and shape.fuses and kind != EAGLE:
            self.fc: nn.Module = nn.Linear(shape.feature_row, hidden, bias=shape.fc_bias)
        if shape.fc_norm:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(shape.width, shape.eps) for _ in shape.features)
        if shape.input_norm:
            self.input_norm = nn.RMSNorm(shape.feature_row, shape.eps)
        if kind in (EAGLE, OURS):
            self.in_proj = nn.Linear(2 * hidden, hidden, bias=shape.fc_bias)
        if kind == OURS:
            self.token_norm = nn.RMSNorm(hidden, shape.eps)
            self.mask_embedding = nn.Parameter(torch.randn(hidden) * 0.02)
            self.shared_hidden = nn.Parameter(torch.randn(hidden) * 0.02)
        if kind == PEAGLE:
            self.mask_hidden = nn.Parameter(torch.randn(1, 1, shape.feature_row) * 0.02)
        if shape.own_mask:
            self.mask_row = nn.Parameter(torch.randn(hidden) * 0.02)
        self.layers = layers_of(shape)
        if kind in (EAGLE3, PEAGLE):
            self.norm = nn.RMSNorm(hidden, shape.eps)
        if shape.own_head:
            self.lm_head = nn.Linear(hidden, shape.vocabulary, bias=False)
        if shape.own_embedding:
            self.embed_tokens = nn.Embedding(shape.known, hidden)
        if rank := shape.markov_rank:
            self.markov_w1 = nn.Embedding(shape.known, rank)
            self.markov_w2 = nn.Linear(rank, shape.vocabulary, bias=False)
            self.confidence = nn.Linear(hidden + rank, 1)
            nn.init.zeros_(self.markov_w2.weight)  # it begins as a network without
        self._rotary = [Rotary(shape)]  # these are in lists, so that they are no submodules
        self._target: list[Any] = []  # embedding, norm and head

    @staticmethod
    def of(shape: DrafterShape, vocabulary: Tensor, tensors: Mapping[str, Tensor]) -> FeatureDrafter:
        """With weights, in float32, and nothing attached. Raises `RuntimeError` for tensors of another network."""
        drafter = FeatureDrafter(shape, vocabulary)
        floats = {name: tensor.float() for name, tensor in tensors.items()} | {"vocabulary": vocabulary}
        drafter.load_state_dict(floats)
        return drafter

    def attach(self, target: Any) -> FeatureDrafter:
        """Takes embedding, final norm and head from a target, which may have no layers left, as far as it lacks them.

        Raises `UsageError` if this drafter was trained for another one.
        """
        shape = self.shape
        if shape.fingerprint and model_fingerprint(target) != shape.fingerprint:
            raise UsageError(wrong_target_message(shape.target))
        head = None if shape.own_head else _cut(target.get_output_embeddings(), self.vocabulary)
        known = target.get_input_embeddings().weight
        embedding = None if shape.own_embedding else known.detach()
        read_unknown_tokens(self, len(known))
        self._target = [embedding, final_norm(target) if shape.kind == OURS else None, head]
        return self

    def place(self, device: torch.device | str, dtype: torch.dtype) -> FeatureDrafter:
        """Moves all of it, the target's parts too."""
        self._target = [part if part is None else part.to(device, dtype) for part in self._target]
        for module in self._target[1:]:
            if module is not None:
                module.requires_grad_(False)
        self._rotary[0].to(device)
        return self.to(device, dtype)

    @property
    def device(self) -> torch.device:
        return self.vocabulary.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its norms, its keys and its values."""
        return self.layers[0].post_attention_layernorm.weight.dtype  # type: ignore[union-attr, return-value]

    @property
    def head(self) -> Any:
        """From H to D."""
        return self.lm_head if self.shape.own_head else self._target[2]

    def replace_head(self, head: nn.Module) -> None:
        """For one that computes the same faster."""
        if self.shape.own_head:
            self.lm_head = head  # type: ignore[assignment]
        else:
            self._target[2] = head

    # Rows

    def embed(self, tokens: Tensor) -> Tensor:
        """[..., H] of token ids."""
        return self.embed_tokens(tokens) if self.shape.own_embedding else F.embedding(tokens, self._target[0])

    @property
    def embedding(self) -> Tensor:
        """Of all tokens, [tokens, H]."""
        return self.embed_tokens.weight if self.shape.own_embedding else self._target[0]

    def fused(self, features: Tensor) -> Tensor:
        """x of features [..., F]: [..., H]."""
        shape = self.shape
        features = features.to(self.dtype)
        if shape.kind == EAGLE or not shape.fuses:
            return features
        if shape.input_norm:
            features = self.input_norm(features)
        if shape.fc_norm:
            parts = features.chunk(len(shape.features), -1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        return self.fc(features)

    def rows(self, tokens: Tensor, x: Tensor) -> Tensor:
        """What the first layer reads, [..., W], of tokens [...] and of x, [..., H], of the positions before them."""
        return self._rows(self.embed(tokens), x)

    def _rows(self, embedded: Tensor, x: Tensor) -> Tensor:
        if self.shape.kind == OURS:
            embedded = self.token_norm(embedded)
        pair = torch.cat([embedded, x], -1)
        return self.in_proj(pair) if self.shape.kind in (EAGLE, OURS) else pair

    def known(self, tokens: Tensor, features: Tensor, withheld: Tensor) -> Tensor:
        """The rows of known tokens, [B, R, W].

        tokens: [B, R]; features: [B, R, F], in each row those of the position before; withheld: bool [B, R], True
        where the row has none, and what was learned instead stands for them.
        """
        if not self.shape.features:
            return self.rows(tokens, self.shared_hidden.expand(*tokens.shape, -1))
        x = self.fused(features)
        if (instead := self.unknown()) is not None:
            x = torch.where(withheld[..., None], instead, x)
        return self.rows(tokens, x)

    def slots(self, batch: int, count: int) -> Tensor:
        """The rows of `count` slots, [B, count, W]: all alike."""
        unknown = self.unknown()
        assert unknown is not None, "a network that drafts several tokens in one forward"
        if self.shape.kind == OURS:
            one = self.in_proj(torch.cat([self.mask_embedding, unknown]))
        else:
            one = self._rows(self._mask_row(), unknown)
        return one.expand(batch, count, -1)

    def _mask_row(self) -> Tensor:
        """The embedding of a token that is not known, [H]."""
        return self.mask_row if self.shape.own_mask else self.embedding[self.shape.mask_token]

    def whole_embedding(self) -> Tensor:
        """With what it has of its own, [tokens, H]."""
        table = self.embedding.detach()
        if not self.shape.own_mask:
            return table
        return table.index_copy(
            0, torch.tensor([self.shape.mask_token], device=self.device), self.mask_row.detach()[None]
        )

    def unknown(self) -> Tensor | None:
        """x where no feature is known, [H]."""
        if self.shape.kind == OURS:
            return self.shared_hidden
        return self.fused(self.mask_hidden[0, 0]) if self.shape.kind == PEAGLE else None

    # What follows

    def stack(
        self, x: Tensor, positions: Tensor, mask: Tensor | Sequence[Tensor], past: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """The layers.  x: [B, R, W]; positions: int64 [R]; mask: bool [R, past + R], or one for each layer.

        Returns hidden states [B, R, H], and each layer's new keys and values.
        """
        turn = self._rotary[0].turns(positions, x)
        made = []
        masks = [mask] * len(self.layers) if isinstance(mask, Tensor) else mask
        for number, (layer, seen) in enumerate(zip(self.layers, masks, strict=True)):
            x, new = layer(x, turn, seen, past[number] if past else None)
            made.append(new)
        return x, made

    def read(self, numbers: Tensor, rows: Tensor | None, masks: list[Tensor], past: list[KeyValue]) -> list[Tensor]:
        """`stack` of one text as a `NetworkForward` calls it; `numbers`: positions; `masks`: one, or one a layer.
        Returns hidden states [R, H], and keys and values, layer by layer."""
        assert rows is not None, "rows that are more than numbers"
        hidden, made = self.stack(rows[None], numbers[0], masks if self.shape.windows else masks[0], past)
        return [hidden[0], *(one for pair in made for one in pair)]

    def logits(self, hidden: Tensor) -> Tensor:
        """Over the draft vocabulary, [..., D], of hidden states [..., H]."""
        return self.head(self._normed(hidden))

    def after(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows after some tokens: what the token adds to the logits, [P, D], and the logit of the chance that the
        best guess is right, [P] (DSpark, 2026).  tokens: int64 [P]; hidden: [P, H]"""
        before = self.markov_w1(tokens)
        return self.markov_w2(before), self.confidence(torch.cat([hidden, before], -1))[..., 0]

    def carried(self, hidden: Tensor) -> Tensor:
        """x of the next row, [..., H], where its features are not known."""
        return self._normed(hidden) if self.shape.norm_output else hidden

    def _normed(self, hidden: Tensor) -> Tensor:
        if self.shape.kind == EAGLE:
            return hidden
        return self._target[1](hidden) if self.shape.kind == OURS else self.norm(hidden)


def _cut(head: Any, ids: Tensor) -> nn.Linear:
    """The rows of a head that belong to some tokens."""
    ids = ids.to(head.weight.device)
    return linear_of(head.weight.detach()[ids], None if head.bias is None else head.bias.detach()[ids])
