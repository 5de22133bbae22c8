"""The triggers of a few directions as pictures: what makes one class pass as another."""

import base64
import io
import math
from collections.abc import Sequence

import numpy as np

from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.report.formatting import MISSING, arrow, escape, percent, row, size, table
from moth_jax.triggers import AnyTrigger, stamp

_NEUTRAL = 0.5  # a trigger alone is shown on mid-grey
_MAX_SIDE = 112  # pixels; larger images are reduced, to keep the page small


def gallery(
    caption: str,
    directions: Sequence[tuple[int, int]],
    before: DistanceMatrix,
    after: DistanceMatrix | None,
    examples: np.ndarray | None,
) -> str:
    """Return a table with a row of pictures for each of `directions` (victim, target).

    Args:
      caption: of the table.
      directions: the rows.
      before, after: where the sizes and the triggers come from.
      examples: [K, h, w, c] in [0, 1], one image of each class, or None.
    """
    matrices = {"": before} if after is None else {" before": before, " after": after}
    headers = ["Direction", "Victim"]
    headers += [f"{what}{when}" for when in matrices for what in ("Trigger", "Stamped")]
    headers.append("Target")
    rows = [_row(a, b, matrices, headers, examples) for a, b in directions]
    return table(caption, headers, rows, css="gallery")


def _row(
    victim: int,
    target: int,
    matrices: dict[str, DistanceMatrix],
    headers: Sequence[str],
    examples: np.ndarray | None,
) -> str:
    names = next(iter(matrices.values())).class_names
    example = [None] * len(names) if examples is None else examples
    cells = [picture(example[victim], f"an image of class {names[victim]}")]
    sizes = []
    for when, matrix in matrices.items():
        trigger = matrix.trigger(victim, target)
        what = f"{names[victim]} to {names[target]}{when}"
        cells.append(picture(alone(trigger), f"the trigger from {what}"))
        cells.append(picture(stamped_by(example[victim], trigger), f"a victim stamped, {what}"))
        sizes.append(_size_line(when.strip(), matrix, victim, target))
    cells.append(picture(example[target], f"an image of class {names[target]}"))
    cells = [
        f'<span class="label">{escape(header)}</span>{cell}'
        for header, cell in zip(headers[1:], cells, strict=True)
    ]
    heading = f"<strong>{arrow(names[victim], names[target])}</strong>{''.join(sizes)}"
    return row(heading, cells)


def _size_line(when: str, matrix: DistanceMatrix, victim: int, target: int) -> str:
    value = float(matrix.values[victim, target])
    parts = [f"<b>{escape(size(value))}</b>"]
    if np.isfinite(value):
        trigger = matrix.trigger(victim, target)
        if trigger is not None:
            parts.append(f"{percent(value / math.prod(trigger.image_shape))} of the image")
        if matrix.changed_pixels is not None and np.isfinite(matrix.changed_pixels[victim, target]):
            parts.append(f"{int(matrix.changed_pixels[victim, target])} pixels changed")
        parts.append(f"{percent(float(matrix.success_rate[victim, target]), 0)} of victims")
    if matrix.is_there()[victim, target]:
        parts.append("predicted so without a trigger")
    return f'<span class="size">{escape(when)} {" · ".join(parts)}</span>'


def alone(trigger: AnyTrigger | None) -> np.ndarray | None:
    """The trigger, stamped on a grey image."""
    if trigger is None:
        return None
    return np.asarray(stamp(np.full(trigger.image_shape, _NEUTRAL, np.float32), trigger))


def stamped_by(image: np.ndarray | None, trigger: AnyTrigger | None) -> np.ndarray | None:
    """The image with the trigger, None if either is."""
    return None if image is None or trigger is None else np.asarray(stamp(image, trigger))


def picture(image: np.ndarray | None, alt: str) -> str:
    """An image [h, w, c] in [0, 1] in HTML; a dash for None."""
    if image is None:
        return f'<span class="nothing">{MISSING}</span>'
    return f'<img src="{png_uri(image)}" alt="{escape(alt)}">'


def png_uri(image: np.ndarray) -> str:
    """Return an image [h, w, c] in [0, 1] as a data URI; channels are averaged unless 1 or 3."""
    from PIL import Image

    step = -(-max(image.shape[:2]) // _MAX_SIDE)
    h, w, c = (image.shape[0] // step, image.shape[1] // step, image.shape[2])
    image = image[: h * step, : w * step].reshape(h, step, w, step, c).mean((1, 3))
    if c == 1:
        image = image[..., 0]
    elif c != 3:
        image = image.mean(-1)
    pixels = np.round(255 * np.clip(image, 0.0, 1.0)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
