"""Every figure of a run, derived from its records. Nothing is measured here.

Medians, not means, where single values are reported; rates are totals over totals. Warm-up sequences are not among the
records. Only committed tokens count.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from pearl import theory
from pearl.records import Pass
from pearl.records import Sequence as Text

Key = tuple[str, int]  # problem, sample
Runs = dict[Key, Text]


def summarise(modes: dict[str, Runs], gap: Callable[[Text, int], float]) -> dict[str, dict[str, Any]]:
    """The figures of each mode, keyed as `summary.json` has them.

    `modes`: the texts of each mode, by problem and sample. `gap(text, index)`: the distance of the target's two best
    logits for the token at `index` of an `ar` text; asked only where another mode's token differs.
    """
    return {mode: _figures(runs, modes.get("ar"), gap) for mode, runs in modes.items()}


def _figures(runs: Runs, ar: Runs | None, gap: Callable[[Text, int], float]) -> dict[str, Any]:
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
        "decode_tokens_per_second": _ratio(sum(p.committed for p in decoding), sum(p.seconds for p in decoding)),
        "speedup_vs_ar": None,
        "speedup_interval_95": None,
        "decode_speedup_vs_ar": None,
        "identical_to_ar": None,
        "first_divergence_gaps": None,
        "tokens_per_pass": tokens / len(passes),
        "acceptance": _ratio(accepted, tested),
        "acceptance_by_depth": _by_depth(passes),
        "hit_rate": _ratio(sum(report.hits for report in reports), verdicts),
        "misses": sum(report.misses for report in reports) if reports else None,
        "misses_prepared": _ratio(sum(r.prepared for r in reports), sum(r.misses for r in reports)),
        "draft_forwards": sum(report.forwards for report in reports) if reports else None,
        "draft_rows": sum(report.rows for report in reports) if reports else None,
        "draft_own_rows": sum(report.own for report in reports) if reports else None,
        "draft_own_confirmed": sum(report.confirmed for report in reports) if reports else None,
        "draft_busy_s": sum(report.busy_s for report in reports) if reports else None,
        "pauses": sum(p.ahead == 0 for p in decoding),
        "overhead_ms": 1e3 * _percentile([(p.seconds - p.forward_s - p.waited_s, 1) for p in decoding], 50),
        "target_busy": sum(p.forward_s for p in passes) / seconds,
        "target_waiting": sum(p.waited_s for p in passes) / seconds,
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
        "pass_at_1": None,
    }
    if ar is not None:
        shared = [key for key in runs if key in ar]
        figures |= _against(runs, ar, shared, gap)
        figures["predicted_speedup"] = _predicted(texts[0].mode, figures, ar)
    return figures


def _against(runs: Runs, ar: Runs, shared: Sequence[Key], gap: Callable[[Text, int], float]) -> dict[str, Any]:
    """Speed and sameness against `ar` on the texts that both have."""
    if not shared:
        return {}
    mine, theirs = [runs[key] for key in shared], [ar[key] for key in shared]
    differing = [(m, t) for m, t in zip(mine, theirs, strict=True) if m.tokens != t.tokens]
    return {
        "speedup_vs_ar": _speedup(mine, theirs),
        "speedup_interval_95": _interval(mine, theirs),
        "decode_speedup_vs_ar": _speedup(mine, theirs, first_pass=1),
        "identical_to_ar": 1 - len(differing) / len(shared),
        "first_divergence_gaps": [gap(t, _first_difference(m, t)) for m, t in differing],
    }


def _predicted(mode: str, figures: dict[str, Any], ar: Runs) -> float | None:
    """What theory expects of the acceptance and the speed ratio that this run had (docs/theory.md)."""
    a, draft_ms = figures["acceptance"], figures["draft_forward_ms"]
    if a is None or not draft_ms or mode not in ("sd", "pearl"):
        return None
    pass_ms = 1e3 * _percentile([(p.forward_s, 1) for text in ar.values() for p in text.passes[1:]], 50)
    if not pass_ms:
        return None
    c = pass_ms / draft_ms
    return theory.speedup_sd(a, c, theory.best_gamma(a, c)) if mode == "sd" else theory.speedup_pearl(a, c)


def _speedup(mine: Sequence[Text], theirs: Sequence[Text], first_pass: int = 0) -> float | None:
    """Tokens a second over those of `theirs`; from the second pass on if `first_pass` is 1."""

    def rate(texts: Sequence[Text]) -> float | None:
        passes = [p for text in texts for p in text.passes[first_pass:]]
        return _ratio(sum(p.committed for p in passes), sum(p.seconds for p in passes))

    above, below = rate(mine), rate(theirs)
    return above / below if above and below else None


def _interval(mine: Sequence[Text], theirs: Sequence[Text], rounds: int = 1000) -> list[float] | None:
    """95 % bootstrap interval of the speed-up over resampled texts; None of fewer than three."""
    if len(mine) < 3:
        return None
    generator = random.Random(0)
    ratios = []
    for _ in range(rounds):
        drawn = generator.choices(range(len(mine)), k=len(mine))
        ratio = _speedup([mine[i] for i in drawn], [theirs[i] for i in drawn])
        if ratio is not None:
            ratios.append(ratio)
    ratios.sort()
    return [ratios[int(0.025 * len(ratios))], ratios[int(0.975 * len(ratios))]] if ratios else None


def _by_depth(passes: Sequence[Pass]) -> list[float]:
    """At each depth below the root, the share of guesses accepted among those whose parents were."""
    deepest = max((p.tested for p in passes), default=0)
    return [
        sum(p.accepted >= depth for p in passes) / sum(p.tested >= depth for p in passes)
        for depth in range(1, deepest + 1)
    ]


def _first_difference(a: Text, b: Text) -> int:
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
