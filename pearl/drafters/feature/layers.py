"""The layers of the networks over hidden states: Llama's, with the options of Qwen2's and Qwen3's.

Parts are called as in the published files, so that a file's tensors and a target's layer can be the start.

Shapes: B texts, R rows, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pearl.drafters.feature.shape import EAGLE, OURS, DrafterShape
from pearl.errors import UsageError
from pearl.models.fused_layers import Rotation, rotated
from pearl.models.kv_cache.slot_cache import KeyValue


class Attention(nn.Module):
    def __init__(self, shape: DrafterShape, width: int):
        """`width`: numbers of a row that is read."""
        super().__init__()
        self._shape = shape
        wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(width, wide, bias=shape.attention_bias)
        self.k_proj = nn.Linear(width, narrow, bias=shape.attention_bias)
        self.v_proj = nn.Linear(width, narrow, bias=shape.attention_bias)
        self.o_proj = nn.Linear(wide, shape.hidden, bias=shape.output_bias)
        if shape.qk_norm:
            self.q_norm = nn.RMSNorm(shape.head_dim, shape.eps)
            self.k_norm = nn.RMSNorm(shape.head_dim, shape.eps)

    def forward(self, x: Tensor, turn: Rotation, mask: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """x: [B, R, width]; turn: cosines and sines [R, head_dim]; mask: bool [R, past + R]."""
        batch, rows, _ = x.shape
        q, k, v = (
            project(x).view(batch, rows, -1, self._shape.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self._shape.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotated(q.transpose(1, 2), turn), rotated(k.transpose(1, 2), turn), v.transpose(1, 2)
        keys, values = (k, v) if past is None else (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, rows, -1)), (k, v)


class Mlp(nn.Module):
    """SwiGLU, or what the config's activation makes of it."""

    def __init__(self, shape: DrafterShape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=shape.mlp_bias)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=shape.mlp_bias)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=shape.mlp_bias)
        if shape.activation not in ACT2FN:
            raise UsageError(f"The draft's hidden_act is {shape.activation[:40]!r}, which transformers does not know.")
        self._activation = ACT2FN[shape.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self._activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """An ordinary layer. EAGLE-1's first one has no norm before its attention."""

    def __init__(self, shape: DrafterShape, first: bool = False):
        super().__init__()
        self.input_layernorm: nn.Module = nn.RMSNorm(shape.hidden, shape.eps)
        if first and shape.kind == EAGLE:
            self.input_layernorm = nn.Identity()
        self.self_attn = Attention(shape, shape.hidden)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, turn: Rotation, mask: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        seen, made = self.self_attn(self.input_layernorm(x), turn, mask, past)
        x = x + seen
        return x + self.mlp(self.post_attention_layernorm(x)), made


class PairLayer(nn.Module):
    """The first layer of EAGLE-3: it reads a token's embedding beside the hidden state of the position before."""

    def __init__(self, shape: DrafterShape):
        super().__init__()
        self._norm_before_residual = shape.norm_before_residual
        self.input_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.hidden_norm = nn.RMSNorm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape, 2 * shape.hidden)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.mlp = Mlp(shape)

    def forward(self, pair: Tensor, turn: Rotation, mask: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """pair: [B, R, 2 H], embedding and hidden state."""
        embedded, x = pair.chunk(2, -1)
        normed = self.hidden_norm(x)
        seen, made = self.self_attn(torch.cat([self.input_layernorm(embedded), normed], -1), turn, mask, past)
        x = (normed if self._norm_before_residual else x) + seen
        return x + self.mlp(self.post_attention_layernorm(x)), made


def layers_of(shape: DrafterShape) -> nn.ModuleList:
    first: nn.Module = Layer(shape, first=True) if shape.kind in (EAGLE, OURS) else PairLayer(shape)
    return nn.ModuleList([first, *(Layer(shape) for _ in range(1, shape.layers))])


class Rotary:
    """Cosines and sines of the rotary angles (RoFormer, Su et al. 2021), scaled as transformers does. No module: its
    frequencies stay in float32 whatever the network's numbers are."""

    def __init__(self, shape: DrafterShape):
        config = LlamaConfig(
            hidden_size=shape.heads * shape.head_dim,  # which a layer may map from and to another width
            num_attention_heads=shape.heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.positions,
            rope_parameters=dict(shape.rope),
        )
        self._made: Any = LlamaRotaryEmbedding(config)

    def to(self, device: torch.device | str) -> Rotary:
        self._made = self._made.to(device)
        return self

    def turns(self, positions: Tensor, like: Tensor) -> Rotation:
        """Of int64 positions [R], each [R, head_dim], of the kind of `like`."""
        cosines, sines = self._made(like, positions[None])
        return cosines[0], sines[0]
