"""The weights of a DFlash or DSpark checkpoint."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from pearl.checkpoints.drafts.feature_formats import plain_name
from pearl.checkpoints.drafts.files import DraftFiles
from pearl.config.inputs import brief
from pearl.drafters.dflash.network import DFlashDrafter
from pearl.drafters.dflash.shape import DFlashShape
from pearl.errors import CheckpointError

_UNUSED = re.compile(r"t2d$|d2t$|verifier_|.*rotary_emb\.|.*inv_freq$")


def load(files: DraftFiles, shape: DFlashShape, known: int = 0) -> DFlashDrafter:
    """In float32, with nothing attached. `known`: tokens of its target; 0: as many as its own. Raises `UsageError`,
    `CheckpointError`."""
    files = files.downloaded()
    tensors = {plain_name(name): tensor for name, tensor in files.tensors().items()}
    drafter = DFlashDrafter(shape, _vocabulary(files.name, shape, tensors, min(known or shape.known, shape.known)))
    kept = {name: tensor.float() for name, tensor in tensors.items() if not _UNUSED.match(name)}
    try:
        drafter.load_state_dict(kept)
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights of the draft {files.name} are not those that its config.json says ({brief(error, 300)})."
        ) from None
    return drafter


def _vocabulary(name: str, shape: DFlashShape, tensors: dict[str, Tensor], known: int) -> Tensor | None:
    """The target's ids of the tokens that can be drafted, int64 [D]: d2t says how far each is from the draft's own.
    `known`: by the draft and its target."""
    if not shape.mapped:
        return None
    ids = torch.arange(shape.vocabulary) + tensors["d2t"].long()
    if not (int(ids.min()) >= 0 and int(ids.max()) < known):
        raise CheckpointError(
            f"The d2t of the draft {name} leads to tokens from {int(ids.min())} to {int(ids.max())}, and there are "
            f"{known}: it is of another target, or damaged."
        )
    return ids
