"""The rows of the comparison, and all that may differ in them, with the reason: the allowances.

A row counts what was compared and what was equal, bit for bit. A difference is either covered by an allowance, which is
checked for each element and not for the average, or it is beyond, and the comparison fails.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

EQUAL = "equal"
NOW_EQUAL = "now equal"
DIFFERS = "DIFFERS"
NOT_COMPARED = "not compared"


@dataclasses.dataclass(frozen=True)
class Allowance:
    """A difference that is expected.

    Attributes:
        verdict: what a row with such differences, and no others, says.
        rule: what exactly is allowed.
        reason: why.
    """

    verdict: str
    rule: str
    reason: str


PRODUCT_FACTORS = {torch.float32: 2.0, torch.bfloat16: 1.05, torch.float16: 1.05}  # our error of a product over theirs
OFFSET_ULPS = 16

ALLOWANCES = {
    "second zero": Allowance(
        "same value",
        "both codes stand for 0, and ours is the first of them",
        "FP4 has two codes for 0. bitsandbytes has code 8 for small positive numbers on CPUs, we never do",
    ),
    "negative zero": Allowance(
        "same value",
        "ours is +0.0, theirs -0.0",
        "a scale that was quantized too can decode to a negative number, and 0 times it is -0.0 in bitsandbytes; so is "
        "FP4's code 8 in places; here a zero is +0.0",
    ),
    "flushed": Allowance(
        "as documented",
        "bitsandbytes has 0, ours is below 2**-126 and equals the float64 oracle in every bit",
        "the processor's conversion to bfloat16, which bitsandbytes uses where there is AVX512-BF16, turns subnormal "
        "numbers into 0",
    ),
    "quotient": Allowance(
        "as documented",
        "in a short last block, neighbouring codes, and the quotient within 2**-23 of the threshold between them",
        "bitsandbytes multiplies by the reciprocal of the scale, but divides in a short last block; here every block "
        "has the reciprocal",
    ),
    "extreme scale": Allowance(
        "as documented",
        "the scale is below 2**-126 or above 2**126, and no code is nearer to the true quotient than ours by 2**-23",
        "the reciprocal of such a scale is no normal float32; bitsandbytes uses it all the same",
    ),
    "zero tail": Allowance(
        "as documented",
        "a short last block of zeros has scale 0 here, 1e-38 in bitsandbytes",
        "bitsandbytes stores the scale of the short last block after raising it to 1e-38",
    ),
    "split rows": Allowance(
        "bitsandbytes wrong",
        "rows are no whole number of blocks; ours equals the float64 oracle in every bit",
        "on CPUs with AVX512 bitsandbytes takes the scale of the wrong block in such rows",
    ),
    "look-up": Allowance(
        "ours closer",
        "same residual and second-level scale; what our code stands for is at least as close in float64, or farther by "
        "less than 2**-23 of that scale, which is the rounding of the quotient",
        "bitsandbytes looks the 8-bit code up in 65,536 entries on CPUs; here it is the nearest",
    ),
    "mean": Allowance(
        "as documented",
        f"the offset within {OFFSET_ULPS} ulp of theirs, and not farther from the float64 mean",
        "the mean is summed in float64 here, in float32 there, and the order of summation shows in it",
    ),
    "shifted": Allowance(
        "as documented",
        "the second-level scale differs by no more than the offsets do, and one ulp",
        "it is the largest distance from the offset",
    ),
    "summation": Allowance(
        "no worse",
        "root-mean-square error against float64, tensor by tensor, at most 1.05 times that of bitsandbytes; in "
        "float32, whose errors are of the order of 1e-7, at most twice",
        "sums are taken in another order; 16-bit results are off by their last rounding, which is the same",
    ),
    "two weights": Allowance(
        "as documented",
        "our backward uses the bits of our forward, and the oracle's",
        "bitsandbytes' backward rounds the weight to the dtype that was quantized, its forward does not",
    ),
    "edge": Allowance(
        "as documented",
        "what comes of an unusual input is what edges.py says, here and there",
        "stands there, for each input",
    ),
}

_ZEROS = {"second zero", "negative zero"}
_WEIGHTY = ["bitsandbytes wrong", "ours closer", "as documented", "no worse", "same value"]


@dataclasses.dataclass
class Row:
    """One quantity, in one setting.

    Attributes:
        quantity: what is compared, see ``QUANTITIES``.
        detail: in which setting: codebook, dtype.
        unit: of ``largest``.
        compared, equal, beyond: elements.
        allowed: elements that differ and may, by the name of the allowance.
        first: the first difference, for reading; one in value before one between two zeros, one beyond before both.
        largest: the largest difference.
        cases: the same numbers for each tensor.
        note: the verdict of a row within its allowances, where it is none of theirs.
    """

    quantity: str
    detail: str
    unit: str = ""
    compared: int = 0
    equal: int = 0
    beyond: int = 0
    allowed: Counter[str] = dataclasses.field(default_factory=Counter)
    first: str | None = None
    largest: float = 0.0
    cases: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    note: str | None = None

    def add(
        self,
        case: object,
        compared: int,
        differing: int = 0,
        allowed: Mapping[str, int] | None = None,
        first: str | None = None,
        largest: float = 0.0,
        **more: Any,
    ) -> None:
        """Count one tensor.

        Args:
            case: its name.
            compared: elements.
            differing: those not equal in every bit.
            allowed: how many of these an allowance covers, by its name.
            first: the first difference, for reading.
            largest: the largest difference.
            more: other facts of the tensor, for the record.
        """
        covered = Counter({name: count for name, count in (allowed or {}).items() if count})
        assert covered.keys() <= ALLOWANCES.keys(), covered
        beyond = differing - covered.total()
        assert beyond >= 0, (case, differing, covered)
        equal = compared - differing
        entry = {"case": str(case), "compared": compared, "equal": equal}
        if differing:
            entry |= {"allowed": dict(covered), "beyond": beyond, "first": first, "largest": largest}
        first = f"{case} {first}" if first is not None and differing else None
        facts = compared, equal, beyond, covered, first, largest, [{**entry, **more}]
        self.join(Row(self.quantity, self.detail, self.unit, *facts))

    @property
    def _rank(self) -> int:
        """How much the first difference has to tell."""
        return 3 if self.beyond else 2 if self.allowed.keys() - _ZEROS else min(self.compared - self.equal, 1)

    @property
    def fails(self) -> bool:
        """Whether something differs beyond its allowance."""
        return self.beyond > 0

    @property
    def verdict(self) -> str:
        """The row in a word or two; of several the weightiest."""
        if self.fails:
            return DIFFERS
        if not self.compared:
            return NOT_COMPARED
        if self.note is not None:
            return self.note
        return min((ALLOWANCES[name].verdict for name in self.allowed), key=_WEIGHTY.index, default=EQUAL)

    def join(self, other: Row) -> None:
        """Count what another row counted."""
        if other.first is not None and other._rank > self._rank:
            self.first = other.first
        self.compared += other.compared
        self.equal += other.equal
        self.beyond += other.beyond
        self.allowed += other.allowed
        self.largest = max(self.largest, other.largest)
        self.note = self.note or other.note
        self.cases += other.cases


def merged(rows: Iterable[Row], key: Callable[[Row], tuple[str, str]]) -> list[Row]:
    """New rows, one for each key, a quantity and a detail, in the order in which they first come."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        name = key(row)
        found.setdefault(name, Row(*name, row.unit)).join(row)
    return list(found.values())


OF_LARGEST = "of the largest weight"
EDGES = "edge cases"
QUANTITIES = {  # and the units of their largest differences
    "codebooks": "ulp",
    "codes": "steps",
    "codes, extremes": "steps",  # of short last blocks, and of scales where float32 ends
    "scales": "ulp",
    "weights": OF_LARGEST,
    "weights, 8-bit scales": OF_LARGEST,
    "weights, extremes": OF_LARGEST,
    "weights, split rows": OF_LARGEST,
    "second-level codes": "steps",
    "second-level offset": "ulp",
    "second-level scales": "ulp",
    "decoded scales": "ulp",
    "forward": "x error",
    "input gradient": "x error",
    "weights in backward": OF_LARGEST,
    "files": "",
    EDGES: "",
}


class Rows:
    """The rows of a comparison, in the order of ``QUANTITIES``, made when they are first asked for."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str], Row] = {}

    def row(self, quantity: str, detail: str = "") -> Row:
        """The row of a quantity in a setting."""
        if (quantity, detail) not in self._rows:
            self._rows[quantity, detail] = Row(quantity, detail, QUANTITIES[quantity])
        return self._rows[quantity, detail]

    def all(self) -> list[Row]:
        """Every row, sorted by quantity, in the order they were asked for within one."""
        order = list(QUANTITIES)
        return sorted(self._rows.values(), key=lambda row: order.index(row.quantity))
