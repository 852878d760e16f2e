"""The self-check: what was found of the target's bits on this machine, and what is done about it.

    pearl selfcheck                        the default pair
    pearl selfcheck --cuda-graphs on       also what a GPU would be asked, on a CPU

It loads the target, tries what `pearl.models.numerics_check` says, and keeps the answer, so an engine of the same
model on the same device starts from it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pearl.config import cli
from pearl.config.engine_config import EngineConfig
from pearl.core.token_buckets import Check
from pearl.options import of

OK, SLOW = "ok", "slow"


def parser() -> cli.Parser:
    drafting = [one.name for one in of(EngineConfig) if one.name.startswith("draft") or "draft" in one.help]
    but = (*drafting, "processes", "trace", "heartbeat_timeout_s", "start_timeout_s", "feature_transport", "tree_top_k")
    return cli.parser("selfcheck", "", "--target TARGET --dtype float16", take=("pair", "machine"), but=but)


def report(checks: Sequence[Check]) -> list[tuple[str, str, str]]:
    """(what, verdict, a sentence) of each fact that was tried: `ok`, or `slow` where the runtime goes without it."""
    return [(check.what, OK if check.holds else SLOW, check.found) for check in checks]


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = cli.parse(parser(), argv)
    config, _ = cli.engine_config(found)
    print(
        f"loading {config.target}, then reading texts with it alone, together and in several shapes, to see where its "
        "bits differ; on a CPU seconds for a small model and minutes for a large one, once",
        file=sys.stderr,
        flush=True,
    )

    from pearl.checkpoints.preflight import preflight
    from pearl.checkpoints.targets import load_target

    model = load_target(preflight(config, ("target",)))
    for what, verdict, sentence in report(model.checks):
        print(f"{verdict:5} {what}: {sentence}")
    return 0
