"""Spec-Bench: 480 prompts of six subtasks, 80 each, made to compare speculative decoding (Xia et al. 2024).

One of the subtasks is MT-bench's questions, of eight kinds and in two turns. Its own tools read our answers
(`model_answer/`): speed.py takes the lines of a mode and those of the baseline.
"""

from dataclasses import replace

from pearl.tasks import fastchat, mt_bench

DATA = fastchat.data(
    "Spec-Bench", "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/spec_bench/question.jsonl"
)
_OTHERS = ("translation", "summarization", "qa", "math_reasoning", "rag")


def subtask(question: fastchat.Question) -> str:
    """As its own tools call it."""
    return question.category if question.category in _OTHERS else mt_bench.BENCHMARK.name


BENCHMARK = replace(
    mt_bench.BENCHMARK,
    name="spec_bench",
    title="Spec-Bench",
    description="Spec-Bench (Xia et al. 2024): speed of every mode, by kind of task, in Spec-Bench's format too.",
    load=DATA.load,
    category=subtask,
    kind=mt_bench.BENCHMARK.category,
)
