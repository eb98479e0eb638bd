"""The standard library as data: what is cut out of a function, what is left out, and the corpus itself."""

from __future__ import annotations

import ast
import gc
import inspect
import json
import textwrap

import pytest

from qloralab.data.stdlib_corpus import REQUEST, stdlib_examples


@pytest.fixture
def corpus(tmp_path):
    """The corpus of a folder with these modules: {(function's place): (code, answer)}."""

    def read(**modules):
        for name, source in modules.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source), "utf-8")
        before, after = REQUEST.split("{code}")
        return {
            example.source: (
                example.messages[0].content.removeprefix(before).removesuffix(after),
                example.messages[1].content,
            )
            for example in stdlib_examples(tmp_path)
        }

    return read


def test_a_function(corpus):
    source = '''
    def add(a, b):
        """Add two numbers,
        whatever they are.

        The second paragraph is left out.
        """

        # A comment stays.
        return a + b
    '''
    code = "def add(a, b):\n    # A comment stays.\n    return a + b"
    assert corpus(m=source) == {"m.py:2 add": (code, "Add two numbers, whatever they are.")}


def test_methods_decorators_and_nested_functions(corpus):
    """An answer ends before a doctest."""
    source = '''
    class Box:
        if True:
            @property
            async def value(self):
                "The value in it."
                return """
    left
                indented"""

    def outer():
        try:
            pass
        except ValueError:
            def inner():
                """Do it later, perhaps:
                >>> inner()
                1
                """
                return 1
    '''
    assert corpus(m=source) == {
        "m.py:5 Box.value": (
            '@property\nasync def value(self):\n    return """\nleft\n    indented"""',
            "The value in it.",
        ),
        "m.py:15 outer.inner": ("def inner():\n    return 1", "Do it later, perhaps:"),
    }


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """Only a docstring here."""\n',
        'def f():\n    """Only a docstring here."""\n    pass\n',
        'def f(): "A docstring beside def."; return 1\n',
        'def f():\n    "A docstring beside code."; return 1\n',
        'def f():\n    """Three words only."""\n    return 1\n',
        'def f():\n    """F(a, b) -> one of them."""\n    return 1\n',
        'def f():\n    """the rest of a sentence"""\n    return 1\n',
        'def f():\n    """   """\n    return 1\n',
        "def f():\n    return 1\n",
    ],
)
def test_functions_left_out(corpus, source):
    """And an invalid escape is read without a warning."""
    assert list(corpus(a=source, b='def g():\n    """A function that stays."""\n    return "\\d"\n')) == ["b.py:1 g"]


def test_the_first_of_equal_requests_stays(corpus):
    first = 'def f():\n    """The first of two."""\n    return 1\n'
    second = 'def f():\n    """The second of two."""\n    return 1\n'
    assert corpus(a=first, b=second) == {"a.py:1 f": ("def f():\n    return 1", "The first of two.")}


def function(name):
    return f'def {name}():\n    """A function that stays."""\n    return 1\n'


def test_files_are_sorted_and_tests_are_left_out(corpus, tmp_path):
    skipped = ("test", "site-packages", "lib-dynload", "a/tests", "lib2to3", "idlelib/idle_test", "__pycache__")
    for index, folder in enumerate(skipped):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "m.py").write_text(function(f"skipped{index}"))
    found = corpus(b=function("f"), a__z=function("g"), a__b__c=function("h"), Z=function("i"))
    assert list(found) == ["Z.py:1 i", "a/b/c.py:1 h", "a/z.py:1 g", "b.py:1 f"]


def test_files_that_are_no_modules_are_left_out(corpus, tmp_path, refusal):
    assert "holds no Python sources" in refusal(stdlib_examples, tmp_path / "python311.zip")
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "syntax.py").write_text("def f(:")
    (tmp_path / "null.py").write_bytes(b"\0")
    (tmp_path / "coding.py").write_bytes(b'"\xe9"')
    assert list(corpus(m=function("f"))) == ["m.py:1 f"]


def test_a_declared_encoding_is_respected(tmp_path):
    source = '# coding: latin-1\r\ndef f():\r\n    """Le café est là."""\r\n    return "é"\r\n'
    (tmp_path / "m.py").write_bytes(source.encode("latin-1"))
    (example,) = stdlib_examples(tmp_path)
    assert example.messages[0].content == REQUEST.format(code='def f():\n    return "é"')
    assert example.messages[1].content == "Le café est là."


@pytest.mark.parametrize("was_enabled", [True, False])
def test_collection_is_left_as_it_was(tmp_path, was_enabled):
    (tmp_path / "m.py").write_text(function("f"))
    try:
        (gc.enable if was_enabled else gc.disable)()
        stdlib_examples(tmp_path)
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def stdlib():
    return stdlib_examples()


def test_the_standard_library(stdlib):
    assert len(stdlib) > 4_000
    assert len({example.source for example in stdlib}) == len(stdlib)
    assert len({example.messages[0].content for example in stdlib}) == len(stdlib)
    assert [example.source for example in stdlib_examples()] == [example.source for example in stdlib]


def test_every_request_of_the_standard_library_is_code_without_its_answer(stdlib):
    before, after = REQUEST.split("{code}")
    for example in stdlib:
        request, answer = (message.content for message in example.messages)
        (function,) = ast.parse(request.removeprefix(before).removesuffix(after)).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef), example.source
        assert example.source.endswith(function.name)
        assert ast.get_docstring(function) is None or ast.get_docstring(function) != answer, example.source
        assert "\n" not in answer, example.source


def test_an_answer_is_what_the_interpreter_shows(stdlib):
    (decode,) = [one for one in stdlib if one.source.endswith(" JSONDecoder.decode")]
    shown = inspect.getdoc(json.JSONDecoder.decode)
    assert shown is not None
    assert decode.messages[1].content == shown.partition("\n\n")[0].replace("\n", " ")
    line = inspect.getsourcelines(json.JSONDecoder.decode)[1]
    assert decode.source == f"json/decoder.py:{line} JSONDecoder.decode"
    code = inspect.getsource(json.JSONDecoder.decode)
    assert code.splitlines()[-1].strip() in decode.messages[0].content
