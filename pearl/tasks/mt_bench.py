"""MT-bench: 80 questions of eight kinds, each with a second turn that builds on the first (Zheng et al. 2023).

What an answer is worth says a judge, afterwards and from the files: `pearl.evaluation.judging`.
"""

from pearl.tasks import fastchat
from pearl.tasks.benchmark import Benchmark

DATA = fastchat.data(
    "MT-bench", "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge/data/mt_bench/question.jsonl"
)
BENCHMARK = Benchmark(
    name="mt_bench",
    title="MT-bench",
    description="MT-bench (Zheng et al. 2023): speed of every mode, by kind of question; answers for FastChat's judge.",
    max_new_tokens=1024,
    load=DATA.load,
    identify=lambda question: question.task_id,
    prompt=fastchat.prompt,
    category=lambda question: question.category,
    turns=lambda question: len(question.turns),
    stop=fastchat.STOP,
    export=fastchat.answers,
)
