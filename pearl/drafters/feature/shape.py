"""What a network over the target's hidden states is made of: the options in which the published formats differ.

Knows: every number and flag that decides a tensor or the order of the norms. Refuses to know: files and their keys
(`pearl.checkpoints.drafts.feature_formats`), tensors. No torch here, so that a checkpoint can be described in moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EAGLE, EAGLE3, PEAGLE, OURS = "eagle", "eagle3", "peagle", "feature"
FORMAT = 1  # of our own files


@dataclass(frozen=True, kw_only=True)
class DrafterShape:
    """Everything that decides the tensors of a network, and what is done with them.

    `kind` decides how a row begins. x is what the features say of the position before, e the token's embedding:

        eagle3, peagle   attention reads [norm(e) ; norm(x)] and is added to x (EAGLE-3, Li et al. 2025)
        eagle            fc([e ; x]) is what an ordinary layer reads and is added to (EAGLE, Li et al. 2024)
        feature          the same of normed e and x, with a layer's own norm before attention: what pearl once wrote
    """

    kind: str
    features: tuple[int, ...]  # layers of the target whose outputs it reads, from 0; as many as there are: the norm's
    layers: int
    vocabulary: int  # tokens that can be drafted
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope: Mapping[str, Any] = field(default_factory=dict)  # as transformers' `rope_parameters`
    positions: int = 2048  # `max_position_embeddings`, which some scalings of the rotary angles need
    depths: int = 1  # K: tokens that one forward drafts; 1: it goes on from its own hidden state
    feature_width: int = 0  # of one layer's hidden state; 0: as wide as its own
    target: str = ""
    fingerprint: str = ""  # of the target; empty: nobody has noted it
    activation: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    fc_bias: bool = False
    qk_norm: bool = False  # a norm of every head's queries and keys (Qwen3)
    fc_norm: bool = False  # one of each feature, before `fc`
    input_norm: bool = False  # one of all features together, before `fc`
    norm_before_residual: bool = False  # attention is added to norm(x)
    norm_output: bool = False  # what the next step reads is behind the final norm
    own_embedding: bool = False
    own_head: bool = False
    mapped: bool = False  # a draft token's id is not the target's
    mask_token: int | None = None  # what stands in a row of a token that is not known
    format: int = FORMAT

    @property
    def width(self) -> int:
        """Numbers of one feature."""
        return self.feature_width or self.hidden

    @property
    def feature_row(self) -> int:
        """Numbers of all features of one position."""
        return len(self.features) * self.width

    @property
    def first_row(self) -> int:
        """The first token of a text that is read: before token 0 there is no feature. Ours stood in for it."""
        return 0 if self.kind == OURS else 1

    @property
    def parallel(self) -> bool:
        """One forward gives several tokens."""
        return self.depths > 1
