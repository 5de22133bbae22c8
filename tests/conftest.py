"""What all tests share: strict broadcasting, and the folder of real data and checkpoints."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

# A forgotten axis is an error here, not a silently larger array.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared():
    """The folder of real data and published checkpoints, which is not part of the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("MOTH_JAX_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set MOTH_JAX_SHARED")
    return folder


@pytest.fixture(scope="session")
def cifar10_test(shared):
    """The 1,017 CIFAR-10 test images [n, 32, 32, 3] in [0,1], float32, and their labels."""
    import tensorflow_datasets as tfds

    folder = str(shared / "data" / "tfds")
    source = tfds.data_source("cifar10", split="test", data_dir=folder, download=False)
    records = source.__getitems__(range(len(source)))
    images = np.stack([record["image"] for record in records])
    return images.astype(np.float32) / 255, np.array([record["label"] for record in records])
