"""Small checkpoints from a seed, and the ways in which they are spoiled.

A checkpoint is spoiled while it is made, at one of the stages through which it goes: its tensors, the header of a file,
the index, the bytes of a file, the files on the disk. So a mutation changes one thing, leaves the rest valid, and gets
past the checks of the stages before. ``MUTATIONS`` has them by name, ``STAGES`` their stages; each is a function of a
random generator and the checkpoint, and raises ``Inapplicable`` where the checkpoint has nothing of the kind. What has
one form alone (two tensors that overlap, a name twice, a checkpoint without an index) is in the tables of the tests of
each reader; here is what takes random values.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterable
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
    """A checkpoint on its way to the disk: ``tensors`` by file and name; then ``headers`` (pairs of a name and an
    entry) and ``data`` of each file; then ``files`` (bytes); then what happens ``to_disk`` when all is written."""

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
    """Write a checkpoint from a seed, spoiled by some mutations; those that were done.

    The first is done in any case: checkpoints that it does not apply to are passed over.
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


Random = random.Random
Mutation = Callable[[Random, Made], Any]


def pick(rng: Random, found: Iterable[Any]) -> Any:
    """One of some things."""
    things = list(found)
    if not things:
        raise Inapplicable
    return rng.choice(things)


def of_weights(made: Made, *suffixes: str) -> list[tuple[dict[str, Tensor], str]]:
    """The tensors of 4-bit weights (with a name that ends so), as the dictionary each is in and its name there."""
    return [
        (tensors, name)
        for tensors in made.tensors.values()
        for name in tensors
        if any(name == weight or name.startswith(f"{weight}.") for weight in made.weights)
        if not suffixes or name.endswith(suffixes)
    ]


def tensor(change: Callable[[Random, dict[str, Tensor], str], Any], *suffixes: str) -> Mutation:
    """Change one tensor of a 4-bit weight, by its dictionary and its name."""
    return lambda rng, made: change(rng, *pick(rng, of_weights(made, *suffixes)))


def values(change: Callable[[Random, Tensor], Tensor], *suffixes: str) -> Mutation:
    """Put another tensor in the stead of one that has elements."""

    def apply(rng: Random, tensors: dict[str, Tensor], name: str) -> None:
        if not tensors[name].numel():
            raise Inapplicable
        tensors[name] = change(rng, tensors[name].clone())

    return tensor(apply, *suffixes)


def one_float(choices: list[float]) -> Callable[[Random, Tensor], Tensor]:
    """Another value for one element of a tensor of float32."""

    def change(rng: Random, old: Tensor) -> Tensor:
        if old.dtype != torch.float32:
            raise Inapplicable
        old = old.flatten()
        old[rng.randrange(len(old))] = rng.choice(choices)
        return old

    return change


def swap_tensors(rng: Random, made: Made) -> None:
    (tensors, one), (others, two) = pick(rng, of_weights(made)), pick(rng, of_weights(made))
    tensors[one], others[two] = others[two], tensors[one]


def move_tensor_to_another_file(rng: Random, made: Made) -> None:
    tensors, name = pick(rng, of_weights(made))
    pick(rng, [other for other in made.tensors.values() if other is not tensors])[name] = tensors.pop(name)


def rename(rng: Random, tensors: dict[str, Tensor], name: str) -> None:
    tensors[rng.choice([f"{name}.", name[:-1], f"x{name}", f".{name}", f"{name}.absmax", "é"])] = tensors.pop(name)


def another_shape(rng: Random, old: Tensor) -> Tensor:
    size = old.numel()
    return old.reshape(rng.choice([(1, size, 1), (1,) * 30 + (size,), (size, 1, 1)]))


def another_length(rng: Random, old: Tensor) -> Tensor:
    return old.repeat_interleave(2, 0) if rng.random() < 0.5 else old[1:].clone()


def another_dtype(rng: Random, old: Tensor) -> Tensor:
    return old.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[old.element_size()])


def state_of(payload: Tensor) -> dict[str, Any]:
    """The content of a payload that is not spoiled yet."""
    try:
        return dict(json.loads(bytes(payload.tolist())))
    except (ValueError, TypeError, RecursionError):
        raise Inapplicable from None


def as_tensor(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def payload_field(field: str) -> Mutation:
    """Another value for a field of a payload, or none."""
    choices = SIZES if field == "shape" else NUMBERS + OTHERS

    def change(rng: Random, old: Tensor) -> Tensor:
        state = state_of(old)
        if field not in state:
            raise Inapplicable
        before = state.pop(field)
        if rng.random() < 0.8:
            state[field] = rng.choice([value for value in choices if value != before])
        return as_tensor(json.dumps(state).encode())

    return values(change, "4")


def payload_text(rng: Random, old: Tensor) -> Tensor:
    text = json.dumps(state_of(old)).encode()
    depth = rng.choice([10, rng.randint(800, 1100), 20_000])
    spoiled = rng.choice([
        b"", b"\0", b"null", b"NaN", b"[]", b'"nf4"', b"\xff" + text, text[:-1], text + b"\0", text + text,
        b"[" * depth, b"[" * depth + b"]" * depth, text.replace(b'"shape": ', b'"shape": ' + b"[" * depth),
        text.replace(b"[", b'[{"a":' * depth).replace(b"]", b"}]" * depth), text.replace(b"64", b"1" * 5000), text[1:],
    ])  # fmt: skip
    if spoiled == text:
        raise Inapplicable
    return as_tensor(spoiled)


TENSORS: dict[str, Mutation] = {
    "drop_tensor": tensor(lambda rng, tensors, name: tensors.pop(name)),
    "swap_tensors": swap_tensors,
    "rename_tensor": tensor(rename),
    "move_tensor_to_another_file": move_tensor_to_another_file,
    "another_dtype": tensor(lambda rng, t, name: t.update({name: another_dtype(rng, t[name])}), ".absmax", "_map", "4"),
    "another_shape": tensor(lambda rng, t, name: t.update({name: another_shape(rng, t[name])})),
    "another_length": values(another_length),
    "scale": values(one_float([float("nan"), float("inf"), -1e-3]), "absmax"),
    "quant_map": values(one_float([2.0, float("nan"), float("inf"), 1e-40]), "_map"),
    **{f"payload_{field}": payload_field(field) for field in FIELDS},
    "payload_text": values(payload_text, "4"),
}


def entries(made: Made) -> list[tuple[list[tuple[str, Any]], int]]:
    """The whole entries of headers: the pairs of the header, and the index of the entry in them."""
    return [
        (pairs, i)
        for pairs in made.headers.values()
        for i, (name, entry) in enumerate(pairs)
        if name != "__metadata__" and isinstance(entry, dict) and len(entry) == 3
    ]


def entry(change: Callable[[Random, str, dict[str, Any]], tuple[str, Any]]) -> Mutation:
    """Put another pair in the stead of one of a header."""

    def apply(rng: Random, made: Made) -> None:
        pairs, i = pick(rng, entries(made))
        pairs[i] = change(rng, *pairs[i])

    return apply


def header_field(field: str, choices: list[Any]) -> Mutation:
    def change(rng: Random, name: str, old: dict[str, Any]) -> tuple[str, Any]:
        kept = {key: value for key, value in old.items() if key != field}
        return name, kept if rng.random() < 0.1 else kept | {field: rng.choice(choices)}

    return entry(change)


SPANS = [[-4, 0], [0, 2**40], [2**62, 2**62 + 4], [0, 2**63], [4, 0], [0], [0, 4, 8], [0.0, 4.0], ["0", "4"]]
NAMES = ["", ".", "w.", "\0", "\ud800", "w.quant_state.bitsandbytes__nf4", ".quant_state.x", "é" * 50]


def index_shard(rng: Random, made: Made) -> None:
    """Another file for a tensor: one that cannot be, or one that is not its own."""
    where = {} if made.index is None else made.index["weight_map"]
    name = pick(rng, where)
    where[name] = rng.choice(SHARDS + [file for file in made.headers if file != where[name]])


HEADERS: dict[str, Mutation] = {
    "header_dtype": header_field("dtype", [*OTHERS, *NUMBERS, "F6_E2M3", "F4", "BOOL", "C64", "f32", ["F32"]]),
    "header_shape": header_field("shape", SIZES),
    "header_data_offsets": header_field("data_offsets", [*OTHERS, *NUMBERS, *SPANS]),
    "header_entry": entry(lambda rng, name, old: (name, rng.choice(NUMBERS + OTHERS))),
    "header_name": entry(lambda rng, name, old: (rng.choice(NAMES), old)),
    "index_shard": index_shard,
}


def in_bytes(change: Callable[[Random, bytearray], Any], only: str = "") -> Mutation:
    """Change the bytes of a file, in place."""

    def apply(rng: Random, made: Made) -> None:
        file = pick(rng, [file for file, content in made.files.items() if file.endswith(only) and len(content) > 16])
        content = bytearray(made.files[file])
        change(rng, content)
        made.files[file] = bytes(content)

    return apply


def truncate(rng: Random, content: bytearray) -> None:
    del content[rng.choice([rng.randrange(len(content)), rng.randrange(20), len(content) - 1]) :]


def flip_bytes(rng: Random, content: bytearray) -> None:
    for _ in range(rng.choice([1, 2, 8, 64])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def flip_bytes_of_the_header(rng: Random, content: bytearray) -> None:
    end = min(8 + int.from_bytes(content[:8], "little"), len(content))
    if end == 8:
        raise Inapplicable
    for _ in range(rng.choice([1, 2, 8])):
        content[rng.randrange(8, end)] = rng.randrange(256)


def overwrite(rng: Random, content: bytearray) -> None:
    start = rng.randrange(len(content))
    length = min(rng.choice([4, 64, 1024]), len(content) - start)
    content[start : start + length] = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length)])


def header_length(rng: Random, content: bytearray) -> None:
    true = int.from_bytes(content[:8], "little")
    lies = [0, 1, true - 1, true + 1, true + 8, len(content), 10**8, 10**8 + 1, 2**31, 2**60, 2**63, 2**64 - 1]
    content[:8] = struct.pack("<Q", rng.choice(lies))


def deep_json(rng: Random, made: Made) -> None:
    depth = rng.choice([100, rng.randint(800, 1100), 20_000])
    text = b'{"weight_map": ' + b"[" * depth + b"]" * rng.choice([0, depth]) + b"}"
    file = pick(rng, made.files)
    made.files[file] = text if file == INDEX_FILE else struct.pack("<Q", len(text)) + text


def noise(rng: Random, made: Made) -> None:
    made.files[pick(rng, made.files)] = rng.randbytes(rng.choice([1, 8, 100, 5000]))


BYTES: dict[str, Mutation] = {
    "truncate": in_bytes(truncate),
    "extend": in_bytes(lambda rng, content: content.extend(rng.randbytes(rng.choice([1, 8, 1000])))),
    "flip_bytes": in_bytes(flip_bytes),
    "flip_bytes_of_the_header": in_bytes(flip_bytes_of_the_header, ".safetensors"),
    "overwrite": in_bytes(overwrite),
    "header_length": in_bytes(header_length, ".safetensors"),
    "deep_json": deep_json,
    "noise": noise,
}


def another_file(make: Callable[[Path], Any]) -> Mutation:
    """Put something else in the stead of a file."""

    def apply(rng: Random, made: Made) -> None:
        file = pick(rng, made.files)

        def change(directory: Path) -> None:
            path = directory / file
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)
            make(path)

        made.to_disk.append(change)

    return apply


FILES: dict[str, Mutation] = {
    "empty_file": another_file(Path.touch),
    "directory_for_a_file": another_file(Path.mkdir),
    "fifo_for_a_file": another_file(os.mkfifo),
    "link_to_itself": another_file(lambda path: path.symlink_to(path.name)),
    "missing_file": another_file(lambda path: None),
    "pickle_for_a_file": another_file(lambda path: path.with_suffix(".bin").touch()),
}
MUTATIONS: dict[str, Mutation] = TENSORS | HEADERS | BYTES | FILES
STAGES = {name: stage for stage, part in enumerate([TENSORS, HEADERS, BYTES, FILES]) for name in part}
