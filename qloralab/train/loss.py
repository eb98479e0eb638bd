"""Cross-entropy of the answer, straight from the hidden states.

A language model's head turns each hidden state into one logit per word: 49,152 floats a token for SmolLM2, times
three for the softmax and its gradient. Instruction data has a label at few positions (a docstring's words, not the
function's). So the head is applied only where a label is, a chunk of positions at a time, and each chunk leaves
nothing behind but its loss and its gradient::

    logits  = h W'                    [chunk, vocabulary], float32
    loss   += logsumexp(logits) - logits[label]
    grad    = softmax(logits) - onehot(label)
    dh      = grad W                  [chunk, hidden]
    dW     += grad' h                 only when the head trains

The products are in the dtype of h; in float32, each rounded once, where the processor would emulate that one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qloralab.nf4.processor import emulates

from ..data.encoding import NO_LABEL
from ..errors import UserError

CHUNK_BYTES = 32 * 2**20  # of float32 logits


class AnswerLoss(nn.Module):
    """The loss of a causal language model where labels are, without the logits of other positions.

    Two things are tried out once, on a few tokens, without dropout. Does the model see the future? Where it is causal,
    no logit depends on a later token: that derivative is exactly 0, whatever is rounded on the way. Does it scale or
    cap its logits after the head, as some architectures do? If so, its own forward gives them, of all positions.

    Args:
        model: a Hugging Face causal language model.

    Raises:
        UserError: logits depend on later tokens.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        training = [module for module in model.modules() if module.training]
        model.eval()
        embeddings = model.get_input_embeddings()
        words, device = len(embeddings.weight), embeddings.weight.device
        ids = torch.arange(words // 2, min(words // 2 + 8, words), device=device)[None]  # special tokens are at an end
        self._check_causal(ids, embeddings)
        self.fused = self._head_is_plain(ids)
        for module in training:
            module.training = True

    @property
    def decoder(self) -> Any:
        """The model below its head."""
        return self.model.base_model

    @property
    def head(self) -> Any:
        """What turns hidden states into logits."""
        return self.model.get_output_embeddings()

    @torch.enable_grad()
    def _check_causal(self, ids: Tensor, embeddings: nn.Module) -> None:
        seen: list[Tensor] = []

        def watch(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
            seen.append(embedded.detach().requires_grad_())
            return seen[-1].clone()  # some models scale it in place

        with embeddings.register_forward_hook(watch):
            logits = self.model(input_ids=ids, use_cache=False).logits
        (grad,) = torch.autograd.grad(logits[:, :-1].float().square().sum(), seen[0], allow_unused=True)
        if grad is not None and (grad[:, -1].abs() > 0).any():
            raise UserError(
                f"{type(self.model).__name__} sees the tokens that follow, so it cannot learn to predict them; "
                'give --model a causal language model (BERT and its kind: "is_decoder": true in config.json)'
            )

    @torch.no_grad()
    def _head_is_plain(self, ids: Tensor) -> bool:
        if self.decoder is self.model or type(self.head) is not nn.Linear:
            return False
        logits = self.model(input_ids=ids, use_cache=False).logits
        hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        plain = self.head(hidden.to(self.head.weight.dtype))  # Mamba's residual stream is in float32
        return torch.equal(plain.float(), logits.float())

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """The summed loss of a batch and how many labels it has.

        Args:
            input_ids: int64 [batch, length], padded at the right. There is no attention mask: under causal attention
                no token sees the padding behind it.
            labels: int64 [batch, length], the token at each position, or -100 where there is no loss. Position i is
                predicted from those before it.

        Returns:
            loss: float32 [], the sum over the labels. Divide it by a count of labels.
            count: the number of labels.
        """
        places, targets = answer_places(labels)
        return self.at(input_ids, places, targets), len(targets)

    def at(self, input_ids: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        """The summed loss of a batch whose labels are told by their places. Nothing here waits for a device.

        Args:
            input_ids: as in ``forward``.
            places: int64 [labels], which positions of the batch, row after row, are followed by the targets.
            targets: int64 [labels], or -100 where there is no loss, for lists that are padded.

        Returns:
            loss: float32 [].
        """
        if self.fused:
            hidden = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
            return linear_cross_entropy(hidden[places], self.head.weight, targets, self.head.bias)
        logits = self.model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)[places]
        return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=NO_LABEL)


def answer_places(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions of a batch, row after row, a label follows, and the labels: int64 [count] each.

    Args:
        labels: int64 [batch, length], -100 where there is none.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=NO_LABEL).flatten()
    places = (following != NO_LABEL).nonzero()[:, 0]
    return places, following[places]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Summed cross-entropy of softmax(hidden W' + bias), in chunks.

    Args:
        hidden: [tokens, hidden size], a floating-point dtype; the product is taken in it, or in float32 where the
            processor emulates it. The softmax is in float32.
        weight: [vocabulary, hidden size].
        targets: int64 [tokens]; -100 where a token has no loss.
        bias: [vocabulary] or None.

    Returns:
        float32 []. Differentiable in hidden, weight and bias.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, bias)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None
        dtype = torch.float32 if emulates(hidden) else hidden.dtype  # of the products
        used = weight.to(hidden.dtype).to(dtype)
        used_bias = None if bias is None else bias.to(hidden.dtype).to(dtype)
        rows = max(1, CHUNK_BYTES // (4 * len(weight)))
        for start in range(0, len(hidden), rows):
            h, target = hidden[start : start + rows].to(dtype), targets[start : start + rows, None]
            counts, target = target != NO_LABEL, target.clamp(min=0)
            logits = F.linear(h, used, used_bias).float()
            normalizer = logits.logsumexp(dim=1, keepdim=True)
            loss += torch.where(counts, normalizer - logits.gather(1, target), 0).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            normalizer.masked_fill_(~counts, torch.inf)  # then all of the softmax is 0
            grad = logits.sub_(normalizer).exp_()  # softmax, in the memory of the logits
            grad.scatter_add_(1, target, -counts.to(grad.dtype))
            low = grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + rows] = low @ used
            if grad_weight is not None:
                grad_weight += low.T @ h
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * grad,
            None if grad_weight is None else (grad_weight * grad).to(weight_dtype),
            None,
            None if grad_bias is None else (grad_bias * grad).to(bias_dtype),
        )
