"""What a model is fine-tuned on: examples, and the JSON Lines files that hold them.

A file holds one JSON object per line. All of them have one of three formats:

    alpaca  {"instruction": "Add the numbers.", "input": "2 3", "output": "5"}      input is optional
    chat    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}
    text    {"text": "Two and three make five."}

Other fields are ignored. The first record decides which format the file has; every line must fit it. A file with a
mistake is refused, because nobody misses a line that is skipped in silence: the error names the file, the line and the
field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from os.path import isfile
from typing import Any, TypeVar

from .errors import UserError
from .file_kinds import kind_of

T = TypeVar("T")
ROLES = ("system", "user", "assistant")
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
        role: "system", "user" or "assistant".
        content: what is said.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One thing to learn: a conversation or a plain text.

    Attributes:
        source: where it comes from, as "file.jsonl:12"; error messages and samples show it.
        messages: a conversation with at least one assistant turn. The loss is on those turns.
        text: a plain text. The loss is on all of it. An example has either messages or a text.
        plain_prompt: what stands before the answer when the tokenizer has no chat template. None for a conversation
            that was written as one: it needs the template.
    """

    source: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    plain_prompt: str | None = None

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
            examples.append(FORMATS[format](record))
    except _NoObject as error:
        raise error if examples else _no_json_lines(path, error) from None
    if not examples:
        raise UserError(f"{path} holds no record")
    return examples


class _NoObject(UserError):
    """A line is not a JSON object. Where it is the first one, the file is probably no JSONL at all."""


def _no_json_lines(path: str | PathLike[str], error: _NoObject) -> UserError:
    kind = kind_of(path) if isfile(path) else None  # what came through a pipe is gone
    return UserError(f"{path} looks like {kind}; {_READS}" if kind else f"{error}; {_READS}")


class _Record:
    """A JSON object that is a line, or part of one. Its fields are checked as they are taken."""

    def __init__(self, source: str, value: Any, name: str = "") -> None:
        self.source = source
        self.name = name
        self.format: str | None = None
        if not isinstance(value, dict):
            raise (UserError if name else _NoObject)(
                f"{source}: {name or 'the line'} is {_kind(value)}, not a JSON object"
            )
        self.fields: dict[str, Any] = value

    def error(self, what: str) -> UserError:
        return UserError(f"{self.source}: {what}")

    def path(self, field: str) -> str:
        return f"{self.name}.{field}" if self.name else field

    def field(self, field: str, kind: type[T]) -> T:
        name = self.path(field)
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


def _parse(source: str, line: str) -> _Record:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise _NoObject(f"{source}: not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of open brackets
        raise UserError(f"{source}: not JSON that can be read: a number is too long, or a nesting too deep") from error
    return _Record(source, value)


def _alpaca(record: _Record) -> Example:
    context = "" if record.fields.get("input") is None else record.string("input")
    return Example.from_instruction(record.filled("instruction"), record.filled("output"), record.source, context)


def _chat(record: _Record) -> Example:
    turns = record.field("messages", list)
    messages = tuple(_message(_Record(record.source, turn, f"messages[{i}]")) for i, turn in enumerate(turns))
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise record.error("no message of the assistant, so there is nothing to learn")
    if roles[0] == "assistant":
        raise record.error("the first message is the assistant's; there is nothing that it answers")
    return Example(record.source, messages=messages)


def _message(record: _Record) -> Message:
    role = record.string("role")
    if role not in ROLES:
        raise record.error(f"{record.name} has the unknown role {role[:40]!r}; the roles are {', '.join(ROLES)}")
    return Message(role, record.filled("content") if role == "assistant" else record.string("content"))


def _text(record: _Record) -> Example:
    return Example(record.source, text=record.filled("text"))


FORMATS: dict[str, Callable[[_Record], Example]] = {"alpaca": _alpaca, "chat": _chat, "text": _text}
# The first of these that a record has tells its format. Alpaca's own file has a field "text" too, so the order matters.
_TELLTALE = {"messages": "chat", "instruction": "alpaca", "output": "alpaca", "text": "text"}
_KINDS = {bool: "a boolean", str: "a string", list: "a list", dict: "an object", type(None): "null"}


def _detect(record: _Record) -> str:
    for field, name in _TELLTALE.items():
        if field in record.fields:
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
                    raise _NoObject(f"{source}: not UTF-8 (byte {error.start + 1} of the line)") from error
                if line.strip():
                    yield source, line
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; {_TAKES}") from error
