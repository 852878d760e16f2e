"""What an engine remembers of texts and prompts over texts, and over engines where somebody asks for it."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pearl.core.params import SamplingParams
from pearl.drafters.text_memory import TextMemory
from pearl.engine import Engine
from pearl.errors import UsageError
from pearl.machine.files import held

pytestmark = pytest.mark.usefixtures("own_cache")

PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)
PROMPT = "def the(thing):\n" * 12  # more than a piece
ONE_CORE = str(min(os.sched_getaffinity(0)))


def opened(target: str, **options: object) -> Engine:
    alone = {"mode": "ar", "processes": 1, "dtype": "float32", "max_length": 300, "target_cores": ONE_CORE}
    return Engine.from_pretrained(target, **{**alone, **options})  # type: ignore[arg-type]


def test_texts_are_remembered_on_disk_and_prompts_in_the_engine(pair, tmp_path):
    path = tmp_path / "memory.npz"
    with opened(pair[0], memory=1, memory_file=str(path)) as engine:
        first, again = (engine.generate(PROMPT, PARAMS) for _ in range(2))
        with pytest.raises(UsageError, match="prediction must be token ids below"):
            engine.submit(PROMPT, PARAMS, prediction=[1 << 40])
        predicted = engine.submit(PROMPT, PARAMS, prediction=first.tokens).result()
        scored = engine.generate(PROMPT, replace(PARAMS, prompt_logprobs=1))
        vocabulary = engine.runtime.checked.vocabulary
    assert scored.tokens == first.tokens and scored.stats.cached_tokens == 0, "it was read whole"
    assert first.tokens == again.tokens == predicted.tokens
    assert (first.stats.cached_tokens, again.stats.cached_tokens % 128) == (0, 0) and again.stats.cached_tokens > 0
    assert sum(one.rows for one in first.stats.passes) - sum(one.rows for one in again.stats.passes) == (
        again.stats.cached_tokens
    )
    memory = TextMemory(1)
    memory.load(path, vocabulary)
    assert memory.texts == 1, "three times the same"
    text = [*engine.encode(PROMPT), *first.tokens]
    found = memory.find(text[:-5])
    assert found is not None and memory.after(found.place, 99) == text[-5:]
    path.write_bytes(b"damaged")
    with pytest.raises(UsageError, match="delete it"):
        opened(pair[0], memory=1, memory_file=str(path))


def test_a_memory_that_can_t_be_had_or_kept_is_refused_before_models_are_loaded(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("pearl.parallel.runtime.load_target", lambda *_: pytest.fail("it was loaded"))
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "memory.npz"):
        with pytest.raises(UsageError, match=r"[Nn]ame a"):
            opened(pair[0], memory=1, memory_file=str(place))
    (tmp_path / "garbage").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="delete it"):
        opened(pair[0], memory=1, memory_file=str(tmp_path / "garbage"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=4e9))
    with pytest.raises(UsageError, match="memory 2500 is more than half of the 4000 MB that are free"):
        opened(pair[0], memory=2500)


def test_two_engines_do_not_keep_their_memories_in_one_file(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("pearl.machine.files.PATIENCE_S", 0.05)
    path = tmp_path / "memory.npz"
    taken = r"Another engine keeps its memory in .*: wait for its end, or name"
    with opened(pair[0], memory=1, memory_file=str(path)), pytest.raises(UsageError, match=taken):
        opened(pair[0], memory=1, memory_file=str(path))
    with opened(pair[0], memory=1, memory_file=str(path)) as engine:
        assert "memory: 0 tokens of earlier texts, up to 1 MB" in engine.runtime.description.splitlines()


def test_the_start_says_what_a_smaller_memory_has_no_room_for(pair, tmp_path):
    path = tmp_path / "memory.npz"
    with opened(pair[0], memory=1, memory_file=str(path)) as engine:
        vocabulary = engine.runtime.checked.vocabulary
    large = TextMemory(1)
    for text in range(40):
        large.add([text + 1] * 60)
    large.save(path, vocabulary)
    with opened(pair[0], memory=0.02, memory_file=str(path)) as engine:
        (line,) = (one for one in engine.runtime.description.splitlines() if one.startswith("memory: "))
        assert f"of the {large.size:,} in {path} no more fit in" in line


def test_a_file_is_given_back_by_another_thread_than_took_it(tmp_path):
    """An engine is closed in a thread of its own."""
    took = ExitStack()
    took.enter_context(held(tmp_path / "lock", "it is taken"))
    closing = threading.Thread(target=took.close)
    closing.start()
    closing.join()
    with held(tmp_path / "lock", "it is taken"):
        pass


def test_without_a_prefix_cache_every_prompt_is_read(pair):
    with opened(pair[0], prefix_cache_gb=0) as engine:
        assert [engine.generate(PROMPT, PARAMS).stats.cached_tokens for _ in range(2)] == [0, 0]
