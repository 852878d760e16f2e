"""Runs side by side: their figures as rows, what keeps them from being compared, and one page about them.

Reads what runs have left (`pearl.evaluation.results`) and measures nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pearl.config.inputs import parse_json, read_text, sound
from pearl.core.records import GenerationStats, SampleKey
from pearl.errors import UsageError
from pearl.evaluation import results, tables

# What two runs must share if their figures are to be compared, and what else if they have the same benchmark
ENVIRONMENT = ("commit", "torch", "transformers", "machine", "processor")
PLAIN = {  # as evaluations are by default; an early run that has not one of these was so
    "ignore_eos": False,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": 0,
    "sampling": "seeded",
    "num_samples": 1,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "min_tokens": 0,
    "batch_size": 1,
}
OF_A_BENCHMARK = ("prompts", "prompt_format", "max_new_tokens", *PLAIN)
OF_A_RATE = ("prompts", "max_new_tokens", "batch_size")  # what `ar` is slower or faster by, whatever the machine
OF_OTHERS = ("tokens_per_second", "speedup_vs_ar", "acceptance_length", "draft_acceptance_rate")
DRIFT = 1.1  # `ar` of one target on one benchmark is the same figure in every run, within a tenth


@dataclass(frozen=True)
class Run:
    """One folder of results."""

    folder: Path
    name: str  # among the others
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    modes: Mapping[str, tables.Figures]
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else its summary says

    @cached_property
    def texts(self) -> dict[str, dict[SampleKey, GenerationStats]]:
        return results.read(self.folder)[0]

    @property
    def resolved(self) -> Mapping[str, Any]:
        """The options of its engine."""
        return self.config.get("resolved", {})

    @cached_property
    def kind(self) -> tuple[str, ...]:
        """What it is beside a plain run: synthetic, warm; nothing."""
        return results.kind(self.resolved)

    @property
    def label(self) -> str:
        """Its name and kind."""
        return f"{self.name} ({', '.join(self.kind)})" if self.kind else self.name

    @property
    def rest(self) -> str:
        """What there is still to do, as a sentence goes on; nothing of a run that has ended."""
        units, widest = self.facts.get("unfinished", 0), self.facts.get("widest_interval")
        wanted = self.facts.get("wanted_interval") or self.config.get("stop_at_interval")
        if not units:
            return ""
        if not wanted:
            return f"{units} work unit{'s are' if units > 1 else ' is'} left"
        known = f"is {widest:.0%} of its speed-up" if widest else "is not known of so few problems"
        return f"the widest interval {known}, and is to become {wanted:.0%}"

    @property
    def commits(self) -> list[str]:
        """Of its code; of each piece of a run that was made in pieces."""
        said = [one.get("commit") for one in self.facts.get("starts", ())] or [self.environment.get("commit")]
        return list(dict.fromkeys(map(str, said)))

    @property
    def processors(self) -> list[str]:
        """The same of the processors; early runs say the last one's alone."""
        said = [one["processor"] for one in self.facts.get("starts", ()) if one.get("processor")]
        return list(dict.fromkeys(said or [str(self.environment.get("processor"))]))

    @property
    def command(self) -> str:
        return " ".join(map(str, self.environment.get("command", ())))


def load(places: Sequence[Path]) -> list[Run]:
    """The runs in these folders, or, of a folder that is none, all below it; named by what of their paths differs.

    A summary that was kept without its run (docs/results/PAIR/RUN.json) is one too, as a file or in a folder that
    holds no whole run. Raises UsageError for a place without a finished run.
    """
    found: dict[Path, Run] = {}
    for place in places:
        whole = {file.parent: file for file in sorted(place.rglob(results.SUMMARY))}
        some = [_run(_facts(file), file, folder) for folder, file in whole.items()]
        if not some:
            single = [kept(place)] if place.is_file() else map(_kept_below, sorted(place.rglob("*.json")))
            some = [run for run in single if run]
        if not some:
            raise UsageError(f"{place} holds no finished run: name folders with a {results.SUMMARY}.")
        found |= {run.folder: run for run in some}
    shared = _shared_parent(list(found))
    names = {folder: folder.absolute().relative_to(shared) for folder in found}
    return [
        replace(run, name=str(names[folder].with_suffix("") if folder.is_file() else names[folder]))
        for folder, run in found.items()
    ]


def kept(file: Path) -> Run | None:
    """The run of a kept summary; None for a file of something else."""
    facts = _facts(file)
    told = isinstance(facts, dict) and {"config", "environment", "modes"} <= set(facts)
    return _run(facts, file, file) if told else None


def _kept_below(file: Path) -> Run | None:
    """The same of a file that nobody has named: None where it is no JSON either."""
    try:
        return kept(file)
    except UsageError:
        return None


def _facts(file: Path) -> Any:
    return parse_json(read_text(file, "The summary"), str(file))


def _run(facts: Any, file: Path, folder: Path) -> Run:
    """The run of what a summary holds. Raises `UsageError` where that is damaged."""
    with sound(str(file), "make the run again, or name results of another engine with --others"):
        config, environment, modes = (dict(**facts.pop(name)) for name in ("config", "environment", "modes"))
    return Run(folder, folder.name, config, environment, modes, facts)


def all_of_a_kind(runs: Sequence[Run]) -> None:
    """Raises `UsageError` where synthetic runs would stand beside real ones, or warm beside cold ones."""
    sentences = {
        "synthetic": "runs with a synthetic draft, which don't stand in a table with real ones",
        "warm memory": "runs with a memory of earlier texts (warm), which don't stand in a table with cold ones",
    }
    for kind, sentence in sentences.items():
        such = [run.name for run in runs if kind in run.kind]
        if such and len(such) < len(runs):
            raise UsageError(f"{', '.join(such)}: {sentence}: give them one of their own.")


def by_kind(runs: Sequence[Run]) -> dict[tuple[str, ...], list[Run]]:
    """Those of one kind together, plain ones first."""
    return {kind: [run for run in runs if run.kind == kind] for kind in sorted({run.kind for run in runs})}


def rows(runs: Sequence[Run], categories: bool = False) -> list[tables.Row]:
    """(run, mode), or (run, category, mode), and the figures of it. A run that is not a plain one says so."""
    named = [(run.label, run) for run in runs]
    if not categories:
        return [
            ((f"{name}{what}", mode), some)
            for name, run in named
            for what, key in (("", None), (", without the repeated prompt", "without_repeats"))
            for mode, figures in run.modes.items()
            if (some := figures.get(key) if key else figures)
        ]
    return [
        ((name, category, mode), of_category)
        for name, run in named
        for mode, figures in run.modes.items()
        for category, of_category in (figures.get("by_category") or {}).items()
    ]


def doubts(runs: Sequence[Run], varied: Sequence[str] = ()) -> list[str]:
    """Why these runs' figures should not be compared, a sentence each; none if nothing speaks against it.

    `varied`: options that a sweep varies on purpose."""
    found = list(_differences(runs, lambda run: run.environment, ENVIRONMENT))
    measured = [run for run in runs if any(figures.get("millijoules_per_token") for figures in run.modes.values())]
    found += _differences(measured, lambda run: run.environment, ["energy"])
    for benchmark in dict.fromkeys(run.config.get("suite") for run in runs):
        same = [run for run in runs if run.config.get("suite") == benchmark]
        told = [*_differences(same, lambda run: run.config, [key for key in OF_A_BENCHMARK if key not in varied])]
        told += _differences([run for run in same if "problems" in run.facts], lambda run: run.facts, ["problems"])
        found += [f"Of {benchmark}: {sentence}" for sentence in told]
        for alike in dict.fromkeys(map(_baseline, same)):
            found += _drift([run for run in same if _baseline(run) == alike])
    if rest := [f"{run.name} ({run.rest})" for run in runs if run.rest]:
        found.append(f"Not finished: {', '.join(rest)}.")
    return found + [sentence for run in runs for sentence in _of_itself(run)]


def _of_itself(run: Run) -> Iterator[str]:
    if len(run.commits) > 1:
        yield f"{run.name} was made in pieces by several commits: {', '.join(run.commits)}."
    if len(run.processors) > 1:
        yield f"{run.name} was made in pieces on several processors: {', '.join(run.processors)}."
    if skipped := run.facts.get("skipped_too_long"):
        yield f"{run.name} leaves out {skipped} problem{'s' * (skipped > 1)} that were too long."
    if other := [f"{mode} {1 - equal:.1%}" for mode, equal in _of_modes(run, "identical_to_ar") if equal < 1]:
        yield f"In {run.name}, texts that are not those of ar: {', '.join(other)}."
    asked = run.config.get("batch_size") or 1
    if fewer := [f"{mode} {texts}" for mode, texts in _of_modes(run, "most_side_by_side") if texts < asked]:
        yield f"In {run.name}, fewer texts were side by side than the {asked} asked for: {', '.join(fewer)}."
    if failed := [f"{mode} in {texts} texts" for mode, texts in _of_modes(run, "drafter_failures") if texts]:
        yield f"In {run.name}, the drafter failed: {', '.join(failed)}."


def _of_modes(run: Run, figure: str) -> list[tuple[str, float]]:
    """That figure of every mode that has it."""
    return [(mode, figures[figure]) for mode, figures in run.modes.items() if figures.get(figure) is not None]


def _differences(runs: Sequence[Run], said: Callable[[Run], Mapping[str, Any]], keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        values: dict[str, list[str]] = {}
        for run in runs:
            value = said(run).get(key, PLAIN.get(key))
            values.setdefault(f"{value:g}" if isinstance(value, float) else str(value), []).append(run.name)
        if len(values) > 1:
            told = "; ".join(f"{value} in {', '.join(names)}" for value, names in values.items())
            yield f"{key} differs: {told}."


def _drift(runs: Sequence[Run]) -> Iterator[str]:
    rates = {run.name: run.modes["ar"]["tokens_per_second"] for run in runs if "ar" in run.modes}
    if rates and max(rates.values()) > DRIFT * min(rates.values()):
        slow, fast = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
        yield (
            f"ar made {rates[slow]:.2f} tokens/s in {slow} and {rates[fast]:.2f} in {fast}: the machine was not the "
            "same; compare ratios within a run."
        )


def _baseline(run: Run) -> tuple[Any, ...]:
    """What makes `ar` of a benchmark as fast as it is, beside the machine."""
    target = (run.resolved.get(name) for name in ("target", "dtype", "target_device", "target_cores"))
    return (*target, *(run.config.get(name, PLAIN.get(name)) for name in OF_A_RATE))


def _shared_parent(folders: Sequence[Path]) -> Path:
    """The deepest folder that holds them all."""
    paths = [folder.absolute() for folder in folders]
    return next(parent for parent in paths[0].parents if all(path.is_relative_to(parent) for path in paths))


def page(
    title: str,
    runs: Sequence[Run],
    columns: Sequence[str],
    pictures: Mapping[str, bytes],
    beside: tuple[Sequence[tables.Row], Sequence[str]] = ((), ()),
) -> str:
    """An HTML page that needs no other file: doubts, tables, pictures (PNG by caption), and how each run was made.

    Synthetic and warm runs have tables of their own. `beside`: the rows of a table with other engines, and why they
    should not be compared.
    """
    from jinja2 import Environment, FileSystemLoader

    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return pages.get_template("report.html").render(
        title=title,
        sections=[_section(some, columns) for some in by_kind(runs).values()],
        others=tables.cells(("engine", "what"), OF_OTHERS, beside[0]) if beside[0] else None,
        other_doubts=beside[1],
        pictures=[(name, base64.b64encode(png).decode()) for name, png in pictures.items()],
        made=[(run, json.dumps({"config": run.config, "environment": run.environment}, indent=2)) for run in runs],
    )


def _section(runs: Sequence[Run], columns: Sequence[str]) -> dict[str, Any]:
    by_category = rows(runs, categories=True)
    kept = [name for name in columns if any(name in figures for _, figures in by_category)]
    return {
        "kind": runs[0].kind,
        "doubts": doubts(runs),
        "figures": tables.cells(("run", "mode"), columns, rows(runs)),
        "by_category": tables.cells(("run", "category", "mode"), kept, by_category) if by_category else None,
    }
