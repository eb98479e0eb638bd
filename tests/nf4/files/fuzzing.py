"""Small checkpoints from a seed, and the ways in which they are spoiled.

A checkpoint is spoiled while it is made, at one of the stages through which it goes: its tensors, the header of a file,
the index, the bytes of a file, the files on the disk. So a mutation changes one thing, leaves the rest valid, and gets
past the checks of the stages before. ``MUTATIONS`` has them by name; each is a function of a random generator and the
checkpoint, and raises ``Inapplicable`` where the checkpoint has nothing of the kind.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from qloralab.nf4.files.bitsandbytes_layout import STORAGE
from qloralab.nf4.files.checkpoint import INDEX_FILE, WEIGHTS_FILE
from qloralab.nf4.packed import DTYPES
from qloralab.nf4.tensor import QuantizedTensor, quantize

SHAPES = [(), (0,), (1,), (63,), (8, 24), (64, 64), (3, 5, 7), (130, 40), (256, 70)]
PLAIN_DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
PAYLOAD = ".quant_state."
FIELDS = ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"]

NUMBERS: list[Any] = [-1, 1, 63, 2**31, 2**50, 2**63, 2**64, 10**400, 1.5, 64.0, 3.4e38, 1e999, float("nan"), True]
OTHERS: list[Any] = [None, "", "64", "nf4", "float32", "é\0", [], {}, {"a": []}]
LIES: list[Any] = [[2**28], [2**20, 2**12], [1, 2**50]]  # sizes that a tensor could have
SIZES: list[Any] = [
    [2**50, 2**50], [2**63], [0, 2**62], [1] * 70, [-1], [1.0], [True], [None], ["1"], [[]], None, {}, 64, "64",
    *LIES, *LIES, *LIES,
]  # fmt: skip
SHARDS: list[Any] = [
    "../outside.safetensors", "/dev/zero", "/dev/zero.safetensors", "..", ".", "", "gone.safetensors", "x.bin", None, 1,
    "a\0.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors", "c:\\x.safetensors", ["a.safetensors"],
]  # fmt: skip


class Inapplicable(Exception):
    """The checkpoint has nothing that this mutation could spoil."""


class Made:
    """A checkpoint on its way to the disk.

    Attributes:
        weights: the 4-bit weights by name, as they were quantized.
        tensors: by the name of the file and the name of the tensor.
        headers: of each file, the pairs of a name and an entry (a pair may come twice). From the second stage on.
        data: of each file, what follows the header.
        index: the content of the index, None for a checkpoint of one file.
        files: the bytes of each file. From the third stage on.
        to_disk: what happens to the directory when all is written.
    """

    def __init__(self, seed: int):
        rng = random.Random(seed)
        self.weights = {name: _weight(rng) for name in rng.sample(["w", "h.0.w", "h.1.w"], rng.randint(1, 3))}
        found: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            storages = [dtype for dtype in STORAGE if weight.packed.nbytes % dtype.itemsize == 0]
            found |= weight.to_bitsandbytes(name, rng.choice(storages))
        for name in rng.sample(["h.0.bias", "h.w", "w2", "norm"], rng.randint(0, 3)):
            found[name] = torch.full(rng.choice(SHAPES), 1.0).to(rng.choice(PLAIN_DTYPES))
        self.index: dict[str, Any] | None = None
        self.tensors = {WEIGHTS_FILE: found}
        if rng.random() < 0.5:
            names = rng.sample(sorted(found), len(found))
            cut = rng.randint(1, len(names) - 1)
            shards = {"model-00001-of-00002.safetensors": names[:cut], "model-00002-of-00002.safetensors": names[cut:]}
            self.tensors = {file: {name: found[name] for name in part} for file, part in shards.items()}
            weight_map = {name: file for file, part in shards.items() for name in part}
            self.index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        self.headers: dict[str, list[tuple[str, Any]]] = {}
        self.data: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.to_disk: list[Callable[[Path], None]] = []

    def lay_out(self) -> None:
        """From tensors to headers."""
        for file, tensors in self.tensors.items():
            whole = save({name: tensor.clone() for name, tensor in tensors.items()}, metadata={"format": "pt"})
            end = 8 + int.from_bytes(whole[:8], "little")
            self.headers[file], self.data[file] = list(json.loads(whole[8:end]).items()), whole[end:]

    def serialize(self) -> None:
        """From headers to bytes."""
        for file, pairs in self.headers.items():
            text = "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in pairs) + "}"
            self.files[file] = struct.pack("<Q", len(text)) + text.encode() + self.data[file]
        if self.index is not None:
            self.files[INDEX_FILE] = json.dumps(self.index).encode()

    def write(self, directory: Path) -> None:
        """To the disk."""
        directory.mkdir(parents=True)
        for file, content in self.files.items():
            (directory / file).write_bytes(content)
        for change in self.to_disk:
            change(directory)


def _weight(rng: random.Random) -> QuantizedTensor:
    numbers = torch.randn(rng.choice(SHAPES), generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    block_size, double_quant = rng.choice([32, 64, 256, 4096]), rng.random() < 0.5
    return quantize(numbers.to(rng.choice(DTYPES)), rng.choice(["nf4", "fp4"]), block_size, double_quant)


def make(seed: int, kinds: list[str], directory: Path) -> list[str]:
    """Write a checkpoint, spoiled.

    Args:
        seed: of the checkpoint, and of the choices within the mutations.
        kinds: names of mutations, done in the order of their stages. The first is done in any case: checkpoints that it
            does not apply to are passed over.
        directory: made here.

    Returns:
        the mutations that were done.
    """
    rng = random.Random(seed)
    while True:
        made = Made(rng.getrandbits(32))
        done = spoil(rng, made, kinds)
        if not kinds or kinds[0] in done:
            made.write(directory)
            return done


def spoil(rng: random.Random, made: Made, kinds: list[str]) -> list[str]:
    """Bring a checkpoint to the point where it is written; the mutations that were done on the way."""
    done = []
    for stage, then in enumerate([made.lay_out, made.serialize, None, None]):
        for kind in kinds:
            if STAGES[kind] == stage:
                with suppress(Inapplicable):
                    MUTATIONS[kind](rng, made)
                    done.append(kind)
        if then is not None:
            then()
    return done


Mutation = Callable[[random.Random, Made], None]
MUTATIONS: dict[str, Mutation] = {}
STAGES: dict[str, int] = {}


def at(stage: int) -> Callable[[Mutation], Mutation]:
    """Register a mutation of the tensors (0), the headers and the index (1), the bytes (2), the files (3)."""

    def register(function: Mutation) -> Mutation:
        name = function.__name__.strip("_")
        MUTATIONS[name], STAGES[name] = function, stage
        return function

    return register


def pick(rng: random.Random, found: Any) -> Any:
    """One of some things."""
    things = list(found)
    if not things:
        raise Inapplicable
    return rng.choice(things)


def one_tensor(rng: random.Random, made: Made, *suffixes: str) -> tuple[dict[str, Tensor], str]:
    """Some tensor of a 4-bit weight (with a name that ends so), as the dictionary it is in and its name there."""
    return pick(
        rng,
        [
            (tensors, name)
            for tensors in made.tensors.values()
            for name in tensors
            if any(name == weight or name.startswith(f"{weight}.") for weight in made.weights)
            if not suffixes or name.endswith(suffixes)
        ],
    )


@at(0)
def drop_tensor(rng: random.Random, made: Made) -> None:
    tensors, name = one_tensor(rng, made)
    del tensors[name]


@at(0)
def swap_tensors(rng: random.Random, made: Made) -> None:
    (tensors, one), (others, two) = one_tensor(rng, made), one_tensor(rng, made)
    tensors[one], others[two] = others[two], tensors[one]


@at(0)
def rename_tensor(rng: random.Random, made: Made) -> None:
    tensors, name = one_tensor(rng, made)
    tensors[rng.choice([f"{name}.", name[:-1], f"x{name}", f".{name}", f"{name}.absmax", "é"])] = tensors.pop(name)


@at(0)
def move_tensor_to_another_file(rng: random.Random, made: Made) -> None:
    tensors, name = one_tensor(rng, made)
    pick(rng, [other for other in made.tensors.values() if other is not tensors])[name] = tensors.pop(name)


@at(0)
def tensor_too_many(rng: random.Random, made: Made) -> None:
    tensors, name = one_tensor(rng, made)
    tensors[f"{name}.more"] = torch.ones(2)


@at(0)
def second_payload(rng: random.Random, made: Made) -> None:
    tensors, name = one_tensor(rng, made, "4")
    tensors[name + rng.choice(["x", ".", "4"])] = tensors[name]


@at(0)
def another_dtype(rng: random.Random, made: Made) -> None:
    tensors, name = one_tensor(rng, made, ".absmax", "_map", "4")
    same = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensors[name] = tensors[name].view(same[tensors[name].element_size()])


@at(0)
def another_shape(rng: random.Random, made: Made) -> None:
    tensors, name = one_tensor(rng, made)
    size = tensors[name].numel()
    tensors[name] = tensors[name].reshape(rng.choice([(1, size, 1), (1,) * 30 + (size,), (size, 1, 1)]))


@at(0)
def another_length(rng: random.Random, made: Made) -> None:
    tensors, name = one_tensor(rng, made)
    if not len(tensors[name]):
        raise Inapplicable
    tensors[name] = tensors[name].repeat_interleave(2, 0) if rng.random() < 0.5 else tensors[name][1:].clone()


def set_scale(rng: random.Random, made: Made, value: float) -> None:
    tensors, name = one_tensor(rng, made, "absmax")
    if tensors[name].dtype != torch.float32 or not len(tensors[name]):
        raise Inapplicable
    tensors[name] = tensors[name].clone()
    tensors[name][rng.randrange(len(tensors[name]))] = value


@at(0)
def scale_nan(rng: random.Random, made: Made) -> None:
    set_scale(rng, made, float("nan"))


@at(0)
def scale_infinite(rng: random.Random, made: Made) -> None:
    set_scale(rng, made, float("inf"))


@at(0)
def scale_negative(rng: random.Random, made: Made) -> None:
    set_scale(rng, made, -1e-3)


@at(0)
def quant_map(rng: random.Random, made: Made) -> None:
    tensors, name = one_tensor(rng, made, "_map")
    if not tensors[name].is_floating_point():
        raise Inapplicable
    tensors[name] = tensors[name].flatten().clone()
    tensors[name][rng.randrange(len(tensors[name]))] = rng.choice([2.0, float("nan"), float("inf"), 1e-40])


@at(0)
def scale_huge(rng: random.Random, made: Made) -> None:
    """Second-level scales and an offset that are finite each; the scales that they decode to are not."""
    tensors, name = one_tensor(rng, made, ".nested_absmax")
    prefix = name.removesuffix(".nested_absmax") + PAYLOAD
    payloads = [(others, other) for others in made.tensors.values() for other in others if other.startswith(prefix)]
    others, payload = pick(rng, payloads)
    state = state_of(others[payload])
    if not len(tensors[name]) or tensors[name].dtype != torch.float32:
        raise Inapplicable
    tensors[name] = torch.full_like(tensors[name], 3.4e38)
    others[payload] = as_tensor(json.dumps(state | {"nested_offset": 3.4e38}).encode())


def state_of(payload: Tensor) -> dict[str, Any]:
    """The content of a payload that is not spoiled yet."""
    try:
        state = json.loads(bytes(payload.tolist()))
    except (ValueError, TypeError, RecursionError):
        raise Inapplicable from None
    if not isinstance(state, dict):
        raise Inapplicable
    return state


def as_tensor(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def payload_field(field: str, values: list[Any]) -> Mutation:
    def change(rng: random.Random, made: Made) -> None:
        tensors, name = one_tensor(rng, made, "4")
        state = state_of(tensors[name])
        if field not in state:
            raise Inapplicable
        before = state.pop(field)
        if rng.random() < 0.8:
            state[field] = rng.choice([value for value in values if value != before])
        tensors[name] = as_tensor(json.dumps(state).encode())

    change.__name__ = f"payload_{field}"
    return change


for each in FIELDS:
    at(0)(payload_field(each, SIZES if each == "shape" else NUMBERS + OTHERS))


@at(0)
def payload_text(rng: random.Random, made: Made) -> None:
    tensors, name = one_tensor(rng, made, "4")
    text = json.dumps(state_of(tensors[name])).encode()
    depth = rng.choice([10, rng.randint(800, 1100), 20_000])
    spoiled = rng.choice([
        b"", b"\0", b"null", b"NaN", b"[]", b'"nf4"', b"\xff" + text, text[:-1], text + b"\0", text + text,
        b"[" * depth, b"[" * depth + b"]" * depth, text.replace(b'"shape": ', b'"shape": ' + b"[" * depth),
        text.replace(b"[", b'[{"a":' * depth).replace(b"]", b"}]" * depth), text.replace(b"64", b"1" * 5000), text[1:],
    ])  # fmt: skip
    if spoiled == text:
        raise Inapplicable
    tensors[name] = as_tensor(spoiled)


def one_entry(rng: random.Random, made: Made) -> tuple[list[tuple[str, Any]], int]:
    """The pairs of some header, and the place of a whole entry in it."""
    return pick(
        rng,
        [
            (pairs, i)
            for pairs in made.headers.values()
            for i, (name, entry) in enumerate(pairs)
            if name != "__metadata__" and isinstance(entry, dict) and len(entry) == 3
        ],
    )


def header_field(field: str, values: list[Any]) -> Mutation:
    def change(rng: random.Random, made: Made) -> None:
        pairs, i = one_entry(rng, made)
        name, entry = pairs[i]
        kept = {key: value for key, value in entry.items() if key != field}
        pairs[i] = name, kept if rng.random() < 0.1 else kept | {field: rng.choice(values)}

    change.__name__ = f"header_{field}"
    return change


SPANS = [[-4, 0], [0, 2**40], [2**62, 2**62 + 4], [0, 2**63], [4, 0], [0], [0, 4, 8], [0.0, 4.0], ["0", "4"]]
at(1)(header_field("dtype", [*OTHERS, *NUMBERS, "F6_E2M3", "F4", "BOOL", "C64", "f32", ["F32"]]))
at(1)(header_field("shape", SIZES))
at(1)(header_field("data_offsets", [*OTHERS, *NUMBERS, *SPANS]))


@at(1)
def header_entry(rng: random.Random, made: Made) -> None:
    pairs, i = one_entry(rng, made)
    pairs[i] = pairs[i][0], rng.choice(NUMBERS + OTHERS)


@at(1)
def header_metadata(rng: random.Random, made: Made) -> None:
    pairs = pick(rng, made.headers.values())
    pairs[0] = "__metadata__", rng.choice([[], "pt", 1, {"format": 1}, {"format": None}, {"a": {}}])


def whole_spans(made: Made) -> dict[str, list[list[int]]]:
    """The offsets of each file that are not spoiled yet, to be changed in place."""
    return {
        file: [
            entry["data_offsets"]
            for name, entry in pairs
            if name != "__metadata__" and isinstance(entry, dict) and entry.get("data_offsets") not in SPANS
            if isinstance(entry.get("data_offsets"), list) and len(entry["data_offsets"]) == 2
        ]
        for file, pairs in made.headers.items()
    }


@at(1)
def header_overlap(rng: random.Random, made: Made) -> None:
    span = pick(rng, [span for spans in whole_spans(made).values() for span in spans if 0 < span[0] < span[1]])
    span[:] = span[0] - 1, span[1] - 1


@at(1)
def header_hole(rng: random.Random, made: Made) -> None:
    """All tensors behind one begin a few bytes later, and the data is as much longer."""
    gap, (file, spans) = rng.randint(1, 64), pick(rng, whole_spans(made).items())
    start = pick(rng, [span[0] for span in spans])
    for span in spans:
        span[:] = [offset + gap if span[0] >= start else offset for offset in span]
    made.data[file] = made.data[file][:start] + bytes(gap) + made.data[file][start:]


@at(1)
def header_name_twice(rng: random.Random, made: Made) -> None:
    pairs, i = one_entry(rng, made)
    pairs.append(pairs[i])


@at(1)
def header_name(rng: random.Random, made: Made) -> None:
    pairs, i = one_entry(rng, made)
    other = rng.choice(["", ".", "w.", "\0", "\ud800", "w.quant_state.bitsandbytes__nf4", ".quant_state.x", "é" * 50])
    pairs[i] = other, pairs[i][1]


def index_of(made: Made) -> dict[str, Any]:
    if made.index is None or not isinstance(made.index.get("weight_map"), dict):
        raise Inapplicable
    return made.index


@at(1)
def index_weight_map(rng: random.Random, made: Made) -> None:
    index = index_of(made)
    del index["weight_map"]
    if rng.random() < 0.8:
        index["weight_map"] = rng.choice([value for value in NUMBERS + OTHERS if value != {"a": []}] + [{"w": []}])


@at(1)
def index_metadata(rng: random.Random, made: Made) -> None:
    index_of(made)["metadata"] = rng.choice([None, [], 1, "", True])


@at(1)
def index_shard(rng: random.Random, made: Made) -> None:
    where = index_of(made)["weight_map"]
    where[pick(rng, where)] = rng.choice(SHARDS)


@at(1)
def index_name_lost(rng: random.Random, made: Made) -> None:
    where = index_of(made)["weight_map"]
    del where[pick(rng, where)]


@at(1)
def index_name_too_many(rng: random.Random, made: Made) -> None:
    where = index_of(made)["weight_map"]
    where[rng.choice(["", "x", "é", "\ud800", "w.more"])] = pick(rng, where.values())


@at(1)
def index_wrong_shard(rng: random.Random, made: Made) -> None:
    where = index_of(made)["weight_map"]
    name = pick(rng, where)
    where[name] = pick(rng, [file for file in made.headers if file != where[name]])


@at(1)
def index_all_outside(rng: random.Random, made: Made) -> None:
    """Both shards lie beside the directory, whole, and the index says so."""
    where = index_of(made)["weight_map"]
    for name, file in where.items():
        where[name] = f"../{file}"

    def move(directory: Path) -> None:
        for file in directory.glob("*.safetensors"):
            file.rename(directory.parent / file.name)

    made.to_disk.append(move)


def change_bytes(rng: random.Random, made: Made, change: Callable[[bytearray], Any], only: str = "") -> None:
    file = pick(rng, [file for file, content in made.files.items() if file.endswith(only) and len(content) > 16])
    content = bytearray(made.files[file])
    change(content)
    made.files[file] = bytes(content)


@at(2)
def truncate(rng: random.Random, made: Made) -> None:
    def change(content: bytearray) -> None:
        del content[rng.choice([rng.randrange(len(content)), rng.randrange(20), len(content) - 1]) :]

    change_bytes(rng, made, change)


@at(2)
def extend(rng: random.Random, made: Made) -> None:
    change_bytes(rng, made, lambda content: content.extend(rng.randbytes(rng.choice([1, 8, 1000]))))


@at(2)
def flip_bytes(rng: random.Random, made: Made) -> None:
    def change(content: bytearray) -> None:
        for _ in range(rng.choice([1, 2, 8, 64])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)

    change_bytes(rng, made, change)


@at(2)
def flip_bytes_of_the_header(rng: random.Random, made: Made) -> None:
    def change(content: bytearray) -> None:
        end = min(8 + int.from_bytes(content[:8], "little"), len(content))
        if end == 8:
            raise Inapplicable
        for _ in range(rng.choice([1, 2, 8])):
            content[rng.randrange(8, end)] = rng.randrange(256)

    change_bytes(rng, made, change, ".safetensors")


@at(2)
def overwrite(rng: random.Random, made: Made) -> None:
    def change(content: bytearray) -> None:
        start = rng.randrange(len(content))
        length = min(rng.choice([4, 64, 1024]), len(content) - start)
        content[start : start + length] = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])

    change_bytes(rng, made, change)


@at(2)
def shift(rng: random.Random, made: Made) -> None:
    def change(content: bytearray) -> None:
        start, length = rng.randrange(len(content)), rng.randint(1, 16)
        content[start : start + rng.choice([0, length])] = rng.randbytes(rng.choice([0, length]))

    change_bytes(rng, made, change)


@at(2)
def header_length(rng: random.Random, made: Made) -> None:
    def change(content: bytearray) -> None:
        true = int.from_bytes(content[:8], "little")
        lies = [0, 1, true - 1, true + 1, true + 8, len(content), 10**8, 10**8 + 1, 2**31, 2**60, 2**63, 2**64 - 1]
        content[:8] = struct.pack("<Q", rng.choice(lies))

    change_bytes(rng, made, change, ".safetensors")


@at(2)
def deep_json(rng: random.Random, made: Made) -> None:
    depth = rng.choice([100, rng.randint(800, 1100), 20_000])
    text = b'{"weight_map": ' + b"[" * depth + b"]" * rng.choice([0, depth]) + b"}"
    file = pick(rng, made.files)
    made.files[file] = text if file == INDEX_FILE else struct.pack("<Q", len(text)) + text


@at(2)
def noise(rng: random.Random, made: Made) -> None:
    made.files[pick(rng, made.files)] = rng.randbytes(rng.choice([1, 8, 100, 5000]))


def replace_file(rng: random.Random, made: Made, make: Callable[[Path], Any]) -> None:
    file = pick(rng, made.files)

    def change(directory: Path) -> None:
        path = directory / file
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        make(path)

    made.to_disk.append(change)


@at(3)
def empty_file(rng: random.Random, made: Made) -> None:
    replace_file(rng, made, Path.touch)


@at(3)
def directory_for_a_file(rng: random.Random, made: Made) -> None:
    replace_file(rng, made, Path.mkdir)


@at(3)
def fifo_for_a_file(rng: random.Random, made: Made) -> None:
    replace_file(rng, made, os.mkfifo)


@at(3)
def link_to_itself(rng: random.Random, made: Made) -> None:
    replace_file(rng, made, lambda path: path.symlink_to(path.name))


@at(3)
def missing_file(rng: random.Random, made: Made) -> None:
    replace_file(rng, made, lambda path: None)


@at(3)
def pickle_for_a_file(rng: random.Random, made: Made) -> None:
    replace_file(rng, made, lambda path: path.with_suffix(".bin").touch())
