"""MGSM: problems of GSM8K in eleven languages (Shi et al. 2022), without examples, judged language by language.

The default file is the one that PEARL was measured on: ten problems a language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from pearl.tasks import prompts
from pearl.tasks.benchmark import Benchmark
from pearl.tasks.data import DataSet, Record, texts
from pearl.tasks.numbers import CONTINENTAL, ENGLISH, Style, final_number
from pearl.tasks.prompts import ChatTokenizer, Format
from pearl.tasks.scoring import exact_match

INSTRUCTION = """\
{question}

Solve this step by step in the language of the question, and end with "####" and the number."""

# What stands before the question and the answer (Shi et al. 2022, table 5). The file's spelling of Telugu is kept.
WORDS = {
    "bengali": ("প্রশ্ন:", "ধাপে ধাপে উত্তর:"),
    "german": ("Frage:", "Schritt-für-Schritt-Antwort:"),
    "english": ("Question:", "Step-by-Step Answer:"),
    "spanish": ("Pregunta:", "Respuesta paso a paso:"),
    "french": ("Question :", "Réponse étape par étape :"),
    "japanese": ("問題：", "ステップごとの答え："),
    "russian": ("Задача:", "Пошаговое решение:"),
    "swahili": ("Swali:", "Jibu la Hatua kwa Hatua:"),
    "tegulu": ("ప్రశ్న:", "దశలవారీగా సమాధానం:"),
    "thai": ("โจทย์:", "คำตอบทีละขั้นตอน:"),
    "chinese": ("问题：", "逐步解答："),
}
_CONTINENTAL = ("german", "spanish", "french", "russian")


@dataclass(frozen=True)
class Problem:
    task_id: str
    question: str
    answer: Decimal
    category: str  # the language

    @property
    def style(self) -> Style:
        return CONTINENTAL if self.category in _CONTINENTAL else ENGLISH


def _problem(record: Record, _: int) -> Problem:
    question, language = texts(record, "question", "category")
    answer = final_number(str(record["answer"]))
    if language not in WORDS or answer is None:
        raise ValueError("no such language, or no number")
    return Problem(f"MGSM/{record['question_id']}", question.strip(), answer, language)


DATA = DataSet(
    title="MGSM",
    needs=f"an object with question_id, question, answer and category, one of {', '.join(WORDS)}",
    parse=_problem,
    hub=("json",),
    options={
        "data_files": "https://raw.githubusercontent.com/smart-lty/ParallelSpeculativeDecoding/main/data/mgsm.jsonl",
        "split": "train",
    },
    url="https://raw.githubusercontent.com/smart-lty/ParallelSpeculativeDecoding/main/data/mgsm.jsonl",
)


def prompt(problem: Problem, _: Sequence[str], format: Format, tokenizer: ChatTokenizer) -> str:
    prompts.check(format)
    if format == "chat":
        return prompts.chat([INSTRUCTION.format(question=problem.question)], tokenizer)
    asks, answers = WORDS[problem.category]
    return f"{asks} {problem.question}\n{answers}"


BENCHMARK = Benchmark(
    name="mgsm",
    title="MGSM",
    description="MGSM (Shi et al. 2022): speed of every mode, and exact match by language.",
    max_new_tokens=320,
    load=DATA.load,
    identify=lambda problem: problem.task_id,
    prompt=prompt,
    category=lambda problem: problem.category,
    stop=tuple(sorted({f"\n{asks}" for asks, _ in WORDS.values()})),
    score=exact_match.score,
)
