"""What a model is fine-tuned on: examples, and the JSON Lines files that hold them.

A file holds one JSON object per line. All of them have one of three formats:

    alpaca  {"instruction": "Add the numbers.", "input": "2 3", "output": "5"}      input is optional
    chat    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}
    text    {"text": "Two and three make five."}

The first record decides which format the file has; every line must fit it. More fields, all optional:

    alpaca  system: a message before the first; history: earlier turns, [["instruction", "output"], …]
    chat    system; tools, as the chat template takes them; in a message tool_calls, tool_call_id, name, the thoughts of
            an answer as reasoning_content, reasoning or thinking, and "weight": 0 for one that is not to be learned

A file with a mistake is refused, because nobody misses a line that is skipped in silence: the error names the file, the
line and the field. So is one with a field that elsewhere changes what is learned. Fields of other names are left alone;
an example tells which. Null is as good as no field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, TypeVar

from ..errors import UserError

T = TypeVar("T")
ROLES = ("system", "developer", "user", "assistant", "tool")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_FOR_TEMPLATES = (*_THOUGHTS, "tool_call_id", "name")  # strings in a message
# What other programs learn, see or leave out by these is not done here.
_REFUSED = {
    "weight", "loss", "loss_mask", "mask", "masked", "train", "training", "train_detail", "function_call", "functions",
    "documents", "chat_template", "chat_template_kwargs", "chosen", "rejected", "completion", "prefix",
    "image", "images", "video", "videos", "audio", "audios",
}  # fmt: skip
# How files begin that are given in place of JSON Lines.
_OTHER_FILES = {
    "\x1f\x8b": "a gzip archive",
    "PAR1": "Parquet",
    "[": "a JSON array (`jq -c .[]` makes JSON Lines of one)",
}
_TAKES = "--data takes a JSONL file on this machine, or 'stdlib'"
_READS = (
    '--data reads JSON Lines in UTF-8, one object per line: {"instruction": "…", "output": "…"} or '
    '{"messages": […]} or {"text": "…"}'
)

# Stanford Alpaca's prompt, with and without an input. A line break ends it: the answer starts a new token.
_TASK = "Below is an instruction that describes a task"
_ALPACA = (
    _TASK + ". Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    _TASK + ", paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: "system", "developer", "user", "assistant" or "tool".
        content: what is said.
        learned: whether an answer has a loss.
        fields: what else the chat template is given, by its names: "tool_calls", "reasoning_content", ...
    """

    role: str
    content: str
    learned: bool = True
    fields: dict[str, Any] = field(default_factory=dict)

    def said(self) -> list[tuple[str, str]]:
        """What a rendering of the message has to hold, after the name of the field."""
        thoughts = [(name, self.fields[name]) for name in _THOUGHTS if name in self.fields]
        names = [("name", self.fields["name"])] if "name" in self.fields and self.role != "tool" else []
        calls = [("tool_calls", call["function"]["name"]) for call in self.fields.get("tool_calls", ())]
        return [*names, *thoughts, ("content", self.content), *calls]


@dataclass(frozen=True)
class Example:
    """One thing to learn: a conversation or a plain text.

    Attributes:
        source: where it comes from, as "file.jsonl:12"; error messages and samples show it.
        messages: a conversation with at least one assistant turn. The loss is on those turns.
        text: a plain text. The loss is on all of it. An example has either messages or a text.
        plain_prompt: what stands before the answer when the tokenizer has no chat template. None for a conversation
            that was written as one: it needs the template.
        tools: that the assistant may call, for the chat template.
        unused: fields of the record that nothing was made of.
    """

    source: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    plain_prompt: str | None = None
    tools: list[dict[str, Any]] | None = None
    unused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.text is not None):
            raise ValueError("an example has either messages or a text")

    @classmethod
    def from_instruction(cls, instruction: str, answer: str, source: str, input: str = "") -> Example:  # noqa: A002
        """An instruction, with the input it applies to if there is one, and its answer."""
        has_input = bool(input.strip())
        template = _ALPACA_INPUT if has_input else _ALPACA
        request = f"{instruction}\n\n{input}" if has_input else instruction
        return cls(
            source=source,
            messages=(Message("user", request), Message("assistant", answer)),
            plain_prompt=template.format(instruction=instruction, input=input),
        )


def read_jsonl(path: str | PathLike[str], format: str | None = None) -> list[Example]:  # noqa: A002
    """Read the examples of a JSON Lines file, in UTF-8, with or without a byte order mark. Blank lines are skipped.

    Args:
        path: the file.
        format: "alpaca", "chat" or "text"; None takes the format of the first record.

    Returns:
        The examples in the order of the file; ``source`` is the path as given and the line, counted from 1.

    Raises:
        UserError: the file cannot be read, holds no record, or has a line that is not a record of its format.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"unknown format {format!r}; the formats are {', '.join(FORMATS)}")
    examples = []
    try:
        for source, line in _lines(path):
            record = _parse(source, line)
            record.format = format = format or _detect(record)  # noqa: A001
            example = FORMATS[format](record)
            examples.append(replace(example, unused=(*example.unused, *record.unused())))
    except _NoObject as error:
        if examples:
            raise
        found = next((f"is {kind}" for start, kind in _OTHER_FILES.items() if error.line.startswith(start)), None)
        found = found or f"starts with {error.line[:20]!r}"
        raise UserError(f"{error}, and the file {found}; {_READS}") from None
    if not examples:
        raise UserError(f"{path} holds no record")
    return examples


class _NoObject(UserError):
    """A line is not a JSON object. Where it is the first one, the file is probably no JSONL at all."""

    def __init__(self, source: str, what: str, line: str):
        super().__init__(f"{source}: {what}")
        self.line = line.strip(" \t\r\n")


class _Record:
    """A JSON object that is a line, or part of one. Its fields are checked as they are taken."""

    def __init__(self, source: str, value: Any, name: str = "") -> None:
        self.source = source
        self.name = name
        self.format: str | None = None
        if not isinstance(value, dict):
            raise self.error(f"{name} is {_kind(value)}, not a JSON object")
        self.fields: dict[str, Any] = {field: found for field, found in value.items() if found is not None}
        self.nulls = value.keys() - self.fields.keys()
        self.taken: set[str] = set()

    def error(self, what: str) -> UserError:
        return UserError(f"{self.source}: {what}")

    def path(self, field: str) -> str:
        return f"{self.name}.{field}" if self.name else field

    def field(self, field: str, kind: type[T]) -> T:
        name = self.path(field)
        self.taken.add(field)
        if field in self.nulls:
            raise self.error(f"field {name!r} is null, not {_KINDS[kind]}")
        if field not in self.fields:
            raise self.error(f"no field {name!r}" + (f"; the format is {self.format}" if self.format else ""))
        value = self.fields[field]
        if not isinstance(value, kind):
            raise self.error(f"field {name!r} is {_kind(value)}, not {_KINDS[kind]}")
        return value

    def string(self, field: str) -> str:
        """A field that is a string, and can be written as UTF-8."""
        value = self.field(field, str)
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can escape it, but no tokenizer takes it
            where = f"field {self.path(field)!r}, character {error.start + 1}"
            raise self.error(f"half a surrogate pair, which is no character ({where})") from error
        return value

    def filled(self, field: str) -> str:
        """A field that is a string with more than white space in it."""
        value = self.string(field)
        if not value.strip():
            raise self.error(f"field {self.path(field)!r} is empty")
        return value

    def optional(self, field: str, kind: type[T], default: T) -> T:
        return self.field(field, kind) if field in self.fields else default

    def unused(self) -> list[str]:
        """The fields that nobody took.

        Raises:
            UserError: one of them means something.
        """
        left = [name for name in self.fields if name not in self.taken]
        for name in left:
            if name in _REFUSED:
                raise self.error(f"field {self.path(name)!r} would change what is learned, and is not supported here")
        return left


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return fields


class _Twice(Exception):
    """A JSON object has a field twice; JSON readers disagree on which one counts."""


def _parse(source: str, line: str) -> _Record:
    try:
        value = json.loads(line.rstrip("\r\n"), object_pairs_hook=_unique)
    except _Twice as error:
        raise UserError(f"{source}: field {str(error)!r} is there twice in one object") from error
    except json.JSONDecodeError as error:
        raise _NoObject(source, f"not JSON: {error.msg} (column {error.colno})", line) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of open brackets
        raise UserError(f"{source}: not JSON that can be read: a number is too long, or a nesting too deep") from error
    if not isinstance(value, dict):
        raise _NoObject(source, f"the line is {_kind(value)}, not a JSON object", line)
    return _Record(source, value)


def _alpaca(record: _Record) -> Example:
    context = record.string("input") if "input" in record.fields else ""
    example = Example.from_instruction(record.filled("instruction"), record.filled("output"), record.source, context)
    system = record.string("system") if "system" in record.fields else ""
    before = [Message("system", system)] if system.strip() else []
    prompt = f"{system}\n\n{example.plain_prompt}" if before else example.plain_prompt
    history = record.optional("history", list, [])
    for i, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise record.error(f"history[{i}] is not [instruction, output]")
        turn = _Record(record.source, dict(zip(("instruction", "output"), pair, strict=True)), f"history[{i}]")
        before += [Message("user", turn.filled("instruction")), Message("assistant", turn.filled("output"))]
    return replace(example, messages=(*before, *example.messages), plain_prompt=None if history else prompt)


def _chat(record: _Record) -> Example:
    turns = record.field("messages", list)
    records = [_Record(record.source, turn, f"messages[{i}]") for i, turn in enumerate(turns)]
    messages = tuple(map(_message, records))
    if "system" in record.fields:
        messages = (Message("system", record.string("system")), *messages)
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise record.error("no message of the assistant, so there is nothing to learn")
    if not any(message.learned for message in messages if message.role == "assistant"):
        raise record.error("every message of the assistant has weight 0, so there is nothing to learn")
    if roles[0] == "assistant":
        raise record.error("the first message is the assistant's; there is nothing that it answers")
    tools = [_function(record, tool, f"tools[{i}]") for i, tool in enumerate(record.optional("tools", list, []))]
    unused = dict.fromkeys(f"messages.{name}" for one in records for name in one.unused())
    return Example(record.source, messages=messages, tools=tools or None, unused=tuple(unused))


def _message(record: _Record) -> Message:
    role = record.string("role")
    if role not in ROLES:
        raise record.error(f"{record.name} has the unknown role {role[:40]!r}; the roles are {', '.join(ROLES)}")
    fields: dict[str, Any] = {name: record.string(name) for name in _FOR_TEMPLATES if name in record.fields}
    is_answer = role == "assistant"
    calls = record.optional("tool_calls", list, []) if is_answer else []
    if calls:
        fields["tool_calls"] = [_function(record, call, f"tool_calls[{i}]") for i, call in enumerate(calls)]
    if calls and "content" not in record.fields:
        content = ""
    else:
        content = record.filled("content") if is_answer and not calls else record.string("content")
    return Message(role, content, _is_learned(record, is_answer), fields)


def _is_learned(record: _Record, is_answer: bool) -> bool:
    weight = record.optional("weight", object, 1)
    if "weight" in record.fields and weight not in ((0, 1) if is_answer else (0,)):
        allowed = "0 and 1 are" if is_answer else "only answers are learned, so 0 is"
        raise record.error(f"field {record.path('weight')!r} is {json.dumps(weight)[:40]}; {allowed} supported")
    return bool(weight)


def _function(record: _Record, value: Any, name: str) -> dict[str, Any]:
    """A tool, or the call of one, as templates take it: below "function", the arguments of a call as an object."""
    outer = _Record(record.source, value, record.path(name))
    inner = outer
    if "function" in outer.fields:
        inner = _Record(record.source, outer.field("function", dict), outer.path("function"))
    inner.filled("name")
    arguments = inner.fields.get("arguments", {})
    try:
        json.dumps(value, ensure_ascii=False).encode()
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments  # OpenAI writes text
    except ValueError:  # a UnicodeEncodeError is one
        parsed = None
    if not isinstance(parsed, dict):
        raise inner.error(f"field {inner.path('arguments')!r} is not an object, nor the text of one")
    function = inner.fields | ({"arguments": parsed} if "arguments" in inner.fields else {})
    return {"type": "function"} | (outer.fields if inner is not outer else {}) | {"function": function}


def _text(record: _Record) -> Example:
    return Example(record.source, text=record.filled("text"))


FORMATS: dict[str, Callable[[_Record], Example]] = {"alpaca": _alpaca, "chat": _chat, "text": _text}
# The first of these that a record has tells its format. Alpaca's own file has a field "text" too, so the order matters.
_TELLTALE = {"messages": "chat", "instruction": "alpaca", "output": "alpaca", "text": "text"}
_KINDS = {bool: "a boolean", str: "a string", list: "a list", dict: "an object", type(None): "null"}


def _detect(record: _Record) -> str:
    for telltale, name in _TELLTALE.items():
        if telltale in record.fields or telltale in record.nulls:
            return name
    raise record.error(
        "the format is unknown: no field 'messages' (chat), 'instruction' (alpaca) or 'text' (text)"
        + (f"; there is {', '.join(map(repr, record.fields))}"[:100] if record.fields else "")
    )


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    return _KINDS.get(type(value), "a number")


def _lines(path: str | PathLike[str]) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, each after its source. Only a line feed ends one: JSON strings may hold others."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                source = f"{path}:{number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    what = f"not UTF-8 (byte {error.start + 1} of the line)"
                    raise _NoObject(source, what, raw.decode("latin-1")) from error
                if line.strip():
                    yield source, line
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; {_TAKES}") from error
