"""What `pearl diagnose` warns of, and what it counts: on untrained heads whose features are what we say they are."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trained import drafter_for, random_answer, small_target

from pearl.drafters.feature import source as source_module
from pearl.drafters.feature.head_reader import HeadReader
from pearl.drafters.feature.head_source import HeadSource
from pearl.drafters.feature.source import FeatureSource
from pearl.training.diagnose import TreeOutcome, calibration, outcomes, taps, trees, warnings
from pearl.training.shards import RecordedText


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_module, "_TIMED", (8, 1))


def recorded(seed: int = 0) -> RecordedText:
    answer = random_answer(24, 4, 2 * 64, seed)
    ids, logp = torch.full((24, 4), -1), torch.zeros(24, 4)
    ids[3:23], logp[3:23] = answer.top_ids[0].long(), answer.top_logp[0].float()
    features = torch.cat([answer.features[0], torch.zeros(1, 2 * 64)]).bfloat16()
    return RecordedText(torch.tensor(answer.tokens), 4, features, ids, logp)


def figures(first: float, places: int = 200, **taps: float) -> dict[str, Any]:
    return {"ahead 0": {"top 1": [first], "places": places}, "taps": taps}


def test_a_tap_that_does_better_is_warned_of_and_so_is_what_is_too_good():
    assert warnings(figures(0.6, **{"as read": 0.6, "one layer later": 0.61})) == []
    (said,) = warnings(figures(0.4, **{"as read": 0.4, "one layer earlier": 0.55, "one layer later": 0.3}))
    assert "features of one layer earlier 55.0% of all first guesses are right, and 40.0% as" in said
    (said,) = warnings(figures(0.99, **{"as read": 0.99}))
    assert said.startswith("99.0% of all first guesses are right, which no drafter comes to")
    assert warnings(figures(0.99, places=20, **{"as read": 0.99})) == [], "too few places to say so"


@dataclass
class Shifted:
    """A target whose layer 1 says what the features of the texts are, and whose others say noise."""

    def of(self, text: RecordedText, layers: list[int]) -> RecordedText:
        from dataclasses import replace

        noise = torch.randn(text.features.shape, generator=torch.Generator().manual_seed(layers[0])).bfloat16()
        return text if layers[0] == 1 else replace(text, features=noise)


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_taps_are_tried_one_layer_up_and_one_down(kind: str):
    target = small_target(layers=4)
    drafter = drafter_for(target, (1, 2), 3, kind=kind).requires_grad_(False)
    drafting = FeatureSource(drafter) if kind == "peagle" else HeadSource(HeadReader(drafter, 100))
    checked: Any = SimpleNamespace(drafting=SimpleNamespace(fits=SimpleNamespace(layers=4)))
    found = taps(drafting, [recorded(seed) for seed in range(3)], Shifted(), checked)
    assert list(found) == ["as read", "one layer earlier", "one layer later"]
    checked.drafting.fits.layers = 3
    assert list(taps(drafting, [recorded()], Shifted(), checked)) == ["as read", "one layer earlier"]


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_every_place_has_guesses_of_each_depth_and_a_tree(kind: str):
    drafter = drafter_for(small_target(), (0, 2), 3, kind=kind).requires_grad_(False)
    drafting = FeatureSource(drafter) if kind == "peagle" else HeadSource(HeadReader(drafter, 100))
    text = recorded()
    for ahead in (0, 2):
        found = list(outcomes(drafting, [text], ahead, set()))
        assert found and all(len(place.first) == drafting.depths for place in found)
    worth = list(trees(drafting, [text]))
    assert len(worth) == len(list(outcomes(drafting, [text], 0, set())))
    assert all(0 < place.expected <= drafting.depths + 1e-3 and place.accepted >= 0 for place in worth)


def test_calibration_is_by_what_was_expected():
    found = calibration([TreeOutcome(0.5, 1), TreeOutcome(2.5, 2), TreeOutcome(2.1, 4)])
    assert found["expected from 0"] == {"places": 1, "expected": 0.5, "accepted": 1.0}
    assert found["expected from 2"] == {"places": 2, "expected": pytest.approx(2.3), "accepted": 3.0}
    assert found["all"]["places"] == 3
