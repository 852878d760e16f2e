"""Real engines write lists of texts: whatever the batch, each text is the target's own, token for token."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import replace

import pytest
from evaluations import run, said, summary, written

from pearl.checkpoints.preflight import preflight
from pearl.config.engine_config import EngineConfig
from pearl.core.params import SamplingParams
from pearl.core.records import GenerationStats
from pearl.engine import Engine, Generation, GenerationRequest
from pearl.errors import UsageError
from pearl.evaluation.metrics import most_side_by_side, occupancy

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.slow]

PLACES = 8
MODES = ("ar", "sd", "sd:3", "pearl", "pearl:2", "pearl-no-pre", "pearl-no-post", "tree")
ONE_CORE = str(min(os.sched_getaffinity(0)))
PROMPTS = ["def the(thing):\n" * (1 + i % 17) for i in range(20)]
PARAMS = [
    SamplingParams(max_new_tokens=6 + 9 * (i % 4), temperature=(0.0, 0.8, 0.0)[i % 3], top_k=20 * (i % 2), seed=i)
    for i in range(20)
]


@contextlib.contextmanager
def opened(pair, **options: object):
    given = {"dtype": "float32", "max_length": 300, "max_sequences": PLACES, "target_cores": ONE_CORE}
    with Engine.from_pretrained(*pair, **given | options) as engine:
        yield engine


@pytest.fixture(scope="module")
def serial(pair):
    with opened(pair, mode="sd", processes=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(serial):
    """The texts that the target writes one after the other."""
    return [serial.generate(prompt, own, mode="ar") for prompt, own in zip(PROMPTS, PARAMS, strict=True)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mode_writes_the_same_at_every_batch_size(pair, dtype):
    """Two processes, both on one core: what is said does not depend on who comes first."""
    with opened(pair, dtype=dtype, draft_cores=ONE_CORE) as engine:
        assert engine.model.buckets.exact and engine.model.batched_buckets, "on this machine nothing is promised"
        alone = [engine.generate(prompt, own, mode="ar").tokens for prompt, own in zip(PROMPTS, PARAMS, strict=True)]
        for number, mode in enumerate(MODES):
            size = (3, 8)[(number + (dtype == "float32")) % 2]  # both, between the two of them
            texts = engine.generate(PROMPTS, PARAMS, mode=mode, batch_size=size)
            assert [text.tokens for text in texts] == alone, (mode, size)
            shared = max(p.texts for text in texts for p in text.stats.passes)
            assert size // 2 < shared <= size, "in lock-step modes some sit a pass out"


def test_a_batch_of_thirty_two(pair, alone):
    with opened(pair, mode="sd", processes=1, max_sequences=32, max_length=200) as engine:
        for mode in ("ar", "sd"):
            texts = engine.generate(PROMPTS[:10] * 4, PARAMS[:10] * 4, mode=mode)
            assert [text.tokens for text in texts] == [text.tokens for text in alone[:10]] * 4
            assert max(p.texts for text in texts for p in text.stats.passes) > 16


def test_rejection_sampling_side_by_side_fills_every_text(serial):
    params = SamplingParams(max_new_tokens=12, temperature=1.0, method="rejection", ignore_eos=True)
    texts = serial.generate(PROMPTS, [replace(params, seed=i) for i in range(20)], batch_size=8)
    assert [len(text.tokens) for text in texts] == [12] * 20


def test_a_stream_of_several_yields_what_generate_returns(serial, alone):
    streamed: dict[int, list[int]] = {}
    order = []
    for number, token in serial.stream(PROMPTS, PARAMS, mode="ar"):
        streamed.setdefault(number, []).append(token)
        order.append(number)
    assert [streamed[number] for number in range(20)] == [text.tokens for text in alone]
    assert order != sorted(order), "texts come side by side"


def test_jobs_come_when_they_come(serial, alone):
    def arriving():
        for number, (prompt, own) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
            yield from [None] * (number % 3)
            yield GenerationRequest(prompt, own)

    done = {}
    for job, written_so_far in serial.write(arriving()):
        if isinstance(written_so_far, Generation):
            done[job] = written_so_far.tokens
    wanted = sorted(text.tokens for text in alone)
    assert sorted(done.values()) == wanted


def test_a_request_that_is_none_fails_alone_and_what_is_no_request_is_named(serial, alone):
    two = GenerationRequest(PROMPTS[0], replace(PARAMS[0], n=2))
    texts = [said for _, said in serial.write([two, GenerationRequest(PROMPTS[1], PARAMS[1])]) if said is not None]
    over = [one for one in texts if isinstance(one, Generation)]
    assert sorted(one.finish_reason for one in over) == sorted(["error", alone[1].finish_reason])
    assert alone[1].tokens in [one.tokens for one in over]
    with pytest.raises(UsageError, match="by a GenerationRequest, not by"):
        list(serial.write(["the"]))


def test_waiting_for_a_request_takes_no_time_of_a_core(serial, alone):
    def late():
        yield GenerationRequest(PROMPTS[0], PARAMS[0])
        began = time.perf_counter()
        while time.perf_counter() - began < 1.0:
            yield None
        idle.append(time.process_time())
        yield GenerationRequest(PROMPTS[1], PARAMS[1])

    idle, texts = [], []
    for _, now in serial.write(late(), mode="sd"):
        if isinstance(now, Generation):
            texts.append(now.tokens)
            idle.append(time.process_time())
    assert texts == [text.tokens for text in alone[:2]]
    assert idle[1] - idle[0] < 0.5, "the first text's end is known before the second begins"


def test_bytes_on_the_wire_go_both_ways_and_are_everybodys(serial):
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    (one,), three = (serial.generate(PROMPTS[:1] * count, params, mode="sd:3") for count in (1, 3))
    assert one.stats.bytes_on_wire > sum(1 for p in one.stats.passes) * 2 * 64
    assert all(
        one.stats.bytes_on_wire * 0.5 < text.stats.bytes_on_wire < one.stats.bytes_on_wire * 1.5 for text in three
    )


def test_a_stream_of_several_that_is_left_does_not_disturb_the_next(serial, alone):
    stream = serial.stream(PROMPTS, PARAMS)
    for _ in range(7):
        next(stream)
    texts = serial.generate(PROMPTS, PARAMS)
    assert [text.tokens for text in texts] == [text.tokens for text in alone]


def test_places_are_taken_while_anybody_waits_for_one(serial):
    """A hundred texts, the longest of them ten times the shortest."""
    params = [SamplingParams(max_new_tokens=4 + 11 * i % 37, ignore_eos=True) for i in range(100)]
    texts = serial.generate(PROMPTS * 5, params, mode="ar")
    assert [len(text.tokens) for text in texts] == [own.max_new_tokens for own in params]
    assert occupancy([text.stats for text in texts]) >= 0.95


def test_one_prompt_and_a_list_of_one_are_told_apart(serial, alone):
    assert isinstance(serial.generate(PROMPTS[:1], PARAMS[:1]), list)
    assert serial.generate(PROMPTS[:1], PARAMS[:1])[0].tokens == alone[0].tokens
    assert serial.generate([serial.encode(PROMPTS[0])], PARAMS[0])[0].tokens == alone[0].tokens
    assert serial.generate(serial.encode(PROMPTS[0]), PARAMS[0]).tokens == alone[0].tokens
    chat = [{"role": "user", "content": "the"}]
    assert serial.generate([chat, chat], PARAMS[0])[1].tokens == serial.generate(chat, PARAMS[0]).tokens


@pytest.mark.parametrize(
    "arguments, settings, sentence",
    [
        ((PROMPTS, PARAMS[:3]), {}, "20 prompts and 3 params"),
        ((PROMPTS[:3],), {"batch_size": 9}, "from 1 to the 8 texts"),
        ((PROMPTS[:3],), {"batch_size": 0}, "from 1 to the 8 texts"),
        ((["", ""],), {}, "empty"),
        ((PROMPTS[:2],), {"continues": True}, "Only one text"),
    ],
)
def test_what_can_not_be_written_is_refused_before_the_first_token(serial, arguments, settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        serial.generate(*arguments, **settings)


def test_a_budget_for_keys_and_values_says_how_many_texts_there_are(pair):
    config = EngineConfig(*pair, dtype="float32", max_length=200, max_sequences=500)
    each = 2 * 2 * 2 * 16 * 4 * (512 + 32)  # keys and values, layers, heads, numbers of 4 bytes; slots in 128s, spare
    assert preflight(replace(config, cache_gb=7.5 * each / 1e9)).max_sequences == 7
    assert preflight(config).max_sequences == 500
    with pytest.raises(UsageError, match="does not hold one text"):
        preflight(replace(config, cache_gb=0.5 * each / 1e9))
    for wrong in (0, 513, 2.0):
        with pytest.raises(UsageError, match="max_sequences must be"):
            replace(config, max_sequences=wrong)


def test_texts_that_do_not_fit_into_memory_are_refused_before_loading(pair, monkeypatch):
    monkeypatch.setattr("pearl.checkpoints.preflight.bytes_of_a_sequence", lambda *_: 10**9)
    with pytest.raises(UsageError, match="500 texts side by side are part of it"):
        preflight(EngineConfig(*pair, max_length=200, max_sequences=500))
    monkeypatch.setattr("pearl.checkpoints.preflight.bytes_of_a_sequence", lambda *_: 10**15)
    with pytest.raises(UsageError, match=r"a shorter max_length, or other devices\.$"):
        preflight(EngineConfig(*pair, max_length=200))


# Evaluations


@pytest.fixture(scope="module")
def evaluated(pair, tmp_path_factory):
    """The same problems one after the other and three at a time."""
    made = {}
    for size in (1, 3):
        folder = tmp_path_factory.mktemp(f"batch-{size}")
        data = written(folder, "mt_bench")
        more = ["--batch-size", str(size), "--mode", "ar,sd:3", "--dtype", "float32", "--max-length", "500"]
        output = ["--target", pair[0], "--draft", pair[1], "--data", data, "--output", str(folder / "run")]
        assert run("mt_bench", *output, *more, "--max-new-tokens", "12") == 0
        made[size] = folder / "run"
    return made


def test_an_evaluation_of_batches_says_the_same(evaluated):
    one, three = (sorted(said(folder)) for folder in evaluated.values())
    assert one == three
    assert all(figures["identical_to_ar"] == 1.0 for figures in summary(evaluated[3])["modes"].values())


def test_the_second_turn_of_a_talk_in_a_batch_reads_only_what_is_new(evaluated):
    first = {}
    for size, folder in evaluated.items():
        lines = map(json.loads, (folder / "passes.jsonl").read_text().splitlines())
        first[size] = {(x["task_id"], x["mode"], x["turn"]): x["rows"] for x in lines if x["index"] == 0}
    assert first[1] == first[3]


def test_a_batchs_figures_are_there(evaluated):
    for mode, figures in summary(evaluated[3])["modes"].items():
        assert 0 < figures["occupancy"] <= 1 and 1 < figures["texts_per_pass"] <= 3, mode
        assert figures["tokens_per_second"] > 0
        assert len(figures["by_sequence"]) == figures["sequences"]
        assert all(one["tokens_per_second"] > 0 for one in figures["by_sequence"])
    assert "by_sequence" not in summary(evaluated[1])["modes"]["ar"]
    assert summary(evaluated[1])["modes"]["ar"]["occupancy"] is None


def test_occupancy_of_a_worked_example():
    """Two places: one is free for a second of the four until the last text begins; what comes after does not count."""

    def text(began: float, ended: float) -> GenerationStats:
        return GenerationStats("ar", 1, (), "", "length", (), None, 0, 0, places=2, began_s=began, ended_s=ended)

    batch = [text(10, 13), text(10, 12), text(13, 14), text(14, 20)]
    assert occupancy(batch) == pytest.approx((3 + 2 + 1) / 8)
    again = [replace(one, began_s=one.began_s + 100, ended_s=one.ended_s + 100) for one in batch]
    assert occupancy(batch + again) == pytest.approx(6 / 8)
    assert occupancy(batch + batch) is None, "two engines wrote at a time"
    assert (most_side_by_side(batch), most_side_by_side(batch + batch), most_side_by_side(batch[:1])) == (2, 2, 1)
