"""A dense model while it is looked at: its text, its predictions, its layers' outputs; weights put in its place.

One dense model is in memory, in float32. A weight W' is put into its layer (``Swapped``), the model is run, and the
dense weight is put back, bit for bit. What the dense model says is kept as its last hidden states, which take 2.3 kB a
token for SmolLM2 where logits take 200; the head, which is dense in both, makes log-probabilities of both, a chunk of
positions at a time::

    KL = mean over tokens of  sum over the vocabulary of  q (log q - log p)          in nats; q: the reference
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qloralab.nf4.model import linear_names

from ..checkpoint.limits import Limits
from ..data.batches import collate
from ..data.encoding import NO_LABEL, Encoded
from ..errors import UserError
from ..evaluate.windows import windows
from ..train.loss import AnswerLoss
from .statistics import ratio

WINDOW = 256  # tokens that the model is given at once, at most
_BATCH = 8  # windows
_CHUNK_BYTES = 32 * 2**20  # of float64 log-probabilities


@dataclass(frozen=True)
class Pieces:
    """A text in pieces of at most ``WINDOW`` tokens.

    A divergence needs no right answer, and yet only tokens with a label count, as in ``qloralab eval``: a chat model
    was not trained to predict prompts, and what SmolLM2 says there moves more than twice as much.

    Attributes:
        pieces: tokens and labels.
        tokens: of all pieces.
        counted: of them, those that count.
    """

    pieces: list[Encoded]

    @classmethod
    def of(cls, documents: Sequence[Encoded], count: int) -> Pieces:
        """The first pieces of a text, at most ``count``."""
        found = [piece for one in documents for piece in windows(one, WINDOW, WINDOW - 1)]
        if not found:
            raise UserError(
                "the text has no token to predict: a document needs at least two, and the first does not count"
            )
        return cls(found[:count])

    @property
    def tokens(self) -> int:
        return sum(len(one.input_ids) for one in self.pieces)

    @property
    def counted(self) -> int:
        return sum(label != NO_LABEL for one in self.pieces for label in one.labels[1:])


class Runner:
    """A causal language model and a text.

    Args:
        model: of transformers, in evaluation mode, on the CPU.
        pieces: the text.

    Raises:
        UserError: logits depend on later tokens.
    """

    def __init__(self, model: Any, pieces: Pieces):
        self.model = model
        loss = AnswerLoss(model)  # finds out whether the head is all that follows the hidden states
        self._decoder, self._head, self._fused = loss.decoder, loss.head, loss.fused
        positions = Limits.of(model).positions
        some = sorted(pieces.pieces, key=lambda one: -len(one.input_ids))
        self._batches = [collate(some[i : i + _BATCH], 1, positions) for i in range(0, len(some), _BATCH)]

    @torch.no_grad()
    def states(self) -> Tensor:
        """What the model says at the positions that count: hidden states [positions, hidden size], or its logits where
        more than a head makes them."""
        found = []
        for batch in self._batches:
            chosen = batch["labels"][:, 1:] != NO_LABEL
            run = self._decoder if self._fused else self.model
            made = run(input_ids=batch["input_ids"], use_cache=False)
            found.append((made.last_hidden_state if self._fused else made.logits)[:, :-1][chosen])
        return torch.cat(found)

    @torch.no_grad()
    def kl(self, states: Tensor, reference: Tensor, exact: bool = False) -> float:
        """The mean KL divergence from the reference, in nats a token.

        Args:
            states, reference: as ``states`` gives them.
            exact: compute in float64 from the head on, for divergences near float32's rounding.

        Raises:
            UserError: it is NaN or infinite.
        """
        width = len(self._head.weight) if self._fused else states.shape[1]
        size, total = max(1, _CHUNK_BYTES // (8 * width)), 0.0
        for p, q in zip(states.split(size), reference.split(size), strict=True):
            log_p, log_q = self._log_probabilities(p, exact), self._log_probabilities(q, exact)
            total += float(F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dtype=torch.float64))
        found = total / len(states)
        if not found < float("inf"):
            raise UserError("the KL divergence is NaN or infinite: the model overflows")
        return max(found, 0.0)  # rounding may leave less than nothing of two equal distributions

    def _log_probabilities(self, states: Tensor, exact: bool) -> Tensor:
        dtype = torch.float64 if exact else torch.float32
        logits = states.to(dtype)
        if self._fused:
            weight, bias = self._head.weight.to(dtype), self._head.bias
            logits = F.linear(logits, weight, None if bias is None else bias.to(dtype))
        return logits.log_softmax(1)

    @torch.no_grad()
    def output_errors(
        self,
        layers: Mapping[str, nn.Linear],
        exact: Callable[[Tensor, Tensor], Tensor],
        variants: Callable[[str, Tensor], Mapping[str, Callable[[Tensor], Tensor]]],
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, dict[str, float]]:
        """How far products are from exact ones, on the inputs that the layers of the dense model see.

        Args:
            layers: by path.
            exact: ``exact(x, weight)`` is the product that errors are taken from; x [tokens, K], weight [N, K].
            variants: ``variants(path, weight)`` gives, by name, what is to be compared: functions of x.
            progress: called after each layer of each batch.

        Returns:
            by variant and layer, ``|y' - y|**2 / |y|**2``, summed over all tokens but padding.
        """
        errors: dict[str, dict[str, float]] = {}
        sizes: dict[str, float] = {}
        done = 0
        mask = torch.empty(0)

        def watch(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                nonlocal done
                (x,) = inputs
                x = x[mask] if x.dim() == 3 else x  # experts get rows of tokens, padding's among them
                weight = module.get_parameter("weight")
                y = exact(x, weight)
                sizes[path] = sizes.get(path, 0.0) + float(y.square().sum(dtype=torch.float64))
                for name, product in variants(path, weight).items():
                    of_layers = errors.setdefault(name, {})
                    found = float((product(x) - y).square().sum(dtype=torch.float64))
                    of_layers[path] = of_layers.get(path, 0.0) + found
                done += 1
                if progress:
                    progress(min(done, total), total)

            return hook

        total = len(layers) * len(self._batches)
        handles = [layer.register_forward_hook(watch(path)) for path, layer in layers.items()]
        try:
            for batch in self._batches:
                mask = batch["attention_mask"].bool()
                self._decoder(input_ids=batch["input_ids"], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return {
            name: {path: ratio(error, sizes[path]) for path, error in found.items()} for name, found in errors.items()
        }


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The dense linear layers that QLoRA quantizes, by path; of layers that share a weight the first."""
    found: dict[int, tuple[str, nn.Linear]] = {}
    for path in linear_names(model):
        layer = model.get_submodule(path)
        if isinstance(layer, nn.Linear):
            found.setdefault(id(layer.weight), (path, layer))
    return dict(found.values())


class Swapped:
    """Weights put in the place of dense ones; on leaving the context all are as they were, bit for bit.

    Args:
        layers: by path, one for each weight: layers that share it change together.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]):
        self._layers = dict(layers)
        self._dense: dict[str, Tensor] = {}

    def __enter__(self) -> Swapped:
        return self

    def __exit__(self, *failure: object) -> None:
        self.restore(list(self._dense))

    @torch.no_grad()
    def put(self, weights: Callable[[str, Tensor], Tensor], paths: Iterable[str]) -> None:
        """Put ``weights(path, dense weight)`` into layers; dense is the weight that there was at first."""
        for path in paths:
            parameter = self._layers[path].weight
            dense = self._dense.setdefault(path, parameter.detach().clone())
            parameter.copy_(weights(path, dense))

    @torch.no_grad()
    def restore(self, paths: Iterable[str]) -> None:
        """Put the dense weights of layers back."""
        for path in paths:
            self._layers[path].weight.copy_(self._dense.pop(path))


@contextmanager
def products(layers: Iterable[nn.Linear], product: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """While it is entered, layers multiply by ``product(x, weight)``, and add their bias to the result."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bias = module.get_parameter("bias") if getattr(module, "bias", None) is not None else 0
        return (product(inputs[0], module.get_parameter("weight")) + bias).to(output.dtype)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
