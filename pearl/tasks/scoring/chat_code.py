"""The function in a chat answer: which lines of it are code, and what of the code makes a program.

Knows Markdown's fences and Python's grammar, and no problem. People's models put a function into one fence of many,
into none, into a class; they import in another block, call it before it is there and test it afterwards. So code is
what parses, the function is what defines its name, and what only shows it off is left out.
"""

from __future__ import annotations

import ast
import itertools
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pearl.tasks.scoring import reasoning

Function = ast.FunctionDef | ast.AsyncFunctionDef
LONGEST, MOST, DEPTH = 400, 20, 3  # lines of one piece of code, blocks, and needs of needs that are looked at

_FENCE = re.compile(r"(?P<indent>\s*)(?:(?:[-*+>]|\d+[.)])\s+)?(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)")
_PYTHON = re.compile(r"\W*i?py(?:thon|con)?[\d.]*\b", re.IGNORECASE)
_OPENS = r"(?:`{3,}|~{3,})[ \t]*(?:i?py(?:thon)?[\d.]*)?"
_STARTS = re.compile(
    r"\s*(?:async\s+def|def|class|import|from\s+\S+\s+import)\s|\s*@\w|\s*[A-Za-z_]\w*\s*(?::[^=]+)?=[^=]"
)
_LEAVE = {"input", "exit", "quit", "_exit", "main", "testmod"}  # a program of checks has no use for their callers
_AWAITED = """
def {name}(*args, _function={name}, **named):
    steps = _function(*args, **named)
    try:
        while True:
            steps.send(None)
    except StopIteration as end:
        return end.value
"""


@dataclass(frozen=True)
class _Code:
    """Lines that parse."""

    source: str
    tree: ast.Module


def completion(prompt: str, name: str, text: str) -> str:
    """What of a chat answer makes a program when it stands after `prompt`, which opens the function `name`.

    An answer that defines the function follows the prompt as it is: the prompt alone is a valid program, its imports
    and helpers stay, and the later definition is the one that the checks call. Of several definitions the first in a
    ```python block counts, else the first. A definition that never returns counts only if nothing else does: it was
    split, or only shown. Anything else is taken for a body of the prompt's open function.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for part in dict.fromkeys((reasoning.answer(text), text)):
        blocks = _fenced(part)[:MOST]
        codes = [*(code for block in blocks for code in _codes(block)), *_spans(part)]
        joins = ("\n".join(blocks[i:j]) for i in range(len(blocks)) for j in range(i + 2, len(blocks) + 1))
        joined = filter(None, map(_parsed, joins))
        for code in itertools.chain(codes, joined):
            if (function := _defined(code.tree, name)) and _returns(function):
                return "\n" + _program(code, codes, prompt, name)
        for body in itertools.chain(
            *((_continued(prompt, name, one), _body(one)) for one in blocks), _bare(part, prompt, name)
        ):
            if body:
                return "\n" + body
        for code in codes:
            if _defined(code.tree, name):
                return "\n" + _program(code, codes, prompt, name)
    return "\n" + textwrap.indent(textwrap.dedent(next(iter(_fenced(text)), text)), "    ")  # which is no program


# Where code is


def _fenced(text: str) -> list[str]:
    """What stands in fences, Python's first. A fence may be indented, hold others, and have no end."""
    if re.search(r"(?m)^> ?(?:```|~~~)", text):  # quoted
        text = re.sub(r"(?m)^> ?", "", text)
    text = re.sub(rf"(?m)^(.*\S)[ \t]*({_OPENS})[ \t]*$", r"\1\n\2", text)  # behind other words, or at the end of code
    text = re.sub(rf"(?m)^([ \t]*{_OPENS})[ \t]*((?:def|import|from|class|async|@)\b.*)$", r"\1\n\2", text)
    under_way: list[tuple[re.Match[str], list[str]]] = []
    whole: list[tuple[re.Match[str], list[str]]] = []
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line)
        if fence and under_way and not fence["info"].strip():
            opened = under_way[-1][0]["fence"]
            if fence["fence"].startswith(opened):
                under_way.pop()
                continue
        if fence:
            under_way.append((fence, []))
            whole.append(under_way[-1])
        elif under_way:
            indent = len(under_way[-1][0]["indent"])
            under_way[-1][1].append(line[indent:] if not line[:indent].strip() else line)
    whole.sort(key=lambda block: not _PYTHON.match(block[0]["info"]))
    return ["\n".join(lines) for _, lines in whole]


def _codes(block: str) -> Iterable[_Code]:
    """A block that is code; of any other the parts that are."""
    code = next(filter(None, map(_parsed, _variants(block))), None)
    return [code] if code else _spans(block)


def _spans(text: str) -> Iterator[_Code]:
    """The code between other words: from a line that may begin it, as far as it parses."""
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        count = 0
        if _STARTS.match(lines[at]):
            indent = len(lines[at]) - len(lines[at].lstrip())
            rest = [line[indent:] if not line[:indent].strip() else line for line in lines[at : at + LONGEST]]
            if code := _longest(rest):
                yield code
                count = code.source.count("\n") + 1
        at += max(1, count)


def _longest(lines: Sequence[str]) -> _Code | None:
    """The most of these lines, from the first on, that parses: what comes after code is cut off where it is none."""
    count = len(lines)
    while count:
        found = _parse("\n".join(lines[:count]))
        if isinstance(found, ast.Module):
            return _Code("\n".join(lines[:count]), found) if found.body else None
        count = min(count, found) - 1
    return None


def _variants(code: str) -> Iterator[str]:
    """As it stands, out of a dialogue, and with the tabs of an editor."""
    yield textwrap.dedent(code)
    if code.startswith(">>>"):
        yield re.sub(r"(?m)^(?:>>>|\.\.\.) ?", "", code)
    if "\t" in code:
        yield from (textwrap.dedent(code.expandtabs(width)) for width in (4, 8))


def _parsed(code: str) -> _Code | None:
    tree = _parse(code)
    return _Code(code, tree) if isinstance(tree, ast.Module) and tree.body else None


def _parse(code: str) -> ast.Module | int:
    """Its tree, or the line where it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that are none
        try:
            return ast.parse(code)
        except SyntaxError as error:
            return max(1, error.lineno or 1)
        except (ValueError, RecursionError, MemoryError):
            return 1


# What a program needs


def _defined(tree: ast.Module, name: str) -> ast.stmt | None:
    """The statement that gives `name` its last meaning: a function, a variable that holds one, a class with it."""
    found: ast.stmt | None = None
    for node in tree.body:
        if isinstance(node, Function | ast.Assign) and name in _bound(node):
            found = node
    return found or next((node for node in tree.body if _method(node, name)), None)


def _method(node: ast.stmt, name: str) -> Function | None:
    inside = node.body if isinstance(node, ast.ClassDef) else []
    return next((one for one in inside if isinstance(one, Function) and one.name == name), None)


def _returns(node: ast.AST) -> bool:
    """Whether a function gives something back by itself: those inside it do so for themselves. Of a class any does."""
    left = [node]  # no recursion: a sum of a thousand terms is a thousand levels deep
    while left:
        one = left.pop()
        if isinstance(one, ast.Assign | ast.Return | ast.Yield | ast.YieldFrom):
            return True
        own = isinstance(one, ast.ClassDef)
        inside = ast.iter_child_nodes(one)
        left += [part for part in inside if own or not isinstance(part, Function | ast.Lambda | ast.Assign)]
    return False


def _program(code: _Code, others: Sequence[_Code], prompt: str, name: str) -> str:
    """The code with the function, after what it needs of the others'; it calls nothing by itself."""
    needed = _needed(code, others, prompt, name)
    made = "\n".join([*needed, _without(code.source, _shows(code.tree, name))])
    function = _defined(code.tree, name)
    if isinstance(function, ast.ClassDef) and (method := _method(function, name)):
        first = [*method.args.posonlyargs, *method.args.args][:1]
        owner = f"{function.name}()" if first and first[0].arg in ("self", "cls") else function.name
        made, function = f"{made}\n{name} = {owner}.{name}\n", method
    return made + (_AWAITED.format(name=name) if isinstance(function, ast.AsyncFunctionDef) else "")


def _needed(code: _Code, others: Sequence[_Code], prompt: str, name: str) -> list[str]:
    """Imports, functions and constants of the other code that this one mentions and neither it nor the prompt has."""
    trees = [one.tree for one in (code, _parsed(prompt)) if one]
    known = {bound for tree in trees for node in tree.body for bound in _bound(node)} | {name}
    wanted = _free(code.tree) - known
    found: dict[tuple[bool, int], str] = {}
    makes = Function | ast.ClassDef | ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign
    there = [(other, node) for other in others for node in other.tree.body if other is not code]
    for _ in range(DEPTH):  # what is needed may need more
        for at, (other, node) in enumerate(there):
            bound = _bound(node)
            if isinstance(node, makes) and bound & (wanted | {"*"}) and not bound & known and name not in _free(node):
                first = min(one.lineno for one in (node, *getattr(node, "decorator_list", ())))
                lines = other.source.split("\n")[first - 1 : node.end_lineno]
                found[not isinstance(node, ast.Import | ast.ImportFrom), at] = "\n".join(lines)
                known |= bound
                wanted = (wanted | _free(node)) - known
    return [found[order] for order in sorted(found)]  # imports first


def _shows(tree: ast.Module, name: str) -> list[ast.stmt]:
    """The statements that only show the function off: examples, tests, a dialogue, and words that happen to parse."""
    users = {name}
    found: list[ast.stmt] = []
    for node in tree.body:
        bound, names = _bound(node), _names(node)
        if isinstance(node, ast.Import | ast.ImportFrom):
            if name in bound or getattr(node, "module", "") == "__future__":
                found.append(node)  # from a file of which nobody knows; and what must stand first
        elif isinstance(node, Function | ast.ClassDef):
            users |= bound if names & users and name not in bound else set()
        elif name not in bound and (names & (users | _LEAVE) or _idle(node)):
            users |= bound
            found.append(node)
    return found


def _idle(node: ast.stmt) -> bool:
    return isinstance(node, ast.Return) or (
        isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call | ast.Constant)
    )


def _names(node: ast.AST) -> set[str]:
    """All that it mentions."""
    found = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    return found | {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)}


def _free(tree: ast.AST) -> set[str]:
    """What it mentions and gives no meaning anywhere."""
    nodes = [*ast.walk(tree)]
    given = {one.id for one in nodes if isinstance(one, ast.Name) and not isinstance(one.ctx, ast.Load)}
    given |= {one.arg for one in nodes if isinstance(one, ast.arg)}
    return {one.id for one in nodes if isinstance(one, ast.Name)} - given


def _bound(node: ast.stmt) -> set[str]:
    """What it gives a meaning at its own level."""
    if isinstance(node, Function | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(one.asname or one.name).partition(".")[0] for one in node.names}
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}


def _without(source: str, nodes: Sequence[ast.stmt]) -> str:
    """The source with `pass` in the place of these statements."""
    lines = source.encode().split(b"\n")  # a column counts bytes
    for node in reversed(nodes):
        assert node.end_lineno is not None
        first, last = node.lineno - 1, node.end_lineno - 1
        lines[first : last + 1] = [lines[first][: node.col_offset] + b"pass" + lines[last][node.end_col_offset :]]
    return b"\n".join(lines).decode()


# Answers that only go on


def _continued(prompt: str, name: str, code: str) -> str | None:
    """As much of the code as continues the prompt, word for word."""
    head = prompt.rstrip("\n")
    found = _longest(f"{head}\n{code}".split("\n")) if code[:1] in (" ", "\t", "\n") else None
    function = _defined(found.tree, name) if found else None
    if not found or not function or not _returns(function):
        return None
    return _without(found.source, _shows(found.tree, name)).removeprefix(f"{head}\n")


def _body(code: str) -> str | None:
    """The code as the body of an open function, if it is one: it returns, and no function does that for it."""
    variants = [*_variants(code), *_variants(f"    {code}")]  # the prompt's end may have had the first indentation
    found = [_longest(["def _():", *textwrap.indent(variant, "    ").split("\n")]) for variant in variants]
    bodies = [one.source.partition("\n")[2] for one in found if one and _returns(one.tree.body[0])]
    return max(bodies, key=lambda body: body.count("\n"), default=None)


def _bare(text: str, prompt: str, name: str) -> Iterator[str | None]:
    """The same between other words; where a function or a class stands before it, it is that one's."""
    lines = text.split("\n")[:LONGEST]
    for at, line in enumerate(lines):
        begins = re.match(r"(\s*)(?:async\s+)?(?:def|class)\s", line)
        if line.strip() and not (begins and not begins[1]):
            rest = "\n".join(lines[at:])
            yield _continued(prompt, name, rest)
            yield _body(rest)
        if begins:
            return
