"""Decoding from memory that stays: the tokens of transformers' own loop; and the graph, as far as there is one here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, T5Config

from qloralab.train import decoding
from qloralab.train.decoding import Decoder, can_decode, decode, is_plain

SIZES: Any = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9], [11], [21, 22, 23]]
COUNT = 12


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, PROMPTS))
    rows = [[0] * (length - len(prompt)) + prompt for prompt in PROMPTS]
    return torch.tensor(rows), torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])


def by_transformers(model: Any, count: int = COUNT) -> list[list[int]]:
    ids, mask = padded()
    options: Any = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("count", [1, 2, 3, COUNT])
def test_the_tokens_are_those_of_generate(model, count):
    seen: list[tuple[int, int]] = []
    found = decode(model, *padded(), count, [], lambda done, total: seen.append((done, total)))
    assert found == by_transformers(model, count)
    assert len({tuple(row) for row in found}) > 1
    assert seen == [(done, count) for done in range(1, count + 1)]


def test_it_ends_when_every_answer_has(model):
    tokens = by_transformers(model)
    ends = [row[4] for row in tokens]
    last = max(min(row.index(end) for end in ends if end in row) for row in tokens)
    found = decode(model, *padded(), COUNT, ends)
    assert found == [row[: last + 1] for row in tokens]
    assert last < COUNT - 1


def test_a_step_allocates_nothing_that_it_reads_the_next_time(model):
    """Or a graph, which replays addresses, would read what was there when it was captured."""
    decoder = Decoder(model, *padded(), COUNT)

    def addresses() -> list[int]:
        layers: Any = decoder._cache.layers
        tensors = (decoder.token, decoder._positions, decoder._mask)
        inside = (part for layer in layers for part in (layer.keys, layer.values, layer.cumulative_length))
        return [tensor.data_ptr() for tensor in (*tensors, *inside)]

    with torch.no_grad():
        before = addresses()
        for _ in range(3):
            decoder.step()
            assert addresses() == before


@pytest.fixture
def graphs(monkeypatch) -> list[int]:
    """A capture that is none: the step itself. The lengths of the cache when it was asked for."""
    asked: list[int] = []

    def captured(decoder: Decoder) -> Any:
        layers: Any = decoder._cache.layers
        asked.append(int(layers[0].cumulative_length))
        return decoder.step

    monkeypatch.setattr(Decoder, "captured", captured)
    monkeypatch.setattr(decoding, "_has_graphs", lambda decoder: True)
    return asked


def test_the_third_step_is_a_graph(model, graphs):
    assert decode(model, *padded(), COUNT, []) == by_transformers(model)
    assert graphs == [len(PROMPTS[0]) + 2]


def test_what_cannot_be_captured_is_decoded_without(model, graphs, monkeypatch):
    def fail(decoder: Decoder) -> Any:
        raise RuntimeError("operation not permitted\n when stream is capturing")

    monkeypatch.setattr(Decoder, "captured", fail)
    said: list[str] = []
    monkeypatch.setattr(decoding._log, "warning", lambda text, *parts: said.append(text % parts))
    assert decode(model, *padded(), COUNT, []) == by_transformers(model)
    assert said == ["answers are decoded without a CUDA graph: operation not permitted when stream is capturing"]


class Graph:
    """A CUDA graph of the step that was run while it was captured: it is run again."""

    def __init__(self, decoder: Decoder, wrong: bool):
        self.decoder, self.wrong = decoder, wrong

    def replay(self) -> None:
        Decoder.step(self.decoder)
        if self.wrong:
            self.decoder.token.add_(1)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_graph_is_compared_with_the_step_and_leaves_the_state_as_it_was(model, monkeypatch, wrong):
    decoder = Decoder(model, *padded(), COUNT)
    graph = Graph(decoder, wrong)

    monkeypatch.setattr(decoding, "captured", lambda run: graph.replay)  # what is captured does not run
    with torch.no_grad():
        before = decoder.token.clone(), decoder._positions.clone()
        if wrong:
            with pytest.raises(RuntimeError, match="another token"):
                decoder.captured()
        else:
            assert decoder.captured() == graph.replay
    layers: Any = decoder._cache.layers
    assert torch.equal(decoder.token, before[0])
    assert torch.equal(decoder._positions, before[1])
    assert {int(layer.cumulative_length) for layer in layers} == {len(PROMPTS[0])}


OTHERS = {
    "learned positions": (GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=64), None),
    "a sliding window": (MistralConfig(**SIZES | {"sliding_window": 8}), False),
    "an encoder": (T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4), False),
}


@pytest.mark.parametrize(("config", "expected"), OTHERS.values(), ids=OTHERS)
def test_which_models_can(config, expected):
    from transformers import AutoModelForSeq2SeqLM

    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    made = kind.from_config(config).eval()
    if expected is None:
        expected = can_decode(made)
        if expected:
            assert decode(made, *padded(), COUNT, []) == by_transformers(made)
    assert can_decode(made) == expected


@pytest.mark.parametrize(
    "setting", [{}, {"temperature": 0.6}, {"repetition_penalty": 1.1}, {"no_repeat_ngram_size": 2}]
)
def test_a_generation_config_that_does_more_than_take_the_likeliest(model, setting, monkeypatch):
    for name, value in setting.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert is_plain(model) == (not setting or "temperature" in setting)
