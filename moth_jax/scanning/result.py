"""What a scan says: the verdict, and the evidence for it."""

import dataclasses
import json
import math
import os
from typing import Any

import jax
import numpy as np

from moth_jax.errors import InputError, first_line, listed
from moth_jax.storage.files import check_arrays, load_npz, save_npz, unique_fields
from moth_jax.triggers import (
    TRIGGER_LAYOUT,
    AnyTrigger,
    names_of_other_kinds,
    trigger_arrays,
    trigger_of,
)
from moth_jax.typed import fault_of

ANY = "any"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way into a class that was searched for.

    Attributes:
      victim: the name of the victim class, or "any" for all classes but the target.
      target: the name of the target class.
      size: of the smallest trigger found, in aggregated pixels; inf if none was found.
      relative_size: the same as a share of h*w*c.
      success_rate: of this trigger on the images used; 0 if none was found.
      suspicion: the arm's own deciding number, NaN where it has none; flagged above the threshold.
      anomaly_index: how many deviations the size lies below the median of all arms (negative above
        it); NaN where it is undefined or not asked for.
      ratio: size of the smallest trigger from the target back to the victim over `size`, inf if
        there is none; NaN where it was not measured.
      there: whether the model takes the victims for the target without any trigger. Such an arm is
        no evidence of a backdoor, and has no suspicion.
    """

    victim: str
    target: str
    size: float
    relative_size: float
    success_rate: float
    suspicion: float = float("nan")
    anomaly_index: float = float("nan")
    ratio: float = float("nan")
    there: bool = False

    @property
    def found(self) -> bool:
        """Whether there is a trigger."""
        return bool(np.isfinite(self.size))


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """The result of a scan.

    Attributes:
      method: the scanner's name.
      poisoned: the verdict; None where the evidence allows none.
      statistic: the deciding number, the largest suspicion of an arm; NaN where no arm has one.
      statistic_name: what that number is.
      threshold: the model looks poisoned if the statistic is above it.
      arms: A rows of evidence.
      triggers: [A, ...] (NumPy), of one kind, zeros where none was found; None if they are not
        known.
      num_gradients: images whose gradient was taken.
      seconds: wall time.
      reason: why there is no statistic, or no arm; "" if there is one.
      details: the options; `among`, how many classes of how many, where not all were scanned.
    """

    method: str
    poisoned: bool | None
    statistic: float
    statistic_name: str
    threshold: float
    arms: tuple[Arm, ...]
    triggers: AnyTrigger | None = None
    num_gradients: int = 0
    seconds: float = 0.0
    reason: str = ""
    details: dict = dataclasses.field(default_factory=dict)

    def ranked(self) -> list[int]:
        """Return the positions of the arms, the most suspicious first."""
        return sorted(
            range(len(self.arms)),
            key=lambda i: (
                self.arms[i].there,
                -_or_least(self.arms[i].suspicion),
                self.arms[i].size,
            ),
        )

    def flagged(self) -> list[int]:
        """Return the positions of the arms above the threshold, the most suspicious first."""
        return [i for i in self.ranked() if self.arms[i].suspicion > self.threshold]

    def trigger(self, arm: int) -> AnyTrigger | None:
        """Return the trigger of one arm; None if none was found or kept."""
        if self.triggers is None or not self.arms[arm].found:
            return None
        return jax.tree.map(lambda leaf: leaf[arm], self.triggers)

    def num_failures(self) -> int:
        """Return on how many arms no trigger was found."""
        return sum(not arm.found for arm in self.arms)

    def verdict(self) -> str:
        """Return the verdict in two or three words."""
        return {True: "looks poisoned", False: "looks clean", None: "undecided"}[self.poisoned]

    def describe(self) -> str:
        """Return the verdict with its evidence, and what it cost: two lines."""
        cost = f"{self.method}: {len(self.arms)} arms"
        if self.num_failures():
            cost += f", {self.num_failures()} without a trigger"
        if self.num_gradients:
            cost += f", {self.num_gradients:,} image gradients"
        verdict = self.verdict()
        if "among" in self.details:
            verdict += " among {} of {} classes".format(*self.details["among"])
        return f"{verdict}: {self._evidence()}\n{cost} in {self.seconds:.1f} s"

    def _evidence(self) -> str:
        parts = []
        best = self.arms[self.ranked()[0]] if self.arms else None
        best = None if best is not None and best.there else best
        if best is not None and best.found:
            way = "from any class" if best.victim == ANY else f"from {best.victim!r}"
            size = f"{best.size:.1f} pixels ({100 * best.relative_size:.2g} % of the image)"
            parts.append(
                f"{best.target!r} is reached {way} by a trigger of {size}"
                if self.poisoned
                else f"the most suspicious way, {way} to {best.target!r}, takes a trigger of {size}"
            )
            if not np.isnan(best.ratio):
                back = (
                    f"{best.ratio:.1f} times as large" if np.isfinite(best.ratio) else "not found"
                )
                parts.append(f"the one back is {back}")
        if np.isfinite(self.statistic) and best is not None:
            relation = "above" if self.statistic > self.threshold else "not above"
            number = f"{self.statistic_name} {self.statistic:.2g}"
            parts.append(f"{number} ({relation} {self.threshold:.3g})")
        there = [arm for arm in self.arms if arm.there]
        if there:
            ways = listed(there, lambda arm: f"{_victims(arm)} as {arm.target!r}")
            parts.append(
                f"the model takes {ways} without any trigger, which is no evidence of a backdoor"
            )
        return ", ".join([*parts, self.reason] if self.reason else parts)

    def to_json(self) -> dict:
        """Return everything but the triggers, as JSON can carry it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["triggers"]
        return {**fields, "arms": [dataclasses.asdict(arm) for arm in self.arms]}

    def save(self, path: str | os.PathLike) -> None:
        """Write an npz file, whole or not at all."""
        arrays = {"scan": np.asarray(json.dumps(self.to_json()))}
        if self.triggers is not None:
            arrays.update(trigger_arrays(self.triggers, "s"))
        save_npz(path, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Scan":
        """Read what `save` wrote.

        Raises:
          InputError: the file is missing, damaged, or not a scan.
        """
        arrays = load_npz(path, advice=_ADVICE)
        pictures = {*_LAYOUT} - {"scan"}
        kept = pictures & arrays.keys()
        optional = names_of_other_kinds(arrays, "s") if kept else pictures
        check_arrays(path, arrays, _LAYOUT, what="scan", optional=optional, advice=_ADVICE)
        triggers = trigger_of(arrays, "s") if kept else None
        try:
            fields = json.loads(str(arrays["scan"]), object_pairs_hook=unique_fields)
            fault = fault_of(_with_finite(fields), cls)
            if fault is not None:
                raise ValueError(fault)
            arms = tuple(Arm(**arm) for arm in fields.pop("arms"))
            return cls(**fields, arms=arms, triggers=triggers)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} is damaged: {first_line(error)}; {_ADVICE}") from error


_ADVICE = "move it away, and a scan makes it again"
_LAYOUT = {
    "scan": ("U", ()),
    **{f"{name}s": layout for name, layout in TRIGGER_LAYOUT.items()},
}


def _victims(arm: Arm) -> str:
    return "images of any class" if arm.victim == ANY else f"images of {arm.victim!r}"


def _or_least(value: float) -> float:
    """`value`, or what sorts below every number if it is NaN."""
    return -np.inf if np.isnan(value) else value


def _with_finite(value: Any) -> Any:
    """Return what JSON holds with 0 in the place of numbers that are not finite, as a scan has."""
    if isinstance(value, dict):
        return {name: _with_finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_finite(item) for item in value]
    return 0.0 if isinstance(value, float) and not math.isfinite(value) else value
