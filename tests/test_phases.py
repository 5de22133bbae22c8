"""What hardening may see, and what it tells those who watch."""

import numpy as np
import pytest
from toys import RecordedProgress, linear_classifier, row_dataset, row_variables

from moth_jax import checkpoints
from moth_jax.configuration import default_config
from moth_jax.data import ImageSplit
from moth_jax.phases import clean_part, measure

DATASET = row_dataset((40, 20, 3))


def part(share, seed=0):
    config = default_config()
    config.clean_share, config.seed = share, seed
    return clean_part(config, DATASET)


@pytest.mark.parametrize(("share", "counts"), [(0.5, [20, 10, 2]), (0.05, [2, 1, 1])])
def test_a_clean_share_is_one_of_each_class_and_never_none(share, counts):
    given = part(share)
    assert np.bincount(given.train.labels).tolist() == counts
    assert given.validation is DATASET.validation
    assert given.test is DATASET.test
    all_images = {image.tobytes() for image in DATASET.train.batch(np.arange(63))}
    assert {image.tobytes() for image in given.train.batch(np.arange(sum(counts)))} <= all_images


def test_all_images_are_the_data_set_itself_and_the_seed_chooses_among_fewer():
    assert part(1.0) is DATASET
    first, again, other = (part(0.5, seed).train.batch(np.arange(32)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_only_the_victims_images_are_read(tmp_path, monkeypatch):
    read = []

    def batch(split, indices, original=ImageSplit.batch):
        read.extend(split.labels[indices])
        return original(split, indices)

    monkeypatch.setattr(ImageSplit, "batch", batch)
    config = default_config()
    config.distance.victims, config.distance.num_steps = ("row1",), 20
    classifier, variables = linear_classifier(), row_variables()
    checkpoints.save_model(tmp_path / "original", classifier, variables)
    matrix = measure(config, DATASET, tmp_path, "before", classifier, variables, RecordedProgress())
    assert np.argwhere(~np.isnan(matrix.values)).tolist() == [[1, 0], [1, 2]]
    assert read == [1, 1, 1, 1]


def test_directions_that_settle_leave_the_measurement_where_the_configuration_says_so(tmp_path):
    config = default_config()
    config.distance.update(victims=("row1",), num_steps=40, inversion="neural_cleanse")
    config.distance.settle_after = 10
    classifier, variables = linear_classifier(), row_variables()
    checkpoints.save_model(tmp_path / "original", classifier, variables)
    matrix = measure(config, DATASET, tmp_path, "before", classifier, variables, RecordedProgress())
    assert matrix.details["inversion"].endswith("settling after 10")
    assert matrix.num_measured() == 2
