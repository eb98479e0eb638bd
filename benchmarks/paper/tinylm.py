"""tinylm: a small language model in float32, trained from nothing, for the tables to quantize.

    make tinylm                                    runs/tinylm, about a quarter of an hour on two processors
    python -m benchmarks.paper.tinylm --size quick --out runs/tinylm-quick

No package ships a causal language model in float32: the weights of SmolLM2's have been through 4 bits once. So this one
is trained here: a Llama of 10.5 million parameters and a byte-level BPE of 4,096 tokens, both on the sources of the
standard library that are not held out (``corpus.py``). The weights are seeded; on one machine, with one number of
threads, they are the same at every training.

The recipe is the usual one of small models: AdamW (betas 0.9 and 0.95, weight decay 0.1), a warm-up of 5 % and a cosine
down to a tenth of the learning rate, gradients clipped to 1, windows of 256 tokens drawn from anywhere in the text.

What it leaves is a Hugging Face directory, and ``tinylm.json`` beside the weights: the settings, and the loss on files
that nothing was trained on, per token and in bits per byte of text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qloralab.checkpoint.models import quiet
from qloralab.display import Display
from qloralab.errors import UserError
from qloralab.train.loss import linear_cross_entropy

from ..record import ROOT, provenance
from .corpus import documents

END = "<|endoftext|>"
RECORD = "tinylm.json"
DIRECTORY = ROOT / "runs" / "tinylm"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained and for how long; the shapes as in ``LlamaConfig``.

    Attributes:
        length: tokens of a window.
        batch: windows of a step.
        held_out: windows that are measured.
        files: how many are read, of those to train on and of those held out; None: all.
    """

    vocabulary: int = 4096
    hidden: int = 320
    intermediate: int = 768
    layers: int = 8
    heads: int = 5
    steps: int = 480
    batch: int = 8
    length: int = 256
    lr: float = 2e-3
    held_out: int = 64
    files: int | None = None
    seed: int = 0


RECIPES = {
    "full": Recipe(),
    "quick": Recipe(
        vocabulary=1024, hidden=128, intermediate=384, layers=4, heads=4, steps=240, lr=4e-3, held_out=16, files=150
    ),
    "tiny": Recipe(
        vocabulary=300, hidden=64, intermediate=128, layers=2, heads=2, steps=8, batch=4, held_out=2, files=8
    ),
}


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of so many tokens, the end of a text among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def stream(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """The texts as one row of tokens, each with its end: int64 [tokens]."""
    ids = tokenizer([text + END for text in texts], verbose=False)["input_ids"]
    return torch.tensor([token for one in ids for token in one])


def loss_of(model: Any, windows: Tensor) -> Tensor:
    """The mean loss of windows int64 [n, length + 1], in nats per token."""
    hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
    targets = windows[:, 1:].flatten()
    return linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets) / len(targets)


@torch.no_grad()
def held_out_loss(model: Any, tokens: Tensor, recipe: Recipe) -> float:
    """The mean loss of windows that lie evenly over the held-out text, in nats per token."""
    model.eval()
    starts = torch.linspace(0, len(tokens) - recipe.length - 1, recipe.held_out).long()
    losses = [float(loss_of(model, tokens[start : start + recipe.length + 1][None])) for start in starts]
    model.train()
    return sum(losses) / len(losses)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Of a step, from 0: up for 5 % of them, then along a cosine to a tenth."""
    warmup = max(1, recipe.steps // 20)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    along = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * along)))


T = TypeVar("T")


def spread(things: Sequence[T], number: int | None) -> Sequence[T]:
    """So many of some things, evenly spread; all of them for None."""
    return things if number is None else things[:: max(1, len(things) // number)][:number]


def make_model(recipe: Recipe, end: int) -> Any:
    """The model before training: a Llama whose head is its embedding, weights drawn from N(0, 0.02)."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config)


def train(recipe: Recipe, display: Display) -> tuple[Any, Any, dict[str, Any]]:
    """Train tokenizer and model.

    Returns:
        the model, the tokenizer, and the record: settings, parameters, tokens, losses in nats per token, bits per byte.
    """
    learned, measured = (spread(documents(held_out), recipe.files) for held_out in (False, True))
    with display.busy("training the tokenizer"):
        tokenizer = train_tokenizer(learned, recipe.vocabulary)
        tokens, unseen = stream(learned, tokenizer), stream(measured, tokenizer)
    end: Any = tokenizer.eos_token_id
    model = make_model(recipe, end)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(recipe.seed)
    before, start, curve = held_out_loss(model, unseen, recipe), time.perf_counter(), []
    with display.busy("training tinylm", "steps") as progress:
        for step in range(recipe.steps):
            starts = torch.randint(len(tokens) - recipe.length, (recipe.batch, 1), generator=generator)
            loss = loss_of(model, tokens[starts + torch.arange(recipe.length + 1)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            curve.append(float(loss.detach()))
            progress(step + 1, recipe.steps)
    after = held_out_loss(model, unseen, recipe)
    nbytes = sum(len(text.encode()) for text in measured)
    record = {
        "recipe": dataclasses.asdict(recipe),
        "parameters": model.num_parameters(),
        "text_tokens": len(tokens),
        "trained_tokens": recipe.steps * recipe.batch * recipe.length,
        "seconds": time.perf_counter() - start,
        "held_out_tokens": recipe.held_out * recipe.length,
        "loss_before": before,
        "loss_after": after,
        "perplexity": math.exp(after),
        "bits_per_byte": after / math.log(2) * len(unseen) / nbytes,
        "loss": curve,
        **provenance(),
    }
    return model.eval(), tokenizer, record


def make(out: Path, recipe: Recipe, display: Display) -> dict[str, Any]:
    """Train, and write the directory; returns the record.

    Raises:
        UserError: the directory is there already.
    """
    if out.exists():
        raise UserError(f"{out} exists; remove it to train again, or give --out a new name")
    model, tokenizer, record = train(recipe, display)
    part = out.with_name(out.name + ".part")
    with quiet():
        model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for weights in part.glob("*.safetensors"):  # which transformers writes for this user alone
        weights.chmod((part / "config.json").stat().st_mode)
    (part / RECORD).write_text(json.dumps(record) + "\n")
    part.rename(out)
    return record


def trained(size: str, display: Display) -> Path:
    """The directory of the tinylm of a size, trained where it is not there yet."""
    path = DIRECTORY if size == "full" else DIRECTORY.with_name(f"{DIRECTORY.name}-{size}")
    if not path.is_dir():
        make(path, RECIPES[size], display)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and say what came out."""
    parser = argparse.ArgumentParser(description="Train a small language model in float32 on the standard library.")
    parser.add_argument("--size", choices=RECIPES, default="full", help="quick: a smaller one, in a minute")
    parser.add_argument("--steps", type=int, help="instead of the recipe's")
    parser.add_argument("--out", type=Path, default=DIRECTORY, help="directory to make")
    args = parser.parse_args(arguments)
    recipe, display = RECIPES[args.size], Display()
    if args.steps:
        recipe = dataclasses.replace(recipe, steps=args.steps)
    try:
        record = make(args.out, recipe, display)
    except UserError as error:
        raise SystemExit(str(error)) from None
    display.fact("model", f"{record['parameters'] / 1e6:.1f} M parameters, {record['trained_tokens']:,} tokens trained")
    display.fact("held out", f"perplexity {record['perplexity']:.1f}, {record['bits_per_byte']:.2f} bits per byte")
    display.fact("saved", f"{args.out}, after {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
