"""What a model's config says of its cache: how many tokens it may hold, and how many bytes they take."""

from __future__ import annotations

from transformers import PretrainedConfig

from pearl.core.token_buckets import SLOT_MULTIPLE
from pearl.errors import UsageError
from pearl.models.kv_cache.slot_cache import SCRATCH_SLOTS


def bytes_of_a_sequence(config: PretrainedConfig, tokens: int, width: int) -> int:
    """Of the keys and values of one sequence, in numbers of `width` bytes."""
    slots = -(-tokens // SLOT_MULTIPLE) * SLOT_MULTIPLE + SCRATCH_SLOTS
    layers = layers_of(config)
    own = len(layers) - (getattr(config.get_text_config(), "num_kv_shared_layers", None) or 0)
    return sum(map(_numbers_of_a_token, layers[:own])) * slots * width


def layers_of(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The config by which each layer is made. Where layers differ (Gemma 4), newer versions of transformers have one of
    each, and refuse to tell of all what differs."""
    text = config.get_text_config()
    if getattr(text, "is_heterogeneous", False):
        return list(text.per_layer_config)
    return [text] * getattr(text, "num_hidden_layers", 0)


def _numbers_of_a_token(layer: PretrainedConfig) -> int:
    """That a layer keeps."""
    if latent := getattr(layer, "kv_lora_rank", None):
        return int(latent + layer.qk_rope_head_dim)
    heads = getattr(layer, "num_key_value_heads", None)
    if getattr(layer, "multi_query", False) and not getattr(layer, "new_decoder_architecture", False):
        heads = 1
    head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return int(2 * (heads or layer.num_attention_heads) * head_dim)


_OWN_MASKS = {  # settings of models whose own mask is more than causal ("vision": of pictures' tokens only)
    "attention_types": "local masks of its own",
    "use_bidirectional_attention": "masks in which tokens see what follows them, so it does not write texts",
}


def longest_sequence(config: PretrainedConfig) -> int:
    """How many tokens the model can read.

    Rotary embeddings that change all positions once a text is longer than the model was trained on end there
    (`rope_border`). Raises `UsageError` for layers that keep a state instead of keys, which can't go back after a wrong
    guess.
    """
    config = config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    other = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if other or not any(hasattr(layer, "num_attention_heads") for layer in layers_of(config)):
        what = ", ".join(sorted(other)) or config.model_type
        raise UsageError(
            f"The model has layers without a key-value cache ({what}): choose a decoder-only transformer"
            " (docs/explanations/hybrids.md says why)."
        )
    said = {name: getattr(config, name, None) for name in _OWN_MASKS}
    if own := next((_OWN_MASKS[name] for name, value in said.items() if value and value != "vision"), None):
        raise UsageError(f"{config.model_type} makes {own}: choose another model.")
    if getattr(config, "recurrent_kv_cache_mode", None) == "last_loop":
        raise UsageError(f"{config.model_type} shares its last loop's keys, which can't be read here: choose another.")
    limits = [getattr(config, "max_position_embeddings", None), rope_border(config)]
    if kept := getattr(config, "keep_window_size", None):  # Doge's mask leaves out tokens once there are more slots
        limits.append(kept // SLOT_MULTIPLE * SLOT_MULTIPLE)
    return min((limit for limit in limits if limit), default=1 << 20)


def rope_border(config: PretrainedConfig) -> int | None:
    """The length of a text from which on all its positions have other rotary factors; None: there is none.

    Beyond it every key would have to be made anew (longrope), or at every token (dynamic).
    """
    config = config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = [ropes] if "rope_type" in ropes else [one for one in ropes.values() if isinstance(one, dict)]
    borders = [
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for rope in ropes
        if rope.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(borders, default=None)
