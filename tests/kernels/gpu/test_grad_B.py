"""G and dB in one pass over the gradient of y: exact sums bit for bit, any cut, accuracy, and when it is taken."""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor

from qloralab.kernels.gpu import grad_B as module
from qloralab.kernels.gpu.grad_B import FEWEST_STEPS, PROGRAMS, TOKENS, WIDTHS, Plan, grad_B, plan_of
from qloralab.nf4.packed import DTYPES

# odd everywhere, one and several blocks of columns, ranges of tokens and tiles of the rank
CASES = [
    (1, 5, 1, Plan(128, 1)),
    (1, 300, 16, Plan(128, 1)),
    (3, 127, 3, Plan(128, 1)),
    (3, 192, 64, Plan(128, 1)),
    (67, 5, 16, Plan(128, 2)),
    (67, 127, 128, Plan(128, 1)),
    (67, 192, 3, Plan(128, 2)),
    (130, 257, 33, Plan(256, 2)),
    (200, 600, 16, Plan(512, 3)),
]


def few(*shape: int) -> Tensor:
    """A few whole numbers: their sums are exact in any order."""
    return torch.randint(-2, 3, shape).float()


def random(M: int, N: int, r: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    dy, h = torch.randn(M, N, device=device).to(dtype), torch.randn(M, r, device=device).to(dtype)
    return dy, h, torch.randn(N, r, device=device)


@pytest.mark.parametrize(("M", "N", "r", "plan"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_exact_sums(M, N, r, plan, dtype, guarded_twice):
    dy, h, B = few(M, N), few(M, r), few(N, r)
    given = guarded_twice(dy.to(dtype)), guarded_twice(h.to(dtype)), guarded_twice(B)
    G, dB = grad_B(*given, 0.5, plan)
    assert (G.dtype, dB.dtype) == (dtype, torch.float32)
    assert torch.equal(G.cpu(), (0.5 * (dy.double() @ B.double())).float().to(dtype))
    assert torch.equal(dB.cpu().double(), dy.T.double() @ h.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "N", "r"), [(3, 127, 3), (67, 300, 16), (67, 192, 64)])
def test_against_float64(M, N, r, dtype, device):
    """Only the roundings of B and of the results: dy and h are rounded to their dtype beforehand."""
    dy, h, B = random(M, N, r, dtype, device)
    exact = 1.25 * (dy.double() @ B.to(dtype).double()), dy.T.double() @ h.double()
    limit = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-6}[dtype]
    for plan in (None,) if dtype == torch.float32 else (None, Plan(128, 2 if M > TOKENS else 1)):
        G, dB = grad_B(dy, h, B, 1.25, plan)
        assert (G.dtype, dB.dtype) == (dtype, torch.float32)
        most = limit if plan is None else 1e-6  # two products round dB
        assert (G.double() - exact[0]).norm() <= limit * exact[0].norm()
        assert (dB.double() - exact[1]).norm() <= most * exact[1].norm()


def test_parts_are_added_in_a_fixed_order(device):
    given = random(200, 300, 5, torch.bfloat16, device)
    first, second = grad_B(*given, 1.0, Plan(128, 3)), grad_B(*given, 1.0, Plan(128, 3))
    assert all(map(torch.equal, first, second))


def test_any_strides_and_nothing(device):
    dy, h, B = (some.to(device) for some in (few(6, 70).bfloat16(), few(6, 3).bfloat16(), few(70, 3)))
    right = grad_B(dy, h, B, 1.0, Plan(128, 1))
    dy_across, h_across, B_across = (some.T.contiguous().T for some in (dy, h, B))
    assert all(map(torch.equal, grad_B(dy_across, h_across, B_across, 1.0, Plan(128, 1)), right))
    one = torch.ones((), device=device).bfloat16().expand(6, 70)
    found, right = grad_B(one, h, B, 1.0, Plan(128, 1)), grad_B(one.contiguous(), h, B, 1.0, Plan(128, 1))
    assert all(map(torch.equal, found, right))
    for M, N in ((0, 70), (6, 0)):
        G, dB = grad_B(dy[:M, :N], h[:M], B[:N], 1.0)
        assert torch.equal(G, torch.zeros(M, 3, device=device).bfloat16())
        assert torch.equal(dB, torch.zeros(N, 3, device=device))


@pytest.mark.parametrize("r", [1, 16, 17, 32, 33, 64, 128])
@pytest.mark.parametrize("widest", WIDTHS[:2])
def test_one_pass_is_taken_where_it_moves_fewer_bytes(r, widest):
    taken = 0
    for M in (1, 16, 63, 256, 1000, 4096, 16384):
        for N in (1, 127, 1024, 4096, 14336, 28672):
            plan = plan_of(M, N, r, widest)
            if plan is None:
                continue
            taken += 1
            blocks, tiles = triton.cdiv(N, plan.columns), triton.cdiv(M, TOKENS)
            moved = 8 * r * ((blocks > 1) * blocks * M + (plan.splits > 1) * plan.splits * N)
            assert moved < 2 * M * N
            assert plan.columns in WIDTHS
            assert plan.columns <= widest
            assert 1 <= plan.splits <= max(tiles // FEWEST_STEPS, 1)
            assert plan.splits == 1 or blocks * plan.splits <= 2 * PROGRAMS
            steps = triton.cdiv(tiles, plan.splits)
            assert (plan.splits - 1) * steps < tiles  # no range is empty
    assert bool(taken) == (r <= 32)


@pytest.mark.parametrize(
    ("N", "r", "plan", "parts"),
    [
        (14336, 16, (512, 4), 11_010_048),
        (14336, 32, (512, 4), 22_020_096),
        (4096, 16, (512, 16), 6_291_456),
        (4096, 32, (512, 16), 12_582_912),
        (1024, 16, (128, 16), 3_145_728),
    ],
)
def test_the_workspaces_of_the_docstring(N, r, plan, parts):
    found = plan_of(4096, N, r)
    assert found == plan
    assert found is not None
    assert found.parts(4096, N, r) == parts
    row = next(line for line in str(module.__doc__).splitlines() if line.startswith(f"{N:<8}{r:<4}"))
    assert row.split()[2:4] == [f"{-(-N // plan[0])},", str(plan[1])]
    megabytes = [float(number) for number in row.replace("MB", "").split()[4:]]
    assert megabytes == pytest.approx([parts / 1e6, 2 * parts / 1e6, 2 * 4096 * N / 1e6], rel=0.02)


def test_the_rule_decides(device, monkeypatch):
    given = random(67, 300, 4, torch.bfloat16, device)
    passes = []
    right = module._one_pass
    monkeypatch.setattr(module, "_one_pass", lambda *arguments: passes.append(arguments[-1]) or right(*arguments))
    grad_B(*given, 1.0)
    assert passes == [plan_of(67, 300, 4)]
    for dtype, r in ((torch.float32, 4), (torch.bfloat16, 64)):
        grad_B(*random(67, 300, r, dtype, device), 1.0)
    assert len(passes) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": torch.zeros(2)}, "dy and B must be matrices"),
        ({"B": torch.zeros(64)}, "dy and B must be matrices"),
        ({"B": torch.zeros(63, 3)}, r"B must be torch.float32 \[64, 3\]"),
        ({"B": torch.zeros(64, 3).half()}, r"B must be torch.float32 \[64, 3\]"),
        ({"h": torch.zeros(2, 4).half()}, r"h must be torch.float16 \[2, 3\]"),
        ({"h": torch.zeros(2, 3)}, r"h must be torch.float16 \[2, 3\]"),
    ],
)
def test_refused(change, message, device):
    given = {"dy": torch.zeros(2, 64).half(), "h": torch.zeros(2, 3).half(), "B": torch.zeros(64, 3)} | change
    dy, h, B = (given[name].to(device) for name in ("dy", "h", "B"))
    with pytest.raises(ValueError, match=message):
        grad_B(dy, h, B, 1.0)


def test_what_a_device_has_room_for(monkeypatch):
    for shared, columns in ((232_448, 512), (166_912, 256), (101_376, 256)):
        module.widest.cache_clear()
        properties = type("Properties", (), {"shared_memory_per_block_optin": shared})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, properties=properties: properties)
        assert module.widest(torch.device("cuda")) == columns
    module.widest.cache_clear()
