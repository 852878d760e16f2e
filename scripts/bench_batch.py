"""Several texts side by side: tokens per second by batch size and mode, all of them interleaved in one run.

    python scripts/bench_batch.py --gsm8k test.jsonl --sizes 1 4 8 32 --mode ar pearl tree --max-new-tokens 128

The prompts are HumanEval's and GSM8K's in turn, so of mixed lengths, and the same for every mode. A round writes for
every size as many texts as it holds (four at least) in every mode; after it the table of all rounds so far is written.
Reading prompts is part of the time. Every text is compared with the one that `ar` wrote alone or beside others.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pearl.config import cli, outputs
from pearl.tasks import gsm8k, humaneval

FEWEST = 4  # texts of a cell, so that one at a time is no matter of one text


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    unused = "limit", "indices", "batch_size", "num_samples", "max_sequences"  # --sizes says how many
    parser = cli.parser("scripts/bench_batch.py", about=__doc__.splitlines()[0], but=unused, max_new_tokens=128)
    parser.set_defaults(mode=["ar", "pearl", "tree"], max_length=1024)
    parser.add_argument("--gsm8k", metavar="FILE", help="GSM8K in its original format; default: fetched from the hub")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--rounds", type=int, default=2)
    found = cli.parse(parser, argv)
    config, _ = cli.engine_config(found)
    config = replace(config, max_sequences=max(found.sizes))
    schedules = cli.schedules(found)
    params = cli.sampling(found)

    from pearl.checkpoints.preflight import preflight
    from pearl.engine import Engine
    from pearl.evaluation.measures.environment import environment
    from pearl.machine.display import show_table
    from pearl.parallel.launch import launch

    checked = preflight(config)
    benchmarks = (humaneval.BENCHMARK, gsm8k.BENCHMARK)
    asked = [
        benchmark.prompt(problem, (), "chat", checked.tokenizer)
        for pair in zip(benchmarks[0].load(None), benchmarks[1].load(found.gsm8k), strict=False)
        for benchmark, problem in zip(benchmarks, pair, strict=True)
    ]
    prompts = [tuple(checked.tokenizer(text, add_special_tokens=False).input_ids) for text in asked]

    folder = Path(found.output or "results/bench-batch")
    speeds: dict[tuple[int, str], list[float]] = defaultdict(list)
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    same = told = 0
    with Engine(launch(config, cli.hardest(schedules.values()), found.processes, checked)) as engine:
        engine.generate([list(p) for p in prompts[-2:]], replace(params, max_new_tokens=16))  # warm
        for turn in range(found.rounds):
            for size in found.sizes:
                count = max(size, FEWEST)
                first = turn * count % max(1, len(prompts) - count + 1)
                texts = prompts[first : first + count]
                for mode in found.mode:
                    began = time.perf_counter()
                    done = engine.generate([list(p) for p in texts], params, mode=schedules[mode], batch_size=size)
                    took = time.perf_counter() - began
                    tokens = sum(len(one.tokens) for one in done)
                    speeds[size, mode].append(tokens / took)
                    for prompt, one in zip(texts, done, strict=True):
                        told += 1
                        same += known.setdefault(prompt, tuple(one.tokens)) == tuple(one.tokens)
                    print(f"round {turn} {size} {mode}: {tokens} tokens in {took:.1f} s", file=sys.stderr, flush=True)
            print(f"tokens/s, {turn + 1} rounds; {same}/{told} texts the same")
            medians = ([statistics.median(speeds[size, mode]) for mode in found.mode] for size in found.sizes)
            rows = [[str(size), *map("{:.1f}".format, some)] for size, some in zip(found.sizes, medians, strict=True)]
            show_table(["texts", *found.mode], rows)
            said = {
                "config": vars(found) | {"resolved": vars(config)},
                "environment": environment(engine),
                "same": [same, told],
                "tokens_per_second": [{"size": s, "mode": m, "rounds": v} for (s, m), v in speeds.items()],
            }
            outputs.write_json(folder / "bench_batch.json", said)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
