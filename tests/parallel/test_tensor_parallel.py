"""A target over two ranks, over gloo, writes what it writes in one process, in every mode."""

from __future__ import annotations

import pytest
import tiny
from programs import free_port, printed_by, start, torchrun

from pearl.core.params import SamplingParams
from pearl.core.schedule import MODES
from pearl.engine import Engine

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.slow]

PROMPT = "def the(thing):\n"
GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=1.0, seed=7)
OPTIONS: dict = dict(dtype="float32", max_length=256)
WRITING = [mode for mode in MODES if mode != "ar-all"]


@pytest.fixture(scope="module")
def alone(pair):
    """The same target in one process."""
    with Engine.from_pretrained(*pair, mode="ar", **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def engine(pair):
    with Engine.from_pretrained(*pair, tensor_parallel_size=2, max_sequences=3, **OPTIONS) as engine:
        yield engine


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_every_mode_writes_what_the_ranks_write_without_a_drafter(engine, params):
    texts = {mode: engine.generate(PROMPT, params, mode=mode) for mode in WRITING}
    assert {mode: text.tokens for mode, text in texts.items()} == dict.fromkeys(WRITING, texts["ar"].tokens)
    assert len(texts["sd"].stats.passes) < params.max_new_tokens  # guesses came true


def test_greedy_texts_are_those_of_one_process(engine, alone):
    assert engine.generate(PROMPT, GREEDY).tokens == alone.generate(PROMPT, GREEDY).tokens


def test_the_logits_are_whole_and_nearly_those_of_one_process(engine, alone, record_property):
    text = [(7 * i) % tiny.SHARED for i in range(150)]  # longer than a forward over a prompt
    sides = [(0, 5), (1, 6), (4, 7)]
    for reader in (engine.model, alone.model):
        reader.forget()
    ours, theirs = (reader.read(text, 4, side_rows=sides) for reader in (engine.model, alone.model))
    assert ours.shape == theirs.shape == (7, tiny.SHARED + 16)
    gap = float((ours - theirs).abs().max())  # sums are made of two parts, so the last bits differ
    record_property("logit_gap", gap)
    assert gap < 1e-4 * float(theirs.abs().max())
    best = theirs.topk(2).values
    assert bool(((ours.argmax(1) == theirs.argmax(1)) | (best[:, 0] - best[:, 1] < 2 * gap)).all())


def test_each_rank_caches_its_own_heads(engine, alone):
    for reader in (engine.model, alone.model):
        reader.read([1, 2, 3], 1)

    def heads(reader) -> set[int]:
        return {keys.shape[1] for keys, _ in reader.buffers.all_layers()}

    assert (heads(engine.model._shard), heads(alone.model)) == ({1}, {2})


def test_several_texts_side_by_side_are_those_written_alone(engine):
    prompts = [PROMPT, "in the end", "the"]
    texts = engine.generate(prompts, GREEDY, mode="pearl")
    assert [text.tokens for text in texts] == [engine.generate(prompt, GREEDY, mode="ar").tokens for prompt in prompts]


def test_a_second_text_may_continue_the_first(engine):
    first = engine.generate(PROMPT, GREEDY, mode="tree")
    longer = [*engine.encode(PROMPT), *first.tokens, 70, 71]
    continued = engine.generate(longer, GREEDY, mode="tree", continues=True).tokens
    assert continued == engine.generate(longer, GREEDY, mode="ar").tokens


SCRIPT = """
import sys
from pearl import Engine, SamplingParams

with Engine.from_pretrained(*sys.argv[1:], dtype="float32", max_length=256, tensor_parallel_size=2) as engine:
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    runtime, tokens = engine.runtime, engine.generate("def the(thing):\\n", params).tokens
    print(*tokens, runtime.drafter_pid, runtime._workers.pids)
"""


def test_under_torchrun_on_two_nodes_the_last_rank_drafts(engine, pair, tmp_path):
    """Of two ranks on the first, one on the second."""
    where = ["--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    nodes = [
        start(tmp_path, SCRIPT, *pair, launcher=torchrun(*where, "--node_rank", str(node), "--nproc_per_node", count))
        for node, count in enumerate("21")
    ]
    printed, nothing = printed_by(nodes)
    assert printed.split() == [*map(str, engine.generate(PROMPT, GREEDY).tokens), "None", "[]"] and not nothing
