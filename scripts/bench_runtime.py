"""What a pass costs beside the model: choosing nodes, laying out branches, masks, picking, walking, messages, Python.

    bash scripts/bench_runtime.sh [--passes 300] [--vocabulary 151936] [--pass-ms 100] [--json FILE]

Two processes on a core each run the real loops over a process group, with a model that sleeps for as long as a
forward takes and then says what a rule holds. What a pass took less what the model slept is the runtime's own work, on
either side.
Real forwards also leave the processor's caches cold, which these do not.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pearl.config import cli
from pearl.evaluation.tables import Column, markdown
from pearl.machine import cores

LENGTH = 4096
MODES = ["ar", "pearl", "tree"]
RIGHT = 0.85  # of the drafter's first guesses


class Sleeper:
    """Stands where a transformers model does: sleeps, then says what follows each row by a rule."""

    def __init__(self, vocabulary: int, seconds: float, right: float):
        import torch

        from pearl.models.kv_cache.attention_probe import FOUND, ModelAttention
        from pearl.models.kv_cache.transformers_interface import CACHE_ATTENTION

        self.config = SimpleNamespace(_attn_implementation=CACHE_ATTENTION)
        setattr(self, FOUND, ModelAttention(owns_keys=True))  # it has no layers that could be asked
        self.device, self.dtype = torch.device("cpu"), torch.bfloat16
        self.slept = self.calls = 0.0
        self._vocabulary, self._seconds, self._right = vocabulary, seconds, right
        self._logits = torch.zeros(64, vocabulary, dtype=torch.bfloat16)

    def forward(self, input_ids, position_ids, logits_to_keep, attention_cache, **_):
        import torch

        attention_cache.attended = True

        began = time.perf_counter()
        keep = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else torch.arange(-logits_to_keep, 0)
        tokens, positions = input_ids[0][keep], position_ids[0][keep]
        after = (tokens * 31 + positions * 7) % 997
        unsure = (after * 37 % 100).float() / 100 >= self._right
        logits = self._logits[: len(after)].zero_()
        rows = torch.arange(len(after))
        logits[rows, after] = torch.where(unsure, 8.0, 14.0).to(logits.dtype)
        logits[rows[unsure], (after + 1)[unsure]] = 9.0
        time.sleep(max(0.0, self._seconds - (time.perf_counter() - began)))
        self.slept += time.perf_counter() - began
        self.calls += 1
        return SimpleNamespace(logits=logits[None])

    __call__ = forward


def draft(port: int, cpu: int, vocabulary: int, seconds: float, out: multiprocessing.Queue) -> None:
    """The drafter's process. Afterwards tells its own milliseconds a forward."""
    cores.pin([cpu])
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from pearl.drafters.tree import TreeSource
    from pearl.models.draft_model import DraftModel
    from pearl.roles.drafter import Drafter
    from pearl.wire.process_channel import ProcessChannel

    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
    store.set("there", "")
    link = ProcessChannel(store, rank=1, host="127.0.0.1")
    sleeper = Sleeper(vocabulary, seconds, RIGHT)
    source = TreeSource(DraftModel(sleeper, vocabulary, LENGTH), costs=[seconds * (1 + 0.06 * n) for n in range(8)])
    busy = 0.0
    drafter = Drafter(source, link)
    ask = drafter._guarded.ask

    def timed(sequences, draft):
        nonlocal busy
        began = time.perf_counter()
        done = ask(sequences, draft)
        busy += time.perf_counter() - began
        return done

    drafter._guarded.ask = timed
    drafter.run()
    out.put(1e3 * (busy - sleeper.slept) / max(1, sleeper.calls))


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("scripts/bench_runtime.py", about=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=300)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--pass-ms", type=float, default=50.0, help="what a target pass sleeps; a draft a third of it")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help="default: all of them")
    parser.add_argument("--json", metavar="FILE")
    found = parser.parse_args(argv)
    cpus = cores.available()
    cores.pin(cpus[:1])
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from pearl.core.params import SamplingParams
    from pearl.core.schedule import Schedule
    from pearl.core.stopping import Stopper
    from pearl.models.verifier import VerifierModel
    from pearl.roles.target import Target
    from pearl.wire.process_channel import ProcessChannel

    figures = {}
    for temperature in found.temperature:
        for mode in found.mode:
            store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
            spawn = multiprocessing.get_context("spawn")
            out = spawn.Queue()
            order = (store.port, cpus[-1], found.vocabulary, found.pass_ms / 3e3, out)
            child = spawn.Process(target=draft, args=order, daemon=True)
            child.start()
            store.wait(["there"], timedelta(seconds=300))
            sleeper = Sleeper(found.vocabulary, found.pass_ms / 1e3, 1.0)
            target = Target(
                VerifierModel(sleeper, found.vocabulary, LENGTH), ProcessChannel(store, rank=0, host="127.0.0.1")
            )
            params = SamplingParams(max_new_tokens=LENGTH - 200, temperature=temperature, seed=1)
            stopper = Stopper(params, (), str)
            stream = target.decode(list(range(100)), Schedule.of(mode), params, stopper)
            own = []
            before = sleeper.slept
            for _ in zip(range(found.passes), stream, strict=False):
                one = target.passes[-1]
                own.append(1e3 * (one.seconds - one.waited_s - (sleeper.slept - before)))
                before = sleeper.slept
            stream.close()
            target.channel.close()
            forward = out.get(timeout=60)
            child.join()
            sides = sum(one.sides for one in target.passes) / len(target.passes)
            rows = sum(one.offered + 1 for one in target.passes) / len(target.passes)
            figures[f"{mode} T={temperature:g}"] = {
                "pass_ms_p50": statistics.median(own[2:]),
                "pass_ms_p95": sorted(own[2:])[int(0.95 * len(own[2:]))],
                "draft_ms_mean": forward if mode != "ar" else None,
                "rows": rows,
                "side_rows": sides,
            }
    print(f"vocabulary {found.vocabulary}, a pass of {found.pass_ms:g} ms and a draft of a third; ms beside the models")
    head = ["mode", "a pass, median", "95 %", "a draft, mean", "rows a pass", "beside the chain"]
    cell = Column("", "{:.2f}", "").cell
    print(markdown(head, [[name, *map(cell, one.values())] for name, one in figures.items()]))
    if found.json:
        Path(found.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
