"""Drafters with a network of their own draft the same with static shapes, recorded or not; on a GPU, as its stand-in
shows, they wait where they say and leave nothing on the host."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import tiny
import torch
from numerics import Recorder
from stand_in import DeviceTensor, Gpu
from tiers import tiered
from torch.distributed import HashStore
from toys import EAGER, ScriptedChannel, scrambled, ticks, together
from trained import drafter_for

from pearl.core.params import SamplingParams
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.drafters.dflash.network import DFlashDrafter
from pearl.drafters.dflash.shape import DFlashShape
from pearl.drafters.dflash.source import DFlashSource
from pearl.drafters.feature.head_reader import HeadReader
from pearl.drafters.feature.head_source import HeadSource
from pearl.drafters.feature.source import FeatureSource
from pearl.drafters.pard import PardSource
from pearl.machine.device_features import DeviceFeatures
from pearl.models import timing
from pearl.models.hidden_states import HiddenStateHooks
from pearl.roles.sequence import SequenceRequest
from pearl.roles.target import Target
from pearl.wire import feature_transport
from pearl.wire.feature_transport import FeatureTransport

KINDS = ("eagle3", "peagle", "dflash", "dspark")
GREEDY = SamplingParams(max_new_tokens=6, ignore_eos=True)
SEEDED = SamplingParams(max_new_tokens=6, ignore_eos=True, temperature=0.9, seed=3, top_k=40)
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Nothing here depends on how long a forward takes."""
    monkeypatch.setattr(timing, "TIMED", (8, 1))


def model():
    return tiny.random_model(tiny.CONFIGS["llama"]())


def network(kind: str):
    """With random weights, and its target's parts."""
    target = model()
    if kind in ("eagle3", "peagle"):
        return drafter_for(target, (0, 1), 4, 2, kind=kind).requires_grad_(False)
    inner = dict(tiny.SIZES, head_dim=16)
    shape = DFlashShape(
        kind=kind, features=(0, 1), hidden=64, layers=2, depths=4, mask_token=1, vocabulary=tiny.VOCABULARY,
        known=tiny.VOCABULARY, config=inner, windows=(0, 6), causal=(False, True),
        markov_rank=4 * (kind == "dspark"), confidence=kind == "dspark", confident_markov=kind == "dspark",
    )  # fmt: skip
    torch.manual_seed(0)
    made = DFlashDrafter(shape, None)
    for name, weight in made.named_parameters():
        torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.3)
    made.attach(target.get_input_embeddings().weight, target.get_output_embeddings())
    return made.place("cpu", torch.float32)


def source_of(drafter, slots: int = 1):
    if isinstance(drafter, DFlashDrafter):
        return DFlashSource(drafter)
    return FeatureSource(drafter) if drafter.shape.parallel else HeadSource(HeadReader(drafter, 200, slots))


def writer(drafting, script=EAGER, moved=lambda one: one, slots: int = 1) -> Target:
    target = moved(model())
    hooks = HiddenStateHooks(target, (0, 1))
    return Target(tiny.verifier(target, hooks=hooks, max_sequences=slots), ScriptedChannel(drafting, script), ticks())


@functools.cache
def alone(params: SamplingParams):
    return together(Target(tiny.verifier(model())), PROMPT, Schedule.of("ar"), params, decode=str)


@pytest.mark.parametrize("kind", KINDS)
def test_with_static_shapes_a_network_drafts_what_it_drafts_without(kind):
    written = []
    for recorder in (None, Recorder()):
        drafting = source_of(network(kind))
        if recorder:
            assert drafting.forward.record(recorder, drafting.probe).holds
            assert drafting.forward.captured and recorder.recorded == drafting.forward.shapes > 1
            before = recorder.replayed
        drafting.costs = (1.0, 1.1, 1.2, 1.3)  # not what the machine makes of them
        target = writer(drafting, scrambled(3))
        assert together(target, PROMPT, Schedule.of("tree"), GREEDY, decode=str) == alone(GREEDY)
        written.append([(one.offered, one.committed) for one in target.passes])
    assert written[0] == written[1] and recorder.replayed > before


@pytest.mark.parametrize("kind", ["eagle3", "dflash"])
@pytest.mark.parametrize("fault", ["other bits", "old inputs", "not recorded"])
def test_a_graph_that_is_wrong_is_found_out(kind, fault):
    drafting = source_of(network(kind))

    def wrong(run):
        if fault == "not recorded":
            raise RuntimeError("out of graphs")
        run()
        static = drafting.forward._static
        kept = {shape: [one.clone() for one in found] for shape, found in static._found.items()}

        def replay():
            run()
            for shape, found in static._found.items():
                for buffer, old in zip(found, kept.get(shape, found), strict=True):
                    buffer.copy_(old) if fault == "old inputs" else buffer.mul_(1 + 2**-20)

        return replay

    check = drafting.forward.record(wrong, drafting.probe)
    assert not check.holds and "eagerly" in check.found and not drafting.forward.captured
    assert together(writer(drafting), PROMPT, Schedule.of("sd"), GREEDY, decode=str) == alone(GREEDY)


@pytest.mark.parametrize("kind", tiered(KINDS, lambda kind: kind == "eagle3"))
def test_in_half_precision_they_draft_too(kind):
    """As on a GPU: what is empty at first has the kind of what follows."""
    drafting = source_of(network(kind).place("cpu", torch.bfloat16))
    target = writer(drafting)
    assert together(target, PROMPT, Schedule.of("tree"), GREEDY, decode=str) == alone(GREEDY)
    assert target.draft_stats and not target.draft_stats.failed and drafting.forwards


# On a GPU


@pytest.fixture
def gpu(monkeypatch) -> Iterator[Gpu]:
    with Gpu() as gpu:
        probe = tiny.use_cache_attention

        def probed(model):
            with gpu.may_wait():
                return probe(model)

        monkeypatch.setattr(tiny, "use_cache_attention", probed)
        yield gpu


def placed(gpu: Gpu, drafter):
    """The network with all that it has beside its own weights."""
    gpu.moved(drafter)
    for beside in (vars(drafter).get("_target", []), vars(drafter).get("_borrowed", []), drafter._rotary):
        for at, part in enumerate(beside):
            if isinstance(part, torch.nn.Module):
                gpu.moved(part)
            elif isinstance(part, torch.Tensor):
                beside[at] = DeviceTensor(part)
            elif part is not None:
                gpu.moved(part._made)
    return drafter


@pytest.mark.parametrize("kind", tiered(KINDS, lambda kind: kind == "eagle3"))
@pytest.mark.parametrize(
    "mode, params, static", [("tree", GREEDY, True), ("sd", SEEDED, False)], ids=["tree", "seeded"]
)
def test_a_pass_waits_for_picks_and_features_and_a_draft_once(gpu, kind, static, mode, params):
    with gpu.may_wait():  # it is made and timed
        drafting = source_of(placed(gpu, network(kind)))
        if static:
            drafting.forward.use_static_shapes(None)
    target = writer(drafting, moved=gpu.moved)
    gpu.waits = drafting.forwards = 0
    assert together(target, PROMPT, Schedule.of(mode), params, decode=str) == alone(params)
    assert target.draft_stats and not target.draft_stats.failed and drafting.forwards
    depths = 4 * 4 if kind == "dspark" else 1  # a Markov head is asked once for every depth of a leaf
    assert gpu.waits <= 2 * len(target.passes) + depths * drafting.forwards
    assert not static or drafting.forward.shapes


class Belt:
    """In place of nccl, both ends: what is sent is taken in the order of the streams, and no host waits for it."""

    def __init__(self) -> None:
        self.on_its_way: deque[torch.Tensor] = deque()
        self.carried = 0

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> SimpleNamespace:
        self.on_its_way.append(tensors[0].clone())
        return SimpleNamespace(is_completed=lambda: True, wait=lambda *_: True)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> SimpleNamespace:
        tensors[0].copy_(self.on_its_way.popleft())
        self.carried += 1
        return SimpleNamespace(is_completed=lambda: True, wait=lambda *_: True)

    def abort(self) -> None:
        self.on_its_way.clear()


@pytest.mark.parametrize("kind", tiered(["eagle3", "peagle", "dflash"], lambda kind: kind == "eagle3"))
def test_features_go_from_device_to_device_and_the_host_waits_for_none(gpu, monkeypatch, kind):
    """Less is waited for than where they travel in the verdicts: the copy to the host is gone."""
    belt = Belt()
    monkeypatch.setattr(feature_transport, "nccl_group", lambda store, rank, size: belt)
    ends = [FeatureTransport(HashStore(), rank, torch.device("cuda:0")) for rank in (0, 1)]
    with gpu.may_wait():
        drafting = source_of(placed(gpu, network(kind)))
    target = writer(drafting, moved=gpu.moved)
    target._model.features_stay = True
    deliver = target.channel.peer.deliver

    def carried(count: int) -> None:
        features = target.channel.peer.features
        for at, one in enumerate(features):
            if isinstance(one, DeviceFeatures) and one._work is None:
                ends[0].send(one.rows)
                features[at] = ends[1].receive(*one.shape)
        deliver(count)

    monkeypatch.setattr(target.channel.peer, "deliver", carried)
    gpu.waits = drafting.forwards = 0
    assert together(target, PROMPT, Schedule.of("tree"), GREEDY, decode=str) == alone(GREEDY)
    assert target.draft_stats and not target.draft_stats.failed and drafting.forwards and belt.carried
    assert gpu.waits <= len(target.passes) + drafting.forwards
    for one in ends:
        one.close()


@pytest.mark.slow
def test_texts_side_by_side_wait_as_often_as_one(gpu):
    prompts = [[one, *PROMPT] for one in range(3)]

    def texts(target: Target) -> list[list[int]]:
        asked = [SequenceRequest(one, GREEDY, Stopper(GREEDY, (), str)) for one in prompts]
        states = {sequence for sequence, _ in target.write(asked, Schedule.of("tree"), 3)}
        assert not any(one.draft_stats.failed for one in states)
        return [one.stopper.tokens for one in sorted(states, key=lambda one: one.request.prompt[0])]

    expected = texts(writer(source_of(network("eagle3"), 3), slots=3))
    with gpu.may_wait():
        drafting = source_of(placed(gpu, network("eagle3")), 3)
    target, asked = writer(drafting, moved=gpu.moved, slots=3), []
    extend = drafting.extend

    def counted(queries):
        before = gpu.waits
        grown = extend(queries)
        asked.append((len(queries), gpu.waits - before))
        return grown

    drafting.extend = counted
    assert texts(target) == expected
    assert max(texts for texts, _ in asked) > 1 and max(waits for _, waits in asked) == 1


def test_pard_waits_once_a_draft(gpu):
    with gpu.may_wait():
        reader = tiny.draft_model(gpu.moved(model()))
        reader.enable_static_shapes((8, 16, 32, 64))
        drafting = PardSource(reader, 1, 4)
    target = writer(drafting, moved=gpu.moved)
    gpu.waits = drafting.forwards = 0
    assert together(target, PROMPT, Schedule.of("tree"), GREEDY, decode=str) == alone(GREEDY)
    assert not target.draft_stats.failed and drafting.forwards
    assert gpu.waits <= 2 * len(target.passes) + drafting.forwards
    assert reader.static and max(shape.rows for shape in reader.static._recorded._known) > 16
