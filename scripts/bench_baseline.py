"""Is our baseline fair? `ar` against transformers' own `generate`, on the same core, interleaved problem by problem.

    python scripts/bench_baseline.py --target DIR --limit 5 --max-new-tokens 96

Greedy, end of sequence ignored on both sides, so that both write the same number of tokens. Prints tokens a second of
each, their ratio with a bootstrap interval, and how many texts are the same: they may differ where two logits are
nearly equal, as a forward of one row rounds otherwise than one of several.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pearl.config import cli
from pearl.tasks import humaneval


@cli.guarded
def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(
        "scripts/bench_baseline.py",
        about=__doc__.splitlines()[0],
        take=("pair", "machine", "problems"),
        but=("processes", "num_samples", "batch_size", "output"),
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=cli.at_least_one, default=96, help="tokens of an answer")
    found = cli.parse(parser, argv)
    config, _ = cli.engine_config(found)
    problems = humaneval.load()
    problems = [problems[i] for i in cli.choose(len(problems), found.indices)][: found.limit or 5]

    import torch
    from transformers import AutoModelForCausalLM

    from pearl.checkpoints.checkpoint import Checkpoint
    from pearl.core.params import SamplingParams
    from pearl.core.schedule import Schedule
    from pearl.engine import Engine
    from pearl.parallel.launch import launch

    # ar-all only to share the cores out as two processes would: `ar` then has the target's
    with Engine(launch(config, Schedule.of("ar-all"))) as engine:
        kwargs = {**Checkpoint.of(config.target).arguments(config), "dtype": getattr(torch, config.dtype)}
        model = (
            AutoModelForCausalLM.from_pretrained(Checkpoint.of(config.target).name, **kwargs)
            .eval()
            .to(engine.model.model.device)
        )
        params = SamplingParams(max_new_tokens=found.max_new_tokens, ignore_eos=True).with_defaults()
        count, rates, same = found.max_new_tokens, [], 0

        def generate(prompt: list[int], tokens: int) -> list[int]:
            ids = torch.tensor([prompt], device=model.device)
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=0,
                )
            return out[0, len(prompt) :].tolist()

        engine.exclusively(partial(generate, engine.encode("def f(x):"), 8))
        engine.generate("def f(x):", SamplingParams(max_new_tokens=8).with_defaults(), mode="ar")
        for problem in problems:
            prompt = engine.encode(problem.prompt.strip())
            began = time.perf_counter()
            theirs = engine.exclusively(partial(generate, prompt, count))
            middle = time.perf_counter()
            ours = engine.generate(prompt, params, mode="ar").tokens
            ended = time.perf_counter()
            same += ours == theirs
            rates.append((count / (ended - middle), count / (middle - began)))
            print(f"{problem.task_id}: ar {rates[-1][0]:.2f} tokens/s, generate {rates[-1][1]:.2f}", flush=True)
    draws = random.Random(0)
    ratios = sorted(statistics.median(a / b for a, b in draws.choices(rates, k=len(rates))) for _ in range(1000))
    ratio = statistics.median(a / b for a, b in rates)
    print(
        f"ar / generate: median {ratio:.3f}, 95 % interval {ratios[25]:.3f} to {ratios[975]:.3f}, {len(rates)} problems"
    )
    print(f"same text: {same} of {len(rates)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
