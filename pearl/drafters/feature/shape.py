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
_ROPES = ("default", "linear", "llama3", "yarn")  # scalings of a target's rotary angles that its drafter takes over


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
    known: int = 0  # of the target, that a row may hold
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
    attention_bias: bool = False  # of queries, keys and values
    output_bias: bool = False  # of what comes out of attention
    mlp_bias: bool = False
    fc_bias: bool = False
    fuses: bool = True  # `fc` maps the features to its width; else the one feature is x as it is
    windows: tuple[int, ...] = ()  # by layer, of what it sees of the text, 0: all; empty: every layer sees all
    qk_norm: bool = False  # a norm of every head's queries and keys (Qwen3)
    fc_norm: bool = False  # one of each feature, before `fc`
    input_norm: bool = False  # one of all features together, before `fc`
    norm_before_residual: bool = False  # attention is added to norm(x)
    norm_output: bool = False  # what the next step reads is behind the final norm
    own_embedding: bool = False
    own_head: bool = False
    own_mask: bool = False  # of the embedding, the row of the mask token alone
    mapped: bool = False  # a draft token's id is not the target's
    markov_rank: int = 0  # of the bias by the token before, with a head of confidence beside it (DSpark); 0: neither
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

    @staticmethod
    def of_target(
        config: Any,
        *,
        kind: str = EAGLE3,
        features: tuple[int, ...],
        layers: int,
        vocabulary: int,
        depths: int = 1,
        target: str = "",
        fingerprint: str = "",
        intermediate: int | None = None,
        mask_token: int | None = None,
        markov_rank: int = 0,
    ) -> DrafterShape:
        """Of a network for a target with that config of transformers', as wide as it. `intermediate`: another one than
        the target's."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") not in _ROPES or "rope_theta" not in rope:
            rope = {"rope_theta": rope.get("rope_theta") or 10000.0}
        rope = {name: value for name, value in rope.items() if name != "partial_rotary_factor"}  # it turns whole heads
        known = int(config.vocab_size)
        return DrafterShape(
            kind=kind,
            features=tuple(features),
            layers=layers,
            vocabulary=vocabulary,
            known=known,
            hidden=config.hidden_size,
            intermediate=intermediate or getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            eps=float(getattr(config, "rms_norm_eps", 1e-6)),
            rope={"rope_type": "default"} | dict(rope),
            positions=getattr(config, "max_position_embeddings", None) or 2048,
            depths=depths if kind in (PEAGLE, OURS) else 1,
            feature_width=config.hidden_size,
            target=target,
            fingerprint=fingerprint,
            fc_norm=bool(features) and kind != EAGLE,
            qk_norm=config.model_type == "qwen3" and kind != OURS,
            own_head=kind in (EAGLE3, PEAGLE),
            mapped=vocabulary < known or kind == OURS,
            own_mask=kind == PEAGLE,
            markov_rank=markov_rank,
            mask_token=mask_token if kind == PEAGLE else None,
        )
