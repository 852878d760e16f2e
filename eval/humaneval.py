"""HumanEval: decode its 164 problems in several modes at once and score what comes out.

    accelerate launch --num_processes 2 eval/humaneval.py --pair qwen2.5-coder-0.5b-7b --mode ar sd pearl
    python eval/humaneval.py --limit 10

Prints a table; writes samples.jsonl, passes.jsonl and summary.json into --output (see pearl/harness.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl import cli
from pearl.config import one_of
from pearl.tasks import humaneval

FORMATS = ("completion", "chat")


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("HumanEval (Chen et al. 2021): speed of every mode, and pass@k.", max_new_tokens=512)
    parser.add_argument("--format", help=f"{' or '.join(FORMATS)}; default: the pair's, or chat if the model has it")
    parser.add_argument("--data", metavar="FILE", help="problems in HumanEval's format; default: the package's own")
    parser.add_argument("--no-score", action="store_true", help="do not run the programs")
    found = cli.parse(parser, argv)
    config, pair = cli.engine_config(found)
    one_of("format", found.format, (*FORMATS, None))
    schedules = cli.schedules(found)
    schedule = cli.hardest(schedules.values())
    params = cli.sampling(found)
    samples = cli.at_least_one("--num-samples", found.num_samples)
    problems = humaneval.load(found.data)
    problems = [problems[i] for i in cli.choose(len(problems), found.limit, found.indices)]

    from rich.console import Console  # from here on slow imports: everything that can be refused has been

    from pearl import harness
    from pearl.engine import Engine, count_processes
    from pearl.loading import preflight
    from pearl.process import World

    count_processes(schedule, found.processes, World.here())
    checked = preflight(config)
    form = found.format or (pair.prompt if pair else "chat" if checked.tokenizer.chat_template else "completion")
    if form == "completion" and not params.ignore_eos:
        params = replace(params, stop=humaneval.STOP_WORDS)
    tasks = tuple(_task(problem, form, checked.tokenizer) for problem in problems)
    for task in tasks:
        checked.check_prompt(task.prompt, params.max_new_tokens)
    plan = harness.Plan(tasks, schedules, params, samples)
    console = Console(width=None if sys.stdout.isatty() else 140)
    with Engine(config, schedule, found.processes, checked) as engine:  # rank 1 stays in here
        console.print(engine.description, highlight=False)
        folder = Path(found.output or time.strftime("results/humaneval-%Y%m%d-%H%M%S"))
        output = harness.Output(folder)
        runs = harness.run(engine, plan, output, console)
        summary = harness.summary(engine, plan, vars(found) | {"resolved": vars(config), "format": form}, runs)
    if not found.no_score:
        _score(problems, runs, summary["modes"], samples, form)
    output.write("summary.json", summary)
    title = f"HumanEval, {len(problems)} problems, {config.target} <- {config.draft}, {config.dtype}"
    console.print(harness.table(summary["modes"], title))
    console.print(f"written to {folder}", highlight=False)
    return 0


def _task(problem: humaneval.Problem, form: str, tokenizer):
    from pearl.harness import Task

    text = humaneval.prompt_text(problem, form, tokenizer)
    tokens = tokenizer(text, add_special_tokens=form != "chat").input_ids
    return Task(problem.task_id, tuple(tokens), lambda answer: humaneval.completion_of(problem, answer, form))


def _score(problems, runs, figures, samples: int, form: str) -> None:
    """Runs every mode's programs and adds pass@k to its figures."""
    from pearl.tasks.scoring import score

    by_id = {problem.task_id: problem for problem in problems}
    ks = sorted({k for k in (1, 10, 100, samples) if k <= samples})
    for mode, texts in runs.items():
        answers = [(key[0], humaneval.completion_of(by_id[key[0]], text.text, form)) for key, text in texts.items()]
        scores = score(problems, answers, ks)
        figures[mode]["pass_at_k"] = {str(k): value for k, value in scores.pass_at_k.items()}
        figures[mode]["pass_at_1"] = scores.pass_at_k[1]


if __name__ == "__main__":
    sys.exit(main())
