"""The counters of /metrics, and what is told of one text, are an evaluation's (docs/reference/figures.md)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from evaluations import ONE

from pearl.core.params import SamplingParams
from pearl.core.records import Pass
from pearl.evaluation.measures import acceptance
from pearl.server.metrics import Metrics, speculation

ALONE = replace(ONE, offered=0, verified=0, accepted_rows=0, tested=0, accepted=0, judged=(), hit=False)
# a chain of three was read, of which two were right
TWO_OF_THREE = replace(ONE, offered=3, verified=3, accepted_rows=2, tested=3, accepted=2)
ARRIVED_ONLY = replace(ALONE, tested=1, accepted=1, hit=True)  # the pass read no guess
BOTH = replace(ONE, offered=2, verified=2, accepted_rows=2, tested=3, accepted=3)  # one more came while the pass ran


def heard(passes: list[Pass]) -> dict[str, float]:
    """The counters after a server has heard of these passes."""
    metrics = Metrics("tiny", SimpleNamespace(running=0, open=set(), cache_share=0.0, degraded=False, events=()))
    for one in passes:
        text = SimpleNamespace(heard=2, last=2.0, before=1.0, latest=one)
        metrics.hear(text, [1] * one.committed)
    return {
        sample.name + sample.labels.get("position", ""): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
    }


def assert_as_evaluated(passes: list[Pass]) -> None:
    evaluated, counters, told = acceptance.counted(passes), heard(passes), speculation(passes, detailed=True)
    assert counters["vllm:spec_decode_num_drafts_total"] == told["num_spec_steps"] == evaluated["verifications"]
    assert counters["vllm:spec_decode_num_draft_tokens_total"] == told["num_draft_tokens"] == evaluated["draft_tokens"]
    assert (
        counters["vllm:spec_decode_num_accepted_tokens_total"]
        == told["num_accepted_draft_tokens"]
        == evaluated["accepted_draft_tokens"]
    )
    assert told["mean_acceptance_length"] == (evaluated["acceptance_length"] or 1.0)
    assert told["draft_acceptance_rate"] == (evaluated["draft_acceptance_rate"] or 0.0)
    for depth, (right, _) in enumerate(evaluated["counts_by_depth"]):
        assert counters.get(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{depth}", 0) == right
    assert told["per_step_accepted"] == [one.accepted_rows for one in passes if one.offered]
    assert told["per_step_drafted"] == [one.offered for one in passes if one.offered]


@pytest.mark.parametrize("passes", [[ALONE], [ARRIVED_ONLY], [TWO_OF_THREE, BOTH], [ALONE, BOTH, ARRIVED_ONLY, ONE]])
def test_a_server_counts_guesses_as_an_evaluation_does(passes):
    assert_as_evaluated(passes)


def test_a_guess_that_arrived_during_a_pass_counts_for_its_root_alone():
    counters = heard([ARRIVED_ONLY])
    assert counters["vllm:spec_decode_num_drafts_total"] == 0 and counters["pearl_roots_total"] == 1


@pytest.mark.parametrize("mode", ["ar", "sd"])
def test_so_it_does_of_a_real_text(engine, mode):
    params = SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True)
    passes = list(engine.generate("the", params, mode=mode).stats.passes)
    assert (mode != "ar") == any(one.verified for one in passes)
    assert_as_evaluated(passes)
