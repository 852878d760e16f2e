"""What was read of a prompt is put back with the bits that reading it would leave, whoever read it, and when.

A reader with a store is compared with one without, over a few tiny models: windows shorter than a prompt, values
narrower than keys, half precision. Caches are compared themselves, not only what comes of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import examples, letters
from transformers import Gemma3TextConfig

from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.core.token_buckets import PREFILL_CHUNK
from pearl.models.draft_model import LeavesQuery
from pearl.models.hidden_states import HiddenStateHooks
from pearl.models.kv_cache.prefix_cache import EMPTY, Piece, PrefixCache, digest
from pearl.models.verifier import VerifierModel
from pearl.roles.sequence import SequenceRequest
from pearl.roles.target import Target

P = PREFILL_CHUNK
LONG = 4 * P  # tokens of a text
LONGER = {"max_position_embeddings": LONG}
MODELS = ("llama", "deepseek", "windows", "gpt2")


@functools.cache
def readers(name: str, dtype: str = "bfloat16") -> tuple[VerifierModel, VerifierModel]:
    """With a store and without one, of the same model."""
    if name == "windows":
        kinds = ["sliding_attention", "full_attention"]
        sizes = tiny.SIZES | LONGER
        config = Gemma3TextConfig(**sizes, head_dim=16, sliding_window=40, layer_types=kinds)
    else:
        config = tiny.CONFIGS[name]()
        config.max_position_embeddings = LONG
    model = tiny.random_model(config, dtype=dtype)
    hooks = HiddenStateHooks(model, (0, 1))
    return tuple(  # type: ignore[return-value]
        tiny.verifier(model, max_length=LONG, hooks=hooks, max_sequences=3) for _ in range(2)
    )


def text_of(seed: int, length: int) -> list[int]:
    return torch.randint(tiny.VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def cached(model: VerifierModel, slot: int, length: int) -> list[torch.Tensor]:
    return [part[slot, :, :length].clone() for pair in model.buffers.all_layers() for part in pair]


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def read(model: VerifierModel, prompt: list[int], slot: int) -> tuple[int, torch.Tensor, list[torch.Tensor]]:
    """A new text in a slot: how much of it was restored, its logits, its cache."""
    model.forget(batch_slot=slot)
    count = model.restore(prompt[:-1], slot)
    logits = model.read(prompt, 1, batch_slot=slot)
    return count, logits, cached(model, slot, len(prompt))


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_that_was_read_before_leaves_the_bits_of_a_fresh_reading(name: str):
    kept, fresh = readers(name)
    kept.keep_prefixes(100)
    header = text_of(1, 2 * P + 9)
    for number, (length, slot, restored) in enumerate([(300, 0, 0), (311, 1, 2 * P), (300, 2, 2 * P), (2 * P, 0, P)]):
        prompt = [*header, *text_of(2 + number % 2, length)][:length]
        count, logits, cache = read(kept, prompt, slot)
        assert count == restored, "the whole pieces that they share, but never the last token"
        _, wanted, there = read(fresh, prompt, slot)
        assert torch.equal(logits, wanted) and same(cache, there)
        rows = range(1 - len(prompt) + count, 1)
        mine, all_of_it = kept.features(rows, slot), fresh.features(range(1 - len(prompt), 1), slot)
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(all_of_it)[count:])


@pytest.mark.parametrize("name", MODELS[:1])
def test_hidden_states_are_kept_with_a_piece(name: str):
    kept, fresh = readers(name)
    kept.keep_prefixes(100)
    prompt = text_of(5, 300)
    read(kept, prompt, 0)
    kept.forget()
    count = kept.restore(prompt[:-1])
    mine = torch.as_tensor(kept.features(range(1 - count, 1)))
    read(fresh, prompt, 0)
    assert count == 2 * P and torch.equal(mine, torch.as_tensor(fresh.features(range(1 - len(prompt), 1)))[:count])


@examples(15)
@given(st.data())
def test_in_any_order_in_any_slot_and_with_any_room_bits_are_those_of_a_fresh_reading(data: st.DataObject):
    kept, fresh = readers("llama")
    kept.keep_prefixes(1)
    assert kept.prefix_cache
    kept.prefix_cache.limit = data.draw(st.sampled_from([0, 200_000, 400_000, 10_000_000]))
    live: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(2, 8))):
        slot = data.draw(st.integers(0, 2))
        match data.draw(st.sampled_from(["new", "new", "goes on", "another turn"])):
            case "goes on" if slot in live and len(live[slot]) < LONG - 4:
                live[slot] = [*live[slot], *text_of(data.draw(st.integers(0, 3)), 3)]
                logits = kept.read(live[slot], 2, batch_slot=slot)
                continue
            case "another turn" if slot in live and len(live[slot]) < LONG - P:
                prompt = [*live[slot], *text_of(data.draw(st.integers(0, 3)), data.draw(st.sampled_from([1, 60, P])))]
                kept.forget(prompt[:-1], slot)
                assert kept.restore(prompt[:-1], slot) % P == 0
                kept.read(prompt, 1, batch_slot=slot)
            case _:
                length = data.draw(st.sampled_from([2, P - 1, P, P + 1, 2 * P, 2 * P + 30, 3 * P + 1]))
                cut = data.draw(st.integers(0, length))
                prompt = [*text_of(1, cut), *text_of(data.draw(st.integers(2, 3)), length - cut)]
                _, logits, cache = read(kept, prompt, slot)
                _, wanted, there = read(fresh, prompt, slot)
                assert torch.equal(logits, wanted) and same(cache, there)
        live[slot] = prompt
    assert kept.prefix_cache.nbytes <= kept.prefix_cache.limit


CUTS = [(290, 30), (300, 9), (40, 5), (200, 80), (290, 30)]  # tokens, and how many of them are a text's own
PROMPTS = [[*text_of(1, length - end), *text_of(2 + at, end)] for at, (length, end) in enumerate(CUTS)]


@pytest.mark.parametrize("slots", [1, 3])
def test_texts_are_the_same_and_each_says_what_it_did_not_read(slots: int):
    """One after the other and side by side; the first begins before there is anything to find."""
    kept, fresh = readers("llama", "float32")
    kept.keep_prefixes(100)
    params = SamplingParams(max_new_tokens=4)
    written = {}
    for model in (kept, fresh):
        requests = [
            SequenceRequest(prompt, params, Stopper(params, (), letters), user_data=n)
            for n, prompt in enumerate(PROMPTS)
        ]
        over = [text for text, committed in Target(model).write(requests, Schedule.of("ar"), slots) if not committed]
        written[model] = {text.request.user_data: text for text in over}
    for number, text in written[kept].items():
        plain = written[fresh][number]
        assert text.stopper.tokens == plain.stopper.tokens
        assert len(torch.cat([torch.as_tensor(part) for part in text.features])) == len(PROMPTS[number]) + 3
        assert torch.equal(
            torch.cat([torch.as_tensor(part) for part in text.features]),
            torch.cat([torch.as_tensor(part) for part in plain.features]),
        )
        assert plain.cached == 0 and text.passes[0].rows == len(PROMPTS[number]) - text.cached
    first, second, *others = [written[kept][number].cached for number in range(5)]
    assert first + second == 2 * P and others == [0, 0, 2 * P], "two that are read by turns help one another"
    assert first == 0 or slots > 1


def test_log_probabilities_of_a_prompt_are_read_and_what_follows_them_is_not_read_again():
    kept, fresh = readers("llama", "float32")
    kept.keep_prefixes(100)
    params = SamplingParams(max_new_tokens=3, prompt_logprobs=1)
    said = []
    for model in (kept, kept, fresh):
        (text,) = [
            text
            for text, committed in Target(model).write(
                [SequenceRequest(PROMPTS[0], params, Stopper(params, (), letters))], Schedule.of("ar")
            )
            if not committed
        ]
        said.append((text.stopper.tokens, text.prompt_logprobs))
    assert said[0] == said[1] == said[2]


def test_a_piece_whose_rows_are_all_asked_for_is_not_kept_where_shapes_are_static(monkeypatch: pytest.MonkeyPatch):
    """It has gone through other kernels than the piece that a text reads, so it has other bits."""
    kept, _ = readers("llama", "float32")
    kept.keep_prefixes(100)
    remembered: list[int] = []
    monkeypatch.setattr(kept, "_remember", lambda tokens, *_: remembered.append(len(tokens)))
    for static in (None, SimpleNamespace(supports=lambda count, keep: False)):
        monkeypatch.setattr(kept, "static", static)
        for keep in (1, P):
            kept.forget()
            kept.forward([5] * P, 0, keep=keep)
    assert remembered == [P, P, P], "all but the last"


# The drafter's side, whose bits are of no account


@pytest.mark.parametrize("chains", [True, False], ids=["chains", "trees"])
def test_a_drafter_goes_on_from_what_it_has_read_of_earlier_prompts(chains: bool, monkeypatch: pytest.MonkeyPatch):
    config = tiny.CONFIGS["llama"]()
    config.max_position_embeddings = LONG
    kept, fresh = (tiny.draft_model(tiny.random_model(config), max_length=LONG, max_sequences=2) for _ in range(2))
    kept.keep_prefixes(100)
    rows = []
    run = type(kept).run
    monkeypatch.setattr(type(kept), "run", lambda self, *one: rows.append((self, len(one[0]))) or run(self, *one))
    header = text_of(1, 2 * P + 9)
    texts = [[*header, *text_of(2 + n, 30)] for n in range(3)]
    for n, (text, slot) in enumerate(zip(texts, (0, 1, 0), strict=True)):
        said = []
        for model in (kept, fresh):
            model.forget(batch_slot=slot)
            rows.clear()
            paths = [(), (3,), (3, 4), (5,)]
            said.append(
                model.read(text, 1, batch_slot=slot)
                if chains
                else model.read_leaves_together([LeavesQuery(slot, text, paths)])[0]
            )
            read = sum(count for _, count in rows)
            assert (read < P) == (n > 0 and model is kept)
            if not chains:  # the text goes on, along the tree and beside it
                grown = [*text, 3, 4, 9]
                said.append(model.read_leaves_together([LeavesQuery(slot, grown, [(), (1,)])])[0])
        half = len(said) // 2
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(said[:half], said[half:], strict=True))


# The store


def piece(size: int = 10) -> Piece:
    return Piece([torch.zeros(size, dtype=torch.uint8)])


def test_what_was_not_used_for_longest_goes_first_and_the_end_of_a_text_before_its_beginning():
    store = PrefixCache(40)
    one, other = ([digest(EMPTY, [name]), digest(digest(EMPTY, [name]), [0])] for name in (1, 2))
    for first, second in (one, other):
        store.add(first, piece())
        store.add(second, piece(), [first])
    store.add(b"third", piece())
    assert len(store.find(one)) == 1 and len(store.find(other)) == 2, "the older text has lost its end"
    store.find(one)
    store.add(b"fourth", piece())
    store.add(b"fifth", piece())
    assert len(store.find([b"third"])) == 0 and len(store.find(other)) == len(store.find(one)) == 1
    assert store.nbytes == 40, "it holds as much as it may"


def test_a_piece_larger_than_the_store_is_not_kept():
    store = PrefixCache(5)
    store.add(b"key", piece())
    assert store.nbytes == 0 and store.find([b"key"]) == []


def test_a_digest_is_that_of_all_tokens_before():
    assert digest(digest(EMPTY, [1]), [2]) != digest(digest(EMPTY, [3]), [2])
    assert digest(EMPTY, [1, 2]) != digest(EMPTY, [2, 1])


def test_in_a_round_nothing_of_it_is_found_so_every_mode_reads_the_same():
    store = PrefixCache(35)
    store.add(b"warm-up", piece())
    store.begin_round()
    assert store.find([b"warm-up"]) == []
    for _ in ("ar", "pearl"):
        assert store.find([b"a"]) == []
        store.add(b"a", piece())
    store.begin_round()
    for mode in ("ar", "pearl"):
        assert len(store.find([b"a"])) == 1, mode
        for key in (b"b", b"c", b"d"):
            store.add(key, piece())
        assert store.nbytes <= 35
    store.begin_round()
    assert store.nbytes <= 35 * 3 / 4


def test_a_store_that_is_full_after_a_round_drops_the_end_of_a_text_too():
    keys = [bytes([number]) for number in range(5)]
    store = PrefixCache(50)
    store.begin_round()
    for number, key in enumerate(keys):
        store.add(key, piece(), keys[:number])
    store.begin_round()
    assert [len(store.find(keys[: number + 1])) for number in range(5)] == [1, 2, 3, 3, 3]


def test_what_is_to_be_forgotten_of_a_round_is_found_by_nobody():
    store = PrefixCache(35)
    store.begin_round()
    store.add(b"warm-up", piece())
    store.begin_round(forget=True)
    assert store.find([b"warm-up"]) == [] and store.nbytes == 0 and b"warm-up" not in store
