"""Writing a safetensors file: the bytes of the library, as a stream; and nothing left of what was not finished."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qloralab.nf4.files import safetensors_writer
from qloralab.nf4.files.safetensors_reader import DTYPES, SafetensorsFile
from qloralab.nf4.files.safetensors_writer import SafetensorsWriter

from .safetensors_cases import EVERY_DTYPE, MB, SHAPES, layout, random_bytes


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    return json.loads(raw[8 : 8 + length])


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
def test_the_writer_writes_the_bytes_of_the_library(tmp_path, backwards):
    save_file(EVERY_DTYPE, tmp_path / "theirs", metadata={"format": "pt"})
    writer = SafetensorsWriter(tmp_path / "ours", layout(EVERY_DTYPE))
    assert not list(tmp_path.glob("*ours*"))
    with writer:
        for name in sorted(EVERY_DTYPE, reverse=backwards):
            writer.write(name, EVERY_DTYPE[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert writer.needed_bytes == (tmp_path / "ours").stat().st_size


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES.values())), st.sampled_from(SHAPES)), max_size=6)


@given(TENSORS, st.dictionaries(NAMES, NAMES, max_size=1))
def test_the_writer_writes_the_bytes_of_the_library_for_any_name(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    made = {name: random_bytes(dtype, shape) for name, (dtype, shape) in tensors.items()}
    with SafetensorsWriter(path, tensors, metadata=metadata) as writer:
        for name, tensor in made.items():
            writer.write(name, tensor)
    ours = path.read_bytes()
    save_file(made, path, metadata=metadata or None)
    assert ours == path.read_bytes()


def test_strides_do_not_matter(path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "_SLAB", 64)  # several slabs of each
    base = torch.randn(6, 10, 3)
    tensors = {
        "transposed": base.transpose(0, 2),
        "skipping": base[::2, :, 1:],
        "broadcast": torch.randn(1, 5).expand(40, 5),
        "shifted": base[3:],
        "conjugate": torch.randn(3, 9, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(base),
        "one-row": torch.randn(10, 1).T,
        "float8": torch.randn(7, 5).to(torch.float8_e4m3fn).T,
    }
    with SafetensorsWriter(path, layout(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, tensors[name]), name


def test_writing_copies_slabs_not_tensors(path):
    wide = torch.ones(1, MB).expand(32, MB)  # 128 MB as a file, 4 in memory
    process = psutil.Process()
    most, slab = 0, safetensors_writer._slabs

    def watched(tensor: Tensor):
        nonlocal most
        for part in slab(tensor):
            most = max(most, process.memory_info().rss - before)
            yield part

    with pytest.MonkeyPatch.context() as patch, SafetensorsWriter(path, {"w": (wide.dtype, (32, MB))}) as writer:
        patch.setattr(safetensors_writer, "_slabs", watched)
        before = process.memory_info().rss
        writer.write("w", wide)
    assert most < 48 * MB, most
    assert path.stat().st_size > 128 * MB


def test_late_tensors_have_their_real_lengths(path):
    text, other = (torch.arange(length, dtype=torch.uint8) for length in (3, 90))
    shapes = {"w": (torch.float32, (2,)), "w.a": (torch.uint8, (100,)), "w.b": (torch.uint8, (100,))}
    with SafetensorsWriter(path, shapes, late=["w.a", "w.b"]) as writer:
        writer.write("w.b", other)
        writer.write("w.a", text)
        writer.write("w", torch.ones(2))
    assert path.stat().st_size == writer.needed_bytes - 107
    assert header_of(path)["w.b"] == {"dtype": "U8", "shape": [90], "data_offsets": [11, 101]}
    found = load_file(path)
    assert torch.equal(found["w.a"], text)
    assert torch.equal(found["w.b"], other)
    assert found["w"].tolist() == [1, 1]
    assert SafetensorsFile(path).names() == ["w", "w.a", "w.b"]


def test_a_late_tensor_is_taken_as_it_is_now(path):
    text = torch.ones(2, dtype=torch.uint8)
    with SafetensorsWriter(path, {"a": (torch.uint8, (2,))}, late=["a"]) as writer:
        writer.write("a", text)
        text.zero_()
    assert load_file(path)["a"].tolist() == [1, 1]


LAYOUT = {"v": (torch.float32, (2,)), "w": (torch.bfloat16, (2, 3)), "w.json": (torch.uint8, (9,))}
WRONG = {
    "unknown-name": ("x", torch.zeros(2), "x is not in the layout"),
    "other-dtype": ("w", torch.zeros(2, 3), r"w is torch.float32 \[2, 3\]; its layout is torch.bfloat16 \[2, 3\]"),
    "other-shape": ("w", torch.zeros(3, 2, dtype=torch.bfloat16), r"w is torch.bfloat16 \[3, 2\]; its layout"),
    "twice": ("v", torch.zeros(2), "v is written twice"),
    "late-too-long": ("w.json", torch.zeros(10, dtype=torch.uint8), r"w.json is torch.uint8 \[10\]; its layout"),
    "late-other-dtype": ("w.json", torch.zeros(9, dtype=torch.int8), "w.json is torch.int8"),
    "late-two-dims": ("w.json", torch.zeros(9, 1, dtype=torch.uint8), r"w.json is torch.uint8 \[9, 1\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_tensor_out_of_place_is_refused_and_leaves_nothing(case, path):
    name, tensor, says = WRONG[case]
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=says), SafetensorsWriter(path, LAYOUT, late=["w.json"]) as writer:  # noqa: PT012
        writer.write("v", torch.zeros(2))
        writer.write(name, tensor)
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("missing", LAYOUT)
def test_a_missing_tensor_is_refused_and_leaves_nothing(missing, path):
    says = pytest.raises(ValueError, match=f"{missing} is not written")
    with says, SafetensorsWriter(path, LAYOUT, late=["w.json"]) as writer:
        for name, (dtype, shape) in LAYOUT.items():
            if name != missing:
                writer.write(name, torch.zeros(shape, dtype=dtype))
        assert not path.exists()
    assert list(path.parent.iterdir()) == []


def test_an_interrupt_leaves_nothing(path):
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(path, LAYOUT) as writer:  # noqa: PT012
        writer.write("v", torch.zeros(2))
        assert [file.name for file in path.parent.iterdir()] == [".model.safetensors.part"]
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []


def test_a_failing_disk_leaves_nothing(path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OSError, match="No space left"),
        SafetensorsWriter(path, {"v": (torch.float32, (2,))}) as writer,
    ):
        writer.write("v", torch.zeros(2))
    assert list(path.parent.iterdir()) == []


def test_the_file_is_durable_before_it_has_its_name(path, monkeypatch):
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.exists()))
    with SafetensorsWriter(path, {}):
        pass
    assert synced == [False]
    assert load_file(path) == {}


@pytest.mark.parametrize(
    ("shapes", "late", "says"),
    [
        ({"w": (torch.complex128, (1,))}, [], r"w is torch.complex128 \[1\], which a safetensors file cannot hold"),
        ({"w": (torch.float4_e2m1fn_x2, ())}, [], "cannot hold"),
        ({"__metadata__": (torch.uint8, (1,))}, [], "no name for a tensor"),
        ({"w": (torch.uint8, (1,))}, ["v"], "v is late, but not in the layout"),
        ({"w": (torch.uint8, (1, 1))}, ["w"], "w is late, but"),
        ({"w": (torch.int8, (1,))}, ["w"], "w is late, but"),
        ({"w" * 100_000_000: (torch.int8, (1,))}, [], "longer than the format allows"),
    ],
    ids=["complex128", "f4-scalar", "metadata", "late-unknown", "late-two-dims", "late-int8", "header-too-long"],
)
def test_a_layout_that_no_file_has_is_refused(shapes, late, says, path):
    with pytest.raises(ValueError, match=says):
        SafetensorsWriter(path, shapes, late)
