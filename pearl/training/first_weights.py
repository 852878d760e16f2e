"""The weights that a feature drafter begins with: layers of its target, or what an earlier training saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pearl.drafters.feature import network
from pearl.drafters.feature.network import DrafterShape, FeatureDrafter
from pearl.errors import UsageError
from pearl.models.fingerprint import model_fingerprint
from pearl.models.hidden_states import decoder_layers
from pearl.training.recipes import FeatureRecipe


def new_drafter(
    target: PreTrainedModel,
    recipe: FeatureRecipe,
    layers: Sequence[int],
    vocabulary: Tensor,
    sample: Tensor | None = None,
) -> FeatureDrafter:
    """An untrained drafter for a loaded target, which starts from layers of it; `layers`: whose features it reads.

    sample: features of some tokens, [tokens, F]. Their dimensions differ in size by orders of magnitude, and what a
    dimension can teach in a step grows with its size. So the norms begin by giving all of them the same spread, and
    `fuse` by giving the last layer its own back: the target's own layer then finds what it is used to.
    """
    shape = _shape(target, recipe, layers, len(vocabulary), recipe.target)
    torch.manual_seed(recipe.seed)
    drafter = FeatureDrafter(shape, vocabulary)
    embedding: Tensor = target.get_input_embeddings().weight.detach().float()  # type: ignore[union-attr, operator]
    with torch.no_grad():
        spread = _even(drafter.token_norm, embedding[vocabulary])
        drafter.in_proj.weight *= 0.1
        drafter.in_proj.weight[:, : shape.hidden] += torch.diag(spread)
        if shape.features:
            drafter.in_proj.weight[:, shape.hidden :] += torch.eye(shape.hidden)
            parts = torch.ones(2, len(shape.features) * shape.hidden) if sample is None else sample.float()
            spreads = [
                _even(norm, part)
                for norm, part in zip(drafter.feature_norms, parts.chunk(len(shape.features), -1), strict=True)
            ]
            drafter.fuse.weight *= 0.1
            drafter.fuse.weight[:, -shape.hidden :] += torch.diag(spreads[-1])
    stack = decoder_layers(target)
    last = len(stack) - 1 if recipe.start_layer is None else min(recipe.start_layer, len(stack) - 1)
    for number, layer in enumerate(drafter.layers):
        start = strongest(stack[max(0, last - (shape.layers - 1 - number))].state_dict(), shape.intermediate)
        mine = layer.state_dict()
        if all(name in start and start[name].shape == weight.shape for name, weight in mine.items()):
            layer.load_state_dict({name: start[name].float() for name in mine})
    return drafter.attach(target)


def _shape(
    target: PreTrainedModel, recipe: FeatureRecipe, layers: Sequence[int], vocabulary: int, name: str
) -> DrafterShape:
    depths, mark, width = recipe.depths, model_fingerprint(target), recipe.intermediate
    return DrafterShape.of_target(target.config, tuple(layers), depths, recipe.layers, vocabulary, name, mark, width)


def strongest(layer: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """A layer's weights by name, of its SwiGLU the `count` neurons that can say most: by the product of their norms."""
    names = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    if any(name not in layer for name in names) or len(layer[names[0]]) <= count:
        return layer
    gate, up, down = (layer[name].float() for name in names)
    kept = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).topk(count).indices.sort().values
    return layer | {name: layer[name].index_select(int("down" in name), kept) for name in names}


def go_on_from(folder: str, target: PreTrainedModel, recipe: FeatureRecipe, layers: Sequence[int]) -> FeatureDrafter:
    """The drafter that an earlier run saved, with its draft vocabulary, for a loaded target. One of fewer layers grows:
    those that are added change nothing at first. Raises `UsageError` if it is of another target, or of a shape that
    can't become the recipe's."""
    drafter = network.load(Path(folder))
    had = drafter.shape
    wanted = _shape(target, recipe, layers, had.vocabulary, had.target)
    if wanted != replace(
        had, layers=max(had.layers, wanted.layers), intermediate=min(had.intermediate, wanted.intermediate)
    ):
        raise UsageError(f"The recipe's start {folder} is a drafter of another shape or target: leave it out.")
    return (drafter if had == wanted else grown(drafter, wanted)).attach(target)


def grown(drafter: FeatureDrafter, shape: DrafterShape) -> FeatureDrafter:
    """A drafter with more layers, or a narrower SwiGLU. An added layer is a copy of the last one that adds nothing yet:
    what writes to the residual is 0 (as in Net2Net, Chen et al. 2016, it starts from the same function)."""
    larger = FeatureDrafter(shape, drafter.vocabulary)
    rest = {name: tensor for name, tensor in drafter.state_dict().items() if not name.startswith("layers.")}
    larger.load_state_dict(rest, strict=False)
    layers: Any = larger.layers
    for number, layer in enumerate(layers):
        layer.load_state_dict(
            strongest(drafter.layers[min(number, drafter.shape.layers - 1)].state_dict(), shape.intermediate)
        )
        if number >= drafter.shape.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return larger


def _even(norm: Any, sample: Tensor) -> Tensor:
    """Sets a norm so that each dimension of `sample` [tokens, H] comes out with spread 1; returns what undoes that."""
    size = sample.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
    spread = (sample / size).std(0).clamp(min=1e-3)
    norm.weight.copy_(1 / spread)
    return spread * size.mean()
