"""The loss is on the answer only, to the character; the tokens are those of the whole; limits are told before training.

The tokenizer here has one token per byte, a few special tokens and one merge, so that every expectation can be read.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qloralab.data import encoding as module
from qloralab.data.encoding import NO_LABEL, encode_all, prompt_text
from qloralab.data.examples import Example, Message

CHATML = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message.role + '\n' + message.content + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(
    template: str | None = CHATML, adds_bos: bool = False, eos: str | None = "<|end|>", trim_offsets: bool = False
) -> Any:
    """One token per byte, but two line breaks are one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "<|start|>", "<|end|>")])
    steps: list[Any] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if adds_bos:
        bos = tokenizer.token_to_id("<s>")
        steps.append(processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]))
    tokenizer.post_processor = processors.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def chat(*contents, roles=("user", "assistant"), source="data.jsonl:1"):
    """A conversation that takes turns."""
    return Example(source, tuple(Message(roles[index % len(roles)], one) for index, one in enumerate(contents)))


def encode(example, tokenizer):
    """An example that is written at once."""
    (encoded,) = encode_all([example], tokenizer, 10**6)
    return encoded


def text_of(encoded, tokenizer):
    return tokenizer.decode(encoded.input_ids)


def answers(encoded, tokenizer):
    """The labelled stretches of an example, as texts."""
    stretches, previous = [], NO_LABEL
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (NO_LABEL, token)
        if label != NO_LABEL:
            if previous == NO_LABEL:
                stretches.append([])
            stretches[-1].append(label)
        previous = label
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize(
    ("contents", "roles", "expected"),
    [
        (("2 + 3?", "5"), "ua", ["5"]),
        (("a", "b", "c", "d"), "ua", ["b", "d"]),
        (("a", "b", "c"), "uaa", ["b", "c"]),
        (("assistant\n5<|end|>", "5"), "ua", ["5"]),
        (("é", "🙂é"), "ua", ["🙂é"]),  # characters of several tokens
    ],
    ids=["one", "every", "two in a row", "also in the question", "bytes"],
)
def test_the_answers_are_learned_and_the_whole_is_written(tokenizer, contents, roles, expected):
    example = chat(*contents, roles=[{"u": "user", "a": "assistant"}[role] for role in roles])
    encoded = encode(example, tokenizer)
    whole = "".join(f"<|start|>{one.role}\n{one.content}<|end|>\n" for one in example.messages)
    assert text_of(encoded, tokenizer) == whole
    assert answers(encoded, tokenizer) == [f"{answer}<|end|>" for answer in expected]
    assert encoded.source == "data.jsonl:1"
    last = len(f"{expected[-1]}<|end|>\n".encode()) - len("<|end|>\n") + 2  # bytes, the end and a line break
    assert [label != NO_LABEL for label in encoded.labels[-last:]] == [True] * (last - 1) + [False]


def test_what_follows_the_last_answer_is_left_out(tokenizer):
    assert encode(chat("a", "b", "c"), tokenizer) == encode(chat("a", "b"), tokenizer)


def test_the_tokens_are_those_of_the_whole(tokenizer):
    encoded = encode(chat("a", "\nb"), tokenizer)  # the template's line break and the answer's are one token
    whole = "<|start|>user\na<|end|>\n<|start|>assistant\n\nb<|end|>\n"
    assert encoded.input_ids == tokenizer(whole, add_special_tokens=False).input_ids
    assert answers(encoded, tokenizer) == ["\n\nb<|end|>"]


def test_offsets_that_leave_out_spaces():
    tokenizer = tiny_tokenizer(trim_offsets=True)
    assert answers(encode(chat(" a ", " b c "), tokenizer), tokenizer)[-1].endswith("b c <|end|>")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(st.lists(TEXTS, min_size=2, max_size=6))
def test_labels_are_the_answers_of_any_conversation(contents):
    tokenizer = tiny_tokenizer()
    contents = [f"[{content}]" for content in contents]  # no line break that the template's could merge with
    expected = [content + "<|end|>" for content in contents[1::2]]
    assert answers(encode(chat(*contents), tokenizer), tokenizer) == expected


def test_a_template_writes_the_only_bos():
    tokenizer = tiny_tokenizer("{{ bos_token }}" + CHATML, adds_bos=True)
    encoded = encode(chat("a", "b"), tokenizer)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    assert text_of(encoded, tokenizer).startswith("<s><|start|>user")


@pytest.mark.parametrize("text", ["ab", "<s>ab", "ab<|end|>", "<s>ab<|end|>"])
def test_a_text_has_one_bos_and_one_eos(text):
    tokenizer = tiny_tokenizer(adds_bos=True)
    encoded = encode(Example("t:1", text=text), tokenizer)
    assert text_of(encoded, tokenizer) == "<s>ab<|end|>"
    assert encoded.labels == encoded.input_ids, "a text is learned whole"


@pytest.mark.parametrize("adds_bos", [False, True])
def test_an_instruction_without_chat_template(adds_bos):
    tokenizer = tiny_tokenizer(None, adds_bos)
    example = Example.from_instruction("Add.", "5", "a:1", input="2 3")
    encoded = encode(example, tokenizer)
    start = "<s>" if adds_bos else ""
    assert text_of(encoded, tokenizer) == f"{start}{example.plain_prompt}5<|end|>"
    assert answers(encoded, tokenizer) == ["5<|end|>"]


def test_an_instruction_with_chat_template(tokenizer):
    example = Example.from_instruction("Add.", "5", "a:1", input="2 3")
    assert encode(example, tokenizer).input_ids == encode(chat("Add.\n\n2 3", "5"), tokenizer).input_ids


CHANGES = "^data.jsonl:1: the tokenizer's chat template writes "
# a template, a conversation or a text -> what is said
REFUSED = {
    "no template": (
        None,
        chat("a", "b"),
        "^data.jsonl:1: a conversation, but the tokenizer has no chat template to write it with$",
    ),
    "counts messages": ("{{ messages | length }}" + CHATML, chat(*"abcd"), CHANGES),
    "drops history": (
        CHATML.replace("message.content", "(message.content if loop.last else '')"),
        chat(*"abcd"),
        CHANGES,
    ),
    "prompts for a thought": (CHATML.replace("assistant\n'", "assistant\n<think>'"), chat(*"abcd"), CHANGES),
    "refuses a role": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No\nsystem.') }}{% endif %}" + CHATML,
        chat(*"abc", roles=("system", "user", "assistant")),
        "^data.jsonl:1: the tokenizer's chat template refuses the messages: No system.$",
    ),
    "no eos": (CHATML, Example("t:1", text="a"), "no eos token"),
    "no offsets": (CHATML, chat("a", "b"), "which characters a token holds"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_encoded_is_one_line(monkeypatch, refusal, case):
    template, example, expected = REFUSED[case]
    tokenizer = tiny_tokenizer(template, eos=None if case == "no eos" else "<|end|>")
    if case == "no offsets":
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert re.search(expected, refusal(encode, example, tokenizer))


def test_prompt_with_and_without_chat_template(tokenizer):
    prompt = prompt_text("a", tokenizer)
    assert prompt == "<|start|>user\na<|end|>\n<|start|>assistant\n"
    example = Example.from_instruction("Add.", "5", "a:1")
    assert prompt_text("Add.", tiny_tokenizer(None, adds_bos=True)) == f"<s>{example.plain_prompt}"


LONG = [Example(f"t:{length}", text="x" * length) for length in (3, 9, 5, 12)]  # and eos: 4, 10, 6, 13 tokens


@pytest.mark.parametrize(("chunk", "expected"), [(2, [2, 4]), (3, [3, 4]), (4, [4]), (9, [4])])
def test_progress_counts_the_examples(tokenizer, monkeypatch, chunk, expected):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    seen: list[tuple[int, int]] = []
    kept = encode_all(LONG, tokenizer, 6, "skip", lambda done, total: seen.append((done, total)))
    assert [one.source for one in kept] == ["t:3", "t:5"]
    assert seen == [(done, 4) for done in expected]


GIVE = "t:9: 10 tokens, and the limit is 6; 2 of 4 examples are too long. "
TOO_LONG = {
    "error": ((LONG, 6), GIVE + "Give --max-length 13 to keep them all, or --too-long skip|cut"),
    "positions": ((LONG, 100, "error", None, 6), GIVE + "The model has 6 positions: give --too-long skip|cut"),
    "none left, skip": (([chat("a", "b")], 5, "skip"), "none of the 1 examples has an answer within --max-length 5"),
    "none left, cut": (([chat("a", "b")], 5, "cut"), "none of the 1 examples has an answer within --max-length 5"),
    "first token": ((LONG[:1], 1, "cut"), "none of the 1 examples has an answer within --max-length 1"),
    "another way": ((LONG, 6, "drop"), "unknown way 'drop' to treat long examples; --too-long takes error, skip, cut"),
}


@pytest.mark.parametrize(("arguments", "expected"), TOO_LONG.values(), ids=TOO_LONG)
def test_too_long_is_one_line(tokenizer, refusal, arguments, expected):
    examples, *limits = arguments
    assert refusal(encode_all, examples, tokenizer, *limits) == expected


def test_too_long_are_skipped_and_the_limit_is_not(tokenizer):
    assert [one.source for one in encode_all(LONG, tokenizer, 6, "skip")] == ["t:3", "t:5"]
    assert encode_all(LONG, tokenizer, 13) == [encode(example, tokenizer) for example in LONG]


def test_too_long_are_cut(tokenizer):
    whole, cut = (encode_all(LONG, tokenizer, length, "cut") for length in (13, 6))
    assert [one.source for one in cut] == ["t:3", "t:9", "t:5", "t:12"]
    assert [one.input_ids for one in cut] == [one.input_ids[:6] for one in whole]
    assert [one.labels for one in cut] == [one.labels[:6] for one in whole]


def test_cut_before_the_answer_is_left_out(tokenizer):
    examples = [chat("x" * 50, "b", source="long"), chat("a", "b" * 50, source="long answer"), chat("a", "b")]
    kept = encode_all(examples, tokenizer, 40, "cut")
    assert [one.source for one in kept] == ["long answer", "data.jsonl:1"]
    assert [len(one.input_ids) for one in kept] == [40, len(encode(examples[2], tokenizer).input_ids)]


def test_the_answers_of_a_conversation_stay_or_go_together():
    """A template that drops earlier answers makes a string of each."""
    written = "(message.content if loop.last or message.role == 'user' else '')"
    tokenizer = tiny_tokenizer(CHATML.replace("message.content", written))
    example = chat("a", "b", "c", "d" * 20)
    first, second = encode_all([example], tokenizer, 10**6)
    assert [answers(one, tokenizer) for one in (first, second)] == [["b<|end|>"], ["d" * 20 + "<|end|>"]]
    limit, short = len(second.input_ids) - 1, chat("a", "b", source="short")
    kept = {way: encode_all([example, short], tokenizer, limit, way) for way in ("skip", "cut")}
    assert [(one.source, one.cut) for one in kept["skip"]] == [("short", False)]
    assert [(one.source, one.cut) for one in kept["cut"]] == [("data.jsonl:1", True)] * 2 + [("short", False)]


def test_the_positions_of_the_model_are_the_limit_too(tokenizer):
    assert [len(one.input_ids) for one in encode_all(LONG, tokenizer, 100, "cut", None, 6)] == [4, 6, 6, 6]


def test_the_tokenizers_own_limit_is_silent(tokenizer, monkeypatch):
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    monkeypatch.setattr(tokenizer, "model_max_length", 4)
    tokenizer.encode("a text of more than four tokens")
    assert len(said) == 1
    encode_all(LONG, tokenizer, 13)
    assert len(said) == 1


def test_smollm2_learns_the_answer_and_its_end(default_gguf):
    smollm2 = AutoTokenizer.from_pretrained(default_gguf.parent, gguf_file=default_gguf.name)
    encoded = encode(chat("2 + 3?", "It is 5.", "And 4?", "9, *naturally*."), smollm2)
    assert text_of(encoded, smollm2) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\nIt is 5.<|im_end|>\n"
        "<|im_start|>user\nAnd 4?<|im_end|>\n<|im_start|>assistant\n9, *naturally*.<|im_end|>\n"
    )
    assert answers(encoded, smollm2) == ["It is 5.<|im_end|>", "9, *naturally*.<|im_end|>"]
    prompt = smollm2(prompt_text("2 + 3?", smollm2), add_special_tokens=False).input_ids
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[len(prompt)] != NO_LABEL
