"""Whether the numbers of a model can be those of a trained one."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moth_jax.errors import InputError, listed

_VARIANCES = ("running_var", "moving_variance", ".var")  # of PyTorch, Keras and this package


def check_values(
    arrays: Mapping[str, Any], source: object, *, advice: str = "a diverged or damaged model"
) -> None:
    """Raise `InputError` naming the arrays that are complex, NaN, infinite or negative variances.

    One pass over the numbers.

    >>> check_values({"bn.running_var": np.array([1.0, -1.0])}, "w.pt")
    Traceback (most recent call last):
    ...
    moth_jax.errors.InputError: w.pt has a negative variance in bn.running_var (-1); a diverged \
or damaged model
    """
    named = {name: np.asarray(array) for name, array in arrays.items()}
    faulty = [name for name, array in named.items() if array.dtype.kind == "c"]
    if faulty:
        raise InputError(
            f"{source} has complex numbers in {listed(faulty, str)}; a classifier here has real "
            "weights"
        )
    faulty = sorted(name for name, array in named.items() if not np.isfinite(array).all())
    if faulty:
        raise InputError(f"{source} has NaN or infinite weights in {listed(faulty, str)}; {advice}")
    for name, array in named.items():
        if name.endswith(_VARIANCES) and array.size and array.min() < 0:
            raise InputError(
                f"{source} has a negative variance in {name} ({array.min():.8g}); {advice}"
            )
