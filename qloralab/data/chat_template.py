"""What a chat template makes of a conversation: strings, the answers in them, and the token that ends an answer.

    <|im_start|>user⏎What is 2 + 3?<|im_end|>⏎<|im_start|>assistant⏎5<|im_end|>⏎
                                                                    └────┬────┘
                                                           the answer and its end

Templates do not say where an answer is, so it is told from what they write:

* Where a template marks the answers with ``{% generation %}``, there they are.
* Otherwise the template is rendered on the messages before the answer, with the prompt for an answer, and on those
  including it. Without the special tokens that the second ends with, both have to be beginnings of the whole.
* The first special token behind an answer is its end. What a template writes only behind the last message (Phi-3's
  ``<|endoftext|>``) is not. Where it writes none (GLM-4.5), the tokenizer's eos token ends the answer.

A conversation is one string when that works for all its answers and they have one end. Some templates write a turn
differently once others follow: they drop its thoughts (Qwen3), or end it with another token (gpt-oss). Then each answer
gets a string of its own, in which it comes last, as it does when the model is used.

A template that prompts for a thought and drops the thoughts of all answers (DeepSeek-R1) never writes what the model
is to say; there the prompt, the answer and its end are put together here.

Whatever the way: what a message says has to be found in what was written, or the example is refused.

What becomes of a conversation with two answers, by the kind of template (``test_chat_template.py``):

=====================================  =============================================================================
ChatML, Llama 3, Mistral, Gemma        one example; both answers with their ends
Phi-3                                  one example; ``<|end|>`` is learned, the ``<|endoftext|>`` behind the last is not
Qwen3                                  an example for each answer, with its thought or the empty one
gpt-oss                                an example for each answer, its channels included, up to ``<|return|>``
GLM-4.5                                an example for each answer, with the eos token as its end
DeepSeek-R1                            an example for each answer, with its thought; without one it is refused
content as a list of parts (VLMs)      one example; strings are given as parts
``{% generation %}``                   one example; the blocks, and the end behind each
no special tokens                      an example for each answer, with the eos token as its end
=====================================  =============================================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ..errors import UserError
from .examples import Example, Message

Span = tuple[int, int]  # characters [start, end)
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class Written:
    """An example as one string.

    Attributes:
        text: of the whole, special tokens included.
        answers: where the answers with their ends are, ascending.
        source: of the example.
    """

    text: str
    answers: list[Span]
    source: str


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: of transformers, with a chat template.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = tuple({*added, *tokenizer.all_special_tokens})
        longest_first = sorted(self._special, key=len, reverse=True)
        self._end = re.compile(rf"\s*({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        self._parts = False
        if not self._writes_content():  # that of models that see pictures takes a list of parts
            self._parts = True
            self._parts = self._writes_content()

    def write(self, example: Example) -> list[Written]:
        """A conversation as one string, or one for each answer that is learned; see the module.

        Raises:
            UserError: the template refuses the messages, drops what one says, or its answers cannot be told.
        """
        learned = [i for i, message in enumerate(example.messages) if message.role == "assistant" and message.learned]
        try:
            return [self._find(example, learned)]
        except UserError:
            if len(learned) == 1:
                raise
        return [self._find(example, [index]) for index in learned]

    def prompt(self, example: Example, count: int) -> str:
        """The first messages of a conversation, and the prompt for an answer to them."""
        return self._render(example, count, add_generation_prompt=True)

    def ends(self) -> set[str]:
        """The token that the template ends an answer with, if it takes a question and an answer."""
        try:
            written = self._find(Example("", (Message("user", "2 + 3?"), Message("assistant", "5"))), [1])
        except UserError:
            return set()
        said = written.text[: written.answers[0][1]]
        return {token for token in self._special if said.endswith(token)}

    def _find(self, example: Example, learned: Sequence[int]) -> Written:
        """One string of the messages up to the last answer that is learned: nothing is learned from what follows."""
        messages = example.messages[: learned[-1] + 1]
        text = self._render(example, len(messages))
        _check_written(example, [m for m in messages if m.role != "assistant"], text, example.tools)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        blocks = self._blocks(example, len(messages))
        spans, ends = [], set()
        for index in learned:
            if len(blocks) == len(answers):
                start, stop = blocks[answers.index(index)]
                core = self._without_end(text[:stop], messages[index])
            else:
                before = self.prompt(example, index)
                after = text if index == learned[-1] else self._render(example, index + 1)
                core = self._without_end(after, messages[index])
                if not (text.startswith(core) and core.startswith(before)):
                    return self._resumed(example, learned, before, after)
                start = len(before)
            end = self._end.match(text, len(core))
            ends.add(end and end[1])
            if len(learned) > 1 and (end is None or len(ends) > 1):
                raise self._differs(example)
            if end is None:
                text = core + self._eos(example)
            spans.append((start, end.end() if end else len(text)))
            _check_written(example, [messages[index]], text[slice(*spans[-1])])
        return Written(text, spans, example.source)

    def _resumed(self, example: Example, learned: Sequence[int], before: str, after: str) -> Written:
        """The answer goes on with what the prompt for it ends with: a thought that the template would drop."""
        message, prompt = example.messages[learned[0]], before.rstrip()
        shared = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
        said = message.content.strip()
        for size in range(max(1, len(prompt) - shared), len(prompt) + 1):
            if len(learned) == 1 and said.startswith(prompt[-size:]) and not message.fields:
                end = self._end.match(after, len(self._without_end(after, message)))
                text = before + said[size:].lstrip() + (end[1] if end else self._eos(example))
                return Written(text, [(len(before), len(text))], example.source)
        _check_written(example, [message], after)
        raise self._differs(example)

    @staticmethod
    def _differs(example: Example) -> UserError:
        return UserError(
            f"{example.source}: the tokenizer's chat template writes an answer without the prompt for it, "
            "or a turn differently once others follow, so the answers cannot be told from the rest"
        )

    def _without_end(self, text: str, message: Message) -> str:
        """Without the special tokens and the white space that it ends with, those of the answer itself excepted."""
        tail, own = self._tail(text), len(self._tail(message.content))
        return text[: tail[own]].rstrip() if len(tail) > own else text.rstrip()

    def _tail(self, text: str) -> list[int]:
        """Where the special tokens begin that a text ends with, white space aside."""
        starts: list[int] = []
        text = text.rstrip()
        while text.endswith(self._special):
            text = text[: -max(len(token) for token in self._special if text.endswith(token))]
            starts.insert(0, len(text))
            text = text.rstrip()
        return starts

    def _eos(self, example: Example) -> str:
        if self._tokenizer.eos_token is None:
            raise UserError(
                f"{example.source}: neither the chat template nor the tokenizer has a token that ends an answer"
            )
        return self._tokenizer.eos_token

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        turns = []
        for message in messages:
            content = [{"type": "text", "text": message.content}] if self._parts else message.content
            turns.append({"role": message.role, "content": content, **message.fields})
        return turns

    def _render(self, example: Example, count: int, **options: Any) -> str:
        turns = self._turns(example.messages[:count])
        try:
            return self._tokenizer.apply_chat_template(turns, tools=example.tools, tokenize=False, **options)
        except (
            TemplateError,
            ValueError,
            TypeError,
        ) as error:  # often: a role or an order that the model does not know
            why = " ".join(str(error).split())
            raise UserError(f"{example.source}: the tokenizer's chat template refuses the messages: {why}") from error

    def _blocks(self, example: Example, count: int) -> list[Span]:
        """What the template marks as answers, if it does."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._tokenizer.get_chat_template(tools=example.tools)
        if not _GENERATION.search(template):
            return []
        _, blocks = render_jinja_template(
            [self._turns(example.messages[:count])],
            tools=example.tools,  # pyright: ignore[reportArgumentType]
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return [(int(start), int(stop)) for start, stop in blocks[0]]

    def _writes_content(self) -> bool:
        try:
            return "2 + 3?" in self._render(Example("", (Message("user", "2 + 3?"),)), 1)
        except UserError:
            return False


def _check_written(
    example: Example, messages: Sequence[Message], text: str, tools: Sequence[dict[str, Any]] | None = None
) -> None:
    """Whether a text holds what messages say, white space aside: templates trim it, and write line breaks anew."""
    said = [(f"the {message.role}'s {name}", piece) for message in messages for name, piece in message.said()]
    said += [("tools", (tool.get("function") or tool).get("name", "")) for tool in tools or ()]
    for name, piece in said:
        if piece.strip() in text:
            continue
        quoted = (json.dumps(piece, ensure_ascii=ascii)[1:-1] for ascii in (True, False))  # noqa: A001
        if not any(_squeezed(one) in _squeezed(text) for one in (piece, *quoted)):
            raise UserError(f"{example.source}: the tokenizer's chat template drops {name}: {piece.strip()[:40]!r}")


def _squeezed(text: str) -> str:
    return "".join(text.split())
