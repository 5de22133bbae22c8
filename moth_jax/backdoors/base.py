"""What a backdoor is: a stamp, the class it leads to, and the classes it works on."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moth_jax.errors import InputError, require_choice
from moth_jax.types import ImageShape

# Images float32 [n, h, w, c] in [0, 1] -> stamped images of the same shape and type. An image is
# always stamped alike, whichever others are with it.
Stamp = Callable[[np.ndarray], np.ndarray]

# Where a trigger lies: (row, column) as shares of the room that is left.
POSITIONS = {
    "top left": (0.0, 0.0),
    "top right": (0.0, 1.0),
    "center": (0.5, 0.5),
    "bottom left": (1.0, 0.0),
    "bottom right": (1.0, 1.0),
}


@dataclass(frozen=True)
class Backdoor:
    """Stamped images of the victims are to be classified as the target.

    Attributes:
      stamp: what is done to an image.
      target: the class, a label.
      victims: labels; () is a universal backdoor, whose victims are all classes but the target.
      kind: name of the attack, for messages and reports.

    Example:
      >>> Backdoor(lambda images: images, target=2).is_victim(np.array([0, 1, 2]))
      array([ True,  True, False])
    """

    stamp: Stamp
    target: int
    victims: tuple[int, ...] = ()
    kind: str = ""

    def __post_init__(self):
        if self.target in self.victims:
            raise InputError(
                f"the target of a backdoor cannot be among its victims, got target {self.target} "
                f"and victims {self.victims}"
            )

    @property
    def label_specific(self) -> bool:
        """Whether it is meant for some classes only."""
        return bool(self.victims)

    def is_victim(self, labels: np.ndarray) -> np.ndarray:
        """For each label [n] whether images of it are to be misclassified, bool [n]."""
        labels = np.asarray(labels)
        return np.isin(labels, self.victims) if self.victims else labels != self.target


def corner(
    position: str, size: tuple[int, int], image_shape: ImageShape, *, margin: int = 0
) -> tuple[int, int]:
    """Return (top, left) of a trigger of `size` (h, w), `margin` pixels away from the border.

    >>> corner("bottom right", (3, 3), (32, 32, 3), margin=1)
    (28, 28)
    """
    require_choice("position", position, POSITIONS)
    require_whole("margin", margin, at_least=0)
    room = [image_shape[axis] - size[axis] - 2 * margin for axis in (0, 1)]
    if min(room) < 0:
        beside = f" with {margin} pixels on each side" if margin else ""
        raise InputError(
            f"a trigger of {size[0]} x {size[1]} pixels{beside} does not fit into images of "
            f"{image_shape[0]} x {image_shape[1]}; make it smaller"
        )
    down, right = POSITIONS[position]
    return margin + round(down * room[0]), margin + round(right * room[1])


def require_whole(what: str, value, *, at_least: int) -> None:
    """Raise `InputError` unless `value` is a whole number of `at_least` that or more."""
    if not isinstance(value, int | np.integer) or value < at_least:
        raise InputError(f"{what} must be a whole number of at least {at_least}, got {value!r}")


def require_share(what: str, value, *, low: float = 0.0, high: float = 1.0) -> None:
    """Raise `InputError` unless `value` is above `low` (or at it, if it is not 0), up to `high`."""
    if not (low <= value <= high and value > 0):
        bracket = "[" if low else "("
        raise InputError(f"{what} must be in {bracket}{low:g}, {high:g}], got {value}")


def as_colour(colour, image_shape: ImageShape) -> np.ndarray:
    """Return `colour` as float32 [c]; one number in [0, 1] for each channel."""
    values = np.asarray(colour, np.float32)
    if values.shape != (image_shape[2],) or not ((values >= 0) & (values <= 1)).all():
        raise InputError(
            f"colour must be {image_shape[2]} numbers in [0, 1], one per channel, got {colour}; "
            "() draws it from the seed"
        )
    return values
