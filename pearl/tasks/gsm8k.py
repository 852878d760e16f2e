"""GSM8K: 1,319 grade-school problems, answered in words; right is who comes to the right number (Cobbe et al. 2021).

`completion` is the 8-shot chain of thought of Wei et al. 2022 (table 20), whose eight problems are from no data set;
`chat` asks one question without examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from pearl.tasks import prompts
from pearl.tasks.benchmark import Benchmark
from pearl.tasks.data import DataSet, Record, texts
from pearl.tasks.numbers import ENGLISH, Style, final_number
from pearl.tasks.prompts import ChatTokenizer, Format
from pearl.tasks.scoring import exact_match

INSTRUCTION = '{question}\n\nSolve this step by step, and end with "The answer is" and the number.'

EXAMPLES = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, "
        "there will be 21 trees. How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. So there must have "
        "been 21 - 15 = 6. The answer is 6.",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After eating 35,"
        " they had 74 - 35 = 39. The answer is 39.",
    ),
    (
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many lollipops did "
        "Jason give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny 20 - 12 = 8. "
        "The answer is 8.",
    ),
    (
        "Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys does he have "
        "now?",
        "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. 5 + 4 = "
        "9. The answer is 9.",
    ),
    (
        "There were nine computers in the server room. Five more computers were installed each day, from monday to "
        "thursday. How many computers are now in the server room?",
        "There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = 20 "
        "computers were added. 9 + 20 is 29. The answer is 29.",
    ),
    (
        "Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How many golf "
        "balls did he have at the end of wednesday?",
        "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After losing 2 more, "
        "he had 35 - 2 = 33 golf balls. The answer is 33.",
    ),
    (
        "Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 dollars "
        "left. 23 - 15 is 8. The answer is 8.",
    ),
)


@dataclass(frozen=True)
class Problem:
    task_id: str
    question: str
    answer: Decimal
    category: None = None
    style: Style = ENGLISH


def _problem(record: Record, number: int) -> Problem:
    question, solution = texts(record, "question", "answer")
    _, marked, final = solution.rpartition("####")
    answer = final_number(final)
    if not marked or answer is None:
        raise ValueError("no final number")
    return Problem(f"GSM8K/{number}", question.strip(), answer)


DATA = DataSet(
    title="GSM8K",
    needs="an object with the texts question and answer, the latter ending in #### and a number",
    parse=_problem,
    hub=("openai/gsm8k", "main"),
    options={"split": "test"},
    url="https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/test.jsonl",
)


def prompt(problem: Problem, _: Sequence[str], format: Format, tokenizer: ChatTokenizer) -> str:
    prompts.check(format)
    if format == "chat":
        return prompts.chat([INSTRUCTION.format(question=problem.question)], tokenizer)
    shots = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in EXAMPLES)
    return f"{shots}Q: {problem.question}\nA:"


BENCHMARK = Benchmark(
    name="gsm8k",
    title="GSM8K",
    description="GSM8K (Cobbe et al. 2021): speed of every mode, and exact match on the final number.",
    max_new_tokens=320,
    load=DATA.load,
    identify=lambda problem: problem.task_id,
    prompt=prompt,
    stop=("\nQ:",),
    score=exact_match.score,
)
