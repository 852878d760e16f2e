"""PARD checkpoints: ordinary language models whose config names the token of their mask rows.

    pard_token   of PARD and PARD-2 (`ptd_token_id`: the same by another name, as vLLM reads it)
    para_num     K, for how many tokens a forward it was trained; most files don't say
    spd_type     "pard2": it can also read features of its target; here it drafts without them, as PARD does

Knows: these keys. Refuses to know: tensors, and how one drafts (`pearl.drafters.pard`). No torch
here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pearl.checkpoints.drafts.files import DraftFiles
from pearl.checkpoints.drafts.layer_config import tokens_ahead
from pearl.errors import UsageError

DEPTHS = 8  # of a checkpoint that does not say
_TOKENS = ("pard_token", "ptd_token_id")


@dataclass(frozen=True)
class PardShape:
    """What a drafter has to know of its checkpoint."""

    mask_token: int
    depths: int  # K


def is_pard(files: DraftFiles) -> bool:
    config = files.config
    named = config.get("spd_type") == "pard2" or config.get("pard2") is True
    return "speculators_model_type" not in config and (named or any(config.get(key) is not None for key in _TOKENS))


def read(files: DraftFiles) -> PardShape:
    """Raises `UsageError`."""
    config = files.config
    token = next((config[key] for key in _TOKENS if config.get(key) is not None), None)
    if token is None:
        raise UsageError(
            f"The config.json of the draft {files.name} says that it is a PARD model and does not name pard_token, the "
            "token of its mask rows: add what it was trained with."
        )
    words = config.get("vocab_size")
    if type(token) is not int or token < 0 or (isinstance(words, int) and token >= words):
        raise UsageError(
            f"The pard_token of the draft {files.name} is {token!r}, which is none of the {words} tokens that it "
            "knows: its config.json is not that of its weights."
        )
    return PardShape(token, tokens_ahead(files.name, "para_num", config.get("para_num") or DEPTHS))


def line(files: DraftFiles, shape: PardShape) -> str:
    """What it is: "PARD qwen2 language model, 24 layers, 8 tokens a forward"."""
    config = files.config
    second = config.get("spd_type") == "pard2" or config.get("pard2") is True
    parts = [f"{'PARD-2' if second else 'PARD'} {config.get('model_type', '')} language model".replace("  ", " ")]
    if layers := config.get("num_hidden_layers"):
        parts.append(f"{layers} layer{'s' * (layers != 1)}")
    parts.append(f"{shape.depths} tokens a forward")
    if second:
        parts.append("without features of the target")
    return ", ".join(parts)
