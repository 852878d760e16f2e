"""Results of other engines beside ours, and what keeps the two from being compared.

A file holds one object or a list of them. `name`, `version`, `command`, `tokens` and `seconds` must be there;
`acceptance_length` and `acceptance` where the engine speculates. Its `acceptance` is accepted over drafted tokens: our
`draft_acceptance_rate`, and not our `acceptance`. The more of `COMPARED` it says, the less the page has to doubt
(docs/guides/evaluate.md has an example).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pearl.config.inputs import brief, parse_json, read_text, whole_characters
from pearl.errors import UsageError
from pearl.evaluation import tables
from pearl.evaluation.report import PLAIN, Run

MOST = 1e15  # of any number here: its quotients are numbers too
Rule = tuple[str, Callable[[Any], object]]  # what a value must be, and whether it is


def _number(low: float, high: float = MOST, whole: bool = False) -> Rule:
    def good(value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and low <= value <= high and (value == int(value) or not whole)

    return f"a {'whole ' * whole}number from {low:g} to {high:g}", good


TEXT: Rule = "a text", lambda value: isinstance(value, str) and value.strip()
COUNT = _number(1, whole=True)
MUST = {"name": TEXT, "version": TEXT, "command": TEXT, "tokens": COUNT, "seconds": _number(1e-6)}
MAY = {"acceptance_length": _number(1), "acceptance": _number(0, 1), "note": TEXT}
# what two measurements must share, by the name that a file gives it, and where our run has it
COMPARED = {
    "benchmark": ("config", "suite"),
    "prompts": ("config", "prompts"),
    "prompt_format": ("config", "prompt_format"),
    "target": ("resolved", "target"),
    "draft": ("resolved", "draft"),
    "dtype": ("resolved", "dtype"),
    "max_new_tokens": ("config", "max_new_tokens"),
    "temperature": ("config", "temperature"),
    "ignore_eos": ("config", "ignore_eos"),
    "batch_size": ("config", "batch_size"),
    "problems": ("facts", "problems"),
    "processor": ("environment", "processor"),
}
RULES = MUST | MAY | dict.fromkeys(COMPARED, TEXT) | dict.fromkeys(("max_new_tokens", "batch_size", "problems"), COUNT)
RULES["temperature"] = _number(0)
RULES["ignore_eos"] = "true or false", lambda value: isinstance(value, bool)
_WORDS = {"prompts": "digest of the prompts", "batch_size": "texts side by side", "ignore_eos": "ignore_eos"}


@dataclass(frozen=True)
class Other:
    """A result of another engine."""

    facts: Mapping[str, Any]
    file: str

    @property
    def label(self) -> str:
        return f"{self.facts['name']} {self.facts['version']}"

    @property
    def figures(self) -> tables.Figures:
        facts = self.facts
        return {
            "tokens_per_second": facts["tokens"] / facts["seconds"],
            "acceptance_length": facts.get("acceptance_length"),
            "draft_acceptance_rate": facts.get("acceptance"),
        }


def load(files: Sequence[str]) -> list[Other]:
    """Raises `UsageError` for a file that is none."""
    found = []
    for file in files:
        values = parse_json(read_text(file, "The results of another engine in"), file)
        if values == []:
            raise UsageError(
                f"{file} holds no result: it must hold an object, or a list of them, with {', '.join(MUST)}."
            )
        for one in values if isinstance(values, list) else [values]:
            found.append(Other(_checked(one, file), file))
    return found


def _checked(one: Any, file: str) -> Mapping[str, Any]:
    if not isinstance(one, dict):
        raise UsageError(f"{file} must hold an object, or a list of them, with {', '.join(MUST)}.")
    if unknown := [name for name in one if name not in RULES]:
        raise UsageError(f"{file}: unknown key {brief(repr(unknown[0]))}; known keys are {', '.join(RULES)}.")
    for name, (said, good) in RULES.items():
        value = one.get(name)
        if (name in MUST or value is not None) and not good(value):
            raise UsageError(f"{file}: {name} must be {said}, not {brief(repr(value))}.")
    whole_characters(one, file)
    return one


def rows(others: Sequence[Other], runs: Sequence[Run]) -> list[tables.Row]:
    """(who, mode or command) of all of them, ours below."""
    theirs: list[tables.Row] = [
        ((one.label, one.facts.get("note") or one.facts["command"]), one.figures) for one in others
    ]
    return theirs + [((f"pearl, {run.label}", mode), figures) for run in runs for mode, figures in run.modes.items()]


def doubts(others: Sequence[Other], runs: Sequence[Run]) -> Iterator[str]:
    """Why a result should not be compared with ours, a sentence each."""
    if others and not runs:
        yield "None of our runs has a real draft, so that there is nothing to compare them with."
    for run in runs if others else ():
        odd = {key: run.config.get(key) for key in PLAIN if key not in (*COMPARED, "seed")}
        if beside := [f"{key} {value}" for key, value in odd.items() if value not in (None, PLAIN[key])]:
            yield f"{run.name} was asked for {', '.join(beside)}, which no file of another engine says."
    for one in others if runs else ():
        untold = [_word(name) for name in COMPARED if one.facts.get(name) is None]
        if untold:
            yield f"{one.label} does not say: {', '.join(untold)}."
        for name, (part, key) in COMPARED.items():
            said = one.facts.get(name)
            ours = [getattr(run, part).get(key, PLAIN.get(key)) for run in runs]
            if said is not None and {_plain(name, value) for value in ours} != {_plain(name, said)}:
                told = sorted({"nothing said" if value is None else str(value) for value in ours})
                yield f"{_word(name)} differs: {said} in {one.label}; {', '.join(told)} in ours."
        for name, figure in (("acceptance_length", "acceptance_length"), ("acceptance", "draft_acceptance_rate")):
            if one.facts.get(name) is None and any(modes.get(figure) for run in runs for modes in run.modes.values()):
                yield f"{one.label} does not say its {name.replace('_', ' ')}."
                break
    if others and runs:
        yield (
            "The engines did not take turns problem by problem: a machine that was slower for one of them shows as a "
            "difference between engines. Compare each with its own baseline."
        )


def _word(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))


def _plain(name: str, value: Any) -> Any:
    """A value as it is compared: 0 is 0.0, and a benchmark has its name with either line."""
    if isinstance(value, int | float):
        return value
    return str(value).replace("-", "_") if name == "benchmark" else str(value)
