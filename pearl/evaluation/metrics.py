"""Every figure of a run, derived from its records. Nothing is measured here.

Medians, not means, where single values are reported; rates are totals over totals. Warm-up sequences are not among the
records. Only committed tokens count.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from pearl.core import theory
from pearl.core.records import GenerationStats, Key, Pass

Runs = dict[Key, GenerationStats]
GAP_S = 0.5  # without any text on the target: another batch
BY_CATEGORY = (
    "sequences",
    "tokens",
    "tokens_per_second",
    "speedup_vs_ar",
    "speedup_interval_95",
    "identical_to_ar",
    "tokens_per_pass",
    "acceptance",
)


def summarise(
    modes: dict[str, Runs],
    gap: Callable[[Key, int], float],
    category: Callable[[Key], str | None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """The figures of each mode, keyed as `summary.json` has them.

    `modes`: the texts of each mode. `gap(key, index)`: the distance of the target's two best logits for the token at
    `index` of an `ar` text; asked only where another mode's token differs. `category`: of a text, if it has one.
    """
    ar, everywhere = modes.get("ar", {}), modes.get("ar-all", {})
    summary = {}
    for mode, runs in modes.items():
        figures = _figures(runs, ar)
        figures["speedup_vs_ar_all"] = _speedup(*_shared(runs, everywhere))
        if ar:
            figures["first_divergence_gaps"] = [gap(key, index) for key, index in _divergences(runs, ar)]
        figures["by_category"] = {
            name: {one: some[one] for one in BY_CATEGORY}
            for name in dict.fromkeys(filter(None, map(category, runs)))
            for some in [_figures({key: text for key, text in runs.items() if category(key) == name}, ar)]
        } or None
        if any(text.places > 1 for text in runs.values()):
            figures["by_sequence"] = by_sequence(runs)
        summary[mode] = figures
    return summary


def _figures(runs: Runs, ar: Runs) -> dict[str, Any]:
    texts = list(runs.values())
    passes = [p for text in texts for p in text.passes]
    decoding = [p for text in texts for p in text.passes[1:]]  # the first pass reads the prompt
    tokens, seconds = sum(len(text.tokens) for text in texts), sum(text.seconds for text in texts)
    latencies = [(p.seconds / p.committed, p.committed) for p in decoding]
    reports = [text.drafter for text in texts if text.drafter]
    verdicts = sum(report.verdicts for report in reports)
    tested, accepted = sum(p.tested for p in passes), sum(p.accepted for p in passes)
    figures = {
        "sequences": len(texts),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "decode_tokens_per_second": _ratio(sum(p.committed for p in decoding), sum(p.share_s for p in decoding)),
        "speedup_vs_ar": None,
        "speedup_interval_95": None,
        "speedup_vs_ar_all": None,
        "decode_speedup_vs_ar": None,
        "identical_to_ar": None,
        "first_divergence_gaps": None,
        "tokens_per_pass": tokens / len(passes),
        "tokens_per_rejection": _ratio(tokens, sum(p.accepted < p.tested for p in passes)),
        "acceptance": _ratio(accepted, tested),
        "acceptance_by_depth": _by_depth(passes),
        "hit_rate": _ratio(sum(report.hits for report in reports), verdicts),
        "misses": sum(report.misses for report in reports) if reports else None,
        "misses_prepared": _ratio(sum(r.prepared for r in reports), sum(r.misses for r in reports)),
        "draft_forwards": sum(report.forwards for report in reports) if reports else None,
        "draft_rows": sum(report.rows for report in reports) if reports else None,
        "draft_own_rows": sum(report.lookahead_rows for report in reports) if reports else None,
        "draft_own_confirmed": sum(report.lookahead_hits for report in reports) if reports else None,
        "draft_busy_s": sum(report.busy_s for report in reports) if reports else None,
        "pauses": sum(p.ahead == 0 for p in decoding),
        "overhead_ms": 1e3
        * _percentile([(p.seconds - p.others_s - p.forward_s - p.waited_s, 1) for p in decoding], 50),
        "target_busy": sum(p.forward_s / p.texts for p in passes) / seconds,
        "target_waiting": sum(p.waited_s / p.texts for p in passes) / seconds,
        "texts_per_pass": sum(p.texts for p in decoding) / len(decoding) if decoding else None,
        "occupancy": occupancy(texts),
        "drafter_busy": sum(report.busy_s for report in reports) / seconds if reports else None,
        "drafter_failures": sum(report.failed for report in reports),
        "ttft_ms": 1e3 * _percentile([(text.passes[0].seconds, 1) for text in texts], 50),
        "tpot_ms_p50": 1e3 * _percentile(latencies, 50),
        "tpot_ms_p95": 1e3 * _percentile(latencies, 95),
        "tpot_ms_p99": 1e3 * _percentile(latencies, 99),
        "pass_ms": 1e3 * _percentile([(p.forward_s, 1) for p in decoding], 50),
        "draft_forward_ms": 1e3 * value
        if (value := _ratio(sum(r.busy_s for r in reports), sum(r.forwards for r in reports)))
        else None,
        "peak_memory_mb": max(text.peak_memory for text in texts) / 1e6,
        "bytes_per_pass": sum(text.bytes_on_wire for text in texts) / len(passes),
        "predicted_speedup": None,
        "score": None,
    }
    mine, theirs = _shared(runs, ar)
    if mine:
        figures |= {
            "speedup_vs_ar": _speedup(mine, theirs),
            "speedup_interval_95": _interval(runs, ar),
            "decode_speedup_vs_ar": _speedup(mine, theirs, first_pass=1),
            "identical_to_ar": sum(m.tokens == t.tokens for m, t in zip(mine, theirs, strict=True)) / len(mine),
            "predicted_speedup": _predicted(texts[0].mode, figures, ar),
        }
    return figures


def occupancy(texts: Sequence[GenerationStats]) -> float | None:
    """The share of the places that texts were at, while more were waiting for one: from the first text of a batch to
    the start of its last. None if no text had another beside it."""
    taken = available = 0.0
    for batch in _batches(texts):
        last = max(text.began_s for text in batch)
        first = min(text.began_s for text in batch)
        taken += sum(min(text.ended_s, last) - text.began_s for text in batch)
        available += max(text.places for text in batch) * (last - first)
    return _ratio(taken, available) if any(text.places > 1 for text in texts) else None


def _batches(texts: Sequence[GenerationStats]) -> list[list[GenerationStats]]:
    """Those that followed one another without a gap: a place was always taken."""
    batches: list[list[GenerationStats]] = []
    end = -math.inf
    for text in sorted(texts, key=lambda text: text.began_s):
        if text.began_s > end + GAP_S or not batches:
            batches.append([])
        batches[-1].append(text)
        end = max(end, text.ended_s)
    return batches


def by_sequence(runs: Runs) -> list[dict[str, Any]]:
    """What each text of a batch was worth."""
    return [
        {
            **key._asdict(),
            "tokens": len(text.tokens),
            "seconds": text.ended_s - text.began_s,
            "tokens_per_second": _ratio(len(text.tokens), text.ended_s - text.began_s),
            "acceptance": _ratio(sum(p.accepted for p in text.passes), sum(p.tested for p in text.passes)),
        }
        for key, text in runs.items()
    ]


def _shared(runs: Runs, others: Runs) -> tuple[list[GenerationStats], list[GenerationStats]]:
    """The texts that both have, in one order."""
    keys = [key for key in runs if key in others]
    return [runs[key] for key in keys], [others[key] for key in keys]


def _divergences(runs: Runs, ar: Runs) -> list[tuple[Key, int]]:
    """Where texts leave those of `ar`. A turn after one that differs has another prompt, and tells nothing."""
    found = []
    for key, mine in runs.items():
        before = [key._replace(turn=turn) for turn in range(key.turn)]
        alike = all(runs[one].tokens == ar[one].tokens for one in before if one in ar)
        if alike and key in ar and mine.tokens != ar[key].tokens:
            found.append((key, _first_difference(mine, ar[key])))
    return found


def _predicted(mode: str, figures: dict[str, Any], ar: Runs) -> float | None:
    """What theory expects of the acceptance and the speed ratio that this run had (docs/explanations/theory.md)."""
    a, draft_ms = figures["acceptance"], figures["draft_forward_ms"]
    if a is None or not draft_ms or mode not in ("sd", "pearl"):
        return None
    pass_ms = 1e3 * _percentile([(p.forward_s, 1) for text in ar.values() for p in text.passes[1:]], 50)
    if not pass_ms:
        return None
    c = pass_ms / draft_ms
    return theory.speedup_sd(a, c, theory.best_gamma(a, c)) if mode == "sd" else theory.speedup_pearl(a, c)


def _speedup(mine: Sequence[GenerationStats], theirs: Sequence[GenerationStats], first_pass: int = 0) -> float | None:
    """Tokens a second over those of `theirs`; from the second pass on if `first_pass` is 1."""

    def rate(texts: Sequence[GenerationStats]) -> float | None:
        passes = [p for text in texts for p in text.passes[first_pass:]]
        return _ratio(sum(p.committed for p in passes), sum(p.share_s for p in passes))

    above, below = rate(mine), rate(theirs)
    return above / below if above and below else None


def _interval(runs: Runs, ar: Runs, rounds: int = 1000) -> list[float] | None:
    """95 % bootstrap interval of the speed-up over resampled problems, each with all its samples, repeats and turns,
    which are no independent draws; None of fewer than three."""
    problems: dict[str, list[float]] = {}  # tokens and seconds of mine, and of theirs
    for key in runs:
        if key in ar:
            sums = problems.setdefault(key.task, [0.0] * 4)
            for place, text in ((0, runs[key]), (2, ar[key])):
                sums[place] += sum(text.committed)
                sums[place + 1] += text.seconds
    if len(problems) < 3:
        return None
    generator, drawn = random.Random(0), list(problems.values())
    ratios = []
    for _ in range(rounds):
        tokens, seconds, their_tokens, their_seconds = map(
            sum, zip(*generator.choices(drawn, k=len(drawn)), strict=True)
        )
        if seconds and their_tokens and their_seconds:
            ratios.append((tokens / seconds) / (their_tokens / their_seconds))
    ratios.sort()
    return [ratios[int(0.025 * len(ratios))], ratios[int(0.975 * len(ratios))]] if ratios else None


def _by_depth(passes: Sequence[Pass]) -> list[float]:
    """At each depth below the root, the share of guesses accepted among those whose parents were."""
    deepest = max((p.tested for p in passes), default=0)
    return [
        sum(p.accepted >= depth for p in passes) / sum(p.tested >= depth for p in passes)
        for depth in range(1, deepest + 1)
    ]


def _first_difference(a: GenerationStats, b: GenerationStats) -> int:
    pairs = zip(a.tokens, b.tokens, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.tokens), len(b.tokens)) - 1)


def _percentile(weighted: Sequence[tuple[float, int]], percent: float) -> float:
    """Of values that count several times each; 0 of none."""
    total, seen = sum(weight for _, weight in weighted), 0
    for value, weight in sorted(weighted):
        seen += weight
        if seen >= math.ceil(total * percent / 100):
            return value
    return 0.0


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None
