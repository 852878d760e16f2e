"""What became of the guesses, by the conventions of the field (docs/reference/figures.md has a worked example).

A *verification* is a pass that read a guess. The guesses that it read are its *draft tokens*; *accepted* are those
that the walk went through. These are vLLM's counters `num_drafts`, `num_draft_tokens` and `num_accepted_tokens`. As
there, an acceptance length has the token in it that the target adds itself, and counts what the end of a text then cuts
off. Passes that read no guess count in tokens a pass alone.

A guess that arrived while a pass ran (pre-verify) was judged by its pick, not read by it: it can save the next pass,
and has no part here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pearl.core.records import Pass


def counted(passes: Sequence[Pass]) -> dict[str, Any]:
    """The counts, and what is derived of them; a figure is None where there was nothing to count."""
    verifications = sum(one.verified > 0 for one in passes)
    drafted, accepted = sum(one.offered for one in passes), sum(one.accepted_rows for one in passes)
    counts = by_depth(passes)
    return {
        "acceptance_length": 1 + accepted / verifications if verifications else None,
        "verifications": verifications,
        "draft_tokens": drafted,
        "accepted_draft_tokens": accepted,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_by_depth": [right / read for right, read in counts],
        "counts_by_depth": [list(pair) for pair in counts],
    }


def by_depth(passes: Sequence[Pass]) -> list[tuple[int, int]]:
    """At each depth below the root: how many guesses were accepted, of so many that were read after all before them had
    been accepted."""
    deepest = max((one.verified for one in passes), default=0)
    return [
        (sum(one.accepted_rows >= depth for one in passes), sum(one.verified >= depth for one in passes))
        for depth in range(1, deepest + 1)
    ]


def of_early_line(line: Mapping[str, Any]) -> dict[str, int]:
    """The facts of a pass that was written before they were counted, as far as its others tell: what the end of a text
    has cut off is missing."""
    accepted = min(line["committed"] - 1, line["offered"]) if line["offered"] else 0
    read_another = line["offered"] > accepted and line["tested"] > accepted
    return {"accepted_rows": accepted, "verified": accepted + read_another}
