"""Tokens a second of an answer: the dense model of transformers, and the same with its linear layers in 4 bits.

    python -m benchmarks.generate               measure, write benchmarks/records/generate-CLASS.json, show it
    python -m benchmarks.generate --view        show every class of processors again; --view avx2: one of them

One prompt, 64 new tokens by ``model.generate``, the likeliest each time; the prompt is part of the time. Every linear
layer but the output head is in 4 bits; attention, norms and the head are the same code in all. The dense model is there
in bfloat16 and in float32, the quantized one in the dtype that the processor multiplies in hardware
(``nf4/processor.py``), as ``qloralab generate`` has it. The models take turns in one process. Before, the quantized
model has to give the logits of the plain PyTorch reference, within what the roundings of its dtype make.
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
from qloralab.kernels.report import implementations
from qloralab.nf4.processor import compute_dtype, processor_class

from .case import WrongResultError, within
from .clock import host, interleave, quantiles
from .record import lower_mkl, parse, provenance, record_file, record_files, write
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
    with torch.no_grad():
        logits = model(prompt).logits
        with dispatch.use("reference"):
            expected = model(prompt).logits
    try:
        return within(logits, expected, TOLERANCES[logits.dtype])
    except WrongResultError as error:
        raise WrongResultError(f"the logits differ from the reference's: {error}") from None


def measure(models: Mapping[str, Any], prompt: torch.Tensor, new_tokens: int = NEW_TOKENS) -> list[dict]:
    """Time each model on the same prompt.

    Args:
        models: by provider, one of PROVIDERS.
        prompt: int64 [1, tokens].
        new_tokens: of each answer; the end-of-text token does not end it.

    Returns:
        a record for each model.

    Raises:
        WrongResultError: see ``check``; nothing is timed then.
    """
    served = {row["operator"]: row["implementation"] for row in implementations()}
    checked = {"ours": {"error": check(models["ours"], prompt), "implementation": served["linear"]}}
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    answer = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **options}
    with torch.no_grad():
        timers = {name: host([partial(model.generate, **answer)], warm_up=0) for name, model in models.items()}
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
            **provenance(),
        }
        for name, mine in times.items()
    ]


def line(records: Sequence[Mapping[str, Any]]) -> str:
    """The records in one line."""
    rate = {record["provider"]: record["tokens_per_s"] for record in records}
    dense = {name: rate[name] for name in DENSE if name in rate}
    ratio = rate["ours"] / max(dense.values())
    others = ", ".join(f"{value:.1f} with {name} weights" for name, value in dense.items())
    return (
        f"{records[0]['class']}: {records[0]['device']}: {rate['ours']:.1f} tokens/s in 4 bits, {others}, "
        f"ratio {ratio:.2f}; goal {GOAL:g}: {'reached' if ratio >= GOAL else 'missed'}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model, measure, write the records, show them."""
    parser = argparse.ArgumentParser(description="Generation with the weights in 4 bits and dense.")
    parser.add_argument("--view", nargs="?", const="all", metavar="CLASS", help="show the records, measure nothing")
    parser.add_argument("--model", type=Path, help="Hugging Face directory or GGUF file; by default SmolLM2-135M")
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS, help="of each answer")
    args = parse(parser, arguments)
    if not args.view:
        lower_mkl()
        path = args.model or default_model()
        tokenizer = load_tokenizer(path)
        model = load_model(path)  # a GGUF file takes a while to read: once, then copied
        quantized = quantize_loaded_(copy.deepcopy(model), compute_dtype("cpu").dtype)
        models = {"bf16": model, "f32": copy.deepcopy(model).float(), "ours": quantized}
        prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
        write(measure(models, prompt, args.tokens), record_file(args.out, "generate"))
    files = record_files(args.out, "generate", args.view or processor_class())
    show([], lines=[line(json.loads(file.read_text())) for file in files])


if __name__ == "__main__":
    main()
