"""Drafters with random weights of every kind, in engines: is every text the target's own?

    python tests/tools/kinds_in_engines.py                          tiny Llama, Qwen2 and Qwen3 targets
    python tests/tools/kinds_in_engines.py --target smollm2-135m    that target
    python tests/tools/kinds_in_engines.py --kinds pard dspark --processes 2

Each engine writes greedy and seeded texts, alone and several side by side, in every mode that it has; also seeded ones
of a handful of tokens, in which even random guesses often come true, and rejection samples, which are only to be
whole. Exit code 1 if a text differs from the target's alone, or a drafter has failed or was never asked.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout runs without being installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import every_kind
import tiny
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from pearl.checkpoints.checkpoint import Checkpoint
from pearl.config.engine_config import EngineConfig
from pearl.core.params import SamplingParams
from pearl.engine import Engine

SIZES = tiny.SIZES | {"vocab_size": 288, "num_hidden_layers": 4, "max_position_embeddings": 512, "eos_token_id": 0}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
}
PROMPTS = ("def f(x):", "once", "the in the")


@dataclass
class Found:
    """Of one engine."""

    texts: int = 0
    identical: int = 0
    whole: int = 0  # of rejection samples, that are as long as asked for
    rejection: int = 0
    right: int = 0  # guesses
    forwards: int = 0
    failed: int = 0  # texts whose drafter failed

    @property
    def good(self) -> bool:
        whole = self.identical == self.texts and self.whole == self.rejection
        return whole and self.forwards > 0 and not self.failed


def parameters(tokens: int) -> dict[str, SamplingParams]:
    greedy = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    seeded = replace(greedy, temperature=0.9, seed=7)
    few = replace(seeded, logit_bias=dict.fromkeys((40, 41, 43, 44, 46), 60.0))
    return {"greedy": greedy, "seeded": seeded, "few": few, "rejection": replace(few, method="rejection")}


def look(target: str, draft: str, processes: int, tokens: int = 12) -> Found:
    """What an engine of a target and a drafter writes."""
    found = Found()
    alone = {"target_cores": str(min(os.sched_getaffinity(0)))} if processes == 1 else {}
    settings = {"dtype": "float32", "max_length": 256, "max_sequences": len(PROMPTS), **alone}
    modes = ("sd",) if processes == 1 else ("sd", "pearl", "tree")
    with Engine.from_pretrained(target, draft, mode=modes[-1], processes=processes, **settings) as engine:
        for name, params in parameters(tokens).items():
            own = [one.tokens for one in engine.generate(list(PROMPTS), params, mode="ar")]
            for mode in modes:
                written = [*engine.generate(list(PROMPTS), params, mode=mode)]
                written.append(engine.generate(PROMPTS[0], params, mode=mode))
                expected = [*own, own[0]]
                if name == "rejection":
                    found.rejection += len(written)
                    found.whole += sum(len(one.tokens) == tokens for one in written)
                else:
                    found.texts += len(written)
                    found.identical += sum(a.tokens == b for a, b in zip(written, expected, strict=True))
                found.failed += sum(not one.stats.drafter or one.stats.drafter.failed for one in written)
                found.right += sum(p.accepted for one in written for p in one.stats.passes)
                found.forwards += sum(one.stats.drafter.forwards for one in written if one.stats.drafter)
    return found


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--target", help="default: tiny ones, made here")
    made.add_argument("--kinds", nargs="+", default=every_kind.ALL, choices=every_kind.ALL)
    made.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    made.add_argument("--tokens", type=int, default=12)
    asked = made.parse_args()
    bad = Counter[bool]()
    with tempfile.TemporaryDirectory() as folder:
        for name in [asked.target] if asked.target else FAMILIES:
            target = asked.target or save_target(name, Path(folder) / name)
            config, tokenizer = Checkpoint.of(target).found("target").describe("target", EngineConfig(target=target))
            for kind in asked.kinds:
                draft = every_kind.save(kind, Path(folder) / f"{Path(name).name}-{kind}", config, tokenizer)
                for processes in asked.processes:
                    found = look(target, draft, processes, asked.tokens)
                    bad[not found.good] += 1
                    verdict = "as the target alone" if found.good else "WRONG"
                    print(f"{name:12} {kind:8} {processes} process(es): {verdict}, {found}", flush=True)
    return int(bad[True] > 0)


def save_target(family: str, folder: Path) -> str:
    tiny.random_model(FAMILIES[family]()).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    raise SystemExit(main())
