"""The results of a comparison: medians, ratios with their spread, and whether logits agree."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from layerstream.tools.compare.contenders import Contender
from layerstream.tools.compare.rounds import Outcome, Setup, TurnResult

__all__ = ["OURS", "Agreement", "Kind", "Row", "Spread", "make_rows"]

OURS = "layerstream"
Kind = Literal["cold", "warm"]

# Logits are compared with those of the first of these that has a result.
_REFERENCES = (
    "transformers, all in memory",
    "transformers, mapped",
    "accelerate, all on disk",
    "AirLLM",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of some values, with their minimum and maximum."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """The spread of ``values``; None without values."""
        known = list(values)
        if not known:
            return None
        return cls(median=statistics.median(known), least=min(known), most=max(known))

    def text(self) -> str:
        """Format with three digits, minimum and maximum in brackets."""
        return f"{self.median:.3g} ({self.least:.3g}-{self.most:.3g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One contender's logits compared with another's."""

    reference: str
    """Name of the other contender."""
    equal: bool
    """Whether they are equal bit for bit."""
    max_abs_difference: float | None
    """None if shapes differ, or values are not finite."""
    same_argmax_share: float
    """Share of the prompt's positions with the same argmax."""

    def text(self) -> str:
        """Format for a cell of the table."""
        if self.equal:
            return "equal"
        if self.max_abs_difference is None:
            return "not comparable"
        return f"off by {self.max_abs_difference:.2g}, argmax {self.same_argmax_share:.0%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The results of one contender, and their ratios to layerstream's in the same rounds."""

    name: str
    turns: Sequence[TurnResult]
    ours: Sequence[TurnResult]
    agreement: Agreement | None

    def seconds(self, kind: Kind) -> Spread | None:
        """Seconds of its passes."""
        return Spread.of(
            each.seconds for turn in self.turns if (each := getattr(turn, kind)) is not None
        )

    def ratio(self, kind: Kind) -> Spread | None:
        """Its seconds divided by layerstream's, round by round: above 1, layerstream is faster."""
        ours = {turn.round: getattr(turn, kind) for turn in self.ours}
        return Spread.of(
            each.seconds / own.seconds
            for turn in self.turns
            if (each := getattr(turn, kind)) is not None
            and (own := ours.get(turn.round)) is not None
        )

    def read_bytes(self, kind: Kind) -> float | None:
        """Median of the bytes that a pass read from disk."""
        known = [
            each.read_bytes
            for turn in self.turns
            if (each := getattr(turn, kind)) is not None and each.read_bytes is not None
        ]
        return statistics.median(known) if known else None

    @property
    def peak_anonymous_bytes(self) -> int:
        """Maximum of all its turns."""
        return max(turn.peak_anonymous_bytes for turn in self.turns)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON data, with units in the keys."""
        found: dict[str, Any] = {
            "name": self.name,
            "rounds": [turn.round for turn in self.turns],
            "mapped_weights_stayed_cached": not all(turn.all_was_dropped for turn in self.turns),
            "open_seconds": [turn.open_seconds for turn in self.turns],
        }
        for kind in ("cold", "warm"):
            passes = [each for turn in self.turns if (each := getattr(turn, kind)) is not None]
            seconds, ratio = self.seconds(kind), self.ratio(kind)
            found |= {
                f"{kind}_seconds": [each.seconds for each in passes],
                f"{kind}_median_seconds": seconds and seconds.median,
                f"{kind}_read_bytes": [each.read_bytes for each in passes],
                f"{kind}_ratio_to_layerstream": ratio
                and {"median": ratio.median, "least": ratio.least, "most": ratio.most},
            }
        agreement = self.agreement
        return found | {
            "peak_anonymous_bytes": self.peak_anonymous_bytes,
            "peak_cgroup_bytes": max(turn.peak_bytes or 0 for turn in self.turns) or None,
            "logits": agreement
            and {
                "compared_with": agreement.reference,
                "equal": agreement.equal,
                "max_abs_difference": agreement.max_abs_difference,
                "same_argmax_share": agreement.same_argmax_share,
            },
            "notes": dict(self.turns[-1].notes),
            "versions": dict(self.turns[-1].versions),
        }


def make_rows(outcome: Outcome, setup: Setup) -> list[Row]:
    """Make a row for each contender with a result."""
    measured = {contender: turns for contender, turns in outcome.turns.items() if turns}
    logits = {
        contender.name: _load_logits(setup, contender, turns[-1])
        for contender, turns in measured.items()
        if turns[-1].logits_shape is not None
    }
    reference = next((name for name in _REFERENCES if name in logits), None)
    ours = next((turns for each, turns in measured.items() if each.name == OURS), [])
    return [
        Row(
            name=contender.name,
            turns=turns,
            ours=ours,
            agreement=None
            if reference in {None, contender.name} or contender.name not in logits
            else _compare(str(reference), logits[contender.name], logits[str(reference)]),
        )
        for contender, turns in measured.items()
    ]


def _load_logits(
    setup: Setup, contender: Contender, turn: TurnResult
) -> "np.ndarray[Any, np.dtype[np.float32]]":
    return np.fromfile(setup.logits_file(contender), np.float32).reshape(turn.logits_shape or (0,))


def _compare(
    reference: str,
    these: "np.ndarray[Any, np.dtype[np.float32]]",
    those: "np.ndarray[Any, np.dtype[np.float32]]",
) -> Agreement:
    if these.shape != those.shape:
        return Agreement(
            reference=reference, equal=False, max_abs_difference=None, same_argmax_share=0.0
        )
    most = (
        float(np.abs(these - those).max(initial=0)) if these.tobytes() != those.tobytes() else 0.0
    )
    return Agreement(
        reference=reference,
        equal=these.tobytes() == those.tobytes(),
        max_abs_difference=most if np.isfinite(most) else None,
        same_argmax_share=float((these.argmax(-1) == those.argmax(-1)).mean()),
    )
