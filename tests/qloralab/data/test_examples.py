"""The three formats are read as written, and every mistake in a file is one line that says where it is."""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qloralab.data.examples import Example, Message, read_jsonl
from qloralab.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}
ALPACA = {"instruction": "Add.", "input": "2 3", "output": "5"}
TEXT = {"text": "Two and three make five."}


@pytest.fixture
def file(tmp_path):
    """Writes a file from bytes, text, or records; returns its path."""

    def write(*parts):
        path = tmp_path / "data.jsonl"
        texts = (part if isinstance(part, str | bytes) else json.dumps(part) for part in parts)
        path.write_bytes(b"\n".join(text.encode() if isinstance(text, str) else text for text in texts))
        return path

    return write


@pytest.fixture
def message(refusal) -> Callable[..., str]:
    """The one line that refuses a file, after the file's name."""

    def read(path, forced=None):
        line = refusal(read_jsonl, path, forced)
        assert line.startswith(str(path))
        return line.removeprefix(str(path))

    return read


TURNS = (Message("user", "2 + 3?"), Message("assistant", "5"))
ADD, SAY = ((Message("user", said), Message("assistant", "5")) for said in ("Add.\n\n2 3", "Say {five}."))
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n2 3\n\n### Response:\n"
)
ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay {five}.\n\n### Response:\n"
)
# a record, the format that is asked for -> messages, text, the prompt where there is no template
READ = {
    "chat": (CHAT, None, TURNS, None, None),
    "text": (TEXT, None, (), TEXT["text"], None),
    "alpaca": (ALPACA, None, ADD, None, WITH_INPUT),
    "alpaca's own file": (ALPACA | TEXT, None, ADD, None, WITH_INPUT),
    "a forced format": (ALPACA | TEXT, "text", (), TEXT["text"], None),
    **{
        f"alpaca with input {extra}": ({"instruction": "Say {five}.", "output": "5"} | extra, None, SAY, None, ALONE)
        for extra in ({}, {"input": ""}, {"input": " "}, {"input": None})
    },
}


@pytest.mark.parametrize(("record", "format", "messages", "text", "prompt"), READ.values(), ids=READ)
def test_a_record_of_each_format(file, record, format, messages, text, prompt):  # noqa: A002
    path = file("\ufeff", record, "", " \t\r", json.dumps(record) + "\r", "")
    first, second = read_jsonl(path, format)
    assert (first.source, second.source) == (f"{path}:2", f"{path}:5")
    for example in (first, second, *read_jsonl(file("\ufeff" + json.dumps(record)), format)):
        assert (example.messages, example.text, example.plain_prompt) == (messages, text, prompt)


@pytest.mark.parametrize("history", [[], [["One?", "1"], ["Two?", "2"]]], ids=["alone", "history"])
@pytest.mark.parametrize("system", [None, "", "Be brief."], ids=["null", "empty", "system"])
def test_alpaca_with_a_system_message_and_earlier_turns(file, system, history):
    (example,) = read_jsonl(file({"instruction": "Three?", "output": "3", "system": system, "history": history}))
    before = [Message("system", system)] if system else []
    turns = [Message(role, said) for pair in history for role, said in zip(("user", "assistant"), pair, strict=True)]
    assert example.messages == (*before, *turns, Message("user", "Three?"), Message("assistant", "3"))
    assert (example.plain_prompt is None) == bool(history)  # Alpaca's prompt has no place for turns
    assert history or str(example.plain_prompt).startswith("Be brief.\n\nBelow is" if system else "Below is")


def test_chat_with_all_that_a_template_may_use(file):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    messages = [
        {"role": "user", "content": "2 + 3?", "name": "Ada", "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "weight": 0},
        {"role": "tool", "content": "5", "tool_call_id": "1", "name": "add"},
        {"role": "assistant", "content": "5", "reasoning_content": "It said 5.", "weight": 1.0, "rating": 3},
    ]
    tool = {"name": "add", "parameters": {"type": "object"}}
    (example,) = read_jsonl(file({"system": "Add.", "messages": messages, "tools": [tool], "id": 7, "parallel": None}))
    function = {"name": "add", "arguments": {"a": 2, "b": 3}}
    assert example.messages == (
        Message("system", "Add."),
        Message("user", "2 + 3?", False, {"name": "Ada"}),
        Message("assistant", "", False, {"tool_calls": [{"id": "1", "type": "function", "function": function}]}),
        Message("tool", "5", True, {"tool_call_id": "1", "name": "add"}),
        Message("assistant", "5", True, {"reasoning_content": "It said 5."}),
    )
    assert example.tools == [{"type": "function", "function": tool}]
    assert example.unused == ("messages.rating", "id")


@pytest.fixture
def pipe(tmp_path):
    """Writes into a pipe; returns its path. What was read from it is gone."""
    path, writers = tmp_path / "pipe", []
    os.mkfifo(path)

    def write(text: str):
        writers.append(threading.Thread(target=path.write_text, args=[text]))
        writers[-1].start()
        return path

    yield write
    for writer in writers:
        writer.join()


def test_a_pipe(pipe):
    assert read_jsonl(pipe(json.dumps(TEXT)))[0].text == TEXT["text"]


def test_a_pipe_is_read_once(pipe, message):
    assert message(pipe("a,b\n1,2\n")) == NO_VALUE + ", and the file starts with 'a,b'" + READS


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=1))
def test_any_text_comes_back(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("any") / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8", newline=""
    )
    assert [example.text for example in read_jsonl(path)] == texts


READS = (
    '; --data reads JSON Lines in UTF-8, one object per line: {"instruction": "…", "output": "…"} or '
    '{"messages": […]} or {"text": "…"}'
)
TAKES = "; --data takes a JSONL file on this machine, or 'stdlib'"
ARRAY = ", and the file is a JSON array (`jq -c .[]` makes JSON Lines of one)"
NO_VALUE = ":1: not JSON: Expecting value (column 1)"
BRACE = ":1: not JSON: Expecting property name enclosed in double quotes (column 2)"
UTF_16 = json.dumps(TEXT).encode("utf-16").decode("latin-1")
ASSISTANT = {"role": "assistant", "content": "5"}
MISTAKES = {
    "not JSON": ([TEXT, "", '{"text" "a"}'], ":3: not JSON: Expecting ':' delimiter (column 9)"),
    "not JSON at first": (
        ["", '{"text" "a"}', TEXT],
        ":2: not JSON: Expecting ':' delimiter (column 9)" + """, and the file starts with '{"text" "a"}'""" + READS,
    ),
    "pretty-printed": (["{", '"text": "a"', "}"], BRACE + ", and the file starts with '{'" + READS),
    "array over lines": (["[", json.dumps(TEXT), "]"], NO_VALUE.replace("1)", "2)") + ARRAY + READS),
    "array on one line": ([[TEXT]], ":1: the line is a list, not a JSON object" + ARRAY + READS),
    "array later": ([TEXT, [TEXT]], ":2: the line is a list, not a JSON object"),
    "csv": (["instruction,output", "Add.,5"], NO_VALUE + ", and the file starts with 'instruction,output'" + READS),
    "gzip": ([gzip.compress(b"{}\n")], ":1: not UTF-8 (byte 2 of the line), and the file is a gzip archive" + READS),
    "parquet": ([b"PAR1\x15\x04"], NO_VALUE + ", and the file is Parquet" + READS),
    "prose": (["Two and three", "make five."], NO_VALUE + ", and the file starts with 'Two and three'" + READS),
    "number": ([TEXT, 5], ":2: the line is a number, not a JSON object"),
    "boolean": ([True], ":1: the line is a boolean, not a JSON object, and the file starts with 'true'" + READS),
    "deep": (
        ["[" * 200_000 + "]" * 200_000],
        ":1: not JSON that can be read: a number is too long, or a nesting too deep",
    ),
    "long number": (
        ['{"text": ' + "1" * 5_000 + "}"],
        ":1: not JSON that can be read: a number is too long, or a nesting too deep",
    ),
    "latin-1": ([TEXT, '{"text": "é"}'.encode("latin-1")], ":2: not UTF-8 (byte 11 of the line)"),
    "latin-1 at first": (
        ['{"text": "é"}'.encode("latin-1")],
        ':1: not UTF-8 (byte 11 of the line), and the file starts with \'{"text": "é"}\'' + READS,
    ),
    "utf-16": (
        [json.dumps(TEXT).encode("utf-16")],
        ":1: not UTF-8 (byte 1 of the line), and the file starts with " + repr(UTF_16[:20]) + READS,
    ),
    "surrogate": (
        ['{"text": "a\\ud800"}'],
        ":1: half a surrogate pair, which is no character (field 'text', character 2)",
    ),
    "no known field": (
        [{"prompt": "a", "completion": "b"}],
        ":1: the format is unknown: no field 'messages' (chat), 'instruction' (alpaca) or 'text' (text); "
        "there is 'prompt', 'completion'",
    ),
    "no field": (
        [{}],
        ":1: the format is unknown: no field 'messages' (chat), 'instruction' (alpaca) or 'text' (text)",
    ),
    "two formats": ([ALPACA, TEXT], ":2: no field 'instruction'; the format is alpaca"),
    "no output": ([{"instruction": "a"}], ":1: no field 'output'; the format is alpaca"),
    "empty output": ([ALPACA, ALPACA | {"output": " \n"}], ":2: field 'output' is empty"),
    "output is null": ([ALPACA | {"output": None}], ":1: field 'output' is null, not a string"),
    "input is a list": ([ALPACA | {"input": []}], ":1: field 'input' is a list, not a string"),
    "instruction is an object": ([ALPACA | {"instruction": {}}], ":1: field 'instruction' is an object, not a string"),
    "empty text": ([{"text": ""}], ":1: field 'text' is empty"),
    "messages is a string": ([{"messages": "5"}], ":1: field 'messages' is a string, not a list"),
    "no messages": ([{"messages": []}], ":1: no message of the assistant, so there is nothing to learn"),
    "no assistant": (
        [{"messages": CHAT["messages"][:1]}],
        ":1: no message of the assistant, so there is nothing to learn",
    ),
    "assistant first": (
        [{"messages": [ASSISTANT]}],
        ":1: the first message is the assistant's; there is nothing that it answers",
    ),
    "message is a string": ([{"messages": ["5"]}], ":1: messages[0] is a string, not a JSON object"),
    "no role": ([CHAT, {"messages": [ASSISTANT, {"content": "5"}]}], ":2: no field 'messages[1].role'"),
    "unknown role": (
        [{"messages": [{"role": "human", "content": "a"}, ASSISTANT]}],
        ":1: messages[0] has the unknown role 'human'; the roles are system, developer, user, assistant, tool",
    ),
    "content is null": (
        [{"messages": [{"role": "user", "content": None}, ASSISTANT]}],
        ":1: field 'messages[0].content' is null, not a string",
    ),
    "empty answer": (
        [{"messages": [*CHAT["messages"], {"role": "assistant", "content": ""}]}],
        ":1: field 'messages[2].content' is empty",
    ),
    "weight of half": (
        [{"messages": [CHAT["messages"][0], ASSISTANT | {"weight": 0.5}]}],
        ":1: field 'messages[1].weight' is 0.5; 0 and 1 are supported",
    ),
    "weight of a question": (
        [{"messages": [CHAT["messages"][0] | {"weight": 1}, ASSISTANT]}],
        ":1: field 'messages[0].weight' is 1; only answers are learned, so 0 is supported",
    ),
    "nothing has weight": (
        [{"messages": [CHAT["messages"][0], ASSISTANT | {"weight": 0}]}],
        ":1: every message of the assistant has weight 0, so there is nothing to learn",
    ),
    "weight of a record": (
        [TEXT | {"weight": 0.1}],
        ":1: field 'weight' would change what is learned, and is not supported here",
    ),
    "trained elsewhere": (
        [{"messages": [CHAT["messages"][0], ASSISTANT | {"train": False}]}],
        ":1: field 'messages[1].train' would change what is learned, and is not supported here",
    ),
    "pictures": (
        [ALPACA | {"images": ["a.png"]}],
        ":1: field 'images' would change what is learned, and is not supported here",
    ),
    "history of strings": ([ALPACA | {"history": ["a"]}], ":1: history[0] is not [instruction, output]"),
    "history of one": ([ALPACA | {"history": [["a"]]}], ":1: history[0] is not [instruction, output]"),
    "empty history": ([ALPACA | {"history": [["a", " "]]}], ":1: field 'history[0].output' is empty"),
    "tools as text": ([CHAT | {"tools": "[]"}], ":1: field 'tools' is a string, not a list"),
    "tool without name": (
        [CHAT | {"tools": [{"type": "function", "function": {}}]}],
        ":1: no field 'tools[0].function.name'",
    ),
    "call without object": (
        [{"messages": [CHAT["messages"][0], {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "2"}]}]}],
        ":1: field 'messages[1].tool_calls[0].arguments' is not an object, nor the text of one",
    ),
    "twice": (
        ['{"instruction": "a", "output": "b", "output": "c"}'],
        ":1: field 'output' is there twice in one object",
    ),
    "twice below": (
        ['{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}'],
        ":1: field 'role' is there twice in one object",
    ),
    "empty file": ([], " holds no record"),
    "blank file": (["", " ", ""], " holds no record"),
}


@pytest.mark.parametrize(("parts", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_file(file, parts, expected, message):
    assert message(file(*parts)) == expected


def test_a_line_must_have_the_forced_format(file, message):
    assert message(file(TEXT), "chat") == ":1: no field 'messages'; the format is chat"


def test_unreadable_file(file, tmp_path, monkeypatch, message):
    assert message(tmp_path / "none.jsonl") == " cannot be read: No such file or directory" + TAKES
    assert message(tmp_path) == " cannot be read: Is a directory" + TAKES

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # permissions do not stop root
    assert message(file(TEXT)) == " cannot be read: Permission denied" + TAKES


def test_unknown_format(file):
    with pytest.raises(UserError, match=r"^unknown format 'sharegpt'; the formats are alpaca, chat, text$"):
        read_jsonl(file(TEXT), "sharegpt")


@pytest.mark.parametrize("arguments", [{}, {"messages": (Message("user", "a"),), "text": "b"}], ids=["neither", "both"])
def test_an_example_is_a_conversation_or_a_text(arguments):
    with pytest.raises(ValueError, match="either messages or a text"):
        Example("here", **arguments)
