"""Any drafter, any schedule, any delay: the text is what the target says by itself.

The last part breaks the code on purpose, and the same property has to notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from cases import DRAFTING, Case, all_params, cases, check, plain_case
from hypothesis import given
from hypothesis import strategies as st
from plain_processors import avoid_the_sum
from tiers import tiered
from tiny import CONFIGS, draft_model, random_model, verifier
from toys import (
    EAGER,
    IDLE,
    Crashing,
    Moody,
    Noise,
    ScriptedChannel,
    TableModel,
    alone,
    examples,
    falsified,
    letters,
    scrambled,
    ticks,
    together,
)

import pearl.roles.drafter_inbox
import pearl.roles.verification
from pearl.core.logits.penalties import Penalties
from pearl.core.messages import Nodes, Verdict
from pearl.core.params import SamplingParams
from pearl.core.sampling.methods import Picker
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.core.token_buckets import SLOT_MULTIPLE
from pearl.core.trie import Node, Trie
from pearl.drafters.model import ModelSource
from pearl.drafters.tree import TreeSource
from pearl.models.draft_model import DraftModel, LeavesQuery
from pearl.models.verifier import VerifierModel
from pearl.roles.drafter import Drafter
from pearl.roles.sequence import SequenceRequest
from pearl.roles.target import Target
from pearl.roles.verification import PassRows
from pearl.wire.channel import LocalChannel


@examples(400)
@given(cases(beside=True))
def test_the_text_is_the_targets_own(case: Case):
    check(case)


@examples(150)
@given(cases(modes=DRAFTING, beside=True), st.integers(0, 40))
def test_a_lost_drafter_ends_no_text(case: Case, moves: int):
    target, channel = check(case, lost_after=moves)
    assert case.schedule.drafts == (
        channel.lost or target.draft_stats is not None
    )  # else the text ended before the loss


@pytest.mark.parametrize("mode", DRAFTING)
@pytest.mark.parametrize("gamma", [1, 3, "auto"])
@pytest.mark.parametrize("moves", [0, 1, 5, 12])
def test_after_the_drafter_is_lost_the_target_goes_on_alone(mode: str, gamma: int | str, moves: int):
    case = plain_case(mode, gamma, "right", tokens=60)  # more than the drafter's longest lead
    target, channel = check(case, lost_after=moves)
    assert channel.lost and target.draft_stats is None
    assert [p.committed for p in target.passes[-3:]] == [1, 1, 1]


# one after the other


@examples(100)
@given(cases(), st.lists(all_params(2), min_size=2, max_size=3), st.booleans(), st.data())
def test_nothing_of_a_text_reaches_the_next(
    case: Case, requests: list[SamplingParams], hasty: bool, data: st.DataObject
):
    """A hasty target does not wait for the drafter's report, so late guesses do arrive during the next text."""
    with pytest.MonkeyPatch.context() as patch:
        if hasty:
            patch.setattr(pearl.roles.drafter_inbox, "STATS_TIMEOUT_S", 0.0)
        model = case.model
        target = Target(model, ScriptedChannel(case.make_source(), case.script), ticks())
        for params in requests:
            prompt = data.draw(st.lists(st.integers(0, case.vocabulary - 1), min_size=1, max_size=5))
            assert together(target, prompt, case.schedule, params, case.eos) == alone(model, prompt, params, case.eos)


@examples(60)
@given(cases(modes=DRAFTING), st.integers(1, 3))
def test_a_stream_that_its_reader_leaves_does_not_reach_the_next_text(case: Case, passes: int):
    model = case.model
    target = Target(model, ScriptedChannel(case.make_source(), case.script), ticks())
    stream = target.decode(case.prompt, case.schedule, case.params, Stopper(case.params, case.eos, letters))
    for _ in zip(range(passes), stream, strict=False):
        pass
    stream.close()
    prompt = case.prompt[::-1]
    again = together(target, prompt, case.schedule, case.params, case.eos)
    assert again == alone(model, prompt, case.params, case.eos)


@examples(60)
@given(cases())
def test_every_pass_yields_at_least_one_token_and_each_only_once(case: Case):
    model = case.model
    target = Target(model, ScriptedChannel(case.make_source(), case.script), ticks())
    stopper = Stopper(case.params, case.eos, letters)
    said: list[int] = []
    for committed in target.decode(case.prompt, case.schedule, case.params, stopper):
        assert committed
        said += committed
        assert said == stopper.tokens, "a token left before it was taken down, or twice"
    assert said == alone(model, case.prompt, case.params, case.eos).tokens


# the cache is a memo


class Forgetful:
    """A model whose cache is deleted before every forward."""

    def __init__(self, model: VerifierModel | DraftModel):
        self._model, self.buckets, self.max_length = model, model.buckets, model.max_length

    verifies_trees, max_sequences, batched_buckets, gives_features = True, 1, None, False

    def read(
        self, tokens: Sequence[int], keep: int, side_rows: Sequence[tuple[int, int]] = (), batch_slot: int = 0
    ) -> torch.Tensor:
        self.forget()
        return self._model.read(tokens, keep, side_rows)

    def read_leaves_together(self, queries: Sequence[LeavesQuery]) -> list[torch.Tensor]:
        self.forget()
        return self._model.read_leaves_together(queries)

    def features(self, rows: Sequence[int], batch_slot: int = 0) -> None:
        return None

    def restore(self, tokens: Sequence[int], batch_slot: int = 0) -> int:
        return 0

    def forget(self, but: Sequence[int] = (), batch_slot: int = 0) -> int:
        return self._model.forget()

    def end(self, batch_slot: int) -> None:
        pass


@pytest.mark.parametrize("mode", DRAFTING)
@pytest.mark.parametrize("temperature", tiered([0.0, 0.8], lambda temperature: temperature > 0))
def test_without_its_cache_a_model_says_the_same(mode: str, temperature: float):
    params = SamplingParams(max_new_tokens=16, temperature=temperature, seed=3)
    prompt, schedule = [5, 6, 7, 5, 6], Schedule.of(mode, 3, max_draft_tokens=6)  # each leaf is a text to be read
    model, texts = random_model(CONFIGS["llama"]()), {}
    for wrap in (lambda model: model, Forgetful):
        for script in (EAGER, scrambled(1)):
            source = TreeSource(wrap(draft_model(model)))  # the target's own weights: long hits
            source = source if mode == "tree" else Moody(source, 5)
            target = Target(wrap(verifier(model)), ScriptedChannel(source, script), ticks())
            texts[wrap, tuple(script)] = tuple(together(target, prompt, schedule, params, decode=str).tokens)
            assert any(p.accepted > 1 for p in target.passes)
            assert mode == "tree" or any(not p.hit for p in target.passes)
    texts["alone"] = tuple(
        together(Target(Forgetful(verifier(model))), prompt, Schedule.of("ar"), params, decode=str).tokens
    )
    assert len(set(texts.values())) == 1


# what sources can and can't do


@examples(150)
@given(cases())
def test_callables_see_what_a_plain_decoder_would_show_them(case: Case):
    """At every row that they are called for, in the order of the text, and for no token twice."""
    seen: list[list[int]] = []

    def noting(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(tokens)
        return logits

    case = replace(case, params=replace(case.params, logits_processors=[noting, avoid_the_sum]))
    written = alone(case.model, case.prompt, case.params, case.eos)
    expected = [*seen]
    source = case.make_source()  # which may know what will be said
    seen.clear()
    target = Target(case.model, ScriptedChannel(source, case.script), ticks())
    assert together(target, case.prompt, case.schedule, case.params, case.eos) == written
    assert seen[: len(expected)] == expected


@pytest.mark.parametrize("mode", ["ar", "pearl", "tree"])
def test_a_callable_that_raises_ends_its_text_alone(mode: str):
    def fails(tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        if len(tokens) > 9:
            raise RuntimeError("this callable was made to fail")
        return logits

    case, schedule = plain_case(mode, None, "right"), Schedule.of(mode, None, max_draft_tokens=2)
    target = Target(case.model, ScriptedChannel(case.make_source(), case.script), ticks())
    good = SamplingParams(max_new_tokens=20)
    asked = [replace(good, logits_processors=[fails]), good]
    requests = [SequenceRequest(case.prompt, params, Stopper(params, (), letters)) for params in asked]
    ended = [text for text, committed in target.write(requests, schedule, 2) if not committed]
    broken, whole = sorted(ended, key=lambda text: text.sequence_id)
    expected = alone(case.model, case.prompt, good, ()).tokens
    assert (broken.stopper.finish, str(broken.error)) == ("error", "this callable was made to fail")
    assert broken.stopper.tokens == expected[:7] and whole.stopper.tokens == expected


@examples(100)
@given(cases(sources=["right"]))
def test_a_perfect_drafter_is_never_contradicted(case: Case):
    target, _ = check(case)
    assert all(p.accepted == p.tested for p in target.passes)


@examples(100)
@given(cases(sources=["another model"]))
def test_the_targets_own_model_as_its_drafter_is_never_contradicted(case: Case):
    """Also where it samples: both add the same noise."""
    source = ModelSource(case.model)
    target = Target(case.model, ScriptedChannel(source, case.script), ticks())
    together(target, case.prompt, case.schedule, case.params, case.eos)
    assert all(p.accepted == p.tested for p in target.passes)


@examples(100)
@given(cases(sources=["never right"]))
def test_a_drafter_that_is_never_right_is_never_accepted(case: Case):
    target, _ = check(case)
    passes = [p for p in target.passes if p.committed]  # the last has none where everything is forbidden
    assert [(p.accepted, p.committed, p.hit) for p in passes] == [(0, 1, False)] * len(passes)


@pytest.mark.parametrize("gamma", range(1, 6))
def test_with_a_perfect_drafter_each_sd_pass_commits_a_block_and_its_bonus(gamma: int):
    case = plain_case("sd", gamma, "right", tokens=2 + 4 * (gamma + 1))
    ends = LocalChannel.pair()
    drafter = Drafter(case.make_source(), ends[1])
    ends[0].peer_step = drafter.step
    target = Target(case.model, ends[0])
    assert together(target, case.prompt, case.schedule, case.params) == alone(case.model, case.prompt, case.params, ())
    # the first pass reads the prompt before anything is drafted, the last one ends the text
    assert [p.committed for p in target.passes] == [1, *[gamma + 1] * 4, 1]
    assert [p.offered for p in target.passes] == [0, *[gamma] * 4, 0]
    # a block ends before its bonus token, which the drafter has not guessed
    assert not any(p.hit for p in target.passes[:-1])


def test_in_pearl_a_perfect_drafter_always_hits_and_loses_nothing_to_waiting():
    for gamma in (2, "auto"):
        target, _ = check(plain_case("pearl", gamma, "right", EAGER))
        assert target.passes[0].tested == 1  # pre-verify: the first guess came while the prompt was being read
        assert all(p.hit for p in target.passes[:-1])


def test_only_with_pre_verify_does_a_pass_follow_a_miss_without_a_guess():
    for mode, waits in (("pearl", False), ("pearl-no-post", False), ("pearl-no-pre", True), ("sd", True)):
        target, _ = check(plain_case(mode, 2, "sometimes", IDLE))
        after_miss = [q.offered for p, q in zip(target.passes, target.passes[1:-1], strict=False) if not p.hit]
        assert after_miss and all(bool(offered) == waits for offered in after_miss), mode


@examples(100)
@given(cases())
def test_the_recorded_facts_agree_with_the_text(case: Case):
    target, channel = check(case)
    passes, tokens = target.passes, alone(case.model, case.prompt, case.params, case.eos).tokens
    assert sum(p.committed for p in passes) == len(tokens)
    position = len(case.prompt) - 1
    for first, p in zip([True] + [False] * len(passes), passes, strict=False):
        assert p.position == position
        assert p.rows == (len(case.prompt) if first else 1) + p.offered
        assert p.sides <= p.offered and (case.schedule.mode == "tree" or not p.sides)
        assert 0 <= p.accepted <= p.tested <= p.offered + 1
        assert 1 <= p.committed <= p.offered + 1 or not p.committed
        position += p.committed
    verdicts = [m for m in channel.sent if isinstance(m, Verdict)]
    if case.schedule.drafts:
        assert target.draft_stats is not None
        assert target.draft_stats.verdicts == len(verdicts) == len(passes) - 1, "every pass but the last has a verdict"
        assert target.draft_stats.drafted == sum(len(m.guesses) for m in channel.peer.sent if isinstance(m, Nodes))
        assert target.draft_stats.hits >= sum(p.hit for p in passes[:-1]), (
            "the drafter knows its guesses before the target"
        )
    else:
        assert not channel.sent and not channel.peer.sent, "nothing is said to a drafter that drafts nothing"


@examples(60)
@given(cases(sources=["sometimes"], modes=DRAFTING), st.integers(0, 6))
def test_a_source_that_crashes_costs_no_token_and_is_reported(case: Case, calls: int):
    model = case.model
    crashing = Crashing(case.make_source(), calls)
    target = Target(model, ScriptedChannel(crashing, case.script), ticks())
    written = together(target, case.prompt, case.schedule, case.params, case.eos)
    assert written == alone(model, case.prompt, case.params, case.eos)
    if case.schedule.drafts:
        assert target.draft_stats is not None and target.draft_stats.failed == (crashing.every < 0)


def test_gamma_beyond_the_widest_pass_still_ends():
    target, _ = check(plain_case("sd", 40, "right", IDLE, tokens=70))
    assert max(p.offered for p in target.passes) == target._model.buckets.safe[-1] - 1


@pytest.mark.parametrize("mode", DRAFTING)
@pytest.mark.parametrize("gamma", [3, "auto"])
def test_no_pass_crosses_a_multiple_of_slots(mode: str, gamma: int | str):
    """Beyond it a row would be summed over more slots than the same row of another pass."""
    case = replace(plain_case(mode, gamma, "sometimes", scrambled(2)), prompt=tuple([1, 2, 3, 0] * 30))
    case = replace(case, params=SamplingParams(max_new_tokens=30))
    target, _ = check(case)
    assert target.passes[0].position < SLOT_MULTIPLE < target.passes[-1].position
    assert all(p.position // SLOT_MULTIPLE == (p.position + p.offered) // SLOT_MULTIPLE for p in target.passes)


@examples(40)
@given(cases(modes=DRAFTING))
def test_a_text_may_fill_its_models_to_the_last_token(case: Case):
    params = replace(case.params, stop=(), ignore_eos=True)
    longest = len(case.prompt) + params.max_new_tokens
    model = TableModel(case.vocabulary, case.order, case.table, case.scale, max_length=longest)
    for length in (longest, longest - 1):  # of the draft model
        source = ModelSource(TableModel(case.vocabulary, case.order, case.table, case.scale, max_length=length))
        target = Target(model, ScriptedChannel(source, case.script), ticks())
        assert together(target, case.prompt, case.schedule, params) == alone(model, case.prompt, params, ())
        assert not target.draft_stats or not target.draft_stats.failed


def test_a_source_that_fails_to_start_costs_no_token():
    class Stillborn(Noise):
        def begin(self, batch_slot: int, params: SamplingParams, continues: bool = False) -> None:
            raise RuntimeError("this source was made to fail")

    case = plain_case("sd", 2, "random")
    target = Target(case.model, ScriptedChannel(Stillborn(5), IDLE), ticks())
    written = together(target, case.prompt, case.schedule, case.params)
    assert written == alone(case.model, case.prompt, case.params, ())
    assert target.draft_stats is not None and target.draft_stats.failed


# Break the code on purpose: the property has to fail.


def accept_a_wrong_guess(patch: pytest.MonkeyPatch) -> None:
    """Off by one: the guess at which the walk stops is committed in place of the correction."""

    def walk(root: Node, rows: dict[Node, int], pick: Callable[[Node], int]) -> list[int]:
        committed, node = [], root
        while node in rows:
            last, picked = node, pick(node)
            node = node.children.get(picked)
            committed.append(picked)
        if last.children:
            committed[-1] = next(iter(last.children))
        return committed

    patch.setattr(pearl.roles.verification, "walk", walk)


def commit_one_unread_guess(patch: pytest.MonkeyPatch) -> None:
    """Off by one: after a hit the next guess is committed too, which no row of the pass has verified."""
    right = pearl.roles.verification.walk

    def walk(root: Node, rows: dict[Node, int], pick: Callable[[Node], int]) -> list[int]:
        committed = right(root, rows, pick)
        node: Node | None = root
        for token in committed:
            node = node and node.children.get(token)
        return committed + list(node.children)[:1] if node else committed

    patch.setattr(pearl.roles.verification, "walk", walk)


def repeat_the_root(patch: pytest.MonkeyPatch) -> None:
    """The rows of a pass begin one too early: every pick is that of the node's parent."""
    right = pearl.roles.verification.walk
    patch.setattr(
        pearl.roles.verification,
        "walk",
        lambda root, rows, pick: right(root, rows, lambda n: pick(root) if rows[n] else pick(n)),
    )


def keep_stale_branches(patch: pytest.MonkeyPatch) -> None:
    """A new root takes over what hung below the old one, which stands at other positions of the text."""
    right = Trie.commit

    def commit(self: Trie, tokens: Sequence[int]) -> bool:
        stale = dict(self.root.children)
        hit = right(self, tokens)
        for token, node in stale.items():
            if node is not self.root:
                self.root.children.setdefault(token, node)
        return hit

    patch.setattr(Trie, "commit", commit)


def look_for_the_new_root_among_the_first_guesses(patch: pytest.MonkeyPatch) -> None:
    """However far the text has moved, what hung one step below the old root is taken for what follows the new one."""

    right = Trie.commit

    def commit(self: Trie, tokens: Sequence[int]) -> bool:
        if not tokens:  # the text failed in this pass
            return right(self, tokens)
        child = self.root.children.pop(tokens[-1], None)
        self.tokens += tokens
        self.root = child or Node(tokens[-1], self.root.position + len(tokens))
        return child is not None

    patch.setattr(Trie, "commit", commit)


def pick_for_the_roots_position(patch: pytest.MonkeyPatch) -> None:
    """All rows of a pass draw the noise of its first one."""
    right = Picker.__init__
    patch.setattr(
        Picker,
        "__init__",
        lambda self, params, logits, positions: right(self, params, logits, [positions[0]] * len(positions)),
    )


def run_over_the_end(patch: pytest.MonkeyPatch) -> None:
    """The end of the text is looked for once a pass."""
    right = Stopper.take

    def take(self: Stopper, tokens: Sequence[int]) -> list[int]:
        self.tokens += tokens[:-1]
        return [*tokens[:-1], *right(self, tokens[-1:])]

    patch.setattr(Stopper, "take", take)


def take_the_guess_for_the_pick(patch: pytest.MonkeyPatch) -> None:
    """Every guess is right."""
    right = Picker.pick
    patch.setattr(Picker, "pick", lambda self, row, node: next(iter(node.children), right(self, row, node)))


def process_without_the_path(patch: pytest.MonkeyPatch) -> None:
    """What is done to the logits of a row looks at the text alone."""
    patch.setattr(PassRows, "below_root", lambda self: [[] for _ in self.nodes])


def process_with_the_chains_path(patch: pytest.MonkeyPatch) -> None:
    """A row beside the chain is taken for one that hangs from the root."""
    right = PassRows.below_root

    def below_root(self: PassRows) -> list[list[int]]:
        chain = len(self.nodes) - len(self.sides)
        return [path if row < chain else path[-1:] for row, path in enumerate(right(self))]

    patch.setattr(PassRows, "below_root", below_root)


def count_a_text_once(patch: pytest.MonkeyPatch) -> None:
    """Penalties know the prompt only."""
    right = Penalties._count
    patch.setattr(Penalties, "_count", lambda self, text, scores: self._read or right(self, text, scores))


MUTANTS = [
    process_without_the_path,
    process_with_the_chains_path,
    count_a_text_once,
    accept_a_wrong_guess,
    commit_one_unread_guess,
    repeat_the_root,
    keep_stale_branches,
    look_for_the_new_root_among_the_first_guesses,
    pick_for_the_roots_position,
    run_over_the_end,
    take_the_guess_for_the_pick,
]


@pytest.mark.parametrize("mutate", tiered(MUTANTS, lambda mutate: mutate in MUTANTS[3:6]))
def test_the_property_notices(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch):
    mutate(monkeypatch)
    wanted = dict(modes=["tree"], sources=["a tree"]) if mutate is process_with_the_chains_path else {}
    assert falsified(check, cases(**{"modes": DRAFTING} | wanted), most=5000)
