"""Drafters that can't help: `pearl` and `tree` beside `ar` where drafting does not pay.

    python scripts/never_slower.py --limit 3 --max-new-tokens 128 [--target DIR --draft DIR]

Three cases, one after the other, the modes of each interleaved problem by problem:

    random      the draft model with random weights: every guess is wrong
    slow        the roles exchanged: the larger model drafts for the smaller
    unguessed   temperature 2: text that no drafter can guess

The controller finds out by itself that it should not draft. Sources beside the target may still help it. A draft model
that is a part of its target, as the embedded one, can't be one itself, so its case `slow` is left out.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pearl.config import cli
from pearl.config.engine_config import EngineConfig, model_path
from pearl.tasks import humaneval


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("scripts/never_slower.py", about=__doc__.splitlines()[0], max_new_tokens=128)
    parser.set_defaults(mode=["ar", "pearl", "tree"], seed=0)
    found = cli.parse(parser, argv)
    config, _ = cli.engine_config(found)
    schedules = cli.schedules(found)
    params = replace(cli.sampling(found).with_defaults(), ignore_eos=True)
    problems = humaneval.load()
    problems = [problems[i] for i in cli.choose(len(problems), found.limit or 3, found.indices)]

    from pearl.checkpoints import shared_embeddings
    from pearl.checkpoints.preflight import preflight
    from pearl.engine import Engine
    from pearl.evaluation import harness, lines, results, tables
    from pearl.parallel.launch import launch

    folder = Path(found.output or "results/never-slower")
    figures = {}
    whole = shared_embeddings.read(model_path(config.draft)) is None
    for name in ("random", "slow", "unguessed") if whole else ("random", "unguessed"):
        results.check_output(folder / name)
    with tempfile.TemporaryDirectory() as scratch:
        cases = {
            "random": (replace(config, draft=_random(config, Path(scratch))), params),
            **({"slow": (replace(config, target=config.draft, draft=config.target), params)} if whole else {}),
            "unguessed": (config, replace(params, temperature=2.0)),
        }
        for name, (case, sampling) in cases.items():
            checked = preflight(case)
            tasks = []
            for problem in problems:
                text = humaneval.prompt_text(problem, "completion", checked.tokenizer)
                prompt = tuple(checked.tokenizer(text).input_ids)
                tasks.append(harness.Task(problem.task_id, lambda _, prompt=prompt: prompt))
            with Engine(launch(case, cli.hardest(schedules.values()), found.processes, checked)) as engine:
                plan = harness.Plan(tuple(tasks), harness.decoders(engine, schedules), sampling)
                asked = {"case": name, "resolved": vars(case)}
                results.begin(folder / name, asked)
                harness.run(plan, folder / name)
                summary = harness.summary(engine, plan, asked, results.read(folder / name)[0])
            lines.write_json(folder / name / results.SUMMARY, summary)
            figures[name] = summary["modes"]
            tables.show(f"{name}: {case.target} <- {case.draft}", summary["modes"])
    worst = min(f["speedup_vs_ar"] for modes in figures.values() for f in modes.values())
    print(f"the worst is {worst:.3f} x ar; written to {folder}")
    return 0


def _random(config: EngineConfig, folder: Path) -> str:
    """The draft model's architecture and the target's tokenizer with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pearl.checkpoints.preflight import preflight

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path(config.draft)))
    model.to(torch.bfloat16).save_pretrained(folder / "random")
    preflight(config).tokenizer.save_pretrained(folder / "random")
    return str(folder / "random")


if __name__ == "__main__":
    sys.exit(main())
