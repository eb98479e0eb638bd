"""A quantized tensor where a tensor would be: moves, copies, pickles, shared memory, files, torch.compile, printing."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor

from qloralab import QuantizedTensor, linear, quantize

GRID = torch.linspace(-1, 1, 16)
CODEBOOKS = {
    "nf4": "nf4",
    "fp4": "fp4",
    "fp4_e3m0": "fp4_e3m0",
    "int4": "int4",
    "nf3": "nf3",
    "nf8": "nf8",
    "own": GRID,
}
codebooks = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS)
double_quants = pytest.mark.parametrize("double_quant", [False, True], ids=["single", "double"])
ADVICE = r"not pickled.*to_bitsandbytes\(\).*state_dict\(\)"


def parts(weight: QuantizedTensor) -> dict[str, Tensor]:
    named = {name: getattr(weight, name) for name in ("packed", "scales", "absmax2", "offset", "values")}
    return {name: part for name, part in named.items() if part is not None}


def pointers(weight: QuantizedTensor) -> set[int]:
    return {part.untyped_storage().data_ptr() for part in parts(weight).values()}


def assert_same_bits(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert parts(a).keys() == parts(b).keys()
    for name, part in parts(a).items():
        assert (part.dtype, part.shape) == (parts(b)[name].dtype, parts(b)[name].shape), name
        assert part.numpy().tobytes() == parts(b)[name].numpy().tobytes(), name
    assert (a.shape, a.dtype, a.codebook, a.block_size) == (b.shape, b.dtype, b.codebook, b.block_size)


# Moves


@codebooks
@double_quants
def test_on_the_meta_device_it_has_shapes_and_no_numbers(codebook, double_quant):
    q = quantize(torch.randn(65, 66, dtype=torch.bfloat16), codebook, double_quant=double_quant)
    moved = q.to("meta")
    assert moved.device == torch.device("meta")
    assert {part.device.type for part in parts(moved).values()} == {"meta"}
    for name, part in parts(moved).items():
        assert (part.dtype, part.shape) == (parts(q)[name].dtype, parts(q)[name].shape)
    assert (moved.nbytes, moved.bits_per_parameter, moved.bits) == (q.nbytes, q.bits_per_parameter, q.bits)
    assert (moved.absmax().shape, moved.absmax().dtype) == (q.absmax().shape, torch.float32)
    assert (moved.dequantize().shape, moved.dequantize().dtype) == ((65, 66), torch.bfloat16)
    assert linear(torch.ones(3, 66, device="meta"), moved).shape == (3, 65)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=["text", "device"])
def test_a_move_to_where_it_is_copies_nothing(device):
    q = quantize(torch.randn(65, 66))
    assert pointers(q.to(device)) == pointers(q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8], ids=str)
def test_a_conversion_is_refused_with_advice(dtype):
    with pytest.raises(TypeError, match=rf"not converted; dequantize\({dtype}\)"):
        quantize(torch.randn(64)).to(dtype)


def test_an_unknown_device_is_refused():
    with pytest.raises(RuntimeError, match="nowhere"):
        quantize(torch.randn(64)).to("nowhere")


@pytest.mark.gpu
@codebooks
@double_quants
def test_to_a_gpu_and_back_by_pinned_memory(codebook, double_quant):
    q = quantize(torch.randn(65, 66), codebook, double_quant=double_quant)
    pinned = q.pin_memory()
    assert all(part.is_pinned() for part in parts(pinned).values())
    assert not any(part.is_pinned() for part in parts(q).values())
    moved = pinned.to("cuda", non_blocking=True)
    assert moved.device.type == "cuda"
    assert torch.equal(moved.dequantize().cpu(), q.dequantize())
    assert_same_bits(moved.to("cpu"), q)


# Copies


@codebooks
@double_quants
@pytest.mark.parametrize("duplicate", [copy.deepcopy, QuantizedTensor.clone], ids=["deepcopy", "clone"])
def test_a_deep_copy_has_memory_of_its_own(duplicate, codebook, double_quant):
    q = quantize(torch.randn(65, 66), codebook, double_quant=double_quant)
    twin = duplicate(q)
    assert twin is not q
    assert_same_bits(twin, q)
    assert not pointers(twin) & pointers(q)
    before = q.dequantize()
    twin.packed.zero_()
    twin.values.zero_()
    assert torch.equal(q.dequantize(), before)


def test_a_copy_is_the_same():
    q = quantize(torch.randn(65, 66))
    assert copy.copy(q) is q


def test_what_is_held_twice_is_copied_once():
    q = quantize(torch.randn(65, 66))
    first, second = copy.deepcopy([q, q])
    assert first is second
    assert first is not q


def test_equality_is_identity():
    q = quantize(torch.randn(64))
    assert q == q
    assert q != copy.deepcopy(q)
    assert len({q, q, copy.deepcopy(q)}) == 2


# Pickles


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_is_not_pickled(protocol):
    with pytest.raises(pickle.PicklingError, match=ADVICE):
        pickle.dumps(quantize(torch.randn(64)), protocol)


@pytest.mark.parametrize("wrap", [lambda q: q, lambda q: [q], lambda q: {"w": q}], ids=["alone", "list", "dict"])
def test_torch_does_not_save_it(wrap):
    with pytest.raises(pickle.PicklingError, match=ADVICE):
        torch.save(wrap(quantize(torch.randn(64))), io.BytesIO())


# Shared memory


@pytest.fixture(scope="module")
def child() -> Iterator[Any]:
    """A pool of one other process, which starts with nothing of this one."""
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


@codebooks
@double_quants
def test_sharing_moves_every_part_and_changes_no_bit(codebook, double_quant):
    q = quantize(torch.randn(65, 66), codebook, double_quant=double_quant)
    before = copy.deepcopy(q)
    assert not any(part.is_shared() for part in parts(q).values())
    assert q.share_memory_() is q
    assert all(part.is_shared() for part in parts(q).values())
    assert_same_bits(q, before)


def test_a_child_process_has_the_same_bits(child):
    for codebook in CODEBOOKS.values():
        q = quantize(torch.randn(65, 66, dtype=torch.bfloat16), codebook)
        assert_same_bits(child.apply(QuantizedTensor.clone, (q,)), q)
        assert torch.equal(child.apply(QuantizedTensor.dequantize, (q,)), q.dequantize())


@double_quants
def test_a_child_process_sees_the_same_memory(child, double_quant):
    q = quantize(torch.randn(65, 66), double_quant=double_quant).share_memory_()
    child.apply(QuantizedTensor.map, (q, torch.zero_))  # writes zeros over every part
    for name, part in parts(q).items():
        assert not part.any(), name


# Files


@codebooks
@double_quants
@pytest.mark.parametrize("shape", [(65, 66), (3, 5, 7), (1,), (0, 4)], ids=str)
@pytest.mark.parametrize("how", ["torch", "safetensors"])
def test_its_tensors_go_through_a_file_bit_for_bit(how, shape, codebook, double_quant, tmp_path):
    q = quantize(torch.randn(shape, dtype=torch.float16), codebook, block_size=32, double_quant=double_quant)
    tensors = q.stored("a.b")
    file = tmp_path / "weight"
    if how == "torch":
        torch.save(tensors, file)
        loaded = torch.load(file, weights_only=True)
    else:
        save_file(tensors, file)
        loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    assert_same_bits(QuantizedTensor.from_bitsandbytes(loaded, "a.b"), q)


@pytest.mark.parametrize("codebook", ["int4", "fp4_e3m0", "nf3", GRID], ids=["int4", "fp4_e3m0", "nf3", "own"])
def test_what_bitsandbytes_does_not_know_is_not_offered_to_it(codebook):
    with pytest.raises(ValueError, match=r"up\.weight is (int4|fp4_e3m0|nf3|custom); bitsandbytes knows nf4 and fp4"):
        quantize(torch.randn(64), codebook).to_bitsandbytes("up.weight")


# torch.compile


@codebooks
@double_quants
def test_it_is_compiled_in_one_piece(codebook, double_quant):
    q = quantize(torch.randn(33, 66), codebook, double_quant=double_quant)
    x, bias = torch.randn(3, 66, requires_grad=True), torch.randn(33, requires_grad=True)

    def use(x: Tensor, q: QuantizedTensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return linear(x, q, bias), q.dequantize(torch.bfloat16), q.absmax()

    torch._dynamo.reset()
    found, expected = torch.compile(use, fullgraph=True, backend="aot_eager")(x, q, bias), use(x, q, bias)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    dy = torch.randn(3, 33)
    for ours, theirs in zip(*(torch.autograd.grad(y[0], (x, bias), dy) for y in (found, expected)), strict=True):
        assert torch.equal(ours, theirs)


def test_one_compilation_serves_weights_alike():
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 66)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            q = quantize(torch.randn(33, 66))
            assert torch.equal(compiled(x, q), linear(x, q))


# Printing


@pytest.mark.parametrize(
    ("codebook", "text"),
    [
        ("fp4", "[128, 128], fp4, block_size=64, double_quant, 4.129 bits per parameter"),
        ("int4", "[128, 128], int4, block_size=64, double_quant, 4.129 bits per parameter"),
        ("nf3", "[128, 128], nf3, block_size=64, double_quant, 8.129 bits per parameter (3.129 ideal)"),
        (GRID, "[128, 128], custom, block_size=64, double_quant, 4.129 bits per parameter"),
    ],
    ids=["fp4", "int4", "nf3", "own"],
)
def test_repr_says_what_is_held(codebook, text):
    q = quantize(torch.ones(128, 128, dtype=torch.float16), codebook)
    assert repr(q) == f"QuantizedTensor({text}, from torch.float16, device='cpu')"
    assert repr(q.to("meta")) == repr(q).replace("'cpu'", "'meta'")
    assert f"{q}" == repr(q)
