"""A drafter learns what it is shown, resumes to the bit, and says no to what does not belong together."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from toys import EAGER, ScriptedChannel, examples, ticks, together
from trained import TOP, WORDS, bits_of, drafter_for, read_drafter, save_recorded, save_toy_target, small_target
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from pearl.checkpoints.drafts import envelope
from pearl.checkpoints.drafts.files import CONFIG
from pearl.commands.training import train as command
from pearl.config import cli
from pearl.config.engine_config import EMBEDDED, EMBEDDED_ON_HUB
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.drafters.feature.head_reader import HeadReader
from pearl.drafters.feature.head_source import HeadSource
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.feature.source import FeatureSource
from pearl.errors import UsageError
from pearl.models.hidden_states import HiddenStateHooks
from pearl.roles.target import Target
from pearl.training import loop
from pearl.training.first_weights import go_on_from, new_drafter
from pearl.training.loop import CHECKPOINT, LOG, batch_of, means
from pearl.training.objective import NOTHING, Objective, filled, frequent
from pearl.training.recipes import DistillRecipe, FeatureRecipe, Recipe, read_recipe
from pearl.training.shards import Recorded
from pearl.training.train import FeatureLearner

# The objective


IDS = torch.tensor([2, 5, 7])  # the draft vocabulary


def judge(logits: list[list[float]], top_ids: list[list[int]], top_p: list[list[float]], kl: float):
    given = torch.tensor(logits, requires_grad=True)
    judged = Objective(IDS, 10, kl).judge(given, torch.tensor(top_ids), torch.tensor(top_p).log())
    return given, judged


def test_the_loss_is_what_a_person_gets():
    """q = 0.09003, 0.24473, 0.66524 for tokens 2, 5, 7. The target chose 5; of what it noted, 4 can't be drafted."""
    logits, tops, chances = [[1.0, 2.0, 3.0]], [[5, 7, 4]], [[0.5, 0.3, 0.2]]
    choice = -math.log(0.24472847)
    soft = -(0.625 * math.log(0.24472847) + 0.375 * math.log(0.66524096))  # 0.5 and 0.3, made to sum to 1
    for kl, expected in ((0.0, choice), (1.0, soft), (0.25, 0.75 * choice + 0.25 * soft)):
        _, judged = judge(logits, tops, chances, kl)
        assert judged.loss.tolist() == pytest.approx([expected], rel=1e-5)
        assert judged.first.tolist() == [False] and judged.top_five.tolist() == [True]
    assert judge(logits, [[7, 5, 4]], chances, 0.0)[1].first.tolist() == [True]


def test_nothing_is_left_to_learn_where_q_is_what_the_target_said():
    chances = [0.6, 0.3, 0.1]
    logits, judged = judge([[math.log(p) for p in chances]], [[2, 5, 7]], [chances], 1.0)
    judged.loss.sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kl", [0.0, 0.5, 1.0])
def test_a_choice_outside_the_vocabulary_is_wrong_and_teaches_nothing(kl: float):
    logits, judged = judge([[1.0, 2.0, 3.0]] * 3, [[4, 5, 7], [NOTHING] * 3, [5, 4, 9]], [[0.5, 0.3, 0.2]] * 3, kl)
    judged.loss.sum().backward()
    assert judged.loss[:2].tolist() == [0.0, 0.0] and judged.loss[2] > 0
    assert judged.first.tolist() == [False] * 3 and judged.top_five.tolist() == [False, False, True]
    assert logits.grad is not None and not logits.grad[:2].any() and logits.grad[2].all() and logits.isfinite().all()


def test_the_draft_vocabulary_is_what_the_target_chose_most_often():
    choices = [torch.tensor([3, 3, 3, 9, -1]), torch.tensor([9, 1, 8, 8, -1, -1])]
    assert frequent(choices, 2).tolist() == [3, 8], "of equals the lower id"
    assert frequent(choices, 3).tolist() == [3, 8, 9]
    assert frequent(choices, 99).tolist() == [1, 3, 8, 9], "no more than occurred"
    assert frequent(choices, 3, always=[0, 3]).tolist() == [0, 3, 8], "what must be there is counted"
    assert frequent(choices, 3, always=[0, 32000], rows=32000).tolist() == [0, 3, 8], "a row that no head has is not"
    assert frequent([], 5, always=[4]).dtype == torch.int64
    assert filled(torch.tensor([1, 8]), 5, 99).tolist() == [0, 1, 2, 3, 8], "the lowest ids fill it"
    assert filled(torch.tensor([1, 8]), 1, 99).tolist() == [1, 8] and len(filled(torch.tensor([1]), 9, 4)) == 4


# What is shown

MASK = 0  # stands in the rows of tokens that are not known
BOTH = pytest.mark.parametrize("algorithm", ["peagle", "eagle3"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_recorded(tmp_path_factory.mktemp("data"), small_target())


def recipe(folder: Path, output: Path | str = "nowhere", **values: object) -> FeatureRecipe:
    given = {"depths": 3, "epochs": 3.0, "batch": 4, "vocabulary": WORDS, "segments": 2, "held_out": 1, **values}
    return FeatureRecipe(str(folder), str(output), "the small target", **given)  # type: ignore[arg-type]


def learner(made: FeatureRecipe, vocabulary: Sequence[int] = range(WORDS)) -> FeatureLearner:
    target, data = small_target(), Recorded(Path(made.data))
    layers = data.manifest.layers if made.features is None else made.features
    sample = torch.cat([text.features[1:-1] for text in data])
    drafter = new_drafter(target, made, layers, torch.tensor(list(vocabulary)), sample, MASK)
    drafter.place("cpu", torch.float32)
    return FeatureLearner(drafter, data, made, torch.device("cpu"), WORDS)


def test_a_target_whose_layers_have_heads_of_two_sizes_gets_a_head_like_its_first_layer(folder):
    sizes = tiny.SIZES | {"layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0}
    config = Gemma4TextConfig(**sizes, head_dim=16, global_head_dim=32, hidden_size_per_layer_input=0)
    assert new_drafter(tiny.random_model(config), recipe(folder), (0, 2), torch.arange(WORDS)).shape.head_dim == 16


def test_a_token_meets_the_feature_of_the_token_before_it(folder):
    data = Recorded(folder)
    batch = learner(recipe(folder)).batch([1, 4])
    for row, number in enumerate((1, 4)):
        text, count = data[number], data.lengths[number]
        assert torch.equal(batch.tokens[row, : count - 1], text.tokens[1:]), "before the first token there is none"
        assert torch.equal(batch.features[row, : count - 1], text.features[:-1])
        assert not batch.withheld[row].any()
        assert torch.equal(batch.top_ids[row, : count - 1], text.top_ids[1:])
        assert (batch.top_ids[row, count - 1 :] == NOTHING).all(), "nothing follows a shorter text"


def test_a_text_is_cut_where_the_recipe_says(folder):
    assert learner(recipe(folder, longest=7)).batch([0, 1]).tokens.shape == (2, 6)


def test_a_slot_is_asked_for_the_choice_as_far_ahead_as_it_looks(folder):
    """Rows are marked with where they are; each meets the choice after position anchor + depth of its own text."""
    some = learner(recipe(folder, depths=4))
    batch = some.batch([0, 3])
    count = batch.tokens.shape[1]
    anchors = torch.arange(count)[::2]
    marks = torch.tensor([[[b, a, d] for a in anchors.tolist() for d in range(1, 4)] for b in range(2)])
    for depth in (1, 2, 3):
        rows, labels = some._rows(batch, marks, anchors, depth)
        assert labels.before.tolist() == [int(batch.tokens[b, a + depth]) for b, a, _ in rows.tolist()]
        assert len(rows) == len(labels.ids) == len(labels.logp) > 3 and (rows[:, 2] == depth).all()
        for (b, anchor, _), top in zip(rows.tolist(), labels.ids, strict=True):
            assert torch.equal(top, batch.top_ids[b, anchor + depth]) and top[0] != NOTHING
            assert batch.top_ids[b, anchor, 0] != NOTHING, "its anchor is in the answer, whatever the other text's is"
        inside = [(at, b, a) for at, (b, a, _) in enumerate(rows.tolist()) if a + depth + 1 < count]
        assert [int(labels.went[at]) for at, _, _ in inside] == [
            int(batch.tokens[b, a + depth + 1]) for _, b, a in inside
        ]
    known = torch.arange(2 * count).view(2, count, 1)
    rows, labels = some._rows(batch, known, None, 0)
    assert torch.equal(labels.before, batch.tokens.flatten()[rows[:, 0]])
    noted = batch.top_ids[..., 0] != NOTHING
    assert torch.equal(rows[:, 0], known[noted][:, 0]) and torch.equal(labels.ids, batch.top_ids[noted])


def test_a_text_learns_from_its_own_answer_whoever_is_beside_it(folder):
    """The prompts are of different lengths."""
    some = learner(recipe(folder, depths=4))

    def told(*texts: int) -> dict[str, float]:
        batch = some.batch(texts)
        return some._run(batch, some._anchors(batch, 1.0, None), 0.0)

    pair, first, second = told(0, 1), told(0), told(1)
    for name, value in pair.items():
        assert value == pytest.approx(first[name] + second[name], rel=1e-4, abs=1e-5), name


def test_a_place_is_reached_by_the_token_that_the_text_took(folder):
    """Not by the target's choice, which a sampled text may have left."""
    objective = Objective(torch.tensor([4, 5, 7]), 10, 0.5)
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    ids, logp = torch.tensor([[5, 7, 4]]), torch.tensor([[0.5, 0.3, 0.2]]).log()
    for went, chance in ((None, 0.5), (5, 0.5), (7, 0.3), (9, 0.0)):
        told = objective.judge(logits, ids, logp, None if went is None else torch.tensor([went]))
        assert told.chance.tolist() == pytest.approx([chance]) and told.first.tolist() == [True]


def test_what_grows_is_the_same_in_every_process(folder, tmp_path):
    envelope.save(learner(recipe(folder, markov_rank=2)).module, tmp_path / "first", tokens=3)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # as each process begins with another one
        wanted = recipe(folder, layers=3, markov_rank=5)
        states.append(go_on_from(str(tmp_path / "first"), small_target(), wanted, (0, 2)).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_only_what_the_target_wrote_counts(folder):
    some = learner(recipe(folder))
    sums = loop.tested(some, [0, 1])
    data = Recorded(folder)
    answers = [data.lengths[text] - data[text].prompt for text in (0, 1)]
    for depth in range(3):
        assert sums[f"n:loss {depth}"] == sum(count - depth for count in answers)


@BOTH
def test_withheld_features_and_anchors_are_drawn_anew_each_step_and_the_same_again(folder, algorithm: str):
    def gradient(seed: int, **values: object) -> torch.Tensor:
        some = learner(recipe(folder, algorithm=algorithm, **values))
        some.learn([0, 1], torch.Generator().manual_seed(seed), 1.0, 1.0)
        return some.module.fc.weight.grad.clone()

    first = gradient(1)
    assert torch.equal(first, gradient(1)) and not torch.allclose(first, gradient(2))
    assert torch.allclose(first, gradient(1, withheld=1.0)) == (algorithm == "eagle3"), "it has its own state"
    whole = gradient(1, anchors=1.0, withheld=0.0)
    assert torch.equal(whole, gradient(2, anchors=1.0, withheld=0.0)), "and nothing else is"
    for segments in (1, 5):
        other = gradient(1, anchors=1.0, withheld=0.0, segments=segments)
        torch.testing.assert_close(whole, other, atol=1e-5, rtol=1e-4)


def test_slots_are_learnt_once_depth_0_has_had_its_time(folder):
    for done, learnt in ((0.0, False), (0.49, False), (0.5, True)):
        some = learner(recipe(folder, slots_after=0.5, anchors=1.0))
        figures = some.learn([0, 1], torch.Generator().manual_seed(0), 1.0, done)
        assert (figures["n:loss 1"] > 0) == (some.module.mask_row.grad is not None) == learnt
        assert figures["n:loss 0"] > 0 and some.module.fc.weight.grad is not None


@examples(40)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 3))
def test_every_epoch_shows_every_text_once_in_an_order_of_its_own(count: int, batch: int, seed: int):
    made = Recipe("data", "output", batch=batch, seed=seed)
    texts = list(range(100, 100 + count))
    steps = -(-2 * count // batch)
    shown = [text for step in range(steps) for text in batch_of(texts, made, step)]
    assert sorted(shown[:count]) == texts and sorted(shown[count : 2 * count]) == texts
    assert count < 9 or shown[:count] != shown[count : 2 * count]


def test_the_rate_rises_and_falls():
    rates = [loop._rate(step, 100, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0 and rates[100] == pytest.approx(0.0)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert loop._rate(0, 1, 0.0) > 0, "a run of one step learns too"


def test_figures_are_averages_over_what_was_counted():
    assert means({"loss": 6.0, "n:loss": 3.0, "accuracy": 1.0, "n:accuracy": 0.0}) == {"loss": 2.0}


# The training


PLOT = loop.plot


@pytest.fixture(autouse=True)
def unplotted(monkeypatch: pytest.MonkeyPatch):
    """A picture takes longer than these trainings."""
    monkeypatch.setattr(loop, "plot", lambda folder: None)


def run(made: FeatureRecipe, **options: object) -> tuple[FeatureLearner, dict[str, float]]:
    some = learner(made, **options)  # type: ignore[arg-type]
    train_texts, held_out = some._data.split(made.held_out)
    return some, loop.train(some, made, train_texts, held_out, Accelerator(cpu=True))


@BOTH
def test_a_drafter_learns_a_simple_rule_at_every_depth(folder, tmp_path, algorithm: str):
    """In these texts each token tells the next one."""
    values = {"algorithm": algorithm, "epochs": 25.0, "micro": 4, "learning_rate": 5e-3, "anchors": 1.0, "kl": 0.2}
    made = recipe(folder, tmp_path / "out", **values, slots_after=0.0)
    shown = list(range(8))
    before = means(loop.tested(learner(made), shown))
    some, held_out = run(made)
    after = means(loop.tested(some, shown))
    for depth, accuracy in enumerate((0.8, 0.4, 0.4)):
        assert after[f"loss {depth}"] < 0.6 * before[f"loss {depth}"]
        assert after[f"accuracy {depth}"] > accuracy > before[f"accuracy {depth}"]

    # and drafts for its target, which it has to change nothing about
    drafter = read_drafter(tmp_path / "out").attach(small_target()).requires_grad_(False)
    assert drafter.shape.features == (0, 2) and drafter.shape.kind == algorithm

    model, params = small_target(), SamplingParams(max_new_tokens=12, ignore_eos=True)
    hooks = HiddenStateHooks(model, (0, 2))
    own = together(Target(tiny.verifier(small_target())), [1, 2, 3], Schedule.of("ar"), params, decode=str)
    target = Target(tiny.verifier(model, hooks=hooks), ScriptedChannel(source_of(drafter), EAGER), ticks())
    assert together(target, [1, 2, 3], Schedule.of("tree"), params, decode=str) == own

    lines = [json.loads(line) for line in (tmp_path / "out" / LOG).read_text().splitlines()]
    assert lines[-1]["validation"] == held_out and {"loss 0", "accuracy 2", "top 5 1", "rate"} <= lines[-2].keys()
    PLOT(tmp_path / "out")
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000


def source_of(drafter: FeatureDrafter) -> FeatureSource | HeadSource:
    return FeatureSource(drafter) if drafter.shape.parallel else HeadSource(HeadReader(drafter, 100))


def as_kept(drafter: FeatureDrafter, name: str) -> torch.Tensor:
    tensor = drafter.state_dict()[name]
    return tensor.bfloat16().float() if tensor.is_floating_point() else tensor


@BOTH
def test_what_is_saved_is_what_is_loaded_bit_for_bit(folder, tmp_path, algorithm: str):
    drafter = learner(recipe(folder, algorithm=algorithm), vocabulary=(3, 9, 30)).module
    envelope.save(drafter, tmp_path / "one", tokens=3)
    again = read_drafter(tmp_path / "one")
    assert again.vocabulary.tolist() == [3, 9, 30] and again.shape.features == drafter.shape.features
    assert again.shape.fingerprint == drafter.shape.fingerprint and again.shape.depths == drafter.shape.depths
    for name in drafter.state_dict().keys() - {"mask_row"}:
        assert torch.equal(again.state_dict()[name], as_kept(drafter, name)), name
    rows = again.embed_tokens.weight
    assert torch.equal(rows[1:], small_target().get_input_embeddings().weight[1:].bfloat16().float())
    assert algorithm == "eagle3" or torch.equal(rows[MASK], as_kept(drafter, "mask_row"))
    envelope.save(again, tmp_path / "two", tokens=3)
    for name in (CONFIG, envelope.WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    "target, named", [(EMBEDDED, EMBEDDED_ON_HUB), ("org/its", "org/its"), ("mine", None), ("./mine", None)]
)
def test_a_head_names_its_target_as_others_find_it(tmp_path, monkeypatch, target: str, named: str | None):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    drafter = drafter_for(small_target(), kind="eagle3")
    drafter.shape = replace(drafter.shape, target=target)
    envelope.save(drafter, tmp_path / "head")
    said = json.loads((tmp_path / "head" / CONFIG).read_text())["speculators_config"]["verifier"]["name_or_path"]
    assert said == (named or str(tmp_path / "mine"))
    assert read_drafter(tmp_path / "head").shape.target == target, "as pearl calls it"


@BOTH
def test_a_run_begins_with_the_drafter_that_another_saved(folder, tmp_path, algorithm: str):
    """Its words too; one of another shape or another target has nothing to give."""
    target, made = small_target(), recipe(folder, algorithm=algorithm)
    shown = learner(made, vocabulary=range(WORDS - 3)).module
    envelope.save(shown, tmp_path / "first", tokens=3)
    drafter = go_on_from(str(tmp_path / "first"), target, made, (0, 2))
    assert drafter.vocabulary.tolist() == list(range(WORDS - 3)) and drafter.shape == shown.shape
    for name in shown.state_dict():
        assert torch.equal(drafter.state_dict()[name], as_kept(shown, name)), name
    for other, values in (
        (small_target(), {"fc_norm": False}),
        (small_target(), {"intermediate": 999}),
        (small_target(seed=5), {}),
    ):
        with pytest.raises(UsageError, match="a drafter of another shape or target"):
            go_on_from(str(tmp_path / "first"), other, recipe(folder, algorithm=algorithm, **values), (0, 2))
    with pytest.raises(UsageError, match="start results/nowhere is not there: train it first"):
        go_on_from("results/nowhere", target, made, (0, 2))
    with pytest.raises(UsageError, match=r"start .*first has the mask token (0|None): leave mask_token out"):
        go_on_from(str(tmp_path / "first"), target, recipe(folder, algorithm=algorithm, mask_token=3), (0, 2))


def test_a_drafter_grows_layers_that_change_nothing_at_first(folder, tmp_path):
    target = small_target()
    drafter = learner(recipe(folder)).module
    with torch.no_grad():  # a third of the neurons say nothing
        silent = range(0, drafter.shape.intermediate, 3)
        drafter.layers[-1].mlp.down_proj.weight[:, list(silent)] = 0
    envelope.save(drafter, tmp_path / "first", tokens=3)
    first = read_drafter(tmp_path / "first").attach(target)
    width = drafter.shape.intermediate - len(silent)
    wanted = recipe(folder, layers=3, intermediate=width)
    larger = go_on_from(str(tmp_path / "first"), target, wanted, drafter.shape.features)
    assert larger.shape.layers == 3 and larger.layers[0].mlp.up_proj.weight.shape[0] == width
    x, at, sees = torch.randn(2, 5, 2 * drafter.shape.hidden), torch.arange(5), torch.ones(5, 5).tril().bool()
    assert torch.allclose(larger.stack(x, at, sees)[0], first.stack(x, at, sees)[0], atol=1e-6)
    larger.stack(x, at, sees)[0].pow(2).mean().backward()
    assert all(layer.mlp.down_proj.weight.grad.any() for layer in larger.layers), "what is added can learn"


def test_a_drafter_grows_heads_that_change_nothing_at_first(folder, tmp_path):
    """Of keys and values, each beside its copies, and a Markov head of higher rank."""
    target = small_target()
    drafter = learner(recipe(folder, markov_rank=2)).module.requires_grad_(False)
    torch.nn.init.normal_(drafter.markov_w2.weight)
    envelope.save(drafter, tmp_path / "first", tokens=3)
    first = read_drafter(tmp_path / "first").attach(target).requires_grad_(False)
    assert first.shape.kv_heads < first.shape.heads
    wanted = recipe(folder, markov_rank=5, kv_heads=first.shape.heads)
    larger = go_on_from(str(tmp_path / "first"), target, wanted, first.shape.features)
    assert (larger.shape.kv_heads, larger.shape.markov_rank) == (first.shape.heads, 5)
    x, at, sees = torch.randn(2, 6, 2 * first.shape.hidden), torch.arange(6), torch.ones(6, 6).tril().bool()
    hidden, _ = first.stack(x, at, sees)
    assert torch.allclose(larger.stack(x, at, sees)[0], hidden, atol=1e-6)
    tokens = torch.tensor([1, 5, 9])
    for mine, theirs in zip(larger.after(tokens, hidden[0, :3]), first.after(tokens, hidden[0, :3]), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    bias, _ = larger.after(tokens, hidden[0, :3])
    bias.pow(2).mean().backward()
    assert larger.markov_w2.weight.grad[:, 2:].any(), "what is added can learn"
    with pytest.raises(UsageError, match="must be a multiple of the target's"):
        go_on_from(str(tmp_path / "first"), target, recipe(folder, kv_heads=3), first.shape.features)


def test_a_new_drafter_with_more_heads_of_keys_begins_with_copies_of_its_targets(folder):
    target, made = small_target(), recipe(folder, kv_heads=small_target().config.num_attention_heads)
    mine = new_drafter(target, made, (0, 2), torch.arange(WORDS)).layers[0].self_attn.k_proj.weight
    own = target.model.layers[-1].self_attn.k_proj.weight
    size, copies = target.config.head_dim, mine.shape[0] // own.shape[0]
    read = mine[:, own.shape[1] :].view(-1, copies, size, own.shape[1])  # beside the half that reads embeddings
    assert copies > 1 and torch.equal(read, own.view(-1, 1, size, own.shape[1]).expand_as(read))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_norms_begin_as_what_the_targets_multiply_by(folder, family: str):
    """Gemma's by one more than their weights, and that before its MLP has another name."""
    target = tiny.random_model(tiny.CONFIGS[family]())
    with torch.no_grad():
        for name, weight in target.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    made = new_drafter(target, recipe(folder, intermediate=None), (0, 1), torch.arange(20))
    more, last = float(family == "gemma2"), target.model.layers[-1]
    before_mlp = getattr(last, "pre_feedforward_layernorm", last.post_attention_layernorm)
    for mine, its in ((made.norm, target.model.norm), (made.layers[0].post_attention_layernorm, before_mlp)):
        torch.testing.assert_close(mine.weight, its.weight + more, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_a_markov_head_learns_what_follows_a_token_and_how_sure_it_is(folder, tmp_path):
    """Every slot is fed alike, so only the head can tell what follows the token that was drafted before."""
    values = {"epochs": 25.0, "micro": 4, "learning_rate": 1e-2, "anchors": 1.0, "kl": 0.2, "slots_after": 0.0}
    some, _ = run(recipe(folder, tmp_path / "out", markov_rank=16, reach=0.5, **values))
    plain, _ = run(recipe(folder, tmp_path / "plain", **values))
    with_head, without = (means(loop.tested(one, range(8))) for one in (some, plain))
    assert with_head["accuracy 2"] > 0.8 and with_head["accuracy 2"] >= without["accuracy 2"]

    drafter = read_drafter(tmp_path / "out").attach(small_target()).requires_grad_(False)
    assert drafter.shape.markov_rank == 16 and torch.equal(drafter.markov_w2.weight, some.module.markov_w2.weight)
    model, params = small_target(), SamplingParams(max_new_tokens=12, ignore_eos=True)
    own = together(Target(tiny.verifier(small_target())), [1, 2, 3], Schedule.of("ar"), params, decode=str)
    drafting = FeatureSource(drafter)
    for mode in ("sd", "tree"):
        target = Target(
            tiny.verifier(model, hooks=HiddenStateHooks(model, (0, 2))), ScriptedChannel(drafting, EAGER), ticks()
        )
        assert together(target, [1, 2, 3], Schedule.of(mode), params, decode=str) == own
        assert target.draft_stats and not target.draft_stats.failed and drafting.forwards


def test_a_head_that_borrows_its_embedding_says_the_same_in_few_bytes(tmp_path):
    target = small_target()
    drafter = drafter_for(target, (0, 2), 4, kind="peagle", markov_rank=8).requires_grad_(False)
    torch.nn.init.normal_(drafter.markov_w2.weight)
    for name, borrows in (("whole", False), ("small", True)):
        envelope.save(drafter, tmp_path / name, borrows=borrows)
    whole, small = (read_drafter(tmp_path / name).requires_grad_(False) for name in ("whole", "small"))
    assert small.shape == replace(whole.shape, own_embedding=False, own_mask=True)
    assert "embed_tokens.weight" not in load_file(tmp_path / "small" / envelope.WEIGHTS)
    text = [0, 2, 4, 6, 8, 10, 12]  # tokens that can be drafted: of others it does not know what follows
    features = torch.randn(len(text) - 1, whole.shape.feature_row, generator=torch.Generator().manual_seed(1))
    drafts = []
    for one in (whole, small):
        source = FeatureSource(one.attach(target))
        source.begin(0, SamplingParams())
        source.observe(bits_of(features), 0)
        drafts.append(source.guess(text, [[]])[0])
    for mine, theirs in zip(*drafts, strict=True):
        assert mine[0][0] == theirs[0][0]
        assert math.exp(mine[0][1]) == pytest.approx(math.exp(theirs[0][1]), abs=0.05), "but for the rounding to 8 bits"
    wanted = recipe(tmp_path, tmp_path / "out", markov_rank=8, depths=4, layers=2)
    assert torch.equal(go_on_from(str(tmp_path / "small"), target, wanted, (0, 2)).mask_row, small.mask_row)


class Interrupted(Exception):
    pass


def cut_off(made: FeatureRecipe, calls: int) -> None:
    """Trains until the learner was asked so many times."""
    some, left = learner(made), [calls]
    learn = some.learn

    def until(*args: object):
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        return learn(*args)  # type: ignore[arg-type]

    some.learn = until  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        loop.train(some, made, some._data.split(1)[0], [], Accelerator(cpu=True))


@pytest.mark.parametrize("calls", [3, 9, 14, 17])
def test_a_run_that_was_cut_off_and_resumed_is_the_run_that_was_not(folder, tmp_path, calls: int):
    """8 texts, 4 a step, one a forward: 6 steps of 4 calls, with a checkpoint after 2 and 4 and 6 steps."""
    values = {"epochs": 3.0, "micro": 1, "checkpoint_every": 2}
    one, figures = run(recipe(folder, tmp_path / "one", **values))
    cut_off(recipe(folder, tmp_path / "two", **values), calls)
    assert (tmp_path / "two" / CHECKPOINT).exists() == (calls >= 8)
    two, again = run(recipe(folder, tmp_path / "two", **values))
    for name, tensor in one.module.state_dict().items():
        assert torch.equal(two.module.state_dict()[name], tensor), name
    assert figures == again
    for name in (CONFIG, envelope.WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_finished_run_is_not_made_again(folder, tmp_path):
    made = recipe(folder, tmp_path / "out", epochs=1.0)
    one, figures = run(made)
    some = learner(made)
    some.learn = lambda *_: pytest.fail("it trained again")  # type: ignore[method-assign]
    assert loop.train(some, made, *some._data.split(1), Accelerator(cpu=True)) == figures
    assert torch.equal(some.module.fc.weight, one.module.fc.weight)


def test_a_folder_takes_no_run_of_another_recipe(folder, tmp_path):
    run(recipe(folder, tmp_path / "out", epochs=1.0))
    before = (tmp_path / "out" / envelope.WEIGHTS).read_bytes()
    with pytest.raises(
        UsageError, match=r"another recipe .kl was 0\.5 and is 0\.1; .*: name another output, or delete"
    ):
        run(recipe(folder, tmp_path / "out", epochs=1.0, kl=0.1, seed=3))
    assert (tmp_path / "out" / envelope.WEIGHTS).read_bytes() == before


def test_a_run_does_not_go_on_over_more_texts(tmp_path):
    """Which tokens can be drafted, and the order of the texts, would be others."""
    data = save_recorded(tmp_path / "data", small_target())
    run(recipe(data, tmp_path / "out", epochs=1.0))
    save_recorded(data, small_target(), shards_=4)
    with pytest.raises(UsageError, match=r"holds a run over 8 texts, and now there are 12: name another output"):
        run(recipe(data, tmp_path / "out", epochs=1.0))


def test_a_run_of_before_an_option_was_there_goes_on(folder, tmp_path):
    run(recipe(folder, tmp_path / "out", epochs=1.0))
    path = tmp_path / "out" / CHECKPOINT
    state = torch.load(path, weights_only=True)
    del state["recipe"]["optimizer"], state["texts"]
    torch.save(state, path)
    run(recipe(folder, tmp_path / "out", epochs=1.0))
    with pytest.raises(UsageError, match=r"another recipe .optimizer was 'adamw' and is 'muon'.: name another output"):
        run(recipe(folder, tmp_path / "out", epochs=1.0, optimizer="muon"))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "broken", "truncated"])
def test_a_broken_checkpoint_is_refused(folder, tmp_path, content: bytes | None):
    run(recipe(folder, tmp_path / "out", epochs=0.5))
    path = tmp_path / "out" / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(UsageError, match=r"checkpoint\.pt can't be read .*: delete it to begin again"):
        run(recipe(folder, tmp_path / "out", epochs=0.5))


# The recipe


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_recipe_of_configs_is_found_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = read_recipe(FeatureRecipe, "configs/feature/smollm2-135m.yaml", {"output": str(tmp_path / "out")})
    assert made.target == "smollm2-135m"
    Path("configs/feature").mkdir(parents=True)
    write(Path("configs/feature/smollm2-135m.yaml"), "{data: mine, output: o}")
    assert read_recipe(FeatureRecipe, "configs/feature/smollm2-135m.yaml", {}).data == "mine"


def test_a_recipe_is_read_and_single_values_replaced(tmp_path):
    path = write(tmp_path / "r.yaml", "{data: d, output: o, depths: 7, kl: 0}")
    made = read_recipe(FeatureRecipe, path, {"output": "elsewhere", "segments": 3})
    assert (made.data, made.output, made.depths, made.segments, made.epochs) == ("d", "elsewhere", 7, 3, 4.0)


def test_a_flag_of_a_recipe_can_be_switched_off_in_words(tmp_path):
    path = write(tmp_path / "r.yaml", "{data: d, output: o, borrow: true, bf16: true}")
    found = command.parser().parse_args(["--config", path, "--no-borrow", "--no-fc-norm"])
    made = read_recipe(FeatureRecipe, path, cli.given(found, but=("config",)))
    assert (made.borrow, made.fc_norm, made.bf16) == (False, False, True)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{data: d, output: o, anchor: 1}", "unknown key 'anchor'; did you mean anchors?"),
        ("{data: d, output: o, learning_rat: 1}", "unknown key 'learning_rat'; did you mean learning_rate?"),
        ("{depths: 3}", "lacks data and output"),
        ("{data: d}", "lacks output"),
        ("[data, output]", "must be a mapping of names to values"),
        ("{data: ", "is not YAML"),
        ("{data: d, output: o, depths: 17}", "depths must be a whole number from 1 to 16"),
        ("{data: d, output: o, depths: 0}", "depths must be a whole number from 1 to 16"),
        ("{data: d, output: o, layers: 5}", "layers must be a whole number from 1 to 4"),
        ("{data: d, output: o, segments: 0}", "segments must be a whole number from 1"),
        ("{data: d, output: o, batch: 0}", "batch must be a whole number from 1"),
        ("{data: d, output: o, epochs: -1}", "epochs must be a number from 0"),
        ("{data: d, output: o, epochs: .inf}", "epochs must be a number from 0"),
        ("{data: d, output: o, longest: 1}", "longest must be a whole number from 2"),
        ("{data: d, output: o, seed: 1.5}", "seed must be a whole number from 0"),
        ("{data: d, output: o, bf16: 1}", "bf16"),
        ("{data: [d], output: o}", "data must be a path"),
        ("{data: d, output: o, algorithm: eagle3, markov_rank: 8}", "markov_rank is for peagle"),
        ("{data: d, output: o, features: []}", "features must name at least one layer"),
        ("{data: d, output: o, depths: 1}", "depths must be 2 or more: peagle learns several tokens"),
        ("{data: d, output: o, algorithm: hass}", "is unknown; choose from eagle3, peagle"),
        ("{data: d, output: o, slots_after: -1}", "slots_after must be a number from 0 to 1"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(tmp_path, text: str, sentence: str):
    path = write(tmp_path / "r.yaml", text)
    with pytest.raises(UsageError) as caught:
        read_recipe(FeatureRecipe, path, {})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_the_recipes_of_the_repository_can_be_read():
    root = Path(__file__).resolve().parents[2] / "configs"
    kinds = {"feature": FeatureRecipe, "distill": DistillRecipe}
    for name, kind in kinds.items():
        files = sorted((root / name).glob("*.yaml"))
        assert files
        for file in files:
            assert read_recipe(kind, str(file), {}).target


def test_the_command_refuses_texts_of_another_target(tmp_path, capsys, monkeypatch):
    save_recorded(tmp_path / "data", small_target())
    target = save_toy_target(tmp_path / "target")
    text = f"{{data: {tmp_path}/data, output: {tmp_path}/out, target: {target}}}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert command.main(["--config", write(tmp_path / "r.yaml", text)]) != 0
    assert "whose weights are not those of" in capsys.readouterr().err
    assert command.main([]) != 0 and "Give --config" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_a_start_keeps_and_refuses_a_mask_token_that_the_target_has_not(
    tmp_path, capsys, monkeypatch
):
    toy = save_toy_target(tmp_path / "target")
    save_recorded(tmp_path / "data", AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32), (1, 3))
    text = f"{{data: {tmp_path}/data, target: {toy}, vocabulary: 20, epochs: 0, depths: 2}}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["--config", write(tmp_path / "r.yaml", text), "--output"]
    assert command.main([*words, str(tmp_path / "out"), "--mask-token", "99999"]) == 2
    assert "mask_token must be below 264, the rows of the target's embedding" in capsys.readouterr().err
    assert command.main([*words, str(tmp_path / "first")]) == 0
    assert "own" not in capsys.readouterr().out
    start = ["--start", str(tmp_path / "first"), "--vocabulary", "50"]
    assert command.main([*words, str(tmp_path / "second"), *start]) == 0
    assert "first goes on drafting from its own 20 tokens" in capsys.readouterr().out


def test_notes_have_as_many_tokens_as_the_manifest_says(folder):
    data = Recorded(folder)
    assert data.manifest.top == TOP == data[0].top_ids.shape[1]
