"""Decoder layers with as few operations as they can have, for CPUs.

A small model spends a third of its forward between the products of matrices: each operation of torch takes a few
microseconds, and a layer of transformers has some seventy. Here queries, keys and values are one product, gate and up
projection another, and queries and keys are rotated together. On the architectures that are tried the bits stay the
same.

Taken are the layers that are built as Llama's are (Qwen2's and Qwen3's, Mistral's and more): norm, attention with
rotary positions, norm, gated MLP. A layer looks like one by its parts; that it is one is found out by asking both
(`_compute_the_same`), as a multiplier or a layer without positions shows in no name. All others stay as they are.

Letters: B sequences, R rows of each, H heads of queries, K of keys, D numbers of a head.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pearl.models import linear
from pearl.models.hidden_states import decoder_layers
from pearl.models.kv_cache.attention import AttentionMask, LayerCall
from pearl.models.kv_cache.transformers_interface import (
    PLAIN,
    ForwardCache,
    cache_argument,
    forward,
    read_plainly,
    uses_cache_attention,
)

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}  # the parts of a layer
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_NEAR = 0, 1, 5, 23  # positions of rows with which two layers are compared, beside far ones
_TOLERANCE = {torch.float32: 1e-4}  # of products that are added up otherwise
_COARSE = 2e-2  # where they are rounded to fewer bits

Rotation = tuple[Tensor, Tensor]  # cosines and sines of positions, [R, D] or as far as they broadcast to x


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """x: [B, heads, R, D], turned by the angles of its positions (RoFormer, Su et al. 2021), as transformers pairs the
    numbers of a head."""
    first, second = x.chunk(2, -1)
    cosines, sines = rotation
    return x * cosines + torch.cat([-second, first], -1) * sines


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
        self.norms = RMSNorm(layer.input_layernorm), RMSNorm(layer.post_attention_layernorm)  # type: ignore[arg-type]
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
        *,
        position_embeddings: tuple[Tensor, Tensor],  # cosines and sines, [B, R, D]
        **more: Any,
    ) -> Tensor:
        read = self.attended(self.norms[0](hidden_states), attention_mask, position_embeddings, **more)
        hidden_states = hidden_states + read
        return hidden_states + self.fed_forward(self.norms[1](hidden_states))

    def fed_forward(self, x: Tensor) -> Tensor:
        """What the MLP makes of x [B, R, hidden]."""
        gate, up = self.gate_up(x).chunk(2, -1)
        product: Tensor = self.down_proj(self.act_fn(gate) * up)
        return product

    def attended(
        self, x: Tensor, attention_mask: Tensor | None, position_embeddings: tuple[Tensor, Tensor], **more: Any
    ) -> Tensor:
        """What the attention over x [B, R, hidden] puts out."""
        attention = self.self_attn
        batch, rows, _ = x.shape
        heads = self.qkv(x).view(batch, rows, -1, self._width).transpose(1, 2)
        turned, value = heads[:, : self._rotated], heads[:, self._rotated :]
        if self._head_norms:
            query, key = turned[:, : self._queries], turned[:, self._queries :]
            turned = torch.cat([self._head_norms[0](query), self._head_norms[1](key)], 1)
        cosines, sines = position_embeddings
        turned = rotated(turned, (cosines[:, None], sines[:, None]))
        query, key = turned[:, : self._queries], turned[:, self._queries :]
        cache = more.get("cache", more.get("past_key_values"))
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        out, _ = attend(attention, query, key, value, attention_mask, dropout=0.0, scaling=attention.scaling, **more)
        return self.o_proj(out.reshape(batch, rows, -1))


def fuse(model: PreTrainedModel, kernel: str) -> int:
    """Replaces the decoder layers that are built that way, in place, by ones of that kernel
    (`pearl.models.linear.pack`). Returns how many were."""
    if not uses_cache_attention(model) or not model._supports_sdpa:
        return 0
    stack, replaced = decoder_layers(model), 0
    for number, layer in enumerate(stack):
        if sum(one is layer for one in stack) > 1 or (made := _fused(model, layer, kernel)) is None:
            continue
        for name in _ATTENTION:
            delattr(layer.self_attn, name)  # their weights are in the memory once
        stack[number] = made
        linear.pack(made, kernel)  # and those of one layer at a time twice
        replaced += 1
    if replaced == len(stack):
        setattr(model, PLAIN, _is_plain(model))
    return replaced


@torch.inference_mode()
def _is_plain(model: PreTrainedModel) -> bool:
    """Whether a model of fused layers does nothing else with its tokens."""
    positions = torch.tensor([_NEAR])
    try:
        with_mine = read_plainly(model, positions, positions, _Chain(len(_NEAR)))
        return torch.equal(with_mine, forward(model, positions, positions, _Chain(len(_NEAR))))
    except Exception:  # code of others may fail in any way
        return False


@torch.inference_mode()
def _fused(model: PreTrainedModel, layer: nn.Module, kernel: str) -> FusedLayer | None:
    """None if another layer would not compute what this one does: whatever goes wrong says so too."""
    try:
        if not _looks_like_llamas(layer):
            return None
        made = FusedLayer(layer)
        held = all(linear.holds(one.weight, kernel) for one in (made.qkv, made.gate_up))
        return made if held and _compute_the_same(model, layer, made) else None
    except Exception:  # code of others may fail in any way
        return None


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
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    weight = torch.cat([layer.weight.detach() for layer in layers])
    return linear.linear_of(weight, torch.cat(biases) if biases else None)


class _Chain(ForwardCache):
    """A few rows of a text of their own. Keeps what attention was asked for."""

    def __init__(self, rows: int):
        super().__init__()
        self.mask = AttentionMask.chain(torch.arange(rows)[None], rows)
        self.asked: list[tuple[Tensor, Tensor, Tensor, LayerCall]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: LayerCall) -> Tensor:
        self.asked.append((query, key, value, call))
        return super().attend(query, key, value, call)


def _compute_the_same(model: PreTrainedModel, layer: nn.Module, made: FusedLayer) -> bool:
    """Whether two layers make the same of the same rows, near and far from the beginning of a text: their norms, what
    their attentions are asked for, what these put out, what their MLPs do, also with numbers that one which clamps
    would clamp, and what the layers add."""
    weight, config = made.qkv.weight, model.config.get_text_config()
    last = (getattr(config, "max_position_embeddings", None) or 24) - 1
    positions = torch.tensor([[*_NEAR, last // 2, last]])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, positions.shape[1], weight.shape[1], generator=generator).to(weight.dtype)
    theirs, ours = cast(Any, layer), made
    norms = zip(ours.norms, (theirs.input_layernorm, theirs.post_attention_layernorm), strict=True)
    if not all(torch.equal(mine(x), norm(x)) for mine, norm in norms):
        return False
    angles = model.base_model.rotary_emb(x, position_ids=positions)  # type: ignore[operator]
    found = []
    for attention, whole in ((theirs.self_attn, theirs), (ours.attended, ours)):
        cache = _Chain(positions.shape[1])
        more = {"attention_cache": cache, "position_ids": positions, cache_argument(type(layer).forward): cache}
        options = {"attention_mask": cache.mask.visible, "position_embeddings": angles, **more}
        out, y = attention(x, **options), whole(x, **options)
        if not isinstance(y, Tensor):
            return False
        *asked, call = cache.asked[0]
        found.append(([*asked, out[0] if isinstance(out, tuple) else out, y - x], call))
    (wanted, their_call), (given, our_call) = found
    if their_call[:4] != our_call[:4] or their_call.sinks is not our_call.sinks:
        return False
    allowed = _TOLERANCE.get(weight.dtype, _COARSE)
    for size in (1, 100):
        if not isinstance(one := theirs.mlp(size * x), Tensor):
            return False
        if bool(one.isfinite().all()):  # in float16 some are not
            given.append(ours.fed_forward(size * x))
            wanted.append(one)
    pairs = zip(given, wanted, strict=True)
    return all(bool((one - two).float().norm() <= allowed * two.float().norm()) for one, two in pairs)
