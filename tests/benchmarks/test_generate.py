"""Both models of ``benchmarks/generate.py`` answer and are timed, once the quantized one is right."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qloralab as ql
from benchmarks.generate import PROVIDERS, REPETITIONS, WrongResultError, check, line, main, measure
from qloralab.kernels import dispatch

PROMPT = torch.tensor([[1, 5, 9]])


def model() -> LlamaForCausalLM:
    """Two layers, hidden size 64, random, bfloat16."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, eos_token_id=2
    )
    return LlamaForCausalLM(config).bfloat16().eval()


def test_both_models_are_timed_on_the_whole_answer(tmp_path, capsys):
    plain = model()
    records = measure({"bf16": plain, "ours": ql.quantize_(copy.deepcopy(plain))}, PROMPT, pad=0, new_tokens=4)
    assert tuple(record["provider"] for record in records) == PROVIDERS
    for record in records:
        assert (record["prompt_tokens"], record["new_tokens"], record["reps"]) == (3, 4, REPETITIONS)
        assert record["tokens_per_s"] == pytest.approx(4000 / record["ms"]["p50"])
    assert records[1]["error"] < 0.02
    (tmp_path / "generate.json").write_text(json.dumps(records))
    main(["--view", "--out", str(tmp_path)])
    assert capsys.readouterr().out.strip() == line(records)


def test_a_model_whose_logits_are_not_the_references_is_refused():
    def off(prompt: torch.Tensor) -> SimpleNamespace:
        right = torch.ones(1, 3, 97)
        return SimpleNamespace(logits=right if dispatch.mode() == "reference" else 1.1 * right)

    with pytest.raises(WrongResultError, match=r"0\.1"):
        check(off, PROMPT)


@pytest.mark.parametrize(("ours", "verdict"), [(30.0, "ratio 1.50; goal 1.5: reached"), (29.0, "goal 1.5: missed")])
def test_the_line_divides_ours_by_bfloat16(ours, verdict):
    rates = {"bf16": 20.0, "ours": ours}
    records = [{"provider": name, "tokens_per_s": rate, "device": "a processor"} for name, rate in rates.items()]
    assert verdict in line(records)
