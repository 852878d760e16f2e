"""The network of DFlash and of DSpark, which adds two small heads to it.

    context     c = hidden_norm(fc(what the target's layers said at a known position)); each layer makes keys and values
                of it, which stay: c passes through no layer
    block       the last known token and mask tokens, embedded as the target does; in each layer their queries look at
                the context and, in both directions, at the block
    guesses     the target's head, or an own one, behind the last norm: row j fills in the token at its own position

DSpark's Markov head adds to a row's logits a bias of low rank by the token before; its confidence head says how likely
a row's guess is taken (arXiv 2607.05147). Layers are Qwen3's (a norm of every head's queries and keys).

Shapes: R rows, n known positions, H hidden, F = layers * H features, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding

from pearl.drafters.dflash.shape import DFlashShape
from pearl.models.draft_model import read_unknown_tokens
from pearl.models.fused_layers import Rotation, rotated
from pearl.models.kv_cache.slot_cache import KeyValue
from pearl.models.linear import linear_of


class BlockAttention(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.head_dim = config.head_dim
        wide, narrow = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=bias)
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def key_value(self, x: Tensor, turn: Rotation) -> KeyValue:
        """x: [R, H]"""
        k = self.k_norm(self.k_proj(x).view(1, len(x), -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(1, len(x), -1, self.head_dim).transpose(1, 2)
        return rotated(k, turn), v

    def forward(self, x: Tensor, turn: Rotation, mask: Tensor, past: KeyValue) -> Tensor:
        """x: [R, H]; mask: bool [R, past + R]."""
        q = self.q_norm(self.q_proj(x).view(1, len(x), -1, self.head_dim)).transpose(1, 2)
        keys, values = (torch.cat(pair, 2) for pair in zip(past, self.key_value(x, turn), strict=True))
        seen = F.scaled_dot_product_attention(rotated(q, turn), keys, values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(seen.transpose(1, 2).reshape(len(x), -1))


class BlockLayer(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = BlockAttention(config)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def forward(self, x: Tensor, turn: Rotation, mask: Tensor, past: KeyValue) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, mask, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class MarkovHead(nn.Module):
    """A bias of the draft vocabulary by the token before, of low rank."""

    def __init__(self, shape: DFlashShape):
        super().__init__()
        self.markov_w1 = nn.Embedding(shape.known, shape.markov_rank)
        self.markov_w2 = nn.Linear(shape.markov_rank, shape.vocabulary, bias=False)
        if shape.gated:
            self.gate_proj = nn.Linear(shape.hidden + shape.markov_rank, shape.markov_rank)

    def forward(self, before: Tensor, hidden: Tensor) -> Tensor:
        """[P, D].  before: [P, rank], from `markov_w1`; hidden: [P, H]"""
        if hasattr(self, "gate_proj"):
            before = torch.sigmoid(self.gate_proj(torch.cat([hidden, before], -1))) * before
        return self.markov_w2(before)


class ConfidenceHead(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Log of the chance that a guess is taken, [P].  x: [P, width]"""
        return F.logsigmoid(self.proj(x).squeeze(-1).float())


class DFlashDrafter(nn.Module):
    """What a checkpoint holds; what it leaves out is the target's (`attach`)."""

    vocabulary: Tensor | None

    def __init__(self, shape: DFlashShape, vocabulary: Tensor | None):
        """vocabulary: int64 [D], the target's ids of the tokens that can be drafted; None: all."""
        super().__init__()
        self.shape = shape
        config: Any = Qwen3Config(**shape.config)
        self.fc: nn.Module = nn.Linear(len(shape.features) * shape.hidden, shape.hidden, bias=False)
        self.hidden_norm = Qwen3RMSNorm(shape.hidden, eps=config.rms_norm_eps)
        self.layers: Any = nn.ModuleList(BlockLayer(config) for _ in range(shape.layers))
        self.norm = Qwen3RMSNorm(shape.hidden, eps=config.rms_norm_eps)
        self.markov_head = MarkovHead(shape) if shape.markov_rank else None
        wide = shape.hidden + shape.markov_rank * shape.confident_markov
        self.confidence_head = ConfidenceHead(wide) if shape.confidence else None
        if shape.own_head:
            self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        if shape.own_embedding:
            self.embed_tokens = nn.Embedding(shape.known, shape.hidden)
        self.register_buffer("vocabulary", vocabulary, persistent=False)
        self._rotary: list[Any] = [Qwen3RotaryEmbedding(config)]  # in a list: its frequencies stay in float32
        self._borrowed: list[Any] = [None, None]  # of the target: the embedding's weight, the head

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device  # linear layers may be packed, and have no weight then

    def attach(self, embedding: Tensor, head: nn.Module) -> DFlashDrafter:
        """Takes from the target what the checkpoint leaves out.  embedding: [V, H]"""
        read_unknown_tokens(self, len(embedding))
        if not self.shape.own_head:  # of a target that knows more tokens than it was trained for, those that it knows
            rows: Any = head.weight
            known = self.vocabulary if self.vocabulary is not None else slice(self.shape.vocabulary)
            if self.vocabulary is not None or len(rows) > self.shape.vocabulary:
                head = linear_of(rows.detach()[known])
        self._borrowed = [embedding.detach(), head]
        return self

    def place(self, device: torch.device | str, dtype: torch.dtype) -> DFlashDrafter:
        self._rotary = [one.to(device) for one in self._rotary]
        embedding, head = self._borrowed
        self._borrowed = [embedding.to(device, dtype), head.to(device, dtype)]
        return self.to(device, dtype).requires_grad_(False)

    @property
    def head(self) -> nn.Module:
        return self.lm_head if self.shape.own_head else self._borrowed[1]

    def replace_head(self, head: nn.Module) -> None:
        """For one that computes the same faster."""
        if self.shape.own_head:
            self.lm_head = head  # type: ignore[assignment]
        else:
            self._borrowed[1] = head

    def context(self, features: Tensor, positions: Tensor) -> list[KeyValue]:
        """Keys and values of known positions, layer by layer.  features: [n, F]; positions: int64 [n]"""
        c = self.hidden_norm(self.fc(features.to(self.norm.weight.dtype)))
        turn = self._turn(c, positions)
        return [layer.self_attn.key_value(c, turn) for layer in self.layers]

    def read(self, numbers: Tensor, rows: Tensor | None, masks: list[Tensor], past: list[KeyValue]) -> list[Tensor]:
        """`block` as a `NetworkForward` calls it.  numbers: tokens and positions, int64 [2, R]"""
        return [self.block(numbers[0], numbers[1], masks, past)]

    def block(self, tokens: Tensor, positions: Tensor, masks: Sequence[Tensor], past: Sequence[KeyValue]) -> Tensor:
        """Hidden states for the head, [R, H].  tokens, positions: int64 [R]; masks: a layer's, bool [R, past + R]"""
        own = self.shape.own_embedding
        x = self.embed_tokens(tokens) if own else F.embedding(tokens, self._borrowed[0])
        x = x * self.shape.embedding_scale
        turn = self._turn(x, positions)
        for layer, mask, one in zip(self.layers, masks, past, strict=True):
            x = layer(x, turn, mask, one)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, D], without what depends on the token before.  hidden: [R, H]"""
        found = self.head(hidden) * self.shape.output_scale
        cap = self.shape.softcap
        return torch.tanh(found / cap) * cap if cap else found

    def after(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of rows after some tokens: what the token adds to the logits, [P, D], and the log of the chance that the best
        guess is taken, [P]; None: it has no such head.  tokens: int64 [P]; hidden: [P, H], of the rows"""
        before = self.markov_head.markov_w1(tokens) if self.markov_head else None
        bias = self.markov_head(before, hidden) if self.markov_head else None
        if self.confidence_head is None:
            return bias, None
        looked = torch.cat([hidden, before], -1) if self.shape.confident_markov and before is not None else hidden
        return bias, self.confidence_head(looked)

    def _turn(self, like: Tensor, positions: Tensor) -> Rotation:
        cosines, sines = self._rotary[0](like, positions[None])
        return cosines[0], sines[0]
