"""What a DFlash or DSpark network is made of. No torch here, so that a checkpoint can be described in moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DFLASH, DSPARK = "dflash", "dspark"


@dataclass(frozen=True, kw_only=True)
class DFlashShape:
    """Everything that decides the tensors, and what is done with them."""

    kind: str
    features: tuple[int, ...]  # layers of the target whose outputs it reads, from 0
    hidden: int  # of its own rows, and of the target's
    layers: int
    depths: int  # K: tokens that one forward guesses; the block has one row more unless `from_anchor`
    mask_token: int
    vocabulary: int  # tokens that can be drafted
    known: int  # tokens of the target
    config: Mapping[str, Any] = field(
        default_factory=dict
    )  # of its layers, which are Qwen3's, as transformers reads it
    own_head: bool = False
    own_embedding: bool = False
    mapped: bool = False  # a draft token's id is not the target's
    from_anchor: bool = False  # row j guesses the token after its own position; else the token at it
    windows: tuple[int, ...] = ()  # by layer, of what it sees of the text; 0: all
    causal: tuple[bool, ...] = ()  # by layer: rows of the block see none behind them
    window_from_anchor: bool = False  # every row's window begins where the anchor's does
    markov_rank: int = 0  # of DSpark's bias by the token before; 0: none
    gated: bool = False  # the hidden state weighs that bias
    confidence: bool = False  # a chance, for each row, that its guess is taken
    confident_markov: bool = False  # that looks at the token before too
    embedding_scale: float = 1.0
    output_scale: float = 1.0
    softcap: float = 0.0
    target: str = ""

    @property
    def feature_row(self) -> int:
        """Numbers that one position's features are."""
        return len(self.features) * self.hidden

    @property
    def block(self) -> int:
        """Rows of a block."""
        return self.depths + (not self.from_anchor)
