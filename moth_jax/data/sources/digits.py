"""Handwritten digits that come with scikit-learn: 1,797 images of 8 x 8, no download."""

from typing import Any

import numpy as np

from moth_jax.data.building import Share, build_dataset
from moth_jax.data.dataset import ImageDataset
from moth_jax.data.splitting import split_validation

# The test part is the same for every seed: a seed may only change what is trained on.
_TEST_FRACTION, _TEST_SEED = 0.2, 0


def load_digits(*, validation_fraction: float = 0.1, seed: int = 0) -> ImageDataset:
    """Images [8, 8, 1] of the digits 0 to 9; a fifth of each class is the test part.

    Args:
      validation_fraction: share of the other four fifths kept for validation.
      seed: of the choice of the validation part.

    Example:
      >>> data = load_digits()
      >>> data.image_shape, len(data.train), len(data.validation), len(data.test)
      ((8, 8, 1), 1295, 143, 359)
    """
    import sklearn.datasets

    bunch: Any = sklearn.datasets.load_digits()
    images = (bunch.images[..., None] / 16).astype(np.float32)
    train, test = split_validation(bunch.target, _TEST_FRACTION, _TEST_SEED)
    return build_dataset(
        "digits",
        (images[train], bunch.target[train]),
        (images[test], bunch.target[test]),
        class_names=[str(name) for name in bunch.target_names],
        validation=Share(validation_fraction, seed),
    )
