"""The weights that a network over hidden states begins with: layers of its target, or what an earlier run saved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pearl.checkpoints.drafts import feature_weights, kinds
from pearl.checkpoints.drafts.kinds import TargetFacts
from pearl.config.engine_config import model_path
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.feature.shape import DrafterShape
from pearl.errors import UsageError
from pearl.models.architecture import layers_of
from pearl.models.fingerprint import model_fingerprint
from pearl.models.hidden_states import decoder_layers, final_norm
from pearl.training.recipes import FeatureRecipe

_NORM = "input_layernorm.weight"


def new_drafter(
    target: PreTrainedModel,
    recipe: FeatureRecipe,
    layers: Sequence[int],
    vocabulary: Tensor,
    sample: Tensor | None = None,
    mask_token: int | None = None,
) -> FeatureDrafter:
    """An untrained network for a loaded target, which starts from layers of it; `layers`: whose features it reads.

    sample: features of some tokens, [tokens, F]. Their dimensions differ in size by orders of magnitude, and what a
    dimension can teach in a step grows with its size. So the norms begin by giving all of them the same spread, and
    `fc` by giving the last layer its own back: the target's own layer then finds what it is used to.
    """
    shape = _shape(target, recipe, layers, len(vocabulary), mask_token)
    torch.manual_seed(recipe.seed)
    drafter = FeatureDrafter(shape, vocabulary)
    embedding: Tensor = target.get_input_embeddings().weight.detach().float()  # type: ignore[union-attr, operator]
    head: Any = target.get_output_embeddings()
    first: Any = drafter.layers[0]
    fc: Any = drafter.fc
    width = shape.hidden
    with torch.no_grad():
        _even(first.input_layernorm, embedding[vocabulary])
        parts = torch.ones(2, shape.feature_row) if sample is None else sample.float()
        spreads = [torch.ones(width)] * len(shape.features)
        if shape.fc_norm:
            pairs = zip(drafter.fc_norm, parts.chunk(len(shape.features), -1), strict=True)
            spreads = [_even(norm, part) for norm, part in pairs]
        fc.weight *= 0.1
        fc.weight[:, -width:] += torch.diag(spreads[-1])
        drafter.lm_head.weight.copy_(head.weight[vocabulary])
        drafter.norm.weight.copy_(_gain(final_norm(target), width))
    stack = decoder_layers(target)
    last = len(stack) - 1 if recipe.start_layer is None else min(recipe.start_layer, len(stack) - 1)
    for number, layer in enumerate(drafter.layers):
        own = _by_llamas_names(stack[max(0, last - (shape.layers - 1 - number))], width)
        _begin_as(layer, strongest(several(own, shape), shape.intermediate), pair=number == 0)
    return drafter.attach(target)


def _by_llamas_names(layer: nn.Module, width: int) -> dict[str, Tensor]:
    """A target's layer. Of norms what they multiply by; that before the MLP is called as in Llama's."""
    found = dict(layer.state_dict())
    norms = {name: module for name, module in layer.named_children() if name.endswith("layernorm")}
    found |= {f"{name}.weight": _gain(norm, width) for name, norm in norms.items()}
    before_mlp = found.get("pre_feedforward_layernorm.weight")
    return found if before_mlp is None else found | {"post_attention_layernorm.weight": before_mlp}


@torch.no_grad()
def _gain(norm: Any, width: int) -> Tensor:
    """What a norm multiplies its normed input by, [H]: its weight, or one more than that (Gemma)."""
    signs = torch.ones(width)
    signs[1::2] = -1  # of mean 0 and mean square 1
    gain: Tensor = (norm(signs) - norm(-signs)) / 2 * signs
    return gain


def _begin_as(layer: nn.Module, start: dict[str, Tensor], pair: bool) -> None:
    """Gives a layer the weights of one of the target's, if it has the same. `pair`: it reads the embedding too, which
    the target's does not: of that half a tenth of what chance gives is left."""
    mine = layer.state_dict()
    if any("q_norm" in name for name in start.keys() - mine.keys()):
        return  # without these norms its queries and keys would be of another size
    if pair and _NORM in start:
        start = start | {"hidden_norm.weight": start[_NORM], _NORM: mine[_NORM]}
        for name in (f"self_attn.{one}_proj.weight" for one in "qkv"):
            half = mine[name].chunk(2, 1)[0]
            if name in start and start[name].shape == half.shape:
                start[name] = torch.cat([0.1 * half, start[name].float()], 1)
    if all(name in start and start[name].shape == weight.shape for name, weight in mine.items()):
        layer.load_state_dict({name: start[name].float() for name in mine})


def _shape(
    target: PreTrainedModel, recipe: FeatureRecipe, layers: Sequence[int], vocabulary: int, mask_token: int | None
) -> DrafterShape:
    made = DrafterShape.of_target(
        layers_of(target.config)[0],
        kind=recipe.algorithm,
        features=tuple(layers),
        layers=recipe.layers,
        vocabulary=vocabulary,
        depths=recipe.depths,
        target=recipe.target,
        fingerprint=model_fingerprint(target),
        intermediate=recipe.intermediate,
        mask_token=mask_token,
        markov_rank=recipe.markov_rank,
    )
    heads = recipe.kv_heads or made.kv_heads
    if made.heads % heads or heads % made.kv_heads:
        raise UsageError(
            f"The recipe's kv_heads must be a multiple of the target's {made.kv_heads}, and divide its {made.heads}"
            " heads."
        )
    return replace(made, fc_norm=recipe.fc_norm, kv_heads=heads)


def several(layer: dict[str, Tensor], shape: DrafterShape) -> dict[str, Tensor]:
    """A layer's weights by name with as many heads of keys and values as a shape has: copies of those that it has, side
    by side, so that each head of queries reads what it read (the other way round than Ainslie et al. 2023, GQA)."""
    names = [name for name in layer if re.search(r"\b[kv]_proj\.", name)]
    size, rows = shape.head_dim, shape.kv_heads * shape.head_dim
    copies = {name: rows // max(1, len(layer[name])) for name in names if rows % max(1, len(layer[name])) == 0}
    return layer | {
        name: layer[name].unflatten(0, (-1, size)).repeat_interleave(count, 0).flatten(0, 1)
        for name, count in copies.items()
        if count > 1
    }


def strongest(layer: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """A layer's weights by name, of its SwiGLU the `count` neurons that can say most: by the product of their norms."""
    names = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    if any(name not in layer for name in names) or len(layer[names[0]]) <= count:
        return layer
    gate, up, down = (layer[name].float() for name in names)
    kept = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).topk(count).indices.sort().values
    return layer | {name: layer[name].index_select(int("down" in name), kept) for name in names}


def go_on_from(folder: str, target: PreTrainedModel, recipe: FeatureRecipe, layers: Sequence[int]) -> FeatureDrafter:
    """The network that an earlier run saved, with its draft vocabulary, for a loaded target. One of fewer layers or
    heads, or with a Markov head of lower rank, grows: what is added changes nothing at first. Raises `UsageError` if it
    is of another target, of a shape that can't become the recipe's, or has another mask token than the recipe names."""
    torch.manual_seed(recipe.seed)  # so that what is added is the same in every process, and in every run
    facts = TargetFacts.of(recipe.target, target.config)
    if not model_path(folder).exists():
        raise UsageError(f"The recipe's start {folder} is not there: train it first, or name another with --start.")
    saved = feature_weights.load(kinds.describe(folder, facts))
    had = saved.shape
    wanted = _shape(target, recipe, layers, had.vocabulary, had.mask_token)
    like = replace(
        wanted,
        layers=min(had.layers, wanted.layers),
        intermediate=max(had.intermediate, wanted.intermediate),
        kv_heads=had.kv_heads if wanted.kv_heads % had.kv_heads == 0 else wanted.kv_heads,
        markov_rank=min(had.markov_rank, wanted.markov_rank) or wanted.markov_rank,
        own_embedding=had.own_embedding,
        own_mask=had.own_mask,
        target=had.target,
    )
    if had != like:
        raise UsageError(f"The recipe's start {folder} is a drafter of another shape or target: leave it out.")
    if recipe.mask_token not in (None, had.mask_token):
        raise UsageError(f"The recipe's start {folder} has the mask token {had.mask_token}: leave mask_token out.")
    own = replace(had, own_embedding=False, own_mask=wanted.own_mask, target=wanted.target)
    tensors = dict(saved.state_dict())
    table = tensors.pop("embed_tokens.weight", None)
    if own.own_mask and table is not None and own.mask_token is not None:
        tensors["mask_row"] = table[own.mask_token]
    drafter = FeatureDrafter.of(own, saved.vocabulary, tensors)
    return (drafter if own == wanted else grown(drafter, wanted)).attach(target)


def grown(drafter: FeatureDrafter, shape: DrafterShape) -> FeatureDrafter:
    """A network with more layers, more heads of keys and values, a Markov head of higher rank, or a narrower SwiGLU. An
    added layer adds nothing yet: what writes to the residual is 0 (as in Net2Net, Chen et al. 2016, it starts from the
    same function). Neither does an added column of the Markov head."""
    larger = FeatureDrafter(shape, drafter.vocabulary)
    rest = {name: tensor for name, tensor in drafter.state_dict().items() if not name.startswith("layers.")}
    for name in ("markov_w1.weight", "markov_w2.weight", "confidence.weight") if drafter.shape.markov_rank else ():
        place = larger.get_parameter(name).detach().clone()
        if name != "markov_w1.weight":  # what the added numbers of a token are multiplied by
            place.zero_()
        place[:, : rest[name].shape[1]] = rest[name]
        rest[name] = place
    larger.load_state_dict(rest, strict=False)
    layers: Any = larger.layers
    for number, layer in enumerate(layers):
        if number < drafter.shape.layers:
            own = several(drafter.layers[number].state_dict(), shape)
            layer.load_state_dict(strongest(own, shape.intermediate))
        else:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return larger


def spare_token(tokenizer: Any, size: int) -> int:
    """An id for the mask rows that no text has: beyond the tokenizer's, else a special one that ends or begins nothing.
    `size`: rows of the embedding."""
    if len(tokenizer) < size:
        return size - 1
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    added = {token: word for token, word in tokenizer.added_tokens_decoder.items() if word.special and token < size}
    if tokenizer.chat_template:
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        taken |= set(tokenizer.encode(tokenizer.apply_chat_template(talk, tokenize=False)))
    chat = str(tokenizer.chat_template or "")
    spare = [token for token, word in added.items() if token not in taken and word.content not in chat]
    return max(spare, default=size - 1)


def _even(norm: Any, sample: Tensor) -> Tensor:
    """Sets a norm so that each dimension of `sample` [tokens, H] comes out with spread 1; returns what undoes that."""
    size = sample.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
    spread = (sample / size).std(0).clamp(min=1e-3)
    norm.weight.copy_(1 / spread)
    return spread * size.mean()
