"""The loss of the answer: F.cross_entropy's values and gradients, and no logits where there is no label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from qloralab.lora.config import LoraConfig
from qloralab.lora.inject import inject_, wrap_
from qloralab.nf4.model import quantize_
from qloralab.train import loss as module
from qloralab.train.loss import AnswerLoss, linear_cross_entropy

TOKENS, HIDDEN, WORDS = 65, 31, 101
# Root-mean-square error relative to float64. The softmax and the sum are float32; with bfloat16 hidden states it is
# rounded to bfloat16 (2**-9 at most) before its product, and so are the gradients.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 1e-2}
NOTHING = -100


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


def inputs(dtype: torch.dtype, weight_dtype: torch.dtype) -> list[Tensor]:
    """Hidden states, weight and bias that give logits of about 2, exact in bfloat16."""
    shapes = (TOKENS, HIDDEN), (WORDS, HIDDEN), (WORDS,)
    tensors = [torch.randn(shape).bfloat16() for shape in shapes]
    tensors[1] *= 0.375
    dtypes = dtype, weight_dtype, weight_dtype
    return [t.to(d).requires_grad_() for t, d in zip(tensors, dtypes, strict=True)]


@pytest.mark.parametrize("rows", [1, 7, 65, 1000], ids=lambda rows: f"chunks-of-{rows}")
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=["f64", "f32", "bf16", "bf16-f32"],
)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_values_and_gradients_are_those_of_cross_entropy(dtype, weight_dtype, bias, rows, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * WORDS * rows + 3)
    tensors = inputs(dtype, weight_dtype)[: 2 + bias]
    targets = torch.randint(WORDS, (TOKENS,))
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = F.cross_entropy(F.linear(*exact), targets, reduction="sum")
    found = linear_cross_entropy(tensors[0], tensors[1], targets, *tensors[2:])
    assert found.dtype == torch.float32
    assert found.shape == ()
    assert error(found.detach(), expected.detach()) < TOLERANCE[dtype]
    (found * 0.37).backward()
    (expected * 0.37).backward()
    for name, t, e in zip(("hidden", "weight", "bias"), tensors, exact, strict=False):
        assert t.grad is not None
        assert e.grad is not None
        assert t.grad.dtype == t.dtype
        assert error(t.grad, e.grad) < TOLERANCE[dtype], name


@pytest.mark.parametrize("rows", [7, 1000], ids=lambda rows: f"chunks-of-{rows}")
def test_tokens_without_a_target_count_for_nothing(rows, monkeypatch):
    """Values and gradients are those of the other tokens; what the hidden states hold there does not matter."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * WORDS * rows)
    hidden, weight, bias = inputs(torch.float64, torch.float64)
    targets = torch.randint(WORDS, (TOKENS,))
    counts = torch.rand(TOKENS) < 0.5
    exact = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    expected = F.cross_entropy(F.linear(exact[0][counts], *exact[1:]), targets[counts], reduction="sum")
    found = linear_cross_entropy(hidden, weight, targets.where(counts, NOTHING), bias)
    assert error(found.detach(), expected.detach()) < TOLERANCE[torch.float64]
    (found * 0.37).backward()
    (expected * 0.37).backward()
    for t, e in zip((hidden, weight, bias), exact, strict=True):
        assert t.grad is not None
        assert e.grad is not None
        assert error(t.grad, e.grad) < TOLERANCE[torch.float64]
    assert hidden.grad is not None
    assert not hidden.grad[~counts].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_product_is_taken_in_a_dtype_that_is_emulated(dtype, monkeypatch):
    """It is taken in float32 instead, and the gradient is rounded once: closer to the exact one."""
    hidden, weight, bias = (t.detach().to(dtype).requires_grad_() for t in inputs(torch.float32, torch.float32))
    targets = torch.randint(WORDS, (TOKENS,))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    expected = F.cross_entropy(F.linear(*exact), targets, reduction="sum")
    expected.backward()
    monkeypatch.setattr(module, "emulates", lambda x: x.dtype == dtype)
    with Products() as products:
        found = linear_cross_entropy(hidden, weight, targets, bias)
        found.backward()
    assert products.dtypes == {torch.float32}
    assert error(found.detach(), expected.detach()) < TOLERANCE[torch.float32]
    for t, e in zip((hidden, weight, bias), exact, strict=True):
        assert t.grad is not None
        assert e.grad is not None
        assert t.grad.dtype == dtype
        assert error(t.grad, e.grad) < TOLERANCE[torch.bfloat16] / 4


class Products(TorchDispatchMode):
    """Notes in which dtypes matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trains", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
def test_only_what_trains_gets_a_gradient(trains):
    targets = torch.randint(WORDS, (TOKENS,))
    every: list[Any] = inputs(torch.float32, torch.float32)
    linear_cross_entropy(every[0], every[1], targets, every[2]).backward()
    some = [t.detach().requires_grad_(bool(train)) for t, train in zip(every, trains, strict=True)]
    linear_cross_entropy(some[0], some[1], targets, some[2]).backward()
    for t, e, train in zip(some, every, trains, strict=True):
        assert (t.grad is not None) == bool(train)
        assert t.grad is None or torch.equal(t.grad, e.grad)


def test_no_gradient_is_computed_for_nothing():
    hidden, weight, bias = (t.detach() for t in inputs(torch.float32, torch.float32))
    targets = torch.randint(WORDS, (TOKENS,))
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")
    with Watch(lambda t: t.shape == (WORDS, HIDDEN) or t.shape == (TOKENS, HIDDEN)) as seen:
        found = linear_cross_entropy(hidden, weight, targets, bias)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    assert seen.count == 0


def test_no_targets():
    hidden, weight, bias = inputs(torch.float32, torch.float32)
    empty = hidden[:0]
    found = linear_cross_entropy(empty, weight, torch.empty(0, dtype=torch.int64), bias)
    found.backward()
    assert found.item() == 0
    for t in (hidden, weight, bias):
        assert t.grad is not None
        assert not t.grad.any()


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    found = linear_cross_entropy(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    assert found.item() == 2e4
    found.backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[0.0], [-2.0]]


class Watch(TorchDispatchMode):
    """Counts the results of operators that `matches` says yes to, and notes how many rows the largest has."""

    def __init__(self, matches):
        super().__init__()
        self.matches, self.count, self.rows = matches, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and self.matches(result):
            self.count += 1
            self.rows = max(self.rows, result.numel() // result.shape[-1])
        return result


SIZES = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.15,
}  # fmt: skip


def llama(tied: bool = True) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def gemma2() -> Any:
    """Its head is a linear layer, and its logits are 5 tanh(logits / 5) of it."""
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=5.0))


def batch(rows: int = 3, length: int = 20) -> tuple[Tensor, Tensor]:
    """Input ids, and labels at the last third of them but for one row without."""
    ids = torch.randint(1, WORDS, (rows, length))
    labels = ids.clone()
    labels[:, : 2 * length // 3] = NOTHING
    labels[-1] = NOTHING
    return ids, labels


models = pytest.mark.parametrize(
    ("build", "fused"),
    [(llama, True), (lambda: llama(tied=False), True), (gemma2, False)],
    ids=["llama-tied", "llama-untied", "gemma2"],
)


@models
def test_places_may_be_padded(build, fused):
    """As the graphs have them: the same loss and gradients."""
    model, (ids, labels) = build(), batch()
    answer, found = AnswerLoss(model), []
    places, targets = module.answer_places(labels)
    for left in (0, 5):
        model.zero_grad()
        loss = answer.at(ids, F.pad(places, (0, left)), F.pad(targets, (0, left), value=NOTHING))
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert torch.equal(answer(ids, labels)[0], found[0][0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@models
def test_it_is_the_loss_of_the_model(build, fused):
    model = build()
    answer = AnswerLoss(model)
    assert answer.fused == fused
    ids, labels = batch()
    found, count = answer(ids, labels)
    assert count == int((labels[:, 1:] != NOTHING).sum())
    expected = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(found / count, expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(expected, parameters)
    for name, a, b in zip(names, torch.autograd.grad(found / count, parameters), expected, strict=True):
        assert error(a, b.double()) < 1e-5, name


@models
def test_padding_at_the_right_changes_nothing(build, fused):
    model = build()
    ids, labels = batch()
    found, count = AnswerLoss(model)(ids, labels)
    padded, again = AnswerLoss(model)(F.pad(ids, (0, 7)), F.pad(labels, (0, 7), value=NOTHING))
    assert again == count
    torch.testing.assert_close(padded, found)
    one_by_one = [AnswerLoss(model)(ids[i : i + 1, :18], labels[i : i + 1, :18])[0] for i in range(3)]
    torch.testing.assert_close(sum(one_by_one), AnswerLoss(model)(ids[:, :18], labels[:, :18])[0])


def test_a_label_at_the_first_token_is_no_target():
    model = llama()
    ids = torch.randint(1, WORDS, (1, 8))
    labels = torch.full_like(ids, NOTHING)
    labels[0, 0] = ids[0, 0]
    found, count = AnswerLoss(model)(ids, labels)
    assert (found.item(), count) == (0, 0)
    found.backward()


@pytest.mark.parametrize("chunk", [8, None])
def test_logits_are_computed_in_chunks_and_only_where_there_is_a_label(monkeypatch, chunk):
    """Forward and backward."""
    if chunk:
        monkeypatch.setattr(module, "CHUNK_BYTES", 4 * WORDS * chunk)
    answer = AnswerLoss(llama())
    ids, labels = batch(rows=4, length=30)
    with Watch(lambda t: t.shape[-1:] == (WORDS,)) as seen:
        found, count = answer(ids, labels)
        found.backward()
    assert count == 30 < ids.numel()
    assert seen.rows == (chunk or count)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_trying_the_head_out_leaves_the_model_as_it_was(training):
    model = llama().train(training)
    state = torch.get_rng_state()
    AnswerLoss(model)
    assert {m.training for m in model.modules()} == {training}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


TINY = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "d_inner": 48, "state_size": 4, "pad_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "changes", "causal"),
    [
        ("bert", {"is_decoder": False}, False),
        ("bert", {"is_decoder": True}, True),
        ("xlm", {}, False),
        ("xlnet", {"d_head": 8}, False),
        ("roberta", {"is_decoder": False}, False),
        ("gpt2", {}, True),  # with dropout
        ("mixtral", {}, True),
        ("mamba", {}, True),
    ],
)
def test_a_model_that_sees_the_future_is_refused(refusal, family, changes, causal, dtype):
    """The oracle is the definition: another last token moves earlier logits, or not."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY, **changes))
    first, second = torch.tensor([[60, 61, 62, 63]]), torch.tensor([[60, 61, 62, 70]])
    with torch.no_grad():
        logits, others = (model.eval()(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (first, second))
    assert torch.allclose(logits, others, atol=1e-6) == causal
    model = model.to(dtype).train()
    if causal:
        AnswerLoss(model)
    else:
        assert refusal(AnswerLoss, model) == (
            f"{type(model).__name__} sees the tokens that follow, so it cannot learn to predict them; "
            'give --model a causal language model (BERT and its kind: "is_decoder": true in config.json)'
        )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adapters_and_dropout_do_not_hide_a_plain_head():
    model: Any = inject_(quantize_(llama()), LoraConfig(4, 8, lora_dropout=0.5)).train()
    nn.init.normal_(model.model.layers[0].mlp.up_proj.lora_B)
    assert AnswerLoss(model).fused


def test_a_head_with_an_adapter_is_not_bypassed():
    """Only a file can put one there."""
    model: Any = wrap_(llama(tied=False), ["lm_head"], LoraConfig(4, 8))
    nn.init.normal_(model.lm_head.lora_B)
    answer = AnswerLoss(model)
    assert not answer.fused
    ids, labels = batch()
    found, count = answer(ids, labels)
    torch.testing.assert_close(found / count, model(input_ids=ids, labels=labels).loss)
