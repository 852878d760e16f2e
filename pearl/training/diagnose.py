"""Where a feature drafter stands, and where it loses against its target.

    pearl diagnose --drafter results/feature-smollm2-135m --data data/smollm2-135m

Drafts along recorded texts as the runtime would: the target has read so far, the drafter `ahead` tokens more, whose
features it has to do without. Compares each depth's guesses with the target's own choices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pearl.checkpoints.drafters import load_feature_drafter
from pearl.checkpoints.preflight import preflight
from pearl.config.engine_config import FEATURE, EngineConfig
from pearl.core.params import SamplingParams
from pearl.drafters.feature.network import read_shape
from pearl.drafters.feature.source import FeatureSource
from pearl.errors import UsageError
from pearl.training.shards import Recorded, RecordedText

EVERY = 5  # tokens between two places that are looked at
AHEAD = (0, 1, 2, 4)  # tokens without features
CONFIDENCE = (0.0, 0.3, 0.6, 0.9)  # lower ends of the classes of the target's own certainty


@dataclass(frozen=True)
class DraftOutcome:
    """One place of a text: how far ahead the drafter was, and what came of each depth."""

    ahead: int
    first: tuple[bool, ...]  # by depth: the best guess was the target's choice
    fifth: tuple[bool, ...]  # one of the best five was
    draftable: bool  # the first choice is in the draft vocabulary
    seen: bool  # its token has occurred in the text
    certainty: float  # the target's own probability of it

    @property
    def accepted(self) -> int:
        """Guesses of the chain up to the first wrong one."""
        return next((depth for depth, right in enumerate(self.first) if not right), len(self.first))


def outcomes(
    source: FeatureSource, texts: Sequence[RecordedText], ahead: int, vocabulary: set[int]
) -> Iterator[DraftOutcome]:
    """Drafts at every `EVERY`-th token of the answers."""
    depths = source.depths
    for text in texts:
        tokens = text.tokens.tolist()
        bits = text.features.view(torch.int16).numpy() if text.features.numel() else None
        source.begin(0, SamplingParams())
        told = 0
        for root in range(text.prompt, len(tokens) - ahead - depths, EVERY):
            if bits is not None:
                source.observe(bits[told:root])
                told = root
            (guesses,) = source.guess(tokens[: root + 1], [tokens[root + 1 : root + 1 + ahead]])
            at = root + ahead
            choices = text.top_ids[at : at + depths, 0].tolist()
            yield DraftOutcome(
                ahead,
                tuple(depth[0][0] == choice for depth, choice in zip(guesses, choices, strict=True)),
                tuple(choice in [g[0] for g in depth[:5]] for depth, choice in zip(guesses, choices, strict=True)),
                choices[0] in vocabulary,
                choices[0] in tokens[: at + 1],
                float(text.top_logp[at, 0].float().exp()),
            )


def summary(found: Sequence[DraftOutcome]) -> dict[str, object]:
    """The shares that a table shows, by how far ahead the drafter was."""
    figures: dict[str, object] = {}
    for ahead in sorted({place.ahead for place in found}):
        some = [place for place in found if place.ahead == ahead]
        figures[f"ahead {ahead}"] = {
            "places": len(some),
            "top 1": [_share(place.first[depth] for place in some) for depth in range(len(some[0].first))],
            "top 5": [_share(place.fifth[depth] for place in some) for depth in range(len(some[0].first))],
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


def _share(rights) -> float:
    rights = list(rights)
    return sum(rights) / len(rights)


def run(folder: str, recorded: str, target: str | None, count: int) -> dict[str, Any]:
    """The figures of the drafter in `folder` along the last `count` texts recorded. Raises `UsageError`."""
    shape = read_shape(Path(folder))
    data = Recorded(Path(recorded), features=bool(shape.features))
    data.must_be_of(shape.fingerprint, shape.target)
    if shape.features and tuple(data.manifest.layers) != shape.features:
        raise UsageError(
            f"The texts have features of layers {data.manifest.layers}, the drafter wants {list(shape.features)}: "
            "extract texts with --layers."
        )
    config = EngineConfig(target=target or shape.target, draft=FEATURE + folder)
    drafter = load_feature_drafter(preflight(config))
    source, vocabulary = FeatureSource(drafter), set(drafter.vocabulary.tolist())
    texts = [data[number] for number in range(max(0, len(data) - count), len(data))]
    seen = [place for ahead in AHEAD for place in outcomes(source, texts, ahead, vocabulary)]
    if not seen:
        raise UsageError("The recorded answers are shorter than the drafter's depths: extract longer ones.")
    return summary(seen)
