"""What a model's config says of its cache: how many tokens it may hold, and how many bytes they take."""

from __future__ import annotations

from transformers import PretrainedConfig

from pearl.core.token_buckets import GRAIN
from pearl.errors import UsageError
from pearl.models.kv_cache.slot_cache import SCRATCH_SLOTS


def bytes_of_a_sequence(config: PretrainedConfig, tokens: int, width: int) -> int:
    """Of the keys and values of one sequence, in numbers of `width` bytes."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slots = -(-tokens // GRAIN) * GRAIN + SCRATCH_SLOTS
    return 2 * config.num_hidden_layers * heads * head_dim * slots * width


_ALIBI = "its position bias from a mask of its own, which the cache would override"
_OWN_MASKS = {  # settings of models whose own mask is more than causal and would be overridden
    "alibi": _ALIBI,
    "attention_types": "local masks of its own, which the cache would override",
    "use_bidirectional_attention": "tokens see what follows them, so it does not write texts",
}


def longest_sequence(config: PretrainedConfig) -> int:
    """How many tokens the model can read with a plain causal mask.

    Raises `UsageError` for layers that keep a state instead of keys, which can't go back after a wrong guess.
    """
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    other = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if other or not hasattr(config, "num_attention_heads"):
        what = ", ".join(sorted(other)) or config.model_type
        raise UsageError(f"The model has layers without a key-value cache ({what}): choose a decoder-only transformer.")
    own = next((why for name, why in _OWN_MASKS.items() if getattr(config, name, None)), None)
    if own or config.model_type == "bloom":
        raise UsageError(f"{config.model_type} makes {own or _ALIBI}: choose another model.")
    limits = [getattr(config, "max_position_embeddings", None) or 1 << 20]
    sliding = "sliding_attention" in kinds or (not kinds and getattr(config, "use_sliding_window", True))
    if sliding and getattr(config, "sliding_window", None):
        limits.append(config.sliding_window)  # up to here a window masks nothing that causality does not
    if "chunked_attention" in kinds:
        limits.append(config.attention_chunk_size)
    return min(limits)
