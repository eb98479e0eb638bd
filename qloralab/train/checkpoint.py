"""All that a training run has learned and still needs, in one file: a run that reads it goes on as if never stopped.

A safetensors file, which holds no code that reading could run::

    parameter.NAME              a parameter that trains, by its name in the model
    optimizer.NAME.KEY          of its state in the optimizer, each tensor: exp_avg, exp_avg_sq, ...
    random.cpu, random.cuda.0   uint8: the states of PyTorch's generators

What is no tensor (the optimizer's options and counts, the generators of Python and NumPy, what the loop wants to keep)
is JSON in the metadata of the header, where floating-point numbers are written so that the last bit comes back. The
file grows beside its name, is made durable and renamed: a process that is killed at any moment leaves this checkpoint
whole, or the one before it.

The state of a paged optimizer is written and read tensor by tensor, from and to where it pages. What several processes
share (``fully_shard``) is gathered so, too, and each takes its part when it reads: the file is the same whatever their
number, and is read by any other.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qloralab.nf4.distributed import part_of, whole, writes
from qloralab.nf4.files.errors import FormatError
from qloralab.nf4.files.safetensors_reader import SafetensorsFile
from qloralab.nf4.files.safetensors_writer import SafetensorsWriter

FORMAT = "qloralab training checkpoint, 1"
_TENSOR = "tensor"  # the key of what stands for a tensor in the JSON


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, progress: Mapping[str, Any] | None = None
) -> None:
    """Write what ``load_checkpoint_`` needs to go on: parameters that train, optimizer, random states.

    Args:
        path: of the file, whose directory exists. It is replaced whole or not at all, and is on the disk at the end.
        model: whose parameters with ``requires_grad`` are written; the others are not.
        optimizer: of parameters of this model; paged or any other whose state is of tensors, numbers, texts and
            dictionaries of them.
        progress: what the loop needs besides (steps done, position in the data, its own schedule), as JSON.

    Where processes share parameters, all of them call this, and the first one writes: its random states, and progress.

    Raises:
        ValueError: a parameter of the optimizer is not one of the model, or is on the meta device; or a state or the
            progress cannot be written.
        OSError: the file cannot be written.
    """
    named = _trainable(model)
    tensors: dict[str, Tensor] = {f"parameter.{name}": parameter.detach() for name, parameter in named.items()}
    names = _names(optimizer, named)
    found = optimizer.state_dict()
    state = {
        names[number]: _apart(entry, f"optimizer.{names[number]}", tensors) for number, entry in found["state"].items()
    }
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: it cannot be written")
    groups = [{key: value for key, value in group.items() if key != "params"} for group in found["param_groups"]]
    states, generators = random_states()
    tensors |= generators
    facts = {"state": state, "groups": groups, "random": states, "progress": dict(progress or {})}
    try:
        metadata = {"format": FORMAT, **{name: json.dumps(fact) for name, fact in facts.items()}}
    except TypeError as error:
        raise ValueError(f"the optimizer's options or the progress cannot be written as JSON: {error}") from None
    if not writes(tensors.values()):
        for tensor in tensors.values():
            whole(tensor)
        return
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, layout, metadata=metadata) as file:
        for name, tensor in tensors.items():
            file.write(name, whole(tensor))


def load_checkpoint_(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Put a model, an optimizer and the generators of random numbers back where ``save_checkpoint`` met them.

    Args:
        path: of the file.
        model: that trains the same parameters, by name, shape and dtype. What is frozen is not looked at.
        optimizer: of the same class and groups. Its options (learning rate, ...) become those of the file.

    Returns:
        the progress that was written with it.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it is no such checkpoint.
        ValueError: the model or the optimizer is another one; neither is changed then.
    """
    file = SafetensorsFile(path)
    facts = _facts(file)
    named = _trainable(model)
    _check_parameters(file, named)
    names = _names(optimizer, named)
    own = optimizer.state_dict()["param_groups"]
    if len(own) != len(facts["groups"]):
        raise ValueError(f"{path} has {len(facts['groups'])} groups of parameters, the optimizer {len(own)}")
    numbers = {name: number for number, name in names.items()}
    if unknown := facts["state"].keys() - numbers.keys():
        raise ValueError(f"{path} has a state of {sorted(unknown)[0]}, which the optimizer does not have")
    state = {numbers[name]: _together(entry, file, named[name]) for name, entry in facts["state"].items()}
    groups = [{**mine, **_like(mine, saved)} for mine, saved in zip(own, facts["groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(part_of(file.tensor(f"parameter.{name}").to(parameter.device), parameter))
    restore_random_states(
        facts["random"], {name: file.tensor(name) for name in file.names() if name.startswith("random.")}
    )
    return facts["progress"]


def read_progress(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The progress in a checkpoint, without reading a tensor.

    Raises:
        FileNotFoundError, FormatError: see ``load_checkpoint_``.
    """
    return _facts(SafetensorsFile(path))["progress"]


def random_states() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The states of all generators: those of Python and NumPy as JSON, those of PyTorch as uint8 tensors by name."""
    kind, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002  the global one, that models may draw from
    key = numpy_state["state"]["key"].tolist()
    states = {
        "python": [kind, list(numbers), gauss],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
    }
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"random.cuda.{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    return states, tensors


def restore_random_states(states: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put the generators back where ``random_states`` met them; those of devices that are not here are left out."""
    kind, numbers, gauss = states["python"]
    random.setstate((kind, tuple(numbers), gauss))
    numpy_state = states["numpy"]
    key = np.array(numpy_state["state"]["key"], np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})  # noqa: NPY002
    torch.set_rng_state(tensors["random.cpu"].clone())
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if (name := f"random.cuda.{number}") in tensors:
            torch.cuda.set_rng_state(tensors[name].clone(), number)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _names(optimizer: Optimizer, named: Mapping[str, Tensor]) -> dict[int, str]:
    """The names of the optimizer's parameters, by the number that each has in its state dictionary."""
    names = {id(parameter): name for name, parameter in named.items()}
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in names for parameter in members):
        raise ValueError("the optimizer has a parameter that is not one of the model's, or does not train")
    return {number: names[id(parameter)] for number, parameter in enumerate(members)}


def _apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A state as JSON; its tensors go into ``tensors``, and what stands for them tells their name."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {key: _apart(one, f"{name}.{key}", tensors) for key, one in value.items()}
    return value


def _together(value: Any, file: SafetensorsFile, parameter: Tensor) -> Any:
    """What ``_apart`` took apart, of the state of a parameter."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return part_of(file.tensor(value[_TENSOR]), parameter)
    return {key: _together(one, file, parameter) for key, one in value.items()}


def _like(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they were before they were JSON, which knows no tuples."""
    return {key: tuple(one) if isinstance(mine.get(key), tuple) else one for key, one in saved.items()}


def _facts(file: SafetensorsFile) -> dict[str, Any]:
    if (found := file.metadata.get("format")) != FORMAT:
        raise FormatError(f"has the format {found!r}; expected {FORMAT!r}", file=file.path)
    return {name: json.loads(file.metadata[name]) for name in ("state", "groups", "random", "progress")}


def _check_parameters(file: SafetensorsFile, named: Mapping[str, Tensor]) -> None:
    """Refuse a model that trains other parameters than the file has."""
    theirs = dict(_parameters(file))
    for name in [*named, *theirs]:
        if name not in theirs or name not in named:
            has, lacks = (file.path, "the model") if name in theirs else ("the model", file.path)
            raise ValueError(f"{has} trains {name}, {lacks} does not")
        mine = named[name].dtype, tuple(named[name].shape)
        if mine != theirs[name]:
            (dtype, shape), (its_dtype, its_shape) = mine, theirs[name]
            raise ValueError(f"{name} is {dtype} {list(shape)}, in {file.path} {its_dtype} {list(its_shape)}")


def _parameters(file: SafetensorsFile) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    for name in file.names():
        if name.startswith("parameter."):
            yield name.removeprefix("parameter."), file.describe(name)
