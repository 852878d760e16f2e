"""On a GPU the loops wait where they say and nowhere else, all tensors lie where they belong, and no memory is reused
too early: seen by a stand-in for the device, which computes what a GPU would (`tests/support/stand_in.py`).

The second part plants faults, and the stand-in has to find each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import pytest
import stand_in
import tiny
import torch
from stand_in import DeviceTensor, Gpu, HiddenWait, WrongDevice
from tiers import tiered
from torch import Tensor
from torch.utils._pytree import tree_leaves
from toys import Move, ScriptedChannel, Text, letters, ticks, together
from transformers import MistralConfig

import pearl.machine.transfers
import pearl.models.kv_cache.attention_probe
import pearl.roles.target
from pearl.bench.host_time import DuringPasses
from pearl.core.messages import DraftStats
from pearl.core.params import SamplingParams
from pearl.core.sampling import methods
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.core.token_buckets import BatchedTokenBuckets
from pearl.drafters.recycling import RecyclingSource
from pearl.drafters.tree import TreeSource
from pearl.models.draft_model import DraftModel
from pearl.models.kv_cache.attention import AttentionMask
from pearl.models.kv_cache.slot_cache import SlotCache
from pearl.models.kv_cache.window import Window
from pearl.models.language_model import LanguageModel
from pearl.models.reduced_head import ReducedVocabHead, reduce_vocab
from pearl.models.static_shapes.several_texts import SharedShapeRunner
from pearl.models.tensor_parallel import commands, ordered_sum
from pearl.models.tensor_parallel.commands import TokenDeltas
from pearl.models.tensor_parallel.model import TensorParallelModel
from pearl.models.verifier import VerifierModel
from pearl.roles.drafter import Drafter
from pearl.roles.sequence import SequenceRequest, SequenceState
from pearl.roles.target import Target

PROMPT = [3 * i % tiny.VOCABULARY for i in range(20)]
LONG = [(7 * i + i * i) % tiny.VOCABULARY for i in range(300)]  # two whole pieces, and more
GREEDY = SamplingParams(max_new_tokens=12)
SHARED = BatchedTokenBuckets((4, 8, 12, 16, 24, 32, 48), (1.0,) * 7)  # row counts of passes that texts share
PARAMS = {
    "greedy": GREEDY,
    "seeded": SamplingParams(max_new_tokens=12, temperature=1.0, seed=3, top_p=0.9, top_k=50),
    "processed": SamplingParams(
        max_new_tokens=12,
        repetition_penalty=1.2,
        logit_bias={5: 1.0},
        bad_words_ids=((7,), (3, 4)),
        no_repeat_ngram_size=2,
    ),
}
FAILED = "the drafter has failed"
STEADY: list[Move] = [(1, 1, 1)] + [(0, 0, 0)] * 12  # a turn of the drafter now and then
Moved = Callable[[torch.nn.Module], torch.nn.Module]


@pytest.fixture
def gpu(monkeypatch) -> Iterator[Gpu]:
    with Gpu() as gpu:
        probe = pearl.models.kv_cache.attention_probe.use_cache_attention

        def probed(model):  # once a model, when it is loaded
            with gpu.may_wait():
                return probe(model)

        monkeypatch.setattr(tiny, "use_cache_attention", probed)
        yield gpu


def models(
    moved: Moved, static: bool, slots: int = 1, head: int = 0, window: int = 0
) -> tuple[VerifierModel, TreeSource]:
    """Of a target and of a drafter that is nearly as good; `static`: their forwards have static shape, as on a GPU.
    `head`: tokens to which the drafter's is cut. `window`: of their attention."""
    config = MistralConfig(**tiny.SIZES, sliding_window=window) if window else tiny.CONFIGS["llama"]()
    model, draft = (tiny.random_model(config) for _ in range(2))
    torch.manual_seed(1)
    for weight in draft.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    options = {"max_sequences": slots, "max_length": 2 * tiny.LENGTH}
    target, draft = tiny.verifier(moved(model), **options), moved(draft)
    drafter = tiny.draft_model(draft, **options, head=reduced(draft, head) if head else None)
    if slots > 1:
        target.batched_buckets = SHARED
    if static:
        target.enable_static_shapes()
        drafter.enable_static_shapes()
    target.keep_prefixes(64)
    drafter.keep_prefixes(64)
    return target, TreeSource(drafter)


def reduced(model: torch.nn.Module, tokens: int) -> ReducedVocabHead:
    """It may wait for the device, for that is once, when it is loaded."""
    with stand_in.may_wait():
        head = reduce_vocab(model, tokens)
    assert head
    return head


def loops(moved: Moved, static: bool, slots: int = 1, head: int = 0, window: int = 0) -> Target:
    target, source = models(moved, static, slots, head, window)
    return Target(target, ScriptedChannel(source, STEADY), ticks())


def write(target: Target, mode: str, params: SamplingParams, prompt: Sequence[int] = PROMPT) -> Text:
    said = together(target, prompt, Schedule.of(mode), params)
    assert mode == "ar" or drafted([target.draft_stats]), FAILED
    return said


def drafted(stats: Sequence[DraftStats]) -> bool:
    """A drafter that fails ends no text, so nothing else tells of it. A forward that texts share counts for one."""
    return any(one.forwards for one in stats) and not any(one.failed for one in stats)


def side_by_side(target: Target, params: SamplingParams, count: int) -> list[SequenceState]:
    """So many texts, which end all."""
    asked = [SequenceRequest([one, *PROMPT], params, Stopper(params, (), letters)) for one in range(count)]
    ended = {sequence for sequence, _ in target.write(asked, Schedule.of("tree"), count)}
    assert drafted([one.draft_stats for one in ended]), FAILED
    return sorted(ended, key=lambda one: one.request.prompt[0])


def here(model: torch.nn.Module) -> torch.nn.Module:
    return model


@pytest.mark.parametrize(
    "kind, mode, static",
    tiered(
        [
            *(("greedy", mode, True) for mode in ("ar", "sd", "pearl", "tree")),
            ("seeded", "pearl", True),
            ("seeded", "tree", True),
            ("processed", "tree", True),
            ("greedy", "tree", False),
            ("processed", "pearl", False),
        ],
        lambda one: one in (("greedy", "tree", True), ("processed", "pearl", False)),
    ),
)
def test_a_pass_waits_once_and_a_draft_once(gpu, kind, mode, static):
    expected = write(loops(here, static), mode, PARAMS[kind])
    target = loops(gpu.moved, static)
    assert write(target, mode, PARAMS[kind]).tokens == expected.tokens
    forwards = target.draft_stats.forwards if target.draft_stats else 0
    assert len(target.passes) <= gpu.waits <= len(target.passes) + forwards


def with_long_prompts(moved: Moved, static: bool, window: int) -> tuple[list[list[int]], int]:
    """Texts behind a prompt, the same again and another with its beginning; and how often they may wait."""
    target, texts, waits = loops(moved, static, window=window), [], 0
    for prompt in (LONG, LONG, [*LONG[:200], 1, 2, 3]):
        texts.append(write(target, "tree", GREEDY, prompt).tokens)
        waits += len(target.passes) + target.draft_stats.forwards
    assert target._model.prefix_cache.nbytes, "whole pieces are kept"
    return texts, waits


@pytest.mark.parametrize(
    "static, window", tiered(itertools.product([True, False], [0, 64]), lambda one: one == (True, 64))
)
def test_prompts_of_several_pieces_wait_no_more_read_or_put_back_from_what_is_kept(gpu, static, window):
    expected, _ = with_long_prompts(here, static, window)
    texts, waits = with_long_prompts(gpu.moved, static, window)
    assert texts == expected and gpu.waits <= waits


def test_a_drafter_with_a_cut_head_waits_no_more(gpu):
    expected = write(loops(here, True, head=40), "tree", GREEDY)
    target = loops(gpu.moved, True, head=40)
    assert write(target, "tree", GREEDY).tokens == expected.tokens
    assert gpu.waits <= len(target.passes) + target.draft_stats.forwards


@pytest.mark.parametrize("static", [True, False])
def test_log_probabilities_are_waited_for_once_more_a_pass_and_a_piece_of_the_prompt(gpu, static):
    params = SamplingParams(max_new_tokens=12, logprobs=2, prompt_logprobs=1)
    [expected] = side_by_side(loops(here, static), params, 1)
    target = loops(gpu.moved, static)
    [said] = side_by_side(target, params, 1)
    assert said.logprobs == expected.logprobs and said.prompt_logprobs == expected.prompt_logprobs
    assert len(said.logprobs) == 12 and len(said.prompt_logprobs) == len(PROMPT) + 1
    assert gpu.waits <= 1 + 2 * len(said.passes) + said.draft_stats.forwards


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_what_is_kept_of_a_passs_rows_is_waited_for_once_more_a_pass(gpu, mode, caplog):
    expected = write(loops(here, True), mode, GREEDY)
    reader, source = models(gpu.moved, True)
    target = Target(reader, ScriptedChannel(source, STEADY), ticks(), sources=[RecyclingSource()])
    assert write(target, mode, GREEDY).tokens == expected.tokens
    assert not caplog.records, "no source has failed"
    assert gpu.waits <= 2 * len(target.passes) + target.draft_stats.forwards


def test_a_head_that_learns_a_token_of_the_text_does_not_wait(gpu):
    head = reduced(gpu.moved(tiny.random_model(tiny.CONFIGS["llama"]())), 40)
    head.forget()
    head.observe_tokens([3, 50, 60])
    head.observe_tokens([3, 50, 60, 70])
    assert not head.whole and not gpu.waits


def test_a_pass_that_was_prepared_while_the_picks_travelled_waits_no_more_than_others(gpu):
    expected = write(loops(here, True), "pearl", GREEDY)
    (reader, _), (_, source) = models(gpu.moved, True), models(here, True)  # a drafter that is no work of this device
    channel, there = DuringPasses.pair()
    channel.peer_step = Drafter(source, there, ticks()).step
    target = Target(reader, channel, ticks())
    assert write(target, "pearl", GREEDY).tokens == expected.tokens
    assert 0 < target.next_pass.used <= reader.static.foreseen
    assert gpu.waits == len(target.passes)


@pytest.mark.parametrize("kind", tiered(["greedy", "seeded", "processed"], lambda kind: kind == "greedy"))
@pytest.mark.parametrize("static", [True, False])
def test_texts_side_by_side_share_passes_and_wait_once_a_pass_and_text(gpu, monkeypatch, kind, static):
    shared = SharedShapeRunner.__call__ if static else VerifierModel.forward_together
    asked = []

    def counted(*args):
        asked.append(args[0])
        return shared(*args)

    expected = side_by_side(loops(here, static, slots=3), PARAMS[kind], 3)
    target = loops(gpu.moved, static, slots=3)
    monkeypatch.setattr(SharedShapeRunner if static else VerifierModel, shared.__name__, counted)
    said = side_by_side(target, PARAMS[kind], 3)
    assert [one.stopper.tokens for one in said] == [one.stopper.tokens for one in expected]
    assert 0 < gpu.waits <= sum(len(one.passes) + 3 * one.draft_stats.forwards for one in said)
    assert (target._model.shared if static else target._model) in asked


class Twin:
    """Another rank of a target, which has the whole model too, so that it needs no sums: it does what it is told, from
    the words that travel."""

    def __init__(self, shard: VerifierModel):
        self.shard, self.sent, self.heard = shard, TokenDeltas(), TokenDeltas()

    def await_loaded(self) -> None:
        """It has nothing to load."""

    def say(self, command: commands.Command) -> None:
        commands.decode(command.words(self.sent), self.heard).run(self.shard)

    def cause_of(self, error: Exception) -> Exception:
        return error


@pytest.mark.parametrize("mode", ["pearl", "tree"])
def test_a_target_over_several_ranks_waits_no_more(gpu, mode):
    expected = write(loops(here, False), mode, GREEDY)
    (first, source), (second, _) = models(gpu.moved, False), models(gpu.moved, False)
    target = Target(TensorParallelModel(first, Twin(second)), ScriptedChannel(source, STEADY), ticks())
    assert write(target, mode, GREEDY).tokens == expected.tokens
    assert gpu.waits <= len(target.passes) + target.draft_stats.forwards


def test_sums_over_ranks_do_not_wait(gpu, monkeypatch):
    parts = [torch.randn(4, 8, dtype=torch.bfloat16) for _ in range(3)]
    here = [DeviceTensor(part.clone()) for part in parts]
    monkeypatch.setattr(ordered_sum.dist, "get_world_size", lambda group: 3)
    monkeypatch.setattr(
        ordered_sum.dist,
        "all_gather",
        lambda there, mine, group: [a.copy_(b) for a, b in zip(there, here, strict=True)],
    )
    total = here[0] + 0
    ordered_sum.add_up(total)
    assert torch.equal(total.values, (parts[0].float() + parts[1] + parts[2]).bfloat16()) and not gpu.waits


# Faults


def test_a_mask_on_the_host_is_found(gpu, monkeypatch):
    class OnHost(AttentionMask):
        def added(self, groups: int, like: torch.Tensor) -> torch.Tensor:
            return torch.zeros(self.visible.shape)

    target = loops(gpu.moved, True)
    monkeypatch.setattr(AttentionMask, "added", OnHost.added)
    with pytest.raises(WrongDevice, match="of the host and one of the device"):
        write(target, "ar", GREEDY)


@pytest.mark.parametrize(
    "ask",
    [
        lambda logits: logits[0, 0].item(),
        lambda logits: logits.tolist(),
        lambda logits: bool(logits[0, 0] > 0),
        lambda logits: logits.cpu(),
        lambda logits: logits[0].nonzero(),
        lambda logits: logits[logits > 0],
        lambda logits: torch.cuda.synchronize(),
        lambda logits: torch.tensor([1, 2]).to(logits.device),
    ],
    ids=["item", "tolist", "bool", "copy", "nonzero", "mask", "synchronize", "upload"],
)
def test_a_wait_in_the_walk_is_found(gpu, monkeypatch, ask):
    verify = pearl.roles.target.verify

    def curious(sequence, nodes, found, controller, logits, read_root):
        ask(logits)
        return verify(sequence, nodes, found, controller, logits, read_root)

    target = loops(gpu.moved, True)
    monkeypatch.setattr(pearl.roles.target, "verify", curious)
    with pytest.raises(HiddenWait):
        write(target, "ar", GREEDY)


def after(of: type | ModuleType, name: str, more: Callable[[Tensor], object]) -> Callable[[pytest.MonkeyPatch], None]:
    """A function that does more with the first tensor of what it gives back."""
    plain = getattr(of, name)

    def curious(*args: object) -> object:
        found = plain(*args)
        more(next(one for one in tree_leaves(found) if isinstance(one, Tensor)))
        return found

    return lambda patch: patch.setattr(of, name, curious)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(
    "fault",
    [
        after(DraftModel, "read_leaves_together", lambda logits: logits[0, 0].item()),
        after(DraftModel, "_read_chunk", lambda logits: logits[0, 0].item()),
        after(DraftModel, "_read_chunk", lambda logits: logits + torch.zeros(logits.shape)),
        after(DraftModel, "_read_chunk", lambda logits: logits[logits > 0]),
        after(methods, "_asked", lambda ranked: ranked.tolist()),
    ],
    ids=["item of leaves", "item", "host", "shape", "ranks"],
)
def test_a_fault_in_a_draft_model_is_found(gpu, monkeypatch, fault, static):
    """The text would be right without it."""
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=FAILED):
        write(loops(gpu.moved, static), "tree", GREEDY)


def windows_of_the_host(patch: pytest.MonkeyPatch) -> None:
    def within(mask: AttentionMask, window: Window | None) -> AttentionMask:
        if window is None:
            return mask
        near = torch.arange(mask.visible.shape[-1]) >= window.first(mask.last)[..., None]
        return AttentionMask(mask.visible & near[:, None])

    patch.setattr(AttentionMask, "within", within)


@pytest.mark.parametrize(
    "fault, window",
    [
        (after(SlotCache, "take", lambda kept: kept.cpu()), 0),
        (after(LanguageModel, "forward", lambda logits: len(logits) == 1 and logits[0, 0].item()), 0),
        (windows_of_the_host, 64),
    ],
    ids=["kept on the host", "item of a piece", "window"],
)
def test_a_fault_in_the_reading_of_a_long_prompt_is_found(gpu, monkeypatch, fault, window):
    fault(monkeypatch)
    with pytest.raises((HiddenWait, WrongDevice)):
        with_long_prompts(gpu.moved, True, window)


def test_picks_that_are_read_before_they_are_here_are_found(gpu, monkeypatch):
    monkeypatch.setattr(pearl.machine.transfers.Fetched, "wait", lambda coming: coming._here)
    with pytest.raises((AssertionError, IndexError, RuntimeError, OverflowError, KeyError)):
        write(loops(gpu.moved, True), "ar", GREEDY)
