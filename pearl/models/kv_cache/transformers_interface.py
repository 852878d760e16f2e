"""All that is known here of transformers' cache and attention interfaces.

A forward hands its cache to the model twice. As transformers' own cache argument: each layer writes its keys and values
there (`update`). And as a further keyword argument, which transformers passes down to the attention function: there the
cache computes the attention over itself (`attend`). Nothing is global, so several models may run in several threads.

Refuses to know: where keys and values lie (`pearl.models.kv_cache.slot_cache`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel

from pearl.core.token_buckets import CannotBranch
from pearl.machine.transfers import SentOnce, sent
from pearl.models.kv_cache.attention import AttentionMask, LayerCall, folded_heads

CACHE_ATTENTION = "pearl_cache"  # the name of our attention in a model's config
PLAIN = "pearl_plain"  # attribute of a model that `read_plainly` reads as it reads itself
WINDOW = "pearl_window"  # attribute of an attention module: its `Window`, or None


class RowsBefore:
    """What a layer gets that asks how many rows came before its own, to number these from there on (Llama 4's). Rows
    beside a chain or of several texts have no such number: whatever it adds this to becomes their positions."""

    def __init__(self, positions: Tensor):
        """positions: [rows]"""
        self._positions = SentOnce(positions)

    def __radd__(self, rows: Tensor) -> Tensor:
        return self._positions.on(rows.device)


class ForwardCache(Cache):
    """A cache that knows what the rows of the next forward see, and that may compute their attention itself."""

    is_compileable = False
    mask: AttentionMask  # of the next forward

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.attended = False  # the attention function of the forward has found this cache
        self.first = 0  # position of the next forward's first row, if it reads one chain
        self.before: RowsBefore | None = None  # of the next forward's rows, if it reads one row of a batch

    @property
    def must_attend(self) -> bool:
        """Whether the attention over what `update` returned would be wrong without `attend`."""
        return False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: LayerCall) -> Tensor:
        """The attention of the rows over what `update` returned, [B, heads, rows, head_dim]."""
        return folded_heads(query, key, value, self.mask, call)

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        return self.first if layer_idx is None or self.before is None else self.before

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.first

    def get_mask_sizes(self, query_length: object, layer_idx: int = 0) -> tuple[int, int]:
        return self.mask.visible.shape[-1], 0


def forward(
    model: PreTrainedModel, tokens: Tensor, positions: Tensor, cache: ForwardCache, keep: int | Tensor = 0
) -> Tensor:
    """Logits [B, rows kept, V] of a forward of tokens [B, rows] at positions [B, rows].

    `keep`: see transformers' `logits_to_keep`. Raises `CannotBranch` where the cache must compute the attention and the
    model does not hand it down.
    """
    if getattr(model, PLAIN, False) and uses_cache_attention(model):
        return read_plainly(model, tokens, positions, cache, keep)
    arguments: dict[str, Any] = {cache_argument(type(model).forward): cache, "use_cache": True}
    cache.before = None
    if uses_cache_attention(model):
        cache.before = RowsBefore(positions[0]) if len(positions) == 1 else None
        arguments |= {"attention_cache": cache, "attention_mask": sent(cache.mask.visible, model.device)}
    else:  # the model makes its masks itself, of a chain whose rows lie at slot = position
        # slots behind the last row are padding: with none, transformers gives a single row no mask at all
        used = torch.arange(cache.mask.visible.shape[-1], device=model.device) < cache.first + tokens.shape[1]
        arguments["attention_mask"] = used.long()[None]
    cache.attended = False
    out = model(
        input_ids=sent(tokens, model.device),
        position_ids=sent(positions, model.device),
        logits_to_keep=sent(keep, model.device) if isinstance(keep, Tensor) else keep,
        **arguments,
    )
    if cache.must_attend and not cache.attended:
        raise CannotBranch
    return out.logits


def read_plainly(
    model: PreTrainedModel, tokens: Tensor, positions: Tensor, cache: ForwardCache, keep: int | Tensor = 0
) -> Tensor:
    """The same of a model that is an embedding, layers with rotary positions, a norm and a head and nothing more, on
    its own device: what transformers does around that takes a third of a millisecond a forward."""
    base: Any = model.base_model
    x = base.embed_tokens(tokens)
    angles, arguments = base.rotary_emb(x, position_ids=positions), {cache_argument(type(model).forward): cache}
    for layer in base.layers:
        x = layer(x, None, position_embeddings=angles, position_ids=positions, attention_cache=cache, **arguments)
    x = base.norm(x)
    head: Any = model.get_output_embeddings()
    out: Tensor = head(x[:, keep] if isinstance(keep, Tensor) else x[:, -keep:])
    return out


@functools.cache
def takes_cache(model: PreTrainedModel) -> bool:
    """Whether the model reads a text on from keys and values that it is given, as far as its forward says so."""
    known = inspect.signature(type(model).forward).parameters
    return "input_ids" not in known or "past_key_values" in known or "cache" in known


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a forward calls its cache: newer versions of transformers say `cache`, older ones `past_key_values`."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def cache_attention(
    module: nn.Module,
    query: Tensor,  # [B, heads, rows, head_dim]
    key: Tensor,  # [B, kv heads, slots, head_dim]
    value: Tensor,
    attention_mask: Tensor,  # bool [1 or B, 1, rows, slots]
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    attention_cache: ForwardCache | None = None,
    **_: object,  # what else there is was looked at (`pearl.models.kv_cache.attention_probe`)
) -> tuple[Tensor, None]:
    """Scaled dot-product attention as a model's layers call it, [B, rows, heads, head_dim], contiguous."""
    layer: int = module.layer_idx if hasattr(module, "layer_idx") else 0  # type: ignore[assignment]
    call = LayerCall(layer, scaling, getattr(module, WINDOW, None), softcap, s_aux)
    if attention_cache is None:  # a forward that is not ours, with masks of the model's own
        out = folded_heads(query, key, value, AttentionMask(attention_mask), call._replace(window=None))
    else:
        attention_cache.attended = True
        out = attention_cache.attend(query, key, value, call)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(CACHE_ATTENTION, cache_attention)


def use_transformers_attention(model: PreTrainedModel) -> None:
    """Takes our attention out of a model."""
    if uses_cache_attention(model):
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")


def uses_cache_attention(model: PreTrainedModel) -> bool:
    """Whether caches compute this model's attention: side rows and shared forwards need that."""
    return model.config._attn_implementation == CACHE_ATTENTION
