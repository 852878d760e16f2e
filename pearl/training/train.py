"""Trains a feature drafter on recorded texts.

    pearl train --config configs/feature/smollm2-135m.yaml

For every token of an answer the drafter learns the target's choice after it (depth 0); from some of them, the anchors,
also the choices after that (depths 1 to K - 1), which it has to make without seeing the tokens between. Features are
withheld here and there, in runs, because in two processes the drafter runs ahead of what the target has read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pearl.config.engine_config import EngineConfig
from pearl.drafters.feature import network
from pearl.drafters.feature.mask import SlotMask
from pearl.drafters.feature.network import FeatureDrafter, Shape
from pearl.errors import UsageError
from pearl.models import fingerprint
from pearl.models.hidden_states import decoder_layers
from pearl.training import loop, partition
from pearl.training.loop import Figures, Recipe
from pearl.training.objective import NOTHING, Objective, frequent
from pearl.training.shards import Recorded, Text

RUN = 8  # features withheld in a row at most


@dataclass(frozen=True)
class FeatureRecipe(Recipe):
    features: tuple[int, ...] | None = None  # layers of the target; None: those recorded, []: a drafter of tokens only
    depths: int = 5  # K
    layers: int = 1
    intermediate: int | None = None  # of the layers' SwiGLU; None: the target's
    start_layer: int | None = None  # of the target, copied into the drafter's last layer; None: the target's last one
    depth_decay: float = 0.8  # weight of a depth's loss against the one before
    anchors: float = 0.5  # share of the answer's tokens from which slots look ahead
    slots_after: float = 0.5  # share of the training after which slots are learnt; before, depth 0 alone: it is cheaper
    withheld: float = 0.05  # chance that a run of withheld features begins at a token
    segments: int = 4  # S, see pearl.training.partition
    longest: int = 1024  # tokens of a text; what is beyond is cut off

    def __post_init__(self) -> None:
        if self.features is not None:
            object.__setattr__(self, "features", tuple(self.features))
        super().__post_init__()
        if not 1 <= self.layers <= 4 or not 1 <= self.depths <= 16 or self.segments < 1:
            raise UsageError("The recipe's layers must be 1 to 4, its depths 1 to 16, its segments at least 1.")
        if self.intermediate is not None and (type(self.intermediate) is not int or self.intermediate < 1):
            raise UsageError(f"The recipe's intermediate must be a whole number from 1, not {self.intermediate!r}.")


@dataclass(frozen=True)
class Batch:
    """B texts of n tokens: tokens, withheld [B, n]; features [B, n, F], of the token before; top_* [B, n, k]."""

    tokens: Tensor
    features: Tensor
    withheld: Tensor
    top_ids: Tensor
    top_logp: Tensor


class Learner:
    """`loop.Learner`: learns from B texts at a time, slots in segments."""

    def __init__(self, drafter: FeatureDrafter, data: Recorded, recipe: FeatureRecipe, device: torch.device, size: int):
        """`drafter` has its target attached; `size`: of the target's vocabulary."""
        self.module, self._data, self._recipe, self._device = drafter, data, recipe, device
        self._objective = Objective(drafter.vocabulary, size, recipe.kl)
        longest = min(recipe.longest, max(data.lengths))
        self._mask = SlotMask(longest, drafter.shape.depths, device)

    def learn(self, texts: Sequence[int], generator: torch.Generator, share: float, done: float) -> Figures:
        batch = self.batch(texts)
        hidden = runs(batch.tokens.shape, self._recipe.withheld, generator).to(self._device)
        batch = Batch(batch.tokens, batch.features, batch.withheld | hidden, batch.top_ids, batch.top_logp)
        anchors = self._recipe.anchors if done >= self._recipe.slots_after else 0.0
        return self._run(batch, self._anchors(batch, anchors, generator), share)

    @torch.no_grad()
    def test(self, texts: Sequence[int]) -> Figures:
        """Accuracy at every depth, with all features."""
        sums: dict[str, float] = defaultdict(float)
        for text in texts:
            batch = self.batch([text])
            for name, value in self._run(batch, self._anchors(batch, 1.0, None), 0.0).items():
                sums[name] += value
        return sums

    def save(self, folder: Path) -> None:
        self.module.save(folder)

    def batch(self, texts: Sequence[int]) -> Batch:
        some = [_cut(self._data[text], self._recipe.longest) for text in texts]
        pad = nn.utils.rnn.pad_sequence
        features = [torch.cat([text.features[:1] * 0, text.features[:-1]]) for text in some]
        return Batch(
            tokens=pad([text.tokens for text in some], batch_first=True).to(self._device),
            features=pad(features, batch_first=True).to(self._device),
            withheld=_first_only(len(some), max(len(text.tokens) for text in some)).to(self._device),
            top_ids=pad([text.top_ids for text in some], batch_first=True, padding_value=NOTHING).to(self._device),
            top_logp=pad([text.top_logp for text in some], batch_first=True).to(self._device),
        )

    def _anchors(self, batch: Batch, share: float, generator: torch.Generator | None) -> Tensor:
        """Positions of which slots are read, ascending: some of those after which a choice was noted."""
        noted = (batch.top_ids[..., 0] != NOTHING).any(0).nonzero()[:, 0].cpu()
        if share < 1:
            noted = noted[torch.rand(len(noted), generator=generator) < share]
        return noted.to(self._device)

    def _run(self, batch: Batch, anchors: Tensor, share: float) -> Figures:
        """Judges every depth; adds `share` times the gradient if that is not 0."""
        drafter, mask = self.module, self._mask
        depth_weights = [self._recipe.depth_decay**depth for depth in range(drafter.shape.depths)]
        norm = sum(depth_weights)
        sums: dict[str, float] = {}
        for name in ("loss", "accuracy", "top 5"):  # in the order in which they are shown
            sums |= {f"{kind}{name} {depth}": 0.0 for depth in range(drafter.shape.depths) for kind in ("", "n:")}
        noted = batch.top_ids[..., 0] != NOTHING
        later = [self._labels(noted, anchors, depth).sum() for depth in range(1, drafter.shape.depths)]
        counts = [int(count) for count in (noted.sum(), *later)]

        def loss(hidden: Tensor, part: Tensor | None) -> Tensor:
            total = hidden.sum() * 0.0
            for depth in (0,) if part is None else range(1, drafter.shape.depths):
                rows, ids, logp = self._rows(batch, hidden, part, depth)
                if not len(rows):
                    continue
                judged = self._objective.judge(drafter.head(rows), ids, logp)
                total = total + judged.loss.sum() * (depth_weights[depth] / norm / counts[depth])
                for name, value in (("loss", judged.loss), ("accuracy", judged.first), ("top 5", judged.fifth)):
                    sums[f"{name} {depth}"] += float(value.detach().sum())
                    sums[f"n:{name} {depth}"] += len(rows)
            return total

        inputs = (batch.tokens, batch.features, batch.withheld)
        if share:
            partition.backward(
                drafter, mask, *inputs, anchors, self._recipe.segments, lambda hidden, part: share * loss(hidden, part)
            )
        else:
            evaluate(drafter, mask, *inputs, anchors, loss)
        return sums

    def _labels(self, noted: Tensor, anchors: Tensor, depth: int) -> Tensor:
        """Whether the choice `depth` after each anchor was noted, bool [B, anchors]."""
        count = noted.shape[1]
        there = anchors + depth < count
        return noted[:, (anchors + depth).clamp(max=count - 1)] & there

    def _rows(self, batch: Batch, hidden: Tensor, part: Tensor | None, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of one depth that have a label, [R, H], and their labels."""
        noted = batch.top_ids[..., 0] != NOTHING
        if part is None:
            return hidden[noted], batch.top_ids[noted], batch.top_logp[noted]
        there = self._labels(noted, part, depth)
        rows = hidden[:, depth - 1 :: self._mask.slots][there]
        at = (part + depth).clamp(max=noted.shape[1] - 1)
        return rows, batch.top_ids[:, at][there], batch.top_logp[:, at][there]


def evaluate(
    drafter: FeatureDrafter, mask: SlotMask, tokens: Tensor, features: Tensor, withheld: Tensor, anchors: Tensor, loss
) -> Tensor:
    """The sum of all shares of the loss in one piece: the plain way, against which `partition.backward` is tested."""
    batch, count = tokens.shape
    known = drafter.known(tokens, features, withheld)
    hidden, made = drafter.stack(known, torch.arange(count, device=tokens.device), mask.known(count))
    total = loss(hidden, None)
    if mask.slots and len(anchors):
        slots = drafter.slots(batch, len(anchors) * mask.slots)
        ahead, _ = drafter.stack(slots, mask.positions(anchors), mask.of(anchors, count), made)
        total = total + loss(ahead, anchors)
    return total


def runs(shape: Sequence[int], chance: float, generator: torch.Generator) -> Tensor:
    """Where features are withheld, bool [B, n]: runs of 1 to `RUN`, each beginning with `chance` at any token."""
    begins = torch.rand(tuple(shape), generator=generator) < chance
    lengths = torch.randint(1, RUN + 1, tuple(shape), generator=generator)
    withheld = torch.zeros(tuple(shape), dtype=torch.bool)
    for back in range(min(RUN, shape[1])):
        covered = begins & (lengths > back)
        withheld[:, back:] |= covered[:, : covered.shape[1] - back]
    return withheld


def _first_only(batch: int, count: int) -> Tensor:
    """The first token of a text has no token before it, hence no feature."""
    return (torch.arange(count) == 0).expand(batch, -1)


def _cut(text: Text, longest: int) -> Text:
    keep = slice(0, longest)
    return Text(text.tokens[keep], text.prompt, text.features[keep], text.top_ids[keep], text.top_logp[keep])


def new_drafter(
    target: nn.Module, recipe: FeatureRecipe, layers: Sequence[int], vocabulary: Tensor, sample: Tensor | None = None
) -> FeatureDrafter:
    """An untrained drafter for a loaded target, which starts from layers of it; `layers`: whose features it reads.

    sample: features of some tokens, [tokens, F]. Their dimensions differ in size by orders of magnitude, and what a
    dimension can teach in a step grows with its size. So the norms begin by giving all of them the same spread, and
    `fuse` by giving the last layer its own back: the target's own layer then finds what it is used to.
    """
    shape = Shape.of_target(
        target.config,
        tuple(layers),
        recipe.depths,
        recipe.layers,
        len(vocabulary),
        recipe.target,
        fingerprint.of_model(target),
        recipe.intermediate,
    )
    torch.manual_seed(recipe.seed)
    drafter = FeatureDrafter(shape, vocabulary)
    embedding = target.get_input_embeddings().weight.detach().float()
    with torch.no_grad():
        spread = _even(drafter.token_norm, embedding[vocabulary])
        drafter.in_proj.weight *= 0.1
        drafter.in_proj.weight[:, : shape.hidden] += torch.diag(spread)
        if shape.features:
            drafter.in_proj.weight[:, shape.hidden :] += torch.eye(shape.hidden)
            parts = torch.ones(2, len(shape.features) * shape.hidden) if sample is None else sample.float()
            spreads = [
                _even(norm, part)
                for norm, part in zip(drafter.feature_norms, parts.chunk(len(shape.features), -1), strict=True)
            ]
            drafter.fuse.weight *= 0.1
            drafter.fuse.weight[:, -shape.hidden :] += torch.diag(spreads[-1])
    stack = decoder_layers(target)
    last = len(stack) - 1 if recipe.start_layer is None else min(recipe.start_layer, len(stack) - 1)
    for number, layer in enumerate(drafter.layers):
        start = strongest(stack[max(0, last - (shape.layers - 1 - number))].state_dict(), shape.intermediate)
        mine = layer.state_dict()
        if all(name in start and start[name].shape == weight.shape for name, weight in mine.items()):
            layer.load_state_dict({name: start[name].float() for name in mine})
    return drafter.attach(target)


def strongest(layer: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """A layer's weights by name, of its SwiGLU the `count` neurons that can say most: by the product of their norms."""
    names = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    if any(name not in layer for name in names) or len(layer[names[0]]) <= count:
        return layer
    gate, up, down = (layer[name].float() for name in names)
    kept = (gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)).topk(count).indices.sort().values
    return layer | {name: layer[name].index_select(int("down" in name), kept) for name in names}


def go_on_from(folder: str, target: nn.Module, recipe: FeatureRecipe, layers: Sequence[int]) -> FeatureDrafter:
    """The drafter that an earlier run saved, with its draft vocabulary, for a loaded target. One of fewer layers grows:
    those that are added change nothing at first. Raises `UsageError` if it is of another target, or of a shape that
    can't become the recipe's."""
    drafter = network.load(Path(folder))
    wanted = Shape.of_target(
        target.config,
        tuple(layers),
        recipe.depths,
        recipe.layers,
        drafter.shape.vocabulary,
        drafter.shape.target,
        fingerprint.of_model(target),
        recipe.intermediate,
    )
    had = drafter.shape
    if wanted != replace(
        had, layers=max(had.layers, wanted.layers), intermediate=min(had.intermediate, wanted.intermediate)
    ):
        raise UsageError(f"The recipe's start {folder} is a drafter of another shape or target: leave it out.")
    return (drafter if had == wanted else grown(drafter, wanted)).attach(target)


def grown(drafter: FeatureDrafter, shape: Shape) -> FeatureDrafter:
    """A drafter with more layers, or a narrower SwiGLU. An added layer is a copy of the last one that adds nothing yet:
    what writes to the residual is 0 (as in Net2Net, Chen et al. 2016, it starts from the same function)."""
    larger = FeatureDrafter(shape, drafter.vocabulary)
    rest = {name: tensor for name, tensor in drafter.state_dict().items() if not name.startswith("layers.")}
    larger.load_state_dict(rest, strict=False)
    for number, layer in enumerate(larger.layers):
        layer.load_state_dict(
            strongest(drafter.layers[min(number, drafter.shape.layers - 1)].state_dict(), shape.intermediate)
        )
        if number >= drafter.shape.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return larger


def _even(norm: nn.RMSNorm, sample: Tensor) -> Tensor:
    """Sets a norm so that each dimension of `sample` [tokens, H] comes out with spread 1; returns what undoes that."""
    size = sample.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
    spread = (sample / size).std(0).clamp(min=1e-3)
    norm.weight.copy_(1 / spread)
    return spread * size.mean()


def run(recipe: FeatureRecipe) -> None:
    """Trains by a recipe, in every process that accelerate has started, and says what came of it.

    Raises `UsageError`.
    """
    from accelerate import Accelerator

    from pearl.checkpoints.preflight import preflight
    from pearl.checkpoints.targets import load_plain

    accelerator = Accelerator(mixed_precision="bf16" if recipe.bf16 else "no")
    data = Recorded(Path(recipe.data), features=recipe.features != ())
    layers = data.manifest.layers if recipe.features is None else recipe.features
    if layers and list(layers) != data.manifest.layers:
        raise UsageError(
            f"The recipe wants features of the layers {list(layers)}, recorded are {data.manifest.layers}: leave "
            "features out, or extract texts with --layers."
        )
    checked = preflight(EngineConfig(target=recipe.target, dtype="float32"))
    target = load_plain(checked, "cpu")
    data.must_be_of(fingerprint.of_model(target), recipe.target)
    train, held_out = data.split(recipe.held_out)
    vocabulary = frequent(map(data.choices, train), recipe.vocabulary, checked.tokenizer.all_special_ids)
    sample = torch.cat([data[text].features[1:-1] for text in train[:32]]) if layers else None
    if recipe.start:
        drafter = go_on_from(recipe.start, target, recipe, layers)
    else:
        drafter = new_drafter(target, recipe, layers, vocabulary, sample)
    size = target.get_output_embeddings().weight.shape[0]
    del target
    drafter.place(accelerator.device, torch.float32)
    figures = loop.train(Learner(drafter, data, recipe, accelerator.device, size), recipe, train, held_out, accelerator)
    if accelerator.is_main_process:
        print("validation: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        print(f"the drafter is in {recipe.output}: {network.CONFIG} and {network.WEIGHTS}")
