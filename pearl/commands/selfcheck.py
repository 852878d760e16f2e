"""The self-check: what was found of the target's bits on this machine, and what is done about it.

    python -m pearl.commands.selfcheck                   the default pair; the options are those of the evaluations
    python -m pearl.commands.selfcheck --static on       also what a GPU would be asked, on a CPU

It loads the target, tries what `pearl.models.numerics_check` says, and keeps the answer, so an engine of the same
model on the same device starts from it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pearl.checkpoints.preflight import preflight
from pearl.checkpoints.targets import load_target
from pearl.config import cli
from pearl.models.language_model import LanguageModel

OK, SLOW = "ok", "slow"


def report(model: LanguageModel) -> list[tuple[str, str, str]]:
    """(what, verdict, a sentence) of each fact that was tried: `ok`, or `slow` where the runtime goes without it."""
    return [(check.what, OK if check.holds else SLOW, check.found) for check in model.checks]


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    found = cli.parse(cli.parser("What the target's bits depend on here.", 1), argv)
    config, _ = cli.engine_config(found)
    model = load_target(preflight(config, ("target",)))
    for what, verdict, sentence in report(model):
        print(f"{verdict:5} {what}: {sentence}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
