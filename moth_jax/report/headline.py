"""The top of the report: the result in a sentence, the figures, and what they mean."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.report import formatting as fmt
from moth_jax.triggers import AddedTrigger

_MAX_COLUMNS = 5


def verdict(summary: Mapping, before: DistanceMatrix | None, after: DistanceMatrix | None) -> str:
    """The result in one sentence; "" where nothing is known."""
    if before is None:
        return _without_distances(summary)
    accuracy, accuracy_after = summary.get("accuracy_before"), summary.get("accuracy_after")
    matrices = [before] if after is None else [before, after]
    if not any(matrix.found.any() for matrix in matrices):
        return f"No trigger was found in any of {before.num_measured()} directions."
    if after is None:
        known = f", and its test accuracy is {fmt.percent(accuracy)}" if accuracy else ""
        of = _of(before)
        return f"The mean class distance of this model{of} is {fmt.size(before.average())}{known}."
    start, end = before.average(), after.average()
    verb = "raised" if end > start else "lowered" if end < start else "took"
    change = f"from {average(before)} to {average(after)}"
    if average(before) == average(after):
        verb, change = "left", f"at {average(before)}"
    cost = ""
    if fmt.is_number(accuracy) and fmt.is_number(accuracy_after):
        cost = (
            f", while test accuracy went from {fmt.percent(accuracy)} to "
            f"{fmt.percent(accuracy_after)}"
        )
    return f"{_hardening(summary)} {verb} the mean class distance{_of(before)} {change}{cost}."


def _hardening(summary: Mapping) -> str:
    """What was done to the model; a method other than MOTH is named."""
    method = summary.get("method") or "moth"
    return "Hardening" if method == "moth" else f"Hardening ({method})"


def _without_distances(summary: Mapping) -> str:
    """The verdict on a model that was trained, and perhaps hardened, but not measured."""
    accuracy, attack = (
        [summary.get(f"{name}_{when}") for when in ("before", "after")]
        for name in ("accuracy", "attack_success")
    )
    if not fmt.is_number(accuracy[0]):
        return ""
    has_backdoor = fmt.is_number(attack[0])
    if fmt.is_number(accuracy[1]):
        change = " to ".join(map(fmt.percent, accuracy))
        backdoor = f", attack success from {' to '.join(map(fmt.percent, attack))}"
        changes = f"test accuracy from {change}{backdoor if has_backdoor else ''}"
        return f"{_hardening(summary)} took {changes}."
    backdoor = f", the attack success rate of its backdoor {fmt.percent(attack[0])}"
    known = f"{fmt.percent(accuracy[0])}{backdoor if has_backdoor else ''}"
    return f"The test accuracy of this model is {known}."


def _of(matrix: DistanceMatrix) -> str:
    """The chosen directions, in brackets; "" if all were measured."""
    return "" if matrix.is_whole else f" ({matrix.choice()})"


def _sure(matrices: list[DistanceMatrix]) -> str:
    """The confidence intervals of the mean distances of samples."""
    intervals = [matrix.interval() for matrix in matrices]
    known = [_ends(interval, fmt.size) for interval in intervals if interval is not None]
    if not known or len(known) < len(intervals):
        return ""
    return f"; 95 % interval {' → '.join(known)}"


def _changed(matrices: list[DistanceMatrix]) -> str:
    """How many pixels the triggers change on average; "" where that is not known."""
    numbers = [changed_pixels(matrix) for matrix in matrices]
    if not numbers or "" in numbers:
        return ""
    return f"; {' → '.join(numbers)} pixels changed"


def changed_pixels(matrix: DistanceMatrix) -> str:
    """How many pixels the triggers of a matrix change on average; "" where that is not known."""
    if matrix.changed_pixels is None or not np.isfinite(matrix.changed_pixels).any():
        return ""
    return fmt.size(matrix.in_changed_pixels().average())


def _ends(interval: Sequence[float], show: Callable[[float], str]) -> str:
    return " to ".join(map(show, interval))


def _increase_note(interval) -> str:
    note = "mean over directions of (after − before) / before"
    if interval is None:
        return note
    return f"{note}; 95 % interval {_ends(interval, partial(fmt.percent, sign=True))}"


def average(matrix: DistanceMatrix) -> str:
    """The average distance, or that there is none."""
    return fmt.size(matrix.average()) if matrix.found.any() else "none found"


def tiles(summary: Mapping, before: DistanceMatrix | None, after: DistanceMatrix | None) -> str:
    """The figures a reader looks for, in HTML; those that are not known are left out.

    They fill as few rows as a wide screen allows, evenly.
    """
    hardened = after is not None or fmt.is_number(summary.get("accuracy_after"))
    matrices = [matrix for matrix in (before, after) if matrix is not None]
    averages = [average(matrix) for matrix in matrices] or [fmt.MISSING]
    failures = [str(matrix.num_failures()) for matrix in matrices] or [fmt.MISSING]
    measured = 0 if before is None else before.num_measured()
    increase = fmt.percent(summary.get("increase"), sign=True)
    entries = [
        _accuracy_tile("Test accuracy", "accuracy", summary, hardened),
        _accuracy_tile("On the chosen classes", "accuracy_chosen", summary, hardened),
        _accuracy_tile("On the other classes", "accuracy_others", summary, hardened),
        _accuracy_tile("Robustness (PGD)", "robustness", summary, hardened),
        _accuracy_tile("Attack success", "attack_success", summary, hardened),
        _accuracy_tile("Attack success on others", "attack_success_others", summary, hardened),
        _scan_tile(summary.get("scan")),
        (
            "Mean class distance",
            fmt.arrow(*averages),
            f"aggregated pixels{_sure(matrices)}{_changed(matrices)}",
        ),
        _lower_tile(matrices),
        ("Increase", increase, _increase_note(summary.get("increase_interval"))),
        ("No trigger found", fmt.arrow(*failures), f"in {measured} directions"),
        ("Training took", fmt.duration(summary.get("training_seconds")), None),
        _time_tile(summary.get("harden_seconds"), _times(summary.get("distance_seconds"))),
    ]
    known = [entry for entry in entries if entry[1] != fmt.MISSING]
    rows = -(-len(known) // _MAX_COLUMNS) or 1
    shown = "\n".join(
        f'<div class="tile"><dt>{label}</dt><dd>{value}</dd>'
        + (f'<dd class="note">{note}</dd>' if note else "")
        + "</div>"
        for label, value, note in known
    )
    columns = -(-len(known) // rows) or 1
    return f'<dl class="tiles" style="--columns: {columns}">\n{shown}\n</dl>'


def _lower_tile(matrices: list[DistanceMatrix]) -> tuple[str, str, str | None]:
    """The mean proven lower end of the distances, before and after."""
    means = [mean for matrix in matrices if (mean := matrix.average_lower()) is not None]
    if not means or len(means) < len(matrices):
        return "Proven lower end", fmt.MISSING, None
    shown = fmt.arrow(*map(fmt.size, means))
    return "Proven lower end", shown, "mean; no static trigger is smaller"


def _accuracy_tile(
    label: str, name: str, summary: Mapping, hardened: bool
) -> tuple[str, str, str | None]:
    """The tile of `name`_before and `name`_after of the summary."""
    accuracy, accuracy_after = summary.get(f"{name}_before"), summary.get(f"{name}_after")
    if not fmt.is_number(accuracy):
        return label, fmt.MISSING, None
    if not hardened:
        return label, fmt.arrow(fmt.percent(accuracy)), None
    change = None
    if fmt.is_number(accuracy_after):
        change = f"{100 * (accuracy_after - accuracy):+.1f} points".replace("-", "−")
    start = fmt.percent(accuracy).removesuffix("\u00a0%")  # the unit is said once
    return label, fmt.arrow(start, fmt.percent(accuracy_after)), change


def _scan_tile(scan) -> tuple[str, str, str | None]:
    if not scan:
        return "Scan", fmt.MISSING, None
    numbers = [
        scan["statistic_name"],
        f"{scan['statistic']:.2g}" if fmt.is_number(scan["statistic"]) else "undefined",
        f"(threshold {scan['threshold']:.3g})",
    ]
    return "Scan", scan["verdict"], " ".join(numbers)


def _time_tile(harden_seconds, measuring: str) -> tuple[str, str, str | None]:
    if not fmt.is_number(harden_seconds):
        return "Measuring took", measuring, None
    note = None if measuring == fmt.MISSING else f"measuring {measuring}"
    return "Hardening took", fmt.duration(harden_seconds), note


def _times(seconds) -> str:
    """One duration, or those of before and after."""
    if isinstance(seconds, Mapping):
        seconds = list(seconds.values()) or None
    if isinstance(seconds, list) and len(seconds) == 2:
        return " + ".join(map(fmt.duration, seconds))
    return fmt.duration(
        sum(filter(fmt.is_number, seconds)) if isinstance(seconds, list) else seconds
    )


def explanation(before: DistanceMatrix, examples: np.ndarray | None) -> str:
    """What a class distance is, and how to read it."""
    known = before.triggers.trigger.image_shape if before.triggers is not None else None
    known = known if examples is None else examples.shape[1:]
    largest = ""
    if known is not None:
        shape, pixels = "×".join(map(str, known)), math.prod(known)
        largest = f"; a trigger that replaces a whole image of {shape} has size {pixels:,}"
    what, size = "one mask and one pattern for every image", "the mask"
    if before.triggers is not None and isinstance(before.triggers.trigger, AddedTrigger):
        what = "added alike to every image, which stays within black and white"
        size = "the mask that would be needed to change the images as much"
    return (
        "The class distance from a victim class to a target class is the size of the smallest "
        f"trigger – {what} – that makes the model take nearly all "
        f"images of the victim (90 % in the paper) for the target. The size is {size} summed over "
        f"all pixels and channels{largest}. A small distance is a weak spot: there little has to "
        "change for one class to pass as the other, so larger is safer. Every number belongs to a "
        "trigger that was found and verified, and is therefore an upper bound."
        + ("" if before.lower is None else _LOWER)
    )


_LOWER = " The number after ≥ is proven: no static trigger that sends as many images is smaller."
