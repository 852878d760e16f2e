"""DFlash and DSpark checkpoints: what config.json and the tensors' shapes say of one. No torch here.

    z-lab      config.json of a Qwen3 with `dflash_config` beside it; no embedding and no head, which are the target's
    DeepSpec   the same keys at the top, an own embedding and head; its DFlash is a DSpark without DSpark's two heads
    envelope   `speculators_model_type` dflash or dspark; an own head where the vocabulary is cut (`d2t`)

`target_layer_ids` name the layer whose output is read; `aux_hidden_state_layer_ids` of the envelope say how many layers
have run, so they are one more for the same layers. Row j of a block guesses the token at its own position, and the one
after it where DSpark's training made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pearl.checkpoints.drafts.feature_formats import listed, misfit, plain_shapes
from pearl.checkpoints.drafts.files import DraftFiles, Shapes
from pearl.checkpoints.drafts.layer_config import LayerConfig, tokens_ahead
from pearl.drafters.dflash.shape import DFLASH, DSPARK, DFlashShape
from pearl.errors import UsageError

_TITLES = {DFLASH: "DFlash head", DSPARK: "DSpark head"}
_LAYERS = 32  # of an envelope that does not say: it leaves out what a Qwen3Config has by default
_QWENS = "DFlashDraftModel"  # whose layers are Qwen3's, whatever `model_type` says
_MARKOV, _CONFIDENCE = "markov_head.markov_w1.weight", "confidence_head.proj.weight"


def is_dflash(files: DraftFiles) -> bool:
    config = files.config
    if kind := config.get("speculators_model_type"):
        return kind in (DFLASH, DSPARK)
    at_top = "target_layer_ids" in config and "mask_token_id" in config
    return at_top or _named(config, DFLASH) or _named(config, DSPARK) or "target_layer_ids" in _inside(config)


def _inside(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("dflash_config") or {}


def _named(config: Mapping[str, Any], kind: str) -> bool:
    return any(kind in str(name).lower() for name in config.get("architectures") or ())


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
        shape = _read(files.name, config, inner, shapes, envelope)
    except UsageError:
        raise
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"The config.json of the draft {files.name} (DFlash) lacks a value that it needs, or has another form "
            f"({type(error).__name__}: {error})."
        ) from None
    _fit(files.name, shape, shapes)
    return shape


def _refuse(name: str, config: Mapping[str, Any], inner: Mapping[str, Any], shapes: Shapes) -> None:
    said = {**inner, **config, **_inside(config)}
    if _named(config, "dflash2") or "selector_rank" in said or any("candidate_selector." in one for one in shapes):
        raise UsageError(
            f"The draft {name} is a DFlash2 head, whose selector pearl does not have: choose a DFlash or DSpark one."
        )
    if any("conv" in one or "gru" in one.lower() for one in shapes):
        raise UsageError(
            f"The draft {name} has convolutions or a GRU in its block (DFlash2, Domino), which pearl does not have: "
            "choose a DFlash or DSpark head."
        )
    if said.get("projector_type") not in (None, DFLASH, DSPARK):
        raise UsageError(
            f"The draft {name} has a projector of the type {str(said['projector_type'])[:40]!r}, and pearl knows "
            f"{DFLASH} and {DSPARK}: choose a DFlash or DSpark head."
        )
    if said.get("markov_head_type", "vanilla") == "rnn" and said.get("markov_rank"):
        raise UsageError(
            f"The Markov head of the draft {name} is recurrent (rnn), and a tree has no one past: choose a vanilla or "
            "gated one."
        )


def _read(
    name: str, config: Mapping[str, Any], inner: Mapping[str, Any], shapes: Shapes, envelope: bool
) -> DFlashShape:
    said: dict[str, Any] = {**config, **_inside(config)}
    qwens = not envelope and _QWENS in (config.get("architectures") or ())
    own = LayerConfig.of(name, inner, "qwen3" if qwens else inner.get("model_type", "qwen3"), _LAYERS)
    head, kind = shapes.get("lm_head.weight"), said.get("speculators_model_type")
    dspark = DSPARK in (kind, said.get("projector_type")) or (not envelope and _named(config, DSPARK))
    from_anchor = bool(said.get("sample_from_anchor", dspark))
    if envelope:
        both_ways = bool(said.get("sliding_window_non_causal"))
        causal = tuple(window > 0 and not both_ways for window in own.windows)
    else:
        whole = said.get("is_causal")
        causal = own.sliding if whole is None else (bool(whole),) * own.layers
    usual = kind == DSPARK  # what an envelope leaves out then, and other files say by their tensors
    rank = int(said.get("markov_rank", shapes.get(_MARKOV, (0, 256 * usual))[1]) or 0)
    wide = shapes.get(_CONFIDENCE, (1, own.hidden + rank * bool(said.get("confidence_head_with_markov", True))))[1]
    sure = _CONFIDENCE in shapes if shapes else bool(said.get("enable_confidence_head", usual))
    block = tokens_ahead(name, "block_size", said.get("block_size") or (8 if envelope else 16))
    return DFlashShape(
        kind=DSPARK if rank or sure or usual else DFLASH,
        features=_features(said, own.layers, envelope),
        hidden=own.hidden,
        layers=own.layers,
        depths=block - (not from_anchor),
        mask_token=int(said["mask_token_id"]),
        vocabulary=int(head[0] if head else said.get("draft_vocab_size") or own.known),
        known=own.known,
        config=_as_qwen3(own),
        own_head=head is not None,
        own_embedding="embed_tokens.weight" in shapes,
        mapped="d2t" in shapes,
        from_anchor=from_anchor,
        windows=own.windows,
        causal=causal,
        window_from_anchor=envelope,
        markov_rank=rank,
        gated=said.get("markov_head_type") == "gated",
        confidence=sure,
        confident_markov=sure and rank > 0 and wide > own.hidden,
        embedding_scale=float(said.get("input_embedding_scale") or 1.0),
        output_scale=float(said.get("output_multiplier") or 1.0),
        softcap=float(said.get("final_logit_softcapping") or 0.0),
        target=str(((said.get("speculators_config") or {}).get("verifier") or {}).get("name_or_path") or ""),
    )


def _as_qwen3(own: LayerConfig) -> dict[str, Any]:
    """As transformers reads it."""
    return {
        "vocab_size": own.known,
        "hidden_size": own.hidden,
        "intermediate_size": own.intermediate,
        "num_hidden_layers": own.layers,
        "num_attention_heads": own.heads,
        "num_key_value_heads": own.kv_heads,
        "head_dim": own.head_dim,
        "hidden_act": own.activation,
        "max_position_embeddings": own.positions,
        "rms_norm_eps": own.eps,
        "rope_parameters": own.rope,
        "attention_bias": own.attention_bias,
    }


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
    wanted: dict[str, tuple[int, ...]] = {"fc.weight": (shape.hidden, len(shape.features) * shape.hidden)}
    rows = shape.config["num_attention_heads"] * shape.config["head_dim"]
    for layer in range(shape.layers):
        wanted[f"layers.{layer}.self_attn.q_proj.weight"] = (rows, shape.hidden)
        wanted[f"layers.{layer}.mlp.up_proj.weight"] = (shape.config["intermediate_size"], shape.hidden)
    if shape.own_embedding:
        wanted["embed_tokens.weight"] = (shape.known, shape.hidden)
    if shape.markov_rank:
        wanted[_MARKOV] = (shape.known, shape.markov_rank)
    if shape.mapped:
        wanted["d2t"] = (shape.vocabulary,)
    if tensor := misfit(name, shapes, wanted):
        raise UsageError(
            f"The weights of the draft {name} do not fit its config.json, which names {len(shape.features)} layers of "
            f"{shape.hidden} numbers: by it {tensor} has the shape {list(wanted[tensor])} and not "
            f"{list(shapes[tensor])}."
        )


def line(shape: DFlashShape, layers: int | None, config: Mapping[str, Any]) -> str:
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
    if "speculators_model_type" in config:
        how = f"its ids {listed([one + 1 for one in shape.features])} say how many layers have run"
    elif {**config, **_inside(config)}.get("target_layer_ids"):
        how = f"its ids {listed(shape.features)} name the layers"
    else:
        how = "by default: its config.json names none"
    return f"{', '.join(parts)} ({how})"
