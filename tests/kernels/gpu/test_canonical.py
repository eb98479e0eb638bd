"""A packed weight as the kernels take it: what fits and what does not, the tile of tokens, scales and lanes."""

from __future__ import annotations

import gc
import math

import pytest
import torch

import qloralab as ql
from qloralab.kernels.gpu import canonical
from qloralab.kernels.gpu.canonical import arguments, mma_sync, token_tile, why_not
from qloralab.nf4.codebook import normal_float
from qloralab.nf4.packed import Packed


def weight(shape: tuple[int, ...] = (64, 128), block_size: int = 64, offset: int = 0, **changes) -> Packed:
    memory = torch.zeros(math.prod(shape) // 2 + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + offset
    packed = memory[start : start + math.prod(shape) // 2, None]
    scales = torch.ones(math.prod(shape) // block_size)
    return Packed(packed, scales, None, None, normal_float(), shape, block_size)._replace(**changes)


NOT_FITTING = {
    "K": (weight((64, 96)), "K must be a multiple of 64, not 96"),
    "N": (weight((63, 64)), "N must be at least 64, not 63"),
    "blocks": (weight(block_size=32), "block size must be a multiple of 64, not 32"),
    "1-D": (weight((4096,)), "2 dimensions, not 1"),
    "3 bits": (weight(values=normal_float(3)), "16 values, not 8"),
    "alignment": (weight(offset=4), "do not begin at a multiple of 16 bytes"),
}


@pytest.mark.parametrize(("operands", "message"), NOT_FITTING.values(), ids=NOT_FITTING)
def test_what_does_not_fit(operands, message):
    assert message in str(why_not(operands))
    with pytest.raises(ValueError, match=message):
        arguments(operands)


def test_the_bytes_on_the_gpu_are_the_bytes_of_the_file():
    """Nothing is copied, and what is resident takes less than 4.2 bits a weight."""
    operands = ql.quantize(torch.randn(512, 1024)).operands()
    given = arguments(operands)
    pointers = [tensor for tensor in given.values() if isinstance(tensor, torch.Tensor)]
    assert given["packed"] is operands.packed
    assert given["scales"] is operands.scales
    assert 8 * sum(tensor.nbytes for tensor in pointers) / (512 * 1024) < 4.2


@pytest.mark.parametrize(("major", "sync", "most"), [(8, True, 64), (9, False, 128), (10, False, 128), (12, True, 64)])
def test_tensor_cores_by_capability(major, sync, most, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert mma_sync(torch.device("cuda")) == sync
    assert token_tile(1500, sync) == most


@pytest.mark.parametrize(("M", "tokens"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (1500, 128)])
def test_the_tile_of_tokens(M, tokens):
    assert token_tile(M, sync=False) == tokens


@pytest.mark.parametrize(
    ("assembly", "source"),
    [
        (canonical._FROM_4, lambda lane, output: lane // 4 * 4 + output),
        (canonical._FROM_8, lambda lane, output: output * 4 + lane % 4),
    ],
    ids=["four", "eight"],
)
def test_the_shuffles_read_the_lanes_that_they_mean(assembly, source):
    """``shfl.sync.idx`` as the PTX manual has it: the lane is ``b``, within what the upper bits of ``c`` fix."""
    for output, line in enumerate(assembly.value.splitlines()):
        opcode, _ = line.split(maxsplit=1)
        assert opcode == "shfl.sync.idx.b32"
        *_, b, c, members = (int(part.strip(" ;"), 0) for part in line.split(",")[2:])
        assert members == 0xFFFFFFFF
        fixed, clamp = c >> 8 & 31, c & 31
        for lane in range(32):
            least, most = lane & fixed, (lane & fixed) | (clamp & ~fixed)
            wanted = least | (b & ~fixed & 31)
            assert wanted <= most
            assert wanted == source(lane, output)


def test_what_is_found_out_about_a_weight_is_kept_until_it_is_another(device, monkeypatch):
    made: list[Packed] = []
    right = canonical._arguments
    monkeypatch.setattr(canonical, "_arguments", lambda weight: made.append(weight) or right(weight))
    weight = ql.quantize(torch.randn(64, 128)).to(device).operands()
    assert weight.offset is not None

    def is_made(**parts) -> bool:
        made.clear()
        changed = weight._replace(**parts)
        assert canonical.arguments(changed)["packed"] is changed.packed
        assert why_not(changed) is None
        return len(made) == 1

    assert is_made()
    assert not is_made()
    changes = [
        {"scales": weight.scales.clone()},
        {"offset": weight.offset.clone()},
        {"values": weight.values.clone()},
        {"shape": (128, 64)},
        {"block_size": 128, "scales": weight.scales[::2].contiguous()},
    ]
    for change in changes:
        assert is_made(**change)
        assert is_made()
    weight.packed.bitwise_xor_(0x11)  # the kernels read what is there
    assert not is_made()
    weight.values[3] = 0.25
    assert is_made()
    weight.packed.data = weight.packed.clone()
    assert is_made()


def test_what_is_found_out_goes_with_the_weight(device):
    weight = ql.quantize(torch.randn(64, 128)).to(device)
    before = len(canonical._plans)
    assert canonical.why_not(weight.operands()) is None
    assert len(canonical._plans) == before + 1
    del weight
    gc.collect()
    assert len(canonical._plans) == before
