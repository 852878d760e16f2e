"""A model cut out of a target: some of its layers, and all that it has beside layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from pearl.checkpoints import shared_embeddings
from pearl.config.engine_config import model_path
from pearl.errors import UsageError
from pearl.models.fingerprint import wrong_target_message
from pearl.models.hidden_states import decoder_layers
from pearl.training.loop import RECIPE

_OF_NO_LAYER = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id")  # lists that are not by layer
_NUMBERS = ("layer_idx", "layer_id", "layer_number", "training")  # of a layer, not of what it computes


def student_of(target: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model of these layers of the target, with the target's own embeddings and a copy of all else.

    Raises `UsageError` if the target has no such layer, or if its config can't describe a model of these alone.
    """
    stack = decoder_layers(target)
    if not all(layer < len(stack) for layer in layers):
        raise UsageError(f"The target has layers 0 to {len(stack) - 1}: {list(layers)} can't be the start.")
    try:
        made: Any = type(target)(_config_of(target, layers, len(stack)))
        student = made.to(target.device, target.dtype)
        for mine, layer in zip(decoder_layers(student), layers, strict=True):
            mine.load_state_dict(stack[layer].state_dict())
        _take_the_rest(student, target)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise _of_several_kinds(layers, str(error)) from None
    for mine, layer in zip(decoder_layers(student), layers, strict=True):
        if differs := _difference(mine, stack[layer]):
            raise _of_several_kinds(layers, differs)
    return student.eval()  # no dropout: it is to say what the target says


def _of_several_kinds(layers: Sequence[int], why: str) -> UsageError:
    return UsageError(
        f"The target's layers differ in kind, and {list(layers)} alone are no model that transformers can describe "
        f"({' '.join(why.split())[:200]}): name others, such as the first ones."
    )


def _config_of(target: PreTrainedModel, layers: Sequence[int], count: int) -> Any:
    """The target's config for these of its `count` layers: what it lists by layer is that of these."""
    config = copy.deepcopy(target.config)
    text: Any = config.get_text_config()
    text.num_hidden_layers = len(layers)
    for name, value in list(vars(text).items()):
        if name == "mlp_only_layers" and value:  # numbers of layers
            setattr(text, name, [mine for mine, layer in enumerate(layers) if layer in value])
        elif isinstance(value, list | tuple) and len(value) == count and name not in _OF_NO_LAYER:
            setattr(text, name, [value[layer] for layer in layers])
    type(config).from_dict(config.to_dict())  # a saved one must be readable
    return config


def _take_the_rest(student: PreTrainedModel, target: PreTrainedModel) -> None:
    """All but the layers: embeddings and head are the target's own, the others (of positions, norms) are copies."""
    stack = decoder_layers(target)
    prefix = next(name for name, module in target.named_modules() if module is stack)
    rest = {name: one for name, one in target.state_dict().items() if not name.startswith(f"{prefix}.")}
    student.load_state_dict(rest, strict=False)
    student.set_input_embeddings(target.get_input_embeddings())
    student.set_output_embeddings(target.get_output_embeddings())


def _difference(mine: nn.Module, theirs: nn.Module) -> str:
    """Where two layers of equal weights compute something else, in words; empty if nowhere."""
    for (name, one), (_, other) in zip(mine.named_modules(), theirs.named_modules(), strict=True):
        for key, value in vars(other).items():
            if key.startswith("_") or key in _NUMBERS or not isinstance(value, int | float | str | list | None):
                continue
            if getattr(one, key, None) != value:
                return f"{name}.{key} would be {getattr(one, key, None)!r}, not {value!r}"
    return ""


def go_on_from(student: PreTrainedModel, folder: str, layers: Sequence[int], fingerprint: str) -> None:
    """Gives the student, which has these layers of the target with that fingerprint, the weights that an earlier
    run saved. Raises `UsageError` if those are of other layers or of another target."""
    path = model_path(folder)
    try:
        saved = load_file(path / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"The recipe's start {path / 'model.safetensors'} can't be read ({error}).") from None
    whose = shared_embeddings.read(path)
    if whose and whose.fingerprint != fingerprint:
        raise UsageError(f"The recipe's start {folder}: {wrong_target_message(whose.target)}")
    mine = student.state_dict()
    wanted = {name: one.shape for name, one in mine.items() if not shared_embeddings.is_embedding(name)}
    fits = wanted == {name: one.shape for name, one in saved.items() if not shared_embeddings.is_embedding(name)}
    had = _layers_of_run(path)
    if not fits or (had and had != list(layers)):
        began = f", but of {had}" if had else ""
        raise UsageError(
            f"The recipe's start {folder} is not a student of these layers, {list(layers)}{began}: name one, or leave "
            "it out."
        )
    student.load_state_dict({name: saved[name] for name in wanted}, strict=False)


def _layers_of_run(folder: Path) -> list[int]:
    """Those that the training in a folder began with; none if nothing says it."""
    try:
        had = json.loads((folder / RECIPE).read_text(encoding="utf-8"))["layers"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return had if isinstance(had, list) else []  # of a head it is how many it has
