"""Trains an EAGLE-3 or P-EAGLE network on recorded texts.

    pearl train --config configs/feature/smollm2-135m.yaml

For every token of an answer the drafter learns the target's choice after it (depth 0); from some of them, the anchors,
also the choices after that (depths 1 to K - 1): P-EAGLE without seeing the tokens between, EAGLE-3 with these and its
own hidden states. From P-EAGLE features are withheld here and there, in runs, because in two processes the drafter runs
ahead of what the target has read; EAGLE-3 is used to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pearl.checkpoints.drafts import envelope
from pearl.checkpoints.drafts.files import CONFIG
from pearl.checkpoints.preflight import preflight
from pearl.checkpoints.targets import load_plain
from pearl.config.engine_config import EngineConfig
from pearl.drafters.feature.mask import SlotMask
from pearl.drafters.feature.network import FeatureDrafter
from pearl.errors import UsageError
from pearl.models.fingerprint import model_fingerprint
from pearl.training import loop, partition
from pearl.training.first_weights import go_on_from, new_drafter, spare_token
from pearl.training.loop import Figures
from pearl.training.objective import NOTHING, Objective, RowLosses, depth_figures, frequent
from pearl.training.recipes import FeatureRecipe
from pearl.training.shards import Recorded, stacked

RUN = 8  # features withheld in a row at most


@dataclass(frozen=True)
class Batch:
    """B texts of n tokens: tokens, withheld [B, n]; features [B, n, F], of the token before; top_* [B, n, k]."""

    tokens: Tensor
    features: Tensor
    withheld: Tensor
    top_ids: Tensor
    top_logp: Tensor


class FeatureLearner:
    """`loop.Learner`: learns from B texts at a time, slots in segments."""

    def __init__(
        self,
        drafter: FeatureDrafter,
        data: Recorded,
        recipe: FeatureRecipe,
        device: torch.device,
        size: int,
        architecture: str = "",
    ):
        """`drafter` has its target attached; `size`: of the target's vocabulary; `architecture`: its class."""
        self.module, self._data, self._recipe, self._device = drafter, data, recipe, device
        self._architecture = architecture
        self._objective = Objective(drafter.vocabulary, size, recipe.kl)
        longest = min(recipe.longest, max(data.lengths))
        self._mask = SlotMask(longest, recipe.depths, device)

    @property
    def texts_mark(self) -> int:
        return self._data.mark

    def learn(self, texts: Sequence[int], generator: torch.Generator, share: float, done: float) -> Figures:
        batch = self.batch(texts)
        if self.module.shape.parallel:
            withheld = runs(batch.tokens.shape, self._recipe.withheld, generator).to(self._device)
            batch = replace(batch, withheld=batch.withheld | withheld)
        anchor_share = self._recipe.anchors if done >= self._recipe.slots_after else 0.0
        return self._run(batch, self._anchors(batch, anchor_share, generator), share)

    @torch.no_grad()
    def test(self, text: int) -> Figures:
        """Accuracy at every depth, with all features."""
        batch = self.batch([text])
        return self._run(batch, self._anchors(batch, 1.0, None), 0.0)

    def save(self, folder: Path) -> None:
        envelope.save(self.module, folder, self._recipe.depths, self._architecture, self._recipe.borrow)

    def batch(self, texts: Sequence[int]) -> Batch:
        """Without the first token of each text: before it there is no feature."""
        some = [self._data[text].first(self._recipe.longest) for text in texts]
        features = [text.features[:-1] for text in some]
        tokens, top_ids, top_logp = (part[:, 1:].to(self._device) for part in stacked(some))
        return Batch(
            tokens=tokens,
            features=nn.utils.rnn.pad_sequence(features, batch_first=True).to(self._device),
            withheld=torch.zeros(tokens.shape, dtype=torch.bool, device=self._device),
            top_ids=top_ids,
            top_logp=top_logp,
        )

    def _anchors(self, batch: Batch, share: float, generator: torch.Generator | None) -> Tensor:
        """Positions of which slots are read, ascending: some of those after which a choice was noted."""
        noted = (batch.top_ids[..., 0] != NOTHING).any(0).nonzero()[:, 0].cpu()
        if share < 1:
            noted = noted[torch.rand(len(noted), generator=generator) < share]
        return noted.to(self._device)

    def _run(self, batch: Batch, anchors: Tensor, share: float) -> Figures:
        """Judges every depth; adds `share` times the gradient if that is not 0."""
        depths, noted = self._recipe.depths, batch.top_ids[..., 0] != NOTHING
        weights = [self._recipe.depth_decay**depth for depth in range(depths)]
        later = [self._labelled(noted, anchors, depth).sum() for depth in range(1, depths)]
        counts = [int(count) for count in (noted.sum(), *later)]
        sums = depth_figures(depths)

        def judged(depth: int, rows: Tensor, labels: Labels, weight: Tensor | float) -> tuple[Tensor, Tensor]:
            """The share of the loss, and how likely each row found what the text goes on with."""
            found = self._judge(rows, labels)
            found.add_to(sums, depth)
            loss = (found.loss * weight).sum() * (weights[depth] / sum(weights) / counts[depth])
            return loss, found.chance

        def loss(hidden: Tensor, ahead: Tensor | None, anchors: Tensor | None) -> Tensor:
            if ahead is None or anchors is None:
                total = hidden.sum() * 0.0
                return total + judged(0, *self._rows(batch, hidden, None, 0), 1.0)[0] if counts[0] else total
            total, reach = ahead.sum() * 0.0, self._reached(batch, hidden, anchors)
            for depth in range(1, depths):
                there = self._labelled(noted, anchors, depth)
                if not there.any():
                    continue
                weight = 1 - self._recipe.reach + self._recipe.reach * reach[there]
                more, chance = judged(depth, *self._rows(batch, ahead, anchors, depth), weight)
                total = total + more
                reach = torch.zeros_like(reach).masked_scatter_(there, reach[there] * chance)
            return total

        inputs = (batch.tokens, batch.features, batch.withheld)
        if share:
            segments = self._recipe.segments
            scaled = lambda *given: share * loss(*given)  # noqa: E731
            partition.backward(self.module, self._mask, *inputs, anchors, segments, scaled)
        else:
            partition.evaluate(self.module, self._mask, *inputs, anchors, loss)
        return sums

    def _judge(self, rows: Tensor, labels: Labels) -> RowLosses:
        """rows: [R, H]. With a Markov head, its confidence is to be how often the best guess is right."""
        logits = self.module.logits(rows)
        told = labels.ids, labels.logp, labels.went
        if not self.module.shape.markov_rank:
            return self._objective.judge(logits, *told)
        bias, sure = self.module.after(labels.before, rows)
        found = self._objective.judge(logits + bias, *told)
        wrong = nn.functional.binary_cross_entropy_with_logits(sure, found.first.float(), reduction="none")
        return replace(found, loss=found.loss + torch.where(labels.ids[:, 0] != NOTHING, wrong, 0.0))

    @torch.no_grad()
    def _reached(self, batch: Batch, hidden: Tensor, anchors: Tensor) -> Tensor:
        """How likely the walk passes the first token after each anchor, as the network sees it, float [B, anchors].

        hidden: [B, n, H], of the known positions."""
        noted = batch.top_ids[:, anchors, 0] != NOTHING
        reach = torch.ones(noted.shape, device=hidden.device)
        if not self._recipe.reach or not noted.any():
            return reach
        found = self._judge(hidden[:, anchors][noted], _labels(batch, anchors, noted))
        return reach.masked_scatter_(noted, found.chance)

    def _labelled(self, noted: Tensor, anchors: Tensor, depth: int) -> Tensor:
        """Whether the choice after each anchor was noted, and that `depth` after it, bool [B, anchors]."""
        count = noted.shape[1]
        there = anchors + depth < count
        return noted[:, anchors] & noted[:, (anchors + depth).clamp(max=count - 1)] & there

    def _rows(self, batch: Batch, hidden: Tensor, part: Tensor | None, depth: int) -> tuple[Tensor, Labels]:
        """The rows of one depth that have a label, [R, H], and these."""
        noted = batch.top_ids[..., 0] != NOTHING
        if part is None:
            return hidden[noted], _labels(batch, slice(None), noted)
        there = self._labelled(noted, part, depth)
        at = (part + depth).clamp(max=noted.shape[1] - 1)
        return hidden[:, depth - 1 :: self._mask.slots][there], _labels(batch, at, there)


class Labels(NamedTuple):
    """What R rows are to learn, each a guess after one token of a text."""

    before: Tensor  # [R], that token
    ids: Tensor  # [R, k], the target's likeliest, its choice first
    logp: Tensor  # [R, k]
    went: Tensor  # [R], what the text goes on with: in a sampled one it may be another than the choice


def _labels(batch: Batch, at: Tensor | slice, there: Tensor) -> Labels:
    """Of the positions `at` of all texts, those that are `there`, bool [B, positions]."""
    went = torch.cat([batch.tokens[:, 1:], batch.tokens[:, -1:]], 1)  # after the last one nothing is guessed
    return Labels(*(part[:, at][there] for part in (batch.tokens, batch.top_ids, batch.top_logp, went)))


def runs(shape: Sequence[int], chance: float, generator: torch.Generator) -> Tensor:
    """Where features are withheld, bool [B, n]: runs of 1 to `RUN`, each beginning with `chance` at any token."""
    begins = torch.rand(tuple(shape), generator=generator) < chance
    lengths = torch.randint(1, RUN + 1, tuple(shape), generator=generator)
    withheld = torch.zeros(tuple(shape), dtype=torch.bool)
    for back in range(min(RUN, shape[1])):
        covered = begins & (lengths > back)
        withheld[:, back:] |= covered[:, : covered.shape[1] - back]
    return withheld


def run(recipe: FeatureRecipe) -> None:
    """Trains by a recipe, in every process that accelerate has started, and says what came of it.

    Raises `UsageError`.
    """
    accelerator = loop.accelerator_of(recipe)
    data = Recorded(Path(recipe.data))
    layers = data.manifest.layers if recipe.features is None else recipe.features
    if list(layers) != data.manifest.layers:
        raise UsageError(
            f"The recipe wants features of the layers {list(layers)}, recorded are {data.manifest.layers}: leave "
            "features out, or extract texts with --layers."
        )
    checked = preflight(EngineConfig(target=recipe.target, dtype="float32"))
    target = load_plain(checked, "cpu")
    data.must_be_of(model_fingerprint(target), recipe.target)
    train, held_out = data.split(recipe.held_out)
    size = target.get_output_embeddings().weight.shape[0]
    vocabulary = frequent(map(data.choices, train), recipe.vocabulary, checked.tokenizer.all_special_ids, size)
    sample = torch.cat([data[text].features[1:-1] for text in train[:32]])
    mask_token = spare_token(checked.tokenizer, size) if recipe.mask_token is None else recipe.mask_token
    if mask_token >= size:
        raise UsageError(f"The recipe's mask_token must be below {size}, the rows of the target's embedding.")
    if recipe.start:
        drafter = go_on_from(recipe.start, target, recipe, layers)
        if accelerator.is_main_process and len(drafter.vocabulary) != recipe.vocabulary:
            print(f"{recipe.start} goes on drafting from its own {len(drafter.vocabulary)} tokens")
    else:
        drafter = new_drafter(target, recipe, layers, vocabulary, sample, mask_token)
    architecture = type(target).__name__
    del target
    drafter.place(accelerator.device, torch.float32)
    learner = FeatureLearner(drafter, data, recipe, accelerator.device, size, architecture)
    loop.train(learner, recipe, train, held_out, accelerator)
    if accelerator.is_main_process:
        print(f"the drafter is in {recipe.output}: {CONFIG} and {envelope.WEIGHTS}")
