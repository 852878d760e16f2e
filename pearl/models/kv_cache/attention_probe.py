"""What each layer of a model asks of its attention, found by asking it: one forward of two tokens.

An attention of our own may take a model's place only if it does all that the model's does. What a config says is not
enough for that: a mask, a bias or an argument that it did not know it would swallow, and the text would be another one.
So every layer is called once with an attention that looks at what it is given: a mask made by transformers' functions,
which tells its window; softcaps and sinks; keys and values that `update` has returned. Where there is anything else,
the model keeps its own attention, which reads chains of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from pearl.config.inputs import brief
from pearl.core.token_buckets import Check
from pearl.models.kv_cache.transformers_interface import (
    CACHE_ATTENTION,
    WINDOW,
    ForwardCache,
    RowsBefore,
    cache_argument,
    uses_cache_attention,
)
from pearl.models.kv_cache.window import Window, window_of

_PROBE = "pearl_probe"
FOUND = "pearl_attention"  # attribute of a model
_UNKNOWN = 1 << 60  # in place of a window's code
_KNOWN = {"softcap", "s_aux"}  # arguments that our attention carries out
_HARMLESS = {  # arguments that say nothing which masks or positions do not say
    "sliding_window", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "logits_to_keep", "output_router_logits", "position_embeddings", "kwargs", "return_dict", "layer_type",
}  # fmt: skip


@dataclass(frozen=True)
class ModelAttention:
    """What was found of a model."""

    why_not: str = ""  # our attention can't take its place
    owns_keys: bool = False  # attention reads the cached keys themselves, so side rows and shared forwards work
    slices_rows: bool = False  # some layers read only the rows whose logits are asked for
    windows: tuple[Window, ...] = ()  # the different ones that its layers have
    alike: tuple[tuple[int, ...], ...] = ()  # layers whose keys and values have the same shapes, on the same device


class _ProbeCache(ForwardCache):
    def __init__(self) -> None:
        super().__init__()
        self.owns_keys, self.slices_rows, self.why_not = True, False, ""
        self.windows: dict[Window, None] = {}
        self.asked: set[int] = set()
        self.keys: dict[int, Tensor] = {}
        self.alike: dict[tuple[object, ...], list[int]] = {}
        self.before = RowsBefore(torch.arange(2))

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object):
        if layer_idx not in self.keys:
            kind = key_states.shape, value_states.shape, key_states.dtype, key_states.device
            self.alike.setdefault(kind, []).append(layer_idx)
        self.keys[layer_idx] = key_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: object, layer_idx: int = 0) -> tuple[int, int]:
        return 2, 0

    def note(self, module: nn.Module, rows: int, key: Tensor, mask: object, more: dict[str, object]) -> None:
        """A layer's call."""
        code = int(mask.flatten()[0]) if isinstance(mask, Tensor) and mask.dtype == torch.int64 else _UNKNOWN
        unknown = [name for name, value in more.items() if value is not None and name not in _KNOWN | _HARMLESS]
        unknown = [name for name in unknown if not (name == "is_causal" and more[name] is True)]
        if not hasattr(module, "layer_idx"):
            self.why_not = "its layers have no numbers"
        elif unknown:
            self.why_not = f"it takes {', '.join(unknown)}"
        elif code == _UNKNOWN:
            self.why_not = "its mask is its own"
        else:
            window = Window.of_code(code)
            setattr(module, WINDOW, window)
            if window:
                self.windows[window] = None
        self.asked.add(int(module.layer_idx) if hasattr(module, "layer_idx") else -1)  # type: ignore[arg-type]
        self.owns_keys &= any(key is cached for cached in self.keys.values())
        self.slices_rows |= rows != 2


def _mask(
    batch_size: int = 1,
    q_length: int = 1,
    kv_length: int = 1,
    mask_function: Callable[..., Any] = causal_mask_function,
    device: torch.device | str = "cpu",
    **_: object,
) -> Tensor:
    """In place of a mask: the code of its window in every entry, which is still there after slices and copies."""
    try:
        window = window_of(mask_function)
        code = window.code if window else 0
    except Exception:  # of functions that look at more than positions
        code = _UNKNOWN
    return torch.full((batch_size, 1, q_length, kv_length), code, device=device)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    attention_cache: _ProbeCache | None = None,
    **more: object,
) -> tuple[Tensor, None]:
    if attention_cache is not None:
        attention_cache.note(module, query.shape[2], key, attention_mask, more)
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(_PROBE, _attention)
AttentionMaskInterface.register(_PROBE, _mask)


def use_cache_attention(model: PreTrainedModel) -> ModelAttention:
    """Switches a model to `cache_attention` if that does all that its own attention does. Says what was found."""
    found = attention_of(model)
    if not found.why_not and not uses_cache_attention(model):
        model.set_attn_implementation(CACHE_ATTENTION)
    return found


def attention_of(model: PreTrainedModel) -> ModelAttention:
    """What was found of a model, the first time that it is asked for."""
    found: ModelAttention | None = getattr(model, FOUND, None)
    if found is None:
        found = _probed(model)
        setattr(model, FOUND, found)
    return found


@torch.inference_mode()
def _probed(model: PreTrainedModel) -> ModelAttention:
    before = model.config._attn_implementation
    if before not in ("sdpa", "eager", CACHE_ATTENTION):
        return ModelAttention(f"it runs {before}")
    cache = _ProbeCache()
    try:
        model.set_attn_implementation(_PROBE)
        if model.config._attn_implementation != _PROBE:
            return ModelAttention("transformers can't exchange it")
        model(
            input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device),
            position_ids=torch.arange(2, device=model.device)[None],
            use_cache=True,
            logits_to_keep=1,
            attention_cache=cache,
            **{cache_argument(type(model).forward): cache},
        )
    except Exception as error:  # of a model that does not take this
        return ModelAttention(f"it can't be tried: {type(error).__name__}, {brief(error, 100)}")
    finally:
        model.set_attn_implementation(before)
    if not cache.asked >= set(cache.keys) or not cache.asked:
        return ModelAttention("its layers hand no cache down to it")
    alike = tuple(map(tuple, cache.alike.values()))
    return ModelAttention(cache.why_not, cache.owns_keys, cache.slices_rows, tuple(cache.windows), alike)


def attention_checks(model: PreTrainedModel) -> tuple[Check, ...]:
    """What a person should know of a model's attention."""
    found = attention_of(model)
    if found.why_not:
        return (Check("attention", False, f"the model's own, as {found.why_not}; passes are chains"),)
    if not found.owns_keys:
        return (Check("attention", True, "it reads keys that are made of what is cached; passes are chains"),)
    return ()
