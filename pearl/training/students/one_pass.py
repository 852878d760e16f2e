"""A student that learns to guess K tokens in one forward: PARD (An et al. 2025, arXiv 2504.18583).

Beside the text, whose rows learn the next token as before, *mask rows* follow some of its tokens, the anchors: row d of
anchor i stands at position i + d, sees the text up to i and the anchor's own rows up to itself, and learns the choice
after i + d. All mask rows are fed one learned embedding.

Deeper rows are kept of fewer anchors, each depth of a part of those of the depth above (conditional drop-token, section
3.3 there): depth d of max(r^d, r_min) of them, so a text costs about three times its rows, not K times.

The text is read once. Its keys and values are all that mask rows want of it, so a segment of anchors after another
gives back its gradient with respect to these and is forgotten, and one backward pass takes the sum: exact, and without
all rows in memory at once (`pearl.training.partition` does the same for a network of our own).

Shapes: B texts, n tokens, R mask rows, H hidden, K depths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pearl.checkpoints import shared_embeddings
from pearl.config.engine_config import model_path
from pearl.models.kv_cache.transformers_interface import cache_argument
from pearl.training import partition
from pearl.training.loop import Figures
from pearl.training.objective import NOTHING, depth_figures
from pearl.training.recipes import DistillRecipe
from pearl.training.shards import Recorded, stacked
from pearl.training.students.student import Student

MASK = "mask_embedding"  # a parameter of the student


@dataclass(frozen=True)
class MaskRows:
    """Rows of a forward, those of an anchor side by side: int64 [R] each."""

    anchors: Tensor
    depths: Tensor  # 1 .. K - 1

    @property
    def positions(self) -> Tensor:
        return self.anchors + self.depths

    def seen(self, count: int) -> Tensor:
        """Who sees whom, bool [R, count + R]: first the text's `count` tokens."""
        text = torch.arange(count, device=self.anchors.device) <= self.anchors[:, None]
        same = self.anchors[:, None] == self.anchors
        return torch.cat([text, same & (self.depths <= self.depths[:, None])], 1)

    def segments(self, number: int) -> Iterator[MaskRows]:
        """So many parts at most, none of which cuts an anchor's rows apart."""
        first, size = 0, -(-len(self.anchors) // number)
        while first < len(self.anchors):
            last = min(first + size, len(self.anchors))
            while last < len(self.anchors) and self.anchors[last] == self.anchors[last - 1]:
                last += 1
            yield MaskRows(self.anchors[first:last], self.depths[first:last])
            first = last


def drop_rows(anchors: Tensor, depths: int, keep: float, least: float, generator: torch.Generator | None) -> MaskRows:
    """The rows of depth 1 to `depths` - 1 of the anchors, int64 [A], without those that are dropped."""
    order = anchors[torch.randperm(len(anchors), generator=generator).to(anchors.device)]
    kept = [order[: round(len(order) * max(keep**depth, least))] for depth in range(1, depths)]
    at = torch.cat([anchors[:0], *kept])
    depth = torch.cat([anchors[:0], *(torch.full_like(part, number) for number, part in enumerate(kept, 1))])
    sorted_ = torch.argsort(at * depths + depth)
    return MaskRows(at[sorted_], depth[sorted_])


class OnePassStudent(Student):
    """`loop.Learner`: learns the target's choices after every token of its answers, and further ahead."""

    def __init__(
        self,
        model: PreTrainedModel,
        data: Recorded,
        vocabulary: Tensor,
        recipe: DistillRecipe,
        fingerprint: str,
        token: int,
    ):
        """`token`: of the mask rows; the others as in `Student`."""
        super().__init__(model, data, vocabulary, recipe, fingerprint)
        model.config.pard_token, model.config.para_num = token, recipe.one_pass
        rows: Any = model.get_input_embeddings()
        model.register_parameter(MASK, nn.Parameter(rows.weight.detach().mean(0)))
        saved = shared_embeddings.mask_embedding(model_path(recipe.start)) if recipe.start else None
        if saved is not None:
            self.mask.data.copy_(saved)

    @property
    def _scale(self) -> Tensor | float:
        """What the model multiplies its embeddings by, the mask's among them (Gemma)."""
        scale: Tensor | float = getattr(self.module.get_input_embeddings(), "embed_scale", 1.0)
        return scale

    @property
    def mask(self) -> nn.Parameter:
        found = getattr(self.module, MASK)
        assert isinstance(found, nn.Parameter)
        return found

    def learn(self, texts: Sequence[int], generator: torch.Generator, share: float, done: float) -> Figures:
        return self._run(texts, self._recipe.keep_rows, generator, share)

    @torch.no_grad()
    def test(self, text: int) -> Figures:
        """Accuracy at every depth, from every token of the answer."""
        return self._run([text], 1.0, None, 0.0)

    def save(self, folder: Path) -> None:
        shared_embeddings.save(
            self.module, folder, self._recipe.target, self._fingerprint, self._vocabulary, self.mask.detach()
        )

    def complete(self) -> None:
        shared_embeddings.place_mask(self.module, self.mask.detach())
        del self.module._parameters[MASK]

    def _run(self, texts: Sequence[int], keep: float, generator: torch.Generator | None, share: float) -> Figures:
        """Judges every depth; adds `share` times the gradient if that is not 0."""
        recipe, some = self._recipe, [self._data[text] for text in texts]
        tokens, ids, logp = (part.to(self.module.device) for part in stacked(some))
        noted = ids[..., 0] != NOTHING
        anchors = noted.any(0).nonzero()[:, 0]
        rows = drop_rows(anchors, recipe.one_pass, keep, recipe.keep_least if keep < 1 else 1.0, generator)
        there = _labelled(rows, noted)
        weights = [recipe.depth_decay**depth for depth in range(recipe.one_pass)]
        figures = depth_figures(recipe.one_pass)

        def judged(depth: int, hidden: Tensor, ids: Tensor, logp: Tensor, count: int) -> Tensor:
            found = self._objective.judge(self._head(hidden), ids, logp)
            found.add_to(figures, depth)
            return share * found.loss.sum() * (weights[depth] / sum(weights) / max(1, count))

        cache: Any = DynamicCache()
        hidden = self._forward(cache, input_ids=tokens)
        made = [(layer.keys, layer.values) for layer in cache.layers]
        total = judged(0, hidden[noted], ids[noted], logp[noted], int(noted.sum()))
        if self._hooks:
            apart = self._apart(some)
            figures |= {"apart": float(apart.detach()), "n:apart": 1.0}
            total = total + share * recipe.match * apart
        past, pairs = partition.detached(made)
        counts = [int(there[:, rows.depths == depth].sum()) for depth in range(recipe.one_pass)]
        for part in rows.segments(recipe.segments):
            ahead, labelled = self._read(part, past, len(tokens)), _labelled(part, noted)
            loss = ahead.sum() * 0.0
            for depth in range(1, recipe.one_pass):
                mine = labelled & (part.depths == depth)
                if mine.any():
                    at = part.positions.clamp(max=tokens.shape[1] - 1)
                    loss = loss + judged(depth, ahead[mine], ids[:, at][mine], logp[:, at][mine], counts[depth])
            if share:
                loss.backward()
        if share:
            partition.backward_through(total, pairs)
        return figures

    def _read(self, rows: MaskRows, past: Sequence[tuple[Tensor, Tensor]], batch: int) -> Tensor:
        """Hidden states of mask rows behind texts of which these are the keys and values, [B, R, H]."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        seen = rows.seen(past[0][0].shape[2])
        barred = torch.zeros(seen.shape, dtype=self.module.dtype, device=seen.device)
        barred = barred.masked_fill(~seen, torch.finfo(self.module.dtype).min)
        return self._forward(
            cache,
            inputs_embeds=(self.mask * self._scale).expand(batch, len(rows.anchors), -1),
            position_ids=rows.positions[None].expand(batch, -1),
            attention_mask=barred[None, None].expand(batch, 1, -1, -1),
        )

    def _forward(self, cache: DynamicCache, **inputs: Tensor) -> Tensor:
        base = self.module.base_model
        return base(**inputs, **{cache_argument(type(base).forward): cache}, use_cache=True).last_hidden_state


def _labelled(rows: MaskRows, noted: Tensor) -> Tensor:
    """Whether the choice that a row learns was noted, and its anchor's own, bool [B, R].  noted: [B, n]"""
    count = noted.shape[1]
    return noted[:, rows.anchors] & noted[:, rows.positions.clamp(max=count - 1)] & (rows.positions < count)
