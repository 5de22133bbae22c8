"""The types that every part of the package speaks of."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array

# An array on a device or on the host.
AnyArray = Array | np.ndarray
# The variables of a model: any pytree of arrays that its functions take. Those of a `Classifier`
# are {"params": ..., "batch_stats": ...}, each a flat dict of arrays by name.
Variables = Any
# Images [n, h, w, c] in [0, 1] to logits [n, K], in inference mode, normalisation inside.
LogitsFn = Callable[[Variables, Array], Array]
# The same in training mode; also returns the variables with the statistics of the batch moved in.
TrainFn = Callable[[Variables, Array], tuple[Array, Variables]]
# Height, width and channels of an image.
ImageShape = tuple[int, int, int]
