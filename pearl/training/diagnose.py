"""Where a drafter stands, where it loses against its target, and whether it is read as it was meant: heads over hidden
states, models that guess several tokens a forward, and (by their first guesses alone) those that guess one.

    pearl diagnose --drafter results/feature-smollm2-135m --data data/smollm2-135m

Drafts along recorded texts as the runtime would: the target has read so far, the drafter `ahead` tokens more, whose
features it has to do without. Compares each depth's guesses with the target's own choices, where the text that was
recorded goes on as the target would: elsewhere, as in sampled answers, nobody knows its later choices. Beside that

    calibration   the length of a draft by its own probabilities, of the tree and of its best chain, against what came
                  true
    taps          the same first guesses from features of one layer earlier, and one later: the layers' numbers are the
                  one thing in these formats that can be wrong in silence
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pearl.checkpoints.drafters import load_draft, load_source
from pearl.checkpoints.drafts.kinds import CAUSAL_LM
from pearl.checkpoints.preflight import Preflight, preflight
from pearl.checkpoints.targets import load_plain
from pearl.config.engine_config import EngineConfig
from pearl.core.params import SamplingParams
from pearl.core.trie import Trie
from pearl.drafters.draft_source import TreeQuery
from pearl.drafters.feature.head_source import HeadSource
from pearl.drafters.one_pass import OnePassSource
from pearl.errors import UsageError
from pearl.models.draft_model import DraftModel
from pearl.models.fingerprint import model_fingerprint
from pearl.models.hidden_states import HiddenStateHooks
from pearl.training.shards import Recorded, RecordedText

EVERY = 5  # tokens between two places that are looked at
AHEAD = (0, 1, 2, 4)  # tokens without features
CONFIDENCE = (0.0, 0.3, 0.6, 0.9)  # lower ends of the classes of the target's own certainty
LENGTHS = (0.0, 1.0, 2.0, 3.0, 4.0)  # lower ends of the classes of a tree's expected length
TAP_TEXTS = 16  # on which other taps are tried
BETTER = 0.02  # by which another tap's share of right first guesses has to be higher
PERFECT, PLACES = 0.97, 100  # a share of right first guesses that no drafter has, and how many places it takes to say

Source = OnePassSource | HeadSource


@dataclass(frozen=True)
class DraftOutcome:
    """One place of a text: how far ahead the drafter was, and what came of each depth."""

    ahead: int
    first: tuple[bool, ...]  # by depth: the best guess was the target's choice
    top_five: tuple[bool, ...]  # one of the best five was
    draftable: bool  # the first choice is in the draft vocabulary
    seen: bool  # its token has occurred in the text
    certainty: float  # the target's own probability of it

    @property
    def accepted(self) -> int:
        """Guesses of the chain up to the first wrong one."""
        return next((depth for depth, right in enumerate(self.first) if not right), len(self.first))


@dataclass(frozen=True)
class TreeOutcome:
    """One place of a text: what a tree is worth there by its own probabilities, and in truth, in guesses."""

    expected: float
    accepted: int
    chain: tuple[float, ...]  # of the best one: the chance that each guess is right and all before it
    chain_accepted: int


def outcomes(
    source: Source, texts: Sequence[RecordedText], ahead: int, vocabulary: set[int] | None
) -> Iterator[DraftOutcome]:
    """Drafts at every `EVERY`-th token of the answers. `vocabulary`: of what can be drafted; None: all."""
    for text in texts:
        tokens = text.tokens.tolist()
        for root in _roots(source, text, ahead):
            (guesses,) = source.guess(tokens[: root + 1], [tokens[root + 1 : root + 1 + ahead]])
            if not guesses:  # its block is full
                return
            at = root + ahead
            choices = text.top_ids[at : at + len(guesses), 0].tolist()
            yield DraftOutcome(
                ahead,
                tuple(depth[0][0] == choice for depth, choice in zip(guesses, choices, strict=True)),
                tuple(choice in [g[0] for g in depth[:5]] for depth, choice in zip(guesses, choices, strict=True)),
                vocabulary is None or choices[0] in vocabulary,
                choices[0] in tokens[: at + 1],
                float(text.top_logp[at, 0].float().exp()),
            )


def trees(source: Source, texts: Sequence[RecordedText]) -> Iterator[TreeOutcome]:
    """The tree of one forward of a network that drafts in parallel; of another, of as many as its chain is long."""
    forwards = 1 if isinstance(source, OnePassSource) else source.chain_length
    for text in texts:
        tokens = text.tokens.tolist()
        for root in _roots(source, text, 0):
            trie = Trie(tokens[: root + 1])
            for _ in range(forwards):
                source.extend([TreeQuery(0, trie, 4, source.chain_length, take_all=True)])
            expected = sum(math.exp(one.logp) for one in trie.best(1 << 20))
            chain, choices = trie.chain(), text.top_ids[root : root + source.chain_length, 0].tolist()
            chances = itertools.accumulate(node.logp for node in chain)
            pairs = zip((node.token for node in chain), choices, strict=False)
            right = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            yield TreeOutcome(expected, _walked(trie, choices), tuple(map(math.exp, chances)), right)


def by_token(
    model: DraftModel, texts: Sequence[RecordedText], vocabulary: set[int] | None
) -> Iterator[tuple[DraftOutcome, TreeOutcome]]:
    """After every token of the answers what a model guesses that drafts one token a forward, read in one for a text."""
    for text in texts:
        tokens = text.tokens[: model.max_length].tolist()
        first = max(1, text.prompt) - 1
        if len(tokens) < first + 2:
            continue
        model.forget()
        logits = model.read(tokens[:-1], len(tokens) - 1 - first).float().clone()
        if vocabulary is not None:  # it has read all of the text, but a rare token is draftable once it has come
            for token in set(tokens) - vocabulary:
                logits[: max(0, tokens.index(token) - first), token] = -torch.inf
        chances, best = logits.softmax(-1).topk(5)
        for at, guesses in enumerate(best.tolist()):
            place = first + at
            choice = int(text.top_ids[place, 0])
            right, chance = guesses[0] == choice, float(chances[at, 0])
            yield (
                DraftOutcome(
                    0,
                    (right,),
                    (choice in guesses,),
                    vocabulary is None or choice in vocabulary or choice in tokens[: place + 1],
                    choice in tokens[: place + 1],
                    float(text.top_logp[place, 0].float().exp()),
                ),
                TreeOutcome(chance, int(right), (chance,), int(right)),
            )


def _walked(trie: Trie, choices: Sequence[int]) -> int:
    """Nodes of a tree that the target's choices go through."""
    node = trie.root
    for depth, choice in enumerate(choices):
        if (found := node.children.get(choice)) is None:
            return depth
        node = found
    return len(choices)


def _roots(source: Source, text: RecordedText, ahead: int) -> Iterator[int]:
    """Places of an answer from which on the text is the target's own; the source knows the features up to each."""
    bits = text.features.view(torch.int16).numpy() if source.layers else None
    source.begin(0, SamplingParams())
    told = 0
    last = min(len(text.tokens), source.longest) - ahead - source.chain_length
    chosen = (text.tokens[1:] == text.top_ids[:-1, 0]).tolist()  # after each token, whether the text goes on with it
    for root in range(max(1, text.prompt), last, EVERY):
        if not all(chosen[root + ahead : root + ahead + source.chain_length - 1]):
            continue
        if bits is not None:
            source.observe(bits[told:root], 0)
            told = root
        yield root


def summary(found: Sequence[DraftOutcome]) -> dict[str, object]:
    """The shares that a table shows, by how far ahead the drafter was."""
    figures: dict[str, object] = {}
    for ahead in sorted({place.ahead for place in found}):
        some = [place for place in found if place.ahead == ahead]
        figures[f"ahead {ahead}"] = {
            "places": len(some),
            "top 1": [_share(place.first[depth] for place in some) for depth in range(len(some[0].first))],
            "top 5": [_share(place.top_five[depth] for place in some) for depth in range(len(some[0].first))],
            "accepted": sum(place.accepted for place in some) / len(some),
        }
    plain = [place for place in found if place.ahead == min(p.ahead for p in found)]
    kinds: dict[str, list[bool]] = defaultdict(list)
    for place in plain:
        certain = max(low for low in CONFIDENCE if place.certainty >= low)
        kinds[f"target's certainty from {certain:.1f}"].append(place.first[0])
        kinds["token seen before in the text" if place.seen else "token new to the text"].append(place.first[0])
        if not place.draftable:
            kinds["outside the draft vocabulary"].append(place.first[0])
    figures["depth 0 by kind"] = {
        kind: {"share of places": len(rights) / len(plain), "top 1": _share(rights)}
        for kind, rights in sorted(kinds.items())
    }
    return figures


def calibration(found: Sequence[TreeOutcome]) -> dict[str, Any]:
    """By the length that was expected, and over all: how many places, what was expected, what was accepted; of trees,
    and of their best chains, whose guesses are also told by depth."""
    chains = [(sum(place.chain), place.chain_accepted) for place in found]
    depths = range(max((len(place.chain) for place in found), default=0))
    chances = [[place.chain[depth] if depth < len(place.chain) else 0.0 for place in found] for depth in depths]
    return {
        "tree": _by_length([(place.expected, place.accepted) for place in found]),
        "best chain": _by_length(chains),
        "depths": [
            {"chance": sum(some) / len(some), "right": _share(accepted > depth for _, accepted in chains)}
            for depth, some in enumerate(chances)
        ],
    }


def _by_length(pairs: Sequence[tuple[float, int]]) -> dict[str, dict[str, float]]:
    """`pairs`: the length expected, the one accepted."""
    classes: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for pair in pairs:
        classes[f"expected from {max(low for low in LENGTHS if pair[0] >= low):.0f}"].append(pair)
    return {
        name: {
            "places": len(some),
            "expected": sum(expected for expected, _ in some) / len(some),
            "accepted": sum(accepted for _, accepted in some) / len(some),
        }
        for name, some in [*sorted(classes.items()), ("all", list(pairs))]
    }


def warnings(figures: dict[str, Any]) -> list[str]:
    """What looks wrong, a sentence each."""
    said = []
    own, places = figures["ahead 0"]["top 1"][0], figures["ahead 0"]["places"]
    if places >= PLACES and own > PERFECT:
        said.append(
            f"{own:.1%} of all first guesses are right, which no drafter comes to: it may see what it has to guess, "
            "or the texts are those that it was trained on."
        )
    taps = figures.get("taps", {})
    best = max(taps, key=lambda name: taps[name], default=None)
    if best is not None and taps[best] > taps["as read"] + BETTER:
        said.append(
            f"From features of {best} {taps[best]:.1%} of all first guesses are right, and {taps['as read']:.1%} as "
            "the checkpoint is read: its layers are probably numbered in another way, so look at the ids of layers in "
            "its config.json."
        )
    return said


def _share(rights) -> float:
    rights = list(rights)
    return sum(rights) / len(rights)


class _Features:
    """Of any layers, read by the target itself."""

    def __init__(self, checked: Preflight):
        self._device = checked.target_on.devices[0]
        self._model: Any = load_plain(checked, self._device)

    def of(self, text: RecordedText, layers: Sequence[int]) -> RecordedText:
        hooks = HiddenStateHooks(self._model, layers)
        with torch.inference_mode():
            self._model.base_model(text.tokens[None].long().to(self._device), use_cache=False)
        states = hooks.states()[0].bfloat16().cpu()
        hooks.remove()
        return replace(text, features=states)

    @property
    def fingerprint(self) -> str:
        return model_fingerprint(self._model)


def run(folder: str, recorded: str, target: str | None, count: int, first: int | None = None) -> dict[str, Any]:
    """The figures of the drafter `folder` along the last `count` texts recorded, or the `first` tokens of their
    answers. Raises `UsageError`."""
    data = Recorded(Path(recorded))
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    config = EngineConfig(target=target or data.manifest.target, draft=folder, dtype=dtype)
    checked = preflight(config)
    if not checked.drafting:
        raise UsageError(f"{folder} drafts without weights: look at it with pearl score.")
    reads = _Features(checked)
    data.must_be_of(reads.fingerprint, config.target)
    texts = [data[number] for number in range(max(0, len(data) - count), len(data))]
    if first is not None:
        texts = [text.first(text.prompt + first) for text in texts]
    if checked.drafting.kind == CAUSAL_LM:
        return _of_a_model(load_draft(checked, ahead=1)[0], texts)
    source = load_source(checked)
    assert isinstance(source, OnePassSource | HeadSource), "the other kinds of checkpoints"
    if source.layers and list(source.layers) != data.manifest.layers:
        texts = [reads.of(text, source.layers) for text in texts]
    vocabulary = None if source.vocabulary is None else set(source.vocabulary.tolist())
    lags = AHEAD if source.layers else AHEAD[:1]  # where nothing is read of the target, nothing is ever missing
    seen = [place for ahead in lags for place in outcomes(source, texts, ahead, vocabulary)]
    if not any(place.ahead == 0 for place in seen):
        raise UsageError(
            "In no recorded answer the target goes on for as many tokens as the drafter guesses: extract longer ones, "
            "some of them greedy."
        )
    figures = summary(seen)
    figures["calibration"] = calibration(list(trees(source, texts)))
    if source.layers:
        figures["taps"] = taps(source, texts[-TAP_TEXTS:], reads, checked)
    figures["warnings"] = warnings(figures)
    return figures


def _of_a_model(model: DraftModel, texts: Sequence[RecordedText]) -> dict[str, Any]:
    places = list(by_token(model, texts, model.draftable))
    if not places:
        raise UsageError("No answer was recorded that has two tokens: extract longer ones.")
    figures: dict[str, Any] = summary([place for place, _ in places])
    figures["calibration"] = calibration([tree for _, tree in places])
    figures["warnings"] = warnings(figures)
    return figures


def taps(source: Source, texts: Sequence[RecordedText], reads: Any, checked: Preflight) -> dict[str, float]:
    """The share of right first guesses, from the layers as they are read, and from those one up and one down."""
    assert checked.drafting and checked.drafting.fits, "it was described for its target"
    most = checked.drafting.fits.layers
    found: dict[str, float] = {}
    for name, shift in (("as read", 0), ("one layer earlier", -1), ("one layer later", 1)):
        layers = [layer + shift for layer in source.layers]
        if shift and (min(layers) < 0 or max(layers) >= most):
            continue
        shown = [reads.of(text, layers) for text in texts]
        if places := [place.first[0] for place in outcomes(source, shown, 0, None)]:
            found[name] = _share(places)
    return found
