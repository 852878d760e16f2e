"""Writes docs/reference/architectures.md: what works with each architecture that the tests try.

    python scripts/architectures_page.py

The lines are those of tests/support/architectures.py, which tests/models/test_architectures.py tries; each model is
built here as it is there, and asked what its attention is like.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import architectures  # noqa: E402

from pearl.models.kv_cache.attention_probe import ModelAttention, attention_of  # noqa: E402

HEAD = f"""# Architectures

What is tried with tiny random weights, written by `python scripts/architectures_page.py` from the table of the tests
(transformers {transformers.__version__.rsplit(".", 1)[0]}). The tests hold of each that in float32 mode `ar` writes
what transformers' `generate` writes, token for token, on texts beyond every window; that `sd`, `pearl` and `tree`
write the same; and that a batch of three does.

- Trees: rows beside the chain are verified too. "Measured": where the bits allow it on the machine; experts and scores
  that are made by hand often don't.
- Together: texts side by side share forwards. Otherwise each has its own.
- Tensor parallel: transformers has a plan for it. Few of them are tried.
- Not here: [models with states instead of keys](../explanations/hybrids.md), which are refused.

| architecture | config | windows | trees | together | tensor parallel | |
| --- | --- | --- | --- | --- | --- | --- |
"""


def line(one: architectures.Architecture) -> str:
    model = one.model()
    found: ModelAttention = attention_of(model)
    windows = ", ".join("chunked" if window.chunked else "sliding" for window in found.windows)
    together = not found.why_not and found.owns_keys
    trees = "yes" if one.trees else "measured" if together else "no"
    plan = "yes" if getattr(model.config, "base_model_tp_plan", None) else "no"
    note = f"its own attention: {found.why_not}" if found.why_not else "" if found.owns_keys else "latent attention"
    cells = [one.name, one.config_class, windows, trees, "yes" if together else "no", plan, note]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    there = [one for one in architectures.TABLE if hasattr(transformers, one.config_class)]
    page = ROOT / "docs" / "reference" / "architectures.md"
    page.write_text(HEAD + "".join(map(line, there)), encoding="utf-8")


if __name__ == "__main__":
    main()
