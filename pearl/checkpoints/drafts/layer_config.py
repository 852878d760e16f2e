"""What a config.json says of a head's decoder layers: sizes, rotary angles, how far back they look. No torch here.

Knows: the layers that pearl's networks compute, which are Llama's, Qwen2's and Qwen3's, what transformers takes for a
key that is missing, and which values can't be meant. Refuses to know: what kind of drafter it is, and its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pearl.config.inputs import brief
from pearl.errors import UsageError

_LARGE = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6}
_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_DEFAULTS: dict[str, dict[str, Any]] = {  # what transformers takes for a missing key
    "llama": _LARGE | {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None},
    "qwen3": _LARGE | _QWEN | {"use_sliding_window": False, "head_dim": 128},
    "qwen2": _LARGE | _QWEN | {"use_sliding_window": False},
}
MODEL_TYPES = tuple(_DEFAULTS)
MOST_AHEAD = 64  # tokens of one forward, as `draft_depths` may ask for
_MOST_LAYERS, _MOST = 256, 1 << 31  # of a size: beyond it a config.json is damaged
_ROPES: dict[str, tuple[str, ...]] = {  # scalings, and what they need
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """All layers of a network."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    known: int  # tokens of its vocabulary
    positions: int
    eps: float
    activation: str
    attention_bias: bool
    rope: dict[str, Any]  # as transformers' `rope_parameters`
    sliding: tuple[bool, ...]  # by layer: it is one of those with a window
    windows: tuple[int, ...]  # by layer, of what it sees of the text; 0: all

    @staticmethod
    def of(name: str, said: Mapping[str, Any], model_type: object, layers: int) -> LayerConfig:
        """Of a draft of that `name`. `layers`: where it does not say how many there are. Raises `UsageError`, and as
        any reading of a config.json `ArithmeticError`, `TypeError`, `ValueError`."""
        if model_type not in MODEL_TYPES:
            raise UsageError(
                f"The draft {name} has {str(model_type)[:40]} layers, and pearl reads heads of "
                f"{', '.join(MODEL_TYPES)} layers."
            )
        said = _DEFAULTS[str(model_type)] | dict(said)
        heads, hidden = int(said["num_attention_heads"]), int(said["hidden_size"])
        layers = int(said.get("num_hidden_layers", layers))
        sizes = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "intermediate_size": int(said["intermediate_size"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(heads if said["num_key_value_heads"] is None else said["num_key_value_heads"]),
            "head_dim": int(said.get("head_dim") or hidden // max(1, heads)),
            "vocab_size": int(said["vocab_size"]),
            "max_position_embeddings": int(said.get("max_position_embeddings") or 2048),
        }
        for key, value in sizes.items():
            if not 1 <= value <= (_MOST_LAYERS if key == "num_hidden_layers" else _MOST):
                raise UsageError(f"The {key} of the draft {name} is {brief(value, 40)}: its config.json is damaged.")
        kv_heads, head_dim = sizes["num_key_value_heads"], sizes["head_dim"]
        if heads % kv_heads or head_dim % 2:
            raise UsageError(
                f"The draft {name} has {heads} heads and {kv_heads} of keys and values, of {head_dim} numbers each, "
                "where the second must divide the first, and the third be even: its config.json is damaged."
            )
        eps = float(said["rms_norm_eps"])
        if not 0 <= eps < 1:
            raise UsageError(f"The rms_norm_eps of the draft {name} is {eps}: its config.json is damaged.")
        sliding, window = _sliding(name, said, layers)
        return LayerConfig(
            model_type=str(model_type),
            layers=layers,
            hidden=hidden,
            intermediate=sizes["intermediate_size"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            known=sizes["vocab_size"],
            positions=sizes["max_position_embeddings"],
            eps=eps,
            activation=str(said.get("hidden_act", "silu")),
            attention_bias=bool(said.get("attention_bias")),
            rope=_rope(name, said),
            sliding=sliding,
            windows=tuple(window * one for one in sliding),
        )


def tokens_ahead(name: str, key: str, value: object) -> int:
    """For how many tokens a forward a drafter was trained. Raises `UsageError`."""
    if type(value) is not int or not 1 <= value <= MOST_AHEAD:
        raise UsageError(
            f"The {key} of the draft {name} is {brief(repr(value), 40)}: it must be a number of tokens from 1 to "
            f"{MOST_AHEAD}."
        )
    return value


def _rope(name: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers' `rope_parameters`, from either of its styles. Where nothing is said, 10000: that is what the
    networks were trained with, whatever their target has. Of a text all three sections of `mrope` are at the same
    position: the ordinary angles."""
    rope = dict(said.get("rope_parameters") or said.get("rope_scaling") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UsageError(
            f"The draft {name} turns its layers by several rotary angles ({brief(', '.join(map(str, rope)), 80)}), and "
            "pearl by one for all: choose another head."
        )
    if any((one.get("partial_rotary_factor") or 1) != 1 for one in (rope, said)):
        raise UsageError(
            f"The draft {name} turns a part of each head only (partial_rotary_factor), which pearl does not: choose "
            "another head."
        )
    kind = rope.setdefault("rope_type", rope.pop("type", "default"))
    theta = rope["rope_theta"] = float(rope.get("rope_theta") or said.get("rope_theta") or 10000.0)
    if not 0 < theta < math.inf:
        raise UsageError(f"The rope_theta of the draft {name} is {theta}: its config.json is damaged.")
    if kind in ("mrope", "default"):
        return {"rope_type": "default", "rope_theta": theta}
    if kind not in _ROPES:
        raise UsageError(
            f"The draft {name} scales its rotary angles by {str(kind)[:40]!r}, and pearl knows {', '.join(_ROPES)}."
        )
    if missing := [key for key in _ROPES[kind] if not rope.get(key)]:
        raise UsageError(
            f"The draft {name} scales its rotary angles by {kind!r}, and its config.json does not name "
            f"{', '.join(missing)}: add what it was trained with."
        )
    return rope


def _sliding(name: str, said: Mapping[str, Any], layers: int) -> tuple[tuple[bool, ...], int]:
    """Which layers see a window, and how long it is; 0: all of the text after all, as transformers reads a config of
    Qwen's without `use_sliding_window`."""
    kinds = list(said.get("layer_types") or ())
    if not kinds and said.get("use_sliding_window") and str(said.get("model_type")).startswith("qwen"):
        first = int(said.get("max_window_layers", 28))  # as transformers fills them in for Qwen's
        kinds = ["sliding_attention" if one >= first else "full_attention" for one in range(layers)]
    if not set(kinds) - {"full_attention"}:
        return (False,) * layers, 0
    window = int(said.get("sliding_window") or 0) if said.get("use_sliding_window", True) else 0
    if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"} or window < 0:
        raise UsageError(
            f"The layer_types of the draft {name} are {brief(', '.join(map(str, kinds)), 80)} for {layers} "
            f"layer{'s' * (layers > 1)}, and pearl knows full_attention and sliding_attention, one for each: its "
            "config.json is damaged, or choose another head."
        )
    return tuple(kind == "sliding_attention" for kind in kinds), window
