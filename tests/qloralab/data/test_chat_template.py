"""Templates of the shapes that models come with: the answers and their ends are learned, behind the prompt for them."""

from __future__ import annotations

from itertools import groupby

import pytest

from qloralab.data.chat_template import ChatTemplate
from qloralab.data.encoding import Encoded, encode_all
from qloralab.data.examples import Example, Message

TURNS = "{% for m in messages %}"
TEMPLATES = {
    # what it is like: special tokens, the last one the tokenizer's eos; the template
    "chatml": (
        "<|im_start|> <|im_end|>",
        TURNS + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "llama-3": (
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|end_of_text|> <|eot_id|>",
        "<|begin_of_text|>"
        + TURNS
        + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    "mistral": (
        "<s> </s>",
        "<s>"
        + TURNS
        + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}"
        "{% endfor %}",
    ),
    "gemma": (
        "<bos> <start_of_turn> <end_of_turn> <eos>",
        "<bos>" + TURNS + "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
    "phi-3": (
        "<|user|> <|assistant|> <|end|> <|endoftext|>",
        TURNS + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
    ),
    "qwen3": (
        "<|im_start|> <|endoftext|> <|im_end|>",
        TURNS + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
        "{% set thought = parts[0].replace('<think>', '').strip() if parts[1:] else '' %}"
        "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ parts[-1].lstrip('\n') }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "gpt-oss": (
        "<|start|> <|channel|> <|message|> <|end|> <|return|>",
        TURNS
        + "<|start|>{{ m.role }}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}<|channel|>analysis"
        "<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}<|channel|>final{% endif %}<|message|>"
        "{{ m.content }}{% if m.role == 'assistant' and loop.last and not add_generation_prompt %}<|return|>"
        "{% else %}<|end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    ),
    "glm-4-moe": (
        "[gMASK] <sop> <|user|> <|assistant|> <|endoftext|>",
        "[gMASK]<sop>" + TURNS + "<|{{ m.role }}|>\n{{ '<think></think>\n' if m.role == 'assistant' }}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ),
    "deepseek-r1": (
        "<bos> <|User|> <|Assistant|> <eos>",
        "<bos>" + TURNS + "{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1].strip() }}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
    ),
    "parts": (
        "<|im_start|> <|im_end|>",
        TURNS
        + "<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "generation": (
        "<|im_start|> <|im_end|>",
        TURNS
        + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "no end": (
        "<eos>",
        TURNS + "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    ),
}
FIRST, SECOND = "It is 5.", "Now 9,\n  *naturally*. é"
# What is learned of a conversation with these two answers: a list for each string that it becomes.
LEARNED = {
    "chatml": [["It is 5.<|im_end|>", SECOND + "<|im_end|>"]],
    "llama-3": [["It is 5.<|eot_id|>", SECOND + "<|eot_id|>"]],
    "mistral": [[" It is 5.</s>", f" {SECOND}</s>"]],
    "gemma": [["It is 5.<end_of_turn>", SECOND + "<end_of_turn>"]],
    "phi-3": [["It is 5.<|end|>", SECOND + "<|end|>"]],
    "qwen3": [[f"<think>\n\n</think>\n\n{answer}<|im_end|>"] for answer in (FIRST, SECOND)],
    "gpt-oss": [[f"<|channel|>final<|message|>{answer}<|return|>"] for answer in (FIRST, SECOND)],
    "glm-4-moe": [[f"\n<think></think>\n{answer}<|endoftext|>"] for answer in (FIRST, SECOND)],
    "parts": [["It is 5.<|im_end|>", SECOND + "<|im_end|>"]],
    "generation": [["It is 5.<|im_end|>", SECOND + "<|im_end|>"]],
    "no end": [["It is 5.<eos>"], [SECOND + "<eos>"]],
}
THOUGHT = "<think>\nhm\n</think>\n\n"
LEARNED_WITH_THOUGHTS = {
    "chatml": [[f"{THOUGHT}It is 5.<|im_end|>", f"{THOUGHT}{SECOND}<|im_end|>"]],
    "qwen3": [[f"{THOUGHT}{answer}<|im_end|>"] for answer in (FIRST, SECOND)],
    "deepseek-r1": [[THOUGHT[len("<think>\n") :] + answer + "<eos>"] for answer in (FIRST, SECOND)],
    "generation": [[f"{THOUGHT}It is 5.<|im_end|>", f"{THOUGHT}{SECOND}<|im_end|>"]],
}
CASES = [(name, FIRST, SECOND, expected) for name, expected in LEARNED.items()]
CASES += [(name, THOUGHT + FIRST, THOUGHT + SECOND, expected) for name, expected in LEARNED_WITH_THOUGHTS.items()]


def encode(example: Example, tokenizer) -> list[Encoded]:
    """One example, however long."""
    return encode_all([example], tokenizer, 10**6)


@pytest.fixture
def make(byte_tokenizer):
    """The tokenizer with a template: ``make("phi-3")``."""

    def tokenizer(name: str):
        special, template = TEMPLATES[name]
        return byte_tokenizer(template, special.split(), special.split()[-1])

    return tokenizer


def conversation(*contents: str, **fields) -> Example:
    """Turns of a user and an assistant; the fields are those of the last one."""
    turns = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    turns[-1] = Message(turns[-1].role, turns[-1].content, fields=fields)
    return Example("data.jsonl:1", tuple(turns))


def learned(encoded, tokenizer) -> list[str]:
    """The labelled stretches of an example, as texts."""
    pairs = groupby(zip(encoded.input_ids, encoded.labels, strict=True), key=lambda pair: pair[1] != -100)
    return [tokenizer.decode([label for _, label in run]) for labelled, run in pairs if labelled]


@pytest.mark.parametrize(("name", "first", "second", "expected"), CASES)
def test_the_answers_and_their_ends_are_learned(make, name, first, second, expected):
    tokenizer = make(name)
    encoded = encode(conversation("2 + 3?", first, "And 4?", second), tokenizer)
    assert [learned(one, tokenizer) for one in encoded] == expected


@pytest.mark.parametrize(("name", "first", "second", "expected"), CASES)
def test_the_model_is_trained_behind_the_prompt_that_it_will_get(make, name, first, second, expected):
    tokenizer, example = make(name), conversation("2 + 3?", first, "And 4?", second)
    template = ChatTemplate(tokenizer)
    prompts = [tokenizer(template.prompt(example, i), add_special_tokens=False).input_ids for i in (1, 3)]
    trained = [one for one in encode(example, tokenizer) for _ in learned(one, tokenizer)]
    for prompt, one in zip(prompts, trained, strict=True):
        assert one.input_ids[: len(prompt)] == prompt
        assert one.labels[len(prompt) - 1] == -100
        assert one.labels[len(prompt)] != -100


@pytest.mark.parametrize(("name", "end"), [(name, case[-1][-1]) for name, case in LEARNED.items()])
def test_the_end_of_an_answer(make, name, end):
    (found,) = ChatTemplate(make(name)).ends()
    assert end.endswith(found)


def test_an_answer_that_is_not_to_be_learned(make):
    tokenizer, example = make("chatml"), conversation("a", "one", "b", "two", "c", "three")
    messages = [Message(m.role, m.content, m.content == "two") for m in example.messages]
    (encoded,) = encode(Example("here", tuple(messages)), tokenizer)
    assert learned(encoded, tokenizer) == ["two<|im_end|>"]
    assert "three" not in tokenizer.decode(encoded.input_ids)


def test_thoughts_in_a_field_of_their_own(make):
    tokenizer = make("gpt-oss")
    (encoded,) = encode(conversation("a", "b", thinking="hm"), tokenizer)
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    assert learned(encoded, tokenizer) == [f"{thought}<|channel|>final<|message|>b<|return|>"]


def test_tools_and_their_calls(byte_tokenizer):
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}" + TURNS + "<|start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    tokenizer, messages = byte_tokenizer(template), conversation("a", "", tool_calls=[call]).messages
    (encoded,) = encode(Example("here", messages, tools=tools), tokenizer)
    assert learned(encoded, tokenizer) == ['{"name": "add", "arguments": {"a": 2}}<|end|>']
    assert tokenizer.decode(encoded.input_ids).startswith('[{"type": "function"')


DROPPED = "data.jsonl:1: the tokenizer's chat template drops "
CALL = {"type": "function", "function": {"name": "add", "arguments": {}}}
LOSSES = {
    "an answer": ("{{ m.content if m.role == 'user' }}", {}, "the assistant's content: 'an answer'"),
    "a question": ("{{ m.content if m.role != 'user' }}", {}, "the user's content: 'a question'"),
    "half of it": ("{{ m.content.split()[0] }}", {}, "the user's content: 'a question'"),
    "thoughts": ("{{ m.content }}", {"reasoning_content": "hm"}, "the assistant's reasoning_content: 'hm'"),
    "a call": ("{{ m.content }}", {"tool_calls": [CALL]}, "the assistant's tool_calls: 'add'"),
    "a name": ("{{ m.content }}", {"name": "Bob"}, "the assistant's name: 'Bob'"),
}  # fmt: skip


@pytest.mark.parametrize(("written", "fields", "expected"), LOSSES.values(), ids=LOSSES)
def test_what_a_template_drops_is_said(byte_tokenizer, refusal, written, fields, expected):
    template = TURNS + f"<|start|>{{{{ m.role }}}}\n{written}<|end|>{{% endfor %}}"
    template += "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    example = conversation("a question", "an answer", **fields)
    assert refusal(encode, example, byte_tokenizer(template)) == DROPPED + expected


def test_tools_that_a_template_drops(make, refusal):
    example = Example(
        "data.jsonl:1", conversation("a", "b").messages, tools=[{"type": "function", "function": {"name": "add"}}]
    )
    assert refusal(encode, example, make("chatml")) == DROPPED + "tools: 'add'"


def test_a_prompt_for_a_thought_wants_one(make, refusal):
    expected = (
        "data.jsonl:1: the tokenizer's chat template writes an answer without the prompt for it, "
        "or a turn differently once others follow, so the answers cannot be told from the rest"
    )
    assert refusal(encode, conversation("a", "b"), make("deepseek-r1")) == expected


def test_an_end_is_needed(byte_tokenizer, refusal):
    tokenizer = byte_tokenizer(TEMPLATES["no end"][1], [], None)
    expected = "data.jsonl:1: neither the chat template nor the tokenizer has a token that ends an answer"
    assert refusal(encode, conversation("a", "b"), tokenizer) == expected
    assert ChatTemplate(tokenizer).ends() == set()


def test_an_answer_may_end_with_a_special_token(make):
    tokenizer = make("phi-3")
    encoded = encode(conversation("a", "say <|end|>", "b", "or <|user|>"), tokenizer)
    assert [learned(one, tokenizer) for one in encoded] == [["say <|end|><|end|>", "or <|user|><|end|>"]]
