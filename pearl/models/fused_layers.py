"""Decoder layers with as few operations as they can have, for CPUs.

A small model spends a third of its forward between the products of matrices: each operation of torch takes a few
microseconds, and a layer of transformers has some seventy. Here queries, keys and values are one product, gate and up
projection another, and queries and keys are rotated together. The sums are the same, in the same order.

Taken are the layers that are built as Llama's are (Qwen2's and Qwen3's, Mistral's and more): norm, attention with
rotary positions, norm, gated MLP. A layer looks like one by its parts; that it is one is found out by asking both
(`_computes_the_same`), as a multiplier or a layer without positions shows in no name. All others stay as they are.

Letters: B sequences, R rows of each, H heads of queries, K of keys, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pearl.models.hidden_states import decoder_layers
from pearl.models.kv_cache.attention import AttentionMask
from pearl.models.kv_cache.transformers_interface import ForwardCache, cache_argument, uses_grouped_attention

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}  # the parts of a layer
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_POSITIONS = (0, 1, 2, 5, 11, 23)  # of the rows with which two layers are compared
_TOLERANCE = {torch.float32: 1e-4}  # of what a layer adds; and where products are rounded to fewer bits:
_COARSE = 2e-2


class RMSNorm:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019), rounded where transformers rounds."""

    def __init__(self, norm: nn.Module):
        self._weight = norm.get_parameter("weight").detach()
        self._epsilon = cast(float, norm.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._epsilon)
        return self._weight * wide.to(x.dtype)


class FusedLayer(nn.Module):
    """In place of a decoder layer of transformers, with its arguments."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        attention, mlp = cast(Any, layer.self_attn), cast(Any, layer.mlp)
        self.self_attn = attention  # for what the attention asks of it
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = _side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = attention.o_proj
        self.gate_up = _side_by_side(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj
        self.act_fn = mlp.act_fn
        self._norms = RMSNorm(layer.input_layernorm), RMSNorm(layer.post_attention_layernorm)  # type: ignore[arg-type]
        self._head_norms = None
        if hasattr(attention, "q_norm"):
            self._head_norms = RMSNorm(attention.q_norm), RMSNorm(attention.k_norm)
        self._width: int = attention.head_dim
        self._queries: int = attention.q_proj.out_features // self._width  # H
        self._rotated: int = self._queries + attention.k_proj.out_features // self._width  # H + K

    def forward(
        self,
        hidden_states: Tensor,  # [B, R, hidden]
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,  # cosines and sines, [B, R, D]
        **more: Any,
    ) -> Tensor:
        assert position_embeddings is not None, "a layer of this kind rotates its queries and keys"
        read = self.attended(self._norms[0](hidden_states), attention_mask, position_embeddings, more)
        hidden_states = hidden_states + read
        gate, up = self.gate_up(self._norms[1](hidden_states)).chunk(2, -1)
        return hidden_states + self.down_proj(self.act_fn(gate) * up)

    def attended(
        self, x: Tensor, attention_mask: Tensor | None, angles: tuple[Tensor, Tensor], more: dict[str, Any]
    ) -> Tensor:
        """What the attention over x [B, R, hidden] puts out."""
        attention = self.self_attn
        batch, rows, _ = x.shape
        heads = self.qkv(x).view(batch, rows, -1, self._width).transpose(1, 2)
        turned, value = heads[:, : self._rotated], heads[:, self._rotated :]
        if self._head_norms:
            query, key = turned[:, : self._queries], turned[:, self._queries :]
            turned = torch.cat([self._head_norms[0](query), self._head_norms[1](key)], 1)
        turned = _rotated(turned, *angles)
        query, key = turned[:, : self._queries], turned[:, self._queries :]
        cache = more.get("cache", more.get("past_key_values"))
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        out, _ = attend(attention, query, key, value, attention_mask, dropout=0.0, scaling=attention.scaling, **more)
        return self.o_proj(out.reshape(batch, rows, -1))


def fuse(model: PreTrainedModel, holds: Callable[[Tensor], bool]) -> int:
    """Replaces the decoder layers that are built that way, in place. Returns how many were.

    `holds`: whether a layer of our own could hold that weight, [out, in]."""
    if not uses_grouped_attention(model) or not model._supports_sdpa:
        return 0
    stack, replaced = decoder_layers(model), 0
    for number, layer in enumerate(stack):
        if not _looks_like_llamas(layer):
            continue
        made = FusedLayer(layer)
        if holds(made.qkv.weight) and holds(made.gate_up.weight) and _computes_the_same(model, layer, made):
            for name in _ATTENTION:
                delattr(layer.self_attn, name)  # their weights are in the memory once
            stack[number] = made
            replaced += 1
    return replaced


def _looks_like_llamas(layer: nn.Module) -> bool:
    if _parts(layer) != _LAYER:
        return False
    attention, mlp = cast(nn.Module, layer.self_attn), cast(nn.Module, layer.mlp)
    if _parts(attention) - _HEAD_NORMS != _ATTENTION or _parts(mlp) != _MLP:
        return False
    products = [getattr(attention, name) for name in _ATTENTION]
    products += [getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")]
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in _HEAD_NORMS & _parts(attention)]
    return (
        all(type(one) is nn.Linear for one in products)
        and len({getattr(attention, name).bias is None for name in ("q_proj", "k_proj", "v_proj")}) == 1
        and (mlp.gate_proj.bias is None) == (mlp.up_proj.bias is None)  # type: ignore[union-attr]
        and all(hasattr(norm, "variance_epsilon") and len([*norm.parameters()]) == 1 for norm in norms)  # type: ignore[union-attr]
        and all(hasattr(attention, name) for name in ("head_dim", "scaling", "layer_idx"))
    )


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _side_by_side(*layers: nn.Linear) -> nn.Linear:
    """One product for several of the same input."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if layers[0].bias is not None:
        made.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
    return made


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) of x [B, H + K, R, D], as transformers pairs its numbers."""
    half = x.shape[-1] // 2
    across = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cosines[:, None] + across * sines[:, None]


class _Chain(ForwardCache):
    """A few rows of a text of their own."""

    def __init__(self, rows: int):
        super().__init__()
        self.mask = AttentionMask.chain(torch.arange(rows)[None], rows)

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return key_states, value_states


@torch.inference_mode()
def _computes_the_same(model: PreTrainedModel, layer: nn.Module, made: FusedLayer) -> bool:
    """Whether two layers, and their attentions, add the same to the same rows. What fails does not."""
    weight = made.qkv.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, len(_POSITIONS), weight.shape[1], generator=generator).to(weight.dtype)
    positions, cache = torch.tensor([_POSITIONS]), _Chain(len(_POSITIONS))
    try:
        angles = model.base_model.rotary_emb(x, position_ids=positions)  # type: ignore[operator]
        mask, more = cache.mask.visible, {"attention_cache": cache, "position_ids": positions}
        more[cache_argument(type(layer).forward)] = cache
        theirs = cast(Any, layer.self_attn)(x, attention_mask=mask, position_embeddings=angles, **more)[0]
        whole = layer(x, attention_mask=mask, position_embeddings=angles, **more)
        whole = whole[0] if isinstance(whole, tuple) else whole
        ours = made.attended(x, mask, angles, more), made(x, mask, angles, **more) - x
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    allowed = _TOLERANCE.get(weight.dtype, _COARSE)
    pairs = zip(ours, (theirs, whole - x), strict=True)
    return all(bool((found - wanted).float().norm() <= allowed * wanted.float().norm()) for found, wanted in pairs)
