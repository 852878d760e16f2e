"""Model folders without embeddings: those of their target stand in for them.

A draft model made from a target (`pearl.training.distill`) keeps the target's embeddings; for a small target they are
most of the bytes. Its folder is an ordinary transformers folder without them, and beside it

    borrowed.json            whose embeddings they are, and that target's fingerprint
    vocabulary.safetensors   the ids of the tokens that it drafts from, int32 [V]; of one that guesses several tokens in
                             one forward (`config.pard_token`) also the embedding of its mask rows, `mask` [H]
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pearl.errors import UsageError
from pearl.models.fingerprint import model_fingerprint, wrong_target_message

REFERENCE, VOCABULARY = "borrowed.json", "vocabulary.safetensors"
_EMBEDDINGS = ("embed_tokens.", "lm_head.", "wte.", "embed_in.", "embed_out.", "mask_embedding.")


@dataclass(frozen=True)
class EmbeddingRef:
    """Whose embeddings they are."""

    target: str
    fingerprint: str


def save(
    model: Any, folder: Path, target: str, mark: str, vocabulary: Tensor, mask_embedding: Tensor | None = None
) -> None:
    """Writes `model` in bfloat16 without its embeddings, which are those of `target` with the fingerprint `mark`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    kept = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not is_embedding(name)
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    words = {"ids": vocabulary.int().cpu()}
    if mask_embedding is not None:
        words["mask"] = mask_embedding.to("cpu", torch.bfloat16)
    save_file(words, folder / VOCABULARY)
    (folder / REFERENCE).write_text(json.dumps(asdict(EmbeddingRef(target, mark)), indent=1) + "\n", encoding="utf-8")


def is_embedding(name: str) -> bool:
    """Whether a weight of that name is the target's."""
    return any(part in f"{name}." for part in _EMBEDDINGS)


def read(folder: str | Path) -> EmbeddingRef | None:
    """Whose embeddings a model folder needs; None if it has its own. Raises `UsageError` for a broken file."""
    path = Path(folder) / REFERENCE
    if not path.is_file():
        return None
    try:
        return EmbeddingRef(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} can't be read ({error}).") from None


def vocabulary(folder: str | Path) -> Tensor:
    """The ids that the folder's model drafts from, int64 [V]."""
    path = Path(folder) / VOCABULARY
    try:
        return load_file(path)["ids"].long()
    except (OSError, SafetensorError, KeyError) as error:
        raise UsageError(f"{path} can't be read ({error}).") from None


def mask_embedding(folder: str | Path) -> Tensor | None:
    """That of the mask rows of the folder's model, float32 [H]; None if it has none."""
    path = Path(folder) / VOCABULARY
    try:
        found = load_file(path).get("mask") if path.exists() else None
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} can't be read ({error}).") from None
    return None if found is None else found.float()


@torch.no_grad()
def place_mask(model: Any, embedding: Tensor) -> None:
    """Writes the embedding of the mask rows into the row of `pard_token`."""
    rows = model.get_input_embeddings().weight
    rows[model.config.pard_token] = embedding.to(rows)


def complete(model: Any, target: Any, needs: EmbeddingRef) -> Any:
    """Gives `model` the embeddings of `target`, which may have no layers. Raises `UsageError` if it is another one."""
    if model_fingerprint(target) != needs.fingerprint:
        raise UsageError(wrong_target_message(needs.target))
    model.set_input_embeddings(target.get_input_embeddings())
    model.set_output_embeddings(target.get_output_embeddings())
    return model
