"""Checkpoints whose weights are quantized already: transformers reads them, with packages that not everyone has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from transformers.quantizers import AutoHfQuantizer

from pearl.checkpoints.quiet import quiet
from pearl.config.inputs import brief
from pearl.errors import UsageError
from pearl.models import linear

NEEDS = {  # by `quant_method`: the packages that transformers asks for
    "gptq": ("optimum", "gptqmodel"),
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "hqq": ("hqq",),
    "torchao": ("torchao",),
}
_TALL = 32  # rows of a tile of that layout


def check(
    role: str, name: str, config: Any, load_in: str | None, there: Callable[[str], object] = find_spec
) -> str | None:
    """How the weights of a checkpoint are quantized; None if they are not.

    `config`: the checkpoint's. Raises `UsageError` where transformers can't read them here, and where `load_in` would
    quantize them again.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    method = settings.get("quant_method")
    method = str(getattr(method, "value", method or "quantized"))
    if load_in:
        raise UsageError(f"The {role} {name} holds {method} weights already: leave out load_in {load_in}.")
    missing = [package for package in NEEDS.get(method, ()) if there(package) is None]
    if missing:
        raise UsageError(
            f"The {role} {name} holds {method} weights, which need {' and '.join(missing)}: run "
            f"`pip install {' '.join(missing)}`, or choose a checkpoint that is not quantized."
        )
    if why := _refused(settings):
        raise UsageError(
            f"The {role} {name} holds {method} weights, which can't be read here ({why}): choose a checkpoint that is "
            "not quantized, or quantized otherwise."
        )
    return method


def _refused(settings: dict[str, Any]) -> str | None:
    """Why transformers would not read weights that are quantized so, asked before any are there."""
    try:
        with quiet():
            if not AutoHfQuantizer.supports_quant_method(settings):
                return "transformers does not know them"
            AutoHfQuantizer.from_config(copy.deepcopy(settings)).validate_environment(device_map=None)
    except Exception as error:  # each method has its own kinds
        return brief(error).rstrip(".")
    return None


def need_bitsandbytes() -> None:
    """Raises `UsageError` where 8-bit and 4-bit weights can't be made."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UsageError("8-bit and 4-bit weights need the bitsandbytes package: run `bash install.sh`.") from None


def settings(load_in: str, dtype: str, double_quant: bool) -> Any:
    """What transformers quantizes by."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_8bit=load_in == "8bit",
        load_in_4bit=load_in == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def make_rows_independent(model: Any) -> int:
    """Replaces bitsandbytes' 8-bit layers by ones whose rows don't depend on each other. Returns how many."""
    found = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer).__name__ != "Linear8bitLt":
                continue
            if layer.weight.CB is not None:
                layer.init_8bit_state()
            state = layer.state
            setattr(parent, name, linear.RowwiseInt8Linear(state.CB, state.SCB, layer.bias, state.threshold))
            found += 1
    return found


def keep_odd_shapes(model: Any) -> int:
    """Keeps bitsandbytes from laying out 4-bit layers for a CPU with AVX512-BF16 whose shapes its layout can't hold: it
    would break off in the first forward. Returns how many there are."""
    odd = [
        layer
        for layer in model.modules()
        if type(layer).__name__ == "Linear4bit"
        and (layer.in_features % layer.weight.quant_state.blocksize or layer.out_features % _TALL)
    ]
    for layer in odd:
        layer.support_avx512bf16_for_cpu = False
    return len(odd)
