"""A checkpoint: one file or several with an index, its 4-bit weights, its plain tensors; what is broken is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qloralab.nf4.files.checkpoint import INDEX_FILE, WEIGHTS_FILE, Checkpoint, write_index
from qloralab.nf4.files.errors import FormatError
from qloralab.nf4.tensor import QuantizedTensor, quantize

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PAYLOAD = "a.w.quant_state.bitsandbytes__nf4"


def weights() -> dict[str, QuantizedTensor]:
    one = quantize(torch.randn(9, 64, dtype=torch.bfloat16))
    return {"a.w": one, "b.w": quantize(torch.randn(5, 7), "fp4", block_size=32, double_quant=False)}


def tensors() -> dict[str, Tensor]:
    """Two 4-bit weights, the second stored as another dtype, and three plain tensors."""
    one, two = weights().values()
    plain = {"a.bias": torch.randn(9), "a.w2": torch.ones(2, dtype=torch.int64), "norm": torch.zeros(3)}
    return one.to_bitsandbytes("a.w") | two.to_bitsandbytes("b.w", torch.bfloat16) | plain


def save(directory: Path, shards: int) -> Path:
    """A checkpoint of one file, or of two: the parts of each weight then lie in both."""
    directory.mkdir(exist_ok=True)
    found = tensors()
    if shards == 1:
        save_file(found, directory / WEIGHTS_FILE)
        return directory
    halves = {FIRST: sorted(found)[::2], SECOND: sorted(found)[1::2]}
    for file, names in halves.items():
        save_file({name: found[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in halves.items() for name in names}
    write_index(directory, weight_map, sum(tensor.nbytes for tensor in found.values()))
    return directory


@pytest.fixture(params=[1, 2], ids=["one-file", "two-files"])
def directory(request, tmp_path) -> Path:
    return save(tmp_path / "model", request.param)


@pytest.fixture
def sharded(tmp_path) -> Path:
    return save(tmp_path / "model", shards=2)


def test_the_names(directory):
    checkpoint = Checkpoint(directory)
    assert sorted(checkpoint.names()) == sorted(tensors())
    assert sorted(checkpoint.quantized_names()) == ["a.w", "b.w"]
    assert sorted(checkpoint.plain_names()) == ["a.bias", "a.w2", "norm"]


def test_every_tensor_and_where_it_is(directory):
    checkpoint = Checkpoint(directory)
    torch.manual_seed(1)
    seen = {name: load_file(checkpoint.file_of(name))[name] for name in checkpoint.names()}
    for name, tensor in seen.items():
        assert checkpoint.describe(name) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert sorted({checkpoint.file_of(name) for name in seen}) == checkpoint.files
    assert [name for file in checkpoint.files for name in seen if checkpoint.file_of(name) == file] == list(seen)


def test_the_weights_are_in_memory_of_their_own(directory):
    torch.manual_seed(5)
    expected = weights()
    torch.manual_seed(5)
    save(directory, shards=len(list(directory.glob("*.safetensors"))))
    checkpoint = Checkpoint(directory)
    found = {name: checkpoint.quantized(name) for name in checkpoint.quantized_names()}
    for file in checkpoint.files:
        file.write_bytes(bytes(file.stat().st_size))  # in place: a mapping would show it
    for name, weight in expected.items():
        assert torch.equal(found[name].dequantize(), weight.dequantize()), name
        assert found[name].codebook == weight.codebook


def test_one_file_of_any_name(tmp_path):
    file = save(tmp_path / "model", shards=1) / WEIGHTS_FILE
    other = file.rename(file.with_name("weights.safetensors"))
    (tmp_path / "model" / ".weights.safetensors.part").write_bytes(b"")
    (tmp_path / "model" / ".hidden.safetensors").write_bytes(b"")
    for path in (other, other.parent, str(other.parent)):
        checkpoint = Checkpoint(path)
        assert checkpoint.files == [other]
        assert checkpoint.quantized("a.w").shape == (9, 64)


def test_one_file_comes_before_an_index(sharded):
    save_file({"w": torch.ones(2)}, sharded / WEIGHTS_FILE)
    assert Checkpoint(sharded).names() == ["w"]


def test_a_link_in_the_directory_may_lead_elsewhere(sharded, tmp_path):
    (tmp_path / "blob").write_bytes((sharded / FIRST).read_bytes())
    (sharded / FIRST).unlink()
    (sharded / FIRST).symlink_to("../blob")
    assert Checkpoint(sharded).quantized("a.w").shape == (9, 64)


def test_the_index_is_the_one_of_transformers(tmp_path):
    write_index(tmp_path, {"w": FIRST, "b": SECOND}, total_size=12)
    assert (tmp_path / INDEX_FILE).read_text() == (
        '{\n  "metadata": {\n    "total_size": 12\n  },\n  "weight_map": {\n'
        f'    "b": "{SECOND}",\n    "w": "{FIRST}"\n  }}\n}}\n'
    )
    assert [file.name for file in tmp_path.iterdir()] == [INDEX_FILE]


def test_what_transformers_saves_in_pieces(tmp_path):
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.files) > 2
    assert set(checkpoint.plain_names()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.tensor(name), tensor)
    before = json.loads((tmp_path / INDEX_FILE).read_text())
    write_index(tmp_path, before["weight_map"], before["metadata"]["total_size"])
    del before["metadata"]["total_parameters"]  # transformers' own addition to the format
    assert json.loads((tmp_path / INDEX_FILE).read_text()) == before


def test_nothing_there_is_a_missing_file(tmp_path):
    for path in (tmp_path / "model", tmp_path, tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"):
        with pytest.raises(FileNotFoundError):
            Checkpoint(path)


def refused(path: Path, file: Path, says: str, tensor: str | None = None, field: str | None = None) -> None:
    with pytest.raises(FormatError) as caught:
        Checkpoint(path)
    error = caught.value
    assert says in error.message
    assert (error.file, error.tensor, error.field) == (str(file), tensor, field)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_a_pickle_is_not_opened(tmp_path, name):
    file = tmp_path / name
    torch.save({"w": torch.ones(1)}, file)
    refused(tmp_path, file, "is a pickle, which can run code; where it is trusted, convert it to safetensors")
    refused(file, file, "is a pickle, which can run code")
    save_file({"w": torch.ones(1)}, tmp_path / WEIGHTS_FILE)
    assert Checkpoint(tmp_path).names() == ["w"]


def test_several_files_without_an_index(sharded):
    (sharded / INDEX_FILE).unlink()
    refused(sharded, sharded, f"holds 2 safetensors files and no {INDEX_FILE}")


def index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], bytes]:
    """The bytes of an index after a change of its content."""

    def make(directory: Path) -> bytes:
        content = json.loads((directory / INDEX_FILE).read_text())
        change(content)
        return json.dumps(content).encode()

    return make


def shard(name: Any) -> Callable[[Path], bytes]:
    return index(lambda content: content["weight_map"].update(norm=name))


# How an index is broken -> the tensor, the field that the error names, a part of what it says.
BROKEN: dict[str, tuple[Callable[[Path], bytes], str | None, str | None, str]] = {
    "not-json": (lambda _: b"{", None, None, "is not JSON"),
    "list": (lambda _: b"[]", None, None, "holds a JSON list, not an object"),
    "no-weight_map": (index(lambda c: c.pop("weight_map")), None, "weight_map", "is missing"),
    "weight_map-list": (index(lambda c: c.update(weight_map=["w"])), None, "weight_map", "is ['w']"),
    "weight_map-empty": (index(lambda c: c.update(weight_map={})), None, "weight_map", "is {}"),
    "metadata-list": (index(lambda c: c.update(metadata=[])), None, "metadata", "is []; expected an object"),
    "shard-number": (shard(1), "norm", "weight_map", "is 1, which is no name of a file"),
    "shard-above": (shard("../x.safetensors"), "norm", "weight_map", "which leaves the directory"),
    "shard-backslash": (shard("..\\x.safetensors"), "norm", "weight_map", "which leaves the directory"),
    "shard-pickle": (shard("pytorch_model.bin"), "norm", "weight_map", "which is a pickle, which can run code"),
    "shard-parent": (shard(".."), "norm", "weight_map", "is no name of a *.safetensors file"),
    "shard-nothing": (shard(""), "norm", "weight_map", "is no name of a *.safetensors file"),
    "shard-nul": (shard("x\0.safetensors"), "norm", "weight_map", "is no name of a *.safetensors file"),
    "shard-surrogate": (shard("\ud800.safetensors"), "norm", "weight_map", "is no name of a *.safetensors file"),
    "shard-long": (shard("x" * 300 + ".safetensors"), "norm", "weight_map", "is no name of a *.safetensors file"),
    "shard-missing": (shard("gone.safetensors"), None, "weight_map", "names 'gone.safetensors', which does not exist"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_index_is_refused(case, sharded):
    make, tensor, field, says = BROKEN[case]
    (sharded / INDEX_FILE).write_bytes(make(sharded))
    refused(sharded, sharded / INDEX_FILE, says, tensor, field)


def test_an_index_that_does_not_fit_its_shards(sharded):
    where = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    write_index(sharded, where | {"more": FIRST}, 0)
    refused(sharded, sharded / FIRST, f"is not in the file, where {INDEX_FILE} has it", tensor="more")
    write_index(sharded, {name: file for name, file in where.items() if name != "norm"}, 0)
    refused(sharded, sharded / where["norm"], f"is not what {INDEX_FILE} has in this file", tensor="norm")
    write_index(sharded, where, 0)
    other = sharded / (FIRST if where["norm"] == SECOND else SECOND)
    save_file(load_file(other) | {"norm": torch.ones(3)}, other)
    refused(sharded, other, f"is not what {INDEX_FILE} has in this file", tensor="norm")


@pytest.mark.parametrize("spoil", [Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["directory", "dangling"])
def test_a_shard_that_is_no_file(sharded, spoil):
    (sharded / SECOND).unlink()
    spoil(sharded / SECOND)
    with pytest.raises(FormatError, match=SECOND):
        Checkpoint(sharded)


def test_a_broken_shard_is_named(sharded):
    os.truncate(sharded / SECOND, 100)
    refused(sharded, sharded / SECOND, "cut short", field="header")


def test_what_the_checkpoint_does_not_have(directory):
    checkpoint = Checkpoint(directory)
    for ask in (checkpoint.file_of, checkpoint.describe, checkpoint.tensor, checkpoint.quantized):
        with pytest.raises(FormatError) as caught:
            ask("c.w")
        assert (caught.value.file, caught.value.tensor) == (str(directory), "c.w")
    with pytest.raises(FormatError, match="0 tensors are named"):
        checkpoint.quantized("norm")


# How a weight is spoiled (test_bitsandbytes_layout.py has every way) -> the tensor and the field that the error names.
SPOILED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str, str | None]] = {
    "no-absmax": (lambda t: t.pop("a.w.absmax"), "a.w.absmax", None),
    "no-codes": (lambda t: t.pop("a.w"), "a.w", None),
    "a-weight-below": (lambda t: t.update(weights()["b.w"].to_bitsandbytes("a.w.v")), "a.w.v.absmax", None),
    "payload-field": (lambda t: t[PAYLOAD][35:37].fill_(ord("9")), PAYLOAD, "blocksize"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_weight_whose_tensors_do_not_fit_is_refused(case, tmp_path):
    spoil, tensor, field = SPOILED[case]
    found = tensors()
    spoil(found)
    file = tmp_path / WEIGHTS_FILE
    save_file(found, file)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(FormatError) as caught:
        checkpoint.quantized("a.w")
    error = caught.value
    assert (error.file, error.tensor, error.field) == (str(file), tensor, field)
    assert str(error).count(str(file)) == 1
    assert checkpoint.quantized("b.w").shape == (5, 7)


def test_a_weight_without_its_payload_is_refused(tmp_path):
    found = tensors()
    del found[PAYLOAD]
    save_file(found, tmp_path / WEIGHTS_FILE)
    refused(tmp_path, tmp_path / WEIGHTS_FILE, "whose quant_state is missing", tensor="a.w.quant_map")


def test_the_file_of_the_spoiled_part_is_named(sharded):
    where = json.loads((sharded / INDEX_FILE).read_text())["weight_map"]
    for name in ("a.w.absmax", "a.w.quant_map"):
        file = sharded / where[name]
        before = load_file(file)
        save_file(before | {name: torch.zeros(1)}, file)
        with pytest.raises(FormatError, match=name) as caught:
            Checkpoint(sharded).quantized("a.w")
        assert (caught.value.file, caught.value.tensor) == (str(file), name)
        save_file(before, file)
