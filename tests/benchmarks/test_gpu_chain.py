"""The chain of seven products: who multiplies what, what is refused, what is recorded; on the processor."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig

from qloralab.benchmarks import gpu
from qloralab.benchmarks.case import WrongResultError
from qloralab.benchmarks.clock import host
from qloralab.benchmarks.gpu_chain import INPUTS, PROVIDERS, ROWS, Chain, check, linears, make_weights, measure, tables
from qloralab.benchmarks.gpu_compare import compare
from qloralab.benchmarks.gpu_device import Device, Limits
from qloralab.benchmarks.gpu_views import tables as all_tables
from qloralab.benchmarks.provider import Provider
from qloralab.benchmarks.record import gpu_record_file
from qloralab.benchmarks.work import packed_bytes

SHAPES = {  # grouped heads; a hidden size that is not the heads'
    "q": (192, 128), "k": (64, 128), "v": (64, 128), "o": (128, 192), "gate": (320, 128), "up": (320, 128),
    "down": (128, 320),
}  # fmt: skip
LIMITS = Limits(copy_gb_per_s=10.0, gemm_tflop_per_s=0.1, read_gb_per_s=20.0)
COMMON = {"benchmark": "gpu", "device": "a GPU", "commit": "abc"}
PACKED = sum(packed_bytes(N * K) for N, K in SHAPES.values())
DENSE = 2 * sum(N * K for N, K in SHAPES.values())
LATER = float("inf")


def device(free: int = 2**34, prepare: Any = host) -> Device:
    return Device(torch.device("cpu"), "A GPU (80 GB)", 2**15, prepare, lambda: free)


def chain(M: int = 5) -> Chain:
    weights = make_weights(device(), SHAPES, M)
    return Chain("chain", weights["q"], M, linears=weights)


def provider(name: str) -> Provider:
    return next(one for one in PROVIDERS if one.name == name)


def results(name: str, of: Chain) -> dict[str, torch.Tensor]:
    runs: Any = provider(name).runs(of)
    return runs[0]()


def measured(there: Device | None = None, deadline: float = LATER, **options: Any) -> list[dict[str, Any]]:
    options = {"shapes": SHAPES, "rows": (1, 3), "providers": PROVIDERS[:2], "seconds": 0.0, **options}
    return [one for point in measure(there or device(), COMMON, LIMITS, deadline, **options) for one in point]


@pytest.mark.parametrize("name", [one.name for one in PROVIDERS])
@pytest.mark.parametrize("M", [1, 5, 16])
def test_each_product_has_the_input_that_a_decoder_layer_gives_it(name, M):
    of = chain(M)
    found = results(name, of)
    W = {one: weight.dequantized().double() for one, weight in of.linears.items()}
    x = of.x.double()
    q, o = x @ W["q"].T, x @ W["q"].T @ W["o"].T
    gate = o @ W["gate"].T
    expected = {
        "q": q, "k": x @ W["k"].T, "v": x @ W["v"].T, "o": o, "gate": gate, "up": o @ W["up"].T,
        "down": gate @ W["down"].T,
    }  # fmt: skip
    for one, y in expected.items():
        torch.testing.assert_close(found[one].double(), y, rtol=0, atol=0.04 * float(y.abs().max()))
    assert 0 < check(of, provider(name), found) <= provider(name).tolerance


def test_no_two_weights_are_alike_and_the_copies_are_apart():
    of = chain()
    for one, other in (("k", "v"), ("gate", "up")):
        assert not torch.equal(of.linears[one].exact, of.linears[other].exact)
    runs: Any = provider("bf16").runs(of)
    assert torch.equal(runs[0]()["down"], runs[1]()["down"])
    pointers = {weight.data_ptr() for one in of.linears.values() for weight in one.form(0, one.dequantized, 2)}
    assert len(pointers) == 2 * len(SHAPES)


@pytest.mark.parametrize("name", INPUTS)
def test_one_product_that_is_off_is_wrong_by_its_name(name):
    of = chain()
    found = results("bf16", of)
    for y, why in (
        (found[name] * 1.01, "error"),
        (found[name].float(), "torch.float32"),
        (found[name][:-1], r"\[4, "),
        (found[name] * float("nan"), "error nan"),
    ):
        with pytest.raises(WrongResultError, match=f"^{name}: .*{why}"):
            check(of, provider("bf16"), {**found, name: y})


def test_errors_do_not_add_up_along_the_chain():
    of = chain()
    values = {"x": of.x}
    for name, source in INPUTS.items():
        values[name] = (1.015 * (values[source].double() @ of.linears[name].dequantized().double().T)).bfloat16()
    assert 0.0145 < check(of, provider("bitsandbytes"), values) < 0.0155  # of "down", 1.015 ** 4 beside the chain's
    with pytest.raises(WrongResultError, match=r"^o: "):  # its input is not the one that is there
        check(of, provider("bitsandbytes"), {**values, "q": values["q"] / 1.015})


def test_records_of_each_number_of_tokens_captured_and_eager():
    asked = []

    def prepare(runs, graph):
        asked.append(graph)
        return host(runs)

    records = measured(device(prepare=prepare))
    operations, names = ("chain", "chain, eager"), ("ours", "bf16")
    expected = [(operation, M, name, "ok") for M in (1, 3) for operation in operations for name in names]
    assert [(r["operation"], r["M"], r["provider"], r["status"]) for r in records] == expected
    assert asked == [True, True, False, False] * 2
    assert {(r["kind"], *r["shape"]) for r in records} == {("chain", 192, 128, 64, 320)}
    assert [r["weight_bytes"] for r in records[:2]] == [PACKED, DENSE]
    for record in records:
        flops = 2 * record["M"] * DENSE / 2
        assert record["bound_ms"] == pytest.approx(max(1e-6 * record["weight_bytes"] / 20.0, 1e-9 * flops / 0.1))
        assert record["copies"] == 2


def test_one_that_is_wrong_or_fails_is_a_record_and_the_rest_goes_on():
    def raises(case):
        raise RuntimeError("no kernel image")

    def off(case):
        runs: Any = provider("bf16").runs(case)
        return [lambda: {**(found := runs[0]()), "up": found["up"] * 2}]

    some = [Provider("raises", raises), Provider("off", off), Provider("absent", raises, package="nobody_has_this")]
    found = {r["provider"]: (r["status"], r["why"]) for r in measured(providers=[*some, provider("ours")], rows=(1,))}
    assert found == {
        "raises": ("failed", "RuntimeError: no kernel image"), "off": ("wrong", "up: error 1, 0.002 allowed"),
        "absent": ("missing", "nobody_has_this is not installed"), "ours": ("ok", None),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("there", "deadline", "why"),
    [
        (device(), 0.0, "the time was up"),
        (device(free=10**6), LATER, "MemoryError: the chain needs 0.0 GB, 0.0 are free"),
    ],
)
def test_what_has_no_time_or_memory_is_skipped(there, deadline, why):
    assert {(r["status"], r["why"], r["ms"]) for r in measured(there, deadline)} == {("skipped", why, None)}


def test_after_the_device_was_lost_the_rest_is_skipped(monkeypatch):
    said = iter([None, "the device was lost"])
    monkeypatch.setattr(Device, "lost", lambda self: next(said))
    records = measured(rows=(1,))
    assert [r["status"] for r in records] == ["ok", "ok", "skipped", "skipped"]
    assert records[-1]["why"] == "the device was lost"


def record(name: str, operation: str, ms: float | None, nbytes: int, **fields: Any) -> dict[str, Any]:
    return {
        **COMMON, "kind": "chain", "operation": operation, "shape": [4096, 1024, 14336], "M": 1, "provider": name,
        "ms": ms and {"p50": ms}, "status": "ok" if ms else "failed", "timing": "graph", "weight_bytes": nbytes,
        "roofline": {"copy_gb_per_s": 2000.0, "read_gb_per_s": 3000.0}, **fields,
    }  # fmt: skip


RECORDS = [
    record("ours", "chain", 0.05, 112_500_000),
    record("bf16", "chain", 0.2, 450_000_000),
    record("bitsandbytes", "chain", 0.1, 112_500_000, timing="events"),
    record("ours", "chain, eager", 0.125, 112_500_000),
    record("bitsandbytes", "chain, eager", None, 112_500_000),
]


def test_a_row_has_the_rate_its_share_of_reading_and_the_eager_time(lines):
    rows = [
        ["ours", "1", "50.0", "4.00", "112.5", "2,250", "75%", "125.0"],
        ["bf16", "1", "200.0", "1.00", "450.0", "2,250", "75%", ""],
        ["bitsandbytes", "1", "100.0 e", "2.00", "112.5", "1,125", "38%", "failed"],
    ]
    assert lines(*tables(RECORDS)) == rows
    (table,) = all_tables([*RECORDS, {"kind": "state", "when": "after"}])  # without points: this table alone
    assert lines(table) == rows
    failed = [record("ours", "chain", None, 112_500_000)]
    assert lines(*tables(failed)) == [["ours", "1", "failed", "", "112.5", "", "", ""]]
    assert lines(*tables([{**RECORDS[0], "roofline": None}]))[0][5:] == ["2,250", "", ""]
    assert list(tables([])) == []


def test_a_chain_that_became_slower_is_seen():
    slower = [{**one, "ms": one["ms"] and {"p50": 1.1 * one["ms"]["p50"]}} for one in RECORDS]
    assert [compare(RECORDS, after, 0.03)[1] for after in (RECORDS, slower)] == [0, 4]


SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


def test_the_linears_of_a_model_or_that_it_has_none(tmp_path):
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=1, head_dim=32)
    config.save_pretrained(tmp_path / "llama")
    found = linears(tmp_path / "llama" / "config.json")
    assert list(found.items()) == [
        ("q", (128, 64)), ("k", (32, 64)), ("v", (32, 64)), ("o", (64, 128)),
        ("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96)),
    ]  # fmt: skip
    GPTNeoXConfig(**SIZES, num_attention_heads=4).save_pretrained(tmp_path / "neox")
    assert linears(tmp_path / "neox" / "config.json") == {}


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ([], ROWS),
        (["--only", "chain"], ROWS),
        (["--only", "linear"], None),
        (["--rows", "2", "7"], [2, 7]),
        (["--model", "{config}"], ROWS),
        (["--model", "{config}", "--only", "chain", "--rows", "4"], [4]),
        (["--model", "{other}"], None),
    ],
)
def test_the_command_runs_the_chain_that_is_asked_for(arguments, rows, monkeypatch, tmp_path, capsys):
    LlamaConfig(**SIZES, num_attention_heads=4).save_pretrained(tmp_path / "llama")
    GPTNeoXConfig(**SIZES, num_attention_heads=4).save_pretrained(tmp_path / "neox")
    files = {"config": tmp_path / "llama" / "config.json", "other": tmp_path / "neox" / "config.json"}
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "cuda_device", device)
    monkeypatch.setattr(gpu, "run", lambda *given, **options: asked.append(options) or [])
    gpu.main([argument.format(**files) for argument in arguments] + ["--out", str(tmp_path)])
    found = asked[0].get("chain")
    assert (found and found["rows"]) == rows
    if found:
        assert (found["shapes"] or {}).get("down") == ((64, 96) if "--model" in arguments else None)
        assert asked[0]["measure"]["points"] or "chain" in arguments
    assert ("no chain: no layer of" in capsys.readouterr().err) == ("{other}" in arguments)


def test_a_run_of_the_chain_alone_has_ceilings_and_a_table(tmp_path, capsys):
    path = gpu_record_file(tmp_path, "A GPU (80 GB)")
    records = gpu.run(
        device(), path, time.monotonic() + 600, [], ceilings={"nbytes": 2**16, "shape": (8, 64, 64), "seconds": 0.0},
        measure={"points": []}, chain={"shapes": SHAPES, "rows": (1,), "providers": PROVIDERS[:2], "seconds": 0.0},
    )  # fmt: skip
    assert [r["kind"] for r in records] == ["state", *["chain"] * 4, "state"]
    assert all(r["roofline"]["read_gb_per_s"] > 0 for r in records[1:5])
    gpu.main(["--view", str(path)])
    assert "q, k, v, o, gate, up, down in a chain, of widths 192, 128, 64, 320" in capsys.readouterr().out
