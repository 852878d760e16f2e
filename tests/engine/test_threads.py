"""Texts of many threads: each is what it would be alone, whoever comes, goes, or lets go beside it."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

import psutil
import pytest
from programs import start, torchrun

from pearl.core.detokenizer import TextDecoder
from pearl.core.params import SamplingParams
from pearl.engine import Engine, GenerationRequest
from pearl.errors import EngineClosedError, PearlError, UsageError

pytestmark = pytest.mark.usefixtures("own_cache")

ONE_CORE = str(min(os.sched_getaffinity(0)))
OPTIONS = {"dtype": "float32", "max_length": 300, "mode": "sd", "processes": 1, "target_cores": ONE_CORE}
PROMPTS = ["def the(thing):\n", "the thing in the", "return thing", "a"]
LONG = SamplingParams(max_new_tokens=250, ignore_eos=True)
WAIT_S = 60.0


@pytest.fixture(scope="module")
def engine(pair):
    with Engine.from_pretrained(*pair, max_sequences=3, **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def narrow(pair):
    """It has one place."""
    with Engine.from_pretrained(*pair, **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def asked(engine):
    """Prompts and params, and what is written for them alone."""
    made = []
    for number in range(12):
        prompt, params = PROMPTS[number % 4], SamplingParams(5 + 3 * number, 1.0, seed=number, ignore_eos=True)
        made.append((prompt, params, engine.generate(prompt, params, mode="ar").tokens))
    return made


def test_a_handle_is_a_future_an_iterator_and_a_text(engine, asked):
    prompt, params, tokens = asked[3]
    handles = [engine.submit(prompt, params, mode="ar") for _ in range(3)]
    assert handles[0].result(WAIT_S).tokens == tokens
    assert list(handles[1]) == tokens and list(handles[1]) == []
    assert "".join(handles[2].stream_text()) == engine.decode(tokens)
    assert {one.result().finish_reason for one in as_completed(handles, WAIT_S)} == {"length"}
    seen: list[object] = []
    engine.submit(prompt, params).add_done_callback(seen.append)
    engine.generate(prompt, params)
    assert seen and seen[0].result().tokens == tokens


@pytest.mark.parametrize("name", ["engine", "narrow"])
def test_streams_read_in_turns_are_whole(request, name, asked):
    """With one place the second waits for the first, with more they share passes."""
    engine = request.getfixturevalue(name)
    streams = [engine.stream(prompt, params) for prompt, params, _ in asked]
    read: list[list[int]] = [[] for _ in asked]
    for number in itertools.chain.from_iterable(itertools.repeat(range(len(asked)), 50)):
        read[number] += itertools.islice(streams[number], 1)
    assert read == [tokens for *_, tokens in asked]


def test_texts_of_other_modes_wait_and_nobody_starves(engine, asked):
    """Runs of one mode end when somebody of another mode waits: first come, first served."""
    prompt, params, _ = asked[0]
    order: list[str] = []
    handles = []
    for number, mode in enumerate(["ar", "sd", "ar", "sd:3", "ar"]):
        handles.append(engine.submit(prompt, replace(params, max_new_tokens=30), mode=mode))
        handles[-1].add_done_callback(lambda _, number=number: order.append(str(number)))
    texts = [one.result(WAIT_S) for one in handles]
    assert "".join(order) == "01234"
    assert len({tuple(text.tokens) for text in texts}) == 1
    assert [text.stats.mode for text in texts] == ["ar", "sd", "ar", "sd", "ar"]


def test_an_aborted_text_gives_its_place_back_within_a_pass(narrow, asked):
    prompt, params, tokens = asked[5]
    for aborts in (lambda one: one.abort(), narrow.abort, lambda one: one.cancel()):
        long, waiting = narrow.submit("the", LONG), narrow.submit(prompt, params)
        heard = list(itertools.islice(long, 5))
        aborts(long)
        text = long.result(WAIT_S)
        assert text.finish_reason == "abort" and text.tokens[:5] == heard
        assert list(long) == text.tokens[5:]
        assert text.text == narrow.decode(text.tokens) and text.usage.completion_tokens == len(text.tokens)
        assert waiting.result(WAIT_S).tokens == tokens
    one, never = narrow.submit("the", LONG), narrow.submit("thing", LONG)
    never.abort()
    assert (never.result(WAIT_S).finish_reason, never.result().tokens) == ("abort", [])
    one.abort()
    assert one.result(WAIT_S).finish_reason == "abort"
    done = narrow.submit(prompt, params)
    assert done.result(WAIT_S).tokens == tokens
    done.abort()
    assert done.result().finish_reason == "length" and not done.cancel()


@pytest.mark.parametrize("let_go", ["closed", "forgotten", "never begun"])
def test_a_stream_that_is_let_go_aborts_its_text(narrow, asked, let_go):
    prompt, params, tokens = asked[4]
    stream = narrow.stream("the", LONG)
    if let_go != "never begun":
        next(stream)
    if let_go == "closed":
        stream.close()
    else:
        del stream
        gc.collect()
    began = threading.active_count()
    assert narrow.generate(prompt, params).tokens == tokens
    assert threading.active_count() == began
    running = narrow.stream(["the"], LONG)
    next(running)
    del running
    assert narrow.generate(prompt, params).tokens == tokens


def test_threads_that_ask_abort_and_let_go_at_random_disturb_nobody(engine, asked):
    """The property: a text that is read to its end is what it is alone, whatever others do."""
    draws = [random.Random(seed) for seed in range(6)]

    def hammer(draw: random.Random) -> int:
        whole = 0
        for _ in range(8):
            prompt, params, tokens = draw.choice(asked)
            mode = draw.choice(["ar", "ar", "sd", "sd:2"])
            match draw.choice(["whole", "stream", "text", "several", "abort", "drop", "write"]):
                case "whole":
                    assert engine.generate(prompt, params, mode=mode).tokens == tokens
                case "stream":
                    assert list(engine.stream(prompt, params, mode=mode)) == tokens
                case "text":
                    assert "".join(engine.stream_text(prompt, params, mode=mode)) == engine.decode(tokens)
                case "several":
                    some = draw.sample(asked, 3)
                    texts = engine.generate([one[0] for one in some], [one[1] for one in some], mode=mode)
                    assert [text.tokens for text in texts] == [one[2] for one in some]
                case "abort":
                    handle = engine.submit(prompt, params, mode=mode)
                    heard = list(itertools.islice(handle, draw.randrange(4)))
                    handle.abort()
                    assert heard == tokens[: len(heard)]
                    ended = handle.result(WAIT_S)
                    assert ended.tokens == tokens[: len(ended.tokens)]
                    continue
                case "drop":
                    heard = list(itertools.islice(engine.stream(prompt, params, mode=mode), draw.randrange(4)))
                    assert heard == tokens[: len(heard)]
                    continue
                case "write":
                    *_, (_, text) = engine.write(iter([GenerationRequest(prompt, params)]), mode=mode)
                    assert text.tokens == tokens
            whole += 1
        return whole

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(hammer, draws, timeout=300)) > 6


def test_an_error_in_a_pass_reaches_all_under_way_and_the_engine_goes_on(narrow, asked, monkeypatch):
    prompt, params, tokens = asked[2]
    read = narrow.model.read

    def broken(*args, **more):
        monkeypatch.setattr(narrow.model, "read", read)
        raise RuntimeError("a pass that fails")

    monkeypatch.setattr(narrow.model, "read", broken)
    with pytest.raises(RuntimeError, match="a pass that fails"):
        list(narrow.stream(prompt, params))
    assert narrow.generate(prompt, params).tokens == tokens


def test_a_target_that_can_not_be_had_for_a_mode_fails_its_text_alone(narrow, asked, monkeypatch):
    """Such as a second copy over all GPUs, for `ar-all`, that they have no room for."""
    prompt, params, tokens = asked[2]
    target_for = narrow.runtime.target_for

    def refusing(schedule):
        if schedule.mode == "ar-all":
            raise RuntimeError("no room for another copy")
        return target_for(schedule)

    monkeypatch.setattr(narrow.runtime, "target_for", refusing)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="no room for another copy"):
        pool.submit(narrow.generate, prompt, params, mode="ar-all").result(timeout=60)
    assert narrow.generate(prompt, params).tokens == tokens


def test_a_request_that_is_made_again_does_not_give_out_its_old_text(narrow, asked, monkeypatch):
    """The second run ends before its first pass."""
    prompt, params, tokens = asked[2]
    request = GenerationRequest(prompt, params)
    assert narrow.submit(request).result().tokens == tokens
    write = narrow.runtime.target.write

    def broken(requests, *args):
        monkeypatch.setattr(narrow.runtime.target, "write", write)
        next(iter(requests))
        raise RuntimeError("no memory for it")
        yield

    monkeypatch.setattr(narrow.runtime.target, "write", broken)
    with pytest.raises(RuntimeError, match="no memory for it"):
        narrow.submit(request).result()
    assert narrow.submit(request).result().tokens == tokens


def undecodable(engine, monkeypatch) -> int:
    """A token that the engine's tokenizer can't decode, as one written in Python that does not know it."""
    token, plain = engine.runtime.checked.vocabulary - 1, engine._worker._decoder.plain

    def decode(tokens):
        if token in tokens:
            raise TypeError("sequence item 0: expected str instance, NoneType found")
        return plain(tokens)

    monkeypatch.setattr(engine._worker, "_decoder", TextDecoder(decode))
    return token


@pytest.mark.parametrize("stop", [(), ("zz",)], ids=["", "stop"])
def test_a_text_that_can_not_be_decoded_ends_with_the_error_and_alone(engine, asked, monkeypatch, stop):
    prompt, params, tokens = asked[6]
    token = undecodable(engine, monkeypatch)
    beside = engine.submit(prompt, params)
    broken = engine.submit("the", SamplingParams(max_new_tokens=5, allowed_token_ids=[token], stop=stop))
    with pytest.raises(TypeError, match="NoneType found"):
        broken.result(WAIT_S)
    assert beside.result(WAIT_S).tokens == tokens
    assert engine.generate(prompt, params).tokens == tokens


def test_closing_gives_everybody_an_error_and_nobody_waits(pair):
    engine = Engine.from_pretrained(*pair, **OPTIONS)
    streams = [engine.stream("the", LONG), engine.stream("thing", LONG)]
    handle = engine.submit("def", LONG, mode="ar")
    next(streams[0])
    engine.close()
    for waiting in (streams[1], handle):
        with pytest.raises(EngineClosedError, match="closed before the text was over"):
            list(waiting)
    assert isinstance(handle.exception(), RuntimeError) and isinstance(handle.exception(), PearlError)
    for late in (engine.generate, engine.stream, engine.submit):
        with pytest.raises(EngineClosedError, match="make another one"):
            late("the", LONG)
    engine.close()
    assert engine.events == []


def test_an_engine_that_nobody_has_any_more_closes_itself(pair):
    before = {thread for thread in threading.enumerate() if thread.name == "pearl-engine"}
    engine = Engine.from_pretrained(*pair, **OPTIONS)
    (mine,) = {thread for thread in threading.enumerate() if thread.name == "pearl-engine"} - before
    stream = engine.stream("the", LONG)
    del engine
    gc.collect()
    assert len(list(stream)) == 250, "a text under way keeps it"
    del stream
    gc.collect()
    mine.join(WAIT_S)
    assert not mine.is_alive()


def test_an_idle_engine_takes_no_time_of_a_core(narrow):
    narrow.generate("the", LONG)
    time.sleep(0.2)
    began, clock = time.process_time(), time.perf_counter()
    time.sleep(1.0)
    assert time.process_time() - began < 0.2 * (time.perf_counter() - clock)


def test_two_engines_in_two_threads_write_their_own_texts(engine, narrow, asked):
    def write(mine: Engine) -> list[list[int]]:
        return [mine.generate(prompt, params).tokens for prompt, params, _ in asked]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, [engine, narrow])) == [[tokens for *_, tokens in asked]] * 2


@pytest.mark.slow
def test_two_engines_in_two_threads_have_a_drafter_each(pair, asked):
    """Both are made, used and closed at the same time, with a process of their own."""

    def live(_: int) -> tuple[list[list[int]], int | None, int]:
        with Engine.from_pretrained(*pair, dtype="float32", max_length=300, max_sequences=2) as mine:
            texts = mine.generate([prompt for prompt, *_ in asked], [params for _, params, _ in asked], mode="pearl")
            texts += [mine.generate("the", LONG, mode="pearl") for _ in range(3)]
            drafted = sum(one.accepted for text in texts for one in text.stats.passes)
            return [text.tokens for text in texts], mine.runtime.drafter_pid, drafted

    with ThreadPoolExecutor(2) as pool:
        (one, first, drafted), (other, second, too) = pool.map(live, range(2))
    assert one == other and one[: len(asked)] == [tokens for *_, tokens in asked]
    assert first and second and first != second and drafted and too
    assert not psutil.pid_exists(first) and not psutil.pid_exists(second)


LAUNCHED = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pearl import Engine, SamplingParams

options = dict(dtype="float32", max_length=300, max_sequences=3)
with Engine.from_pretrained(*sys.argv[1:3], **options) as engine, ThreadPoolExecutor(6) as pool:
    def write(number, prompt, tokens, seed):
        params = SamplingParams(tokens, 1.0, seed=seed, ignore_eos=True)
        if number % 3 == 0:
            return list(engine.stream(prompt, params))
        if number % 3 == 1:
            engine.submit("the", SamplingParams(200, ignore_eos=True)).abort()
            return engine.submit(prompt, params).result().tokens
        made = "".join(engine.stream_text(prompt, params))
        text = engine.generate(prompt, params)
        assert made == text.text
        return text.tokens

    texts = list(pool.map(lambda one: write(*one), json.loads(sys.argv[3])))
    print(json.dumps([texts, engine.runtime.drafter_pid, [event.kind for event in engine.events]]))
"""


@pytest.mark.slow
def test_a_launched_engine_takes_requests_of_many_threads(pair, asked, tmp_path):
    wanted = [(n, prompt, params.max_new_tokens, params.seed) for n, (prompt, params, _) in enumerate(asked)]
    program = start(tmp_path, LAUNCHED, *pair, json.dumps(wanted), launcher=torchrun())
    printed, errors = program.communicate(timeout=200)
    assert program.returncode == 0, errors
    texts, started, events = json.loads(printed)
    assert texts == [tokens for *_, tokens in asked]
    assert started is None and not {"lost", "alone", "failed"} & set(events)


def test_an_engine_may_be_made_and_closed_in_any_thread(pair, asked):
    prompt, params, tokens = asked[1]
    cores, texts = os.sched_getaffinity(0), []

    def live() -> None:
        engine = Engine.from_pretrained(*pair, **OPTIONS)
        texts.append(engine.generate(prompt, params).tokens)
        closing = threading.Thread(target=engine.close)
        closing.start()
        closing.join(WAIT_S)

    thread = threading.Thread(target=live)
    thread.start()
    thread.join(WAIT_S)
    assert texts == [tokens] and os.sched_getaffinity(0) == cores


def test_the_gap_of_two_logits_does_not_disturb_a_talk(engine):
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    first = engine.generate("the thing", params)
    prompt = [*engine.encode("the thing"), *first.tokens]
    assert engine.top_two_gap(prompt) > 0
    goes_on = engine.generate(prompt, params, continues=True)
    assert goes_on.tokens == engine.generate(prompt, params).tokens


def test_what_a_talk_still_finds_in_its_place_is_counted_after_somebody_else_was_there(narrow):
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    prompt = [40 + number % 50 for number in range(200)]
    first = narrow.generate(prompt, params)
    narrow.top_two_gap([7] * 5)
    prompt += [*first.tokens, *[60] * 30]
    stats = narrow.generate(prompt, params, continues=True).stats
    assert 0 < stats.cached_tokens < len(prompt)
    assert stats.passes[0].rows == len(prompt) - stats.cached_tokens


def test_what_an_engine_is_made_of_can_not_be_replaced(engine):
    for name in ("model", "tokenizer", "runtime", "config"):
        with pytest.raises(AttributeError):
            setattr(engine, name, None)


def test_a_requests_own_params_are_not_given_twice(engine, asked):
    prompt, params, tokens = asked[6]
    assert engine.submit(GenerationRequest(prompt, params)).result(WAIT_S).tokens == tokens
    with pytest.raises(UsageError, match="params of its own"):
        engine.submit(GenerationRequest(prompt, params), params)
