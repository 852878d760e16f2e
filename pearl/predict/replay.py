"""A recorded run as something to simulate: its texts as scripts, its seconds as times.

Knows: what the files of a run say of the drafter's guesses, place by place, and of the seconds of forwards. Refuses to
know: how decoding works. The guesses are those of one mode of the run, the seconds those of all.

What a run can't say is drawn, by seeded random numbers, from what the rest of it says: places where no guess was
judged, and, from a run that drafted chains, how sure the drafter was and which of its further guesses was right.

Two sides on one machine may slow each other down (memory has one bandwidth). How much is told by passes of as many rows
in `ar` and in a mode whose sides work at the same time, and the drafter is taken to be slowed as much. A run without
either is taken to have none of it.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pearl.config.inputs import json_lines, parse_json, read_text, sound
from pearl.core.records import SampleKey
from pearl.core.schedule import MODES, OPTIONS
from pearl.core.token_buckets import LEAVES, TokenBuckets
from pearl.core.trie import DRAFT, FEATURE, ORIGIN_NUMBER, ORIGINS, RECYCLED, SUFFIX
from pearl.errors import UsageError
from pearl.evaluation import results
from pearl.predict.beside import SourceBeside
from pearl.predict.replay_beside import places_of, sources_beside
from pearl.predict.script import VOCABULARY, DraftedToken, Script, Times

LATENCY_S = 3e-4  # of a message between two processes of one machine
OWN = 0.5  # own guesses of the drafter that come true, where no run says so
# How often the target's token is the drafter's 2nd, 3rd, ... choice where it is not the first
TAIL = (0.58, 0.18, 0.035, 0.035, 0.01, 0.01, 0.01)
BEYOND = 20  # a choice that no tree holds
PRIOR = 3  # passes that the measured cost of a row count counts for, beside those recorded
FEW = 5  # passes below which no mean is worth a comparison
TOGETHER = 0.3  # of its passes that must be beside a working drafter if a mode is to tell what that costs

Texts = dict[SampleKey, list[dict[str, Any]]]  # their passes, as in passes.jsonl


@dataclass(frozen=True)
class Case:
    """What a simulation needs, and what was measured beside it."""

    scripts: dict[SampleKey, Script]
    times: Times
    own: float
    settings: Mapping[str, Any]  # those of `Schedule.of` beside the mode
    measured: dict[str, float]  # speed-up by mode
    source: str  # where all of it comes from, for a person
    notes: tuple[str, ...] = ()  # what it can't say, in sentences
    beside: tuple[SourceBeside, ...] = ()  # sources in the target's process, as the scripts have them


def read_run(folder: Path, mode: str | None = None, latency_s: float = LATENCY_S, seed: int = 0) -> Case:
    """The case that a run's files make. `mode`: whose guesses; by default of the one with most of them judged.

    Raises `UsageError` where something is missing.
    """
    with sound(str(folder), "record the run again"):
        return _read_run(folder, mode, latency_s, seed)


def _read_run(folder: Path, mode: str | None, latency_s: float, seed: int) -> Case:
    modes, summary = _read_passes(folder), _read_summary(folder)
    if (summary["config"].get("batch_size") or 1) > 1:
        raise UsageError(f"{folder} has texts side by side, whose passes are shared: record one with --batch-size 1.")
    mode = mode or max(modes, key=lambda name: sum(map(_judged_places, modes[name].values())))
    if mode not in modes:
        raise UsageError(f"{folder} holds no mode {mode!r}: choose from {', '.join(modes)}.")
    if not any(map(_judged_places, modes[mode].values())):
        raise UsageError(f"In {folder} no guess of mode {mode} was judged: record one that drafts, tree or pearl.")
    figures, config = summary["modes"].get(mode) or {}, summary["config"]
    kind = "".join(f" ({word})" for word in results.kind(config.get("resolved", {})))
    times = _times(modes, mode, summary, latency_s)
    beside = sources_beside(summary["environment"])
    raw = {key: _judged(passes) for key, passes in modes[mode].items()}
    judged = _drafters(raw, {one.origin for one in beside} | {RECYCLED}, bool(times.draft_s))
    known = [place for places in judged.values() for place in places if place]
    if times.draft_s and not known:
        raise UsageError(f"In {folder} no guess of the drafter was judged in mode {mode}: record one where it had any.")
    chains = all(place.q == (1.0,) for place in known)
    scripts = {}
    for key, passes in modes[mode].items():
        places = judged[key]
        if times.draft_s:
            places = _completed(places, known, chains, random.Random(f"{seed} {key}"))
        prefill_s = modes.get("ar", {}).get(key, passes)[0]["forward_s"]
        draft_prefill_s = (
            prefill_s * times.draft_s[0] / times.pass_s[times.buckets.pad(1) - 1] if times.draft_s else 0.0
        )
        rng = random.Random(f"{seed} {key} beside")
        told = tuple(tuple(places_of(raw[key], one, rng)) for one in beside)
        scripts[key] = Script(passes[0]["position"] + 1, tuple(places), prefill_s, draft_prefill_s, told)
    own, confirmed = figures.get("draft_own_rows"), figures.get("draft_own_confirmed")
    return Case(
        scripts=scripts,
        times=times,
        own=confirmed / own if own and confirmed is not None else OWN,
        settings={one.name: next((config[n] for n in (one.name, *one.was) if n in config), None) for one in OPTIONS},
        measured={m: f["speedup_vs_ar"] for m, f in summary["modes"].items() if f.get("speedup_vs_ar")},
        source=f"{folder}{kind}, the guesses of mode {mode}",
        notes=_notes(times, chains),
        beside=beside,
    )


def _notes(times: Times, chains: bool) -> tuple[str, ...]:
    if not times.draft_s:
        return ("The drafter has no model: at places where no guess of the run was judged, it is taken to find none.",)
    told = []
    if chains:
        told.append(
            "Chains were recorded: what a tree lives on, the guesses after the first, is drawn as usual ones are."
        )
    if times.crowding == 1:
        told.append(
            "No pass was slower for a drafter at work, or no mode tells: the two sides are taken to share nothing."
        )
    return tuple(told)


def _read_passes(folder: Path) -> dict[str, Texts]:
    path = folder / "passes.jsonl"
    if not os.path.isfile(path):  # unlike Path's, it raises nothing where the name can't be one
        raise UsageError(f"{folder} holds no passes.jsonl: name a folder that an evaluation has written.")
    lines = [line for _, line in json_lines(read_text(path, "The passes"), str(path))]
    modes: dict[str, Texts] = {}
    for line in lines:
        if line["mode"].partition(":")[0] not in MODES or line["mode"] == "ar-all":
            continue  # of other cores, attention and row counts
        if "judged" not in line:
            raise UsageError(f"{path} is of an earlier version, which kept no single guesses: record the run again.")
        modes.setdefault(line["mode"], {}).setdefault(SampleKey.of(line), []).append(line)
    if not modes:
        raise UsageError(f"{path} is empty: the run that wrote it made no pass.")
    return modes


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    summary = parse_json(read_text(path, "What a run writes at its end,"), str(path))
    if not {"config", "environment", "modes"} <= summary.keys() or "rows" not in summary["environment"]:
        raise UsageError(f"{path} does not say what rows cost: record the run again.")
    return summary


def _judged_places(passes: Sequence[dict[str, Any]]) -> int:
    return sum(len(one["judged"]) for one in passes)


def _judged(passes: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """What was judged, place by place of a text."""
    first = passes[0]["position"] + 1
    found: list[dict[str, Any] | None] = [None] * sum(one["committed"] for one in passes)
    for one in passes:
        for at, judged in enumerate(one["judged"], one["position"] + 1 - first):
            if at < len(found):  # the last pass may run over the end of the text
                found[at] = judged
    return found


def _drafters(
    raw: Mapping[SampleKey, Sequence[dict[str, Any] | None]], others: Collection[str], has_model: bool
) -> dict[SampleKey, list[DraftedToken | None]]:
    """What the drafter guessed at each place. `others`: the origins of the sources beside the target. Where it is of
    the kind of one of them nothing tells the two apart, so what was guessed by that kind counts for both."""
    for left_out in (others, {*ORIGINS} - {FEATURE if has_model else SUFFIX}):
        judged = {key: [_drafted(one, left_out) for one in places] for key, places in raw.items()}
        if any(place for places in judged.values() for place in places):
            break
    return judged


def _drafted(judged: Mapping[str, Any] | None, others: Collection[str]) -> DraftedToken | None:
    """The drafter's guesses there. A token that was not among them has the rank after theirs; where only sources beside
    the target had guesses it was not judged."""
    rank, q = _of_drafter(judged, others) if judged else (None, ())
    return DraftedToken(len(q) if rank is None else rank, q) if q else None


def _of_drafter(
    judged: Mapping[str, Any], others: Collection[str] = (RECYCLED,)
) -> tuple[int | None, tuple[float, ...]]:
    """The rank of the pick among the guesses of the best-informed source there, and their probabilities. `others`: the
    origins of those beside the target; an early run has no origins."""
    origins = judged.get("origins") or [DRAFT] * len(judged["q"])
    drafters = [origin for origin in origins if origin not in others]
    asked = min(drafters, key=ORIGIN_NUMBER.__getitem__, default=DRAFT)
    mine = [place for place, origin in enumerate(origins) if origin == asked and origin not in others]
    rank = mine.index(judged["rank"]) if judged["rank"] in mine else None
    return rank, tuple(judged["q"][place] for place in mine)


def _completed(
    places: Sequence[DraftedToken | None], known: Sequence[DraftedToken], chains: bool, rng: random.Random
) -> list[DraftedToken | None]:
    """The places with what a run does not say, for a drafter that has a model: those not judged, ranks beyond the
    guesses offered, and how sure it was of those of `chains`."""
    right = sum(place.rank == 0 for place in known) / len(known)
    completed: list[DraftedToken | None] = []
    for place in (place or rng.choice(known) for place in places):
        rank = missed(len(place.q), rng) if place.rank == len(place.q) else place.rank
        completed.append(DraftedToken(rank, (sureness(rank == 0, right, rng),) if chains else place.q))
    return completed


def missed(offered: int, rng: random.Random) -> int:
    """The rank of a token that was not among the first guesses, by `TAIL`."""
    weights = [*TAIL, 1 - sum(TAIL)]
    ranks = [*range(1, len(TAIL) + 1), BEYOND]
    left = [(rank, weight) for rank, weight in zip(ranks, weights, strict=True) if rank >= offered]
    return rng.choices([rank for rank, _ in left], [weight for _, weight in left])[0]


def sureness(right: bool, acceptance: float, rng: random.Random) -> float:
    """q of a first guess that was `right`, of a drafter that is as often right as it says, and that most often.

    q is taken to be beta distributed with mean a: Beta(a, 1 - a), which piles up at 0 and 1. Guesses are then right
    with probability q exactly if q is Beta(1 + a, 1 - a) among the right ones and Beta(a, 2 - a) among the wrong ones.
    """
    a = min(max(acceptance, 0.01), 0.99)
    return min(max(rng.betavariate(a + right, 1 - a + (not right)), 2 / VOCABULARY), 0.999)


@dataclass(frozen=True)
class _Shares:
    """The parts of a mode's seconds in which its sides worked."""

    target: float
    drafter: float
    both: float

    @staticmethod
    def of(figures: Mapping[str, Any]) -> _Shares:
        """A target that waits does so for the drafter's work; all else of that was done while the target worked."""
        target, drafter = figures.get("target_busy") or 1.0, min(1.0, figures.get("drafter_busy") or 0.0)
        return _Shares(target, drafter, min(target, max(0.0, drafter - (figures.get("target_waiting") or 0.0))))


def _times(modes: dict[str, Texts], mode: str, summary: dict[str, Any], latency_s: float) -> Times:
    """What forwards take, from those of all modes. Whether the drafter has a model is asked of `mode`."""
    environment, figures = summary["environment"], summary["modes"]
    rows = TokenBuckets.from_json(environment["rows"])
    shares = {name: _Shares.of(figures.get(name) or {}) for name in modes}
    by_rows = {name: _by_rows(texts, rows) for name, texts in modes.items()}
    crowding = _crowding(by_rows, shares)
    seconds = [
        (n, s / (1 + shares[name].both / shares[name].target * (crowding - 1)))
        for name in modes
        for n, found in by_rows[name].items()
        for s in found
    ]
    if not seconds:
        raise UsageError("The texts of the run are single passes: nothing tells what a pass takes.")
    scale = sum(s for _, s in seconds) / sum(rows.cost_s[n - 1] for n, _ in seconds)
    later = [one for texts in modes.values() for passes in texts.values() for one in passes[1:]]
    overhead_s = statistics.median(one["seconds"] - one["forward_s"] - one["waited_s"] for one in later)
    pass_s = []
    for n, cost in enumerate(rows.cost_s, 1):
        found = [s for count, s in seconds if count == n]
        pass_s.append((sum(found) + PRIOR * scale * cost) / (len(found) + PRIOR) + overhead_s)
    costs = tuple(environment.get("draft_costs") or ())
    draft_s: tuple[float, ...] = ()
    if (figures.get(mode) or {}).get("draft_forwards"):
        draft_s = _draft_s(modes, figures, shares, costs or (1.0,) * LEAVES, pass_s[rows.pad(1) - 1], crowding)
    prompts = _prompt_crowding(modes, shares)
    return Times(rows, tuple(pass_s), draft_s, costs, latency_s, crowding, prompts, scale * rows.path_s)


def _by_rows(texts: Texts, rows: TokenBuckets) -> dict[int, list[float]]:
    """The seconds of the passes after the prompt, less what paths beside the chain took, by their rows with padding."""
    found: dict[int, list[float]] = {}
    for passes in texts.values():
        for one in passes[1:]:
            alone = (
                one["forward_s"] * rows.cost(one["offered"] + 1) / rows.cost(one["offered"] + 1, one.get("paths", 0))
            )
            found.setdefault(rows.pad(one["offered"] + 1), []).append(alone)
    return found


def _crowding(by_rows: dict[str, dict[int, list[float]]], shares: dict[str, _Shares]) -> float:
    """How many times as long a pass takes while the drafter works: from passes of as many rows, and `ar`'s."""
    alone = by_rows.get("ar", {})
    told = []  # (how many times, by how many passes)
    for mode, found in by_rows.items():
        together = shares[mode].both / shares[mode].target
        for n in found if together >= TOGETHER else ():
            if min(len(found[n]), len(alone.get(n, ()))) >= FEW:
                ratio = statistics.mean(found[n]) / statistics.mean(alone[n])
                told.append((1 + (ratio - 1) / together, len(found[n])))
    return max(1.0, sum(k * n for k, n in told) / sum(n for _, n in told)) if told else 1.0


def _prompt_crowding(modes: dict[str, Texts], shares: dict[str, _Shares]) -> float:
    """The same of the first pass of a text."""
    alone = modes.get("ar", {})
    pairs = [
        (texts[key][0]["forward_s"], alone[key][0]["forward_s"])
        for mode, texts in modes.items()
        if shares[mode].both / shares[mode].target >= TOGETHER
        for key in texts.keys() & alone.keys()
    ]
    return max(1.0, sum(with_it for with_it, _ in pairs) / sum(without for _, without in pairs)) if pairs else 1.0


def _draft_s(
    modes: dict[str, Texts],
    figures: Mapping[str, Any],
    shares: dict[str, _Shares],
    costs: Sequence[float],
    pass_s: float,
    crowding: float,
) -> tuple[float, ...]:
    """Seconds of a drafter forward by its rows, alone: the measured costs, to the scale of the forwards of the run.

    The first forward of a text reads the prompt, which takes it as many forwards as it takes the target passes.
    """
    busy_s = expected_s = 0.0
    for mode, texts in modes.items():
        facts = figures.get(mode) or {}
        if forwards := facts.get("draft_forwards"):
            rows = max(1.0, facts["draft_rows"] / forwards)
            later = (forwards - len(texts)) * float(np.interp(rows, range(1, len(costs) + 1), costs))
            prompts = sum(passes[0]["forward_s"] for passes in texts.values()) / pass_s * costs[0]
            slower = 1 + shares[mode].both / shares[mode].drafter * (crowding - 1)
            expected_s += (later + prompts) * slower
            busy_s += facts["draft_busy_s"] - facts.get("draft_overtaken_s", 0.0)
    return tuple(busy_s / expected_s * cost for cost in costs)
