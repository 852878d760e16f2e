"""What a feature drafter takes from its target: embedding, final norm and head. And how it knows its target again."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

_STRIDE = 61  # rows of the embedding that are looked at


def fingerprint(embedding: Tensor, norm: Tensor) -> str:
    """Of a target, by its embedding [V, hidden] and final norm [hidden]; alike in every dtype that holds bfloat16."""
    digest = hashlib.sha256(str(tuple(embedding.shape)).encode())
    for weight in (embedding[::_STRIDE], norm):
        digest.update(weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def wrong_target_message(name: str) -> str:
    """What to say where a drafter meets weights that are not those of the target called `name`."""
    return (
        f"This drafter was trained for {name}, and its weights are not those of this target: name the target that it "
        "belongs to, or train a drafter for this one."
    )


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last decoder layer and the head."""
    base = model.base_model
    found = next((getattr(base, name) for name in ("norm", "ln_f", "final_layernorm") if hasattr(base, name)), None)
    assert found is not None, "a transformers decoder ends in a norm"
    return found


def model_fingerprint(model: PreTrainedModel) -> str:
    """The fingerprint of a loaded target."""
    return fingerprint(
        _whole(model.get_input_embeddings().get_parameter("weight")), _whole(final_norm(model).get_parameter("weight"))
    )


def _whole(weight: Tensor) -> Tensor:
    """Of a model that is spread over several ranks, which all ask for it together."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
