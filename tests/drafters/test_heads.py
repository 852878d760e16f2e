"""EAGLE-1, EAGLE-3 and P-EAGLE heads change no text, whatever their weights, and what is cached is a memo."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiers import tiered
from toys import EAGER, ScriptedChannel, examples, scrambled, ticks, together
from trained import WORDS, bits_of, drafter_for, read_drafter, save_toy_target
from transformers import AutoModelForCausalLM, PreTrainedModel

from pearl.checkpoints.drafts import envelope
from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.drafters.feature.head_reader import DraftedRow, HeadReader
from pearl.drafters.feature.head_source import HeadSource
from pearl.drafters.feature.network import FeatureDrafter
from pearl.drafters.feature.source import FeatureSource
from pearl.engine import Engine
from pearl.models.draft_model import LeavesQuery
from pearl.models.hidden_states import HiddenStateHooks
from pearl.roles.target import Target

pytestmark = pytest.mark.usefixtures("hurried")

GREEDY = SamplingParams(max_new_tokens=10, ignore_eos=True)
SEEDED = SamplingParams(max_new_tokens=10, ignore_eos=True, temperature=0.9, seed=3)
PENALISED = SamplingParams(max_new_tokens=10, ignore_eos=True, repetition_penalty=1.5, suppress_tokens=[7])
REJECTION = SamplingParams(max_new_tokens=10, ignore_eos=True, temperature=0.9, seed=3, method="rejection")
PROMPT = [3, 1, 4, 1, 5]


@functools.cache
def network(kind: str, layers: int = 1, target: str = "llama") -> FeatureDrafter:
    model = model_of(target)
    count = model.config.num_hidden_layers
    features = (count,) if kind == "eagle" else (0, 1)
    return drafter_for(model, features, 4, layers, kind=kind).requires_grad_(False)


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    return tiny.random_model(tiny.CONFIGS[name]())


def source_of(drafter: FeatureDrafter, beam: int = 0) -> FeatureSource | HeadSource:
    return FeatureSource(drafter, beam) if drafter.shape.parallel else HeadSource(HeadReader(drafter, 200, 4))


@functools.cache
def alone(target: str, params: SamplingParams):
    return together(Target(tiny.verifier(model_of(target))), PROMPT, Schedule.of("ar"), params, decode=str)


@pytest.mark.parametrize("params", tiered([GREEDY, SEEDED, PENALISED], lambda one: one == GREEDY))
@pytest.mark.parametrize(
    "mode, kind, target, script",
    [
        ("sd", "eagle3", "llama", EAGER),
        ("tree", "eagle3", "qwen3", EAGER),
        ("pearl", "eagle3", "qwen2", scrambled(3)),
        ("tree", "eagle3", "llama", scrambled(5)),
        ("pearl-no-pre", "eagle3", "llama", scrambled(2)),
        ("sd", "peagle", "qwen3", EAGER),
        ("tree", "peagle", "llama", scrambled(4)),
        ("pearl", "peagle", "qwen2", EAGER),
        ("sd", "eagle", "llama", EAGER),
        ("tree", "eagle", "qwen3", scrambled(3)),
    ],
)
def test_an_untrained_head_changes_no_text(mode: str, kind: str, target: str, script, params: SamplingParams):
    drafter = network(kind, target=target)
    reader = tiny.verifier(model_of(target), hooks=HiddenStateHooks(model_of(target), drafter.shape.features))
    drafting = source_of(drafter)
    writing = Target(reader, ScriptedChannel(drafting, script), ticks())
    assert together(writing, PROMPT, Schedule.of(mode), params, decode=str) == alone(target, params)
    assert drafting.forwards and writing.draft_stats and not writing.draft_stats.failed


def test_rejection_sampling_takes_heads_too():
    drafter = network("eagle3")
    reader = tiny.verifier(model_of("llama"), hooks=HiddenStateHooks(model_of("llama"), drafter.shape.features))
    writing = Target(reader, ScriptedChannel(source_of(drafter), EAGER), ticks())
    written = together(writing, PROMPT, Schedule.of("sd"), REJECTION, decode=str)
    assert len(written.tokens) == 10 and writing.draft_stats and not writing.draft_stats.failed


# The cache is a memo


FEATURES = torch.randn(40, 2 * 64, generator=torch.Generator().manual_seed(1)).bfloat16()


def plain(drafter: FeatureDrafter, text: list[int], known: int, path: list[int]) -> torch.Tensor:
    """Logits after the path, every row read anew and alone: with features up to `known`, then by its own state."""
    past: Any = None
    x, windows = None, drafter.shape.windows or (0,) * len(drafter.layers)
    with torch.no_grad():
        for position, token in enumerate([*text, *path][1:], 1):
            if position <= known:
                x = drafter.fused(FEATURES[position - 1])
            assert x is not None
            row = drafter.rows(torch.tensor([[token]]), x.view(1, 1, -1))
            masks = [torch.arange(1, position + 1)[None] > position - (window or position) for window in windows]
            hidden, made = drafter.stack(row, torch.tensor([position]), masks, past)
            past = (
                made
                if past is None
                else [(torch.cat([k, n], 2), torch.cat([v, m], 2)) for (k, v), (n, m) in zip(past, made, strict=True)]
            )
            x = drafter.carried(hidden[0, 0])
        return drafter.logits(hidden[0, 0])


TOKENS = st.integers(0, WORDS - 1)
PATHS = st.lists(st.lists(TOKENS, max_size=4).map(tuple), min_size=1, max_size=4, unique=True)


@functools.cache
def windowed() -> FeatureDrafter:
    """Its first layer sees three positions, its second all."""
    drafter = drafter_for(model_of("llama"), (0, 1), 4, 2, kind="eagle3").requires_grad_(False)
    drafter.shape = replace(drafter.shape, windows=(3, 0))
    return drafter


@examples(25)
@given(st.lists(TOKENS, min_size=2, max_size=9), PATHS, st.sampled_from([1, 2, "windowed"]), st.data())
def test_logits_are_those_of_a_plain_reading(text: list[int], paths: list[tuple[int, ...]], layers: Any, data):
    drafter = windowed() if layers == "windowed" else network("eagle3", layers)
    reader = HeadReader(drafter, 100)
    reader.begin(0, continues=False)
    known = data.draw(st.integers(1, len(text) - 1))
    reader.observe(bits_of(FEATURES[:known]), 0)
    found = reader.read_leaves_together([LeavesQuery(0, text, paths)])[0][:, drafter.vocabulary]
    for row, path in zip(found, paths, strict=True):
        torch.testing.assert_close(row, plain(drafter, text, known, list(path)), atol=2e-3, rtol=1e-3)


def test_a_window_reaches_over_rows_that_were_drafted_before():
    drafter, text = windowed(), [3, 1, 4, 1, 5]
    reader = HeadReader(drafter, 100)
    reader.begin(0, continues=False)
    reader.observe(bits_of(FEATURES[:4]), 0)
    reader.read_leaves_together([LeavesQuery(0, text, [(9, 2, 6), (8, 7)])])
    found = reader.read_leaves_together([LeavesQuery(0, text, [(9, 2, 6, 5), (9, 4), (8, 7, 1, 2)])])[0]
    for row, path in zip(found, ([9, 2, 6, 5], [9, 4], [8, 7, 1, 2]), strict=True):
        torch.testing.assert_close(row[drafter.vocabulary], plain(drafter, text, 4, path), atol=2e-3, rtol=1e-3)
    reader.observe(bits_of(FEATURES[4:6]), 0)
    found = reader.read_leaves_together([LeavesQuery(0, [*text, 9, 2], [()])])[0][0, drafter.vocabulary]
    torch.testing.assert_close(found, plain(drafter, [*text, 9, 2], 6, []), atol=2e-3, rtol=1e-3)
    state = reader._sequences[0]
    assert state.places(1, 7, 6) == [*range(1, 7), 7, 8], "6 and 5 hang below the end of the text"


def test_rows_are_read_anew_once_their_features_have_come():
    drafter = network("eagle3")
    reader = HeadReader(drafter, 100)
    reader.begin(0, continues=False)
    reader.observe(bits_of(FEATURES[:4]), 0)
    text = [3, 1, 4, 1, 5]
    reader.read_leaves_together([LeavesQuery(0, text, [(9,), (9, 2), (8,)])])
    reader.observe(bits_of(FEATURES[4:6]), 0)
    found = reader.read_leaves_together([LeavesQuery(0, [*text, 9, 2], [()])])[0][0, drafter.vocabulary]
    torch.testing.assert_close(found, plain(drafter, [*text, 9, 2], 6, []), atol=2e-3, rtol=1e-3)


def test_after_a_forward_that_failed_everything_is_read_as_if_it_had_not_been_asked(monkeypatch: pytest.MonkeyPatch):
    drafter = network("eagle3")
    reader, text = HeadReader(drafter, 100), [3, 1, 4, 1, 5]
    reader.begin(0, continues=False)
    reader.observe(bits_of(FEATURES[:4]), 0)
    reader.read_leaves_together([LeavesQuery(0, text, [(9, 2, 9, 2)])])
    reader.observe(bits_of(FEATURES[4:6]), 0)
    query = LeavesQuery(0, [*text, 9, 2], [(9,), (9, 2)])  # in a text that repeats itself
    with monkeypatch.context() as broken:
        broken.setattr(reader, "_forward", lambda parts: (_ for _ in ()).throw(torch.OutOfMemoryError("small")))
        with pytest.raises(torch.OutOfMemoryError):
            reader.read_leaves_together([query])
    for row, path in zip(reader.read_leaves_together([query])[0], ([9], [9, 2]), strict=True):
        torch.testing.assert_close(row[drafter.vocabulary], plain(drafter, query.tokens, 6, path), atol=2e-3, rtol=1e-3)


def test_a_drafted_chain_may_be_longer_than_pythons_stack_is_deep():
    root = row = DraftedRow(0)
    for token in range(1, 5000):
        row.children[token] = row = DraftedRow(token)
    assert [one.token for one in root.below()] == [*range(1, 5000)]


def test_several_texts_share_a_forward():
    drafter = network("eagle3")
    reader, texts = HeadReader(drafter, 100, 3), {0: [3, 1, 4, 1, 5], 2: [9, 2, 6]}
    for slot, text in texts.items():
        reader.begin(slot, continues=False)
        reader.observe(bits_of(FEATURES[: len(text) - 1]), slot)
    paths = [(), (7,), (7, 8)]
    both = reader.read_leaves_together([LeavesQuery(slot, text, paths) for slot, text in texts.items()])
    for text, found in zip(texts.values(), both, strict=True):
        for row, path in zip(found[:, drafter.vocabulary], paths, strict=True):
            torch.testing.assert_close(row, plain(drafter, text, len(text) - 1, list(path)), atol=2e-3, rtol=1e-3)


def test_a_prompt_longer_than_a_forward_takes_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch):
    from pearl.drafters.feature import head_reader

    monkeypatch.setattr(head_reader, "_CHUNK", 4)
    drafter, text = network("eagle3", 2), list(range(20))
    reader = HeadReader(drafter, 100)
    reader.begin(0, continues=False)
    reader.observe(bits_of(FEATURES[:19]), 0)
    found = reader.read_leaves_together([LeavesQuery(0, text, [(), (5,)])])[0][:, drafter.vocabulary]
    for row, path in zip(found, ([], [5]), strict=True):
        torch.testing.assert_close(row, plain(drafter, text, 19, path), atol=2e-3, rtol=1e-3)


# In an engine


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> str:
    return save_toy_target(tmp_path_factory.mktemp("toy") / "target")


@pytest.fixture(scope="module")
def heads(toy, tmp_path_factory) -> dict[str, Path]:
    """Of each kind one, written as pearl writes it; EAGLE-1 as its authors did."""
    target, folders = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32), {}
    for kind in ("eagle3", "peagle"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        envelope.save(drafter_for(target, (1, 2, 4), 4, kind=kind), folders[kind], tokens=4)
    folders["eagle"] = tmp_path_factory.mktemp("eagle")
    made = drafter_for(target, (6,), 1, layers=1, vocabulary=range(target.config.vocab_size), kind="eagle")
    tensors = {name.replace("in_proj", "fc"): part for name, part in made.state_dict().items() if name != "vocabulary"}
    tensors = {name: part.detach() for name, part in tensors.items() if not name.startswith("lm_head")}
    save_file(tensors, folders["eagle"] / "model.safetensors")
    config = target.config.to_dict() | {"num_hidden_layers": 1, "rms_norm_eps": made.shape.eps}
    (folders["eagle"] / "config.json").write_text(json.dumps(config))
    return folders


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("kind", tiered(["eagle3", "peagle", "eagle"], lambda kind: kind == "eagle3"))
def test_in_one_process_the_text_is_the_targets_own(toy, heads, kind: str):
    with Engine.from_pretrained(
        toy, str(heads[kind]), dtype="float32", max_length=300, mode="sd", processes=1, max_sequences=2
    ) as engine:
        for params in (GREEDY, SEEDED):
            written = engine.generate(["def f(x):", "once"], params)
            own = engine.generate(["def f(x):", "once"], params, mode="ar")
            assert [one.tokens for one in written] == [one.tokens for one in own]
            assert all(one.stats.drafter and not one.stats.drafter.failed for one in written)
        assert "draft: " in engine.description and "EAGLE" in engine.description


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("kind", ["eagle3", "peagle"])
def test_in_two_processes_the_text_is_the_targets_own_in_every_mode(toy, heads, kind: str):
    with Engine.from_pretrained(toy, str(heads[kind]), dtype="float32", max_length=300) as engine:
        for params in (GREEDY, SEEDED):
            own = engine.generate("def f(x):", params, mode="ar").tokens
            for mode in ("sd", "pearl", "tree"):
                written = engine.generate("def f(x):", params, mode=mode)
                assert written.tokens == own and written.stats.drafter and not written.stats.drafter.failed
                assert written.stats.drafter.forwards > 0


def test_what_was_written_is_read(heads):
    for kind in ("eagle3", "peagle"):
        assert read_drafter(heads[kind]).shape.features == (1, 2, 4)
