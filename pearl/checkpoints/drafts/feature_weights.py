"""The weights of a network over hidden states: from each of the formats in which they are published.

Knows: what tensors are called in which file, and which are of no use. Refuses to know: what is computed with them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pearl.checkpoints.drafts import feature_formats
from pearl.checkpoints.drafts.files import MARKOV_TABLE
from pearl.checkpoints.drafts.kinds import DraftDescription
from pearl.config.inputs import brief
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.feature.shape import EAGLE, OURS, DrafterShape
from pearl.errors import CheckpointError, PearlError

_UNUSED = re.compile(r"t2d$|verifier_|.*rotary_emb\.|.*inv_freq$")
_LATER_NORM = re.compile(r"(layers\.[1-9]\d*\.)hidden_norm\.")
_HEADS = ("lm_head.weight", "markov_w2.weight", "markov_head.markov_w2.weight")  # whose rows are the draft vocabulary
_OURS = {"fuse.": "fc.", "feature_norms.": "fc_norm."}  # what the format that pearl wrote before calls them


def load(drafting: DraftDescription) -> FeatureDrafter:
    """In float32, with nothing attached. Raises `UsageError`, `CheckpointError`."""
    files = drafting.files.downloaded()
    shape = feature_formats.read(files, drafting.fits.layers if drafting.fits else None).shape
    tensors = {feature_formats.plain_name(name): tensor for name, tensor in files.tensors().items()}
    most = min(shape.known, drafting.fits.vocabulary) if drafting.fits else shape.known
    vocabulary = _vocabulary(drafting.files.name, shape, tensors, most)
    named = dict(_named(shape, tensors))
    if MARKOV_TABLE in named and len(named[MARKOV_TABLE]) < shape.known:
        table = named[MARKOV_TABLE]
        named[MARKOV_TABLE] = table.new_zeros(shape.known, table.shape[1]).index_copy_(0, vocabulary, table)
    vocabulary, named = in_order(vocabulary, named)
    with fitting(drafting.files.name):
        return FeatureDrafter.of(shape, vocabulary, named)


@contextlib.contextmanager
def fitting(name: str) -> Iterator[None]:
    """Around making the network that a config.json says, and giving it the tensors. Raises `CheckpointError`."""
    try:
        yield
    except (PearlError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch and transformers raise many kinds for one thing: these do not fit together
        raise CheckpointError(
            f"The weights of the draft {name} are not those that its config.json says, or no network can be made of it "
            f"({type(error).__name__}: {brief(error, 300)})."
        ) from None


def mapped(name: str, d2t: Tensor, known: int) -> Tensor:
    """The target's ids of the tokens that can be drafted, int64 [V]: d2t says how far each is from the draft's own.
    `known`: tokens that the draft and its target have. Raises `CheckpointError`."""
    ids = torch.arange(len(d2t)) + d2t.long()
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < known):
        raise CheckpointError(
            f"The d2t of the draft {name} leads to tokens from {int(ids.min())} to {int(ids.max())}, and there are "
            f"{known}: it is of another target, or damaged."
        )
    return ids


def in_order(vocabulary: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A draft vocabulary, int64 [V], and the network's tensors. Where it holds the first V tokens in another order than
    the target, both are brought into the target's: so what has as many logits as that needs no map."""
    ids, order = vocabulary.sort()
    if torch.equal(vocabulary, ids) or not torch.equal(ids, torch.arange(len(ids))):
        return vocabulary, tensors
    return ids, tensors | {name: tensors[name][order] for name in _HEADS if name in tensors}


def _vocabulary(name: str, shape: DrafterShape, tensors: Mapping[str, Tensor], known: int) -> Tensor:
    """The target's ids of the tokens that can be drafted, int64 [V].

    Raises `CheckpointError`."""
    if shape.kind == OURS:
        return tensors["vocabulary"].long() if "vocabulary" in tensors else torch.zeros(shape.vocabulary).long()
    return mapped(name, tensors["d2t"], known) if shape.mapped else torch.arange(shape.vocabulary)


def _named(shape: DrafterShape, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """As the network calls them."""
    for name, tensor in tensors.items():
        if _UNUSED.match(name) or name in ("d2t", "vocabulary"):
            continue
        if later := _LATER_NORM.match(name):  # what SGLang reads in place of the layer's own; others leave it
            if f"{later[1]}input_layernorm.weight" in tensors:
                continue
            name = f"{later[1]}input_layernorm.weight"
        if name == "lm_head.weight" and not shape.own_head:
            continue
        if name == "embed_tokens.weight" and not shape.own_embedding:
            continue
        if name.startswith("fc.") and not shape.fuses:  # of no use then, as vLLM reads it too
            continue
        if shape.kind == EAGLE:
            name = re.sub(r"^fc\.", "in_proj.", name)
        if shape.kind == OURS:
            name = next((new + name[len(old) :] for old, new in _OURS.items() if name.startswith(old)), name)
        yield name, tensor
