"""Forwards of fixed shape say, bit for bit, what those of today say; without a graph, and with what stands for one."""

from __future__ import annotations

import itertools
import random

import pytest
import tiny
import torch
from numerics import Recorder, prepared
from tiers import tiered

from pearl.core.token_buckets import ANY, LIMIT, PREFILL_CHUNK, SLOT_MULTIPLE, BatchedTokenBuckets, TokenBuckets
from pearl.models.draft_model import DraftModel, LeavesQuery
from pearl.models.hidden_states import HiddenStateHooks
from pearl.models.static_shapes import recordings as recordings_module
from pearl.models.static_shapes.inputs import StaticInputs
from pearl.models.static_shapes.one_text import COUNTS, DRAFT_COUNTS, PATHS, StaticShapeRunner
from pearl.models.static_shapes.recordings import Recordings
from pearl.models.verifier import SequenceQuery, VerifierModel

SAFE = TokenBuckets(tuple(range(4, LIMIT + 1)), ANY.cost_s)  # bits that no kernel here tells apart


def pair(name: str, dtype: str, kernel: str = "stock") -> tuple[VerifierModel, VerifierModel]:
    """Two readers of one model: of today, and with fixed shapes, of row counts whose bits are equal here."""
    plain = prepared(name, dtype, kernel)
    assert plain.buckets.exact, "some row counts agree on any CPU: the measurement is broken"
    fixed = VerifierModel(plain.model, plain.vocabulary, plain.max_length, plain.buckets)
    fixed.enable_static_shapes([count for count in COUNTS if count in plain.buckets.safe])
    return plain, fixed


def tree(rng: random.Random, most: int) -> tuple[int, list[tuple[int, int]]]:
    """Rows of a chain, and side rows that hang anywhere."""
    chain = rng.randint(1, most)
    sides: list[tuple[int, int]] = []
    for row in range(chain, rng.randint(chain, most)):
        sides.append((rng.randrange(row), rng.randrange(tiny.VOCABULARY)))
    return chain, list(dict.fromkeys(sides))


@pytest.mark.parametrize("kernel", ["stock", "auto"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", tiered(["llama", "qwen3", "gpt2"], lambda name: name == "llama"))
def test_every_pass_has_the_bits_of_today(name, dtype, kernel):
    plain, fixed = pair(name, dtype, kernel)
    rng = random.Random(name + dtype)
    text = [rng.randrange(tiny.VOCABULARY) for _ in range(SLOT_MULTIPLE - 30)]
    paths = set()
    while len(text) < tiny.LENGTH - LIMIT:
        chain, sides = tree(rng, min(LIMIT, plain.buckets.up_to(len(text) - 1)))
        text += [rng.randrange(tiny.VOCABULARY) for _ in range(chain - 1)]
        said = [reader.read(text, chain, side_rows=sides) for reader in (plain, fixed)]
        assert torch.equal(*said)
        row, way = 0, []  # the text takes the chain for a while, or a branch
        while (next_rows := [i for i, side in enumerate(sides) if side[0] == row]) and rng.random() < 0.8:
            way.append(sides[next_rows[0]][1])
            row = chain + next_rows[0]
        paths.add(len(sides))
        text = text[: len(text) - chain + 1] + way if way else text[: len(text) - rng.randrange(chain)]
        text.append(rng.randrange(tiny.VOCABULARY))
    assert len(paths) > 3 and fixed.static and fixed.static.shapes > 3


@pytest.mark.parametrize("name", ["gemma2", "deepseek"])
def test_models_with_an_attention_of_their_own_keep_their_bits(name):
    plain, fixed = pair(name, "float32")
    text = [3 * i % tiny.VOCABULARY for i in range(40)]
    for keep in (1, 3, 8, 2):
        text += [keep] * keep
        assert torch.equal(plain.read(text, keep), fixed.read(text, keep))


def test_the_cache_is_the_same_afterwards():
    plain, fixed = pair("llama", "float32")
    for keep in (5, 2, 9):
        text = list(range(60 + keep))
        for reader in (plain, fixed):
            reader.read(text, keep, side_rows=[(0, 7), (keep, 8)])
    for ours, theirs in zip(fixed.buffers.all_layers(), plain.buffers.all_layers(), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a[:, :, :69], b[:, :, :69])


def test_each_text_has_its_own_slots_and_layers_are_tapped_as_before():
    model = tiny.random_model(tiny.CONFIGS["llama"]())
    hooks = HiddenStateHooks(model, (0, 1))
    plain, fixed = (tiny.verifier(model, buckets=SAFE, max_sequences=2, hooks=hooks) for _ in range(2))
    fixed.enable_static_shapes(capture=Recorder())
    texts = [list(range(40)), list(range(70, 100))]
    for step in range(6):
        for number, text in enumerate(texts):
            sides = [(0, 9), (0, 11)] if step % 2 else []
            keep = 2 + step
            text += [(13 * step + number) % tiny.VOCABULARY] * keep
            logits, features = [], []
            for one in (plain, fixed):
                logits.append(one.read(text, keep, side_rows=sides, batch_slot=number))
                features.append(one.features(range(-1 if step == 0 else 0, keep + len(sides)), batch_slot=number))
            assert torch.equal(*logits)
            assert (features[0] == features[1]).all() and features[0].shape[1] == 2 * model.config.hidden_size


@pytest.mark.parametrize("vocabulary", [0, 40])
def test_a_drafters_leaves_are_the_same(vocabulary):
    from pearl.models.reduced_head import reduce_vocab

    def make(fixed: bool) -> DraftModel:
        model = tiny.random_model(tiny.CONFIGS["llama"]())
        made = tiny.draft_model(model, head=reduce_vocab(model, vocabulary) if vocabulary else None)
        if fixed:
            made.enable_static_shapes()
        return made

    plain, fixed = make(False), make(True)
    rng = random.Random(5)
    text = [rng.randrange(tiny.VOCABULARY) for _ in range(50)]
    for _ in range(40):
        paths = [tuple(rng.randrange(4) for _ in range(rng.randrange(4))) for _ in range(rng.randint(1, 4))]
        paths = list(dict.fromkeys(paths))
        a, b = (reader.read_leaves(text, paths) for reader in (plain, fixed))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # its bits are of no account
        assert (a.argmax(-1) == b.argmax(-1)).all()
        text.append(rng.randrange(tiny.VOCABULARY))
    assert fixed.static and fixed.static.shapes > 2


def test_a_draft_model_reads_any_number_of_tokens_at_once():
    plain, fixed = (tiny.draft_model(tiny.random_model(tiny.CONFIGS["llama"]())) for _ in range(2))
    fixed.enable_static_shapes(DRAFT_COUNTS)
    text = [7 * i % tiny.VOCABULARY for i in range(PREFILL_CHUNK)]
    for count in range(1, PREFILL_CHUNK + 1):
        for reader in (plain, fixed):
            reader.forget()
        said = [reader.read(text[:count], 1) for reader in (plain, fixed)]
        torch.testing.assert_close(*said, rtol=1e-3, atol=1e-3)
    assert fixed.static and fixed.static.shapes == len(DRAFT_COUNTS) + 1


def test_rare_tokens_of_a_draft_head_stay_where_a_graph_reads_them():
    from pearl.models import reduced_head

    model = tiny.random_model(tiny.CONFIGS["llama"]())
    plain, settled = (reduced_head.ReducedVocabHead(model.lm_head, torch.arange(20)) for _ in range(2))
    settled.settle()
    x = torch.randn(2, model.config.hidden_size)
    for made in (plain, settled):
        made.observe_tokens([1, 2, 30, 31])
    rows = settled._rare_rows.data_ptr()
    for text in ([1, 2, 30, 31, 32], [1, 2], list(range(20, 150)), [5, 99]):
        for made in (plain, settled):
            made.forget()
            made.observe_tokens(text)
        assert plain.layout[0] == settled.layout[0]
        torch.testing.assert_close(plain(x), settled(x))
    assert rows == settled._rare_rows.data_ptr()
    before = settled.layout
    settled._make_room(2)
    settled.observe_tokens(list(range(20, 60)))
    assert settled.layout != before  # a graph of before would read tensors that are gone


def test_coarse_buckets_are_few_and_waste_little():
    buffers = tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"]()), coarse=True).buffers
    buffers.slots = 1 << 15
    found = [buffers.seen(end) for end in range(1, buffers.slots + 1)]
    assert len(set(found)) < 40
    assert all(seen >= end and seen % SLOT_MULTIPLE == 0 for end, seen in enumerate(found, 1))
    assert all(seen <= 1.25 * end + SLOT_MULTIPLE for end, seen in enumerate(found, 1))
    # a pass ends at a multiple of slots, so all of its rows read as many slots, however it is cut
    assert all(
        len({found[i] for i in range(at, at + SLOT_MULTIPLE)}) == 1 for at in range(0, buffers.slots, SLOT_MULTIPLE)
    )


def test_a_shape_is_recorded_once_and_replayed_ever_after():
    reader = tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"]()), buckets=SAFE)
    recorder = Recorder()
    reader.enable_static_shapes(capture=recorder)
    text = list(range(30))
    reader.read(text, 1)
    for keep in itertools.islice(itertools.cycle((1, 2, 3, 4)), 20):
        text = [*text, *[keep] * keep]
        reader.read(text, keep)
    assert recorder.recorded == reader.static.shapes <= 3
    assert recorder.replayed == 20


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_whole_pieces_of_prompts_have_the_bits_of_today_and_are_recorded_when_they_come_again(name):
    plain, fixed = (
        tiny.verifier(tiny.random_model(tiny.CONFIGS[name]()), buckets=SAFE, max_sequences=2) for _ in range(2)
    )
    recorder = Recorder()
    fixed.enable_static_shapes(capture=recorder)
    for number, seed in enumerate((1, 2, 3)):
        prompt = [(seed * 7 * i) % tiny.VOCABULARY for i in range(PREFILL_CHUNK + 40)]
        for reader in (plain, fixed):
            reader.forget(batch_slot=1)
        for end, keep in ((PREFILL_CHUNK, 1), (PREFILL_CHUNK + 9, 9)):
            said = [reader.read(prompt[:end], keep, batch_slot=1) for reader in (plain, fixed)]
            assert said[0].shape == (keep, tiny.VOCABULARY) and torch.equal(*said)
        assert recorder.recorded == (1 if number == 0 else 2)  # the nine rows at once, the piece when it comes again
    assert recorder.replayed == 5
    scored = [reader.read(prompt[:PREFILL_CHUNK], PREFILL_CHUNK, batch_slot=0) for reader in (plain, fixed)]
    assert torch.equal(*scored) and recorder.replayed == 5  # what asks for every row is no such piece


def test_texts_side_by_side_replay_one_recording_whoever_they_are():
    reader, plain = (
        tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"]()), buckets=SAFE, max_sequences=4) for _ in range(2)
    )
    for one in (reader, plain):
        one.batched_buckets = BatchedTokenBuckets((4, 8, 16), (1.0, 1.0, 1.0))
    recorder = Recorder()
    reader.enable_static_shapes(capture=recorder)
    texts = [[(3 + slot) * i % tiny.VOCABULARY for i in range(30 + slot)] for slot in range(4)]
    for one in (reader, plain):
        for slot, text in enumerate(texts):
            one.read(text, 1, batch_slot=slot)
    before = recorder.recorded
    for step, who in enumerate([(0, 1), (2, 3), (0, 3), (1, 2), (0, 1)]):
        queries = []
        for slot in who:
            texts[slot] += [step, slot]
            queries.append(SequenceQuery(slot, texts[slot], 2, [(0, 5 + slot), (2, 9)] if step > 2 else []))
        assert all(map(torch.equal, *(one.read_together(queries) for one in (reader, plain))))
        if step > 2:
            for slot in who:  # on along a branch
                texts[slot][-1:] = [5 + slot, 9]
    assert recorder.recorded - before == 2 == reader.shared.shapes  # of chains, and of trees
    assert recorder.replayed - before == 3  # each but for the first time


def test_drafts_of_texts_side_by_side_are_the_same():
    plain, fixed = (tiny.draft_model(tiny.random_model(tiny.CONFIGS["llama"]()), max_sequences=3) for _ in range(2))
    recorder = Recorder()
    fixed.enable_static_shapes(DRAFT_COUNTS, recorder)
    rng = random.Random(5)
    texts = [[rng.randrange(tiny.VOCABULARY) for _ in range(20 + 30 * slot)] for slot in range(3)]
    for _ in range(12):
        queries = []
        for slot in sorted(rng.sample(range(3), rng.randint(2, 3))):
            paths = [tuple(rng.randrange(4) for _ in range(rng.randrange(4))) for _ in range(rng.randint(1, 3))]
            queries.append(LeavesQuery(slot, texts[slot], list(dict.fromkeys(paths))))
        for a, b in zip(*(reader.read_leaves_together(queries) for reader in (plain, fixed)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        for one in queries:
            texts[one.batch_slot].append(rng.randrange(tiny.VOCABULARY))
    assert fixed.shared.shapes > 2 and recorder.replayed > 2


def test_of_many_recordings_those_replayed_last_are_kept(monkeypatch):
    monkeypatch.setattr(recordings_module, "MOST", 2)
    recorder, made = Recorder(), []
    recordings = Recordings(recorder)
    for shape in "aabacab":
        recordings.run(shape, lambda shape=shape: made.append(shape))
    assert recorder.recorded == 4  # a, b, c, and b again, which went for c
    assert len(recordings) == 3 and set(made) == set("abc")


def test_if_recording_fails_it_says_so_once_and_goes_on(caplog):
    def fails(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    reader = tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"]()), buckets=SAFE)
    plain = tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"]()), buckets=SAFE)
    reader.enable_static_shapes(capture=fails)
    for keep in (1, 2, 9):
        text = list(range(40 + keep))
        assert torch.equal(reader.read(text, keep), plain.read(text, keep))
    assert "not permitted" in reader.static.failed
    assert caplog.text.count("eagerly") == 1


def test_inputs_of_a_smaller_shape_leave_nothing_behind():
    """What a wide pass left in the buffers is not seen by a narrow one."""
    reader, plain = (tiny.verifier(tiny.random_model(tiny.CONFIGS["llama"]()), buckets=SAFE) for _ in range(2))
    reader.enable_static_shapes()
    wide = list(range(16))
    reader.read(wide, 16)
    reader.forget()
    assert isinstance(reader.static, StaticShapeRunner) and isinstance(reader.static._inputs, StaticInputs)
    assert torch.equal(reader.read([5, 6], 2), plain.read([5, 6], 2))
    assert PATHS[-1] == LIMIT == COUNTS[-1]
