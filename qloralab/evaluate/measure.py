"""Running a model over documents, beside the model that it is to be like.

What a model says of one token is its log-probability for each word of the vocabulary: 49,152 floats for SmolLM2, and
100 MB for 512 tokens. Only three sums of them are kept. So the head is applied to a chunk of positions at a time, by
both models for the same positions, and each chunk leaves behind what it adds to the sums of its windows::

    log p, log q = log_softmax(logits)                   [chunk, vocabulary], float32; q: the reference
    nll  += -log p[token]
    kl   += sum over the vocabulary of q (log q - log p)
    same += argmax log p == argmax log q
    its  += -log q[token]

Sums are float64. Windows of similar length are run together, padded at the right: under causal attention no token sees
the padding behind it, and no padding is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..checkpoint.limits import Limits
from ..data.batches import collate
from ..data.encoding import NO_LABEL, Encoded, fingerprint
from ..errors import UserError
from ..train.loss import AnswerLoss
from ..train.trainer import LENGTH_MULTIPLE
from .evaluation import Evaluation
from .windows import check_window, counted, windows

BATCH_SIZE = 8
_CHUNK_BYTES = 32 * 2**20  # of float32 logits


def evaluate(
    model: Any,
    documents: Sequence[Encoded],
    window: int = 256,
    stride: int = 128,
    reference: Any = None,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = BATCH_SIZE,
) -> Evaluation:
    """The perplexity of a causal language model on documents, and how far it is from another one.

    Args:
        model: of transformers, dense, quantized or with adapters; on any device.
        documents: tokens and labels; a label of -100 is a token that does not count, and neither does the first token
            of a document. ``text.py`` makes them.
        window, stride: see ``windows.py``.
        reference: a model with the same vocabulary, that KL divergence and agreement are taken from; often the dense
            one. None: neither is computed. The model itself: 0 and 1, without running it twice.
        progress: called after each batch with how many tokens are done and how many there are, context included.
        batch_size: windows that are run at once. It changes the time and the memory, and of the figures the rounding.

    Returns:
        the sums by document.

    Raises:
        UserError: the windows are out of range; no token counts; a model sees the tokens that follow; the models have
            other vocabularies; the loss is NaN or infinite.
    """
    check_window(window, stride, Limits.of(model).positions)
    pieces = [(index, one) for index, document in enumerate(documents) for one in windows(document, window, stride)]
    if not pieces:
        raise UserError("the text has no token to predict: a document needs at least two, and the first does not count")
    with _evaluating(model, reference):
        sums = _sums(
            model, [one for _, one in pieces], reference, progress, batch_size
        )  # [windows, nll, kl, same, its]
    if len(documents) > 1:
        unit, units = "document", np.array([index for index, _ in pieces])
    else:
        unit, units = "window", np.arange(len(pieces))
    count = int(units[-1]) + 1 if unit == "window" else len(documents)
    by_unit, tokens = np.zeros((count, 4)), np.zeros(count, np.int64)
    np.add.at(by_unit, units, sums)
    np.add.at(tokens, units, [counted(one) for _, one in pieces])
    nll, kl, same, its = by_unit.T
    if not np.isfinite(by_unit).all():
        raise UserError("the loss is NaN or infinite: the model overflows")
    return Evaluation(
        window=window,
        stride=stride,
        fingerprint=fingerprint(documents),
        unit=unit,
        tokens=tokens,
        nll_sums=nll.copy(),
        kl_sums=None if reference is None else kl.copy(),
        agreed=None if reference is None else same.astype(np.int64),
        reference_nll_sums=None if reference is None else its.copy(),
    )


@torch.no_grad()
def _sums(
    model: Any,
    pieces: Sequence[Encoded],
    reference: Any,
    progress: Callable[[int, int], None] | None,
    batch_size: int,
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """NLL, KL, agreement and the NLL of the reference, summed over each window: float64 [windows, 4]."""
    ours = _Predictions(model)
    theirs = None if reference is None or reference is model else _Predictions(reference)
    if theirs is not None and theirs.vocabulary != ours.vocabulary:
        raise UserError(
            f"the reference has {theirs.vocabulary:,} words and the model {ours.vocabulary:,}: "
            "KL divergence needs one vocabulary"
        )
    positions = Limits.of(model).positions
    order = sorted(range(len(pieces)), key=lambda index: -len(pieces[index].input_ids))  # what takes most memory first
    done, total = 0, sum(len(one.input_ids) for one in pieces)
    sums = torch.zeros(len(pieces), 4, dtype=torch.float64)
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size]
        batch = collate([pieces[index] for index in indices], LENGTH_MULTIPLE, positions)
        targets = batch["labels"][:, 1:]
        chosen = targets != NO_LABEL  # [batch, length - 1]
        rows = torch.tensor(indices)[chosen.nonzero()[:, 0]]  # of each position, its window
        mine = ours(batch["input_ids"], chosen)
        other = None if theirs is None else theirs(batch["input_ids"], chosen)
        start = 0
        for log_p in mine:
            log_q = log_p if other is None else next(other).to(log_p.device)
            end = start + len(log_p)
            found = _measures(log_p, log_q, targets[chosen][start:end].to(log_p.device))
            sums.index_add_(0, rows[start:end], found.cpu())
            start = end
        done += sum(len(pieces[index].input_ids) for index in indices)
        if progress:
            progress(done, total)
    return sums.numpy()


def _measures(log_p: Tensor, log_q: Tensor, targets: Tensor) -> Tensor:
    """NLL, KL(q || p), agreement and the NLL of q at each position: float64 [positions, 4].

    Args:
        log_p, log_q: of the model and the reference, float32 [positions, vocabulary].
        targets: int64 [positions].
    """
    nll, its = (-log.gather(1, targets[:, None])[:, 0].double() for log in (log_p, log_q))
    if log_q is log_p:
        return torch.stack([nll, torch.zeros_like(nll), torch.ones_like(nll), its], dim=1)
    terms = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    same = log_p.argmax(1) == log_q.argmax(1)
    return torch.stack([nll, terms.sum(1, dtype=torch.float64), same.double(), its], dim=1)


class _Predictions:
    """Log-probabilities of the next token, a chunk of positions at a time.

    Args:
        model: a causal language model of transformers.

    Attributes:
        vocabulary: words that it has a logit for.

    Raises:
        UserError: logits depend on later tokens.
    """

    def __init__(self, model: Any):
        loss = AnswerLoss(model)  # finds out whether the head is all that follows the hidden states
        self.model, self.decoder, self.head, self.fused = model, loss.decoder, loss.head, loss.fused
        self.device = next(model.parameters()).device
        self.vocabulary = len(self.head.weight) if self.fused else self._logits(torch.zeros(1, 1).long()).shape[-1]

    def _logits(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids.to(self.device), use_cache=False).logits

    def __call__(self, input_ids: Tensor, chosen: Tensor) -> Iterator[Tensor]:
        """Those at the chosen positions, in chunks: float32 [chunk, vocabulary].

        Args:
            input_ids: int64 [batch, length], padded at the right.
            chosen: bool [batch, length - 1]; position i predicts token i + 1.
        """
        chosen, size = chosen.to(self.device), max(1, _CHUNK_BYTES // (4 * self.vocabulary))
        if self.fused:
            hidden = self.decoder(input_ids=input_ids.to(self.device), use_cache=False).last_hidden_state
            for some in hidden[:, :-1][chosen].to(self.head.weight.dtype).split(size):
                yield self.head(some).float().log_softmax(1)
        else:
            for some in self._logits(input_ids)[:, :-1][chosen].split(size):
                yield some.float().log_softmax(1)


@contextmanager
def _evaluating(*models: Any) -> Iterator[None]:
    """Models without dropout; after it each module is as it was."""
    training = [module for model in models if model is not None for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
