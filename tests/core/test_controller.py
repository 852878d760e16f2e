"""What the runtime decides for itself pays, by what it has seen; what was fixed by hand stays fixed."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import examples

from pearl.core.control.acceptance import AcceptanceRates
from pearl.core.control.controller import Controller
from pearl.core.control.draft_trial import FIRST_PAUSE, LONGEST_PAUSE, LONGEST_TRIAL, PROBE, TRIAL
from pearl.core.control.wait_policy import SHORT_WAIT_FRACTION
from pearl.core.schedule import MAX_AHEAD, Schedule
from pearl.core.theory import best_gamma
from pearl.core.token_buckets import ANY, LEAVES, LIMIT, BatchedTokenBuckets, TokenBuckets
from pearl.core.trie import Candidate, Trie, path_numbers

FREE = ("pearl", "pearl-no-pre", "tree")
TREE = Schedule.of("tree")


def costing(*cost_s: float, safe: tuple[int, ...] = ANY.safe) -> TokenBuckets:
    """Passes that cost so much by their rows; beyond those given as much as the last."""
    return TokenBuckets(safe, (*cost_s, *[cost_s[-1]] * LIMIT)[:LIMIT])


EACH = costing(*[float(rows) for rows in range(1, LIMIT + 1)])  # a row costs a pass


def chain(*chances: float) -> list[Candidate]:
    """A chain of guesses of such probabilities."""
    trie = Trie([0])
    node = trie.root
    for chance in chances:
        node = trie.grow(node, 1, logp=math.log(chance))
    return trie.best(99)


def bush(*chances: float) -> list[Candidate]:
    """As many guesses of the same next token."""
    trie = Trie([0])
    for token, chance in enumerate(chances):
        trie.grow(trie.root, token, logp=math.log(chance))
    return trie.best(99)


def chosen_by(controller: Controller, nodes: list[Candidate]) -> list[Candidate]:
    """Of a sequence that is alone in its pass."""
    return controller.choose([nodes])[0]


def taken_by(controller: Controller, nodes: list[Candidate]) -> int:
    return len(chosen_by(controller, nodes))


COST_STEPS = st.lists(st.floats(0.0, 1.0), min_size=LIMIT - 1, max_size=LIMIT - 1)
CHANCES = st.lists(st.floats(0.001, 0.999), max_size=20)
SAFE = st.sets(st.integers(2, LIMIT), min_size=3).map(lambda counts: tuple(sorted(counts)))


@st.composite
def plans(draw: st.DrawFn) -> TokenBuckets:
    costs = [1.0]
    for step in draw(COST_STEPS):
        costs.append(costs[-1] + step)
    return TokenBuckets(draw(SAFE), tuple(costs))


@st.composite
def plans_with_paths(draw: st.DrawFn) -> TokenBuckets:
    return replace(draw(plans()), path_s=draw(st.floats(0.0, 1.0)))


@st.composite
def tries(draw: st.DrawFn) -> Trie:
    trie = Trie([0])
    nodes = [trie.root]
    for parent, token, logp in draw(
        st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3), st.floats(-5, -0.01)), max_size=20)
    ):
        nodes.append(trie.grow(nodes[parent % len(nodes)], token, logp=logp))
    return trie


# the width of a pass


def test_rows_that_cost_nothing_are_all_taken():
    for nodes in (chain(*[0.5] * 15), bush(*[0.01] * 15), chain(0.9), []):
        assert taken_by(Controller(TREE, ANY), nodes) == len(nodes)


def test_rows_that_cost_a_pass_each_are_never_taken():
    assert taken_by(Controller(TREE, EACH), chain(*[0.99] * 15)) == 0


def test_a_row_is_taken_where_its_chance_is_worth_its_time():
    """The run makes one token a second, and the second row costs a third of one."""
    plan = costing(1.0, 1.33, 3.0)
    assert taken_by(Controller(TREE, plan), chain(0.5, 0.5)) == 1
    assert taken_by(Controller(TREE, plan), chain(0.25, 0.5)) == 0


def test_a_path_beside_the_chain_has_a_price_of_its_own():
    """Two guesses for the next token, one more after the second: a path costs a third of a token."""
    trie = Trie([0])
    trie.grow(trie.root, 1, logp=math.log(0.65))
    beside = trie.grow(trie.root, 2, logp=math.log(0.25))
    trie.grow(beside, 3, logp=math.log(0.95))
    nodes = trie.best(9)
    plan = costing(1.0)
    assert [one.node.token for one in chosen_by(Controller(TREE, plan), nodes)] == [1, 2, 3]
    for path_s, tokens in ((0.33, [1, 2, 3]), (0.6, [1])):
        assert [one.node.token for one in chosen_by(Controller(TREE, replace(plan, path_s=path_s)), nodes)] == tokens


def test_likelier_nodes_on_a_path_that_does_not_pay_make_room_for_the_chain():
    trie = Trie([0])
    first = trie.grow(trie.root, 1, logp=math.log(0.5))
    trie.grow(trie.root, 2, logp=math.log(0.45))
    trie.grow(first, 3, logp=math.log(0.55))
    chosen = chosen_by(Controller(TREE, replace(costing(1.0), path_s=0.6)), trie.best(9))
    assert [(one.node.token, one.parent) for one in chosen] == [(1, -1), (3, 0)]


@examples(200)
@given(tries(), plans_with_paths())
def test_no_other_choice_of_paths_would_gain_more(trie: Trie, plan: TokenBuckets):
    """Every prefix of the nodes on the first few paths is tried; what is chosen is what a pass can read."""
    controller, nodes = Controller(TREE, plan), trie.best(15)
    numbers, reached = path_numbers(nodes), [1.0]
    for node in nodes:
        reached.append(reached[node.parent + 1] * controller.rates.of(node.node.logp, node.depth))

    def gain(places: list[int]) -> float:
        paths = max((numbers[place] for place in places), default=0)
        cost = plan.cost(len(places) + 1, paths) / plan.cost(1)
        return 1 + sum(reached[place + 1] for place in places) - cost

    options = [
        [place for place, number in enumerate(numbers) if number <= limit][:rows]
        for limit in range(len(nodes) + 1)
        for rows in range(plan.safe[-1])
    ]
    chosen = chosen_by(controller, nodes)
    kept = {id(one.node): place for place, one in enumerate(nodes)}
    assert gain([kept[id(one.node)] for one in chosen]) == pytest.approx(max(map(gain, options)))
    for place, one in enumerate(chosen):
        parent = chosen[one.parent].node if one.parent >= 0 else trie.root
        assert one.parent < place and parent.children[one.node.token] is one.node


def test_padding_is_free():
    """Passes of 2 and 3 rows are padded to 4, whose cost counts for them too."""
    plan = costing(1.0, 9.0, 9.0, 1.2, 9.0, safe=(1, 4, 16))
    assert taken_by(Controller(TREE, plan), chain(*[0.5] * 15)) == 3


def brute_force(plan: TokenBuckets, chances: list[float]) -> float:
    """What the best width gains at the price of the target alone: tokens, less the time that they take."""
    alone = plan.cost_s[plan.pad(1) - 1]
    reached, gains = [1.0], []
    for chance in chances:
        reached.append(reached[-1] * chance)
    for rows in range(1, min(len(reached), plan.safe[-1]) + 1):
        gains.append(sum(reached[:rows]) - plan.cost_s[plan.pad(rows) - 1] / alone)
    return max(gains)


@examples(200)
@given(plans(), CHANCES)
def test_no_other_width_would_gain_more(plan: TokenBuckets, chances: list[float]):
    controller, nodes = Controller(TREE, plan), chain(*chances)
    width = taken_by(controller, nodes)
    believed = [controller.rates.of(node.node.logp, node.depth) for node in nodes]
    taken = sum(math.prod(believed[:depth]) for depth in range(width + 1))
    cost = plan.cost_s[plan.pad(width + 1) - 1] / plan.cost_s[plan.pad(1) - 1]
    assert taken - cost == pytest.approx(brute_force(plan, believed))


@examples(200)
@given(plans(), st.integers(0, 20), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_likelier_guesses_never_make_a_pass_narrower(plan: TokenBuckets, count: int, a: float, b: float):
    low, high = sorted((a, b))
    assert taken_by(Controller(TREE, plan), chain(*[low] * count)) <= taken_by(
        Controller(TREE, plan), chain(*[high] * count)
    )


@examples(200)
@given(
    plans(),
    CHANCES,
    st.one_of(st.none(), st.integers(1, 16)),
    st.one_of(st.just("auto"), st.integers(1, 20)),
    st.sampled_from(FREE),
)
def test_a_pass_is_never_wider_than_the_schedule_the_machine_and_the_guesses_allow(plan, chances, width, gamma, mode):
    schedule = Schedule.of(mode, gamma, None, width)
    taken = taken_by(Controller(schedule, plan), chain(*chances))
    allowed = [len(chances), plan.safe[-1] - 1, (width or LIMIT) - 1, 99 if schedule.gamma is None else schedule.gamma]
    assert 0 <= taken <= min(allowed)
    if width or schedule.gamma is not None:
        assert taken == min(allowed), "what is fixed by hand is taken, whatever it costs"


@pytest.mark.parametrize("schedule", [Schedule.of("pearl"), Schedule.of("pearl", 4), TREE], ids=str)
@pytest.mark.parametrize("texts", [3, 4, 8, 300])
def test_texts_without_number_read_their_roots_and_no_more_than_fits(schedule: Schedule, texts: int):
    joint = BatchedTokenBuckets((2, 4), (1.0, 1.0))
    chosen = Controller(schedule, ANY, joint).choose([chain(*[0.9] * 10)] * texts)
    rows = texts + sum(map(len, chosen))
    assert rows <= max(texts, joint.most) and (rows == 4 or texts != 3 or schedule.gamma), "the fourth row is free"


def test_a_source_that_was_never_right_may_still_be():
    """However long: the logarithm of nothing would end every text."""
    rates = AcceptanceRates()
    for _ in range(40_000):
        rates.learn(0.0, False)
    assert 0 < rates.of(0.0) < 1e-3 and math.isfinite(Controller(TREE, ANY).log_chance(chain(1.0)[0].node, 1))


def test_a_first_pass_that_commits_nothing_leaves_the_rate_what_it_was_expected_to_be():
    """Nothing is left to choose from at the second token, say."""
    controller = Controller(TREE, costing(1.0, 1.33, 3.0))
    before = controller.rate
    controller.record_pass(1, 0, 1.0, 1.0)
    assert controller.rate == before > 0


def test_a_faster_run_has_higher_prices():
    """A row that pays in a run of one token a pass does not where a pass brings four."""
    plan, nodes = costing(1.0, 1.33, 3.0), chain(0.5)
    slow, fast = Controller(TREE, plan), Controller(TREE, plan)
    for _ in range(50):
        slow.record_pass(1, 1, 1.0, 1.0)
        fast.record_pass(1, 4, 1.0, 1.0)
    assert (slow.rate, fast.rate) == (pytest.approx(1.0), pytest.approx(4.0))
    assert (taken_by(slow, nodes), taken_by(fast, nodes)) == (1, 0)


def test_a_machine_that_has_become_slower_changes_no_width():
    """All passes cost twice what was measured, and so the run makes half as many tokens a second."""
    plan, nodes = costing(1.0, 1.33, 3.0), chain(0.5, 0.5)
    controller = Controller(TREE, plan)
    for _ in range(50):
        controller.record_pass(1, 1, 2.0, 2.0)
    assert taken_by(controller, nodes) == 1


def measured_while_busy(quiet: int) -> TokenBuckets:
    """A pass takes 1 and a tenth a row more; of this plan all counts but one were timed while other jobs ran."""
    return costing(*(1 + 0.1 * n if n + 1 == quiet else 2.2 + 0.02 * n for n in range(LIMIT)))


@pytest.mark.parametrize("quiet", [1, 4, 10, 16])
def test_a_plan_that_was_measured_on_a_busy_machine_is_corrected_by_the_passes(quiet: int):
    """What is read then brings nearly as much a second as the best that there is."""
    nodes, plan = chain(*[0.75] * 15), measured_while_busy(quiet)
    plan = replace(plan, cost_s=tuple(min(plan.cost_s[n:]) for n in range(LIMIT)))  # as a measurement leaves it
    brought = [sum(0.75**depth for depth in range(rows)) for rows in range(1, LIMIT + 1)]
    speeds = [tokens / (1 + 0.1 * row) for row, tokens in enumerate(brought)]
    controller = Controller(TREE, plan)
    for number in range(80):
        taken = 0 if number % 4 == 0 else taken_by(controller, nodes)  # after a miss there is nothing to read
        controller.record_pass(1 + taken, round(brought[taken]), 1 + 0.1 * taken, 1 + 0.1 * taken)
    assert speeds[taken_by(controller, nodes)] > 0.93 * max(speeds)


def test_rows_of_a_sequence_cost_what_they_cost_beside_those_of_others():
    """A pass that four sequences share has 12 rows, the last four of which are dear."""
    batched = BatchedTokenBuckets((4, 8, 12), (1.0, 1.1, 3.0))
    controller = Controller(TREE, costing(1.0, 1.0, 1.0), batched)
    controller.record_pass(12, 4, 3.0, 3.0, sequences=4)
    assert controller.seconds_of_rows(2, 3) == 0.0, "10 rows are read as 12"
    controller.record_pass(9, 4, 3.0, 3.0, sequences=4)
    assert controller.seconds_of_rows(2, 3) == pytest.approx(1.9, rel=0.2)


def test_sequences_with_a_forward_each_teach_what_one_forward_costs():
    """Three of them take three times as long, and no row is dearer for it."""
    plan, nodes = costing(1.0, 1.1, 1.2, 5.0), chain(0.6, 0.6, 0.6)
    alone, several = Controller(TREE, plan), Controller(TREE, plan)
    for _ in range(20):
        alone.record_pass(3, 2, 1.2, 1.2)
        several.record_pass(9, 6, 3.6, 3.6, sequences=3)
    assert taken_by(several, nodes) == taken_by(alone, nodes) == 2
    assert several.rate == pytest.approx(alone.rate)


def test_a_pass_that_something_stopped_for_long_changes_no_width():
    plan, nodes = costing(1.0, 1.2, 1.4, 3.0), chain(0.6, 0.6, 0.6)
    controller = Controller(TREE, plan)
    for _ in range(20):
        controller.record_pass(3, 2, 1.4, 1.4)
    before = taken_by(controller, nodes)
    controller.record_pass(3, 2, 100.0, 1.4)
    assert taken_by(controller, nodes) == before == 2


# chances


def test_at_first_the_drafter_is_believed():
    chances = AcceptanceRates()
    for q in (0.005, 0.035, 0.075, 0.35, 0.75, 0.95):
        assert chances.of(math.log(q)) == pytest.approx(q)
    assert 0.5 < chances.of(0.0) < 1, "a guess without a probability is not certain"


@pytest.mark.parametrize("q, true", [(0.95, 0.5), (0.15, 0.75), (1.0, 0.25), (0.55, 0.0), (0.05, 1.0)])
def test_guesses_are_worth_what_they_have_been_worth(q: float, true: float):
    chances, others = AcceptanceRates(), AcceptanceRates()
    before = {p: others.of(math.log(p)) for p in (0.25, 0.65, 0.85)}
    for i in range(400):
        chances.learn(math.log(q), accepted=i % 4 < 4 * true)
    assert chances.of(math.log(q)) == pytest.approx(true, abs=0.05)
    assert {p: chances.of(math.log(p)) for p in before} == before, "and say nothing about others"


def test_a_drafter_that_promises_too_much_gets_narrower_passes():
    plan, nodes = costing(1.0, 1.2, 1.4, 1.6, 1.8, 2.0), chain(*[0.9] * 5)
    honest, boasting = Controller(TREE, plan), Controller(TREE, plan)
    for i in range(200):
        honest.record_guess(math.log(0.9), i % 10 != 0)
        boasting.record_guess(math.log(0.9), i % 10 == 0)
    assert taken_by(honest, nodes) == 5 and taken_by(boasting, nodes) == 0


def test_only_first_guesses_count_for_acceptance():
    controller = Controller(TREE, ANY)
    for _ in range(100):
        controller.record_guess(-0.1, True)
        controller.record_guess(-2.0, False, first=False)
    assert controller.acceptance > 0.95


# the off switch


def with_a_model(schedule: Schedule, plan: TokenBuckets = ANY) -> Controller:
    """Its drafter is a model, which takes some of the machine."""
    controller = Controller(schedule, plan)
    controller.record_draft_costs([0.3] * LEAVES)
    return controller


def run(controller: Controller, passes: int, tokens: float, seconds: float, forward_s: float = 1.0) -> list[bool]:
    """Whether each pass was one with a drafter. Such passes commit `tokens` on average, their forward takes `forward_s`
    and they `seconds`; a pass of the target alone commits one token and takes a second."""
    drafted, owed = [], 0.0
    for _ in range(passes):
        assert (controller.plan.max_depth == 0) == controller.paused
        drafted.append(not controller.paused)
        if controller.paused:
            controller.record_pass(1, 1, 1.0, 1.0)
        else:
            owed += tokens
            controller.record_pass(2, int(owed), forward_s, seconds)
            owed -= int(owed)
    return drafted


def pauses(drafted: list[bool]) -> list[int]:
    """How long each pause between two trials was."""
    lengths, current = [], 0
    for one in drafted:
        if one and current:
            lengths.append(current)
        current = 0 if one else current + 1
    return lengths


@pytest.mark.parametrize("mode", FREE)
def test_a_source_without_a_model_is_never_stopped(mode: str):
    """It takes nothing from the target, and its guesses come in bursts."""
    assert all(run(Controller(Schedule.of(mode), ANY), 1000, 1, 1.0))


@pytest.mark.parametrize("mode", FREE)
@pytest.mark.parametrize("make", [with_a_model])
def test_drafting_that_brings_nothing_is_stopped_and_tried_ever_more_rarely(mode: str, make):
    drafted = run(make(Schedule.of(mode), ANY), 4000, 1, 1.1)
    lengths = pauses(drafted)
    assert drafted.index(False) == TRIAL, "it is judged after a trial"
    assert lengths[0] == PROBE + FIRST_PAUSE and max(lengths) == LONGEST_PAUSE
    lengths[0] -= PROBE
    assert all(later == min(2 * one, LONGEST_PAUSE) for one, later in itertools.pairwise(lengths))
    assert sum(drafted[1000:]) / 3000 < 1.5 * TRIAL / LONGEST_PAUSE, "it costs next to nothing, and it is still tried"


def test_a_pause_ends_with_the_text_that_sources_beside_the_target_repeat():
    """A copied part, which the target alone writes with five tokens a pass, and then a part of its own."""
    controller = with_a_model(TREE)
    run(controller, TRIAL, 1.4, 1.2)
    for _ in range(PROBE + 3):
        assert controller.paused
        controller.record_pass(5, 16, 1.0, 1.0)
    alone = 0
    while controller.paused:
        controller.record_pass(1, 1, 1.0, 1.0)
        alone += 1
    assert 3 < alone < 8
    assert sum(not one for one in run(controller, 2 * LONGEST_TRIAL, 1.4, 1.2)) == PROBE, "it is measured anew, once"


def test_a_few_slow_passes_of_a_pause_are_not_what_the_target_makes_alone():
    """Something else on the machine slows six passes down; drafting was 0.94 times as fast, and stays so."""
    controller = with_a_model(TREE)
    run(controller, 200, 1, 1.06)
    assert controller.paused
    for _ in range(6):
        controller.record_pass(1, 1, 1.0, 1.17)
    assert sum(run(controller, 2000, 1, 1.06)) / 2000 < 0.1


def test_drafting_that_brings_much_is_never_stopped():
    assert all(run(with_a_model(TREE), 2000, 3, 1.2))


def test_drafting_that_brings_a_little_is_stopped_once_to_see_what_the_target_makes_alone():
    drafted = run(with_a_model(TREE), 2000, 1.5, 1.3)
    assert sum(not one for one in drafted) == PROBE


def test_guesses_that_cost_nothing_are_not_stopped_for_bringing_little():
    """A source without a model takes nothing from the target."""
    assert all(run(Controller(TREE, ANY), 2000, 1.25, 1.2))


def test_a_drafter_that_becomes_good_is_taken_back_and_its_past_is_forgiven():
    controller = with_a_model(TREE)
    run(controller, 3000, 1, 1.3)
    run(controller, LONGEST_PAUSE + 2 * TRIAL, 3, 1.1)
    assert all(run(controller, 500, 3, 1.1))
    assert pauses(run(controller, 2 * LONGEST_TRIAL + 2 * FIRST_PAUSE, 1, 1.3))[0] == FIRST_PAUSE


def test_a_few_bad_passes_of_a_drafter_that_pays_do_not_stop_it():
    """Sixteen passes of hard text in every hundred, after it has been worth it for a while."""
    controller = with_a_model(TREE)
    run(controller, 4 * LONGEST_TRIAL, 2, 1.2)
    for _ in range(10):
        assert all(run(controller, 16, 1, 1.2)) and all(run(controller, 84, 2, 1.2))


def test_a_target_slower_while_the_drafter_runs_is_compared_with_itself_alone():
    """Both share the machine's memory: here a pass beside a drafter takes a third longer, and commits a little more."""
    assert sum(run(with_a_model(TREE), 2000, 1.25, 1.3, forward_s=1.3)) / 2000 < 0.1


def test_also_a_target_that_is_much_slower_while_the_drafter_runs_is():
    """A pass beside a drafter takes twice as long and commits 1.5 tokens: a quarter slower than without."""
    assert sum(run(with_a_model(TREE), 2000, 1.5, 2.0, forward_s=2.0)) / 2000 < 0.2


@pytest.mark.parametrize("schedule", [Schedule.of("sd"), Schedule.of("pearl", 3), Schedule.of("pearl-no-post")])
def test_what_works_in_blocks_is_never_stopped(schedule: Schedule):
    """Its name says what is compared."""
    assert all(run(with_a_model(schedule), 300, 1, 3.0))


# what the drafter is told


def test_the_plan_carries_what_was_fixed_by_hand():
    controller = Controller(Schedule.of("tree", None, 3, None, 9), ANY)
    assert (controller.plan.draft_batch, controller.plan.max_depth) == (3, 9)
    controller.record_draft_costs([1.0] * LEAVES)
    assert controller.plan.draft_batch == 3
    for gamma in (1, 7):
        assert Controller(Schedule.of("pearl", gamma), ANY).plan.gamma == gamma


def test_a_plan_left_to_itself_goes_as_far_as_it_may():
    assert Controller(TREE, ANY).plan.max_depth == MAX_AHEAD
    assert Controller(Schedule.of("pearl"), ANY).plan.gamma == 1


@pytest.mark.parametrize(
    "costs, branches",
    [
        ([1.0] * LEAVES, LEAVES),
        ([float(rows) ** 1.5 for rows in range(1, LEAVES + 1)], 1),
        ([1.0, 1.1, 1.2, 9.0], 3),  # three rows for 1.2 is the best price of a row
        ([], LEAVES),  # not known yet
    ],
)
def test_a_draft_has_as_many_rows_as_are_cheapest_each(costs: list[float], branches: int):
    controller = Controller(TREE, ANY)
    controller.record_draft_costs(costs)
    assert controller.plan.draft_batch == branches


@examples(60)
@given(st.floats(0.01, 2.0), st.lists(st.booleans(), max_size=60), st.sampled_from(["sd", "pearl-no-post"]))
def test_a_block_left_to_itself_is_the_one_that_theory_expects_most_of(each: float, judged: list[bool], mode: str):
    controller = Controller(Schedule.of(mode), costing(1.0))
    controller.record_drafting(4, 4 * each)
    for right in judged:
        controller.record_guess(0.0, right)
    assert controller.plan.gamma == controller.gamma == best_gamma(controller.acceptance, 1.0 / each)


def test_a_drafter_that_is_right_and_fast_gets_long_blocks_and_a_poor_one_short_ones():
    good, poor = (Controller(Schedule.of("sd"), costing(1.0)) for _ in range(2))
    for _ in range(60):
        good.record_guess(0.0, True)
        poor.record_guess(0.0, False)
    good.record_drafting(1, 0.05)
    poor.record_drafting(1, 0.5)
    assert good.gamma >= 10 and poor.gamma == 1


# waiting


def test_a_guess_is_waited_for_if_the_drafter_is_much_faster_than_a_pass():
    fast, slow, poor = (Controller(TREE, costing(1.0)) for _ in range(3))
    fast.record_draft_costs([0.05, 0.05])
    slow.record_draft_costs([2.0, 2.0])
    poor.record_draft_costs([0.05, 0.05])
    for _ in range(100):
        poor.record_guess(-1.0, False)
    assert all(0.05 < fast.take_wait_budget() < 0.5 for _ in range(10)), (
        "longer than a guess takes; no longer than it is worth"
    )
    assert max(slow.take_wait_budget(), poor.take_wait_budget()) <= SHORT_WAIT_FRACTION, (
        "neither for late guesses nor for wrong ones"
    )


def test_a_guess_that_is_nearly_certain_is_not_waited_for():
    """Whether it is right is known after the pass anyhow, and so it is with the one after it."""
    controller = Controller(TREE, costing(1.0))
    controller.record_draft_costs([0.1, 0.1])
    assert controller.take_wait_budget() > 0.15
    for _ in range(50):
        controller.record_guess(-0.1, True)
    assert controller.take_wait_budget() <= SHORT_WAIT_FRACTION


def test_how_long_a_first_guess_takes_is_learned():
    """It comes much later than the drafter's forwards would have it: then it is not waited for."""
    controller = Controller(TREE, costing(1.0))
    controller.record_draft_costs([0.1, 0.1])
    assert controller.take_wait_budget() == pytest.approx(0.45)
    for _ in range(60):
        controller.record_wait(True, 0.2)
    assert controller.take_wait_budget() == pytest.approx(0.6, rel=0.01)
    for _ in range(60):
        controller.record_wait(True, 0.9)
    assert controller.take_wait_budget() <= SHORT_WAIT_FRACTION


@pytest.mark.parametrize("came, times", [(True, 400), (False, 12)])
def test_a_moment_is_given_to_a_source_of_unknown_speed_and_ever_more_rarely_where_nothing_comes(
    came: bool, times: int
):
    controller, waits = Controller(TREE, costing(1.0)), []
    for _ in range(400):
        waits.append(controller.take_wait_budget())
        if waits[-1]:
            controller.record_wait(came)
    assert set(waits) <= {0.0, SHORT_WAIT_FRACTION * 1.0} and 1 <= sum(map(bool, waits)) <= times
    assert came == all(waits) and any(waits[-65:]), "and it is always tried again"


@pytest.mark.parametrize("schedule", [Schedule.of("pearl", 3), Schedule.of("sd")])
def test_where_the_schedule_says_how_long_to_wait_the_controller_does_not(schedule: Schedule):
    controller = with_a_model(schedule, costing(1.0))
    assert all(controller.take_wait_budget() == 0 for _ in range(9))


def test_nobody_waits_for_a_drafter_that_was_stopped():
    controller = with_a_model(TREE)
    run(controller, TRIAL, 1, 2.0)
    assert controller.paused and all(controller.take_wait_budget() == 0 for _ in range(9))
