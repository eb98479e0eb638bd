"""``qloralab eval`` on the small model: what it prints and writes, and what it refuses in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from qloralab.checkpoint.models import load_model, load_tokenizer
from qloralab.evaluate.record import read_record
from qloralab.nf4.files.quantization_config import FIELD

from ..conftest import write_jsonl

SMALL = ("--window", 32, "--stride", 16)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    records = [
        {"text": f"The {name} book is on the table, " * (1 + len(name) % 3)} for name in ("red", "green", "blue")
    ]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", records)


@pytest.fixture
def start(model_dir, texts):
    return ["eval", "--model", model_dir, "--text", texts, *SMALL]


def test_dense_is_at_no_distance_from_itself_and_has_the_perplexity_of_transformers(program, start, model_dir, texts):
    status, out, err = program(*start, "--data-type", "dense", "--window", 200, "--out", "a.json")
    assert (status, err) == (0, "")
    model, tokenizer = load_model(model_dir, torch.float32), load_tokenizer(model_dir)
    total, tokens = 0.0, 0
    for line in texts.read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"]).input_ids])
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1)
        tokens += ids.numel() - 1
    found = read_record(Path("a.json"))
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert (found.kl, found.agreement, int(found.tokens.sum())) == (0.0, 1.0, tokens)
    assert f"{found.perplexity:,.3f}" in out
    assert "weights  dense\n" in out
    assert f"counted  {tokens}: every token but the first of a document\n" in out
    assert "100.00 %" in out


def test_two_runs_are_compared(program, start):
    program(*start, "--data-type", "dense", "--out", "dense.json")
    status, out, err = program(
        *start, "--data-type", "nf3", "--block-size", 32, "--no-double-quant", "--skip", "q_proj",
        "--out", "nf3.json", "--against", "dense.json",
    )  # fmt: skip
    assert (status, err.replace("nf3: no kernel has it; products run in plain PyTorch\n", "")) == (0, "")  # said once
    assert "weights  nf3, blocks of 32, scales absmax, float32: 12 linear layers" in out
    record = json.loads(Path("nf3.json").read_text())
    assert record["model"]["data_type"]["block_size"] == 32
    assert record["model"]["ideal_bits_per_parameter"] == pytest.approx(4.0)
    assert record["model"]["bits_per_parameter"] == pytest.approx(9.0)
    assert record["settings"]["skip"] == ["q_proj"]
    assert record["text"]["documents"] == 3
    assert record["versions"]["torch"] == torch.__version__
    a, b = read_record(Path("nf3.json")), read_record(Path("dense.json"))
    assert record["differences"]["kl"]["value"] == pytest.approx(a.kl)
    assert record["differences"]["nll"]["value"] == pytest.approx(a.nll - b.nll)
    assert record["results"]["kl"]["interval"][0] > 0.001
    assert "difference" in out
    status, _, err = program(*start, "--stride", 8, "--against", "dense.json")
    assert (status, err) == (
        2, "qloralab: error: the two runs have different windows: 32 with stride 16, and 32 with stride 8\n"
    )  # fmt: skip
    status, _, err = program(*start, "--documents", 2, "--against", "dense.json")
    assert (status, err.count("\n")) == (2, 1)
    assert "have read different tokens" in err


def test_an_adapter_on_either_base(program, start, model_dir, colours):
    options = ["--model", model_dir, "--data", colours, "--steps", 2, "--held-out", 4, "--out", "run", "--lr", 0.1]
    assert program("finetune", *options)[0] == 0
    kls = []
    for name in ("dense", "nf4"):
        status, out, _ = program(*start, "--data-type", name, "--adapter", "run/adapter", "--out", f"{name}.json")
        assert status == 0
        assert "adapter  run/adapter, " in out
        kls.append(read_record(Path(f"{name}.json")).kl)
        assert json.loads(Path(f"{name}.json").read_text())["model"]["adapter_parameters"] > 0
    assert kls[0] > 0.001  # from the dense model without it
    assert kls[0] != kls[1]


def test_a_directory_in_4_bits(program, start, model_dir, texts):
    assert program("quantize", "--model", model_dir, "--out", "packed")[0] == 0
    assert FIELD in json.loads(Path("packed/config.json").read_text())
    packed = ["eval", "--model", "packed", "--text", texts, *SMALL]
    status, out, err = program(*packed, "--out", "packed.json")
    assert (status, err) == (0, "")
    note = "    note  no KL divergence: packed holds no dense weights; give --reference the dense model\n"
    assert note in out
    assert "weights  4 bits: 14 linear layers" in out
    assert "KL from" not in out
    assert program(*packed, "--reference", model_dir, "--out", "beside.json")[0] == 0
    assert program(*start, "--data-type", "nf4", "--out", "nf4.json")[0] == 0
    beside, made = read_record(Path("beside.json")), read_record(Path("nf4.json"))
    # Made from float32 here, and from weights rounded to bfloat16 where they are quantized as they are read.
    assert beside.kl == pytest.approx(made.kl, rel=0.1)
    assert beside.nll == read_record(Path("packed.json")).nll == pytest.approx(made.nll, rel=0.01)
    for words in ("--data-type dense", "--data-type nf4"):
        status, _, err = program(*packed, *words.split())
        assert (status, err.count("\n")) == (2, 1)
        assert "packed holds 4-bit weights; --data-type needs the dense model" in err
    assert "--block-size would be ignored: packed holds 4-bit weights" in program(*packed, "--block-size", 64)[2]


def test_without_a_reference(program, start):
    status, out, _ = program(*start, "--reference", "none")
    assert status == 0
    assert "perplexity" in out
    assert "KL" not in out


def test_the_same_run_twice_differs_by_nothing(program, start):
    """The standard library's docstrings, of which the answers count."""
    words = ["eval", "--model", start[2], "--documents", 3, "--out", "a.json"]
    status, out, _ = program(*words)
    assert status == 0
    assert "docstrings of the standard library, held out: 3 documents" in out
    assert "the tokens of the answers" in out
    assert program(*words, "--against", "a.json")[0] == 0
    differences = json.loads(Path("a.json").read_text())["differences"]
    assert {name: one["interval"] for name, one in differences.items()} == {
        name: [0.0, 0.0] for name in ("nll", "perplexity", "kl", "agreement")
    }


REFUSED = {
    "--data-type nf9": "there is no data type 'nf9'",
    "--data-type none.py:A": "cannot import none.py",
    "--block-size 63": "block_size is 63",
    "--data-type mxfp4 --no-double-quant": "mxfp4 encodes its scales as e8m0",
    "--data-type dense --block-size 64": "--block-size would be ignored: --data-type dense quantizes nothing",
    "--data-type dense --no-double-quant": "--no-double-quant would be ignored",
    "--data-type dense --double-quant": "--double-quant would be ignored",
    "--data-type dense --skip q_proj": "--skip would be ignored",
    "--skip nothing": "nothing",
    "--adapter none": "none/adapter_config.json does not exist",
    "--model none": "none does not exist",
    "--reference missing": "missing does not exist",
    "--reference BARE": "has another vocabulary than",
    "--text none.txt": "none.txt cannot be read",
    "--text=": "--text is empty",
    "--window 1": "--window is 1; it must be at least 2",
    "--stride 32": "--stride is 32; it must be from 1 to 31 (window - 1)",
    "--stride 0": "--stride is 0",
    "--window x": "'--window'",
    "--documents 0": "--documents is 0; it must be at least 1",
    "--dtype float16": "'float16' is not one of",
    "--out .": ". is a directory; give --out the name of a JSON file",
    "--out file/a.json": "file is not a directory",
    "--against none.json": "none.json cannot be read: No such file",
    "--against file": "is not JSON",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused(program, start, byte_tokenizer, write_model, words, tmp_path, capsys):
    (tmp_path / "file").touch()
    if "BARE" in words:
        other = write_model("other")
        byte_tokenizer(special=("<|start|>", "<|end|>", "<|more|>")).save_pretrained(other)
        words_given = words.replace("BARE", str(other)).split()
    else:
        words_given = words.split()
    capsys.readouterr()  # what transformers says of writing the other model
    status, _, err = program(*start, *words_given)
    assert status == 2
    assert err.startswith("qloralab: error: ")
    assert err.count("\n") == 1
    assert REFUSED[words] in err


def test_a_window_beyond_the_positions_of_a_model_is_refused_before_it_is_read(
    program, texts, tmp_path, byte_tokenizer, capsys
):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=260, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    capsys.readouterr()
    status, _, err = program("eval", "--model", "gpt2", "--text", texts)
    assert (status, err) == (2, "qloralab: error: --window is 256, and the model has 64 positions\n")
