"""What `pearl diagnose` warns of, and what it counts: on untrained heads whose features are what we say they are."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import every_kind
import pytest
import tiny
import torch
from trained import drafter_for, random_answer, save_recorded, small_target

from pearl.commands.training import diagnose as command
from pearl.core.params import SamplingParams
from pearl.drafters.feature.head_reader import HeadReader
from pearl.drafters.feature.head_source import HeadSource
from pearl.drafters.feature.source import FeatureSource
from pearl.drafters.guesses import RowAfter
from pearl.drafters.one_pass import DraftedText, OnePassSource
from pearl.models import timing
from pearl.models.reduced_head import reduce_vocab
from pearl.training.diagnose import TreeOutcome, by_token, calibration, outcomes, taps, trees, warnings
from pearl.training.shards import RecordedText


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "TIMED", (8, 1))


def recorded(seed: int = 0) -> RecordedText:
    answer = random_answer(24, 4, 2 * 64, seed)
    return RecordedText(torch.tensor(answer.tokens), 4, answer.features, answer.top_ids, answer.top_logp)


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
        assert found and all(len(place.first) == drafting.chain_length for place in found)
    worth = list(trees(drafting, [text]))
    assert len(worth) == len(list(outcomes(drafting, [text], 0, set())))
    assert all(0 < place.expected <= drafting.chain_length + 1e-3 and place.accepted >= 0 for place in worth)


@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_places_where_the_text_leaves_the_targets_choices_are_left_out(kind: str):
    """What the target chooses after a token that was drawn says nothing about a guess after the one it would choose."""
    drafter = drafter_for(small_target(), (0, 2), 3, kind=kind).requires_grad_(False)
    drafting = FeatureSource(drafter) if kind == "peagle" else HeadSource(HeadReader(drafter, 100))
    text = recorded()  # its places are 4, 9, 14, 19
    count = len(list(outcomes(drafting, [text], 0, None)))
    last = 9 + drafting.chain_length  # the last token that is guessed at the place 9
    for drawn, left_out in ((9, 0), (10, 1), (last - 1, 1), (last, 0)):
        tokens = text.tokens.clone()
        tokens[drawn] = (tokens[drawn] + 1) % 40
        other = RecordedText(tokens, text.prompt, text.features, text.top_ids, text.top_logp)
        assert len(list(outcomes(drafting, [other], 0, None))) == count - left_out, drawn
        assert len(list(trees(drafting, [other]))) == count - left_out


def test_calibration_is_by_what_was_expected():
    found = calibration(
        [TreeOutcome(0.5, 1, (0.4,), 1), TreeOutcome(2.5, 2, (0.8, 0.4), 1), TreeOutcome(2.1, 4, (0.9, 0.5), 2)]
    )
    assert found["tree"]["expected from 0"] == {"places": 1, "expected": 0.5, "accepted": 1.0}
    assert found["tree"]["expected from 2"] == {"places": 2, "expected": pytest.approx(2.3), "accepted": 3.0}
    assert found["tree"]["all"]["places"] == 3
    assert found["best chain"]["expected from 1"]["accepted"] == 1.5
    assert found["depths"] == [
        {"chance": pytest.approx(0.7), "right": 1.0},
        {"chance": pytest.approx(0.3), "right": pytest.approx(1 / 3)},
    ]


class Honest(OnePassSource):
    """Each row gives one of three tokens by chances that hold; from the second on these depend on the token before."""

    CHANCES = ((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), (0.9, 0.06, 0.04))  # by the token before

    def __init__(self):
        super().__init__(3)
        self.begin(0, SamplingParams())

    def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
        self._sequences[batch_slot] = DraftedText(params)

    def read_on(self, queries):
        row = RowAfter(self, torch.zeros(0), torch.zeros(0), 0, (), SamplingParams())
        table = [self.after([(row, [queries[0].prefix[-1]])])[0][0], row, row]
        return [[([], table) for _ in one.paths] for one in queries]

    def after(self, asked):
        return [
            [[(t, math.log(q), ()) for t, q in enumerate(self.CHANCES[token])] for token in tokens]
            for _, tokens in asked
        ]


def honest_text(seed: int, count: int = 400) -> RecordedText:
    rng, tokens = random.Random(seed), [0, 0]
    while len(tokens) < count:
        tokens.append(rng.choices(range(3), Honest.CHANCES[tokens[-1]])[0])
    ids = torch.tensor([*tokens[1:], -1])[:, None]
    return RecordedText(torch.tensor(tokens), 2, torch.zeros(count, 0), ids, torch.zeros(count, 1))


def test_what_a_tree_and_its_best_chain_are_expected_to_be_worth_comes_true_where_the_chances_hold():
    found = calibration(list(trees(Honest(), [honest_text(seed) for seed in range(20)])))
    for what in ("tree", "best chain"):
        row = found[what]["all"]
        assert row["places"] > 1500 and row["accepted"] == pytest.approx(row["expected"], abs=0.07), what
    for row in found["depths"]:
        assert row["right"] == pytest.approx(row["chance"], abs=0.04)
    assert found["tree"]["all"]["expected"] > found["best chain"]["all"]["expected"] + 0.2


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> tuple[Any, Path]:
    """A target with a tokenizer, and texts that are taken for its own."""
    folder = tmp_path_factory.mktemp("recorded")
    target = tiny.random_model(tiny.LlamaConfig(**tiny.SIZES | {"vocab_size": 280, "num_hidden_layers": 4}))
    target.save_pretrained(folder / "target")
    tiny.tokenizer().save_pretrained(folder / "target")
    save_recorded(folder / "data", target, layers=(0, 2))
    return target, folder


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("kind", ["pard", "dflash", "dspark", "eagle3"])
def test_a_checkpoint_is_diagnosed_by_its_kind(recordings, tmp_path: Path, capsys, kind: str):
    target, folder = recordings
    drafter = every_kind.save(kind, tmp_path / "draft", target.config, tiny.tokenizer())
    asked = ["--drafter", drafter, "--data", str(folder / "data"), "--target", str(folder / "target"), "--texts", "3"]
    assert command.main([*asked, "--json", str(tmp_path / "figures.json")]) == 0
    figures, printed = json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out
    assert "best chain up to" in printed and "by its own probabilities" in printed
    assert len(figures["ahead 0"]["top 1"]) == (5 if kind == "eagle3" else 4) >= len(figures["calibration"]["depths"])
    assert ("taps" in figures) == (kind != "pard") and ("ahead 2" in figures) == (kind != "pard")
    if kind == "dflash":
        assert len(figures["ahead 2"]["top 1"]) == 2 and "ahead 4" not in figures, "what a block has room for"


@pytest.mark.usefixtures("own_cache")
def test_places_that_are_all_ahead_of_the_features_are_not_enough(recordings, tmp_path: Path, capsys, monkeypatch):
    """The texts follow the target nowhere but further behind."""
    target, folder = recordings
    ahead_only = lambda source, texts, ahead, words: outcomes(source, texts, ahead, words) if ahead else ()  # noqa: E731
    monkeypatch.setattr("pearl.training.diagnose.outcomes", ahead_only)
    drafter = every_kind.save("dflash", tmp_path / "draft", target.config, tiny.tokenizer())
    asked = ["--drafter", drafter, "--data", str(folder / "data"), "--target", str(folder / "target"), "--texts", "3"]
    assert command.main(asked) == 2
    assert "In no recorded answer the target goes on for as many tokens" in capsys.readouterr().err


def of_a_model(vocabulary: int | None) -> tuple[list[int], RecordedText, Any]:
    """A text, what a model says after each of its tokens, and the same model as a draft model, its head cut."""
    model = tiny.random_model(tiny.CONFIGS["llama"]())
    tokens = torch.randint(3, tiny.VOCABULARY, (40,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logp, ids = model(tokens[None]).logits[0].log_softmax(-1).topk(4)
    text = RecordedText(tokens, 10, torch.zeros(40, 0).bfloat16(), ids.int(), logp.half())
    head = None if vocabulary is None else reduce_vocab(model, vocabulary)
    return ids[:, 0].tolist(), text, tiny.draft_model(model, head=head)


def test_a_model_that_guesses_one_token_is_looked_at_after_every_token_of_the_answer():
    choices, text, model = of_a_model(None)
    places, drafts = zip(*by_token(model, [text], model.draftable), strict=True)
    assert len(places) == 30 and all(place.first == place.top_five == (True,) and place.draftable for place in places)
    said = text.tokens.tolist()
    assert [place.seen for place in places] == [choices[at] in said[: at + 1] for at in range(9, 39)]
    assert all(draft.accepted == draft.chain_accepted == 1 and draft.chain == (draft.expected,) for draft in drafts)
    assert len(list(by_token(model, [text.first(14)], None))) == 4


def test_a_rare_token_can_be_drafted_once_it_has_come():
    choices, text, model = of_a_model(60)
    said, places = text.tokens.tolist(), [place for place, _ in by_token(model, [text], model.draftable)]
    wanted = [choices[at] < 60 or choices[at] in said[: at + 1] for at in range(9, 39)]
    assert [place.draftable for place in places] == wanted == [place.first[0] for place in places]
    assert not all(wanted) and any(choices[at] >= 60 and there for at, there in zip(range(9, 39), wanted, strict=True))


@pytest.mark.usefixtures("own_cache")
def test_the_command_takes_a_draft_model(recordings, tmp_path: Path):
    model, data = str(recordings[1] / "target"), str(recordings[1] / "data")
    words = ["--drafter", model, "--target", model, "--data", data, "--first", "6"]
    assert command.main([*words, "--json", str(tmp_path / "figures.json")]) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    assert command.main([*words, "--drafter", "suffix"]) == 2
    assert found["ahead 0"]["places"] == 6 * 12 and len(found["calibration"]["depths"]) == 1
