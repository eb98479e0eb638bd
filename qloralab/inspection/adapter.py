"""What an adapter adds to each layer: ``D = scaling * B A`` [out, in], of rank r at most.

    norm             |D|, the root of the sum of squares; its share is |D| / |W| of the base weight W
    effective rank   exp(-sum p log p) with p = s / sum(s), s the singular values of D (Roy and Vetterli, 2007):
                     r where all are equal, 1 where there is one
    stable rank      |D|**2 / max(s)**2, which counts only what is nearly as large as the largest

D is never formed. With ``B = Q R`` and ``A' = P S`` it is ``Q (R S') P'``, and Q and P have orthonormal columns, so its
singular values are those of ``R S'`` [r, r].
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qloralab.lora.config import LoraConfig
from qloralab.lora.files import CONFIG_FILE, read_adapter

from ..checkpoint.models import check_adapter, default_model, model_name
from ..display import Display
from ..errors import UserError
from .weights import Weights


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a layer.

    Attributes:
        layer: path of the layer.
        shape: of its weight, [out, in].
        rank: r of the adapter.
        norm, effective_rank, stable_rank: see above; the ranks are 0 where B is.
        share: of the base weight's norm; None where that is not at hand.
        singular_values: of scaling * B A, the largest first.
    """

    layer: str
    shape: tuple[int, int]
    rank: int
    norm: float
    effective_rank: float
    stable_rank: float
    share: float | None
    singular_values: tuple[float, ...]


def update(layer: str, A: Tensor, B: Tensor, scaling: float, base_norm: float | None = None) -> Update:
    """What one adapter adds.

    Args:
        layer: path of the layer.
        A, B: [r, in] and [out, r].
        scaling: of their product.
        base_norm: of the weight beside them, or None.
    """
    r_b, r_a = torch.linalg.qr(B.double()).R, torch.linalg.qr(A.double().T).R
    s = torch.linalg.svdvals(r_b @ r_a.T) * scaling
    norm = float(s.square().sum().sqrt())
    if norm == 0:
        effective = stable = 0.0
    else:
        effective = float(torch.special.entr(s / s.sum()).sum().exp())
        stable = float(s.square().sum() / s.max() ** 2)
    share = None if not base_norm else norm / base_norm
    return Update(layer, (len(B), A.shape[1]), len(A), norm, effective, stable, share, tuple(s.tolist()))


@dataclass(frozen=True)
class Adapter:
    """An adapter, and its updates.

    Attributes:
        config: as the file has it.
        base: the model whose weights the shares are of, or None.
        updates: by layer, in the order of the file.
        notes: what a reader of the figures has to know.
    """

    config: LoraConfig
    base: Path | None
    updates: list[Update]
    notes: list[str]


def inspect_adapter(directory: Path, base: Path | None, display: Display) -> Adapter:
    """Read an adapter, and its base where that is at hand.

    Args:
        directory: of the adapter.
        base: the model it is for; None: the one that the adapter names, if it is on this machine.
        display: shows what is going on.

    Raises:
        UserError, FormatError: the adapter or the base cannot be read, or they do not fit.
    """
    check_adapter(directory)
    try:
        config, tensors = read_adapter(None, directory)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    base = base or _named_base(directory)
    norms: dict[str, float] = {}
    notes: list[str] = []
    if base is None:
        notes.append("the base model is not on this machine; give --base for the share of its weights' norms")
    else:
        with display.busy(f"reading {model_name(base)}", "weights") as progress:
            weights = Weights(base)
            notes += weights.notes
            for done, (layer, (A, B)) in enumerate(tensors.items(), 1):
                norms[layer] = _norm(weights, layer, (len(B), A.shape[1]), directory)
                progress(done, len(tensors))
    found = [update(layer, A, B, config.scaling, norms.get(layer)) for layer, (A, B) in tensors.items()]
    return Adapter(config, base, found, notes)


def _norm(weights: Weights, layer: str, shape: tuple[int, int], directory: Path) -> float:
    if layer not in weights.layers:
        raise UserError(f"{directory} adapts {layer}, and {weights.path} has no such linear layer")
    weight = weights[layer].dense()
    if tuple(weight.shape) != shape:
        raise UserError(f"{directory} adapts {layer} as {list(shape)}; in {weights.path} it is {list(weight.shape)}")
    return float(weight.square().sum(dtype=torch.float64).sqrt())


def _named_base(directory: Path) -> Path | None:
    """The model that an adapter names, where it is a path of this machine or the default model."""
    named = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    if (Path(named) / "config.json").is_file() or Path(named).is_file():
        return Path(named)
    try:
        default = default_model()
    except UserError:
        return None
    names = {model_name(default).lower(), default.name.lower(), default.parent.name.lower()}
    return default if model_name(Path(named)).lower() in names else None
