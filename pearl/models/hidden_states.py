"""Hidden states of a few layers of a target, taken while it reads: an early, a middle and a late one, or any other.

Knows where a transformers model keeps its decoder layers, and nothing of what the states are for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pearl.errors import UsageError

_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")  # beside the layers


def default_layers(count: int) -> tuple[int, ...]:
    """An early, a middle and a late one of `count` decoder layers (EAGLE-3, Li et al. 2025, section 3.1)."""
    return tuple(sorted({min(2, count - 1), count // 2, max(0, count - 3)}))


class HiddenStateHooks:
    """Keeps what each of `layers` put out in the last forward: `states()` is [batch, rows, len(layers) * hidden]."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]):
        """`layers`: numbers of decoder layers, from 0; -1: the embeddings, that is what layer 0 reads; as many as there
        are: what the final norm puts out. Raises `UsageError` if the model has no such layer."""
        stack = decoder_layers(model)
        if not all(-1 <= layer <= len(stack) for layer in layers):
            raise UsageError(f"The target has layers 0 to {len(stack) - 1}: features of {list(layers)} can't be taken.")
        self._layers = tuple(layers)
        self._last: dict[int, Tensor] = {}
        self._hooks = [self._hook(model, stack, layer) for layer in self._layers]

    def states(self) -> Tensor:
        """Of the last forward, [batch, rows, len(layers) * hidden]."""
        parts = [self._last[layer] for layer in self._layers]
        return torch.cat([part.to(parts[0].device) for part in parts], -1)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, model: PreTrainedModel, stack: nn.ModuleList, layer: int) -> RemovableHandle:
        if layer == len(stack):
            return final_norm(model).register_forward_hook(self._keep(layer))
        if layer == -1:
            return stack[0].register_forward_pre_hook(self._keep_input, with_kwargs=True)
        return stack[layer].register_forward_hook(self._keep(layer))

    def _keep_input(self, _module: nn.Module, inputs: tuple, named: dict) -> None:
        self._last[-1] = inputs[0] if inputs else named["hidden_states"]

    def _keep(self, layer: int):
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple) -> None:
            self._last[layer] = output[0] if isinstance(output, tuple) else output

        return hook


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of a causal language model's decoder layers."""
    found = find_decoder_layers(model)
    assert found is not None, "a transformers decoder keeps its layers in one list"
    return found


def find_decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The same, if there is one."""
    count = model.config.get_text_config().num_hidden_layers
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return next(stacks, None)


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last decoder layer and the head."""
    stack = decoder_layers(model)
    beside = next(dict(module.named_children()) for module in model.modules() if stack in module.children())
    found = next((beside[name] for name in _NORMS if name in beside), None)
    assert found is not None, "a transformers decoder ends in a norm"
    return found
