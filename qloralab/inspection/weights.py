"""The weights of the linear layers of a model, one after the other.

Of a Hugging Face directory a tensor is read when its turn comes, and is gone before the next: memory follows the
largest weight, not the model. Names are those that the model has in memory; where the files have other ones, and for a
GGUF file, transformers reads the model whole first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qloralab.nf4.files.bitsandbytes_layout import dtype_name
from qloralab.nf4.files.checkpoint import Checkpoint
from qloralab.nf4.model import linear_names
from qloralab.nf4.tensor import QuantizedTensor

from ..checkpoint.models import check_model, holds_4bit, load_model, reading
from ..checkpoint.quantized_model import skeleton
from ..errors import UserError


@dataclass(frozen=True)
class Weight:
    """The weight of a linear layer.

    Attributes:
        layer: path of the layer in the model.
        tensor: [N, K], dense as it lies in the file, or in 4 bits.
        stored: what the file holds it in: "bfloat16", "Q4_1", "nf4".
        bits: per parameter in the file, scales included; None where it is unknown.
    """

    layer: str
    tensor: Tensor | QuantizedTensor
    stored: str
    bits: float | None

    def dense(self) -> Tensor:
        """float32 [N, K]."""
        return (
            self.tensor.dequantize(torch.float32) if isinstance(self.tensor, QuantizedTensor) else self.tensor.float()
        )


class Weights:
    """The weights of the linear layers of a model at a path; iterating reads them.

    Args:
        path: a Hugging Face directory, dense or in 4 bits, or a GGUF file.

    Attributes:
        layers: the paths of the layers.
        notes: what a reader of the figures has to know of the file.

    Raises:
        UserError, FormatError: there is no model at path, it cannot be read, or it has no linear layer.
    """

    def __init__(self, path: Path):
        check_model(path)
        self.path, self.notes = path, list[str]()
        self.is_4bit = holds_4bit(path)
        self._model: Any = None
        self._types: dict[str, tuple[str, float]] = {}
        self._checkpoint: Checkpoint | None = None
        if path.is_dir():
            self._open_directory()
        else:
            self.model()
            self._types = _gguf_types(path)
        if self._model is not None:
            self.layers = linear_names(self._model)
        if not self.layers:
            raise UserError(f"{path} has no linear layer to inspect")
        rounded = Counter(self._types[layer][0] for layer in self.layers if self._types.get(layer, ("F",))[0][0] != "F")
        if rounded and "BF16" not in rounded:
            kinds = ", ".join(f"{count} {kind}" for kind, count in rounded.items())
            self.notes.append(
                f"{kinds} of {len(self.layers)} weights were quantized in the GGUF file before: what is said of "
                "them is said of weights that have been rounded once"
            )

    def _open_directory(self) -> None:
        try:
            self._checkpoint = Checkpoint(self.path)
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
        there = {*self._checkpoint.plain_names(), *self._checkpoint.quantized_names()}
        with reading(self.path):
            self.layers = linear_names(skeleton(self.path))
        if self.is_4bit:
            quantized = self._checkpoint.quantized_names()
            self.layers = [name.removesuffix(".weight") for name in quantized]
        elif not all(f"{layer}.weight" in there for layer in self.layers):
            self.model()  # the files have other names

    def model(self) -> Any:
        """The model, dense, in float32 on the CPU; read once."""
        if self._model is None:
            self._model = load_model(self.path, torch.float32)
        return self._model

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Weight]:
        for layer in self.layers:
            yield self[layer]

    def __getitem__(self, layer: str) -> Weight:
        name = f"{layer}.weight"
        if self._checkpoint is not None and name in self._checkpoint.quantized_names():
            packed = self._checkpoint.quantized(name)
            return Weight(layer, packed, packed.codebook, packed.bits_per_parameter)
        if self._checkpoint is not None and name in self._checkpoint.names():
            tensor = self._checkpoint.tensor(name)
            return Weight(layer, tensor, dtype_name(tensor.dtype), 8.0 * tensor.element_size())
        tensor = self.model().get_parameter(name).detach()
        stored, bits = self._types.get(layer, (None, None))
        return Weight(layer, tensor, stored or "another name", bits)


def _gguf_types(path: Path) -> dict[str, tuple[str, float]]:
    """What a GGUF file holds each layer's weight in, and how many bits a parameter takes; what has no name is left out.

    The names of the file (``blk.0.attn_q``) are those of llama.cpp; the gguf package knows which layer of transformers
    each of them is.
    """
    import gguf

    with reading(path):
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = str(field.contents()) if field else ""
        blocks = 1 + max((int(t.name.split(".")[1]) for t in reader.tensors if t.name.startswith("blk.")), default=0)
        found = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
        if not found:
            return {}
        types = {t.name: (t.tensor_type.name, 8.0 * float(t.n_bytes) / float(t.n_elements)) for t in reader.tensors}
        names = gguf.get_tensor_name_map(found[0], blocks)
        return {
            ours: types[f"{theirs}.weight"]
            for ours, (_, theirs) in names.mapping.items()
            if f"{theirs}.weight" in types
        }
