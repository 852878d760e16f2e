"""Results of other engines beside ours, and what keeps the two from being compared.

A file holds one object or a list of them. `name`, `version`, `command`, `tokens` and `seconds` must be there;
`acceptance_length` and `acceptance` where the engine speculates. Its `acceptance` is accepted over drafted tokens: our
`draft_acceptance_rate`, and not our `acceptance`. The more of `COMPARED` it says, the less the page has to doubt
(docs/guides/evaluate.md has an example).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pearl.config.inputs import parse_json, read_text
from pearl.errors import UsageError
from pearl.evaluation import tables
from pearl.evaluation.report import Run

MUST: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "version": str,
    "command": str,
    "tokens": int,
    "seconds": (int, float),
}
MAY: dict[str, type | tuple[type, ...]] = {"acceptance_length": (int, float), "acceptance": (int, float), "note": str}
RANGES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "tokens": ("a whole number above 0", lambda value: value > 0),
    "seconds": ("a number above 0", lambda value: 0 < value < math.inf),
    "acceptance_length": ("a number from 1", lambda value: 1 <= value < math.inf),
    "acceptance": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
}
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
    "batch_size": ("config", "batch_size"),
    "problems": ("facts", "problems"),
    "processor": ("environment", "processor"),
}
_WORDS = {"prompts": "digest of the prompts", "processor": "processor", "batch_size": "texts side by side"}


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
    for name, kind in (MUST | MAY).items():
        value = one.get(name)
        if value is None and name not in MUST:
            continue
        number = kind is not str
        wrong: Any = value
        said, good = RANGES[name] if number else ("a text", str.strip)
        if not isinstance(value, kind) or isinstance(value, bool) or not good(wrong):
            raise UsageError(f"{file}: {name} must be {said}, not {value!r}.")
    if unknown := [name for name in one if name not in MUST and name not in MAY and name not in COMPARED]:
        raise UsageError(f"{file}: unknown key {unknown[0]!r}; known keys are {', '.join((*MUST, *MAY, *COMPARED))}.")
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
    for one in others if runs else ():
        untold = [_word(name) for name in COMPARED if one.facts.get(name) is None]
        if untold:
            yield f"{one.label} does not say: {', '.join(untold)}."
        for name, (part, key) in COMPARED.items():
            said = one.facts.get(name)
            ours = [getattr(run, part).get(key) for run in runs]
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
