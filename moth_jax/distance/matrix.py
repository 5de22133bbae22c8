"""The matrix of class distances: the result of a measurement, and what is done with it."""

import dataclasses
import json
import os
import warnings
from typing import NamedTuple

import jax
import numpy as np

from moth_jax.distance.directions import describe_choice, mean_interval
from moth_jax.errors import InputError, listed
from moth_jax.inversion.candidates import least_rate
from moth_jax.storage.files import check_arrays, load_npz, save_npz, unique_fields
from moth_jax.triggers import (
    TRIGGER_LAYOUT,
    AnyTrigger,
    names_of_other_kinds,
    trigger_arrays,
    trigger_of,
)
from moth_jax.typed import is_of


class FoundTriggers(NamedTuple):
    """The triggers of the directions where one was found.

    Attributes:
      directions: [M, 2] rows and columns of the matrix, in its order.
      trigger: [M, ...], of one kind.
    """

    directions: np.ndarray
    trigger: AnyTrigger

    def at(self, directions: np.ndarray) -> AnyTrigger:
        """Return the triggers of `directions` [D, 2], zeros where none was found."""
        place = {direction: i for i, direction in enumerate(map(tuple, self.directions.tolist()))}
        wanted = map(tuple, np.asarray(directions).tolist())
        places = np.asarray([place.get(direction, -1) for direction in wanted], np.int64)
        has = places >= 0

        def pick(kept: np.ndarray) -> np.ndarray:
            picked = np.zeros((len(places), *kept.shape[1:]), kept.dtype)
            picked[has] = kept[places[has]]
            return picked

        return jax.tree.map(pick, self.trigger)


@dataclasses.dataclass(frozen=True, eq=False)
class DistanceMatrix:
    """Class distances of one model, in aggregated pixels.

    A distance is the size of a trigger's mask (`triggers.trigger_size`), or of the mask that an
    added trigger needs (`triggers.needed_mask`). K is the number of classes measured among each
    other: all of the model's, or those chosen.

    Attributes:
      values: [K, K] float32, row victim, column target. NaN on the diagonal and where nothing was
        measured; inf where the measurement found no trigger.
      success_rate: [K, K] float32, that of the very trigger whose size is given; 0 where none was
        found, NaN where nothing was measured.
      class_names: K names.
      share_there: [K, K] float32, the share of the victims' images that the model takes for the
        target without any trigger; None where it is not known.
      values_per_seed: [S, K, K], the distances found by each seed; `values` is their minimum.
      values_per_search: [R, K, K], the sizes that each search of an ensemble found, inf where it
        found none or was not made; None where one search with seeds was asked for.
      triggers: those found; None if they were not kept.
      changed_pixels: [K, K] float32, how many pixels each trigger changes by 1/255 or more, in any
        channel of any image that it was measured on (`triggers.changed_pixels`); inf and NaN as in
        `values`; None where it is not known. `in_changed_pixels` has them as the distances.
      lower: [K, K] float32, proven lower ends of the distances (`certified_distances`): NaN where
        nothing was certified, inf where it is proven that there is no trigger; None if not known.
      details: how it was measured (seeds, num_steps, num_images, seconds, ...); `inversion` is the
        method with its options, `images` a digest of each victim class's images, `classes` are the
        labels of chosen ones, `selection` the `DirectionChoice.details` of chosen directions.
    """

    values: np.ndarray
    success_rate: np.ndarray
    class_names: tuple[str, ...]
    share_there: np.ndarray | None = None
    values_per_seed: np.ndarray | None = None
    values_per_search: np.ndarray | None = None
    triggers: FoundTriggers | None = None
    changed_pixels: np.ndarray | None = None
    lower: np.ndarray | None = None
    details: dict = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.values.shape[0]

    @property
    def found(self) -> np.ndarray:
        """[K, K] bool, the directions with a verified trigger."""
        return np.isfinite(self.values)

    @property
    def unit(self) -> str:
        """What `values` count: "aggregated pixels" or "changed pixels"."""
        return self.details.get("unit", "aggregated pixels")

    def in_changed_pixels(self) -> "DistanceMatrix":
        """Return the same with `changed_pixels` as its `values`: to print, draw and compare.

        The triggers are those with the smallest masks. Others may change fewer pixels.

        Raises:
          InputError: the matrix does not know them.
        """
        if self.changed_pixels is None:
            raise InputError(
                "the matrix does not know how many pixels its triggers change, as it was measured "
                "by an earlier version; measure it again"
            )
        return dataclasses.replace(
            self,
            values=self.changed_pixels,
            values_per_seed=None,
            values_per_search=None,
            lower=None,
            details={**self.details, "unit": "changed pixels"},
        )

    def is_there(self) -> np.ndarray:
        """Return [K, K] bool: which victims the model takes for the target without any trigger.

        As many of them as a trigger would have to send, so that their distance is 0.
        """
        if self.share_there is None:
            return self.values == 0
        bound = least_rate(self.details.get("success_bound", 1.0))
        return (self.values == 0) | (self.share_there >= bound)

    def average(self) -> float:
        """Return the mean distance of the directions where a trigger was found; NaN if none was."""
        return float(self.values[self.found].mean()) if self.found.any() else float("nan")

    def average_lower(self) -> float | None:
        """Return the mean of the finite proven lower ends; None if none were computed."""
        if self.lower is None:
            return None
        finite = self.lower[np.isfinite(self.lower)]
        return float(finite.mean()) if finite.size else float("nan")

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % confidence interval of the mean of all directions; None if not a sample.

        It is the interval of chance in which directions were drawn, not of the inversions.

        Note: Student's t knows nothing of sizes, and of few directions reaches below 0, where no
        distance is: there the interval is cut.
        """
        chosen = self.details.get("selection", {})
        if chosen.get("kind") != "sample":
            return None
        ends = mean_interval(self.values[self.found], self.num_measured(), chosen["of"])
        return _cut_below(0.0, ends)

    @property
    def is_whole(self) -> bool:
        """Whether every direction was measured."""
        return self.num_measured() == self.num_classes * (self.num_classes - 1)

    def choice(self) -> str:
        """Return which directions were measured, in words."""
        count = self.num_measured()
        known = {"kind": "all" if self.is_whole else "", "of": count}
        return describe_choice(self.details.get("selection", known), count)

    def summary(self) -> str:
        """Return the mean distance in a line: of which directions, and how sure."""
        interval = self.interval()
        sure = "" if interval is None else " (95 % interval {:.1f}-{:.1f})".format(*interval)
        unit = " changed pixels" if self.unit == "changed pixels" else ""
        return f"mean of {self.choice()}: {_mean(self, 1)}{unit}{sure}"

    def disagreement(self) -> np.ndarray:
        """Return [K, K], by which share the second smallest search's trigger is the larger one.

        Where it is nearly 0, two searches of an ensemble ended at the same size: the distance has
        settled. Where it is large, the smallest was one search's luck, and there may be a smaller
        one. NaN where fewer than two found a trigger, or only one search was asked for.
        """
        if self.values_per_search is None or len(self.values_per_search) < 2:
            return np.full_like(self.values, np.nan)
        first, second = np.sort(self.values_per_search, axis=0)[:2]
        known = np.isfinite(second) & (first > 0)
        return np.where(known, second / np.where(known, first, 1) - 1, np.nan)

    def num_failures(self) -> int:
        """Return in how many measured directions no trigger was found."""
        return int(np.isinf(self.values).sum())

    def num_measured(self) -> int:
        """Return how many directions were measured."""
        return int((~np.isnan(self.values)).sum())

    def smallest(self, count: int) -> list[tuple[int, int]]:
        """Return up to `count` directions (victim, target), the smallest distances first."""
        order = np.argsort(np.where(self.found, self.values, np.inf), axis=None, kind="stable")
        count = min(count, int(self.found.sum()))
        return [divmod(int(i), self.num_classes) for i in order[:count]]

    def trigger(self, victim: int, target: int) -> AnyTrigger | None:
        """Return the trigger of one direction; None if none was found or kept."""
        if self.triggers is None or not self.found[victim, target]:
            return None
        one = self.triggers.at(np.array([[victim, target]]))
        return jax.tree.map(lambda leaf: leaf[0], one)

    def compare(self, after: "DistanceMatrix") -> str:
        """Return a few lines that set this matrix (before) against another of the same classes."""
        change = increase_per_direction(self, after)
        both = np.isfinite(change)
        mean = relative_increase(self, after)
        increase = f"{100 * mean:+.2f} %" if both.any() else "unknown"
        lines = [
            f"average {_noun(self)} {_mean(self)} -> {_mean(after)}",
            f"increase {increase} over {both.sum()} directions",
            f"no trigger found in {self.num_failures()} -> {after.num_failures()} directions",
        ]
        if self.lower is not None and after.lower is not None:
            ends = f"{self.average_lower():.2f} -> {after.average_lower():.2f}"
            lines.insert(1, f"average proven lower end {ends}")
        if both.any():
            least = divmod(int(np.nanargmin(np.where(both, change, np.nan))), self.num_classes)
            names = " -> ".join(self.class_names[k] for k in least)
            lines.append(f"least increase {100 * change[least]:+.2f} % ({names})")
        return "\n".join(lines)

    def plot(self, ax=None, title: str | None = None):
        """Draw the matrix as a heat map, and return the axes; the title is the average if None."""
        from moth_jax.distance.heat_map import plot_heat_map

        title = f"average {_noun(self)} {self.average():.2f}" if title is None else title
        return plot_heat_map(
            self.values, self.class_names, lower=self.lower, ax=ax, title=title, unit=self.unit
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write an npz file, whole or not at all."""
        arrays = {
            "values": self.values,
            "success_rate": self.success_rate,
            "class_names": np.asarray(self.class_names, dtype=np.str_),
            "details": np.asarray(json.dumps(self.details)),
        }
        known = {name: getattr(self, name) for name in _OPTIONAL}
        arrays |= {name: array for name, array in known.items() if array is not None}
        if self.triggers is not None:
            arrays["trigger_directions"] = self.triggers.directions
            arrays.update(trigger_arrays(self.triggers.trigger, "s"))
        save_npz(path, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DistanceMatrix":
        """Read what `save` wrote.

        Raises:
          InputError: the file is missing, damaged, or not a distance matrix.
        """
        arrays = load_npz(path, advice=_ADVICE)
        kept = any(name in arrays for name in _TRIGGERS)
        without = names_of_other_kinds(arrays, "s") if kept else _TRIGGERS
        optional = ("details", *_OPTIONAL, *without)
        what = "distance matrix"
        check_arrays(path, arrays, _LAYOUT, what=what, optional=optional, advice=_ADVICE)
        details = _details(arrays)
        if details is None:
            raise InputError(f"{path} is damaged: its details are not as written; {_ADVICE}")
        triggers = None
        if "trigger_directions" in arrays:
            triggers = FoundTriggers(arrays["trigger_directions"], trigger_of(arrays, "s"))
        return cls(
            values=arrays["values"],
            success_rate=arrays["success_rate"],
            class_names=tuple(str(name) for name in arrays["class_names"]),
            **{name: arrays.get(name) for name in _OPTIONAL},
            triggers=triggers,
            details=details,
        )

    def __str__(self) -> str:
        """Return a table (up to 20 classes) and a summary line.

        With lower ends, a cell is [lower, distance].
        """
        summary = (
            f"average {_noun(self)} {_mean(self)} over {self.found.sum()} directions, "
            f"no trigger found in {self.num_failures()}"
        )
        if self.lower is not None:
            summary += f"; proven lower ends, average {self.average_lower():.2f}"
        k = self.num_classes
        if self.num_classes > 20:
            lines = [
                f"{self.class_names[a]} -> {self.class_names[b]}: {self._cell(a, b)}"
                for a, b in self.smallest(10)
            ]
            return "\n".join([f"smallest {_noun(self, 2)}:", *lines, summary])
        cells = [[self._cell(a, b) for b in range(k)] for a in range(k)]
        widest = max(len(cell) for row in cells for cell in row)
        width = max(8, widest + 1, *(len(name) + 1 for name in self.class_names))
        header = "victim \\ target".ljust(max(15, width)) + "".join(
            name.rjust(width) for name in self.class_names
        )
        rows = [
            name.ljust(max(15, width)) + "".join(cell.rjust(width) for cell in row)
            for name, row in zip(self.class_names, cells, strict=True)
        ]
        return "\n".join([header, *rows, summary])

    def _cell(self, row: int, column: int) -> str:
        """Return a distance as the table shows it, with its proven lower end if that is known."""
        shown = _cell(self.values[row, column])
        if self.lower is None or np.isnan(self.lower[row, column]):
            return shown
        return f"[{_lower(self.lower[row, column])}, {shown}]"


_ADVICE = "move it away, and the command that measured it makes it again"
_OPTIONAL = ("share_there", "values_per_seed", "values_per_search", "changed_pixels", "lower")
_TRIGGERS = ("trigger_directions", *(f"{name}s" for name in TRIGGER_LAYOUT))
_LAYOUT = {
    "values": ("f", ("K", "K")),
    "success_rate": ("f", ("K", "K")),
    "class_names": ("U", ("K",)),
    "details": ("U", ()),
    "share_there": ("f", ("K", "K")),
    "values_per_seed": ("f", ("S", "K", "K")),
    "values_per_search": ("f", ("R", "K", "K")),
    "changed_pixels": ("f", ("K", "K")),
    "lower": ("f", ("K", "K")),
    "trigger_directions": ("iu", ("M", 2)),
    **{f"{name}s": layout for name, layout in TRIGGER_LAYOUT.items()},
}


# What is compared, of all that a file says of how it was measured.
_DETAILS = {
    "success_bound": float,
    "images": list[str | None] | None,
    "inversion": str,
    "selection": dict,
    "classes": list[int],
}


def _details(arrays: dict[str, np.ndarray]) -> dict | None:
    """Return what a file says of how it was measured, None if that is not readable."""
    try:
        details = json.loads(str(arrays.get("details", "{}")), object_pairs_hook=unique_fields)
    except (ValueError, RecursionError):
        return None
    if not isinstance(details, dict):
        return None
    known = {name: details[name] for name in _DETAILS if name in details}
    if not all(is_of(value, _DETAILS[name]) for name, value in known.items()):
        return None
    images = known.get("images")
    return details if images is None or len(images) == len(arrays["values"]) else None


def _mean(matrix: DistanceMatrix, digits: int = 2) -> str:
    return f"{matrix.average():.{digits}f}" if matrix.found.any() else "none found"


def _noun(matrix: DistanceMatrix, count: int = 1) -> str:
    """What an entry of the matrix is called, or several are."""
    if matrix.unit == "changed pixels":
        return "number of changed pixels" if count == 1 else "numbers of changed pixels"
    return "distance" if count == 1 else "distances"


def _cell(value: float) -> str:
    return "." if np.isnan(value) else "none" if np.isinf(value) else f"{value:.1f}"


def _lower(value: float) -> str:
    """Return a proven lower end, rounded down."""
    return "none" if np.isinf(value) else f"{np.floor(10 * value) / 10:.1f}"


# What a distance depends on besides the method and the images.
_BUDGET = ("num_steps", "minibatch_size", "mask_weight", "seeds")


def _check_comparable(before: DistanceMatrix, after: DistanceMatrix, rows: np.ndarray) -> None:
    """Raise `InputError` for matrices of other units, methods, or images of `rows`."""
    if before.unit != after.unit:
        raise InputError(
            f"one of the two matrices is in {before.unit} and the other in {after.unit}; take both "
            "as they were measured, or both by in_changed_pixels()"
        )
    methods = [matrix.details.get("inversion") for matrix in (before, after)]
    if None not in methods and methods[0] != methods[1]:
        raise InputError(
            f"the two matrices were measured by different methods, {methods[0]} and {methods[1]}; "
            "measure both by one"
        )
    theirs, ours = (matrix.details.get("images") for matrix in (before, after))
    if theirs is None or ours is None:
        return
    other = [before.class_names[k] for k in rows if theirs[k] != ours[k]]
    if other:
        counts = [matrix.details.get("num_images") for matrix in (before, after)]
        told = f" ({counts[0]} and {counts[1]} of a class)" if counts[0] != counts[1] else ""
        raise InputError(
            f"the two matrices were measured on different images{told} of {listed(other)}; measure "
            "both on the same"
        )


def _warn_of_differences(before: DistanceMatrix, after: DistanceMatrix) -> None:
    """Warn of matrices of different budgets, or that do not tell how they were measured."""
    unknown = [
        what
        for what, name in (("by which method", "inversion"), ("on which images", "images"))
        if not all(matrix.details.get(name) for matrix in (before, after))
    ]
    if unknown:
        warnings.warn(
            f"a matrix does not tell {' and '.join(unknown)} it was measured: the increase means "
            "something only if both are alike in that; measure them again to be sure",
            stacklevel=3,
        )
    given = [
        {name: matrix.details[name] for name in _BUDGET if name in matrix.details}
        for matrix in (before, after)
    ]
    differing = [
        f"{name} {given[0][name]} and {given[1][name]}"
        for name in given[0]
        if name in given[1] and given[0][name] != given[1][name]
    ]
    if differing:
        warnings.warn(
            f"the two matrices were measured with different budgets ({', '.join(differing)}): part "
            "of the increase may come from that",
            stacklevel=3,
        )


def increase_per_direction(before: DistanceMatrix, after: DistanceMatrix) -> np.ndarray:
    """Return [K, K] of (after - before) / before; NaN unless a trigger was found in both.

    Raises:
      InputError: the matrices are of different classes, methods or images, or have no measured
        direction in common.
    """
    if before.class_names != after.class_names:
        raise InputError(
            "the two matrices are of different classes: "
            f"{', '.join(before.class_names)} and {', '.join(after.class_names)}"
        )
    measured = [~np.isnan(matrix.values) for matrix in (before, after)]
    if not (measured[0] & measured[1]).any() and any(mask.any() for mask in measured):
        raise InputError(
            "the two matrices have no direction in common: they are of different samples; measure "
            "both in the same directions"
        )
    _check_comparable(before, after, np.flatnonzero((measured[0] & measured[1]).any(1)))
    both = before.found & after.found & (before.values > 0)
    start = np.where(both, before.values, np.nan)
    return (np.where(both, after.values, np.nan) - start) / start


def relative_increase(before: DistanceMatrix, after: DistanceMatrix) -> float:
    """Return the paper's "increase": the mean over directions of (after - before) / before.

    It is a mean of ratios, over the directions where both measurements found a trigger; NaN if
    there is none. Raises `InputError` as `increase_per_direction`, and warns where the matrices are
    of different budgets or do not tell how they were measured.
    """
    change = increase_per_direction(before, after)
    _warn_of_differences(before, after)
    return float(np.nanmean(change)) if np.isfinite(change).any() else float("nan")


def increase_interval(before: DistanceMatrix, after: DistanceMatrix) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the increase; None if it is not of a sample.

    Note: it is cut at -1, as no distance falls by more than all of it.
    """
    chosen = before.details.get("selection", {})
    if chosen.get("kind") != "sample":
        return None
    change = increase_per_direction(before, after)
    ends = mean_interval(change[np.isfinite(change)], before.num_measured(), chosen["of"])
    return _cut_below(-1.0, ends)


def _cut_below(least: float, ends: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if ends is None else (max(least, ends[0]), ends[1])
