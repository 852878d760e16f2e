"""What a target makes of a drafter that is told how often to be right, and how long a forward of it takes.

Knows: a target, and what a draft is told. Nothing here is a figure of a drafter, and everything says so: SYNTHETIC.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pearl.config.synthetic import SyntheticDraft
from pearl.core.params import SamplingParams
from pearl.core.records import Pass
from pearl.core.schedule import Schedule
from pearl.core.stopping import Stopper
from pearl.core.token_buckets import LEAVES, TokenBuckets
from pearl.drafters.synthetic import SyntheticSource
from pearl.evaluation import tables
from pearl.evaluation.measures import acceptance
from pearl.models.verifier import VerifierModel
from pearl.predict.prediction import by_times, predict
from pearl.roles.drafter import Drafter
from pearl.roles.target import Target
from pearl.wire.channel import LocalChannel

LATENCY_S = 1e-4  # of a message between two processes, in predictions
COLUMNS = {
    "speedup_vs_ar": "x ar",
    "tokens_per_second": "tok/s",
    "acceptance_length": "AL",
    "tokens_per_pass": "tok/pass",
}
RATIOS = (3, 5, 10)  # c: times that a forward of a draft goes into a pass of one row
APART = 1.3  # times as fast as measured: what was predicted is of a busier machine, or an idler one
TAKES_TURNS = "sd:4"  # the mode that one process measures as two would


def measured(reader: VerifierModel, vocabulary: int, tokens: int, draft: SyntheticDraft) -> dict[str, Any]:
    """Figures of a text with this draft, whose forwards take their time, in the mode whose sides take turns."""
    prompt = [11 * i % vocabulary for i in range(64)]
    params = SamplingParams(max_new_tokens=tokens, temperature=1.0, seed=1, ignore_eos=True)
    alone = Target(reader)
    own = written(alone, prompt, "ar", params)
    here, there = LocalChannel.pair()
    here.peer_step = Drafter(SyntheticSource(draft), there).step
    target = Target(reader, here)
    same = written(target, prompt, TAKES_TURNS, params, own) == own
    rates = [sum(p.committed for p in some) / sum(p.seconds for p in some) for some in (target.passes, alone.passes)]
    figures = {"tokens_per_second": rates[0], "speedup_vs_ar": rates[0] / rates[1], "identical_to_ar": float(same)}
    plain = {"tokens_per_second": rates[1], "speedup_vs_ar": 1.0} | _accepted(alone.passes) | {"how": "measured"}
    return {"ar": plain, TAKES_TURNS: figures | _accepted(target.passes) | {"how": "measured"}}


def predicted(plan: TokenBuckets, draft: SyntheticDraft, more: Sequence[str] = ()) -> dict[str, Any]:
    """Figures of a text with this draft on a device of its own, by the step times of the target. `more`: modes."""
    case = by_times(1.0, plan, (draft.forward_s,) * LEAVES, LATENCY_S, 600, 0, "")
    found = predict(case, [*more, *(("pearl", "tree") if plan.branches else ("pearl",))], synthetic=draft)
    names = ("tokens_per_second", "speedup_vs_ar", "acceptance_length", "tokens_per_pass")
    return {
        mode: {name: one[name] for name in names} | {"how": "PREDICTED"} for mode, one in found.items() if mode != "ar"
    }


def by_ratio(plan: TokenBuckets, chance: float) -> dict[int, dict[str, float]]:
    """Predicted speed-ups over `ar` by c and mode, of drafts whose guesses are right with this chance."""
    drafts = {c: SyntheticDraft((chance,), plan.cost(1) / c) for c in RATIOS}
    return {
        c: {mode: one["speedup_vs_ar"] for mode, one in predicted(plan, draft, (TAKES_TURNS,)).items()}
        for c, draft in drafts.items()
    }


def _accepted(passes: Sequence[Pass]) -> dict[str, Any]:
    length = acceptance.counted(passes)["acceptance_length"]
    return {"acceptance_length": length, "tokens_per_pass": sum(p.committed for p in passes) / len(passes)}


def written(
    target: Target, prompt: Sequence[int], mode: str, params: SamplingParams, reference: Sequence[int] = ()
) -> list[int]:
    name, _, gamma = mode.partition(":")
    schedule = Schedule.of(name, gamma or "auto")
    stopper = Stopper(params, (), lambda tokens: "")
    for _ in target.decode(prompt, schedule, params, stopper, reference=tuple(reference)):
        pass
    return list(stopper.tokens)


def ratios_markdown(shapes: Sequence[dict[str, Any]], chance: float) -> list[str]:
    """`shapes`: found so far, of which targets have `by_ratio`."""
    modes = (TAKES_TURNS, "pearl", "tree")
    lines = [
        [one["shape"], str(c), *(_cell(speedups.get(mode)) for mode in modes)]
        for one in shapes
        for c, speedups in one.get("by_ratio", {}).items()
    ]
    if not lines:
        return []
    said = (
        f"PREDICTED, not measured: x ar with a SYNTHETIC draft on a device of its own, right with chance {chance:g}, a "
        "forward of which takes 1/c of the target's pass of one row above."
    )
    return [said, tables.markdown(("target", "c", *modes), lines, labels=2)]


def markdown(result: dict[str, Any]) -> list[str]:
    lines = [
        [one["shape"], mode, figures["how"], *(_cell(figures[name]) for name in COLUMNS)]
        for one in result["shapes"]
        for mode, figures in one.get("synthetic", {}).items()
    ]
    if not lines:
        return []
    said = (
        f"SYNTHETIC, of {result['synthetic']}: it was told how often to be right, and how long a forward takes. "
        f"ar and {TAKES_TURNS} are measured, at temperature 1; the others are PREDICTED from the step times above, "
        "with the draft on a device of its own."
    )
    table = tables.markdown(("target", "mode", "how", *COLUMNS.values()), lines, labels=3)
    return [said, table, *(line for one in result["shapes"] for line in _apart(one))]


def _apart(one: dict[str, Any]) -> list[str]:
    """A sentence where measured and predicted rates of a shape are of two machines, as it were."""
    figures = one.get("synthetic", {})
    foretold = [
        mode["tokens_per_second"] / mode["speedup_vs_ar"] for mode in figures.values() if mode["how"] == "PREDICTED"
    ]
    if not foretold:
        return []
    found = figures["ar"]["tokens_per_second"]
    if max(found, foretold[0]) <= APART * min(found, foretold[0]):
        return []
    return [
        f"{one['shape']}: ar made {found:.0f} tokens/s, and {foretold[0]:.0f} by the step times, so measured and "
        "PREDICTED rows can't be compared: make the run again on an idle machine."
    ]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
