"""The scan: the verdict, its evidence arm by arm, and the most suspicious triggers as pictures."""

from collections.abc import Mapping

import numpy as np

from moth_jax.report import formatting as fmt
from moth_jax.report.gallery import alone, picture, stamped_by
from moth_jax.scanning import SCANNERS, Arm, Scan

_MAX_ROWS = 20
_MAX_PICTURES = 4


def verdict_sentence(scan: Scan) -> str:
    """Return the verdict with its evidence as a sentence."""
    verdict = scan.describe().splitlines()[0].replace(" %", "\u00a0%")
    return f"{'Scan: ' if scan.poisoned is None else 'The model '}{verdict}."


def scan_section(scan: Scan | None, examples: Mapping[str, np.ndarray]) -> str:
    """Return the section on a scan, "" if there is none.

    Args:
      scan: the result.
      examples: an image [h, w, c] in [0, 1] of each class, by name.
    """
    if scan is None:
        return ""
    cost = fmt.escape(scan.describe().splitlines()[1])
    parts = [f"<p><strong>{fmt.escape(verdict_sentence(scan))}</strong></p>"]
    parts.append(f"<p>{fmt.escape(SCANNERS[scan.method].explanation)}</p>\n<p>{cost}.</p>")
    if scan.arms:
        parts.append(_table(scan))
    shown = [i for i in scan.ranked() if scan.trigger(i) is not None][:_MAX_PICTURES]
    if shown:
        rows = [_pictures(scan, i, examples) for i in shown]
        caption = f"The {len(shown)} most suspicious triggers"
        parts.append(fmt.table(caption, ["Way", *_PICTURED], rows, css="gallery"))
    return fmt.section("Scan", *parts)


def _table(scan: Scan) -> str:
    numbers = {
        "Anomaly index": "anomaly_index",
        "Way back / way": "ratio",
        "Suspicion": "suspicion",
    }
    arms = [scan.arms[i] for i in scan.ranked()]
    if not np.isnan([arm.anomaly_index for arm in arms]).all():
        del numbers["Suspicion"]  # it is the same
    columns = {
        heading: name
        for heading, name in numbers.items()
        if not np.isnan([getattr(arm, name) for arm in arms]).all()
    }
    flagged = {id(scan.arms[i]) for i in scan.flagged()}
    rows = []
    for arm in arms[:_MAX_ROWS]:
        cells = [fmt.size(arm.size), fmt.percent(_known(arm.relative_size), 2)]
        cells.append(fmt.percent(arm.success_rate if arm.found else None))
        cells += [_number(getattr(arm, name)) for name in columns.values()]
        name = f"<strong>{_way(arm)}</strong> suspect" if id(arm) in flagged else _way(arm)
        name += " (predicted so without a trigger)" if arm.there else ""
        rows.append(fmt.row(name, [fmt.escape(cell) for cell in cells]))
    headers = ["Way", "Size", "Of the image", "Success", *columns]
    caption = "All arms" if len(arms) <= _MAX_ROWS else f"The first {_MAX_ROWS} of {len(arms)} arms"
    return fmt.table(f"{caption}, the most suspicious first", headers, rows, css="pairs arms")


def _way(arm: Arm) -> str:
    return fmt.arrow(arm.victim, arm.target)


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _number(value: float) -> str:
    return (
        "∞" if np.isposinf(value) else f"{value:.2f}".replace("-", "−") if value == value else "–"
    )


_PICTURED = ("Victim", "Trigger", "Stamped", "Target")


def _pictures(scan: Scan, index: int, examples: Mapping[str, np.ndarray]) -> str:
    arm, trigger = scan.arms[index], scan.trigger(index)
    # Any class but the target will do for a universal trigger.
    others = (name for name in examples if name != arm.target)
    name = arm.victim if arm.victim in examples else next(others, arm.victim)
    victim = examples.get(name)
    way = f"from {arm.victim} to {arm.target}"
    pictures = [
        picture(victim, f"an image of class {name}"),
        picture(alone(trigger), f"the trigger {way}"),
        picture(stamped_by(victim, trigger), f"a victim stamped, {way}"),
        picture(examples.get(arm.target), f"an image of class {arm.target}"),
    ]
    cells = [
        f'<span class="label">{header}</span>{cell}'
        for header, cell in zip(_PICTURED, pictures, strict=True)
    ]
    size = f"<b>{fmt.size(arm.size)}</b> · {fmt.percent(arm.relative_size, 2)} of the image"
    return fmt.row(f'<strong>{_way(arm)}</strong><span class="size">{size}</span>', cells)
