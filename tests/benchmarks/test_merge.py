"""Runs are trained once, every merge is validated as its run was, and differences are taken seed by seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qloralab.benchmarks.merge import ADAPTED, AWARE, BASE, MERGED_AWARE, PLAIN, WAYS, main, records, table
from qloralab.benchmarks.record import RECORDS, record_file


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random model of two layers with a token per byte, and data."""
    folder = tmp_path_factory.mktemp("tiny")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    lines = [json.dumps({"instruction": f"Count {i}", "output": "one two three"[: 3 + i % 9]}) for i in range(24)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "model", folder / "data.jsonl"


@pytest.mark.slow
def test_runs_are_trained_merged_and_validated_once(tiny, tmp_path, capsys):
    model, data = tiny
    options = ["--model", model, "--data", data, "--seeds", "2", "--out", tmp_path, "--runs", tmp_path / "runs"]
    main([str(one) for one in (*options, "--steps", "3")])
    file = record_file(tmp_path, "merge")
    found = {one["model"]: one for one in json.loads(file.read_text())}
    assert [*found] == [BASE, ADAPTED, *WAYS]
    for seed in (0, 1):
        configs = [tmp_path / "runs" / f"seed-{seed}" / kind / "config.json" for kind in (PLAIN, AWARE)]
        plain, aware = (json.loads(path.read_text()) for path in configs)
        assert (plain["merge_aware"], aware["merge_aware"], plain["seed"]) == (False, True, seed)
        assert found[BASE]["losses"][seed] == plain["result"]["val_before"]
        assert found[ADAPTED]["losses"][seed] == plain["result"]["val_after"]
        assert found[MERGED_AWARE]["losses"][seed] == pytest.approx(aware["result"]["val_after"], abs=1e-5)
        assert found["merged, bfloat16"]["losses"][seed] == pytest.approx(plain["result"]["val_after"], abs=1e-2)
    assert found["merged, bfloat16"]["bytes"] > found[MERGED_AWARE]["bytes"]
    assert "codes_changed" not in found["merged, bfloat16"]
    original = found["merged, 4 bits, onto original"]
    assert original["kept"] > found["merged, 4 bits, onto dequantized"]["kept"]
    assert not list(tmp_path.glob("**/model/*.safetensors")), "a merged model is left"
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/*")}
    capsys.readouterr()
    main([str(one) for one in (*options, "--steps", "3")])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/*")} == times
    assert [one["losses"] for one in json.loads(file.read_text())] == [one["losses"] for one in found.values()]
    with pytest.raises(SystemExit, match="is a run with other settings; give --runs another folder"):
        main([str(one) for one in (*options, "--steps", "4")])


def figures(base: float, adapted: float, *merged: float) -> dict:
    found = {BASE: {"loss": base}, ADAPTED: {"loss": adapted}}
    survived = {"codes_changed": 0.01, "kept": 0.5, "cosine": 0.25}
    for (name, way), loss in zip(WAYS.items(), merged, strict=True):
        found[name] = {"loss": loss, "bytes": 2_000_000, **(survived if way.into == "4bit" else {})}
    return found


def test_differences_are_taken_seed_by_seed(lines, tmp_path, capsys):
    made = records({0: figures(4, 2, 2, 3, 2.5, 2.1), 1: figures(6, 4, 4, 5, 4.5, 4.3)}, 150)
    by_name = {one["model"]: one for one in made}
    assert by_name[ADAPTED]["difference"] is None
    assert by_name[MERGED_AWARE]["loss"]["value"] == pytest.approx(3.2)
    low, high = by_name[MERGED_AWARE]["difference"]["interval"]
    half = 12.706 * 0.1  # t(0.975, 1) s / sqrt(2), of 0.1 and 0.3
    assert (low, high) == (pytest.approx(0.2 - half, abs=1e-3), pytest.approx(0.2 + half, abs=1e-3))
    assert by_name["merged, 4 bits, onto original"]["difference"]["interval"] == pytest.approx([0.5, 0.5])
    rows = {row[0]: row[1:] for row in lines(table(made))}
    assert rows["merged, 4 bits, onto original"] == [
        "2", "3.500", "2.500, 4.500", "+0.500 (+0.500 to +0.500)", "1 %", "0.500", "0.250",
    ]  # fmt: skip
    record_file(tmp_path, "merge").write_text(json.dumps(made))
    main(["--view", "--out", str(tmp_path)])
    assert "merge-aware, 4 bits" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted(RECORDS.glob("merge-*.json")), ids=lambda file: file.stem)
def test_the_committed_records_are_shown(file, lines):
    found = json.loads(file.read_text())
    assert [row[0] for row in lines(table(found))] == [BASE, ADAPTED, *WAYS]
    assert {len(one["losses"]) for one in found} == {3}
