"""What the tables come to, a sentence each, made of the records: nothing here is known before it is measured.

Two things are *told apart* where the 95 % interval of their paired difference (or ratio) does not hold 0 (or 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .interval import Estimate, shown
from .table import Records, of_kind

One = Mapping[str, Any]


def in_short(measured: Mapping[str, Records]) -> str:
    """A list of sentences about the tables that were measured."""
    lines = [line for name, records in measured.items() if records for line in _SENTENCES[name](records)]
    return "\n".join(f"* {line}" for line in lines)


def _holds(estimate: Estimate, value: float) -> bool:
    return estimate["interval"] is None or estimate["interval"][0] <= value <= estimate["interval"][1]


def _apart(records: Records, figure: Callable[[One], Estimate], same: float) -> str:
    """Which data types have less and which more of a figure than NF4, as far as they are told apart."""
    others = [one for one in records if one["data_type"] not in ("nf4", "float32")]
    parts = []
    for word, lower in (("less", True), ("more", False)):
        some = [one for one in others if not _holds(figure(one), same) and (figure(one)["value"] < same) == lower]
        some = sorted(some, key=lambda one: figure(one)["value"], reverse=not lower)
        parts.append(f"{word} than NF4: {', '.join(one['data_type'] for one in some) or 'none'}")
    told = [one["data_type"] for one in others if _holds(figure(one), same)]
    return f"{'; '.join(parts)}; not told apart: {', '.join(told) or 'none'}"


def _weights(records: Records) -> Iterator[str]:
    for source in dict.fromkeys(one["source"] for one in records):
        some = [one for one in records if (one["source"], one["block_size"], one["scales"]) == (source, 64, "own")]
        found = {one["data_type"]: one["to_nf4"] for one in some}
        ratios = [f"{name} {shown(found[name])}" for name in ("af4", "bof4", "bof4-s", "nf4-ls") if name in found]
        yield f"Squared error of {source} in blocks of 64 over NF4's, both with encoded scales: {', '.join(ratios)}."


def _language(records: Records) -> Iterator[str]:
    for model in dict.fromkeys(one["model"] for one in records):
        some = [one for one in records if one["model"] == model and one["scales"] == "own"]
        yield f"KL divergence of {model}, {_apart(some, lambda one: one['to_nf4']['kl'], 0)}."


def _retrieval(records: Records) -> Iterator[str]:
    some = [one for one in records if one["scales"] == "own"]
    yield f"The encoder's embeddings turn, {_apart(some, lambda one: one['angle_to_nf4'], 1)}."


def _signs(records: Records) -> Iterator[str]:
    costs = [f"{one['encoding']} {100 * (one['cost']['value'] - 1):.2f} % on {one['source']}" for one in records]
    yield f"Encoding the signed scales of BOF4-S adds to its squared error: {', '.join(costs)}."


def _normality(records: Records) -> Iterator[str]:
    whole = [one for one in records if one["layers"] == "all"]
    shares = [f"{one['model']} {one['shapiro']:.1%}" for one in whole]
    yield f"Rows that Shapiro-Wilk finds not normal at 5 % (the paper: 7.5 % of LLaMA 7B's): {', '.join(shares)}."


def _double(records: Records) -> Iterator[str]:
    held = {one["scales"]: one["held"] for one in of_kind(records, "bits")}
    yield f"Double quantization saves {held['float32'] - held['double']:.4f} bits a weight held (the paper: 0.373)."
    bad = [one["factor"] for one in of_kind(records, "factor") if one["scales"] == "double" and one["median"] > 0.1]
    if bad:
        yield f"Its one offset is off by more than a tenth where half of the blocks are {min(bad):g} times smaller."


def _rounded(records: Records) -> Iterator[str]:
    from scipy.stats import kendalltau

    for model in dict.fromkeys(one["model"] for one in records):
        some = [one for one in records if one["model"] == model]
        found: Any = kendalltau([one["error_truth"] for one in some], [one["error_measured"] for one in some])
        tau = found.statistic
        yield f"Rounding {model} to Q4_1 first leaves the order of the errors at a Kendall's tau of {tau:.2f}."


def _methods(records: Records) -> Iterator[str]:
    found = [one for one in of_kind(records, "method") if one["method"] != "lora"]
    apart = [f"{one['name']} ({one['less_lora']['value']:+.3f})" for one in found if not _holds(one["less_lora"], 0)]
    yield (
        f"After {found[0]['steps']} steps with {found[0]['seeds']} seeds, told apart from LoRA in float32: "
        f"{', '.join(apart) or 'none of full fine-tuning and ' + str(len(found) - 1) + ' data types of QLoRA'}."
    )


def _adapters(records: Records) -> Iterator[str]:
    some = [one for one in records if one["layers"] == "attention only"]
    apart = [str(one["of_rank"]) for one in some if not _holds(one["less_all"], 0)]
    differences = ", ".join(f"{one['less_all']['value']:+.3f} ({one['parameters']:,})" for one in some)
    yield (
        f"Adapters at attention only, less those at every linear layer with as many parameters: {differences} nats; "
        f"{len(apart)} of {len(some)} are told apart."
    )


def _paging(records: Records) -> Iterator[str]:
    same = all(one["sum"] == records[0]["sum"] for one in records)
    yield f"A paged state gives {'the same' if same else 'other'} parameters, whatever share of it fits."


def _memory(records: Records) -> Iterator[str]:
    some = [one for one in records if one["kind"] == "predicted"]
    pairs = ", ".join(f"{one['model']} {one['peak'] / 1e9:.1f} ({one['paper']['total'] / 1e3:.1f})" for one in some)
    yield f"Memory predicted for QLoRA, in GB, and the paper's: {pairs}."
    if measured := [one for one in records if one["kind"] == "measured"]:
        worst = max(abs(one["predicted"] / one["measured"] - 1) for one in measured)
        yield f"Memory predicted for {len(measured)} methods here is within {worst:.0%} of what was measured."


_SENTENCES: dict[str, Callable[[Records], Iterator[str]]] = {
    "weight_error": _weights,
    "perplexity": _language,
    "retrieval": _retrieval,
    "sign_encodings": _signs,
    "normality": _normality,
    "double_quant": _double,
    "rounded_before": _rounded,
    "methods": _methods,
    "adapters_where": _adapters,
    "paging": _paging,
    "memory": _memory,
}
