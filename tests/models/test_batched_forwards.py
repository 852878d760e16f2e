"""Several texts in one forward: each has, bit for bit, the logits that it has alone.

Every text of a reader goes its own way through passes of any width and shape, and some sit passes out. The reference
reads each text alone, one token a pass (`test_bits.Plain`). The last part breaks the code on purpose.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numerics import TREES, Plain, Step, Tree, close_model, measured, random_prompt, tree
from tiers import tiered
from toys import examples, falsified

import pearl.models.kv_cache.batch_cache
from pearl.core.token_buckets import LIMIT, SLOT_MULTIPLE, BatchedTokenBuckets
from pearl.machine.transfers import SentOnce
from pearl.models import linear
from pearl.models.batch_invariance import branches_agree, find_invariant_batches, products
from pearl.models.kv_cache.attention import AttentionMask
from pearl.models.kv_cache.batch_cache import BatchCache
from pearl.models.static_shapes.one_text import COUNTS
from pearl.models.verifier import SequenceQuery, VerifierModel

NAMES, DTYPES = ("llama", "qwen3", "gpt2", "gemma3"), ("float32", "bfloat16")
MODELS = [(name, dtype, False) for name in NAMES for dtype in DTYPES]
STATIC = [("llama", "float32", True), ("llama", "bfloat16", True), ("gemma3", "float32", True)]  # of static shapes
CHAINS = ("gemma2", "deepseek")
TEXTS = 5
PROMPTS = st.lists(
    st.sampled_from([1, 7, 61, SLOT_MULTIPLE - 20, SLOT_MULTIPLE - 3, SLOT_MULTIPLE + 2]),
    min_size=TEXTS,
    max_size=TEXTS,
)


@functools.cache
def made(name: str, dtype: str, texts: int = TEXTS, static: bool = False) -> tuple[VerifierModel, VerifierModel]:
    """A reader of several texts, and one for the reference, as loading prepares them. `static`: its forwards have
    static shapes."""
    model = close_model(name, dtype)
    linear.pack(model, linear.chosen("auto", model.dtype))
    reader = tiny.verifier(model, max_sequences=texts)
    reader.buckets = measured(reader)
    reader.buckets = replace(
        reader.buckets, branches=reader.verifies_trees and branches_agree(reader, reader.vocabulary)
    )
    if static:
        reader.enable_static_shapes([count for count in COUNTS if count in reader.buckets.safe])
    reader.batched_buckets = find_invariant_batches(reader, reader.vocabulary, products(model))
    reference = tiny.verifier(model)
    reference.buckets = reader.buckets
    return reader, reference


def check(reader: VerifierModel, reference: VerifierModel, lengths: Sequence[int], rounds: Sequence[Sequence[Step]]):
    """The claim of this file. `rounds`: in each a step of some texts; -2 as `taken` sits it out."""
    texts = []
    for text, length in enumerate(lengths):
        reader.forget(batch_slot=text)
        prompt = random_prompt(length + text)
        reader.read(prompt, 1, batch_slot=text)
        texts.append(([*prompt, 5], len(prompt)))
    references = {}
    for steps in rounds:
        asked: dict[int, tuple[Tree, Step]] = {}
        for text, step in enumerate(steps):
            tokens, _ = texts[text]
            if step.taken == -2:
                continue
            deepest = min(reader.buckets.up_to(len(tokens) - 1), tiny.LENGTH - len(tokens)) - 1
            asked[text] = tree(step, deepest, min(LIMIT, reader.buckets.most), reader.verifies_trees), step
        wanted = [
            SequenceQuery(text, [*texts[text][0], *rows.paths[rows.chain]], 1 + rows.chain, rows.sides)
            for text, (rows, _) in asked.items()
        ]
        found = reader.read_together(wanted) if wanted else []
        for (text, (rows, step)), logits in zip(asked.items(), found, strict=True):
            tokens, prompt = texts[text]
            if text not in references:
                references[text] = {}
            plain = references[text].setdefault("plain", None) or Plain(reference, tokens[:prompt])
            for path, row in zip(rows.paths, logits, strict=True):
                assert torch.equal(row, plain.after([*tokens, *path])), f"text {text} after {path} of {rows}"
            if step.taken >= 0:
                tokens += [*rows.paths[step.taken % len(rows.paths)], step.then]


ROUNDS = st.lists(
    st.lists(
        st.builds(Step, st.one_of(st.just(()), TREES), st.integers(-2, 2 * LIMIT), st.integers(0, 3)),
        min_size=TEXTS,
        max_size=TEXTS,
    ),
    min_size=2,
    max_size=4,
)


@pytest.mark.parametrize("name, dtype, static", tiered([*MODELS, *STATIC], lambda one: one[0] == "llama"))
@settings(examples(3), phases=[Phase.generate])
@given(lengths=PROMPTS, rounds=ROUNDS)
def test_a_texts_bits_do_not_depend_on_the_texts_beside_it(name, dtype, static, lengths, rounds):
    reader, reference = made(name, dtype, static=static)
    assert reader.buckets.exact and reader.batched_buckets, "on this machine nothing is promised"
    check(reader, reference, lengths, rounds)


@pytest.mark.parametrize("most", [2, 8, 17])
def test_a_text_with_more_rows_than_any_shared_forward_has_one_of_its_own(most: int):
    reader = tiny.verifier(close_model("llama", "float32"), max_sequences=2)
    queries = [SequenceQuery(slot, random_prompt(40 + slot), 4 + 8 * slot) for slot in (0, 1)]
    wanted = [reader.read(one.tokens, one.keep, batch_slot=one.batch_slot) for one in queries]
    for slot in (0, 1):
        reader.forget(batch_slot=slot)
    reader.batched_buckets = BatchedTokenBuckets(tuple(range(2, most + 1)), (1.0,) * (most - 1))
    for found, logits in zip(reader.read_together(queries), wanted, strict=True):
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)


# Break the code on purpose: the property has to fail.


def read_the_neighbours_keys(patch: pytest.MonkeyPatch) -> None:
    """Where there is one before the run of texts."""
    run = pearl.models.kv_cache.batch_cache._group

    def wrong(shares):
        right = run(shares)
        back = min(1, right.batch_slots.start)
        return replace(right, batch_slots=slice(right.batch_slots.start - back, right.batch_slots.stop - back))

    patch.setattr(pearl.models.kv_cache.batch_cache, "_group", wrong)


def give_all_texts_the_mask_of_the_first(patch: pytest.MonkeyPatch) -> None:
    run = pearl.models.kv_cache.batch_cache._group

    def wrong(shares):
        right = run(shares)
        return replace(right, mask=AttentionMask(right.mask.visible[:1].expand_as(right.mask.visible), right.mask.last))

    patch.setattr(pearl.models.kv_cache.batch_cache, "_group", wrong)


def write_no_keys_for_side_rows(patch: pytest.MonkeyPatch) -> None:
    """Only the chains' are kept; what a branch lays over the chain is left from another pass."""
    init = BatchCache.__init__

    def wrong(self, slices, rows):
        init(self, slices, rows)
        kept = self._slots.here < self._buffers.slots
        for name in ("_rows", "_batch_slots", "_slots"):
            setattr(self, name, SentOnce(getattr(self, name).here[kept]))

    patch.setattr(BatchCache, "__init__", wrong)


def see_as_many_slots_as_the_first_text(patch: pytest.MonkeyPatch) -> None:
    """Texts of any lengths share an attention call."""

    def as_many_rows(a, b):
        return b.cache.batch_slot == a.cache.batch_slot + 1 and len(a.rows) == len(b.rows)

    patch.setattr(pearl.models.kv_cache.batch_cache, "_can_share_call", as_many_rows)


MUTANTS = [
    read_the_neighbours_keys,
    give_all_texts_the_mask_of_the_first,
    write_no_keys_for_side_rows,
    see_as_many_slots_as_the_first_text,
]


def fails(most: int) -> bool:
    claim = functools.partial(check, *made("llama", "float32"))
    return falsified(claim, PROMPTS, ROUNDS, most=most, by=(AssertionError, IndexError, RuntimeError))


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_the_property_notices(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch):
    assert not fails(1)
    mutate(monkeypatch)
    assert fails(30)


def test_the_property_notices_passes_that_are_not_padded(monkeypatch):
    """Two texts have as many rows together as no pass may have."""
    reader, reference = made("llama", "float32")
    assert reader.batched_buckets, "on this machine nothing is promised"
    unsafe = [count for count in range(4, LIMIT) if count not in reader.batched_buckets.counts]
    if not unsafe:
        pytest.skip("on this machine every row count has the same bits")

    def chain(nodes: int) -> Step:
        return Step(tuple((place, 7 * place + 3) for place in range(nodes)), -1, 0)

    def passes() -> None:
        for count in unsafe:
            step = [chain(count // 2 - 1), chain(count - count // 2 - 1), *[Step((), -2, 0)] * (TEXTS - 2)]
            check(reader, reference, [61] * TEXTS, [step])

    passes()
    monkeypatch.setattr(BatchedTokenBuckets, "pad", lambda self, rows: rows)
    with pytest.raises(AssertionError, match="text"):
        passes()
