"""The weights of a DFlash or DSpark checkpoint."""

from __future__ import annotations

import re
from dataclasses import replace

from pearl.checkpoints.drafts import dflash_format
from pearl.checkpoints.drafts.feature_formats import plain_name
from pearl.checkpoints.drafts.feature_weights import fitting, in_order, mapped
from pearl.checkpoints.drafts.files import DraftFiles
from pearl.drafters.dflash.network import DFlashDrafter
from pearl.drafters.dflash.shape import DFlashShape

_UNUSED = re.compile(r"t2d$|d2t$|verifier_|.*rotary_emb\.|.*inv_freq$")


def load(files: DraftFiles, shape: DFlashShape, known: int = 0) -> DFlashDrafter:
    """In float32, with nothing attached. `known`: tokens of its target; 0: as many as its own. Raises `UsageError`,
    `CheckpointError`."""
    here = files.downloaded()
    if not files.shapes:  # a hub has not said what there is
        shape = replace(dflash_format.read(here), depths=shape.depths)
    tensors = {plain_name(name): tensor for name, tensor in here.tensors().items()}
    known = min(known or shape.known, shape.known)
    vocabulary = mapped(files.name, tensors["d2t"], known) if shape.mapped else None
    if vocabulary is not None:
        vocabulary, tensors = in_order(vocabulary, tensors)
    with fitting(files.name):
        drafter = DFlashDrafter(shape, vocabulary)
        drafter.load_state_dict({name: tensor.float() for name, tensor in tensors.items() if not _UNUSED.match(name)})
    return drafter
