"""The front door: `pearl`, or `python -m pearl`. It loads what one command needs, once it knows which."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from pearl import __version__
from pearl.config.commands import COMMANDS

COMPLETION = "completion"


def help_text() -> str:
    lines = [f"  {name:10} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        (
            "usage: pearl COMMAND [options]",
            "",
            "Parallel speculative decoding: a drafter and a target in two processes, and the target's own text.",
            "",
            "commands:",
            *lines,
            f"  {COMPLETION:10} print a script that completes commands and options: bash, zsh or tcsh",
            "",
            "`pearl COMMAND --help` lists the options of one, with examples; `pearl --version` says which pearl it is.",
            "",
            "first things to try:",
            "  pearl chat",
            "  pearl doctor",
            "  pearl eval humaneval --limit 6 --mode ar pearl tree",
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if words else 2
    name, *rest = words
    if name in ("-V", "--version"):
        print(f"pearl {__version__}")
        return 0
    if name == COMPLETION:
        from pearl.commands import completion

        return completion.main(rest)
    if name not in COMMANDS:
        from pearl.options import did_you_mean, shown

        end = did_you_mean(name, [*COMMANDS, COMPLETION])
        print(f"error: There is no command {shown(name)}{end} `pearl --help` lists them.", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name][0]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
