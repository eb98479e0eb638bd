"""The command: what each kind of path gives, the JSON, the pictures, and what is refused before anything is read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qloralab.checkpoint.quantize_checkpoint import quantize_model
from qloralab.inspection.budget import ROUNDINGS
from qloralab.inspection.statistics import PROBABILITIES
from qloralab.lora.config import LoraConfig
from qloralab.lora.files import save_adapter
from qloralab.lora.inject import adapters, inject_
from qloralab.nf4.tensor import quantize


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"the quick brown fox {i}"}) + "\n" for i in range(6)))
    return path


@pytest.fixture(scope="module")
def in_4_bits(model_dir, tmp_path_factory, silent_display):
    path = tmp_path_factory.mktemp("quantized") / "tiny-nf4"
    quantize_model(model_dir, path, display=silent_display)
    return path


@pytest.fixture(scope="module")
def silent_display():
    import io

    from rich.console import Console

    from qloralab.display import Display

    return Display(Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def adapter(model_dir, tmp_path_factory):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_dir)
    inject_(model, LoraConfig(r=4, lora_alpha=8))
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    path = tmp_path_factory.mktemp("adapters") / "adapter"
    save_adapter(model, path)
    return path


def test_a_dense_model(program, model_dir, text, tmp_path):
    out, plots = tmp_path / "new" / "found.json", tmp_path / "pictures"
    status, shown, errors = program(
        "inspect", model_dir, "--data-type", "nf4", "--data-type", "mxfp4", "--activations", "--budget", "--by", "kind",
        "--text", text, "--documents", 3, "--json", out, "--plot", plots,
    )  # fmt: skip
    assert (status, errors) == (0, "")
    for words in ("14 linear layers", "weight error", "KS distance", "sum  of the parts alone", "bfloat16 products"):
        assert words in shown
    found = json.loads(out.read_text())
    assert set(found) == {
        "settings", "versions", "notes", "data_types", "text", "probabilities", "layers", "budget", "roundings"
    }  # fmt: skip
    assert found["settings"]["documents"] == found["text"]["pieces"] == 3
    assert list(found["data_types"]) == ["nf4", "mxfp4"]
    weights = load_file(model_dir / "model.safetensors")
    assert len(found["layers"]) == 14
    for layer in found["layers"]:
        weight = weights[f"{layer['name']}.weight"]
        assert layer["shape"] == list(weight.shape)
        assert (layer["stored"], layer["bits"]) == ("float32", 32.0)
        for name, one in layer["quantized"].items():
            made = quantize(weight, name)
            naive = (made.dequantize().double() - weight.double()).square().sum() / weight.double().square().sum()
            assert one["error"] == pytest.approx(float(naive), rel=1e-5)
            assert one["bits"] == made.ideal_bits_per_parameter
            assert sum(one["codes"]["histogram"]) == weight.numel()
            assert 0 < one["output_error"] < 0.1
        assert len(layer["distribution"]["quantiles"]) == len(found["probabilities"]) == len(PROBABILITIES)
        assert layer["distribution"]["norm"] == pytest.approx(float(weight.norm()), rel=1e-5)
        assert layer["largest_blocks"][0]["absmax"] == pytest.approx(float(weight.abs().max()))
    budget = found["budget"]
    assert len(budget["parts"]) == 7
    assert budget["sum_alone"] == pytest.approx(sum(part["alone"] for part in budget["parts"]))
    assert [one["name"] for one in found["roundings"]] == list(ROUNDINGS)
    pictures = ["budget.png", "codes.png", "error_by_layer.png", "normal_quantiles.png"]
    assert sorted(file.name for file in plots.iterdir()) == pictures
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in plots.iterdir())


def test_a_checkpoint_in_4_bits(program, in_4_bits, model_dir, text, tmp_path):
    status, shown, errors = program("inspect", in_4_bits, "--json", tmp_path / "alone.json")
    assert (status, errors) == (0, "")
    assert "weight error" not in shown
    alone = json.loads((tmp_path / "alone.json").read_text())
    options = ["--base", model_dir, "--activations", "--text", text, "--json", tmp_path / "beside.json"]
    status, shown, errors = program("inspect", in_4_bits, *options, "--plot", tmp_path / "pictures")
    assert (status, errors) == (0, "")
    assert "weight error" in shown
    beside = json.loads((tmp_path / "beside.json").read_text())
    weights = load_file(model_dir / "model.safetensors")
    for one, other in zip(alone["layers"], beside["layers"], strict=True):
        made = quantize(weights[f"{one['name']}.weight"])
        assert one["stored"] == "nf4"
        assert one["bits"] == made.bits_per_parameter
        assert one["distribution"] is None
        assert one["quantized"]["nf4"]["error"] is None
        assert one["quantized"]["nf4"]["codes"] == other["quantized"]["nf4"]["codes"]
        assert 0.005 < other["quantized"]["nf4"]["error"] < 0.012
        assert 0.003 < other["quantized"]["nf4"]["output_error"] < 0.02


def test_an_adapter(program, adapter, tmp_path):
    out = tmp_path / "adapter.json"
    status, shown, errors = program("inspect", adapter, "--json", out, "--plot", tmp_path)
    assert (status, errors) == (0, "")
    assert "14 layers, r = 4, scaling 2" in shown
    assert "effective rank" in shown
    found = json.loads(out.read_text())["adapter"]
    assert len(found["layers"]) == 14
    assert all(1 <= one["effective_rank"] <= 4 and 0 < one["share"] < 1 for one in found["layers"])
    assert (tmp_path / "adapter.png").is_file()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_tables_fit_the_terminal(program, model_dir, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    status, shown, _ = program("inspect", model_dir, "--top", 2)
    assert status == 0
    rows = [line for line in shown.splitlines() if "─" in line or "proj" in line]
    assert len(rows) > 10
    assert max(map(len, rows)) <= columns


def test_a_data_type_of_ones_own(program, model_dir, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from qloralab import DataType\n"
        "TERNARY = DataType('ternary', (-1.0, -0.0625, 0.0, 1.0), scale='least_squares', block_size=32)\n"
    )
    status, shown, errors = program("inspect", model_dir, "--data-type", "mine.py:TERNARY")
    assert (status, errors) == (0, "")
    assert "ternary" in shown


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("nowhere", [], "nowhere does not exist"),
        ("model", ["--data-type", "nf9"], "there is no data type 'nf9'"),
        ("model", ["--data-type", "nf4", "--data-type", "nf4"], "--data-type names a data type twice"),
        ("model", ["--top", "0"], "--top is 0; it must be at least 1"),
        ("model", ["--budget", "--documents", "0"], "--documents is 0; it must be at least 1"),
        ("model", ["--by", "kind"], "--by would be ignored"),
        ("model", ["--documents", "3"], "--documents would be ignored"),
        ("model", ["--budget", "--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        ("model", ["--base", "model"], "--base would be ignored"),
        ("model", ["--json", "."], "is a directory; give --json the name of a file"),
        ("model", ["--plot", "file"], "file cannot be written"),
        ("4 bits", ["--data-type", "nf4"], "--data-type would be ignored"),
        ("4 bits", ["--budget"], "--budget would be ignored"),
        ("4 bits", ["--activations"], "give it with --base"),
        ("4 bits", ["--base", "4 bits"], "--base {4 bits} holds 4-bit weights"),
        ("adapter", ["--budget"], "--budget would be ignored"),
        ("adapter", ["--data-type", "nf4"], "--data-type would be ignored"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_refused_in_one_line(program, model_dir, in_4_bits, adapter, tmp_path, path, options, words):
    (tmp_path / "file").write_text("")
    places = {"model": model_dir, "4 bits": in_4_bits, "adapter": adapter}
    status, shown, errors = program("inspect", places.get(path, path), *(places.get(one, one) for one in options))
    assert (status, shown) == (2, "")
    assert words.replace("{4 bits}", str(in_4_bits)) in errors
    assert errors.count("\n") == 1


def test_a_weight_that_is_not_finite_is_named(program, write_model, tmp_path):
    from transformers import LlamaForCausalLM

    path = write_model("broken")
    model: Any = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = float("nan")
    model.save_pretrained(path)
    status, _, errors = program("inspect", path)
    assert status == 2
    assert "model.layers.1.mlp.up_proj.weight[3, 5] is nan" in errors
