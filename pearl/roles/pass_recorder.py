"""What a pass leaves for the records: its statistics, and its place in the timeline."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pearl.core.messages import DraftPlan
from pearl.core.records import Pass
from pearl.machine.timeline import OFF, Trace, flow_id
from pearl.roles.sequence import SequenceState
from pearl.roles.verification import PassRows, PassWalk


@dataclass(frozen=True)
class PassTimes:
    """Moments of a pass, on the target's clock."""

    began: float  # the turn of the loop that it belongs to; of a first pass the prompt's turn
    since: float  # the waiting for guesses
    ready: float  # that was over
    asked: float  # the sources beside the target had guessed, and the rows were chosen
    read: float  # the logits were there
    ended: float  # the verdict was sent


def record(
    sequence: SequenceState, rows: PassRows, walked: PassWalk, plan: DraftPlan, times: PassTimes, sequences: int
) -> None:
    """`sequences`: that shared the forward."""
    first = not sequence.passes
    prompt = len(sequence.request.prompt) - sequence.cached - 1 if first else 0
    reading_s = sequence.reading_s if first else 0.0
    sequence.passes.append(
        Pass(
            position=walked.position,
            rows=len(rows.nodes) + prompt,
            offered=len(rows.nodes) - 1,
            sides=len(rows.sides),
            paths=rows.paths,
            tested=len(walked.outcomes),
            accepted=sum(one.rank is not None for one in walked.outcomes),
            committed=len(walked.committed),
            hit=sequence.hit,
            judged=walked.outcomes,
            block=plan.gamma,
            branches=plan.draft_batch,
            ahead=plan.max_depth,
            patience_s=sequence.wait_budget_s,
            waited_s=times.ready - times.since,
            forward_s=times.read - times.asked + reading_s,
            seconds=times.ended - times.began,
            texts=sequences,
            rows_by=dict(Counter(node.origin for node in rows.nodes[1:])),
            others_s=times.ended - times.began - (times.ended - times.since + reading_s),
            verified=walked.verified,
            accepted_rows=walked.accepted_rows,
        )
    )


def draw(sequence: SequenceState, times: PassTimes, trace: Trace, drafts: bool) -> None:
    """The last pass, in the timeline. `drafts`: its verdict has gone to a drafter."""
    if trace is OFF:
        return
    one = sequence.passes[-1]
    at = {"sequence": sequence.sequence_id, "position": one.position}
    if one.waited_s > 1e-4:
        trace.span("wait", times.since, times.ready, **at)
    facts: dict[str, Any] = {
        "rows": one.offered + 1,
        "offered": one.offered,
        "committed": one.committed,
        "hit": one.hit,
        "origins": one.origins,
    }
    trace.span("prefill" if len(sequence.passes) == 1 else "verify", times.ready, times.ended, **at, **facts)
    prepared = bool(one.judged) and one.judged[-1].rank not in (0, None)
    trace.instant("hit" if one.hit else "miss", times.read, **at, prepared=prepared)
    if drafts and sequence.stopper.finish is None:
        trace.flow("verdict", flow_id(sequence.sequence_id, sequence.trie.root.position), times.ended, sent=True)
