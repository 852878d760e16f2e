"""Where a feature drafter stands, and where it loses against its target.

    python -m pearl.training.diagnose --drafter results/feature-smollm2-135m --data data/smollm2-135m

Drafts along recorded texts as the runtime would: the target has read so far, the drafter `ahead` tokens more, whose
features it has to do without. Compares each depth's guesses with the target's own choices.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pearl.config import cli
from pearl.config.engine_config import FEATURE, EngineConfig
from pearl.errors import UsageError

EVERY = 5  # tokens between two places that are looked at
AHEAD = (0, 1, 2, 4)  # tokens without features
CONFIDENCE = (0.0, 0.3, 0.6, 0.9)  # lower ends of the classes of the target's own certainty


@dataclass(frozen=True)
class Place:
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


def places(source, texts: Sequence, ahead: int, vocabulary: set[int]) -> Iterator[Place]:
    """Drafts at every `EVERY`-th token of the answers. `source`: a `FeatureSource`; texts: `shards.Text`s."""
    import torch

    from pearl.core.sampling import SamplingParams

    depths = source.depths
    for text in texts:
        tokens = text.tokens.tolist()
        bits = text.features.view(torch.int16).numpy() if text.features.numel() else None
        source.start(SamplingParams())
        told = 0
        for root in range(text.prompt, len(tokens) - ahead - depths, EVERY):
            if bits is not None:
                source.observe(bits[told:root])
                told = root
            (guesses,) = source.guess(tokens[: root + 1], [tokens[root + 1 : root + 1 + ahead]])
            at = root + ahead
            choices = text.top_ids[at : at + depths, 0].tolist()
            yield Place(
                ahead,
                tuple(depth[0][0] == choice for depth, choice in zip(guesses, choices, strict=True)),
                tuple(choice in [g[0] for g in depth[:5]] for depth, choice in zip(guesses, choices, strict=True)),
                choices[0] in vocabulary,
                choices[0] in tokens[: at + 1],
                float(text.top_logp[at, 0].float().exp()),
            )


def summary(found: Sequence[Place]) -> dict[str, object]:
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


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(description="Accuracy of a feature drafter by depth, and where it loses.")
    parser.add_argument("--drafter", required=True, metavar="DIR")
    parser.add_argument("--data", required=True, metavar="DIR", help="recorded texts (pearl.training.extract)")
    parser.add_argument("--target", help="default: the one that the drafter was trained for")
    parser.add_argument("--texts", type=int, default=64, help="of the last shards, at most")
    parser.add_argument("--json", metavar="FILE", help="write the figures here as well")
    found = parser.parse_args(argv)
    cli.at_least_one("--texts", found.texts)

    from rich.console import Console
    from rich.table import Table

    from pearl.checkpoints.drafters import load_feature_drafter
    from pearl.checkpoints.preflight import preflight
    from pearl.drafters.feature.network import read_shape
    from pearl.drafters.feature.source import FeatureSource
    from pearl.training.shards import Recorded

    shape = read_shape(Path(found.drafter))
    data = Recorded(Path(found.data), features=bool(shape.features))
    data.must_be_of(shape.fingerprint, shape.target)
    if shape.features and tuple(data.manifest.layers) != shape.features:
        raise UsageError(
            f"The texts have features of layers {data.manifest.layers}, the drafter wants {list(shape.features)}: "
            "extract texts with --layers."
        )
    config = EngineConfig(target=found.target or shape.target, draft=FEATURE + found.drafter)
    drafter = load_feature_drafter(preflight(config))
    source, vocabulary = FeatureSource(drafter), set(drafter.vocabulary.tolist())
    texts = [data[number] for number in range(max(0, len(data) - found.texts), len(data))]
    seen = [place for ahead in AHEAD for place in places(source, texts, ahead, vocabulary)]
    if not seen:
        raise UsageError("The recorded answers are shorter than the drafter's depths: extract longer ones.")
    figures = summary(seen)
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(
        "tokens without features", *(f"depth {d}" for d in range(shape.depths)), "accepted", title="top 1 (top 5)"
    )
    for name, row in figures.items():
        if name.startswith("ahead"):
            cells = [f"{one:.3f} ({five:.3f})" for one, five in zip(row["top 1"], row["top 5"], strict=True)]
            table.add_row(name.removeprefix("ahead "), *cells, f"{row['accepted']:.2f}")
    console.print(table)
    table = Table("depth 0", "share of places", "top 1")
    for kind, row in figures["depth 0 by kind"].items():
        table.add_row(kind, f"{row['share of places']:.3f}", f"{row['top 1']:.3f}")
    console.print(table)
    if found.json:
        Path(found.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
