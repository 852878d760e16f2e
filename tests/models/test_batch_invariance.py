"""Row counts are called safe only where the bits say so."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import VOCABULARY, fake, measured
from tiers import tiered
from transformers import Phi3Config

from pearl.core.token_buckets import ANY, LEAST, LEAVES, LIMIT, SLOT_MULTIPLE, TokenBuckets
from pearl.models import batch_invariance, linear
from pearl.models.batch_invariance import find_invariant_counts, position_border, products, profile_leaves, profile_path
from pearl.models.verifier import VerifierModel

FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
BLOCKS = torch.ops.mkldnn._is_mkldnn_bf16_supported()
KERNELS = [
    "stock",
    pytest.param("packed", marks=pytest.mark.skipif(not FBGEMM, reason="a torch without fbgemm")),
    pytest.param("blocked", marks=pytest.mark.skipif(not BLOCKS, reason="a processor without bfloat16 products")),
]


def test_where_bits_never_change_every_count_is_safe():
    plan = find_invariant_counts(fake(lambda count, row: 0), VOCABULARY)
    assert plan.exact and plan.safe == tuple(range(LEAST, LIMIT + 1))


def test_counts_with_bits_of_their_own_are_found_out():
    plan = find_invariant_counts(fake(lambda count, row: count if count in (1, 2, 7) else 0), VOCABULARY)
    assert plan.exact
    assert plan.safe == tuple(sorted(set(range(1, LIMIT + 1)) - {1, 2, 7}))


def test_the_largest_count_may_be_the_odd_one():
    plan = find_invariant_counts(fake(lambda count, row: int(count == LIMIT)), VOCABULARY)
    assert plan.exact and plan.safe == tuple(range(LEAST, LIMIT))


def test_where_no_two_counts_agree_nothing_is_promised():
    plan = find_invariant_counts(fake(lambda count, row: count), VOCABULARY)
    assert not plan.exact
    assert plan.safe == ANY.safe
    assert [plan.pad(rows) for rows in (1, 5, 40)] == [1, 5, 40]


def test_a_row_whose_bits_depend_on_its_place_is_not_safe():
    plan = find_invariant_counts(fake(lambda count, row: row), VOCABULARY)
    assert not plan.exact


def test_a_last_row_with_a_kernel_of_its_own_is_found_out():
    plan = find_invariant_counts(fake(lambda count, row: int(count == 2 and row == 1)), VOCABULARY)
    assert plan.exact and 2 not in plan.safe


@settings(max_examples=100)
@given(block=st.integers(1, 9), rest=st.lists(st.integers(0, 2), min_size=9, max_size=9), alone=st.integers(0, 2))
def test_safe_counts_agree_in_every_row_whatever_the_kernel(block, rest, alone):
    """Matrix kernels take rows in blocks and what is left over by other code, which may depend on how much is left."""

    def bits(count, row):
        if count == 1:
            return alone
        return 0 if row < count - count % block else rest[count % block]

    plan = find_invariant_counts(fake(bits), VOCABULARY)
    if plan.exact:
        assert len({bits(count, row) for count in plan.safe for row in range(count)}) == 1


class OtherOrder(torch.nn.Linear):
    """Adds up the products of a row in two halves where the row count is odd by the table."""

    odd = (2, 7, 14)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.float()[0]
        parts = rows.split(rows.shape[1] // (2 if len(rows) in self.odd else 1), 1)
        weights = self.weight.float().split(parts[0].shape[1], 1)
        sums = [torch.stack([row @ weight.T for row in part]) for part, weight in zip(parts, weights, strict=True)]
        return functools.reduce(torch.add, sums)[None].to(x.dtype)


@pytest.mark.parametrize("seed", tiered(range(10), lambda seed: seed < 3))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_of_another_order_is_found_out_though_no_text_shows_it(dtype, seed, monkeypatch):
    """One sum in ten thousand is rounded to another bfloat16 number, and the texts of this model hold none."""
    torch.manual_seed(seed)
    layer = OtherOrder(64, 96, bias=False).to(getattr(torch, dtype))
    monkeypatch.setattr(batch_invariance, "nn", SimpleNamespace(Linear=OtherOrder, Module=torch.nn.Module))
    (product,) = products(layer)
    plan = find_invariant_counts(fake(lambda count, row: 0), VOCABULARY, products=[product])
    assert plan.safe == tuple(count for count in range(LEAST, LIMIT + 1) if count not in OtherOrder.odd)
    assert [product.holds(count, 16) for count in (2, 3, 14, 16, 40)] == [False, True, False, True, True]
    assert not product.holds(32, 14), "nothing is equal to what is odd itself"


@pytest.mark.parametrize("width", (8, 24, 40, 128))
@pytest.mark.parametrize("kind", (functools.partial(torch.nn.GELU, "tanh"), torch.nn.SiLU))
def test_an_activation_of_other_bits_in_some_row_counts_is_found_out(kind, width):
    """Torch computes the last numbers of a tensor by another function than those that fill a vector register."""
    torch.set_num_threads(1)
    layers = torch.nn.Sequential(torch.nn.Linear(16, width), kind())
    plan = find_invariant_counts(fake(lambda count, row: 0), VOCABULARY, products=products(layers))
    assert (plan.exact and len(plan.safe) < LIMIT - LEAST + 1) or width % 32 == 0
    x = torch.randn(1000, plan.most, width, generator=torch.Generator().manual_seed(7))
    whole = layers[1](x[:, None])
    for count in plan.safe:
        assert torch.equal(torch.stack([layers[1](rows[:count]) for rows in x]), whole[:, 0, :count]), count


@pytest.mark.parametrize("name", tiered(["llama", "gpt2", "gemma2"], lambda name: name == "gpt2"))
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_models_safe_counts_have_equal_bits_elsewhere_too(name, dtype, kernel):
    reader = make(name, kernel, dtype)
    plan = measured(reader)
    assert plan.exact, "in one thread on a CPU some row counts agree, whatever the machine: the measurement is broken"
    text = torch.randint(tiny.VOCABULARY, (tiny.LENGTH,), generator=torch.Generator().manual_seed(5)).tolist()
    reader.forward(text, 0, 1)
    bits: dict[int, torch.Tensor] = {}  # by position
    for first in (17, 50, 58, 63, 64, SLOT_MULTIPLE - 27, SLOT_MULTIPLE, SLOT_MULTIPLE + 40):
        for count in plan.safe:
            logits = reader.forward(text[first : first + count], first, count)
            for position, row in enumerate(logits, first):
                assert torch.equal(bits.setdefault(position, row), row), f"{count} rows from {first}, at {position}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_padded_passes_of_any_length_have_the_bits_of_one_token_at_a_time(kernel):
    reader = make("llama", kernel)
    reader.buckets = measured(reader)
    assert reader.buckets.exact, "see above"
    text = torch.randint(tiny.VOCABULARY, (200,), generator=torch.Generator().manual_seed(5)).tolist()
    start = SLOT_MULTIPLE - 50
    reader.read(text[:start], 1)
    alone = torch.cat([reader.read(text[:end], 1) for end in range(start + 1, len(text) + 1)])
    reader.forget()
    reader.read(text[:start], 1)
    known, together = start, []
    for count in itertools.cycle((1, 2, 3, 5, 8, 13, 16, 7, 11, 14)):
        count = min(count, reader.buckets.up_to(known), len(text) - known)
        if not count:
            break
        wrong = [3] * min(9, reader.buckets.up_to(known))
        reader.read(text[:known] + wrong, len(wrong))  # guesses that nothing came of
        together.append(reader.read(text[: known + count], count))
        known += count
    assert torch.equal(torch.cat(together), alone)


def make(name: str, kernel: str, dtype: str = "float32") -> VerifierModel:
    model = tiny.random_model(tiny.CONFIGS[name]()).bfloat16()  # weights that fit, as a bfloat16 checkpoint's do
    model = model.to(torch.bfloat16 if kernel == "blocked" else getattr(torch, dtype))
    if kernel != "stock":
        assert linear.pack(model, kernel) == 0
    return tiny.verifier(model)


def test_a_pass_costs_no_more_than_one_of_more_rows(monkeypatch):
    """Something else ran on the machine while three rows were timed."""
    now = itertools.accumulate(itertools.cycle([0.0, 1.0]))
    slow = iter(range(10_000))
    monkeypatch.setattr(
        "pearl.models.batch_invariance.time.perf_counter", lambda: next(now) + 9 * (next(slow) % 64 > 30)
    )
    costs = find_invariant_counts(fake(lambda count, row: 0), VOCABULARY).cost_s
    assert list(costs) == sorted(costs)


def test_a_pass_has_more_rows_where_those_take_less_time(monkeypatch):
    """A library that is slow with less than six rows, and with eleven."""
    seconds = {count: 1.0 + count / 100 + (count < 6 or count == 11) for count in range(1, LIMIT + 1)}
    now, same = [0.0], fake(lambda count, row: 0)

    def read(tokens, first):
        now[0] += seconds.get(len(tokens), 1.0)
        return same(tokens, first)

    monkeypatch.setattr("pearl.models.batch_invariance.time.perf_counter", lambda: now[0])
    plan = find_invariant_counts(read, VOCABULARY)
    assert plan.safe == tuple(range(LEAST, LIMIT + 1))
    assert plan.pad_to == (6, 7, 8, 9, 10, 12, 13, 14, 15, 16)
    assert plan.pad(1) == 6 and plan.cost(1) == pytest.approx(1.06)


def test_a_path_costs_what_it_makes_a_pass_longer(monkeypatch):
    """A reader for which each path takes 30 ms and everything else 200 ms."""
    now = [0.0]

    class Slow:
        def read(self, tokens, keep, side_rows=()):
            now[0] += 0.2 + 0.03 * len(side_rows)
            return torch.zeros(keep + len(side_rows), VOCABULARY)

    monkeypatch.setattr("pearl.models.batch_invariance.time.perf_counter", lambda: now[0])
    assert profile_path(Slow(), VOCABULARY) == pytest.approx(0.03)


def test_a_pass_is_padded_to_the_next_safe_count():
    plan = TokenBuckets((2, 3, 6), (1.0,) * LIMIT)
    assert [plan.pad(rows) for rows in (1, 2, 3, 4, 6)] == [2, 2, 3, 6, 6]
    assert plan.pad(7) == 7  # beyond what was tested


class Counting:
    """A drafter's reader that takes down how many paths it was asked for, and their texts."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[int, ...]]] = []

    def read_leaves(self, text, paths):
        self.asked.append(list(paths))
        return torch.zeros(len(paths), VOCABULARY)


def test_the_cost_of_each_number_of_leaves_is_measured_on_as_many_different_leaves():
    reader = Counting()
    costs = profile_leaves(reader, VOCABULARY)
    assert len(costs) == LEAVES and all(seconds > 0 for seconds in costs)
    timed = [paths for paths in reader.asked if paths != [()]]
    assert {len(paths) for paths in timed} == set(range(1, LEAVES + 1))
    assert all(len(set(paths)) == len(paths) for paths in timed)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_rows_that_ask_no_other_rows_position_have_no_border(name):
    assert position_border(tiny.verifier(tiny.random_model(tiny.CONFIGS[name]()))) is None


@pytest.mark.parametrize("border", [100, 200])
def test_a_rotary_embedding_that_looks_at_the_whole_forward_is_found_out(border):
    factors = dict(long_factor=[4.0] * 8, short_factor=[1.0] * 8, rope_theta=1e4)
    rope = dict(rope_type="longrope", original_max_position_embeddings=border, **factors)
    config = Phi3Config(**tiny.SIZES, original_max_position_embeddings=border, rope_parameters=rope)
    assert position_border(tiny.verifier(tiny.random_model(config))) == border
    assert position_border(tiny.verifier(tiny.random_model(config), max_length=border)) is None
