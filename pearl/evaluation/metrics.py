"""Every figure of a run, derived from its records. Nothing is measured here, and no model is asked.

Medians, not means, where single values are reported; rates are totals over totals. Warm-up texts are not among the
records. Only committed tokens count.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pearl.core import theory
from pearl.core.records import GenerationStats, Pass, SampleKey
from pearl.core.trie import ORIGINS
from pearl.evaluation.measures import acceptance, uncertainty

Runs = dict[SampleKey, GenerationStats]
Figures = dict[str, Any]
ENOUGH = 10  # problems, of fewer an interval is narrow by chance
GAP_S = 0.5  # without any text on the target: another batch
BY_CATEGORY = (
    "sequences",
    "tokens",
    "tokens_per_second",
    "speedup_vs_ar",
    "speedup_interval_95",
    "identical_to_ar",
    "tokens_per_pass",
    "acceptance_length",
    "acceptance_length_interval_95",
    "acceptance",
)


def summarise(
    modes: dict[str, Runs], category: Callable[[SampleKey], str | None] = lambda _: None
) -> dict[str, Figures]:
    """The figures of each mode, keyed as `summary.json` has them.

    `modes`: the texts of each mode. `category`: of a text, if it has one.
    """
    ar, everywhere = modes.get("ar", {}), modes.get("ar-all", {})
    summary = {}
    for mode, runs in modes.items():
        figures = _figures(runs, ar)
        figures["speedup_vs_ar_all"] = _speedup(*_shared(runs, everywhere))
        figures["speedup_vs_ar_all_interval_95"] = uncertainty.of_speedup(runs, everywhere)
        figures["acceptance_by_depth_interval_95"] = uncertainty.by_depth(runs, len(figures["acceptance_by_depth"]))
        figures["by_category"] = {
            name: {one: some[one] for one in BY_CATEGORY}
            for name in dict.fromkeys(filter(None, map(category, runs)))
            for some in [_figures({key: text for key, text in runs.items() if category(key) == name}, ar)]
        } or None
        if any(text.places > 1 for text in runs.values()):
            figures["by_sequence"] = by_sequence(runs)
        summary[mode] = figures
    return summary


def widest_interval(modes: Mapping[str, Runs]) -> float | None:
    """Of the intervals of all modes' speed-ups over `ar` the widest, as part of its speed-up. None of few problems."""
    ar = modes.get("ar", {})
    if len({key.task for key in ar}) < ENOUGH:
        return None
    widths = [0.0]
    for runs in (runs for mode, runs in modes.items() if mode != "ar"):
        interval, value = uncertainty.of_speedup(runs, ar), _speedup(*_shared(runs, ar))
        if not (interval and value):
            return None
        widths.append((interval[1] - interval[0]) / value)
    return max(widths)


def narrow(widest: float | None, wanted: float | None) -> bool:
    """Whether the widest interval is one that was wanted."""
    return widest is not None and wanted is not None and widest <= wanted


def _figures(runs: Runs, ar: Runs) -> Figures:
    texts = list(runs.values())
    figures = {
        "sequences": len(texts),
        **_speed(texts),
        **_verification(texts),
        **_drafting(texts),
        **_devices(texts),
        **_latency(texts),
        "score": None,
    }
    return figures | _beside_ar(runs, ar, figures) | uncertainty.of_figures(runs, ar)


def _speed(texts: Sequence[GenerationStats]) -> Figures:
    decoding = _decoding(texts)
    tokens, seconds = sum(len(text.tokens) for text in texts), sum(text.seconds for text in texts)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "decode_tokens_per_second": _ratio(sum(p.committed for p in decoding), sum(p.share_s for p in decoding)),
    }


def _verification(texts: Sequence[GenerationStats]) -> Figures:
    """What the passes of the target have made of the guesses."""
    passes, decoding = [p for text in texts for p in text.passes], _decoding(texts)
    tokens = sum(len(text.tokens) for text in texts)
    return {
        "tokens_per_pass": tokens / len(passes),
        "tokens_per_rejection": _ratio(tokens, sum(p.accepted < p.tested for p in passes)),
        "acceptance": _ratio(sum(p.accepted for p in passes), sum(p.tested for p in passes)),
        **acceptance.counted(passes),
        "by_origin": by_origin(passes),
        "pauses": sum(p.ahead == 0 for p in decoding),
        "texts_per_pass": sum(p.texts for p in decoding) / len(decoding) if decoding else None,
        "occupancy": occupancy(texts),
        "most_side_by_side": most_side_by_side(texts),
    }


def _drafting(texts: Sequence[GenerationStats]) -> Figures:
    """What the drafter says of itself; None where there was none."""
    reports = [text.drafter for text in texts if text.drafter]

    def total(name: str) -> Any:
        return sum(getattr(report, name) for report in reports)

    counts = {
        "misses": "misses",
        "draft_forwards": "forwards",
        "draft_overtaken": "overtaken",
        "draft_overtaken_s": "overtaken_s",
        "draft_rows": "rows",
        "draft_own_rows": "lookahead_rows",
    }
    counts |= {"draft_own_confirmed": "lookahead_hits", "draft_busy_s": "busy_s"}
    forward_s = _ratio(total("busy_s") - total("overtaken_s"), total("forwards"))
    return {
        **{key: total(name) if reports else None for key, name in counts.items()},
        "hit_rate": _ratio(total("hits"), total("verdicts")),
        "misses_prepared": _ratio(total("prepared"), total("misses")),
        "draft_forward_ms": 1e3 * forward_s if forward_s else None,
        "drafter_failures": total("failed"),
    }


def _devices(texts: Sequence[GenerationStats]) -> Figures:
    """How busy both sides were, and what they needed."""
    passes, seconds = [p for text in texts for p in text.passes], sum(text.seconds for text in texts)
    busy = [text.drafter.busy_s for text in texts if text.drafter]
    return {
        "target_busy": sum(p.forward_s / p.texts for p in passes) / seconds,
        "target_waiting": sum(p.waited_s / p.texts for p in passes) / seconds,
        # its last forward may end after the text has: all of the time is the most that counts
        "drafter_busy": min(1.0, sum(busy) / seconds) if busy else None,
        "overhead_ms": _percentile(
            [1e3 * (p.seconds - p.others_s - p.forward_s - p.waited_s) for p in _decoding(texts)]
        ),
        "millijoules_per_token": _energy(texts),
        "peak_memory_mb": max(text.peak_memory for text in texts) / 1e6,
        "bytes_per_pass": sum(text.bytes_on_wire for text in texts) / len(passes),
    }


def _energy(texts: Sequence[GenerationStats]) -> float | None:
    """Of the whole machine, idle parts too; None if it does not tell, of every text."""
    told = [text.energy_j for text in texts if text.energy_j is not None]
    return 1e3 * sum(told) / sum(len(text.tokens) for text in texts) if len(told) == len(texts) else None


def _latency(texts: Sequence[GenerationStats]) -> Figures:
    """A pass is spread evenly over what it has committed."""
    decoding = [p for p in _decoding(texts) if p.committed]
    each, weights = [1e3 * p.seconds / p.committed for p in decoding], [p.committed for p in decoding]
    first_ms = {
        kind: [1e3 * text.passes[0].seconds for text in texts if (text.cached_tokens > 0) == kind]
        for kind in (False, True)
    }
    return {
        "ms_per_token_of_each": 1e3 * sum(text.latency_s for text in texts) / sum(len(text.tokens) for text in texts),
        "ttft_ms": _percentile([*first_ms[False], *first_ms[True]]),
        # of those texts that began with what earlier ones had read, and of the others; None: there were none
        "ttft_ms_cached": _percentile(first_ms[True]) if first_ms[True] else None,
        "ttft_ms_uncached": _percentile(first_ms[False]) if first_ms[False] else None,
        "cached_prompt_share": _ratio(
            sum(text.cached_tokens for text in texts), sum(text.prompt_tokens for text in texts)
        ),
        **{f"tpot_ms_p{percent}": _percentile(each, percent, weights) for percent in (50, 95, 99)},
        "pass_ms": _percentile([1e3 * p.forward_s for p in _decoding(texts)]),
    }


def _beside_ar(runs: Runs, ar: Runs, figures: Figures) -> Figures:
    """The comparison with `ar` on the same texts; None without it."""
    mine, theirs = _shared(runs, ar)
    return {
        "speedup_vs_ar": _speedup(mine, theirs),
        "decode_speedup_vs_ar": _speedup(mine, theirs, first_pass=1),
        "identical_to_ar": sum(m.tokens == t.tokens for m, t in zip(mine, theirs, strict=True)) / len(mine)
        if mine
        else None,
        "first_divergence_gaps": None,  # who has the model says
        "predicted_speedup": _predicted([*runs.values()], figures, ar) if mine else None,
    }


def by_origin(passes: Sequence[Pass]) -> dict[str, dict[str, int]]:
    """What each kind of source was worth: its guesses that stood where the target picked, those that it picked, and
    the rows of passes that its guesses took. A guess that came during the pass was judged without a row."""
    offered = Counter(origin for p in passes for one in p.judged for origin in one.origins)
    accepted = Counter(one.origin for p in passes for one in p.judged)
    rows: Counter[str] = sum((Counter(p.rows_by) for p in passes), Counter())
    return {
        origin: {"offered": offered[origin], "accepted": accepted[origin], "rows": rows[origin]}
        for origin in ORIGINS
        if offered[origin] or rows[origin]
    }


def occupancy(texts: Sequence[GenerationStats]) -> float | None:
    """The share of the places that texts were at, while more were waiting for one: from the first text of a batch to
    the start of its last. None if no text had another beside it, or if several engines wrote at a time, whose places
    the texts do not tell apart."""
    taken = available = 0.0
    for batch in _batches(texts):
        places = max(text.places for text in batch)
        if _most_at_a_time(batch) > places:
            return None
        last = max(text.began_s for text in batch)
        first = min(text.began_s for text in batch)
        taken += sum(min(text.ended_s, last) - text.began_s for text in batch)
        available += places * (last - first)
    return _ratio(taken, available) if any(text.places > 1 for text in texts) else None


def most_side_by_side(texts: Sequence[GenerationStats]) -> int:
    """Texts that were under way at once in one engine; fewer than its places where there were no more."""
    return max(1, min(_most_at_a_time(texts), max(text.places for text in texts)))


def _most_at_a_time(texts: Sequence[GenerationStats]) -> int:
    begun_and_ended = sorted([(text.began_s, 1) for text in texts] + [(text.ended_s, -1) for text in texts])
    return max(itertools.accumulate(change for _, change in begun_and_ended))


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


def divergences(runs: Runs, ar: Runs) -> list[tuple[SampleKey, int]]:
    """Where texts leave those of `ar`. A turn after one that differs has another prompt, and tells nothing."""
    found = []
    for key, mine in runs.items():
        before = [key._replace(turn=turn) for turn in range(key.turn)]
        alike = all(runs[one].tokens == ar[one].tokens for one in before if one in ar)
        if alike and key in ar and mine.tokens != ar[key].tokens:
            found.append((key, _first_difference(mine, ar[key])))
    return found


def _predicted(texts: Sequence[GenerationStats], figures: dict[str, Any], ar: Runs) -> float | None:
    """What theory expects of the acceptance and the speed ratio that this run had, and in `sd` of its usual block
    length (docs/explanations/theory.md). Of `pearl` it knows the form without blocks."""
    mode, block = texts[0].mode, round(_percentile([p.block for p in _decoding(texts)]))
    a, draft_ms = figures["acceptance"], figures["draft_forward_ms"]
    if a is None or not draft_ms or not block or mode not in ("sd", "pearl") or (mode == "pearl" and block > 1):
        return None
    pass_ms = _percentile([1e3 * p.forward_s for p in _decoding([*ar.values()])])
    if not pass_ms:
        return None
    c = pass_ms / draft_ms
    return theory.speedup_sd(a, c, block) if mode == "sd" else theory.speedup_pearl(a, c)


def _speedup(mine: Sequence[GenerationStats], theirs: Sequence[GenerationStats], first_pass: int = 0) -> float | None:
    """Tokens a second over those of `theirs`; from the second pass on if `first_pass` is 1."""

    def rate(texts: Sequence[GenerationStats]) -> float | None:
        passes = [p for text in texts for p in text.passes[first_pass:]]
        return _ratio(sum(p.committed for p in passes), sum(p.share_s for p in passes))

    above, below = rate(mine), rate(theirs)
    return above / below if above and below else None


def _first_difference(a: GenerationStats, b: GenerationStats) -> int:
    pairs = zip(a.tokens, b.tokens, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a.tokens), len(b.tokens)) - 1)


def _decoding(texts: Sequence[GenerationStats]) -> list[Pass]:
    """All passes but the first of each text, which reads the prompt."""
    return [p for text in texts for p in text.passes[1:]]


def _percentile(values: Sequence[float], percent: float = 50, weights: Sequence[int] | None = None) -> float:
    """The smallest of `values` that as many are at most as large as; each counts `weights` times. 0 of none."""
    return float(np.quantile(values, percent / 100, method="inverted_cdf", weights=weights)) if len(values) else 0.0


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None
