"""The page of the results that are kept, and the lines of the README: made of the committed summaries alone.

Every line says which text, how long, and which machine. Pictures are PNG, with intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pearl.config.engine_config import EMBEDDED
from pearl.config.inputs import parse_json, read_text
from pearl.evaluation import plots, tables
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
kept and ends with it. Bars have 95 % intervals. [Figures](../reference/figures.md) says what each column is. Where
there is a folder `raw`, it has the lines of one run, of which its figures can be
[computed again](../reference/figures.md#computed-again-from-the-lines). `bench_batch.json` is of several texts side by
side, by `scripts/bench_batch.py`. The [log](../log.md) has what else was measured, and what did not work.
"""
IN_A_LINE = ("sd", "pearl", "tree")
BEGIN, END = "<!-- figures of docs/results -->", "<!-- end of figures -->"


def load(folder: Path) -> list[Run]:
    """The runs whose summaries are kept there, a folder a pair."""
    runs = []
    files = folder.glob("*/*.json")
    for file in sorted(files, key=lambda file: (file.parent.name != EMBEDDED, file.parent.name, file.stem)):
        facts = parse_json(read_text(file, "The summary"), str(file))
        if "environment" in facts:
            name = f"{file.parent.name}/{file.stem}"
            runs.append(Run(file, name, facts["config"], facts["environment"], facts["modes"]))
    return runs


def page(folder: Path) -> dict[str, str | bytes]:
    """The content of each file of the page, by its name."""
    runs = load(folder)
    pictures: dict[str, bytes] = {}
    parts = []
    for pair in dict.fromkeys(run.name.partition("/")[0] for run in runs):
        mine = [run for run in runs if run.name.startswith(f"{pair}/")]
        pictures |= {f"{pair}-{name}.png": png for name, png in plots.of(mine, ("speedup", "length")).items()}
        shown = "\n".join(f"![{name} of every mode]({name})\n" for name in pictures if name.startswith(f"{pair}-"))
        parts.append(f"## {pair}\n\n{shown}\n" + "\n".join(map(section, mine)))
    return {"README.md": "\n".join([HEAD, *parts]), **pictures}


def section(run: Run) -> str:
    labels, rows = ("mode",), []
    for what, key in (("", None), (", without the repeated prompt", "without_repeats")):
        for mode, figures in run.modes.items():
            if some := figures.get(key) if key else figures:
                rows.append(((f"{mode}{what}",), some))
    columns = [name for name in COLUMNS if any(figures.get(name) is not None for _, figures in rows)]
    table = tables.markdown(*tables.cells(labels, columns, rows))
    label = "**Synthetic**: the drafter was told how often to be right. " if run.synthetic else ""
    commit = str(run.environment.get("commit"))[:10]
    return f"### {text_of(run)}\n\n{label}{machine(run)}, commit {commit}:\n\n```\n{run.command}\n```\n\n{table}\n"


def text_of(run: Run) -> str:
    """Which text, and how long: HumanEval (chat), 164 texts of up to 512 tokens, temperature 1"""
    config = run.config
    format = f" ({config['prompt_format']})" if config.get("prompt_format") else ""
    texts = next(iter(run.modes.values()))["sequences"]
    temperature = config.get("temperature") or 0
    warm = f", temperature {temperature:g}" if temperature else ", greedy"
    title = TITLES.get(str(config.get("suite")), str(config.get("suite")))
    return f"{title}{format}, {texts} texts of up to {config.get('max_new_tokens')} tokens{warm}"


def machine(run: Run) -> str:
    threads: dict[str, Any] = run.environment.get("threads", {})
    cores = sum(threads.values())
    on = f"{cores} core{'s' * (cores > 1)} of " if run.environment.get("devices", {}).get("target") == ["cpu"] else ""
    return f"{on}{run.environment.get('processor')}"


def in_lines(runs: Sequence[Run]) -> str:
    """The README's table, of greedy runs. A line says which text, how long, which machine, and how many times as fast
    as `ar` each mode was."""
    rows = []
    for run in runs:
        told = []
        for mode in IN_A_LINE:
            figures = run.modes.get(mode, {})
            value, interval = figures.get("speedup_vs_ar"), figures.get("speedup_interval_95")
            around = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
            told.append(f"{value:.2f}{around}" if value else "-")
        if not run.synthetic and not run.config.get("temperature"):
            rows.append([f"{text_of(run)}; {run.name.partition('/')[0]}; {machine(run)}", *told])
    return tables.markdown(["text; models; machine", *IN_A_LINE], rows)


def in_readme(text: str, runs: Sequence[Run]) -> str:
    """The README with its figures made anew."""
    if BEGIN not in text:
        return text
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{in_lines(runs)}\n{END}{rest.split(END, 1)[1]}"
