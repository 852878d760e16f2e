"""The ranks of a target: which they are, what is refused, and that a lost one ends the run with a sentence."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import Gemma4TextConfig

from pearl.checkpoints.preflight import preflight
from pearl.config.engine_config import EngineConfig
from pearl.core.params import SamplingParams
from pearl.engine import Engine
from pearl.errors import UsageError, WorkerLostError
from pearl.evaluation import eval_config
from pearl.models.tensor_parallel import model as shards
from pearl.models.tensor_parallel.commands import Forget, SlotTokens
from pearl.parallel import child, process_groups, tensor_parallel
from pearl.tasks import gsm8k

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.slow]

PROMPT = "def the(thing):\n"
GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)
OPTIONS: dict = dict(dtype="float32", max_length=256)


@contextlib.contextmanager
def opened(pair, monkeypatch, deadline_s: float):
    """The target's ranks alone."""
    monkeypatch.setattr(tensor_parallel, "RANK_TIMEOUT_S", deadline_s)
    with Engine.from_pretrained(*pair, mode="ar", tensor_parallel_size=2, **OPTIONS) as engine:
        yield engine


def said_in_the_end(engine) -> str:
    """What a text ends with now; there is no other after it."""
    with pytest.raises(WorkerLostError) as raised:
        engine.generate(PROMPT, GREEDY)
    with pytest.raises(WorkerLostError, match="ranks are out of step: make another one"):
        engine.generate(PROMPT, GREEDY)
    return str(raised.value)


def test_a_rank_that_is_killed_ends_the_run_with_a_sentence(pair, monkeypatch):
    with opened(pair, monkeypatch, 300) as engine:
        (rank,) = engine.runtime._workers._children
        rank.kill()
        assert said_in_the_end(engine).startswith("Rank 1 of the target ended with signal 9, and the run is over")


def test_an_error_of_a_rank_is_the_sentence_that_the_run_ends_with(pair, monkeypatch):
    with opened(pair, monkeypatch, 300) as engine:
        (rank,) = engine.runtime._workers._children
        engine.runtime._workers.say(Forget(SlotTokens(9, ())))
        assert said_in_the_end(engine).startswith("Rank 1 of the target failed, and the run is over: IndexError")
        assert rank.wait(60) == 1


def test_a_rank_that_hangs_is_waited_for_until_the_deadline_and_ends_when_it_wakes(pair, monkeypatch):
    with opened(pair, monkeypatch, 3) as engine:
        time.sleep(4)
        assert engine.generate(PROMPT, GREEDY).tokens  # nothing to do is no silence
        (rank,) = engine.runtime._workers._children
        os.kill(rank.pid, signal.SIGSTOP)
        try:
            assert "is gone, or has said nothing for 3 s" in said_in_the_end(engine)
            engine.runtime._workers.let_go()  # as when the process of the first rank dies
        finally:
            os.kill(rank.pid, signal.SIGCONT)
        assert rank.wait(60) == 1


def test_a_rank_that_can_not_start_is_a_sentence(pair, monkeypatch):
    monkeypatch.setattr(child.sys, "executable", "false")
    with pytest.raises(WorkerLostError, match=r"^Rank 1 of the target ended with code 1, and the run is over"):
        Engine.from_pretrained(*pair, mode="ar", tensor_parallel_size=2, **OPTIONS)


def test_a_line_carries_words_of_any_number_and_has_a_deadline():
    store, lines = torch.distributed.HashStore(), {}

    def make(rank: int) -> None:
        lines[rank] = process_groups.CommandBroadcast(store, rank, 2, 1.0, "127.0.0.1")

    other = threading.Thread(target=make, args=(1,))
    other.start()
    make(0)
    other.join()
    for count in (1, 62, 63, 64, 65, 5000):
        lines[0].send(range(count))
        assert lines[1].receive() == list(range(count))
    with pytest.raises(process_groups.RankLost, match=r"(?i)timed out"):
        lines[1].receive()


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"tensor_parallel_size": 0}, "must be a number of ranks from 1 to 64"),
        ({"tensor_parallel_size": 2, "target_device": "cuda:0,cuda:1"}, "choose GPUs with CUDA_VISIBLE_DEVICES"),
        ({"tensor_parallel_size": 2, "load_in": "4bit"}, "load_in 4bit is for a target of one process"),
        ({"tensor_parallel_size": 2, "kernel": "packed"}, "kernel packed is for a target of one process"),
    ],
)
def test_options_that_ranks_do_not_have_are_refused(changed, says):
    with pytest.raises(UsageError, match=says):
        EngineConfig(**changed)


@pytest.mark.parametrize("mode", ["ar-all", "hf-prompt-lookup"])
def test_modes_that_ranks_do_not_have_are_refused(mode, pair, tmp_path):
    words = [
        "--target",
        pair[0],
        "--tensor-parallel-size",
        "2",
        "--mode",
        "ar",
        mode,
        "--output",
        str(tmp_path / "run"),
    ]
    with pytest.raises(UsageError, match=f"{mode} needs a target of one process"):
        eval_config.read(gsm8k.BENCHMARK, [*words, "--data", str(asked(tmp_path))])


def asked(folder: Path) -> Path:
    """A file with a problem."""
    file = folder / "test.jsonl"
    file.write_text('{"question": "What is 1 + 1?", "answer": "It is 2.\\n#### 2"}\n')
    return file


@pytest.mark.parametrize(
    "name, count, says",
    [
        ("llama", 4, "tensor_parallel_size 4 does not divide the 2 key-value heads of it: use 2"),
        ("llama", 3, "tensor_parallel_size 3 does not divide the 4 attention heads of it: use 2 or 4"),
        ("gpt2", 2, r"no tensor-parallel plan for it \(gpt2\)"),
    ],
)
def test_models_that_can_not_be_spread_are_refused(name, count, says):
    with pytest.raises(UsageError, match=says):
        shards.check(tiny.CONFIGS[name](), count, "it")


def test_each_layer_has_its_own_number_of_heads():
    sizes = tiny.SIZES | {"num_key_value_heads": 2, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    config = Gemma4TextConfig(**sizes, layer_types=["sliding_attention", "full_attention"], head_dim=16)
    with pytest.raises(UsageError, match="does not divide the 1 key-value heads of it"):
        shards.check(config, 2, "it")


def test_a_quantized_checkpoint_is_refused():
    config = tiny.CONFIGS["llama"]()
    config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(UsageError, match="it is quantized"):
        shards.check(config, 2, "it")


def test_a_whole_attention_may_have_any_number_of_heads():
    shards.check(tiny.CONFIGS["phi3"](), 3, "it")


def test_a_rank_needs_a_gpu_of_its_own_where_there_are_some(pair, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("pearl.checkpoints.placement.check_memory", lambda *_: None)
    config = EngineConfig(*pair, tensor_parallel_size=2, dtype="float32")
    placed = preflight(config, gpu=2)
    assert (placed.target_on.devices, placed.draft_on.devices) == (("cuda:1",), ("cuda:1",))  # this is the drafter
    assert preflight(config).target_on.devices == ("cuda:0",)
    four = replace(config, tensor_parallel_size=4)
    monkeypatch.setattr(shards, "check", lambda *_: None)
    with pytest.raises(UsageError, match="4 ranks of the target need 4 GPUs on this machine, which has 2"):
        preflight(four)
    assert preflight(four, ranks=2).target_on.devices == ("cuda:0",)
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES= hides them"):
        preflight(replace(config, target_device="cpu"))
