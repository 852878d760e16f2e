"""The page of the results that are kept, and the lines of the README: made of the committed summaries alone.

A run is kept as PAIR/RUN.json, one of a sweep as sweeps/SWEEP/PAIR-RUN.json; what a reader must know of a pair stands
in PAIR/about.txt. Every line says which text, how long, and which machine. Pictures are PNG, with intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pearl.config.cli import BASELINES
from pearl.config.engine_config import EMBEDDED
from pearl.evaluation import plots, report, results, tables
from pearl.evaluation.pages import sweeps
from pearl.evaluation.report import Run

TITLES = {
    "humaneval": "HumanEval",
    "gsm8k": "GSM8K",
    "mgsm": "MGSM",
    "mt_bench": "MT-bench",
    "spec_bench": "Spec-Bench",
}
TITLES |= {"speed_bench": "SPEED-Bench", "input_length": "Prompts by length"}
COLUMNS = (
    "tokens_per_second",
    "speedup_vs_ar",
    "speedup_interval_95",
    "speedup_vs_ar_all",
    "identical_to_ar",
    "tokens_per_pass",
    "acceptance_length",
    "acceptance_length_interval_95",
    "score",
)
HEAD = """\
# Results that are kept

Made of the summaries in this folder by `python scripts/keep_results.py`; `bash scripts/results.sh keep` runs what is
kept of a pair and ends with it, `scripts/sweep_*.sh keep` and `scripts/gamma_sweep.sh keep` do so for sweeps;
`--interval` says how narrow the intervals of a finished run are, whatever its command stopped at. Texts of
transformers' own modes (`hf-*`) leave `ar`'s at near-ties, and those of `ar-all` may, as it adds up in another order;
all others are `ar`'s. Bars have 95 % intervals. [Figures](../reference/figures.md) says what each column is. Where
there is a folder `raw`, it has the lines of one run, of which its figures can be
[computed again](../reference/figures.md#computed-again-from-the-lines). The [log](../log.md) has what else was
measured, and what did not work.
"""
ABOUT = "about.txt"
OF_SWEEPS = "sweeps"  # the folder that has one of each sweep
PLOTS = {  # each where its interval is known of some mode
    "speedup": "speedup_interval_95",
    "equal_devices": "speedup_vs_ar_all_interval_95",
    "length": "acceptance_length_interval_95",
    "energy": "millijoules_per_token_interval_95",
}
KINDS = {
    "synthetic": "**Synthetic**: the drafter was told how often to be right. ",
    "warm memory": "**Warm**: guesses were taken from earlier texts too. ",
}
SAID = {  # of options that a line names in other words than their own
    "ignore_eos": "end of sequence ignored",
    "sampling": "{} sampling",
    "num_samples": "{} samples of each",
    "batch_size": "{} texts side by side",
    "repeats": "each {} times",
}
IN_A_LINE = ("sd", "pearl", "tree")
BEGIN, END = "<!-- figures of docs/results -->", "<!-- end of figures -->"


def load(folder: Path) -> list[Run]:
    """The runs whose summaries are kept there, a folder a pair; those of sweeps are not among them."""

    def place(file: Path) -> tuple[bool, str, str]:
        return file.parent.name != EMBEDDED, file.parent.name, file.stem

    files = sorted(folder.glob("*/*.json"), key=place)
    return [replace(run, name=f"{run.folder.parent.name}/{run.folder.stem}") for run in map(report.kept, files) if run]


def page(folder: Path) -> dict[str, str | bytes]:
    """The content of each file of the page, by its name."""
    runs = load(folder)
    pictures: dict[str, bytes] = {}
    parts = []
    for pair in dict.fromkeys(run.name.partition("/")[0] for run in runs):
        mine = [run for run in runs if run.name.startswith(f"{pair}/")]
        made: dict[str, bytes] = {}
        for kind, some in report.by_kind(mine).items():
            names = [
                name for name, key in PLOTS.items() if any(of.get(key) for run in some for of in run.modes.values())
            ]
            drawn = plots.of(some, names)
            made |= {f"{pair}{results.in_names(kind)}-{name}.png": png for name, png in drawn.items()}
        shown = "\n".join(f"![{name} of every mode]({name})\n" for name in made)
        about = folder / pair / ABOUT
        known = about.read_text(encoding="utf-8") + "\n" if about.exists() else ""
        parts.append(f"## {pair}\n\n{known}{shown}\n" + "\n".join(map(section, mine)))
        pictures |= made
    for name, sweep in sweeps.SWEEPS.items():
        if runs := load_sweep(folder, name):
            picture = sweep.picture(runs)
            drawn = {f"{OF_SWEEPS}-{name}.png": picture} if picture else {}
            parts.append(sweep_section(sweep, runs, "".join(f"![{name}]({file})\n\n" for file in drawn)))
            pictures |= drawn
    return {"README.md": "\n".join([HEAD, *parts]), **pictures}


def section(run: Run) -> str:
    labels, rows = ("mode",), []
    for what, key in (("", None), (", without the repeated prompt", "without_repeats")):
        for mode, figures in run.modes.items():
            if some := figures.get(key) if key else figures:
                rows.append(((f"{mode}{what}",), some))
    columns = [name for name in COLUMNS if any(figures.get(name) is not None for _, figures in rows)]
    table = tables.markdown(*tables.cells(labels, columns, rows))
    label = "".join(KINDS[word] for word in run.kind)
    if run.rest:
        label += f"**Not finished**: {run.rest}.\n\n"
    if skipped := run.facts.get("skipped_too_long"):
        label += f"Left out, as they were too long: {skipped} problem{'s' * (skipped > 1)}.\n\n"
    return f"### {text_of(run)}\n\n{label}{machine(run)}, {how_made(run)}\n\n{table}\n{by_category(run)}"


def how_made(*runs: Run) -> str:
    """Of which code, and by which commands."""
    commits = list(dict.fromkeys(one[:10] for run in runs for one in run.commits))
    commands = "\n".join(run.command for run in runs)
    return f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}:\n\n```\n{commands}\n```"


def load_sweep(folder: Path, name: str) -> list[Run]:
    """The runs of one that is kept, in the order of what was varied."""
    runs = [run for run in map(report.kept, sorted((folder / OF_SWEEPS / name).glob("*.json"))) if run]
    return sorted(runs, key=lambda run: [run.config.get(key) or 0 for key in sweeps.SWEEPS[name].option])


def sweep_section(sweep: sweeps.Sweep, runs: Sequence[Run], drawn: str) -> str:
    """What is drawn of it, and a row for each value of what was varied."""
    first, *_ = runs
    curves = {label.name: dict(points) for label, points in sweep.curves(runs).items()}
    cell = tokens_and_ms if sweep.of_texts else speedup
    rows = [
        [f"{value:g}", *(cell(points.get(value, {})) for points in curves.values())]
        for value in sorted({value for points in curves.values() for value in points})
    ]
    equal = [
        of["identical_to_ar"]
        for run in runs
        for mode, of in run.modes.items()
        if mode not in BASELINES and of.get("identical_to_ar") is not None
    ]
    what = "Tokens a second of all texts, and milliseconds a token of each" if sweep.of_texts else "Times `ar`"
    same = f"; at least {math.floor(100 * min(equal))}% of each mode's texts are `ar`'s" if equal else ""
    machines = " and ".join(dict.fromkeys(f"{sweeps.short_name(sweeps.models(run))}, {machine(run)}" for run in runs))
    table = tables.markdown([sweep.varied, *curves], rows)
    title = f"## {sweep.title}: {text_of(first, sweep.option)}"
    return f"{title}\n\n{drawn}{machines}, {how_made(*runs)}\n\n{table}\n\n{what}{same}.\n"


def tokens_and_ms(figures: tables.Figures) -> str:
    rate, each = figures.get("tokens_per_second"), figures.get("ms_per_token_of_each")
    return f"{rate:.1f}, {each:.0f} ms" if rate and each else "-"


def by_category(run: Run) -> str:
    """How many times as fast as `ar` each mode was, category by category, with the interval where there is one."""
    told = {mode: figures.get("by_category") or {} for mode, figures in run.modes.items() if mode != "ar"}
    names = list(dict.fromkeys(name for some in told.values() for name in some))
    if not names:
        return ""
    rows = []
    for name in names:
        texts = next(some[name]["sequences"] for some in told.values() if name in some)
        rows.append([f"{name}, {count(texts)}", *(speedup(some.get(name, {})) for some in told.values())])
    return f"\nBy category, times `ar`:\n\n{tables.markdown(['category', *told], rows)}\n"


def speedup(figures: tables.Figures) -> str:
    value, interval = figures.get("speedup_vs_ar"), figures.get("speedup_interval_95")
    around = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    return f"{value:.2f}{around}" if value else "-"


def text_of(run: Run, varied: Sequence[str] = ()) -> str:
    """Which text, how long, and what was asked for beside that: HumanEval (chat), 164 texts of up to 512 tokens,
    temperature 1, 8 texts side by side. `varied`: options that are not told, as each run of a sweep has another."""
    config = {key: value for key, value in run.config.items() if key not in varied}
    format = f" ({config['prompt_format']})" if config.get("prompt_format") else ""
    texts = next(iter(run.modes.values()))["sequences"]
    title = TITLES.get(str(config.get("suite")), str(config.get("suite")))
    so_far = " so far" if run.rest else ""
    long = f"{count(texts)}{so_far} of up to {config.get('max_new_tokens')} tokens"
    temperature = config.get("temperature") or 0
    warm = [] if "temperature" in varied else [f"temperature {temperature:g}" if temperature else "greedy"]
    return ", ".join([f"{title}{format}", long, *warm, *beside(config)])


def count(texts: int) -> str:
    return f"{texts} text{'s' * (texts != 1)}"


def beside(config: Mapping[str, Any]) -> Iterator[str]:
    """What was asked for that evaluations do not do by default, each in a few words."""
    for key, plain in (report.PLAIN | {"repeats": 1}).items():
        value = config.get(key)
        if key != "temperature" and value not in (None, plain):
            yield SAID[key].format(value) if key in SAID else f"{key.replace('_', '-')} {value:g}"


def machine(run: Run) -> str:
    cores = cores_of(run.environment)
    on = f"{cores} core{'s' * (cores > 1)} of " if run.environment.get("devices", {}).get("target") == ["cpu"] else ""
    return f"{on}{' and '.join(run.processors)}"


def cores_of(environment: Mapping[str, Any]) -> int:
    """How many cores the run had: both roles may have the same ones, unless each has a host of its own."""
    cpus: dict[str, Sequence[int]] = environment.get("cpus", {})
    if not cpus or environment.get("hosts", 1) > 1:
        return sum(environment.get("threads", {}).values())
    return len(set().union(*cpus.values()))


def in_lines(runs: Sequence[Run]) -> str:
    """The README's table, of plain runs. A line says which text, how long, which machine, and how many times as fast as
    `ar` each mode was."""
    rows = []
    for run in (run for run in runs if not run.kind):
        told = (speedup(run.modes.get(mode, {})) for mode in IN_A_LINE)
        rows.append([f"{text_of(run)}; {run.name.partition('/')[0]}; {machine(run)}", *told])
    return tables.markdown(["text; models; machine", *IN_A_LINE], rows)


def in_readme(text: str, runs: Sequence[Run]) -> str:
    """The README with its figures made anew."""
    if BEGIN not in text:
        return text
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{in_lines(runs)}\n{END}{rest.split(END, 1)[1]}"
