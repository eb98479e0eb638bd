"""Both models of ``benchmarks/generate.py`` answer and are timed, once the quantized one is right."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qloralab.benchmarks import generate
from qloralab.benchmarks.case import WrongResultError
from qloralab.benchmarks.generate import PROVIDERS, REPETITIONS, TOLERANCES, check, line, main, measure
from qloralab.benchmarks.record import RECORDS, record_file
from qloralab.checkpoint.models import quantize_loaded_
from qloralab.kernels import dispatch

PROMPT = torch.tensor([[1, 5, 9]])


def model() -> LlamaForCausalLM:
    """Two layers, hidden size 64, random, bfloat16."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, eos_token_id=2
    )
    return LlamaForCausalLM(config).bfloat16().eval()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_all_models_are_timed_on_the_whole_answer(tmp_path, capsys, dtype):
    plain = model()
    models = {
        "bf16": plain,
        "f32": copy.deepcopy(plain).float(),
        "ours": quantize_loaded_(copy.deepcopy(plain), dtype),
    }
    records = measure(models, PROMPT, new_tokens=4)
    assert tuple(record["provider"] for record in records) == PROVIDERS
    for record in records:
        assert (record["prompt_tokens"], record["new_tokens"], record["reps"]) == (3, 4, REPETITIONS)
        assert record["tokens_per_s"] == pytest.approx(4000 / record["ms"]["p50"])
    assert [record["dtype"] for record in records] == ["bfloat16", "float32", str(dtype).removeprefix("torch.")]
    assert records[-1]["error"] < TOLERANCES[dtype] / 3
    record_file(tmp_path, "generate").write_text(json.dumps(records))
    main(["--view", "--out", str(tmp_path)])
    assert capsys.readouterr().out.strip() == line(records)


@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, 1.1), (torch.float32, 1.0001)], ids=str)
def test_a_model_whose_logits_are_not_the_references_is_refused(dtype, off):
    def wrong(prompt: torch.Tensor) -> SimpleNamespace:
        right = torch.ones(1, 3, 97, dtype=dtype)
        return SimpleNamespace(logits=right if dispatch.mode() == "reference" else off * right)

    with pytest.raises(WrongResultError, match="the logits differ"):
        check(wrong, PROMPT)


@pytest.mark.parametrize(("ours", "verdict"), [(30.0, "ratio 1.50; goal 1.5: reached"), (29.0, "goal 1.5: missed")])
def test_the_line_divides_ours_by_the_faster_dense_model(ours, verdict):
    rates = {"bf16": 20.0, "f32": 10.0, "ours": ours}
    common = {"device": "a processor", "class": "avx2"}
    assert verdict in line([{"provider": name, "tokens_per_s": rate, **common} for name, rate in rates.items()])


def test_a_gpu_has_a_file_of_its_own_and_no_goal(tmp_path, monkeypatch, capsys):
    moved = []
    fake: Any = SimpleNamespace(float=lambda: fake, to=lambda device: moved.append(device.type) or fake)
    monkeypatch.setattr(generate, "load_model", lambda path: fake)
    monkeypatch.setattr(generate, "load_tokenizer", lambda path: lambda text: {"input_ids": [1]})
    monkeypatch.setattr(generate, "quantize_loaded_", lambda model, dtype: model)
    monkeypatch.setattr(generate, "compute_dtype", lambda device: SimpleNamespace(dtype=torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU (80 GB)")
    monkeypatch.setattr(generate.choice, "device", lambda device: generate.choice.Device("sm_90", 132, "A GPU (80 GB)"))
    monkeypatch.setattr(torch, "tensor", lambda data, device: device)
    monkeypatch.setattr(
        generate, "measure",
        lambda models, device, tokens: [
            {"provider": name, "tokens_per_s": 10.0, **generate._provenance(device)} for name in models
        ],
    )  # fmt: skip
    main(["--device", "cuda", "--model", str(tmp_path), "--out", str(tmp_path)])
    assert moved == ["cuda"] * 3
    assert len(json.loads((tmp_path / "gpu-generate-a-gpu-80-gb.json").read_text())) == 3
    out = capsys.readouterr().out
    assert out.startswith("sm_90: A GPU (80 GB): 10.0 tokens/s in 4 bits")
    assert "goal" not in out


def test_without_a_gpu_none_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(["--device", "cuda", "--out", str(tmp_path)])
    assert capsys.readouterr().out.startswith("no GPU was measured")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_all_models_answer_on_a_gpu():
    plain = model()
    models = {"bf16": plain, "f32": copy.deepcopy(plain).float()}
    models["ours"] = quantize_loaded_(copy.deepcopy(plain), torch.bfloat16)
    records = measure({name: cast(Any, one).cuda() for name, one in models.items()}, PROMPT.cuda(), new_tokens=4)
    assert tuple(record["provider"] for record in records) == PROVIDERS


@pytest.mark.parametrize("file", sorted(RECORDS.glob("generate-*.json")), ids=lambda file: file.stem)
def test_the_committed_records_are_shown(file):
    assert "tokens/s in 4 bits" in line(json.loads(file.read_text()))
