"""How much of a model is not in 4 bits, and what holds it: embeddings, the head, the experts of a mixture."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection

from torch import nn
from torch.nn.parameter import is_lazy

from .linear import Adapted, QuantizedLinear

LOGGER = logging.getLogger("qloralab")


def dense_shares(model: nn.Module, skipped: Collection[nn.Module] = ()) -> dict[str, float]:
    """Shares of all weights of a model that are not in 4 bits, the largest first. Adapters are not counted, shared
    weights once.

    Args:
        model: dense or quantized.
        skipped: modules that are dense on request.

    Returns:
        by "skipped", "output head", "embeddings", "biases" (of layers in 4 bits) or the class of the module.
    """
    heads = output_heads(model)
    packed = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, QuantizedLinear)}
    held, seen = Counter[str](), set[int]()
    for module in model.modules():
        kind = (
            "skipped" if module in skipped
            else "output head" if module in heads
            else "embeddings" if isinstance(module, nn.Embedding)
            else "biases" if isinstance(module, QuantizedLinear)
            else type(module).__name__
        )  # fmt: skip
        for parameter in module.parameters(recurse=False) if not isinstance(module, Adapted) else ():
            if id(parameter) not in seen and not is_lazy(parameter):
                held[kind] += parameter.numel()
                seen.add(id(parameter))
    total = held.total() + sum(packed.values())
    return {kind: count / total for kind, count in held.most_common()}


def described(model: nn.Module, skipped: Collection[nn.Module] = ()) -> str:
    """``dense_shares`` in one line: "60.3 % of the weights (MixtralExperts 58.2 %, embeddings 2.1 %)"."""
    shares = dense_shares(model, skipped)
    parts = [f"{kind} {100 * share:.3g} %" for kind, share in shares.items() if share >= 0.001]
    return f"{100 * sum(shares.values()):.3g} % of the weights ({', '.join(parts)})"


def log_dense(model: nn.Module, skipped: Collection[nn.Module] = ()) -> None:
    """Log what is not in 4 bits: a warning where more than a tenth of the weights are neither skipped nor those of
    embeddings or the head."""
    expected = "embeddings", "output head", "skipped"
    unexpected = sum(share for kind, share in dense_shares(model, skipped).items() if kind not in expected)
    LOGGER.log(logging.WARNING if unexpected > 0.1 else logging.INFO, "not in 4 bits: %s", described(model, skipped))


def output_heads(model: nn.Module) -> set[nn.Module]:
    """The output head of a model of transformers: what it says itself, and linear layers beside its base model, as
    classifiers have (``score``, ``classifier``)."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found: set[nn.Module] = set() if head is None else {head}
    if getattr(model, "base_model_prefix", None) in model._modules:
        found |= {child for child in model.children() if isinstance(child, nn.Linear)}
    return found
