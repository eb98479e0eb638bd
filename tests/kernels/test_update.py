"""The update of segments by each rule, in C and by formula, with 32 and 8 bits: the same bits, and no others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qloralab.kernels import adamw, dispatch, lion
from qloralab.kernels.adamw import ADAMW
from qloralab.kernels.lion import LION
from qloralab.kernels.moment_codes import BLOCK_SIZE, dequantize_moment, quantize_moment
from qloralab.kernels.rule import DTYPES, Moment, Rule, Segments
from qloralab.kernels.update import check, kernel, update_

SIZES = [1, 0, 7, 255, 256, 257, 0, 70_001, 33]  # of segments; more than one task of the C code
STEPS = [1, 5, 2, 1000, 3, 1, 77, 10**6, 4]
RATES: dict[str, Any] = {
    "AdamW": adamw.Rates(1e-3, 0.9, 0.999, 1e-8, 0.01),
    "AdamW, large": adamw.Rates(0.3, 0.5, 0.9, 1e-3, 0.5),
    "AdamW, no decay": adamw.Rates(2e-4, 0.9, 0.95, 1e-8, 0.0),
    "AdamW, no momentum": adamw.Rates(0.3, 0.0, 0.99, 1e-8, 0.01),
    "Lion": lion.Rates(1e-4, 0.9, 0.99, 0.1),
    "Lion, large": lion.Rates(0.3, 0.5, 0.0, 0.5),
}


def plain(p: Tensor, g: Tensor, moments: Sequence[Tensor], step: int, lr: Any) -> None:
    p.sub_(g * lr)


PLAIN = Rule("Plain", (Moment("exp_avg"),), float, plain)

implementation = pytest.mark.parametrize(
    "implementation", [pytest.param("native", marks=pytest.mark.compiler), "reference"]
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16", "f16"])
rules = pytest.mark.parametrize("rule", [ADAMW, LION], ids=["AdamW", "Lion"])
bits = pytest.mark.parametrize("bits", [32, 8])


def make(
    rule: Rule, bits: int, sizes: Sequence[int] = SIZES, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Segments:
    """Segments of numbers of many sizes; some are zeros of either sign. Moments are of the size of the gradients."""
    params = [torch.randn(n).to(dtype) for n in sizes]
    grads = [(scale * torch.randn(n).clamp(-3, 3) * torch.logspace(-6, 1, n)).to(dtype) for n in sizes]
    for some in (params, grads):
        for tensor in some:
            tensor[1::11], tensor[2::11] = 0.0, -0.0
    moments = [[scale * (torch.randn(n) if one.signed else torch.rand(n)) for n in sizes] for one in rule.moments]
    for tensor in moments[0]:
        tensor[2::22] = -0.0  # where the gradient and the sum of both are -0.0 too
    steps = STEPS[: len(sizes)]
    if bits == 32:
        return Segments(params, grads, moments, None, steps)
    coded = [[quantize_moment(m, one.signed) for m in some] for one, some in zip(rule.moments, moments, strict=True)]
    codes, scales = ([[pair[i] for pair in some] for some in coded] for i in (0, 1))
    return Segments(params, grads, codes, scales, steps)


def each(segments: Segments, change: Any) -> Segments:
    """The segments with a function of each list of tensors."""
    scales = None if segments.scales is None else [change(some) for some in segments.scales]
    moments = [change(some) for some in segments.moments]
    return Segments(change(segments.params), change(segments.grads), moments, scales, segments.steps)


def copy(segments: Segments) -> Segments:
    return each(segments, lambda some: [tensor.clone() for tensor in some])


def same(found: Segments, expected: Segments) -> bool:
    """Whether all bits are the same, zeros' signs included; one NaN is as good as another."""
    pairs = zip(chain(*found.tensors), chain(*expected.tensors), strict=True)
    return all(same_bits(a, b) for a, b in pairs)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    nan = expected.isnan()
    a, b = (one.masked_fill(nan, 0) if nan.any() else one for one in (found, expected))
    return found.dtype == expected.dtype and torch.equal(found.isnan(), nan) and torch.equal(bytes_of(a), bytes_of(b))


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def rates_of(rule: Rule) -> Any:
    return RATES[rule.name]


def run(implementation: str, rule: Rule, segments: Segments, rates: Any = None) -> None:
    check(segments)
    with dispatch.use(implementation):
        update_(rule, segments, rates or rates_of(rule))


# bits


@pytest.mark.compiler
@bits
@dtypes
@pytest.mark.parametrize("name", RATES)
def test_the_c_rounds_after_each_operation(name, dtype, bits):
    rule = ADAMW if name.startswith("AdamW") else LION
    found = make(rule, bits, dtype=dtype)
    expected = copy(found)
    for k in range(3):
        steps = [step + k for step in STEPS]
        run("native", rule, replace(found, steps=steps), RATES[name])
        rule.apply_(replace(expected, steps=steps), RATES[name], rounded=True)
        assert same(found, expected)


@pytest.mark.compiler
@rules
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-39, 1.2e-38, 2.0**-63, 1e-12, 1e12, 1.4e19, 9e37])
def test_the_c_has_the_bits_of_the_formula_at_any_scale_of_8_bits(scale, rule):
    """Also where a scale or its reciprocal is no normal float32; AdamW's v is the square of the gradient."""
    assert_c_follows_the_formula(rule, make(rule, 8, [700, 300], scale=scale), updates=2)


def assert_c_follows_the_formula(rule: Rule, found: Segments, updates: int) -> None:
    """Bit for bit, after each update."""
    expected = copy(found)
    for _ in range(updates):
        run("native", rule, found)
        run("reference", rule, expected)
        assert same(found, expected)


@implementation
def test_lion_against_float64(implementation):
    """Step by step from the same numbers. Where the sum is so near to 0 that its sign may differ, either is right."""
    segments, rates = make(LION, 32, [1000]), rates_of(LION)
    (p,), (g,), ((m,),) = segments.params, segments.grads, segments.moments
    for _ in range(200):
        g.copy_(torch.randn(1000) * torch.logspace(-6, 2, 1000))
        g[::7] = 0
        before, grad, moment = (tensor.double().numpy().copy() for tensor in (p, g, m))
        total = rates.beta1 * moment + (1 - rates.beta1) * grad
        run(implementation, LION, segments)
        sure = np.abs(total) > 1e-6 * (np.abs(moment) + np.abs(grad))
        assert (total[~sure] == 0).sum() + sure.sum() > 900
        expected = before * (1 - rates.lr * rates.weight_decay) - rates.lr * np.sign(total)
        np.testing.assert_allclose(p.numpy()[sure], expected[sure], rtol=3e-7, atol=1e-10)
        wanted = rates.beta2 * moment + (1 - rates.beta2) * grad
        np.testing.assert_allclose(m.numpy(), wanted, rtol=0, atol=3e-7 * float(np.abs(moment).max() + 100))
        np.testing.assert_allclose(m.numpy(), wanted, rtol=1e-4, atol=1e-9)


@implementation
@rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_a_narrow_parameter_is_rounded_once(dtype, rule, implementation):
    """A step from p is the step in float32 from p, rounded to nearest, ties to even. Moments stay in float32."""
    found = make(rule, 32, dtype=dtype)
    before, wide = copy(found), copy(found)
    wide = replace(wide, params=[p.float() for p in wide.params], grads=[g.float() for g in wide.grads])
    for one in (found, wide):
        run(implementation, rule, one)
    narrowed = replace(wide, params=[p.to(dtype) for p in wide.params], grads=before.grads)
    assert same(found, narrowed)
    assert not all(map(torch.equal, found.params, before.params))


@implementation
@rules
@bits
def test_segments_of_all_dtypes_have_steps_of_their_own(bits, rule, implementation):
    parts = [make(rule, bits, dtype=dtype) for dtype in DTYPES]
    lists = [list(chain(*some)) for some in zip(*(part.tensors for part in parts), strict=True)]
    count = 2 + len(rule.moments)
    together = copy(Segments(lists[0], lists[1], lists[2:count], lists[count:] or None, STEPS * 3))
    apart = copy(together)
    run(implementation, rule, together)
    for i in range(len(apart.params)):
        alone = each(apart, lambda some, i=i: some[i : i + 1])
        run(implementation, rule, replace(alone, steps=apart.steps[i : i + 1]))
    assert same(together, apart)


@implementation
@rules
@dtypes
@pytest.mark.parametrize(
    ("bits", "numel", "cuts"),
    [(32, 150_000, [0, 1, 17, 17, 33_333, 131_073, 150_000]), (8, 20_001, [0, 256, 256, 33 * 256, 64 * 256, 20_001])],
)
def test_a_parameter_may_be_cut(bits, numel, cuts, dtype, rule, implementation):
    """Anywhere, or with codes at blocks. A task of the C code has 65,536 elements, or 32 blocks."""
    whole = make(rule, bits, [numel], dtype)
    cut = copy(whole)
    spans = [slice(a, b) for a, b in pairwise(cuts)]
    parts = each(cut, lambda some: [some[0][span] for span in spans])
    if cut.scales is not None:
        blocks = [slice(span.start // BLOCK_SIZE, -(-span.stop // BLOCK_SIZE)) for span in spans]
        parts = replace(parts, scales=[[some[0][span] for span in blocks] for some in cut.scales])
    run(implementation, rule, replace(whole, steps=[3]))
    run(implementation, rule, replace(parts, steps=[3] * len(spans)))
    assert same(whole, cut)


@implementation
@rules
@dtypes
def test_the_gradient_and_the_neighbours_are_left_alone(dtype, rule, implementation):
    buffers = replace(make(rule, 32, [20], dtype), steps=[1])
    for tensors, value in zip(buffers.tensors, (1.0, 2.0, 3.0, 5.0), strict=False):
        tensors[0].fill_(value)
    before = copy(buffers)
    run(implementation, rule, each(buffers, lambda some: [some[0][3:16]]), replace(rates_of(rule), lr=0.1))
    inside = [3 <= index < 16 for index in range(20)]
    for k, ((found,), (old,)) in enumerate(zip(buffers.tensors, before.tensors, strict=True)):
        assert (found != old).tolist() == ([False] * 20 if k == 1 else inside)


@implementation
@rules
@bits
@pytest.mark.parametrize("sizes", [[], [0], [0, 0]], ids=str)
def test_nothing_is_updated_where_nothing_is(sizes, bits, rule, implementation):
    run(implementation, rule, make(rule, bits, sizes))


@implementation
@rules
@bits
def test_autograd_knows_that_a_parameter_has_changed(bits, rule, implementation):
    segments = replace(make(rule, bits, [5]), steps=[1])
    param = segments.params[0].requires_grad_()
    loss = (param * param).sum()
    run(implementation, rule, segments)
    assert param.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# numbers that are not finite, and zeros


@implementation
@rules
@dtypes
def test_what_is_not_finite_stays_where_it_is(dtype, rule, implementation):
    segments = replace(make(rule, 32, [5], dtype), steps=[1])
    segments.grads[0].copy_(torch.tensor([0.0, torch.nan, torch.inf, -torch.inf, 1.0]))
    run(implementation, rule, segments)
    wrong = [True, False, False, False, True]
    moments = [some[0].isfinite().tolist() for some in segments.moments]
    assert moments == [wrong] * len(moments)
    assert segments.params[0].isfinite().tolist() == (wrong if rule is ADAMW else [True, False, True, True, True])


@implementation
@rules
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_with_8_bits_what_is_not_finite_shows_in_its_block(wrong, rule, implementation):
    segments = replace(make(rule, 8, [3 * BLOCK_SIZE]), steps=[1])
    (param,), (grad,) = segments.params, segments.grads
    grad[BLOCK_SIZE + 5] = wrong
    run(implementation, rule, segments)
    shows = rule is ADAMW or wrong != wrong
    assert (~param.isfinite()).nonzero().tolist() == ([[BLOCK_SIZE + 5]] if shows else [])
    assert [some[0].isfinite().tolist() for some in segments.scales or ()] == [[True, False, True]] * len(rule.moments)
    grad[BLOCK_SIZE + 5] = 0
    for step in (2, 3):
        run(implementation, rule, replace(segments, steps=[step]))
    finite = param.view(3, BLOCK_SIZE).isfinite()
    assert finite[[0, 2]].all()
    assert not finite[1].any() or rule is LION


@pytest.mark.compiler
@rules
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_the_c_has_the_codes_of_the_formula_where_nothing_is_finite(wrong, rule):
    found = make(rule, 8, [3 * BLOCK_SIZE, 9])
    found.grads[0][BLOCK_SIZE + 5] = found.grads[1][3] = wrong
    assert_c_follows_the_formula(rule, found, updates=3)


@implementation
@rules
def test_moments_of_8_bits_begin_as_zeros_whatever_the_codes_are(rule, implementation):
    zeros = make(rule, 8, [300, 5])
    zeros = replace(zeros, scales=[[torch.zeros_like(one) for one in some] for some in zeros.scales or ()])
    others = copy(zeros)
    for codes in chain(*others.moments):
        codes.random_(256)
    for one in (zeros, others):
        run(implementation, rule, one)
    assert same(zeros, others)
    assert all((some[0] > 0).all() for some in zeros.scales or ())


@implementation
@rules
def test_a_block_without_gradient_stays_without_moments(rule, implementation):
    segments = replace(make(rule, 8, [2 * BLOCK_SIZE]), steps=[1])
    for (scale,) in segments.scales or ():
        scale.zero_()
    (param,), (grad,), rates = segments.params, segments.grads, rates_of(rule)
    grad[:BLOCK_SIZE] = 0
    before = param.clone()
    run(implementation, rule, segments)
    for (codes,), (scale,), moment in zip(segments.moments, segments.scales or (), rule.moments, strict=True):
        assert scale[0] == 0
        assert (codes[:BLOCK_SIZE] == (127 if moment.signed else 0)).all()
    torch.testing.assert_close(param[:BLOCK_SIZE], before[:BLOCK_SIZE] * (1 - rates.lr * rates.weight_decay))


@implementation
@rules
@dtypes
def test_an_update_of_8_bits_is_that_of_32_between_two_conversions(dtype, rule, implementation):
    found = make(rule, 8, dtype=dtype)
    wide, kinds = copy(found), rule.moments
    coded = zip(kinds, wide.moments, wide.scales or (), strict=True)
    decoded = [
        [dequantize_moment(pair[0], pair[1], kind.signed) for pair in zip(*some, strict=True)] for kind, *some in coded
    ]
    rule.apply_(replace(wide, moments=decoded, scales=None), rates_of(rule), rounded=True)
    again = [[quantize_moment(one, kind.signed) for one in some] for kind, some in zip(kinds, decoded, strict=True)]
    codes, scales = ([[pair[i] for pair in some] for some in again] for i in (0, 1))
    run(implementation, rule, found)
    assert same(found, replace(wide, moments=codes, scales=scales))


# what is refused


def spoiled(name: str, tensor: Any, bits: int = 32) -> Segments:
    """Two segments of 300 elements, a list's second entry replaced."""
    segments = make(ADAMW, bits, [300, 300])
    lists = {"params": segments.params, "grads": segments.grads, "steps": segments.steps}
    lists |= {f"moments[{k}]": some for k, some in enumerate(segments.moments)}
    lists |= {f"scales[{k}]": some for k, some in enumerate(segments.scales or ())}
    some: Any = lists[name]
    some[1] = tensor
    return segments


@pytest.mark.parametrize(
    ("bits", "name", "dtype", "message"),
    [
        *(
            (32, "params", dtype, f"params[1] is {dtype}, not float32, bfloat16 or float16")
            for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn)
        ),
        (32, "params", torch.bfloat16, "grads[1] is torch.float32, not torch.bfloat16"),
        *(
            (bits, name, dtype, f"{name}[1] is {dtype}, not {wanted}")
            for bits, name, wanted in (
                *((32, name, torch.float32) for name in ("grads", "moments[0]", "moments[1]")),
                *((8, name, torch.uint8) for name in ("moments[0]", "moments[1]")),
                *((8, name, torch.float32) for name in ("scales[0]", "scales[1]")),
            )
            for dtype in (torch.bfloat16, torch.float64, torch.int8)
        ),
    ],
)
def test_another_dtype_is_refused(bits, name, dtype, message):
    n = 2 if name.startswith("scales") else 300
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        check(spoiled(name, torch.zeros(n, dtype=dtype), bits))


@pytest.mark.parametrize("name", ["params", "grads", "moments[0]", "moments[1]", "scales[0]", "scales[1]"])
@pytest.mark.parametrize("kind", ["every second", "two dimensions", "another device", "longer", "shorter"])
def test_other_memory_is_refused(kind, name):
    n = 2 if name.startswith("scales") else 300
    dtype = torch.uint8 if name.startswith("moments") else torch.float32
    tensor = {
        "every second": torch.zeros(2 * n, dtype=dtype)[::2],
        "two dimensions": torch.zeros(n, 1, dtype=dtype),
        "another device": torch.zeros(n, dtype=dtype, device="meta"),
        "longer": torch.zeros(n + 1, dtype=dtype),
        "shorter": torch.zeros(n - 1, dtype=dtype),
    }[kind]
    named = "(params|grads)" if name == "params" else name.replace("[", r"\[")
    with pytest.raises((ValueError, TypeError), match=rf"^{named}\[[01]\] (is not contiguous \[\d+\] on|is a|is)"):
        check(spoiled(name, tensor, 8))


@pytest.mark.parametrize("value", [torch.zeros(300).to_sparse(), torch.complex(*torch.zeros(2, 300)).conj().imag])
def test_values_that_are_not_in_their_memory_are_refused(value):
    with pytest.raises(TypeError, match=r"^grads\[1\] is a Tensor \(torch\.\w+\) without memory of its own$"):
        check(spoiled("grads", value))


@pytest.mark.parametrize("name", ["grads", "moments", "scales", "steps"])
def test_lists_of_other_lengths_are_refused(name):
    segments = make(ADAMW, 8, [300, 300])
    lists: Any = getattr(segments, name)
    (lists if name in ("grads", "steps") else lists[1]).pop()
    with pytest.raises(ValueError, match=rf"^{name}(\[1\])? has 1 entries, and params has 2$"):
        check(segments)


@pytest.mark.parametrize("step", [0, -1])
def test_steps_count_from_one(step):
    with pytest.raises(ValueError, match=rf"^steps count from 1; steps\[1\] is {step}$"):
        check(spoiled("steps", step))


# which implementation


@rules
@bits
def test_other_devices_have_the_formula(bits, rule, monkeypatch):
    assert kernel(rule, bits == 8, torch.device("meta")) is None
    with dispatch.use("reference"):
        assert kernel(rule, bits == 8, torch.device("cpu")) is None
    monkeypatch.setenv("QLORALAB_GPU", "reference")
    assert kernel(rule, bits == 8, torch.device("cuda", 0)) is None


@bits
def test_qloralab_gpu_chooses_on_gpus(bits, monkeypatch):
    monkeypatch.setenv("QLORALAB_GPU", "tritn")
    with pytest.raises(ValueError, match="QLORALAB_GPU is one of auto, triton, reference"):
        kernel(ADAMW, bits == 8, torch.device("cuda", 0))


@pytest.mark.compiler
@bits
def test_a_rule_without_kernels_runs_by_its_formula(bits):
    segments = replace(make(PLAIN, bits, [300]), steps=[1])
    (param,), (grad,) = segments.params, segments.grads
    expected = param - grad * 0.5
    for rule in (PLAIN, replace(PLAIN, kernel="no_such_kernel")):
        assert kernel(rule, bits == 8, torch.device("cpu")) is None
        assert kernel(rule, bits == 8, torch.device("cuda", 0)) is None
    run("native", PLAIN, segments, 0.5)
    assert torch.equal(param, expected)
