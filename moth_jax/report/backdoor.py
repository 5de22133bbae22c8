"""The planted backdoor: how often it works on each class, and what stamped images look like."""

from collections.abc import Mapping, Sequence

import numpy as np

from moth_jax.report import formatting as fmt
from moth_jax.report.gallery import picture

# A class name, and one of its test images [h, w, c] in [0, 1] clean and stamped.
StampedExample = tuple[str, np.ndarray, np.ndarray]


def backdoor_section(summary: Mapping, examples: Sequence[StampedExample]) -> str:
    """Return the section on `summary["backdoor"]`, "" if there is none."""
    backdoor = summary.get("backdoor")
    if not backdoor:
        return ""
    text = (
        "<p>The attack success rate is the share of a victim's test images that are classified as "
        f"<strong>{fmt.escape(backdoor['target'])}</strong> once they are stamped "
        f"({fmt.escape(backdoor['kind'])}). A model without a backdoor has one above 0, too: of "
        "images that it takes for the target anyway, and of those that the trigger spoils.</p>"
    )
    return fmt.section("Backdoor", text, _pictures(examples), _rates(summary))


def _pictures(examples: Sequence[StampedExample]) -> str:
    if not examples:
        return ""
    names, clean, stamped = zip(*examples, strict=True)
    rows = []
    for heading, images in (("Clean", clean), ("Stamped", stamped)):
        cells = [
            f'<span class="label">{fmt.escape(name)}</span>'
            + picture(image, f"an image of class {name}, {heading.lower()}")
            for name, image in zip(names, images, strict=True)
        ]
        rows.append(fmt.row(f"<strong>{heading}</strong>", cells))
    headers = ["", *map(fmt.escape, names)]
    return fmt.table("Test images of victims", headers, rows, css="gallery")


def _rates(summary: Mapping) -> str:
    columns = {
        when: rates
        for when in ("before", "after")
        if (rates := summary.get(f"attack_success_per_class_{when}"))
    }
    rows = [
        fmt.row(fmt.escape(name), [fmt.percent(rates.get(name)) for rates in columns.values()])
        for name in next(iter(columns.values()), {})
    ]
    for label, figure in (
        ("all victims", "attack_success"),
        ("other classes", "attack_success_others"),
    ):
        if fmt.is_number(summary.get(f"{figure}_before")):
            cells = [fmt.percent(summary.get(f"{figure}_{when}")) for when in columns]
            rows.append(fmt.row(f"<strong>{label}</strong>", cells))
    headers = ["Victim", *(f"{when.capitalize()} hardening" for when in columns)]
    if len(columns) == 1:
        headers[1] = "Attack success"
    return fmt.table("Attack success rate", headers, rows, css="pairs")
