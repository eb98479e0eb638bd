"""What a model is fine-tuned on: examples, and the JSON Lines files that hold them.

A file holds one JSON object per line, all in one of three formats:

    alpaca  {"instruction": "Add the numbers.", "input": "2 3", "output": "5"}      input is optional
    chat    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}
    text    {"text": "Two and three make five."}

Other fields are ignored. The first record decides which format the file has; every line must fit it. A file with a
mistake is refused, because a line that is skipped in silence is a line that nobody learns from: the error names the file,
the line and the field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

from .errors import UserError

ROLES = ("system", "user", "assistant")

# Stanford Alpaca's prompt, with and without an input; the QLoRA paper's experiments on Alpaca use it.
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
        template = _ALPACA_INPUT if input else _ALPACA
        request = f"{instruction}\n\n{input}" if input else instruction
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
    for source, line in _lines(path):
        record = _Record(source, line)
        format = format or _detect(record)  # noqa: A001
        examples.append(FORMATS[format](record))
    if not examples:
        raise UserError(f"{path} holds no record")
    return examples


class _Record:
    """One line as a JSON object, whose fields are checked as they are taken."""

    def __init__(self, source: str, line: str) -> None:
        self.source = source
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            if line.lstrip().startswith("["):
                raise self.error("a JSON array; give one JSON object per line") from error
            raise self.error(f"not JSON: {error.msg} (column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of open brackets
            raise self.error("not JSON that can be read: a number or a nesting is too long") from error
        self.fields = self.object(fields, "the line")

    def error(self, what: str) -> UserError:
        return UserError(f"{self.source}: {what}")

    def object(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(f"{name} is {_kind(value)}, not a JSON object")
        return value

    def string(self, field: str, fields: dict[str, Any] | None = None, prefix: str = "") -> str:
        """The field, which must be a string that can be written as UTF-8."""
        fields, name = self.fields if fields is None else fields, prefix + field
        if field not in fields:
            raise self.error(f"no field {name!r}")
        value = fields[field]
        if not isinstance(value, str):
            raise self.error(f"field {name!r} is {_kind(value)}, not a string")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can escape it, but no tokenizer takes it
            raise self.error(f"field {name!r} holds half a surrogate pair (character {error.start + 1})") from error
        return value

    def filled(self, field: str, fields: dict[str, Any] | None = None, prefix: str = "") -> str:
        """The field, which must be a string with more than white space in it."""
        value = self.string(field, fields, prefix)
        if not value.strip():
            raise self.error(f"field {prefix + field!r} is empty")
        return value


def _alpaca(record: _Record) -> Example:
    context = "" if record.fields.get("input") is None else record.string("input")
    return Example.from_instruction(record.filled("instruction"), record.filled("output"), record.source, context)


def _chat(record: _Record) -> Example:
    turns = record.fields.get("messages")
    if not isinstance(turns, list):
        raise record.error(f"field 'messages' is {_kind(turns)}, not a list" if turns else "no field 'messages'")
    messages = tuple(_message(record, turn, f"messages[{index}]") for index, turn in enumerate(turns))
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise record.error("no message of the assistant, so there is nothing to learn")
    if roles[0] == "assistant":
        raise record.error("the first message is the assistant's; there is nothing that it answers")
    return Example(record.source, messages=messages)


def _message(record: _Record, turn: Any, name: str) -> Message:
    fields = record.object(turn, name)
    role = record.string("role", fields, f"{name}.")
    if role not in ROLES:
        raise record.error(f"{name} has the unknown role {role[:40]!r}; the roles are {', '.join(ROLES)}")
    take = record.filled if role == "assistant" else record.string
    return Message(role, take("content", fields, f"{name}."))


def _text(record: _Record) -> Example:
    return Example(record.source, text=record.filled("text"))


FORMATS: dict[str, Callable[[_Record], Example]] = {"alpaca": _alpaca, "chat": _chat, "text": _text}
_TELLTALE = {"messages": "chat", "instruction": "alpaca", "output": "alpaca", "text": "text"}


def _detect(record: _Record) -> str:
    """The format of a record. Alpaca's own file has a field "text" too, so the order matters."""
    for field, name in _TELLTALE.items():
        if field in record.fields:
            return name
    raise record.error("no field 'messages' (chat), 'instruction' (alpaca) or 'text' (text), so the format is unknown")


def _lines(path: str | PathLike[str]) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, each after its source. Only a line feed ends a line: JSON strings may hold others."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                source = f"{path}:{number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{source}: not UTF-8 (byte {error.start + 1} of the line)") from error
                if line.strip():
                    yield source, line
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None:
        return "null"
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
