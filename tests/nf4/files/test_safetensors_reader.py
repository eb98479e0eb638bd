"""Reading a safetensors file: what the library writes is read, what is broken is refused."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qloralab.nf4.files.errors import FormatError
from qloralab.nf4.files.safetensors_reader import DTYPES, SafetensorsFile
from qloralab.nf4.files.safetensors_writer import SafetensorsWriter

from .safetensors_cases import EVERY_DTYPE, MB


def content(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


def test_the_table_has_every_dtype_that_the_library_writes(path):
    written = set()
    for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
        try:
            save_file({"w": torch.zeros(16, dtype=torch.uint8).view(dtype)}, path)
        except (KeyError, RuntimeError):
            continue
        written.add(dtype)
    assert written == set(DTYPES.values())


def test_what_the_library_writes_is_read(path):
    save_file(EVERY_DTYPE, path, metadata={"format": "pt", "μ": "1"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt", "μ": "1"}
    assert set(file.names()) == set(EVERY_DTYPE)
    for name, tensor in EVERY_DTYPE.items():
        assert file.describe(name) == (tensor.dtype, tuple(tensor.shape))
        found = file.tensor(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert content(found) == content(tensor)


def test_names_come_in_the_order_of_the_file(path):
    save_file({"a": torch.zeros(1, dtype=torch.uint8), "b": torch.zeros(1), "c": torch.zeros(1)}, path)
    assert SafetensorsFile(path).names() == ["b", "c", "a"]


def test_several_tensors_share_one_look_at_the_file(path):
    save_file({"a": torch.arange(4), "b": torch.ones(2)}, path)
    found = SafetensorsFile(path).tensors(["b", "a"])
    assert list(found) == ["b", "a"]
    assert found["a"].tolist() == [0, 1, 2, 3]


def test_a_tensor_off_its_alignment_is_moved_to_one(path):
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    path.write_bytes(raw(header, b"\1" + struct.pack("<2f", 1.5, -2.0)))
    found = SafetensorsFile(path).tensor("w")
    assert found.data_ptr() % 4 == 0
    assert found.tolist() == [1.5, -2.0]


def test_reading_tensor_by_tensor_holds_one(path):
    each = torch.arange(5 * MB, dtype=torch.float32)  # 20 MB
    shape = {str(i): (each.dtype, tuple(each.shape)) for i in range(10)}
    with SafetensorsWriter(path, shape) as writer:
        for name in shape:
            writer.write(name, each)
    expected = each.sum(dtype=torch.float64).item()
    del each
    file = SafetensorsFile(path)
    before = psutil.Process().memory_info().rss
    most = 0
    for name in file.names():
        tensor = file.tensor(name)
        assert tensor.sum(dtype=torch.float64).item() == expected
        most = max(most, psutil.Process().memory_info().rss - before)
        del tensor
    assert 15 * MB < most < 30 * MB, most


def raw(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), span: Any = (0, 4), **other: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span} | other


def without(field: str) -> dict[str, Any]:
    return {key: value for key, value in entry().items() if key != field}


# How a file is broken -> its bytes, the tensor and the field that the error names, a part of what it says.
BROKEN: dict[str, tuple[bytes, str | None, str | None, str]] = {
    "empty": (b"", None, "header", "has 0 bytes"),
    "seven-bytes": (b"\0" * 7, None, "header", "has 7 bytes"),
    "length-2^60": (raw({}, length=2**60), None, "header", f"claims {2**60} bytes; the file has 10"),
    "length-past-the-end": (raw({}, length=3), None, "header", "claims 3 bytes"),
    "length-too-short": (raw({"w": entry()}, b"1234", length=9), None, "header", "not JSON"),
    "length-0": (raw(b"", b"1234"), None, "header", "does not begin with {"),
    "not-this-format": (b"GGUF" + b"\0" * 100, None, "header", "no safetensors file"),
    "leading-space": (raw(b" {}"), None, "header", "does not begin with {"),
    "not-json": (raw(b"{"), None, "header", "not JSON"),
    "a-name-twice": (raw(b'{"w":1,"w":2}'), None, "header", "'w' occurs twice"),
    "surrogate": (raw({"\ud800": entry()}, b"1234"), None, None, "not a safetensors file"),
    "metadata-list": (raw({"__metadata__": []}), None, "__metadata__", "expected texts by name"),
    "metadata-number": (raw({"__metadata__": {"a": 1}}), None, "__metadata__", "expected texts by name"),
    "entry-null": (raw({"w": None}), "w", None, "expected an object"),
    "no-dtype": (raw({"w": without("dtype")}, b"1234"), "w", "dtype", "is missing"),
    "no-shape": (raw({"w": without("shape")}, b"1234"), "w", "shape", "is missing"),
    "no-offsets": (raw({"w": without("data_offsets")}, b"1234"), "w", "data_offsets", "is missing"),
    "dtype-unknown": (raw({"w": entry("F31")}, b"1234"), "w", "dtype", "is 'F31'; known: U64"),
    "dtype-unknown-to-torch": (raw({"w": entry("F6_E2M3", [4], [0, 3])}, b"123"), "w", "dtype", "'F6_E2M3'"),
    "dtype-list": (raw({"w": entry(["F32"])}, b"1234"), "w", "dtype", "is ['F32']"),
    "shape-negative": (raw({"w": entry(shape=[-1])}, b"1234"), "w", "shape", "is [-1]"),
    "shape-float": (raw({"w": entry(shape=[1.0])}, b"1234"), "w", "shape", "is [1.0]"),
    "shape-bool": (raw({"w": entry(shape=[True])}, b"1234"), "w", "shape", "is [True]"),
    "shape-number": (raw({"w": entry(shape=1)}, b"1234"), "w", "shape", "is 1"),
    "shape-2^50": (raw({"w": entry(shape=[2**50])}, b"1234"), "w", "data_offsets", f"takes {2**52} bytes"),
    "shape-2^50-twice": (raw({"w": entry(shape=[2**50] * 2)}, b"1234"), "w", "shape", "can exist"),
    "shape-0-by-2^60": (raw({"w": entry(shape=[0, 2**60], span=[0, 0])}), "w", "shape", "can exist"),
    "shape-65-dims": (raw({"w": entry(shape=[1] * 65)}, b"1234"), "w", "shape", "at most 64 sizes"),
    "shape-other-size": (raw({"w": entry(shape=[2])}, b"1234"), "w", "data_offsets", "takes 8 bytes"),
    "f4-odd": (raw({"w": entry("F4", [7], [0, 4])}, b"1234"), "w", "shape", "is even"),
    "f4-scalar": (raw({"w": entry("F4", [], [0, 1])}, b"1"), "w", "shape", "is even"),
    "offsets-negative": (raw({"w": entry(span=[-4, 0])}, b"1234"), "w", "data_offsets", "two offsets"),
    "offsets-one": (raw({"w": entry(span=[4])}, b"1234"), "w", "data_offsets", "two offsets"),
    "offsets-reversed": (raw({"w": entry(span=[4, 0])}, b"1234"), "w", "data_offsets", "takes 4 bytes"),
    "offsets-huge": (raw({"w": entry(span=[2**62, 2**62 + 4])}, b"1234"), "w", "data_offsets", "begins at byte"),
    "offsets-too-large": (raw({"w": entry(span=[0, 2**63])}, b"1234"), "w", "data_offsets", "two offsets"),
    "overlap": (raw({"v": entry(), "w": entry()}, b"1234"), "w", "data_offsets", "end at byte 4"),
    "hole": (raw({"v": entry(), "w": entry(span=[8, 12])}, b"1" * 12), "w", "data_offsets", "end at byte 4"),
    "cut-short": (raw({"w": entry()}, b"123"), "w", "data_offsets", "the file has 3 behind its header"),
    "one-byte-more": (raw({"w": entry()}, b"12345"), None, None, "has 1 bytes that belong to no tensor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused(case, path):
    data, tensor, field, says = BROKEN[case]
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        SafetensorsFile(path)
    error = caught.value
    assert (error.file, error.tensor, error.field) == (str(path), tensor, field)
    assert says in error.message
    assert len(str(error)) < 600


def test_what_the_library_forgives_is_forgiven(path):
    path.write_bytes(
        raw(b'{"__metadata__":null,"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}  ', b"1234")
    )
    file = SafetensorsFile(path)
    assert file.names() == ["w"]
    assert file.metadata == {}
    assert content(file.tensor("w")) == b"1234"


def test_a_missing_file_is_missing(path):
    with pytest.raises(FileNotFoundError):
        SafetensorsFile(path)
    save_file({"w": torch.ones(1)}, path)
    file = SafetensorsFile(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        file.tensor("w")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, link_to_itself], ids=["directory", "fifo", "loop"])
def test_what_is_no_file_is_refused(make: Callable[[Path], None], path):
    make(path)
    with pytest.raises(FormatError, match="is not a regular file"):
        SafetensorsFile(path)


def test_a_tensor_that_is_not_there_is_named(path):
    save_file({"w": torch.ones(1)}, path)
    file = SafetensorsFile(path)
    for ask in (file.describe, file.tensor):
        with pytest.raises(FormatError, match="is not in the file") as caught:
            ask("v")
        assert caught.value.tensor == "v"


def test_a_file_that_changes_between_two_looks_is_refused(path):
    save_file({"w": torch.ones(4)}, path)
    file = SafetensorsFile(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(FormatError, match="changed while") as caught:
        file.tensor("w")
    assert (caught.value.file, caught.value.tensor) == (str(path), "w")
    path.write_bytes(b"\0" * 100)
    with pytest.raises(FormatError, match="not a safetensors file"):
        file.tensor("w")
