"""Tokens a second of an answer: the dense model of transformers, and the same with its linear layers in 4 bits.

    python -m benchmarks.generate               measure, write benchmarks/records/generate-CLASS.json, show it
    python -m benchmarks.generate --device cuda     on a GPU: benchmarks/records/gpu-generate-<device>.json
    python -m benchmarks.generate --view        show every class of processors again; --view avx2: one of them

One prompt, 64 new tokens by ``model.generate``, the likeliest each time; the prompt is part of the time. Every linear
layer but the output head is in 4 bits; attention, norms and the head are the same code in all. The dense model is there
in bfloat16 and in float32, the quantized one in the dtype that the processor multiplies in hardware
(``nf4/processor.py``), as ``qloralab generate`` has it. The models take turns in one process. Before, the quantized
model has to give the logits of the plain PyTorch reference, on the CPU, within what the roundings of its dtype make.
"""

from __future__ import annotations

import qloralab  # noqa: F401  # isort: skip  # before torch: how OpenMP's threads wait is read when torch is loaded

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qloralab.checkpoint.models import default_model, load_model, load_tokenizer, quantize_loaded_
from qloralab.kernels import dispatch
from qloralab.kernels.gpu import choice
from qloralab.kernels.report import implementations
from qloralab.nf4.processor import compute_dtype, processor_class

from .case import WrongResultError, within
from .clock import host, interleave, quantiles
from .record import (
    gpu_provenance,
    gpu_record_file,
    lower_mkl,
    parse,
    provenance,
    record_file,
    record_files,
    write,
)
from .view import show

PROMPT = "Explain in three sentences why the sky is blue."
NEW_TOKENS = 64
REPETITIONS = 5
GOAL = 1.5  # the quantized model's rate over the faster dense one's
# Of the logits: 30 layers of bfloat16 activations, rounded in another order. Steps of float32 are 2**-16 of those;
# there it is sums that are rounded, one of n products about sqrt(n / 2) times (case.py), 28 for 1536.
TOLERANCES = {torch.bfloat16: 2**-4, torch.float32: 2**-15}
DENSE = ("bf16", "f32")
PROVIDERS = (*DENSE, "ours")


def check(model: Any, prompt: torch.Tensor) -> float:
    """Compare the logits after a prompt with those of the reference in plain PyTorch.

    Args:
        model: quantized.
        prompt: int64 [1, tokens].

    Returns:
        root-mean-square difference over the root mean square of the reference's logits.

    Raises:
        WrongResultError: it is too large.
    """
    there = model if prompt.device.type == "cpu" else copy.deepcopy(model).cpu()
    with torch.no_grad():
        logits = model(prompt).logits.cpu()
        with dispatch.use("reference"):
            expected = there(prompt.cpu()).logits
    try:
        return within(logits, expected, TOLERANCES[logits.dtype])
    except WrongResultError as error:
        raise WrongResultError(f"the logits differ from the reference's: {error}") from None


def measure(models: Mapping[str, Any], prompt: torch.Tensor, new_tokens: int = NEW_TOKENS) -> list[dict]:
    """Time each model on the same prompt.

    Args:
        models: by provider, one of PROVIDERS.
        prompt: int64 [1, tokens], on the device of the models.
        new_tokens: of each answer; the end-of-text token does not end it.

    Returns:
        a record for each model.

    Raises:
        WrongResultError: see ``check``; nothing is timed then.
    """
    device = prompt.device
    served = {row["operator"]: row["implementation"] for row in implementations(device.type)}
    checked = {"ours": {"error": check(models["ours"], prompt), "implementation": served["linear"]}}
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    answer = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **options}
    with torch.no_grad():
        timers = {name: host([partial(_answered, model, **answer)], warm_up=0) for name, model in models.items()}
        times = interleave(timers, seconds=0.0, fewest=REPETITIONS)
    return [
        {
            "benchmark": "generate",
            "provider": name,
            "dtype": str(next(models[name].parameters()).dtype).removeprefix("torch."),
            "prompt_tokens": prompt.shape[1],
            "new_tokens": new_tokens,
            "ms": quantiles(mine),
            "reps": len(mine),
            "tokens_per_s": 1000 * new_tokens / quantiles(mine)["p50"],
            **checked.get(name, {}),
            **_provenance(device),
        }
        for name, mine in times.items()
    ]


def _provenance(device: torch.device) -> dict[str, Any]:
    """The fields that say where the figure is from; the class of a GPU is its architecture."""
    if device.type == "cpu":
        return provenance()
    of_gpu = gpu_provenance("generate", torch.cuda.get_device_name(device))
    return {**of_gpu, "class": choice.device(device).architecture}


def _answered(model: Any, **answer: Any) -> torch.Tensor:
    """The answer, once the device has it."""
    tokens = model.generate(**answer)
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)
    return tokens


def line(records: Sequence[Mapping[str, Any]]) -> str:
    """The records in one line."""
    rate = {record["provider"]: record["tokens_per_s"] for record in records}
    dense = {name: rate[name] for name in DENSE if name in rate}
    ratio = rate["ours"] / max(dense.values())
    others = ", ".join(f"{value:.1f} with {name} weights" for name, value in dense.items())
    goal = f"; goal {GOAL:g}: {'reached' if ratio >= GOAL else 'missed'}"
    return (
        f"{records[0]['class']}: {records[0]['device']}: {rate['ours']:.1f} tokens/s in 4 bits, {others}, "
        f"ratio {ratio:.2f}{'' if records[0]['class'].startswith('sm_') else goal}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model, measure, write the records, show them."""
    parser = argparse.ArgumentParser(description="Generation with the weights in 4 bits and dense.")
    parser.add_argument("--view", nargs="?", const="all", metavar="CLASS", help="show the records, measure nothing")
    parser.add_argument("--model", type=Path, help="Hugging Face directory or GGUF file; by default SmolLM2-135M")
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS, help="of each answer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that answers")
    args = parse(parser, arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU was measured: torch.cuda.is_available() is False")
        return
    device = torch.device(args.device)
    if not args.view:
        lower_mkl()
        path = args.model or default_model()
        tokenizer = load_tokenizer(path)
        model = load_model(path)  # a GGUF file takes a while to read: once, then copied
        quantized = quantize_loaded_(copy.deepcopy(model), compute_dtype(device).dtype)
        models = {"bf16": model, "f32": copy.deepcopy(model).float(), "ours": quantized}
        prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]], device=device)
        records = measure({name: one.to(device) for name, one in models.items()}, prompt, args.tokens)
        if device.type == "cuda":
            write(records, gpu_record_file(args.out, f"generate {records[0]['device']}"))
            show([], lines=[line(records)])
            return
        write(records, record_file(args.out, "generate"))
    files = record_files(args.out, "generate", args.view or processor_class())
    show([], lines=[line(json.loads(file.read_text())) for file in files])


if __name__ == "__main__":
    main()
