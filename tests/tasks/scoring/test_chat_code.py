"""A right function passes wherever a chat answer has it, and a wrong one nowhere."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable

import pytest

from pearl.tasks.humaneval import Problem, completion_of, load, program
from pearl.tasks.scoring import chat_code, reasoning

PROBLEMS = load()
Answer = Callable[[Problem], str]


def whole(p: Problem) -> str:
    return p.prompt + p.canonical_solution


def imports(p: Problem) -> str:
    return "\n".join(["import math", *re.findall(r"(?m)^(?:import|from) .*", whole(p))]) + "\n"


def bare(p: Problem) -> str:
    """Without its imports."""
    return re.sub(r"(?m)^(?:import|from) .*\n", "", whole(p))


def fenced(code: str, opens: str = "```python", closes: str = "```") -> str:
    return f"{opens}\n{code.rstrip()}\n{closes}\n"


def wrong(p: Problem) -> str:
    return fenced(f"def {p.entry_point}(*given):\n    return 'wrong'")


def tabbed(code: str) -> str:
    return re.sub(r"(?m)^(?: {4})+", lambda spaces: "\t" * (len(spaces[0]) // 4), code)


def renamed(p: Problem, before: str) -> str:
    return re.sub(rf"(?m)^def {p.entry_point}\b", before + p.entry_point, whole(p))


def method(p: Problem, first: str = "", before: str = "") -> str:
    methods = re.sub(r"(?m)^def (\w+)\(", rf"{before}def \1({first}", bare(p).strip())
    return f"{imports(p)}\nclass Solution:\n{textwrap.indent(methods, '    ')}\n"


FENCES: dict[str, Answer] = {
    "python": lambda p: f"Sure!\n{fenced(whole(p))}This works.",
    "py": lambda p: fenced(whole(p), "```py"),
    "Python3": lambda p: fenced(whole(p), "```Python3"),
    "attributes": lambda p: fenced(whole(p), '```python title="a.py"'),
    "braces": lambda p: fenced(whole(p), "```{.python}"),
    "tildes": lambda p: fenced(whole(p), "~~~python", "~~~"),
    "no language": lambda p: f"Here:\n\n{fenced(whole(p), '```')}",
    "no end": lambda p: f"```python\n{whole(p)}",
    "no end, but words": lambda p: f"```python\n{whole(p)}\n\nThis works because it's right.",
    "in a longer fence": lambda p: fenced(fenced(whole(p)), "````markdown", "````"),
    "in a fence as long": lambda p: fenced(fenced(whole(p)), "```markdown"),
    "indented": lambda p: f"1. Write\n{textwrap.indent(fenced(whole(p)), '   ')}2. Done",
    "after a bullet": lambda p: f"- ```python\n{textwrap.indent(whole(p), '  ')}  ```\n",
    "quoted": lambda p: textwrap.indent(fenced(whole(p)), "> ", lambda _: True),
    "behind words": lambda p: f"Here is the code: {fenced(whole(p))}",
    "code in the opening line": lambda p: f"```python {whole(p).lstrip()}```",
    "code in the closing line": lambda p: f"```python\n{whole(p).rstrip()}```",
    "blank lines inside": lambda p: fenced(f"\n\n{whole(p)}\n\n"),
    "Windows": lambda p: f"Sure!\n{fenced(whole(p))}".replace("\n", "\r\n"),
    "tabs": lambda p: fenced(tabbed(whole(p))),
    "tabs in the body": lambda p: fenced(p.prompt + tabbed(p.canonical_solution)),
}
WORDS: dict[str, Answer] = {
    "no fence": whole,
    "no fence, but words": lambda p: f"Here's the function:\n\n{whole(p)}\n\nIt's right, I'm sure.\nDone\n",
    "no fence but for the output": lambda p: f"Sure:\n\n{whole(p)}\n\nOutput:\n{fenced('3.5', '```')}",
    "a list before": lambda p: (
        f"To do:\n\n1. import math\n2. x = 5\n\n{fenced(whole(p))}\n### Explanation\n- It's fine."
    ),
    "dialogue": lambda p: fenced("\n".join(f"... {x}" for x in whole(p).split("\n"))).replace("... ", ">>> ", 1),
}
BLOCKS: dict[str, Answer] = {
    "imports first": lambda p: f"{fenced(imports(p))}then\n{fenced(bare(p))}",
    "an example call first": lambda p: f"{fenced(f'{p.entry_point}(3.5)')}\n{fenced(whole(p))}",
    "tests after": lambda p: f"{fenced(whole(p))}Test:\n{fenced(f'assert {p.entry_point}(1, 2) == 99')}",
    "a helper first": lambda p: (
        f"{fenced(f'def kept(f):{chr(10)}    return f')}\n{fenced(renamed(p, '@kept' + chr(10) + 'def '))}"
    ),
    "the signature, then the body": lambda p: f"{fenced(p.prompt)}and the body:\n{fenced(p.canonical_solution)}",
    "the question, then the answer": lambda p: f"You gave\n{fenced(p.prompt)}so:\n{fenced(whole(p))}",
    "a wrong one without a language": lambda p: f"{wrong(p).replace('python', '')}\n{fenced(whole(p))}",
}
SHOWN: dict[str, Answer] = {
    "an example": lambda p: fenced(f"{whole(p)}\n\nprint({p.entry_point}(1, 2, 3, 4, 5, 6))"),
    "its result": lambda p: fenced(f"{whole(p)}\n\nx = {p.entry_point}(1, 2, 3, 4, 5, 6); print(x); print('é', x)"),
    "a test that is wrong": lambda p: fenced(f"{whole(p)}\n\nassert {p.entry_point}(1, 2, 3, 4, 5) == 3"),
    "a dialogue": lambda p: fenced(f"{whole(p)}\n\nx = input('?')\nprint({p.entry_point}(x))"),
    "main": lambda p: fenced(f"{whole(p)}\n\ndef main():\n    print({p.entry_point}(input()))\n\nmain()"),
    "unittest": lambda p: fenced(
        f"import unittest\n{whole(p)}\nclass T(unittest.TestCase):\n    def test(self):\n"
        f"        self.assertTrue({p.entry_point}(1))\n\nunittest.main()"
    ),
}
THOUGHTS: dict[str, Answer] = {
    "thinking": lambda p: f"<think>\nLet me see\n{wrong(p)}\n</think>\n\n{fenced(whole(p))}",
    "thinking that the template opens": lambda p: f"Let me see\n{wrong(p)}\n</think>\n\n{fenced(whole(p))}",
    "thinking without an end": lambda p: f"<think>\nLet me see\n{fenced(whole(p))}Yes, but",
    "channels": lambda p: (
        "<|channel|>analysis<|message|>We need\n"
        f"{wrong(p)}<|end|><|start|>assistant<|channel|>final<|message|>{fenced(whole(p))}<|return|>"
    ),
    "channels without special tokens": lambda p: f"analysisWe need\n{wrong(p)}assistantfinal{fenced(whole(p))}",
}
FORMS: dict[str, Answer] = {
    "a method": lambda p: fenced(method(p, "self, ")),
    "a static method": lambda p: fenced(method(p, before="@staticmethod\n")),
    "a method without self": lambda p: fenced(method(p)),
    "a stub, then the function": lambda p: fenced(f"{p.prompt}    pass\n\n{whole(p)}"),
    "async": lambda p: fenced(renamed(p, "async def ")),
    "a decorator": lambda p: fenced("def kept(f):\n    return f\n\n" + renamed(p, "@kept\ndef ")),
    "other types": lambda p: fenced(f"{p.prompt}    pass\n\nfrom typing import Any\n{whole(p)}"),
    "a lambda": lambda p: fenced(f"{renamed(p, 'def _')}\n{p.entry_point} = lambda *given: _{p.entry_point}(*given)"),
    "annotations of the future": lambda p: fenced(f"from __future__ import annotations\n{whole(p)}"),
    "a docstring with a fence": lambda p: fenced(
        whole(p).replace(p.prompt, p.prompt.rstrip()[:-3] + "\n    ```python\n    f()\n    ```\n    " + p.prompt[-4:])
    ),
}
BODIES: dict[str, Answer] = {
    "a body": lambda p: fenced(p.canonical_solution),
    "a body at the margin": lambda p: fenced(textwrap.dedent(p.canonical_solution)),
    "a body of tabs": lambda p: fenced(tabbed(p.canonical_solution)),
    "a body without a fence": lambda p: p.canonical_solution,
    "a body between words": lambda p: (
        f"The body is:\n\n{p.canonical_solution}\nThis returns the result, as it's right."
    ),
}
EVERY = FENCES | WORDS | BLOCKS | SHOWN | THOUGHTS | FORMS | BODIES
OF_ONE = ("a method", "a static method", "a method without self", "a docstring with a fence")


def failed(problems: list[Problem], answer: Answer) -> list[str]:
    found = []
    for problem in problems:
        try:
            exec(program(problem, completion_of(problem, answer(problem), "chat")), {})
        except BaseException as error:
            found.append(f"{problem.task_id}: {error!r}")
    return found


def of(name: str, problems: list[Problem]) -> list[Problem]:
    """Those that the case is about: some are of a program with one function."""
    return [p for p in problems if name not in OF_ONE or len(re.findall(r"(?m)^def ", whole(p))) == 1]


@pytest.mark.parametrize("name", EVERY)
def test_a_right_function_passes(name):
    assert failed(of(name, PROBLEMS[::14]), EVERY[name]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_right_function_passes(name):
    assert failed(of(name, PROBLEMS), EVERY[name]) == []


@pytest.mark.parametrize("name", [name for name in EVERY if name not in BODIES])
def test_a_wrong_function_passes_nowhere(name):
    """The same answers with a function that gives back nothing of use."""
    problem = PROBLEMS[2]
    broken = Problem(**vars(problem) | {"canonical_solution": "    return 'wrong'\n"})
    assert failed([problem], lambda _: EVERY[name](broken))


def test_only_what_shows_the_function_off_is_left_out():
    text = fenced("import sys\nsys.setrecursionlimit(5000)\nTABLE = [0] * 3\nfor i in range(3):\n    TABLE[i] = i\n")
    text = text.replace("\n```", "\n\ndef f(x):\n    return TABLE[x]\n\nprint(f(2)); y = 1\n```")
    made = chat_code.completion("def f(x):\n    '''Doc'''\n", "f", text)
    assert "setrecursionlimit" in made and "TABLE[i] = i" in made
    assert "print" not in made and made.endswith("pass; y = 1")


def test_a_function_of_another_name_is_not_the_function():
    for text in (
        fenced("def g(x):\n    return x"),
        "def g(x):\n    return x",
        "class A:\n    def g(self):\n        return 1",
    ):
        scope: dict = {}
        exec("def f(x):\n    '''Doc'''\n" + chat_code.completion("def f(x):\n    '''Doc'''\n", "f", text), scope)
        assert scope["f"](1) is None


@pytest.mark.parametrize(
    "text", ["(" * 500, "```python\n" + "f(" * 300, "```\x00```", "~~~\n```\n~~~", "def f(:\n" * 50]
)
def test_text_that_is_no_code_is_no_error(text):
    assert isinstance(chat_code.completion("def f(x):\n    '''Doc'''\n", "f", text), str)


@pytest.mark.parametrize(
    "text, said",
    [
        ("20", "20"),
        ("<think>5</think>20", "20"),
        ("20 <think>5</think>", "20"),
        ("5</think>20", "20"),
        ("20<think>5", "20"),
        ("<think>5", ""),
        ("<think>4<think>5</think>6</think>20", "20"),
        ("<thinking>5</thinking>20", "20"),
        ("[THINK]5[/THINK]20", "20"),
        ("◁think▷5◁/think▷20", "20"),
        ("<|begin_of_thought|>5<|end_of_thought|>20", "20"),
        ("<|channel|>analysis<|message|>5<|end|><|start|>assistant<|channel|>final<|message|>20<|return|>", "20"),
        ("<|channel|>analysis<|message|>5", ""),
        ("analysis5? 6?assistantfinal20", "20"),
        ("analysis of the sum: 20", "analysis of the sum: 20"),
    ],
)
def test_reasoning_is_no_answer(text, said):
    assert reasoning.answer(text).strip() == said
