"""From a model and an adapter to one model: what ``qloralab merge`` does.

Training saw the dequantized weights W', and the adapter has learned to repair them as well. So it is W' to which the
update is added, W' + scaling * B A in float32, rounded once to bfloat16; layers that were quantized and have no adapter
are dequantized too, and everything else is in bfloat16, as training read it. ``--onto original`` adds to the weights
before they were quantized. Into 4 bits that is the default, where the model is dense and training did not pass the
quantizer: of an update to dequantized weights next to nothing would survive.

A directory of dense weights streams (``checkpoint/rewrite.py``), so memory follows the largest tensor. A GGUF file, and
a directory with 4-bit weights, is loaded whole first.

``--into 4bit`` quantizes the sum again. Little of the adapter may survive that (``survival.py``), which is measured
and written as ``merge.json``; where too little is kept, nothing is written without ``--force``. A run that was
merge-aware has trained just those 4 bits (``lora/merge_aware.py``): nothing of it is lost, so nothing is refused.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qloralab.lora.files import read_adapter
from qloralab.lora.merged_weight import merged_quantized, merged_weight
from qloralab.nf4.files import bitsandbytes_layout
from qloralab.nf4.files.bitsandbytes_layout import KNOWN
from qloralab.nf4.files.pretrained import COMPUTE_DTYPE, describe, skip_modules
from qloralab.nf4.files.quantization_config import QuantizationConfig
from qloralab.nf4.files.safetensors_reader import Description
from qloralab.nf4.linear import QuantizedLinear
from qloralab.nf4.model import linear_names, parents_of, replace
from qloralab.nf4.tensor import QuantizedTensor, quantize

from ..checkpoint.models import (
    DENSE_DTYPE,
    check_adapter,
    check_adapter_fits,
    check_model,
    load_model,
    load_tokenizer,
    model_name,
    reading_adapter,
)
from ..checkpoint.opened import Source
from ..checkpoint.output_directory import check_new, size_text, written_beside
from ..checkpoint.quantized_model import kept_in_float32, quantizable, saved_tensors, write_config, write_model
from ..checkpoint.rewrite import Rewriting, copy_small_files, late_part, making, small_files
from ..compute import check_environment, precision
from ..display import Display
from ..errors import UserError
from ..evaluate.text import read_text
from ..inspection.run_model import Pieces
from ..resident import peak_mb
from ..settings import STDLIB
from ..train.run_directory import versions
from .settings import LEAST_KEPT, MergeSettings
from .survival import Outputs, Survival, outputs, overall, survival
from .table import show
from .trained_on import TrainedOn, described

REPORT = "merge.json"
_ONTO = {
    "dequantized": "the dequantized weights, which training saw",
    "original": "the original weights, before they are quantized",
}
_PIECES = 4  # of the text, of 256 tokens at most


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        path: the directory.
        merged: how many layers have an adapter in them.
        bytes: of all tensors.
        survived: by layer what survives in 4 bits; empty for bfloat16.
        seconds: of reading, merging and writing.
        peak_mb: the largest resident memory of the process, in 10**6 bytes.
    """

    path: Path
    merged: int
    bytes: int
    survived: list[Survival]
    seconds: float
    peak_mb: float


def merge(settings: MergeSettings, display: Display | None = None) -> Result:
    """Write the model of the settings with the adapter in its weights.

    Raises:
        UserError: the model or the adapter cannot be used, they do not fit, out cannot be written, or too little of the
            adapter would survive.
        FormatError: a file is not what it claims to be.
    """
    display = display or Display()
    check_environment()
    check_new(settings.out)
    check_model(settings.model)
    check_adapter(settings.adapter)
    trained = TrainedOn.of(settings)
    if (kind := trained.data_type) and settings.into == "4bit" and not (kind.is_plain and kind.codebook in KNOWN):
        raise UserError(f"--into 4bit writes {' and '.join(KNOWN)} alone, and this is {described(kind)}; use bf16")
    display.fact("trained on", trained.said)
    display.fact("onto", _ONTO[trained.onto])
    if trained.merge_aware and settings.into == "bf16":
        display.fact("note", "the run was merge-aware: what it trained is --into 4bit")
    start = time.perf_counter()
    merging = _Merging(settings, trained)
    if settings.activations:
        merging.outputs = _outputs(settings, trained, display)
    streams = settings.model.is_dir() and not trained.packed
    with making(settings.model, settings.out):
        total = (_stream if streams else _load_and_save)(merging, display)
    seconds = time.perf_counter() - start
    result = Result(settings.out, len(merging.adapters), total, merging.survived, seconds, peak_mb())
    display.fact("merged", f"{result.merged} layers, scaling {merging.config.scaling:g}")
    if result.survived:
        show(result.survived, display)
    display.fact("size", f"{size_text(result.bytes)}, {result.seconds:.1f} s, {result.peak_mb / 1000:.2f} GB of memory")
    display.fact("saved", str(result.path))
    display.fact("try it", f'qloralab generate --model {result.path}{_dense(settings)} --prompt "…"')
    return result


def _dense(settings: MergeSettings) -> str:
    return " --dense" if settings.into == "bf16" else ""


class _Merging:
    """What becomes of the weights of the linear layers."""

    def __init__(self, settings: MergeSettings, trained: TrainedOn):
        self.settings, self.trained = settings, trained
        self.outputs: dict[str, Outputs] = {}
        self.survived: list[Survival] = []
        self.quantized: set[str] = set()  # the layers that training saw in 4 bits
        self.written: set[str] = set()  # those that are written so
        with reading_adapter(settings.adapter):
            self.config, self.adapters = read_adapter(None, settings.adapter)

    def choose(self, model: Any) -> list[str]:
        """The layers whose weights change, of a model or its skeleton, which the adapter has to fit."""
        with reading_adapter(self.settings.adapter):
            read_adapter(model, self.settings.adapter)
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        for layer in self.adapters:
            if f"{layer}.weight" in tied:
                why = "whose weight another layer shares: merged, both would change"
                raise UserError(f"{self.settings.adapter} adapts {layer}, {why}")
        if self.trained.packed:
            self.quantized = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        elif self.trained.data_type is not None:
            try:
                self.quantized = {*linear_names(model, self.trained.skip)}
            except ValueError as error:
                raise UserError(str(error)) from error
        if self.settings.into == "4bit":
            self.written = self.quantized if self.trained.packed else self.quantized & {*quantizable(model)}
        return [name for name, _ in model.named_modules() if name in self.quantized | self.adapters.keys()]

    def __call__(self, layer: str, weight: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
        """The new weight of a layer: bfloat16, or in 4 bits where it is one of ``written``.

        Raises:
            UserError: it cannot be quantized.
        """
        try:
            return self._merged(layer, weight)
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.settings.model}: {error}") from error

    def _merged(self, layer: str, weight: Tensor | QuantizedTensor) -> Tensor | QuantizedTensor:
        adapter, scaling = self.adapters.get(layer), self.config.scaling
        base = weight if isinstance(weight, QuantizedTensor) else self._quantized(layer, weight)
        onto_base = base is not None and self.trained.onto == "dequantized"
        if base is not None and layer in self.written:
            if adapter is None:
                return base
            start = None if onto_base or isinstance(weight, QuantizedTensor) else weight
            made = merged_quantized(base, *adapter, scaling, start)
            delta = merged_weight(torch.zeros(base.shape), *adapter, scaling)
            found = survival(layer, base, made, delta)
            self.survived.append(dataclasses.replace(found, outputs=self.outputs.get(layer)))
            return made
        if base is not None and (onto_base or isinstance(weight, QuantizedTensor)):
            weight = base.dequantize(torch.float32)
        assert isinstance(weight, Tensor)
        if self.trained.data_type is not None and self.trained.onto == "dequantized" and base is None:
            weight = weight.to(DENSE_DTYPE)  # a layer that stayed dense, as the run read it
        return (weight if adapter is None else merged_weight(weight, *adapter, scaling)).to(DENSE_DTYPE)

    def _quantized(self, layer: str, weight: Tensor) -> QuantizedTensor | None:
        """What training saw of a dense weight; None where it saw that, or nobody asks."""
        if layer not in self.quantized or (self.trained.onto == "original" and layer not in self.written):
            return None
        assert self.trained.data_type is not None
        return quantize(weight.to(DENSE_DTYPE), self.trained.data_type, name=f"{layer}.weight")

    def finish(self, part: Path) -> None:
        """Refuse a directory in which too little survives; write what does beside the weights."""
        if not self.survived:
            return
        whole = overall(self.survived)
        if whole.kept < LEAST_KEPT and not self.settings.force and not self.trained.merge_aware:
            original = "" if self.trained.packed or self.trained.onto == "original" else " or --onto original"
            raise UserError(
                f"4 bits would keep {whole.kept:.3f} of the adapter; merge --into bf16{original}, train with "
                "finetune --merge-aware, or give --force"
            )
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.settings).items()}
        settings["onto"] = self.trained.onto
        kind = self.trained.data_type
        report = {
            "settings": settings,
            "trained_on": self.trained.said if kind is None else kind.settings() | {"skip": self.trained.skip},
            "versions": versions(),
            "overall": whole.as_json(),
            "layers": [one.as_json() for one in self.survived],
        }
        (part / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


class _Stream(Rewriting):
    """A directory with an adapter merged into it."""

    def __init__(self, merging: _Merging):
        otherwise = "load it with transformers, then load_adapter_, merge_ and save_pretrained"
        super().__init__(merging.settings.model, merging.choose, otherwise)
        self.merging = merging
        self.chosen = {f"{layer}.weight": layer for layer in self.layers}
        self._parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self._kept = kept_in_float32(self.model)

    def parts(self, name: str) -> tuple[dict[str, Description], list[str]]:
        _, shape = self.sizes[name]
        if not self._is_packed(name):
            return {name: (self._dtype(name), shape)}, []
        kind = self.merging.trained.data_type
        assert kind is not None
        assert isinstance(kind.codebook, str)
        options = kind.codebook, kind.block_size, kind.double_quant, torch.uint8
        parts = bitsandbytes_layout.describe(name, shape, DENSE_DTYPE, *options)
        return parts, [late_part(parts)]

    def convert(self, name: str) -> dict[str, Tensor]:
        tensor = self.checkpoint.tensor(name)
        if name not in self.chosen:
            return {name: tensor.to(self._dtype(name))}
        made = self.merging(self.chosen[name], tensor)
        return made.stored(name) if isinstance(made, QuantizedTensor) else {name: made}

    def write_rest(self, part: Path) -> None:
        self.merging.finish(part)
        super().write_rest(part)
        config, kind = None, self.merging.trained.data_type
        if self.merging.settings.into == "4bit":
            assert kind is not None
            assert isinstance(kind.codebook, str)
            skipped = skip_modules(self.model, self.merging.written)
            config = QuantizationConfig(kind.codebook, kind.double_quant, COMPUTE_DTYPE, skip_modules=skipped)
        fields = {name: value for name, value in self.config.items() if name != "torch_dtype"}
        write_config(part, fields | {"dtype": "bfloat16"}, config)

    def _is_packed(self, name: str) -> bool:
        return name in self.chosen and self.chosen[name] in self.merging.written

    def _dtype(self, name: str) -> torch.dtype:
        """bfloat16, as training reads all of a model; but for what transformers keeps, and for what is no parameter."""
        dtype = self.sizes[name][0]
        kept = self._kept is not None and self._kept.search(name)
        return DENSE_DTYPE if dtype.is_floating_point and name in self._parameters and not kept else dtype


def _stream(merging: _Merging, display: Display) -> int:
    settings = merging.settings
    with display.busy(f"reading the headers of {model_name(settings.model)}"):
        stream = _Stream(merging)
        _tell_other_model(settings, stream.model.config, display)
    return stream.write(settings.out, "merging", display)


def _load_and_save(merging: _Merging, display: Display) -> int:
    settings = merging.settings
    with display.busy(f"reading {model_name(settings.model)}"):
        model = load_model(settings.model, DENSE_DTYPE)
        small = small_files(settings.model) if settings.model.is_dir() else []
        tokenizer = None if settings.model.is_dir() else load_tokenizer(settings.model)
    _tell_other_model(settings, model.config, display)
    layers, parents = merging.choose(model), parents_of(model)
    with display.busy("merging", "layers") as progress, torch.no_grad():
        for done, name in enumerate(layers, 1):
            layer: Any = model.get_submodule(name)
            made = merging(name, layer.weight)
            if isinstance(made, QuantizedTensor):
                new: Any = QuantizedLinear(made, layer.bias, COMPUTE_DTYPE)
            else:
                new = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                new.weight = nn.Parameter(made, requires_grad=False)
                new.bias = layer.bias
            replace(parents.pop(layer), layer, new)
            del layer
            progress(done, len(layers))
    try:
        config = describe(model) if settings.into == "4bit" else None
    except ValueError as error:
        raise UserError(f"{settings.model}: {error}") from error
    total = sum(tensor.nbytes for tensor in saved_tensors(model).values())
    with display.busy("writing"), written_beside(settings.out, total) as part:
        merging.finish(part)
        copy_small_files(small, part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        write_model(model, part, config)
    return total


def _tell_other_model(settings: MergeSettings, config: Any, display: Display) -> None:
    if other_model := check_adapter_fits(settings.adapter, config):
        display.fact("note", other_model)


def _outputs(settings: MergeSettings, trained: TrainedOn, display: Display) -> dict[str, Outputs]:
    """The outputs of the layers on held-out docstrings, in float32."""
    quiet = Display(display.console)
    source = Source.of(settings.model, trained.data_type, settings.adapter, quiet, trained.skip)
    positions = source.limits and source.limits.positions
    pieces = Pieces.of(read_text(STDLIB, source.tokenizer, None, positions).documents, _PIECES)
    if source.limits:
        source.limits.check(((one.source, one.input_ids) for one in pieces.pieces), source.tokenizer)
    model = source.open(precision("float32", torch.device("cpu")), display)
    with display.busy("outputs of the layers", "products") as progress:
        return outputs(model, pieces.pieces, progress)
