"""The data that every machine has: the Python standard library, as a task with a right answer.

Each function with a docstring becomes one example. The request is the function without its docstring; the answer is the
first paragraph of the docstring, on one line:

    user       Write a docstring for this Python function:
               ```python
               def isleap(year):
                   return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
               ```
    assistant  Return True for leap years, False for non-leap years.

The sources are read with ``ast``; nothing is imported or run. Two interpreters of one version give the same examples in
the same order: files sorted by path, functions in the order of the source.
"""

from __future__ import annotations

import ast
import gc
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import decode_source
from pathlib import Path

from ..errors import UserError
from .examples import Example

REQUEST = "Write a docstring for this Python function:\n```python\n{code}\n```"
_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "__pycache__"}
_SHORTEST = 4  # words: "Initialize." and "Return an iterator." say little that the name does not

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def stdlib_examples(root: Path | None = None) -> list[Example]:
    """The functions of the standard library, each with the docstring to write.

    Left out are test folders, functions that are nothing but a docstring, answers that are no sentence of four words or
    more, and every request that an earlier function makes already.

    Args:
        root: the folder with the sources; by default the standard library of the running interpreter.

    Returns:
        The examples; ``source`` is "json/decoder.py:332 JSONDecoder.decode": file, line of the ``def`` and name.

    Raises:
        UserError: the folder holds no function with a docstring: the interpreter ships bytecode only, or an archive.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    found: dict[str, Example] = {}
    with _no_collection():
        for path in _files(root):
            for example in _examples(path, path.relative_to(root).as_posix()):
                found.setdefault(example.messages[0].content, example)
    if not found:
        raise UserError(
            f"{root} holds no Python sources with docstrings: this interpreter ships none; give --data a file"
        )
    return list(found.values())


def _files(root: Path) -> list[Path]:
    """The modules below a folder, sorted by path. A folder whose name is no identifier is no package: site-packages."""
    paths = []
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        if all(folder.isidentifier() and folder not in _SKIPPED for folder in folders):
            paths.append(path)
    return sorted(paths, key=lambda path: path.relative_to(root).parts)


def _examples(path: Path, name: str) -> Iterator[Example]:
    try:
        source = decode_source(path.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own invalid escapes
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):  # a dangling link, a template: not a module of this interpreter
        return
    lines = source.split("\n")
    for function, qualified in _functions(tree):
        answer, code = _answer(function), _without_docstring(function, lines)
        if code and _is_sentence(answer):
            place = f"{name}:{function.lineno} {qualified}"
            yield Example.from_instruction(REQUEST.format(code=code), answer, place)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No search for cycles: a tree has a million nodes and no cycle, and the search takes as long as the parsing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[_Function, str]]:
    """The functions and methods below a node, in the order of the source, with their qualified names."""
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, _Function | ast.ClassDef):
            inner = f"{prefix}{child.name}."
        if isinstance(child, _Function):
            yield child, inner[:-1]
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):  # no expression holds a def
            yield from _functions(child, inner)


def _answer(function: _Function) -> str:
    """The first paragraph of the docstring on one line, up to the first doctest; empty without a docstring."""
    docstring = ast.get_docstring(function, clean=False) or ""
    paragraph = re.split(r"\n[ \t]*\n|^[ \t]*>>> ", inspect.cleandoc(docstring), maxsplit=1, flags=re.MULTILINE)[0]
    return " ".join(paragraph.split())


def _is_sentence(answer: str) -> bool:
    """Whether an answer describes: not a word or two, not a signature such as ``get(key) -> value``, not a fragment."""
    return len(answer.split()) >= _SHORTEST and "->" not in answer and answer[0].isupper()


def _without_docstring(function: _Function, lines: list[str]) -> str:
    """The source of a function, its docstring cut out and its indentation removed; empty if no code is left."""
    docstring, *rest = function.body
    if not rest or all(isinstance(statement, ast.Pass) for statement in rest):
        return ""
    if docstring.lineno == function.lineno or rest[0].lineno == docstring.end_lineno:  # on one line with code
        return ""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    before = lines[first - 1 : docstring.lineno - 1]
    after = lines[docstring.end_lineno : function.end_lineno]
    while not after[0].strip():
        after = after[1:]
    return "\n".join(_dedent(line, function.col_offset) for line in before + after)


def _dedent(line: str, columns: int) -> str:
    """A line moved left, unless it stands further left already, as the lines of a long string may."""
    return line[columns:] if not line[:columns].strip() else line
