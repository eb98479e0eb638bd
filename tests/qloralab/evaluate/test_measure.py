"""``evaluate`` beside transformers' own loss, and beside all logits at once."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from qloralab.data.encoding import NO_LABEL, Encoded
from qloralab.evaluate import measure
from qloralab.evaluate.measure import evaluate
from qloralab.evaluate.windows import counted, windows
from qloralab.nf4.model import quantize_

from ..conftest import tiny_model

WINDOW, STRIDE = 32, 12
LENGTHS = (2, 5, 31, 32, 33, 80, 100)


def document(length: int, seed: int = 0, first_label: int = 0) -> Encoded:
    ids = torch.randint(0, 260, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()
    return Encoded(ids, [NO_LABEL] * first_label + ids[first_label:], f"{length}")


DOCUMENTS = [document(length, first_label=length // 3) for length in LENGTHS]


@pytest.fixture(scope="module")
def dense() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def packed(dense: Any) -> Any:
    return quantize_(copy.deepcopy(dense), compute_dtype=torch.float32)


@torch.no_grad()
def loss_of_transformers(model: Any, one: Encoded) -> float:
    """The mean loss that the model itself computes."""
    return model(input_ids=torch.tensor([one.input_ids]), labels=torch.tensor([one.labels])).loss.item()


@pytest.mark.parametrize("which", ["dense", "packed"])
def test_the_loss_is_that_of_transformers_on_the_same_windows(which, request):
    model = request.getfixturevalue(which)
    found = evaluate(model, DOCUMENTS, WINDOW, STRIDE)
    total, tokens = 0.0, 0
    for number, one in enumerate(DOCUMENTS):
        pieces = windows(one, WINDOW, STRIDE)
        expected = sum(loss_of_transformers(model, piece) * counted(piece) for piece in pieces)
        assert found.nll_sums[number] == pytest.approx(expected, rel=1e-5)
        total, tokens = total + expected, tokens + counted(one)
    assert found.tokens.tolist() == [counted(one) for one in DOCUMENTS]
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found.kl is None


def test_a_document_of_one_window_is_one_call_of_the_model(dense):
    one = document(30)
    found = evaluate(dense, [one], WINDOW, STRIDE)
    assert (found.unit, len(found.tokens)) == ("window", 1)
    assert found.nll == pytest.approx(loss_of_transformers(dense, one), rel=1e-6)


def test_kl_and_agreement_are_those_of_all_logits_at_once(dense, packed, monkeypatch):
    monkeypatch.setattr(measure, "_CHUNK_BYTES", 7 * 4 * 260)  # seven positions at a time
    found = evaluate(packed, DOCUMENTS, WINDOW, STRIDE, reference=dense)
    kl, agreed, its = np.zeros((3, len(DOCUMENTS)))
    for number, one in enumerate(DOCUMENTS):
        for piece in windows(one, WINDOW, STRIDE):
            ids = torch.tensor([piece.input_ids])
            with torch.no_grad():
                p, q = (model(input_ids=ids).logits[0, :-1].double().softmax(1) for model in (packed, dense))
            for position, label in enumerate(piece.labels[1:]):
                if label != NO_LABEL:
                    kl[number] += (q[position] * (q[position] / p[position]).log()).sum().item()
                    its[number] -= q[position, label].log().item()
                    agreed[number] += int(p[position].argmax() == q[position].argmax())
    assert found.kl_sums == pytest.approx(kl, rel=1e-4)
    assert found.reference_nll_sums == pytest.approx(its, rel=1e-5)
    assert found.agreed is not None
    assert found.kl is not None
    assert found.agreement is not None
    assert found.agreed.tolist() == agreed.tolist()
    assert 0.001 < found.kl < 1
    assert 0.3 < found.agreement < 1


def test_a_model_is_at_no_distance_from_itself(dense):
    for reference in (dense, copy.deepcopy(dense)):
        found = evaluate(dense, DOCUMENTS, WINDOW, STRIDE, reference=reference)
        assert (found.kl, found.agreement, found.reference_nll) == (0.0, 1.0, found.nll)


def test_padding_and_the_order_of_documents_change_nothing(dense, packed):
    options = {"window": WINDOW, "stride": STRIDE, "reference": dense}
    alone = evaluate(packed, DOCUMENTS, batch_size=1, **options)
    together = evaluate(packed, DOCUMENTS, batch_size=4, **options)
    backwards = evaluate(packed, DOCUMENTS[::-1], batch_size=3, **options)
    for name in ("nll_sums", "kl_sums", "agreed", "reference_nll_sums", "tokens"):
        assert getattr(together, name) == pytest.approx(getattr(alone, name), rel=1e-5, abs=1e-6)
        assert getattr(backwards, name)[::-1] == pytest.approx(getattr(alone, name), rel=1e-5, abs=1e-6)


def test_the_stride_changes_the_context_and_not_what_is_counted(dense):
    """A window that holds the document: any stride gives one number. Else: more context for a smaller stride."""
    whole = [evaluate(dense, [document(60)], 64, stride).nll for stride in (1, 20, 63)]
    assert whole == [whole[0]] * 3
    cut = [evaluate(dense, [document(60)], 16, stride) for stride in (1, 7, 15)]
    assert [int(one.tokens.sum()) for one in cut] == [59] * 3
    assert len({round(one.nll, 6) for one in cut}) == 3


def test_a_text_of_one_document_is_counted_by_window(dense):
    one = document(100)
    by_window = evaluate(dense, [one], WINDOW, STRIDE)
    assert by_window.unit == "window"
    assert by_window.tokens.tolist() == [counted(piece) for piece in windows(one, WINDOW, STRIDE)]
    both = evaluate(dense, [one, document(5)], WINDOW, STRIDE)
    assert both.unit == "document"
    assert both.nll_sums[0] == pytest.approx(by_window.nll_sums.sum(), rel=1e-6)
    with_empty = evaluate(dense, [one, document(1)], WINDOW, STRIDE)
    assert (with_empty.unit, with_empty.tokens.tolist()) == ("document", [99, 0])


def test_a_head_that_caps_its_logits_is_honoured(dense):
    """Not fused: the model's own forward gives the logits."""

    class Capped(type(dense)):
        def forward(self, *args: Any, **options: Any) -> Any:
            out = super().forward(*args, **options)
            out.logits = 2 * torch.tanh(out.logits / 2)
            return out

    capped = copy.deepcopy(dense)
    capped.__class__ = Capped
    one = document(30)
    with torch.no_grad():
        logits = capped(input_ids=torch.tensor([one.input_ids])).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(one.labels[1:])).item()
    found = evaluate(capped, [one], WINDOW, STRIDE, reference=dense)
    assert found.nll == pytest.approx(expected, rel=1e-5)
    assert abs(found.nll - evaluate(dense, [one], WINDOW, STRIDE).nll) > 0.01
    assert found.kl is not None
    assert found.kl > 0.01


def test_dropout_is_off_and_modules_stay_as_they_were():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=260, n_positions=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        model = GPT2LMHeadModel(config).train()
    model.transformer.drop.eval()
    assert evaluate(model, DOCUMENTS, 16, 8).nll == evaluate(model, DOCUMENTS, 16, 8).nll
    assert model.training
    assert not model.transformer.drop.training


def test_progress_ends_with_all_tokens(dense):
    seen: list[tuple[int, int]] = []
    evaluate(dense, DOCUMENTS, WINDOW, STRIDE, progress=lambda done, total: seen.append((done, total)), batch_size=2)
    total = sum(len(piece.input_ids) for one in DOCUMENTS for piece in windows(one, WINDOW, STRIDE))
    assert seen[-1] == (total, total)
    assert sorted(seen) == seen


def test_refused(dense, refusal):
    assert "no token to predict" in refusal(evaluate, dense, [document(1)], WINDOW, STRIDE)
    assert "--stride" in refusal(evaluate, dense, DOCUMENTS, 8, 8)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    message = refusal(evaluate, dense, DOCUMENTS, WINDOW, STRIDE, other)
    assert message == "the reference has 300 words and the model 260: KL divergence needs one vocabulary"
    broken = copy.deepcopy(dense)
    torch.nn.init.constant_(broken.model.norm.weight, float("inf"))
    assert "NaN or infinite" in refusal(evaluate, broken, DOCUMENTS, WINDOW, STRIDE)
