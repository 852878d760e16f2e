"""`pearl completion`: a script for the shell, made of the parsers of all commands."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from pearl.commands import eval
from pearl.config import cli
from pearl.config.commands import COMMANDS
from pearl.evaluation import eval_config

SHELLS = ("bash", "zsh", "tcsh")


def parser() -> cli.Parser:
    made = cli.Parser(
        "completion",
        "bash > ~/.local/share/bash-completion/completions/pearl",
        'zsh > "${fpath[1]}/_pearl"',
        about="print a script that completes commands and options",
    )
    made.add_argument("shell", choices=SHELLS, help=", ".join(SHELLS))
    return made


def whole() -> argparse.ArgumentParser:
    """The command line of `pearl` with all its commands."""
    made = argparse.ArgumentParser(prog="pearl")
    made.add_argument("--version", action="store_true", help="which pearl this is")
    commands = made.add_subparsers()
    for name, (module, about) in COMMANDS.items():
        if name == "eval":
            benchmarks = commands.add_parser(name, help=about).add_subparsers()
            for benchmark in eval.BENCHMARKS:
                _put(benchmarks, benchmark, eval_config.parser(eval.benchmark(benchmark)), benchmark)
        else:
            _put(commands, name, importlib.import_module(module).parser(), about)
    _put(commands, "completion", parser(), "print a script for the shell")
    return made


def _put(commands: argparse._SubParsersAction, name: str, made: argparse.ArgumentParser, about: str) -> None:
    """A parser that is there already, among the subcommands of another."""
    prog = commands.add_parser(name, help=about).prog
    made.prog = prog
    commands.choices[name] = made  # type: ignore[index]


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    shell = parser().parse_args(argv).shell

    import shtab

    print(shtab.complete(whole(), shell))
    return 0
