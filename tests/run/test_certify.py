"""distance.certify=True: proven lower ends before and after hardening, in every result of a run."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.distance import DistanceMatrix
from moth_jax.errors import InputError
from moth_jax.models import from_function
from moth_jax.models.checkpoint import SavedModel
from moth_jax.run.phases.measure import BEFORE, measure
from tests.helpers.runs import job_of, summary_of, tiny_config
from tests.helpers.toys import (
    RecordedProgress,
    StoppedError,
    linear_classifier,
    row_dataset,
    row_variables,
)


def row_config(**changes):
    return tiny_config(distance__certify=True, distance__victims=(), **changes)


@pytest.mark.slow
def test_lower_ends_are_in_every_result_of_a_run(tmp_path):
    config = tiny_config(
        distance__certify=True,
        distance__victims=("0",),
        distance__targets=("1",),
        distance__num_images=2,
    )
    summary = summary_of(config, tmp_path)
    matrices = [
        DistanceMatrix.load(tmp_path / f"distance_{when}.npz") for when in ("before", "after")
    ]
    for matrix, mean in zip(matrices, summary.pair("distance_lower"), strict=True):
        assert np.isfinite(matrix.lower).sum() == 1
        assert matrix.lower[0, 1] <= matrix.values[0, 1]
        assert mean == pytest.approx(matrix.lower[0, 1])
    assert json.loads((tmp_path / "summary.json").read_text())["distance_lower_after"] == mean
    assert any(line.startswith("- proven lower") for line in summary.describe())
    report = (tmp_path / "report.html").read_text()
    assert "Proven lower end" in report
    assert "After ≥, the proven lower end" in report


def test_an_unknown_layer_is_refused_before_anything_is_measured():
    squared = from_function(
        lambda tree, images: jnp.square(images).sum((2, 3))[:, :3] * tree["params"]["scale"],
        {"params": {"scale": jnp.ones((1, 3))}},
        image_shape=(4, 4, 1),
    )
    job = job_of(row_config(), row_dataset())
    BEFORE.check(job, None)
    BEFORE.check(job, SavedModel(linear_classifier(), row_variables()))
    with pytest.raises(InputError, match=r"do not know the layer '(square|integer_pow)'"):
        BEFORE.check(job, SavedModel(*squared))


def test_certified_victims_are_kept_when_a_run_is_interrupted(tmp_path):
    dataset, model = row_dataset(), SavedModel(linear_classifier(), row_variables())
    (tmp_path / "original.json").write_text("{}")
    with pytest.raises(StoppedError):  # six directions are measured, then those of two victims
        measure(
            job_of(row_config(), dataset, tmp_path, RecordedProgress(interrupt_after=10)),
            "before",
            model,
        )
    again = RecordedProgress()
    matrix = measure(job_of(row_config(), dataset, tmp_path, again), "before", model)
    assert sum(again.skipped) >= 10
    assert np.isfinite(matrix.lower).sum() == 6
    assert (matrix.lower <= matrix.values)[np.isfinite(matrix.lower)].all()
