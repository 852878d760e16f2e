"""The self-check: what was found of the target's bits on this machine, and what is done about it.

    pearl selfcheck                        the default pair
    pearl selfcheck --cuda-graphs on       also what a GPU would be asked, on a CPU

It loads the target on the cores that a target beside a drafter has, tries what `pearl.models.numerics_check` says, and
keeps the answer: an engine of two processes starts from it.
"""

from __future__ import annotations

import contextlib
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
    but += ("tensor_parallel_size", "prefill_tokens")
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
    from pearl.machine import cores
    from pearl.parallel.launch import shares

    checked = preflight(config, ("target",))
    cpus, _ = shares(checked.config, two=True)
    with cores.running_on(cpus) if checked.config.pins else contextlib.nullcontext():
        model = load_target(checked)
    for what, verdict, sentence in report(model.checks):
        print(f"{verdict:5} {what}: {sentence}")
    return 0
