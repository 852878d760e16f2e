"""Networks over a target's hidden states as they are published: what config.json and the tensors' shapes say of one.

    flat       config.json of a Llama with EAGLE's keys beside it     SafeAI, SGLang, SpecForge, AngelSlim
    envelope   `speculators_model_type`, the layer's config inside    RedHat, vLLM, and what pearl writes
    ours       drafter.json                                           what pearl wrote before

Knows: keys, names of tensors, and who counts layers how. Refuses to know: tensors' values, and what a network computes.
No torch here.

Layers are counted in two ways. EAGLE-3 takes the *inputs* of the layers 2, L // 2 and L - 3, as vLLM and `speculators`
count: id k is what k layers have made, the output of layer k - 1. SGLang and SpecForge name the layer whose *output* it
is. A file that holds the numbers of one way in the key of the other was moved there unchanged, so the numbers decide
where they can only mean one thing. DeepSpec's `target_layer_ids` name the layer whose output it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pearl.checkpoints.drafts.files import DraftFiles, Shapes
from pearl.checkpoints.drafts.layer_config import LayerConfig, tokens_ahead
from pearl.drafters.feature.shape import EAGLE, EAGLE3, OURS, PEAGLE, DrafterShape
from pearl.errors import UsageError

IDS, _OUTPUTS = "eagle_aux_hidden_state_layer_ids", "target_layer_ids"
_TITLES = {EAGLE: "EAGLE head", EAGLE3: "EAGLE-3 head", PEAGLE: "P-EAGLE head", OURS: "feature drafter"}
_DEPTHS = 5  # of a P-EAGLE head whose file does not say for how many tokens it was trained
_LLAMAS = {"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"}  # whose layers are Llama's, whatever `model_type` says
_PREFIX = re.compile(r"^(draft_model\.|model\.|logit_head\.)+")
_AUX_NORMS = {"aux_norm_low": 0, "aux_norm_mid": 1, "aux_norm_high": 2}


@dataclass(frozen=True)
class ReadFormat:
    """A network, and by which reading its layers are numbered: a remark for the line at start."""

    shape: DrafterShape
    numbering: str = ""
    warnings: tuple[str, ...] = ()


def plain_name(name: str) -> str:
    """What a tensor is called here: `layers.0.` for `midlayer.`, without prefixes."""
    name = _PREFIX.sub("", name)
    name = re.sub(r"^midlayer\.", "layers.0.", name)
    first, _, rest = name.partition(".")
    return f"fc_norm.{_AUX_NORMS[first]}.{rest}" if first in _AUX_NORMS else name


def plain_shapes(files: DraftFiles) -> Shapes:
    return {plain_name(name): shape for name, shape in files.shapes.items()}


def is_peagle(files: DraftFiles) -> bool:
    if kind := files.config.get("speculators_model_type"):
        return kind == "peagle"
    masked = any(files.config.get(key) is not None for key in ("ptd_token_id", "pard_token"))
    return is_eagle3(files) and (masked or "mask_hidden" in plain_shapes(files))


def is_eagle3(files: DraftFiles) -> bool:
    config = files.config
    if kind := config.get("speculators_model_type"):
        return kind == "eagle3"
    if any("eagle3" in str(name).lower() for name in config.get("architectures") or ()):
        return True
    shapes = plain_shapes(files) if _may_be_head(config) else {}
    reads_pairs = shapes.get("layers.0.self_attn.q_proj.weight", (0, 0))[1] == 2 * config.get("hidden_size", -1)
    return reads_pairs or (not shapes and "draft_vocab_size" in config)


def is_eagle(files: DraftFiles) -> bool:
    if "speculators_model_type" in files.config or not _may_be_head(files.config):
        return False
    shapes, hidden = plain_shapes(files), files.config.get("hidden_size", -1)
    return shapes.get("fc.weight") == (hidden, 2 * hidden) and "layers.0.self_attn.q_proj.weight" in shapes


def is_some_head(files: DraftFiles) -> bool:
    """Whether it can't be a language model."""
    return _may_be_head(files.config) and "fc.weight" in plain_shapes(files)


def _may_be_head(config: Mapping[str, Any]) -> bool:
    """A language model of many layers is none: its files need not be looked at."""
    return "draft_vocab_size" in config or 0 < (config.get("num_hidden_layers") or 0) <= 8


def read(files: DraftFiles, layers: int | None = None) -> ReadFormat:
    """`layers`: of the target; None: not known yet. Raises `UsageError`."""
    if files.is_ours:
        return ReadFormat(_ours(files))
    config, shapes = files.config, plain_shapes(files)
    envelope = "speculators_model_type" in config
    inner = config.get("transformer_layer_config") if envelope else config
    if not isinstance(inner, dict):
        raise UsageError(f"The config.json of the draft {files.name} has no transformer_layer_config: it is damaged.")
    if envelope and config.get("norm_before_residual") is None:
        raise UsageError(
            f"The config.json of the draft {files.name} does not say norm_before_residual, which some engines take for "
            "true and others for false: add what it was trained with."
        )
    mark, rank = str(files.note.get("fingerprint", "")), files.note.get("markov_rank", 0)
    kind = PEAGLE if is_peagle(files) else EAGLE3 if is_eagle3(files) else EAGLE
    try:
        found = _read(files.name, kind, config, inner, shapes, layers)
        own = bool(files.note.get("borrows")) and kind == PEAGLE
        target = str(files.note.get("target") or found.shape.target)  # as pearl calls it, before what others do
        noted: dict[str, Any] = {"target": target, "fingerprint": mark, "markov_rank": int(rank), "own_mask": own}
        return replace(found, shape=replace(found.shape, **noted))
    except UsageError:
        raise
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"The config.json of the draft {files.name} ({kind}) lacks a value that it needs, or has another form "
            f"({type(error).__name__}: {error})."
        ) from None


def _read(
    name: str, kind: str, config: Mapping[str, Any], inner: Mapping[str, Any], shapes: Shapes, layers: int | None
) -> ReadFormat:
    flat = inner is config
    llamas = flat and _LLAMAS.intersection(config.get("architectures") or ())
    model_type = "llama" if llamas else inner.get("model_type", "llama" if flat else "qwen3")
    own = LayerConfig.of(name, inner, model_type, layers=1)
    width = int(config.get("target_hidden_size") or own.hidden)
    fuses = kind == EAGLE or not _reads_last(config)
    features, numbering = _features(name, kind, config, shapes, width, layers) if fuses else _last(layers)
    head = shapes.get("lm_head.weight")
    shape = DrafterShape(
        kind=kind,
        features=features,
        fuses=fuses,
        layers=own.layers,
        vocabulary=int(head[0] if head else config.get("draft_vocab_size") or own.known),
        known=own.known,
        hidden=own.hidden,
        intermediate=own.intermediate,
        heads=own.heads,
        kv_heads=own.kv_heads,
        head_dim=own.head_dim,
        eps=own.eps,
        rope=own.rope,
        windows=own.windows if any(own.windows) else (),
        positions=own.positions,
        depths=_depths(name, config) if kind == PEAGLE else 1,
        feature_width=width,
        target=_verifier(config),
        activation=own.activation,
        attention_bias="layers.0.self_attn.q_proj.bias" in shapes or (not shapes and own.attention_bias),
        output_bias="layers.0.self_attn.o_proj.bias" in shapes,
        mlp_bias="layers.0.mlp.up_proj.bias" in shapes,
        fc_bias="fc.bias" in shapes,
        qk_norm="layers.0.self_attn.q_norm.weight" in shapes or (not shapes and model_type == "qwen3"),
        fc_norm=fuses and ("fc_norm.0.weight" in shapes or bool(config.get("fc_norm") or config.get("use_aux_norm"))),
        input_norm=fuses and ("input_norm.weight" in shapes or bool(config.get("norm_before_fc"))),
        norm_before_residual=bool(config.get("norm_before_residual", False)),
        norm_output=bool(config.get("norm_output", False)),
        own_embedding="embed_tokens.weight" in shapes and kind != EAGLE,
        own_head=head is not None,
        mapped="d2t" in shapes,
        mask_token=_mask_token(config) if kind == PEAGLE else None,
    )
    if "embedding_layernorm.weight" in shapes or config.get("add_para_norm"):
        raise UsageError(
            f"The draft {name} norms what it reads (add_para_norm, HASS), which pearl does not do in an EAGLE-1 head: "
            "choose an EAGLE-3 head."
        )
    _check(name, shape, shapes)
    return ReadFormat(shape, numbering)


def misfit(name: str, shapes: Shapes, wanted: Shapes) -> str | None:
    """The first tensor that has another shape than is wanted. Raises `UsageError` for one that is missing."""
    for tensor, there in wanted.items():
        if tensor not in shapes:
            raise UsageError(f"The weights of the draft {name} lack {tensor}: get the whole checkpoint again.")
        if shapes[tensor] != there:
            return tensor
    return None


def _check(name: str, shape: DrafterShape, shapes: Shapes) -> None:
    """Raises `UsageError` where the shapes of the tensors are not those of the config."""
    if not shapes:
        return
    pairs, last = 1 if shape.kind == EAGLE else 2, f"layers.{shape.layers - 1}."
    wanted: dict[str, tuple[int, ...]] = {
        "layers.0.self_attn.q_proj.weight": (shape.heads * shape.head_dim, pairs * shape.hidden),
        "layers.0.self_attn.k_proj.weight": (shape.kv_heads * shape.head_dim, pairs * shape.hidden),
        "layers.0.mlp.gate_proj.weight": (shape.intermediate, shape.hidden),
        f"{last}mlp.down_proj.weight": (shape.hidden, shape.intermediate),
    }
    if shape.own_embedding:
        wanted["embed_tokens.weight"] = (shape.known, shape.hidden)
    if shape.mapped:
        wanted["d2t"] = (shape.vocabulary,)
    if tensor := misfit(name, shapes, wanted):
        raise UsageError(
            f"The weights of the draft {name} do not fit its config.json, by which {tensor} has the shape "
            f"{list(wanted[tensor])} and not {list(shapes[tensor])}: look at its sizes, head_dim and numbers of heads."
        )
    if shape.kind == PEAGLE:
        if "mask_hidden" not in shapes:
            raise UsageError(f"The weights of the draft {name} lack mask_hidden, by which P-EAGLE drafts in parallel.")
        if shape.mask_token is None:
            raise UsageError(
                f"The config.json of the draft {name} names no mask token: add mask_token_id, as it was trained with."
            )
        if not 0 <= shape.mask_token < shape.known:
            raise UsageError(
                f"The mask token of the draft {name} is {shape.mask_token}, which is none of the {shape.known} tokens "
                "that it knows: its config.json is not that of its weights."
            )
    if shape.width != shape.hidden and (shape.kind == EAGLE or not shape.fuses):
        raise UsageError(
            f"The draft {name} is {shape.hidden} numbers wide and reads the {shape.width} of its target as they are: "
            "its config.json is not that of its weights."
        )
    if shape.width != shape.hidden and not shape.own_embedding:
        raise UsageError(
            f"The draft {name} is {shape.hidden} numbers wide and its target {shape.width}, and it lacks embed_tokens, "
            "which it needs of its own then: get the whole checkpoint again."
        )
    if shape.vocabulary < shape.known and not shape.mapped:
        raise UsageError(
            f"The draft {name} drafts {shape.vocabulary} of {shape.known} tokens, and it lacks d2t, which says which: "
            "get the whole checkpoint again."
        )


def _features(
    name: str, kind: str, config: Mapping[str, Any], shapes: Shapes, width: int, layers: int | None
) -> tuple[tuple[int, ...], str]:
    """The layers whose outputs are read, and how their ids were understood."""
    if kind == EAGLE:
        return _last(layers)
    if "fc.weight" not in shapes and shapes:
        raise UsageError(f"The weights of the draft {name} lack fc.weight: get the whole checkpoint again.")
    found, numbering = layer_ids(config, layers)
    count = shapes["fc.weight"][1] / width if shapes else len(found) or config.get("num_aux_hidden_states") or 3
    if found and count != len(found) and not named_ids(config):
        raise UsageError(
            f"The fc.weight of the draft {name} reads {count:g} hidden states of {width} numbers, and its config.json "
            f"does not name their layers: add {IDS}, which say how many layers have run (id k: the output of layer "
            "k - 1, counted from 0)."
        )
    if found and count != len(found):
        raise UsageError(
            f"The draft {name} names {len(found)} layers, and its fc.weight reads {count:g} hidden states of {width} "
            "numbers: its config.json is not that of its weights."
        )
    return found, numbering


def _reads_last(config: Mapping[str, Any]) -> bool:
    """Whether an EAGLE-3 network reads what EAGLE-1 does, the hidden state behind the target's last norm, as it is."""
    return (config.get("eagle_config") or {}).get("use_aux_hidden_state", config.get("use_aux_hidden_state")) is False


def _last(layers: int | None) -> tuple[tuple[int, ...], str]:
    return ((layers,) if layers is not None else ()), ""


def named_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    """As the file has them; empty if it names none."""
    top, nested = config.get(IDS), (config.get("eagle_config") or {}).get(IDS)
    found = next((one for one in (top, nested, config.get(_OUTPUTS)) if one is not None), None)
    return tuple(int(one) for one in found or ())


def layer_ids(config: Mapping[str, Any], layers: int | None) -> tuple[tuple[int, ...], str]:
    """The layers whose outputs a checkpoint means, from 0 (-1: the embeddings), and a remark on how its ids were read.

    Empty where it names none and the target is not known. `layers`: of the target. Worked example, 28 layers: the ids
    2, 14, 25 at the top and 1, 13, 24 in `eagle_config` are both the outputs of the layers 1, 13 and 24.
    """
    ids, nested = named_ids(config), config.get("eagle_config") or {}
    usual = (2, layers // 2, layers - 3) if layers is not None else ()
    if not ids:
        return tuple(one - 1 for one in usual), "by default: its config.json names none"
    counts_inputs = config.get(IDS) is not None
    if "speculators_model_type" not in config and (counts_inputs or nested.get(IDS) is not None):
        if sorted(ids) == sorted(usual) or (layers is not None and max(ids) >= layers):  # no layer has that number
            counts_inputs = True
        elif sorted(ids) == sorted(one - 1 for one in usual):
            counts_inputs = False
    if counts_inputs:
        return tuple(one - 1 for one in ids), f"its ids {listed(ids)} say how many layers have run"
    return ids, f"its ids {listed(ids)} name the layers"


def line(shape: DrafterShape, layers: int | None, numbering: str = "") -> str:
    """What it is: "EAGLE-3 head, 1 layer, 32,000 draft tokens, features after layers 1, 13 and 24 of 28"."""
    parts = [
        _TITLES[shape.kind],
        f"{shape.layers} layer{'s' * (shape.layers > 1)}",
        f"{shape.vocabulary:,} draft tokens",
    ]
    if shape.parallel:
        parts.append(f"{shape.depths} tokens a forward")
    if shape.kind == EAGLE or not shape.fuses:
        parts.append("features behind the target's last norm")
    elif shape.features:
        of = f" of {layers}" if layers is not None else ""
        one = "layer" if len(shape.features) == 1 else "layers"
        parts.append(f"features after {one} {listed(shape.features)}{of}")
    elif shape.kind == OURS:
        parts.append("no features")
    else:
        parts.append("features after layers 1, L / 2 - 1 and L - 4 of L")
    return ", ".join(parts) + (f" ({numbering})" if numbering else "")


def _depths(name: str, config: Mapping[str, Any]) -> int:
    said = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    return max(2, tokens_ahead(name, "speculative_tokens", said[0].get("speculative_tokens") or _DEPTHS))


def _mask_token(config: Mapping[str, Any]) -> int | None:
    """In the order in which vLLM looks, and where `speculators` writes it."""
    places = (
        (config.get("dflash_config") or {}).get("mask_token_id"),
        *map(config.get, ("pard_token", "ptd_token_id")),
    )
    return next((int(one) for one in (*places, config.get("mask_token_id")) if one is not None), None)


def _verifier(config: Mapping[str, Any]) -> str:
    return str(((config.get("speculators_config") or {}).get("verifier") or {}).get("name_or_path") or "")


def _ours(files: DraftFiles) -> DrafterShape:
    """drafter.json. Raises `UsageError`."""
    values: dict[str, Any] = dict(files.config)
    where = f"{files.folder}/drafter.json"
    try:
        depths = values.pop("depths")
        rope = {"rope_type": "default", "rope_theta": float(values.pop("rope_theta"))}
        features = tuple(values.pop("features"))
        known = {"kind": OURS, "features": features, "depths": depths, "rope": rope, "fc_norm": bool(features)}
        shape = DrafterShape(**known, mapped=True, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{where} is not a feature drafter's ({error}).") from None
    if shape.format != DrafterShape.format:
        raise UsageError(f"{files.folder} has format {shape.format}, this version reads {DrafterShape.format}.")
    return shape


def listed(numbers: Sequence[int]) -> str:
    words = ["-1 (the embeddings)" if one == -1 else str(one) for one in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
