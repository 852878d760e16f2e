"""How a feature drafter knows its target again: by its embedding and its final norm."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pearl.models.hidden_states import final_norm

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


def model_fingerprint(model: PreTrainedModel) -> str:
    """The fingerprint of a loaded target."""
    norm = getattr(final_norm(model), "weight", torch.empty(0))  # OLMo's has none
    return fingerprint(_whole(model.get_input_embeddings().get_parameter("weight")), _whole(norm))


def _whole(weight: Tensor) -> Tensor:
    """Of a model that is spread over several ranks, which all ask for it together."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
