"""Spec-Bench: 480 prompts of 13 kinds, made to compare speculative decoding (Xia et al. 2024).

Eight of the kinds are MT-bench's questions, in two turns. Its own tools read our answers (`model_answer/`): speed.py
takes the lines of a mode and those of the baseline.
"""

from dataclasses import replace

from pearl.tasks import fastchat, mt_bench

DATA = fastchat.data(
    "Spec-Bench", "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"
)
BENCHMARK = replace(
    mt_bench.BENCHMARK,
    name="spec_bench",
    title="Spec-Bench",
    description="Spec-Bench (Xia et al. 2024): speed of every mode, by kind of task, in Spec-Bench's format too.",
    load=DATA.load,
)
