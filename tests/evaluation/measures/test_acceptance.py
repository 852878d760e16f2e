"""Acceptance by the field's conventions: the ten tokens of the docs, vLLM's counters, and what a pass had not read."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from evaluations import ONE
from toys import TableModel, letters

from pearl.core.params import SamplingParams
from pearl.core.records import Pass
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.drafters.draft_source import DraftSource
from pearl.evaluation.measures import acceptance
from pearl.roles.drafter import Drafter
from pearl.roles.target import Target
from pearl.wire.channel import LocalChannel

PAGE = Path(__file__).resolve().parents[3] / "docs/reference/figures.md"


def worked_example() -> list[list[str]]:
    section = PAGE.read_text().split("## Acceptance: ten tokens, worked out")[1].split("\n## ")[0]
    return [re.split(r" *\| *", line.strip("| ")) for line in section.splitlines() if line.startswith("|")]


def passes() -> list[Pass]:
    rows = [row for row in worked_example() if row[0].isdigit()]
    return [
        replace(
            ONE, offered=int(read), verified=min(int(read), int(right) + 1), accepted_rows=int(right), committed=int(n)
        )
        for _, read, right, n in rows
    ]


def test_the_docs_ten_tokens_come_to_the_figures_beside_them():
    told = {row[0].strip("`"): row[-1] for row in worked_example() if row[0].startswith("`")}
    found = acceptance.counted(passes())
    assert sum(one.committed for one in passes()) == 10
    for key in ("acceptance_length", "draft_acceptance_rate"):
        assert f"{found[key]:.3f}" == told[key]
    for key in ("verifications", "draft_tokens", "accepted_draft_tokens"):
        assert str(found[key]) == told[key]
    assert f"{10 / len(passes()):.3f}" == told["tokens_per_pass"]
    assert ", ".join(f"{right} of {read}" for right, read in found["counts_by_depth"]) == told["counts_by_depth"]


def test_they_are_vllms_counters():
    """As its `SpecDecodingStats.observe_draft` counts a step in which a request had draft tokens (v0.11 and later)."""
    drafts = draft_tokens = accepted_tokens = 0
    per_position = [0] * 8
    for one in passes():
        if one.offered:
            drafts += 1
            draft_tokens += one.offered
            accepted_tokens += one.accepted_rows
            for position in range(one.accepted_rows):
                per_position[position] += 1
    found = acceptance.counted(passes())
    assert found["acceptance_length"] == 1 + accepted_tokens / drafts
    assert found["draft_acceptance_rate"] == accepted_tokens / draft_tokens
    rates = [count / drafts for count in per_position[:3]]
    assert rates == [right / found["verifications"] for right, _ in found["counts_by_depth"]]


def test_without_a_guess_there_is_no_acceptance_length():
    found = acceptance.counted([replace(ONE, offered=0, verified=0, accepted_rows=0, tested=1)])
    assert found["acceptance_length"] is found["draft_acceptance_rate"] is None and found["acceptance_by_depth"] == []


def decoded(right: bool, **schedule: int) -> list[Pass]:
    """Of twenty tokens, with a source that is always right, or never."""
    model, params = TableModel(), SamplingParams(max_new_tokens=20)
    alone = Target(TableModel())
    text = [
        0,
        1,
        *(t for some in alone.decode([0, 1], Schedule.of("ar"), params, Stopper(params, (), letters)) for t in some),
    ]

    class Source(DraftSource):
        def propose(self, tokens, room):
            after = text[len(tokens) : len(tokens) + room]
            return [(token if right else (token + 1) % model.vocabulary, ()) for token in after]

    here, there = LocalChannel.pair()
    here.peer_step = Drafter(Source(), there).step
    target = Target(model, here)
    mine = [
        t
        for some in target.decode([0, 1], Schedule.of("sd", **schedule), params, Stopper(params, (), letters))
        for t in some
    ]
    assert mine == text[2:]
    return target.passes


def test_a_perfect_drafter_has_gamma_and_the_targets_own_token():
    counted = acceptance.counted(decoded(True, gamma=3)[1:-1])  # the last block has less room
    assert counted["acceptance_length"] == 4.0 and counted["acceptance_by_depth"] == [1.0, 1.0, 1.0]


def test_a_drafter_that_is_never_right_has_one():
    counted = acceptance.counted(decoded(False, gamma=3))
    assert counted["acceptance_length"] == 1.0 and counted["counts_by_depth"] == [[0, counted["verifications"]]]


@pytest.mark.parametrize("right", [True, False])
def test_a_pass_says_what_of_the_guesses_it_had_read(right):
    for one in decoded(right, gamma=4):
        assert 0 <= one.accepted_rows <= one.verified <= one.offered and (one.verified > 0) == (one.offered > 0)
        assert one.committed <= one.accepted_rows + 1


def test_early_lines_are_read_as_far_as_they_tell():
    line = {"offered": 3, "committed": 3, "tested": 3}
    assert acceptance.of_early_line(line) == {"accepted_rows": 2, "verified": 3}
    assert acceptance.of_early_line(line | {"offered": 0}) == {"accepted_rows": 0, "verified": 0}
