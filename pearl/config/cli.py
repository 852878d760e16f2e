"""The command line of every command: its sentences, its help, and the options that commands share. No torch here.

An option is defined once (`pearl.options`), where what it sets is: those of models and machines with `EngineConfig`,
of sampling with `SamplingParams`, of decoding with `Schedule`, of a run here. A YAML file (`--config`) may hold any
option of a command by its long name; what stands on the command line wins.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NoReturn

from pearl import options
from pearl.config.commands import COMMANDS
from pearl.config.engine_config import EMBEDDED, EngineConfig
from pearl.config.inputs import brief, parse_yaml, read_text
from pearl.config.pairs import Pair, load_pair
from pearl.config.server_config import SERVER
from pearl.core import schedule
from pearl.core.params import SamplingParams
from pearl.core.schedule import MODES, Schedule
from pearl.errors import CheckpointError, PearlError, StorageError, UsageError
from pearl.machine import launcher, logs
from pearl.options import PATH, TEXT, WORD, Option, whole

BASELINES = ("hf-assisted", "hf-prompt-lookup")  # transformers' own ways, beside ours: pearl.evaluation.baselines
# what a pair says, unless the command line does
BY_PAIR = ("target", "draft", "target_draft", "dtype", "load_in", "draft_load_in")
PAIR, MACHINE, DECODING, PROBLEMS = "pair", "machine", "decoding", "problems"

_SAMPLING = options.of(SamplingParams)
_RUN = (
    Option("pair", None, TEXT, "of the registry (pearl pairs), or a YAML file; default: smollm2-135m", PAIR),
    Option(
        "processes",
        None,
        whole(1, 2, words="1 or 2"),
        "1: ar and sd in one process; default: as many as needed",
        MACHINE,
    ),
    Option(
        "mode",
        ["ar", "pearl"],
        TEXT,
        f"one or several of {', '.join(MODES)}; sd:3 is sd with gamma 3",
        DECODING,
        several=True,
    ),
    Option("num_samples", 1, whole(1), "texts a problem, with the seeds from --seed on", PROBLEMS),
    Option("limit", None, whole(1), "only the first so many problems", PROBLEMS),
    Option("indices", None, WORD, "only these problems, like 0,3,10-20", PROBLEMS),
    Option("batch_size", 1, whole(1), "texts decoded side by side", PROBLEMS),
    Option("output", None, PATH, "the folder of results; default: a new one under results/", PROBLEMS),
)
SHARED = (*_RUN, *options.of(EngineConfig), *schedule.OPTIONS, *_SAMPLING)  # all that several commands take
TITLES = {
    PAIR: "the pair",
    MACHINE: "the machine",
    DECODING: "decoding",
    "sampling": "sampling",
    PROBLEMS: "the run",
    "task": "the task",
    SERVER: "the server",
}


_LOG_LEVEL = f"the least that is said on standard error: {', '.join(logs.LEVELS)} (default: info)"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows a default where it says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        untold = default is None or isinstance(default, bool) or default in ("", argparse.SUPPRESS)
        if untold or not action.help or "default" in action.help:
            return action.help
        return f"{action.help} (default: {default})"


class Parser(argparse.ArgumentParser):
    """The command line of one command. Says what is wrong in one sentence instead of a page of usage."""

    def __init__(self, command: str, *examples: str, about: str = ""):
        """`command`: a key of `COMMANDS`, such a one and a word, or a script; `examples`: what may stand after
        it; `about`: what it does, unless that table says so."""
        about = about or COMMANDS.get(command, ("", command))[1]
        self.command = command if command.endswith(".py") else f"pearl {command}"
        shown = "\n".join(f"  {self.command} {words}".rstrip() for words in examples)
        super().__init__(
            prog=self.command,
            usage=f"{self.command} [options]",
            description=f"{about[0].upper()}{about[1:].rstrip('.')}.",
            epilog=f"example{'s' if len(examples) > 1 else ''}:\n{shown}" if shown else None,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self.add_argument("--log-level", choices=logs.LEVELS, metavar="LEVEL", help=_LOG_LEVEL)
        self.options: dict[str, Option] = {}
        self._named: dict[str, argparse._ArgumentGroup] = {}

    def explain(self, dest: str, words: str) -> None:
        """What an option is, where this command knows better."""
        next(action for action in self._actions if action.dest == dest).help = words

    def format_help(self) -> str:
        shape = self._get_formatter()
        words = [shape._format_args(one, one.dest.upper()) for one in self._get_positional_actions()]
        self.usage = " ".join([self.command, "[options]", *words])
        return super().format_help()

    def take(self, some: Iterable[Option], replace: bool = False) -> Parser:
        """Adds these options, each to the group that it names. `replace`: they replace a file's, so that a flag has a
        way to be switched off."""
        for one in some:
            group = self._named.get(one.group)
            if group is None:
                group = self._named[one.group] = self.add_argument_group(TITLES.get(one.group, one.group))
            self.options[one.dest] = one
            help = argparse.SUPPRESS if one.hidden else one.help
            if one.kind.flag:
                action: Any = argparse.BooleanOptionalAction if replace else "store_true"
                group.add_argument(one.flag, action=action, help=help)
            else:
                several: dict[str, Any] = {"nargs": "+"} if one.several else {}
                group.add_argument(
                    one.flag, type=_reader(one), default=one.default, help=help, metavar=_metavar(one), **several
                )
        return self

    def own_actions(self) -> list[argparse.Action]:
        """The options that only this command has, which a `--config` file may give too."""
        shared = {*self.options, "help", "config", "log_level"}
        return [action for action in self._actions if action.option_strings and action.dest not in shared]

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            word = next((word for word in rest if word.startswith("-")), rest[0]).partition("=")[0]
            self._refuse(word)
        if level := found.__dict__.pop("log_level", None):
            logs.set_level(level)
        return found

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """A type's own sentence; argparse has one of its own in place of a `UsageError`, as that is a ValueError."""
        try:
            return super()._get_value(action, arg_string)  # type: ignore[misc]
        except argparse.ArgumentError as error:
            if isinstance(error.__context__, UsageError):
                raise error.__context__ from None
            raise

    def _refuse(self, word: str) -> NoReturn:
        known = [name for action in self._actions for name in action.option_strings if action.help != argparse.SUPPRESS]
        before = {f"--{_dashed(old)}": f"--{_dashed(new)}" for old, new in options.renamed(SHARED).items()}
        before |= {f"--{_dashed(one.name)}": one.flag for one in SHARED if one.hidden}
        if word in before:
            raise UsageError(f"The option {word} is called {before[word]} now.")
        if word.startswith("-"):
            what = f"There is no option {brief(word)}{options.did_you_mean(word, known)}"
        else:
            what = f"{brief(word)!r} has no meaning here."
        raise UsageError(f"{what} `{self.command} --help` lists what there is.")

    def error(self, message: str) -> NoReturn:
        said = message.removeprefix("argument ").replace(": must", " must", 1)
        said = said.replace("the following arguments are required:", "Give")
        raise UsageError(f"{said} (see `{self.command} --help`)")


def _dashed(name: str) -> str:
    word, _, rest = name.partition(" ")
    return f"{word.replace('_', '-')} {rest}".rstrip()


def _metavar(one: Option) -> str:
    if len(one.kind.choices) > 1:
        return f"{{{','.join(one.kind.choices)}}}"
    return {int: "N", float: "X"}.get(one.kind.read, one.name.rpartition("_")[2].upper())  # type: ignore[call-overload]


def _reader(one: Option) -> Callable[[str], object]:
    return lambda word: one.of_word(word)


def parser(
    command: str,
    *examples: str,
    take: Collection[str] = tuple(TITLES),
    but: Collection[str] = (),
    max_new_tokens: int = 128,
    baselines: Sequence[str] = (),
    about: str = "",
) -> Parser:
    """A command line with the shared options of the groups `take`, without those named in `but`."""
    made = Parser(command, *examples, about=about)
    made.add_argument("--config", metavar="FILE", help="a YAML file with any of these options but --log-level")
    made.take(one for group in TITLES if group in take for one in SHARED if one.group == group and one.name not in but)
    made.set_defaults(**{name: None for name in (*BY_PAIR, "max_sequences") if name in made.options})
    if "generation_config" in made.options:
        made.set_defaults(generation_config="off")  # what is measured is greedy unless the command line says otherwise
    if "max_new_tokens" in made.options:
        made.set_defaults(max_new_tokens=max_new_tokens)
    if baselines:
        made.explain("mode", f"one or several of {', '.join((*MODES, *baselines))}; sd:3 is sd with gamma 3")
    return made


def parse(made: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, those of a `--config` file under those of the command line."""
    found = made.parse_args(argv)
    if found.config:
        made.set_defaults(**_yaml(found.config, made))
        found = made.parse_args(argv)
    if "mode" in made.options:
        found.mode = [mode for word in found.mode for mode in word.split(",") if mode]
    return found


def _yaml(path: str, made: Parser) -> dict[str, Any]:
    """The values of a config, checked as words of the command line are."""
    where = f"The config {brief(path)}"
    values = parse_yaml(read_text(path, "The config"), where)
    values = {key.replace("-", "_"): value for key, value in values.items()}
    own = {action.dest: action for action in made.own_actions()}
    options.refuse_unknown(values, [*made.options, *own], path, options.renamed(SHARED))
    read: dict[str, Any] = {}
    for key, value in values.items():
        if value is None:
            read[key] = made.get_default(key)
        elif key in made.options:
            read[key] = made.options[key].of_yaml(value, f"{where}: {key}")
        else:
            read[key] = _of_action(own[key], value, f"{where}: {key}")
    return read


def _of_action(action: argparse.Action, value: Any, where: str) -> Any:
    """The value of an option that one command alone has, as the same words on the command line would give it."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UsageError(f"{where} must be true or false, not {brief(value)}.")
        return value
    words = list(value) if isinstance(value, list) and action.nargs else [value]
    if not all(isinstance(word, str | int | float) and not isinstance(word, bool) for word in words):
        raise UsageError(f"{where} must be text or a number, not {brief(value)}.")
    read = action.type if callable(action.type) else str
    try:
        found = [read(str(word)) for word in words]
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{where} {error}") from None
    except ValueError:
        raise UsageError(f"{where} must be {getattr(read, '__name__', 'another')}, not {brief(value)}.") from None
    if action.choices is not None and not set(found) <= set(action.choices):
        raise UsageError(f"{where} must be one of {', '.join(map(str, action.choices))}, not {brief(value)}.")
    return found if action.nargs else found[0]


def given(found: argparse.Namespace, but: Collection[str] = ()) -> dict[str, Any]:
    """What was said on a command line, of the options that are None otherwise."""
    return {name: value for name, value in vars(found).items() if value is not None and name not in but}


def engine_config(found: argparse.Namespace) -> tuple[EngineConfig, Pair | None]:
    """The engine's config: the pair's values where one is named, and the command line over them."""
    pair, target, draft = (getattr(found, name, None) for name in ("pair", "target", "draft"))
    named = load_pair(pair or EMBEDDED) if pair or not (target or draft) else None
    values: dict[str, Any] = {name: getattr(named, name) for name in BY_PAIR} if named else {}
    if named and draft not in (None, named.draft):
        values["draft_load_in"] = None  # said of the pair's own
    values["max_sequences"] = getattr(found, "batch_size", 1)
    names = {one.name: one.dest for one in options.of(EngineConfig)}
    values |= {name: value for name, dest in names.items() if (value := getattr(found, dest, None)) is not None}
    return EngineConfig(**values), named


def sampling(found: argparse.Namespace, stop: Sequence[str] = ()) -> SamplingParams:
    """A command that is run again writes the same: without a --seed it is 0."""
    values = {one.name: getattr(found, one.dest) for one in _SAMPLING}
    return SamplingParams(**values | {"seed": values["seed"] or 0}, stop=tuple(stop))


def schedules(found: argparse.Namespace, besides: Sequence[str] = ()) -> dict[str, Schedule]:
    """The schedule of each mode to run, by its name. Those named in `besides` have none."""
    settings = {one.name: getattr(found, one.dest) for one in schedule.OPTIONS}
    if not found.mode:
        raise UsageError(f"Name at least one mode: {', '.join((*MODES, *besides))}.")
    for name in found.mode:
        schedule.refuse_unknown_mode(name.partition(":")[0], (*MODES, *besides))
    return {name: Schedule.of(name, **settings) for name in found.mode if name not in besides}


def hardest(schedules: Iterable[Schedule]) -> Schedule:
    """The one that an engine must be made for to run them all; without any, the target alone."""

    def demands(schedule: Schedule) -> tuple[bool, bool, bool]:
        return schedule.drafts, schedule.post_verify or schedule.pre_verify, schedule.mode == "ar-all"

    return max(schedules, key=demands, default=Schedule.of("ar"))


def choose(count: int, indices: str | None) -> list[int]:
    """The numbers that `indices` names, out of `count`; None: all. Raises `UsageError`."""
    chosen = list(range(count))
    if indices is not None:
        chosen = []
        try:
            for part in str(indices).split(","):
                first, _, last = part.partition("-")
                named = range(int(first), int(last or first) + 1)
                chosen += named if named and named[0] >= 0 and named[-1] < count else [-1]
        except ValueError:
            raise UsageError(f"--indices must be written like 0,3,10-20, not {indices!r}.") from None
        if not chosen or not set(chosen) <= set(range(count)):
            raise UsageError(f"--indices {indices} are not all there: the problems are numbered 0 to {count - 1}.")
    return list(dict.fromkeys(chosen))


def at_least_one(word: str) -> int:
    """The type of an option that counts."""
    try:
        value = int(word)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {brief(word)}")
    return value


def guarded(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """A `main` whose `UsageError`, `CheckpointError` or `StorageError` becomes a line on standard error and exit code
    2, any other `PearlError` one and 1, and Ctrl-C one and 130. All ranks meet it; one says it."""

    def say(line: str) -> None:
        if launcher.is_main_process():
            print(line, file=sys.stderr)

    def run(argv: Sequence[str] | None = None) -> int:
        undo = logs.write_lines()
        try:
            return main(argv)
        except PearlError as error:
            say(f"error: {error}")
            return 2 if isinstance(error, UsageError | CheckpointError | StorageError) else 1
        except KeyboardInterrupt as stop:
            say(str(stop) or "interrupted: what was finished is written. The same command goes on from there.")
            return 130
        except BrokenPipeError:  # `pearl ... | head`: whoever reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        finally:
            undo()

    return run
