"""The weights of a DFlash or DSpark checkpoint."""

from __future__ import annotations

import re

from pearl.checkpoints.drafts.feature_formats import plain_name
from pearl.checkpoints.drafts.feature_weights import mapped
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
    known = min(known or shape.known, shape.known)
    drafter = DFlashDrafter(shape, mapped(files.name, tensors["d2t"], known) if shape.mapped else None)
    kept = {name: tensor.float() for name, tensor in tensors.items() if not _UNUSED.match(name)}
    try:
        drafter.load_state_dict(kept)
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights of the draft {files.name} are not those that its config.json says ({brief(error, 300)})."
        ) from None
    return drafter
