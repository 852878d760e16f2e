"""The cache is a memo: what a model reads over it is what the model says without it."""

import functools

import pytest
import tiny
import torch
from architectures import Architecture, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BltConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Phi3Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from pearl.checkpoints.placement import Placement
from pearl.checkpoints.targets import prepare
from pearl.core.token_buckets import SLOT_MULTIPLE, TokenBuckets
from pearl.errors import UsageError
from pearl.models import language_model as model_module
from pearl.models.architecture import bytes_of_a_sequence, longest_sequence, rope_border
from pearl.models.kv_cache.slot_cache import KVBuffers, SlotCache
from pearl.models.kv_cache.transformers_interface import CACHE_ATTENTION, cache_attention, takes_cache
from pearl.models.verifier import VerifierModel

TOLERANCE = 1e-3  # of fp32 logits, whose deviation is 2: sums in another order differ by 1e-5
SOME = ("llama", "gpt2", "gemma2")  # cache attention with shared heads, learned positions, eager attention


def random_text(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(tiny.VOCABULARY, (length,), generator=generator).tolist()


@functools.cache
def untouched(name: str):
    return tiny.random_model(tiny.CONFIGS[name]())


@torch.inference_mode()
def own_logits(name: str, text: list[int]) -> torch.Tensor:
    """[len(text), V] from the model as transformers runs it: no cache, its own attention, its own mask."""
    return untouched(name)(torch.tensor([text]), use_cache=False).logits[0]


def make(name: str, **options: object) -> VerifierModel:
    return tiny.verifier(tiny.random_model(tiny.CONFIGS[name]()), **options)


@functools.cache
def used(name: str) -> VerifierModel:
    """One that has read many texts before."""
    return make(name)


def assert_says(reader: VerifierModel, name: str, text: list[int], keep: int) -> None:
    got, wanted = reader.read(text, keep), own_logits(name, text)[-keep:]
    assert got.shape == (keep, tiny.VOCABULARY)
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)
    assert torch.equal(got.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_read_is_the_models_own_forward(name):
    assert_says(make(name), name, random_text(100), 100)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_text_read_in_pieces_with_wrong_guesses_is_the_models_own_forward(name):
    text, wrong = random_text(140), random_text(20, seed=2)
    reader = make(name)
    for end in (5, 6, 9, 60, 61, 64, 65, 66, 130):
        reader.read(text[:end] + wrong, 1 + len(wrong))
        assert_says(reader, name, text[:end], min(end, 3))
    assert_says(reader, name, text, 10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_differs_by_rounding_only(dtype):
    text = random_text(80)
    model = tiny.random_model(tiny.CONFIGS["llama"](), dtype=dtype)
    with torch.inference_mode():
        wanted = model(torch.tensor([text])).logits[0]
    reader = tiny.verifier(model)
    reader.read(text[:50], 1)
    torch.testing.assert_close(reader.read(text, 30).float(), wanted[-30:].float(), atol=0.3, rtol=0)


# A read keeps `keep` tokens' logits of a text that shares some part with the last one and goes on with other tokens.
READS = st.lists(
    st.tuples(st.floats(0, 1), st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 12)),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("name", SOME)
@settings(max_examples=15)
@given(reads=READS)
def test_whatever_was_read_before_a_read_says_the_same(name, reads):
    text: list[int] = []
    for shared, tokens, keep in reads:
        text = (text[: int(shared * len(text))] + tokens)[: tiny.LENGTH]
        assert_says(used(name), name, text, min(keep, len(text)))


@pytest.mark.parametrize("name", SOME)
@settings(max_examples=15)
@given(reads=READS, chunk=st.sampled_from([1, 2, 7, 16]))
def test_a_prefill_in_chunks_says_the_same(name, reads, chunk):
    text: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "PREFILL_CHUNK", chunk)
        for shared, tokens, keep in reads:
            text = (text[: int(shared * len(text))] + tokens)[: tiny.LENGTH]
            assert_says(used(name), name, text, min(keep, len(text)))


@settings(max_examples=30)
@given(length=st.integers(1, 60), keep=st.integers(1, 60), chunk=st.integers(1, 20))
def test_a_chunk_never_reads_the_rows_that_are_asked_for(length, keep, chunk):
    keep = min(keep, length)
    reader = used("llama")
    reader.forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "PREFILL_CHUNK", chunk)
        assert len(reader.read(random_text(length), keep)) == keep


def counted(reader: VerifierModel, monkeypatch) -> list[int]:
    """The rows of every forward from now on."""
    rows, forward = [], reader.forward

    def counting(tokens, first, keep, sides=(), pads=0, batch_slot=0):
        rows.append(len(tokens) + len(sides) + pads)
        return forward(tokens, first, keep, sides, pads)

    monkeypatch.setattr(reader, "forward", counting)
    return rows


def test_forgetting_changes_nothing_but_the_cost(monkeypatch):
    reader, text = make("llama"), random_text(50)
    rows = counted(reader, monkeypatch)
    reader.read(text[:40], 1)
    remembered = reader.read(text, 4)
    reader.forget()
    torch.testing.assert_close(reader.read(text, 4), remembered, atol=TOLERANCE, rtol=0)
    assert rows == [40, 10, 50]


def test_the_same_read_after_forgetting_has_the_same_bits():
    reader, text = make("llama"), random_text(50)
    first = reader.read(text, 50)
    reader.read(random_text(70, seed=2), 1)
    reader.forget()
    assert torch.equal(reader.read(text, 50), first)


def test_only_what_is_new_is_read_again(monkeypatch):
    reader, text = make("llama"), random_text(60)
    rows = counted(reader, monkeypatch)
    reader.read(text[:40], 1)
    reader.read(text[:45], 5)  # five guesses, of which
    reader.read(text[:42] + [1], 1)  # two were right
    reader.read(text[:42], 3)  # nothing new, but rows to keep
    assert rows == [40, 5, 1, 3]


def test_pads_are_never_seen(monkeypatch):
    reader, text = make("llama", buckets=TokenBuckets((8, 16), (1.0,) * 16)), random_text(40)
    rows = counted(reader, monkeypatch)
    for end in (30, 31, 34, 40):
        assert_says(reader, "llama", text[:end], 1)
    assert rows == [30, 8, 8, 8]


@pytest.mark.parametrize("name", SOME)
def test_the_longest_text_may_be_padded(name):
    text = random_text(tiny.LENGTH)
    reader = make(name, buckets=TokenBuckets((16,), (1.0,) * 16))
    reader.read(text[:-3], 1)
    assert_says(reader, name, text, 1)


def test_a_read_that_failed_leaves_no_false_memory(monkeypatch):
    reader, text, other = make("llama"), random_text(40), random_text(40, seed=2)
    reader.read(text, 1)
    forward = reader.forward

    def interrupted(*args, **more):
        forward(*args, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(reader, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader.read(other, 1)
    monkeypatch.undo()
    assert_says(reader, "llama", text, 1)


def test_what_does_not_fit_is_asserted():
    reader = make("llama", max_length=32)
    for text, keep in ((random_text(33), 1), (random_text(5), 6), (random_text(5), 0), ([], 1)):
        with pytest.raises(AssertionError, match="must fit"):
            reader.read(text, keep)
    with pytest.raises(AssertionError, match="too short"):
        SlotCache(KVBuffers(SLOT_MULTIPLE)).place_chain(SLOT_MULTIPLE - 1, 2, 2)


class Operations(TorchDispatchMode):
    """Counts those that a GPU would launch a kernel for: all but views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("taken", [[(0, 5)], [(0, 5), (4, 6)], [(0, 5), (5, 8)]], ids=["one", "next", "apart"])
@torch.inference_mode()
def test_a_walk_through_side_rows_is_as_few_operations_for_many_layers_as_for_few(taken):
    """On a GPU each of them is a launch outside of any graph."""
    counts = []
    for layers in (2, 8):
        config = LlamaConfig(**tiny.SIZES | {"num_hidden_layers": layers})
        reader, text = tiny.verifier(tiny.random_model(config)), random_text(20)
        reader.read(text, 4, [(0, 5), (4, 6), (5, 8)])
        with Operations() as operations:
            assert reader._slots[0].known([*text[:17], *(token for _, token in taken), 9], 17 + len(taken))
        counts.append(operations.count)
    assert counts[0] == counts[1] <= 8


@torch.inference_mode()
def test_layers_that_are_alike_lie_together_and_others_by_themselves():
    buffers = KVBuffers(SLOT_MULTIPLE, alike=[(0, 2)])
    for layer, heads in ((2, 3), (1, 2), (0, 3), (5, 3)):
        keys, values = buffers.layer(layer, torch.zeros(1, heads, 1, 16), torch.zeros(1, heads, 1, 16))
        assert keys.shape == values.shape and keys.shape[1] == heads and keys.is_contiguous()
    assert [len(stack) for stack in buffers.stacks] == [4, 2, 2]
    assert len({one.data_ptr() for pair in buffers.all_layers() for one in pair}) == 8


def test_logits_are_cut_to_the_shared_vocabulary():
    text = random_text(10)
    cut = make("llama", vocabulary=100).read(text, 3)
    torch.testing.assert_close(cut, own_logits("llama", text)[-3:, :100], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_cache_attention_is_attention(heads, kv_heads, rows):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, rows, 16),
        torch.randn(1, kv_heads, 24, 16),
        torch.randn(1, kv_heads, 24, 8),
    )
    mask = torch.rand(1, 1, rows, 24) < 0.5
    mask[..., 0] = True
    each = heads // kv_heads
    scores = query @ key.repeat_interleave(each, 1).transpose(2, 3) * 0.3
    wanted = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(each, 1)
    got, _ = cache_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(got, wanted.transpose(1, 2))  # [batch, rows, heads, width]


def test_cache_and_eager_attention_say_the_same():
    text = random_text(90)
    cached, eager = (tiny.random_model(tiny.CONFIGS["llama"]()) for _ in range(2))
    eager.set_attn_implementation("eager")
    answers = [tiny.verifier(cached).read(text, 20), VerifierModel(eager, tiny.VOCABULARY, tiny.LENGTH).read(text, 20)]
    assert cached.config._attn_implementation == CACHE_ATTENTION
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(*answers, atol=TOLERANCE, rtol=0)


def test_a_text_is_no_longer_than_the_models_positions_or_the_border_of_its_rotary_embedding():
    assert longest_sequence(MistralConfig(**tiny.SIZES, sliding_window=32)) == tiny.LENGTH
    assert longest_sequence(tiny.CONFIGS["gpt2"]()) == tiny.LENGTH
    factors = dict(long_factor=[4.0] * 8, short_factor=[1.0] * 8, rope_theta=1e4)
    longrope = dict(rope_type="longrope", original_max_position_embeddings=200, **factors)
    border = Phi3Config(**tiny.SIZES, original_max_position_embeddings=200, rope_parameters=longrope)
    assert longest_sequence(border) == rope_border(border) == 200
    dynamic = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    assert longest_sequence(LlamaConfig(**tiny.SIZES, rope_parameters=dynamic)) == tiny.LENGTH
    assert rope_border(LlamaConfig(**tiny.SIZES)) is None


@pytest.mark.parametrize("architecture", parameters())
def test_what_a_config_says_of_keys_and_values_is_what_the_model_takes(architecture: Architecture):
    model = architecture.model()
    reader = tiny.verifier(model)
    reader.read([1, 2, 3], 1)
    taken = sum(buffer.nbytes for pair in reader.buffers.all_layers() for buffer in pair)
    assert bytes_of_a_sequence(model.config, reader.buffers.slots, 4) == taken


def test_a_mask_that_lets_pictures_see_ahead_is_no_hindrance_to_texts():
    assert longest_sequence(Gemma4TextConfig(use_bidirectional_attention="vision"))
    for ahead in (
        Gemma3TextConfig(use_bidirectional_attention=True),
        Gemma4TextConfig(use_bidirectional_attention="all"),
    ):
        with pytest.raises(UsageError, match="masks in which tokens see what follows them"):
            longest_sequence(ahead)


@pytest.mark.parametrize(
    "config, word",
    [
        (MambaConfig, "linear_attention|mamba"),
        (RwkvConfig, "rwkv"),
        (RecurrentGemmaConfig, "linear_attention|recurrent"),
        (JambaConfig, "linear_attention|mamba"),
        (Qwen3NextConfig, "linear_attention"),
        (BltConfig, "blt"),
    ],
)
def test_layers_that_can_not_go_back_are_refused(config, word):
    with pytest.raises(UsageError, match=f"without a key-value cache.*({word}).*choose a decoder-only transformer"):
        longest_sequence(config())


def test_a_model_that_takes_no_cache_is_refused_before_it_is_read():
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50}
    with pytest.raises(UsageError, match="OpenAIGPTLMHeadModel has no key-value cache: choose a decoder-only"):
        prepare(OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes)), "stock", Placement(("cpu",)))
    assert all(takes_cache(tiny.random_model(make())) for make in tiny.CONFIGS.values())


def test_a_model_whose_loops_share_the_keys_of_the_last_is_refused():
    with pytest.raises(UsageError, match="shares its last loop's keys"):
        longest_sequence(LlamaConfig(**tiny.SIZES, recurrent_kv_cache_mode="last_loop"))
