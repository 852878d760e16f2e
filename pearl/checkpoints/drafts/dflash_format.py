"""DFlash and DSpark checkpoints: what config.json and the tensors' shapes say of one. No torch here.

    z-lab      config.json of a Qwen3 with `dflash_config` beside it; no embedding and no head, which are the target's
    envelope   `speculators_model_type` dflash or dspark; an own head where the vocabulary is cut (`d2t`)

z-lab's `target_layer_ids` name the layer whose output is read; `aux_hidden_state_layer_ids` of the envelope say how
many layers have run, so they are one more for the same layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pearl.checkpoints.drafts.feature_formats import listed, misfit, plain_shapes
from pearl.checkpoints.drafts.files import DraftFiles, Shapes
from pearl.drafters.dflash.shape import DFLASH, DSPARK, DFlashShape
from pearl.errors import UsageError

MODEL_TYPES = ("qwen3", "qwen2", "llama")  # whose configs describe the layers, which are Qwen3's in all
_TITLES = {DFLASH: "DFlash head", DSPARK: "DSpark head"}
_HIDDEN, _LAYERS, _WORDS = 4096, 32, 151936  # of a Qwen3Config that does not say: the envelope leaves these out
_OTHER = ("auto_map", "architectures", "dflash_config", "quantization_config")


def is_dflash(files: DraftFiles) -> bool:
    config = files.config
    if kind := config.get("speculators_model_type"):
        return kind in (DFLASH, DSPARK)
    named = any("dflash" in str(name).lower() for name in config.get("architectures") or ())
    return named or "target_layer_ids" in (config.get("dflash_config") or {})


def read(files: DraftFiles) -> DFlashShape:
    """Raises `UsageError`."""
    config = files.config
    envelope = "speculators_model_type" in config
    inner = config.get("transformer_layer_config") if envelope else config
    if not isinstance(inner, dict):
        raise UsageError(f"The config.json of the draft {files.name} has no transformer_layer_config: it is damaged.")
    shapes = plain_shapes(files)
    _refuse(files.name, config, inner, shapes)
    try:
        shape = _read(config, inner, shapes, envelope)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"The config.json of the draft {files.name} (DFlash) lacks a value that it needs, or has another form "
            f"({type(error).__name__}: {error})."
        ) from None
    _fit(files.name, shape, shapes)
    return shape


def _refuse(name: str, config: Mapping[str, Any], inner: Mapping[str, Any], shapes: Shapes) -> None:
    model_type = inner.get("model_type", "qwen3")
    if model_type not in MODEL_TYPES:
        raise UsageError(
            f"The draft {name} has {str(model_type)[:40]} layers, and pearl reads DFlash of {', '.join(MODEL_TYPES)}."
        )
    said = {**inner, **config, **(config.get("dflash_config") or {})}
    second = any("dflash2" in str(one).lower() for one in config.get("architectures") or ())
    if second or "selector_rank" in said or any("candidate_selector." in one for one in shapes):
        raise UsageError(
            f"The draft {name} is a DFlash2 head, whose selector pearl does not have: choose a DFlash or DSpark one."
        )
    if any("conv" in one or "gru" in one.lower() for one in shapes):
        raise UsageError(
            f"The draft {name} has convolutions or a GRU in its block (DFlash2, Domino), which pearl does not have: "
            "choose a DFlash or DSpark head."
        )
    if said.get("markov_head_type", "vanilla") == "rnn" and said.get("markov_rank"):
        raise UsageError(
            f"The Markov head of the draft {name} is recurrent (rnn), and a tree has no one past: choose a vanilla or "
            "gated one."
        )


def _read(config: Mapping[str, Any], inner: Mapping[str, Any], shapes: Shapes, envelope: bool) -> DFlashShape:
    said: dict[str, Any] = {**config, **(config.get("dflash_config") or {})}
    layers, hidden = int(inner.get("num_hidden_layers", _LAYERS)), int(inner.get("hidden_size", _HIDDEN))
    known = int(inner.get("vocab_size", _WORDS))
    own_head = "lm_head.weight" in shapes
    vocabulary = shapes["lm_head.weight"][0] if own_head else said.get("draft_vocab_size") or known
    dspark = said.get("speculators_model_type") == DSPARK
    from_anchor = bool(said.get("sample_from_anchor", dspark))
    kinds = list(inner.get("layer_types") or ["full_attention"] * layers)
    window = int(inner.get("sliding_window") or 0)
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    both_ways = bool(said.get("sliding_window_non_causal")) if envelope else False
    whole = None if envelope else said.get("is_causal")
    rank = int(said.get("markov_rank", 256 if dspark else 0))
    sure = bool(said.get("enable_confidence_head", dspark))
    return DFlashShape(
        kind=DSPARK if dspark or rank else DFLASH,
        features=_features(said, layers, envelope),
        hidden=hidden,
        layers=layers,
        depths=int(said.get("block_size") or (8 if envelope else 16)) - (not from_anchor),
        mask_token=int(said["mask_token_id"]),
        vocabulary=int(vocabulary),
        known=known,
        config={name: value for name, value in inner.items() if name not in _OTHER},
        own_head=own_head,
        own_embedding="embed_tokens.weight" in shapes,
        mapped="d2t" in shapes,
        from_anchor=from_anchor,
        windows=windows,
        causal=tuple((bool(one) and not both_ways) if whole is None else bool(whole) for one in windows),
        window_from_anchor=envelope,
        markov_rank=rank,
        gated=said.get("markov_head_type") == "gated",
        confidence=sure,
        confident_markov=sure and rank > 0 and bool(said.get("confidence_head_with_markov", True)),
        embedding_scale=float(said.get("input_embedding_scale") or 1.0),
        output_scale=float(said.get("output_multiplier") or 1.0),
        softcap=float(said.get("final_logit_softcapping") or 0.0),
        target=str(((said.get("speculators_config") or {}).get("verifier") or {}).get("name_or_path") or ""),
    )


def _features(said: Mapping[str, Any], layers: int, envelope: bool) -> tuple[int, ...]:
    """The layers whose outputs are read."""
    if envelope:
        return tuple(int(one) - 1 for one in said["aux_hidden_state_layer_ids"])
    if said.get("target_layer_ids"):
        return tuple(map(int, said["target_layer_ids"]))
    last = int(said["num_target_layers"])
    if layers == 1:
        return (last // 2,)
    return tuple(round(1 + number * (last - 4) / (layers - 1)) for number in range(layers))


def _fit(name: str, shape: DFlashShape, shapes: Shapes) -> None:
    """Raises `UsageError` where the tensors are not those of the config."""
    if not 0 <= shape.mask_token < shape.known:
        raise UsageError(
            f"The mask_token_id of the draft {name} is {shape.mask_token}, which is none of the {shape.known} tokens "
            "that it knows: its config.json is not that of its weights."
        )
    if shape.vocabulary < shape.known and not shape.mapped and shapes:
        raise UsageError(
            f"The draft {name} drafts {shape.vocabulary} of {shape.known} tokens, and it lacks d2t, which says which: "
            "get the whole checkpoint again."
        )
    if shape.depths < 1:
        raise UsageError(f"The block_size of the draft {name} leaves no token to guess: its config.json is damaged.")
    if not shapes:
        return
    inner = {"num_attention_heads": 32, **shape.config}  # as transformers' Qwen3Config, whose heads alone are 128 wide
    usual = inner.get("model_type", "qwen3") == "qwen3" and "head_dim" not in inner
    head_dim = inner.get("head_dim") or (128 if usual else shape.hidden // inner["num_attention_heads"])
    wanted: dict[str, tuple[int, ...]] = {"fc.weight": (shape.hidden, len(shape.features) * shape.hidden)}
    rows = inner["num_attention_heads"] * head_dim
    for layer in range(shape.layers):
        wanted[f"layers.{layer}.self_attn.q_proj.weight"] = (rows, shape.hidden)
    if shape.mapped:
        wanted["d2t"] = (shape.vocabulary,)
    if tensor := misfit(name, shapes, wanted):
        raise UsageError(
            f"The weights of the draft {name} do not fit its config.json, which names {len(shape.features)} layers of "
            f"{shape.hidden} numbers: by it {tensor} has the shape {list(wanted[tensor])} and not "
            f"{list(shapes[tensor])}."
        )


def line(shape: DFlashShape, layers: int | None, envelope: bool) -> str:
    """What it is: "DFlash head, 5 layers, 15 tokens a forward, features after layers 1, 9, 17, 25 and 33 of 36"."""
    parts = [_TITLES[shape.kind], f"{shape.layers} layer{'s' * (shape.layers > 1)}"]
    if shape.vocabulary < shape.known:
        parts.append(f"{shape.vocabulary:,} draft tokens")
    parts.append(f"{shape.depths} tokens a forward")
    if shape.confidence:
        parts.append("a confidence for each")
    several = "s" * (len(shape.features) > 1)
    of = f" of {layers}" if layers is not None else ""
    parts.append(f"features after layer{several} {listed(shape.features)}{of}")
    ids = listed([one + 1 for one in shape.features] if envelope else shape.features)
    how = "say how many layers have run" if envelope else "name the layers"
    return f"{', '.join(parts)} (its ids {ids} {how})"
