"""Writes docs/reference/options.md from the definitions that the command line, YAML and Python use too.

python scripts/options_page.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl import options
from pearl.config import cli
from pearl.config.commands import COMMANDS
from pearl.config.server_config import ServerConfig
from pearl.evaluation.eval_config import TASK
from pearl.options import Option

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference" / "options.md"
HEAD = """\
# Options

Made by `scripts/options_page.py` from the definitions in the code: don't edit it.

Every option has one name. On the command line it is `--max-length 512`. In a YAML file (`--config FILE`) it is
`max_length: 512`; what stands on the command line wins. In Python the options of the pair and of the machine, all but
`pair`, are arguments of `Engine.from_pretrained`, those of sampling are fields of `SamplingParams`, those of decoding
belong to `Schedule.of`. `pearl COMMAND --help` lists the options of one command. What a pair says (`--pair`, or
smollm2-135m where no model is named) takes the place of the defaults of `--target`, `--draft`, `--target-draft`,
`--dtype`, `--load-in` and `--draft-load-in`. Some commands have defaults of their own: `serve` has `--max-sequences
8`, `--mode pearl` and `--max-draft-restarts 1000`; `chat` has `--mode pearl` and `--max-new-tokens 512`; `eval` has
`--generation-config off`, and each benchmark its own `--max-new-tokens`. `eval` also takes the modes `hf-assisted` and
`hf-prompt-lookup`.

## Commands

| command | does |
| --- | --- |
"""
OLD = """\

## Names of before

They are refused, with the new name in the sentence.

| before | now |
| --- | --- |
"""
TAKEN_BY = {
    cli.PAIR: "`chat`, `serve`, `eval`, `doctor`; `selfcheck` those of the target",
    cli.MACHINE: "`chat`, `serve`, `eval`, `doctor` (without `--processes`); `selfcheck` those of the target",
    cli.DECODING: "`chat`, `serve`, `eval`",
    "sampling": "`chat`, `eval`",
    cli.PROBLEMS: "`eval`",
    "task": "`eval`",
    cli.SERVER: "`serve`",
}


def page() -> str:
    text = HEAD + "".join(f"| `pearl {name}` | {about} |\n" for name, (_, about) in COMMANDS.items())
    for group, title in cli.TITLES.items():
        some = [one for one in (*cli.SHARED, *TASK, *options.of(ServerConfig)) if one.group == group and not one.hidden]
        text += f"\n## {title[0].upper()}{title[1:]}\n\nTaken by {TAKEN_BY[group]}.\n\n{table(some)}"
    text += f"\n## For finding faults\n\nNot in `--help`.\n\n{table(one for one in cli.SHARED if one.hidden)}"
    text += OLD
    for one in cli.SHARED:
        for old in one.was:
            text += f"| `--{old.replace('_', '-')}` | `{one.flag}` |\n"
    return text


def table(some: Iterable[Option]) -> str:
    rows = ["| option | takes | default | is |", "| --- | --- | --- | --- |"]
    for one in some:
        default = " ".join(one.default) if isinstance(one.default, list) else one.default
        shown = "" if default is None or isinstance(default, bool) else f"`{default}`"
        python = "" if one.name == one.dest.removeprefix("debug_") else f", in Python `{one.name}`"
        rows.append(f"| `{one.flag}`{python} | {one.kind.wanted} | {shown} | {one.help.replace('|', '/')} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written to {PAGE}")
