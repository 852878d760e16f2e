"""EAGLE-3 from its formulas and a file's tensors alone, one row at a time: a second, independent oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.pow(2).mean() + eps).sqrt()


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary angles of each head, x: [heads, d] (RoFormer)."""
    half = x.shape[1] // 2
    angles = position * theta ** -(torch.arange(half).float() / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], 1)


def chain_logits(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    embedding: Tensor,
    features: Tensor,
    tokens: Sequence[int],
    prefix: str = "midlayer.",
    window: int = 0,
) -> list[Tensor]:
    """Logits over the draft vocabulary after each of `tokens` but the first. features: [known, 3 T], of the first
    positions; beyond them its own hidden state stands in. `window`: positions that are seen; 0: all."""
    heads, groups, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    keys: list[Tensor] = []
    values: list[Tensor] = []
    found, h = [], torch.zeros(0)
    for position in range(1, len(tokens)):
        known = position - 1 < len(features)
        x = features[position - 1] if known else h
        if known and "fc.weight" in part:
            x = part["fc.weight"] @ x
        normed = norm(x, part["hidden_norm.weight"], eps)
        pair = torch.cat([norm(embedding[tokens[position]], part["input_layernorm.weight"], eps), normed])
        q, k, v = (
            (part[f"self_attn.{one}_proj.weight"] @ pair).view(count, -1)
            for one, count in (("q", heads), ("k", groups), ("v", groups))
        )
        theta = config.get("rope_theta", 10000.0)
        keys.append(turned(k, position, theta).repeat_interleave(heads // groups, 0))
        values.append(v.repeat_interleave(heads // groups, 0))
        near_keys, near_values = torch.stack(keys[-window:]), torch.stack(values[-window:])
        scores = torch.einsum("hd,nhd->hn", turned(q, position, theta), near_keys) / q.shape[1] ** 0.5
        seen = torch.einsum("hn,nhd->hd", scores.softmax(-1), near_values).flatten()
        h = (normed if config.get("norm_before_residual") else x) + part["self_attn.o_proj.weight"] @ seen
        inner = norm(h, part["post_attention_layernorm.weight"], eps)
        gate = torch.nn.functional.silu(part["mlp.gate_proj.weight"] @ inner)
        h = h + part["mlp.down_proj.weight"] @ (gate * (part["mlp.up_proj.weight"] @ inner))
        out = norm(h, part["norm.weight"], eps)
        found.append(part["lm_head.weight"] @ out)
        h = out if config.get("norm_output") else h
    return found
