"""Shares of what is not in 4 bits, counted by hand, and how quantize_ tells them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import inject_
from qloralab.nf4.dense_shares import LOGGER, dense_shares, described
from qloralab.nf4.model import quantize_


class Experts(nn.Module):
    def __init__(self, count: int):
        super().__init__()
        self.up = nn.Parameter(torch.ones(count, 16, 16))


class Language(nn.Module):
    """16 x 16 in 4 bits; 16 x 10 in an embedding, its head shares it; experts of 16 x 16."""

    def __init__(self, experts: int):
        super().__init__()
        self.embedding, self.linear, self.head = nn.Embedding(10, 16), nn.Linear(16, 16), nn.Linear(16, 10)
        self.experts = Experts(experts)
        self.head.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def model(experts: int) -> Any:
    return Language(experts)


def test_shares_are_counted_once_and_without_adapters():
    total = 160 + 256 + 16 + 10 + 3 * 256  # embedding, linear and its bias, the head's bias, experts
    expected = {"Experts": 768, "embeddings": 160, "biases": 16, "output head": 10}
    quantized = quantize_(model(3))
    for one in (quantized, inject_(quantized, LoraConfig(4, 8))):
        shares = dense_shares(one)
        assert list(shares) == list(expected)
        assert shares == pytest.approx({kind: count / total for kind, count in expected.items()})
    parts = "Experts 63.5 %, embeddings 13.2 %, biases 1.32 %, output head 0.826 %"
    assert described(quantized) == f"78.8 % of the weights ({parts})"
    assert dense_shares(nn.ReLU()) == {}


@pytest.mark.parametrize(
    ("experts", "skip", "level", "what"),
    [
        (0, None, logging.INFO, "embeddings 36 %"),
        (1, None, logging.WARNING, "Experts 36.6 %"),
        (1, ["experts"], logging.INFO, "skipped 36.6 %"),
        (0, ["linear"], logging.INFO, "skipped 61.3 %"),
    ],
    ids=["embeddings", "experts", "skipped", "all"],
)
def test_a_large_share_that_nobody_asked_for_is_a_warning(experts, skip, level, what, monkeypatch):
    said: list[logging.LogRecord] = []
    monkeypatch.setattr(LOGGER, "isEnabledFor", lambda level: level >= logging.INFO)
    monkeypatch.setattr(LOGGER, "handle", said.append)
    language = nn.ModuleDict({"model": model(experts), "other": nn.Linear(1, 1)})
    quantize_(language, skip=skip)
    (record,) = said
    assert record.levelno == level
    assert record.getMessage().startswith("not in 4 bits: ")
    assert what in record.getMessage()
