"""The adapter files that are refused: with the file's name, and the model as it was."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qloralab.lora.config import LoraConfig
from qloralab.lora.files import CONFIG_FILE, WEIGHTS_FILE, read_adapter, save_adapter
from qloralab.lora.inject import adapters, inject_, load_adapter_
from qloralab.nf4.files.errors import FormatError


class Model(nn.Module):
    """wte [10, 16], up [12, 16], down [16, 12], norm [16]."""

    def __init__(self):
        super().__init__()
        self.wte, self.norm = nn.Embedding(10, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, ids):
        return self.norm(self.down(self.up(self.wte(ids)).relu()))


@pytest.fixture
def saved(tmp_path) -> Path:
    save_adapter(inject_(Model(), LoraConfig(4, 8)), tmp_path)
    return tmp_path


def edit(directory: Path, **fields: Any) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(directory: Path, kind: type[Exception], file: str, message: str) -> Exception:
    """Loading raises, the message has the file, and the model is as before."""
    model = Model()
    with pytest.raises(kind, match=re.escape(message)) as caught:
        load_adapter_(model, directory)
    assert str(directory / file) in str(caught.value)
    assert not adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return caught.value


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", None], ids=str)
def test_what_changes_nothing_is_taken(saved, init):
    edit(saved, init_lora_weights=init, rank_pattern={}, use_dora=False, modules_to_save=None, fan_in_fan_out=True, x=1)
    assert set(adapters(load_adapter_(Model(), saved))) == {"up", "down"}


UNSUPPORTED: dict[str, Any] = {
    "use_dora": True, "rank_pattern": {"up": 2}, "alpha_pattern": {"up": 2}, "modules_to_save": ["wte"],
    "lora_bias": True, "layer_replication": [[0, 1]], "trainable_token_indices": [1, 2],
    "target_parameters": ["up.weight"], "use_qalora": True, "use_bdlora": {"target_modules_bd_a": ["up"]},
    "arrow_config": {"top_k": 3}, "alora_invocation_tokens": [1], "peft_type": "IA3",
}  # fmt: skip


@pytest.mark.parametrize("field", [*UNSUPPORTED, "r", "lora_alpha"])
def test_a_field_that_is_missing_or_asks_for_what_this_library_does_not_do_is_named(saved, field):
    if field in UNSUPPORTED:
        edit(saved, **{field: UNSUPPORTED[field]})
    else:
        fields = json.loads((saved / CONFIG_FILE).read_text())
        del fields[field]
        (saved / CONFIG_FILE).write_text(json.dumps(fields))
    error: Any = refused(saved, FormatError, CONFIG_FILE, field if field in UNSUPPORTED else "is missing")
    assert (error.file, error.field) == (str(saved / CONFIG_FILE), field)


@pytest.mark.parametrize(
    "fields",
    [
        # PEFT subtracts the first A and B from the weight beside them, when it makes and when it loads such layers.
        *({"init_lora_weights": init} for init in ("pissa", "pissa_niter_4", "olora")),
        *({"use_dora": True}, {"rank_pattern": {"up": 2}}, {"modules_to_save": ["wte"]}),
    ],
    ids=str,
)
def test_files_of_peft_with_more_in_them(tmp_path, fields):
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], **fields)
    peft.get_peft_model(Model(), config).save_pretrained(str(tmp_path))  # pyright: ignore[reportArgumentType]
    refused(tmp_path, FormatError, CONFIG_FILE, next(iter(fields)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4'"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_alpha": "8"}, "not supported between"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"lora_dropout": None}, "not supported between"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"use_rslora": 1}, "is 1, not true or false"),
        (b"", "is not JSON"),
        (b"[]", "holds a JSON list"),
        (b'{"r": 4, "lora_alpha": 1%s}' % (b"0" * 400), "field 'lora_alpha': is a number of 401 digits"),
        (b'{"r": 4, "lora_alpha": 1e400}', "lora_alpha is inf"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_with_impossible_values(saved, config, message):
    if isinstance(config, dict):
        edit(saved, **config)
    else:
        (saved / CONFIG_FILE).write_bytes(config)
    refused(saved, FormatError, CONFIG_FILE, message)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file(saved, file):
    (saved / file).unlink()
    refused(saved, FileNotFoundError, file, file)
    refused(saved / "nope", FileNotFoundError, CONFIG_FILE, CONFIG_FILE)


def test_a_pickle_is_not_opened(saved):
    (saved / WEIGHTS_FILE).rename(saved / "adapter_model.bin")
    refused(saved, FormatError, "adapter_model.bin", "is a pickle, which can run code")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_weights_that_end_early(saved, keep):
    path = saved / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:keep])
    refused(saved, FormatError, WEIGHTS_FILE, "has 895 " if keep == -1 else f"has {keep}")


A, B, EMBEDDING = (f"base_model.model.up.lora_{end}" for end in ("A.weight", "B.weight", "embedding_A"))


def at(layer: str, key: str) -> str:
    return key.replace("up", layer)


SPOILED: dict[str, tuple[Any, type[Exception], str]] = {
    "empty": (lambda t: t.clear(), FormatError, "holds no adapter"),
    "no A": (lambda t: t.pop(A), FormatError, f"tensor {A!r}: is missing"),
    "no B": (lambda t: t.pop(B), FormatError, f"tensor {B!r}: is missing"),
    "A of another rank": (
        lambda t: t.update({A: torch.ones(3, 16)}), FormatError, f"{A!r}: is [3, 16]; the config says r = 4",
    ),
    "B of another rank": (
        lambda t: t.update({B: torch.ones(12, 3)}), FormatError, f"{B!r}: is [12, 3]; the config says r = 4",
    ),
    "A of one dimension": (lambda t: t.update({A: torch.ones(4)}), FormatError, f"tensor {A!r}: is [4]"),
    "A is NaN": (
        lambda t: t[A].view(-1)[5:6].fill_(torch.nan), FormatError, f"tensor {A!r}: holds a value that is NaN",
    ),
    "B is too large": (
        lambda t: t.update({B: t[B].double().fill_(1e300)}), FormatError, f"{B!r}: holds a value that is NaN",
    ),
    "B is int": (lambda t: t.update({B: t[B].to(torch.int8)}), FormatError, f"tensor {B!r}: is torch.int8"),
    "A is wide": (lambda t: t.update({A: torch.ones(4, 17)}), ValueError, "of up is for 12 x 17, the layer is 12 x 16"),
    "B is high": (lambda t: t.update({B: torch.ones(13, 4)}), ValueError, "of up is for 13 x 16, the layer is 12 x 16"),
    "no prefix": (lambda t: t.update({"up.lora_A.weight": t.pop(A)}), FormatError, "is not the A or B of a LoRA layer"),
    "no suffix": (lambda t: t.update({A[:-7]: t.pop(A)}), FormatError, "is not the A or B of a LoRA layer"),
    "no such layer": (lambda t: t.update({at("x", A): t[A], at("x", B): t[B]}), ValueError, "has an adapter for x"),
    "not linear": (lambda t: t.update({at("norm", A): t[A], at("norm", B): t[B]}), ValueError, "LayerNorm"),
    "of an embedding": (
        lambda t: t.update({at("wte", EMBEDDING): t[A]}), FormatError, "_embedding_A': is not the A or B",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_weights_that_do_not_fit(saved, case):
    change, kind, message = SPOILED[case]
    tensors = load_file(saved / WEIGHTS_FILE)
    change(tensors)
    save_file({key: value.clone() for key, value in tensors.items()}, saved / WEIGHTS_FILE)
    refused(saved, kind, WEIGHTS_FILE, message)


def test_a_model_on_the_meta_device(saved):
    """The file is checked against it; it does not take the values."""
    with torch.device("meta"):
        model = Model()
    read_adapter(model, saved)
    with pytest.raises(ValueError, match=r"^down is on the meta device, where an adapter has no values"):
        load_adapter_(model, saved)
    assert not adapters(model)
    with pytest.raises(ValueError, match=r"^up is on the meta device: its adapter has no values to save"):
        save_adapter(inject_(model, LoraConfig(4, 8)), saved)
    save_file({A: torch.ones(4, 16), B: torch.ones(13, 4)}, saved / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="the adapter of up is for 13 x 16, the layer is 12 x 16"):
        read_adapter(Model(), saved)
