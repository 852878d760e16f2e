"""The parallel feature drafter: from one known position the distributions of the next K tokens, in one forward.

    known position i     in_proj(concat(token i's embedding, what the target's layers said at position i - 1))
    slot (i, d)          in_proj(concat(a learned mask embedding, a learned hidden state)), position i + d
    1 to 4 layers        RMSNorm, rotary grouped-query attention, SwiGLU, of the target's width
    the target's norm, and the rows of its head that belong to the draft vocabulary

The feature of position i - 1 meets the token that was picked from it, so depth 0 is the first unknown token (EAGLE, Li
et al. 2024). Depth is told by the rotary position alone (ParallelSpec, Xiao et al. 2024). Where a feature is withheld,
or the drafter has none at all (`features: []`), the learned hidden state stands for it.

Shapes: B texts, R rows, H hidden, F = layers * H features, V draft vocabulary, K depths.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pearl.config.inputs import brief
from pearl.errors import UsageError
from pearl.models.fingerprint import final_norm, model_fingerprint, wrong_target_message

CONFIG, WEIGHTS = "drafter.json", "drafter.safetensors"
FORMAT = 1

KeyValue = tuple[Tensor, Tensor]  # of one layer, each [B, kv heads, R, head_dim]


@dataclass(frozen=True)
class DrafterShape:
    """Everything that decides the tensors of a drafter. All but the first line comes from the target's config."""

    features: tuple[int, ...]  # layers of the target, by number
    depths: int  # K
    layers: int
    vocabulary: int  # tokens that can be drafted
    target: str
    fingerprint: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    eps: float
    format: int = FORMAT

    @staticmethod
    def of_target(
        config: Any,
        features: tuple[int, ...],
        depths: int,
        layers: int,
        vocabulary: int,
        target: str,
        mark: str,
        intermediate: int | None = None,
    ) -> DrafterShape:
        """`config`: the target's; `mark`: its fingerprint; `intermediate`: another one than the target's."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        rope = getattr(config, "rope_parameters", None) or {}
        return DrafterShape(
            features=tuple(features),
            depths=depths,
            layers=layers,
            vocabulary=vocabulary,
            target=target,
            fingerprint=mark,
            hidden=config.hidden_size,
            intermediate=intermediate or getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            eps=float(getattr(config, "rms_norm_eps", 1e-6)),
        )


class Attention(nn.Module):
    def __init__(self, shape: DrafterShape):
        super().__init__()
        self._shape = shape
        wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, wide, bias=False)
        self.k_proj = nn.Linear(shape.hidden, narrow, bias=False)
        self.v_proj = nn.Linear(shape.hidden, narrow, bias=False)
        self.o_proj = nn.Linear(wide, shape.hidden, bias=False)

    def forward(self, x: Tensor, turn: KeyValue, mask: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """x: [B, R, H]; turn: cosines and sines [R, head_dim]; mask: bool [R, past + R]."""
        batch, rows, _ = x.shape
        q, k, v = (
            project(x).view(batch, rows, -1, self._shape.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, turn), _rotate(k, turn)
        keys, values = (k, v) if past is None else (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, rows, -1)), (k, v)


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: DrafterShape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Its parts are called as in a Llama layer, so that one of the target's can be the start."""

    def __init__(self, shape: DrafterShape):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, shape.eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, turn: KeyValue, mask: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        seen, made = self.self_attn(self.input_layernorm(x), turn, mask, past)
        x = x + seen
        return x + self.mlp(self.post_attention_layernorm(x)), made


class FeatureDrafter(nn.Module):
    """What is trained. The target's own parts are attached (`attach`) and never saved."""

    vocabulary: Tensor

    def __init__(self, shape: DrafterShape, vocabulary: Tensor):
        """vocabulary: int64 [V], the ids of the tokens that can be drafted."""
        super().__init__()
        assert len(vocabulary) == shape.vocabulary, "a draft vocabulary of the size that was said"
        self.shape = shape
        self.register_buffer("vocabulary", vocabulary.clone())
        self.token_norm = nn.RMSNorm(shape.hidden, shape.eps)
        self.feature_norms = nn.ModuleList(nn.RMSNorm(shape.hidden, shape.eps) for _ in shape.features)
        if shape.features:
            self.fuse = nn.Linear(len(shape.features) * shape.hidden, shape.hidden, bias=False)
        self.in_proj = nn.Linear(2 * shape.hidden, shape.hidden, bias=False)
        self.mask_embedding = nn.Parameter(torch.randn(shape.hidden) * 0.02)
        self.shared_hidden = nn.Parameter(torch.randn(shape.hidden) * 0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self._frozen: list[
            Any
        ] = []  # embedding, norm and head of the target: in a list, so that they are no submodules

    def attach(self, target: Any) -> FeatureDrafter:
        """Takes embedding, final norm and head from a target, which may have no layers left.

        Raises `UsageError` if this drafter was trained for another one.
        """
        mark = model_fingerprint(target)
        if mark != self.shape.fingerprint:
            raise UsageError(wrong_target_message(self.shape.target))
        head = target.get_output_embeddings()
        ids = self.vocabulary.to(head.weight.device)
        cut = nn.Linear(self.shape.hidden, len(ids), bias=head.bias is not None, device="meta")
        cut.weight = nn.Parameter(head.weight.detach()[ids], requires_grad=False)
        if head.bias is not None:
            cut.bias = nn.Parameter(head.bias.detach()[ids], requires_grad=False)
        self._frozen = [target.get_input_embeddings().weight.detach(), final_norm(target), cut]
        return self

    def place(self, device: torch.device | str, dtype: torch.dtype) -> FeatureDrafter:
        """Moves all of it, the target's parts too."""
        embedding, norm, head = self._frozen
        self._frozen = [embedding.to(device, dtype), norm.to(device, dtype), head.to(device, dtype)]
        for module in (norm, head):
            module.requires_grad_(False)
        return self.to(device, dtype)

    @property
    def head(self) -> nn.Module:
        return self._frozen[2]

    def replace_head(self, head: nn.Module) -> None:
        """For one that computes the same faster."""
        self._frozen[2] = head

    def known(self, tokens: Tensor, features: Tensor, withheld: Tensor) -> Tensor:
        """The input of known positions, [B, R, H].

        tokens: [B, R]; features: [B, R, F], in each row those of the position before; withheld: bool [B, R], True
        where the row has none.
        """
        embedded = self.token_norm(F.embedding(tokens, self._frozen[0]))
        shared = self.shared_hidden.expand_as(embedded)
        if self.shape.features:
            parts = features.to(embedded.dtype).chunk(len(self.shape.features), -1)
            normed = [norm(part) for norm, part in zip(self.feature_norms, parts, strict=True)]
            shared = torch.where(withheld[..., None], shared, self.fuse(torch.cat(normed, -1)))
        return self.in_proj(torch.cat([embedded, shared], -1))

    def slots(self, batch: int, count: int) -> Tensor:
        """The input of `count` slots, [B, count, H]: all alike."""
        one = self.in_proj(torch.cat([self.mask_embedding, self.shared_hidden])[None])
        return one.expand(batch, count, -1)

    def stack(
        self, x: Tensor, positions: Tensor, mask: Tensor, past: list[KeyValue] | None = None
    ) -> tuple[Tensor, list[KeyValue]]:
        """The layers, and the target's norm.  x: [B, R, H]; positions: int64 [R]; mask: bool [R, past + R].

        Returns [B, R, H] for the head, and each layer's new keys and values.
        """
        turn = _turns(positions, self.shape, x.dtype)
        made = []
        for number, layer in enumerate(self.layers):
            x, new = layer(x, turn, mask, past[number] if past else None)
            made.append(new)
        return self._frozen[1](x), made

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().to(_stored(tensor)) for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(asdict(self.shape), indent=1) + "\n", encoding="utf-8")


def _stored(tensor: Tensor) -> torch.dtype:
    return torch.bfloat16 if tensor.is_floating_point() else torch.int32


def read_shape(folder: Path) -> DrafterShape:
    """What a drafter's folder says it is. Raises `UsageError`."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        shape = DrafterShape(**{**values, "features": tuple(values["features"])})
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no {CONFIG}: it is not a feature drafter.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / CONFIG} is not a feature drafter's ({error}).") from None
    if shape.format != FORMAT:
        raise UsageError(f"{folder} has format {shape.format}, this version reads {FORMAT}.")
    return shape


def load(folder: Path) -> FeatureDrafter:
    """A saved drafter, in float32, with nothing attached. Raises `UsageError`."""
    shape = read_shape(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder / WEIGHTS} can't be read ({error}).") from None
    drafter = FeatureDrafter(shape, torch.zeros(shape.vocabulary, dtype=torch.int64))
    try:
        drafter.load_state_dict({name: tensor.to(_loaded(tensor)) for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise UsageError(f"{folder / WEIGHTS} does not fit {CONFIG} beside it ({brief(error)}).") from None
    return drafter


def _loaded(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else torch.int64


def _turns(positions: Tensor, shape: DrafterShape, dtype: torch.dtype) -> KeyValue:
    """Cosines and sines of the rotary angles, [R, head_dim] (RoFormer, Su et al. 2021)."""
    half = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32) / shape.head_dim
    angles = positions[:, None].float() * shape.rope_theta**-half
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, turn: KeyValue) -> Tensor:
    """x: [B, heads, R, head_dim]"""
    first, second = x.chunk(2, -1)
    return x * turn[0] + torch.cat([-second, first], -1) * turn[1]
