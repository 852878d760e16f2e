"""Questions about code for the drafters' training data: functions of Python's standard library, to be written anew.

    python scripts/python_prompts.py 2000 > python.jsonl

Each is a signature and its docstring, asked for in the words of eval/humaneval.py. The library's tests are left out,
and HumanEval has nothing to do with it.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed

from pearl.config import cli
from pearl.tasks.humaneval import INSTRUCTION

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
DOCSTRING = range(40, 700)  # characters


def functions(source: str) -> Iterator[str]:
    """The signature and docstring of every documented function in a module's source, as a function of its own."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
            continue
        text = ast.get_docstring(node) or ""
        if len(text) not in DOCSTRING or not text.isascii() or '"""' in text or "\\" in text:
            continue
        node.args.args = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        body = "\n".join(f"    {line}" if line else "" for line in text.splitlines()).strip()
        yield f'def {node.name}({ast.unparse(node.args)}){returns}:\n    """{body}\n    """'


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("scripts/python_prompts.py", about=__doc__.splitlines()[0])
    parser.add_argument("count", nargs="?", type=cli.at_least_one, default=2000, help="how many (default: 2000)")
    count = parser.parse_args(argv).count
    library = Path(sysconfig.get_paths()["stdlib"])
    stubs: dict[str, None] = {}
    for path in sorted(library.rglob("*.py")):
        if SKIPPED & set(path.relative_to(library).parts):
            continue
        try:
            stubs.update(dict.fromkeys(functions(path.read_text(encoding="utf-8"))))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a template or a file in another encoding
    chosen = random.Random(0).sample(sorted(stubs), min(count, len(stubs)))
    for stub in chosen:
        print(json.dumps({"prompt": INSTRUCTION.format(prompt=stub)}))
    print(f"{len(chosen)} of {len(stubs)} functions", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
