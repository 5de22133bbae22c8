"""A digest of a model's weights, by which results know the model that they are of."""

import hashlib
import json

import numpy as np

from moth_jax.models.classifier import flat
from moth_jax.types import Variables


def weights_digest(variables: Variables) -> str:
    """Return the SHA-256 of all arrays: their names, dtypes, shapes and numbers, in order of names.

    The order in which they are kept does not count, nor which devices hold them.

    >>> ones, twos = np.ones(2, np.float32), np.full(2, 2, np.float32)
    >>> one, other = weights_digest({"a": ones, "b": twos}), weights_digest({"b": twos, "a": ones})
    >>> one == other, one == weights_digest({"a": twos, "b": ones}), len(one)
    (True, False, 64)
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(flat(variables).items()):
        array = np.asarray(leaf)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
