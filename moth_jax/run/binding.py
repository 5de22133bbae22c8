"""What the results of a run are of: its options, its images and one of its models.

Each result carries a `Bond` of digests. A result that was copied from another run, or from the
other model, is found by it.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from moth_jax.errors import InputError
from moth_jax.run.job import Job
from moth_jax.storage.files import read_json
from moth_jax.typed import fault_of

ORIGINAL = "original.json"  # the record of the original model, which says what the images were


@dataclasses.dataclass(frozen=True)
class Bond:
    """What a result is of.

    Attributes:
      run: a digest of the options that decide the results of the run.
      data: a digest of what the run recorded of its images.
      model: the digest of the weights (`models.digest.weights_digest`).
    """

    run: str
    data: str
    model: str

    def to_json(self) -> dict[str, str]:
        """Return it as JSON can carry it."""
        return dataclasses.asdict(self)


_MEANINGS = {"run": "other options", "data": "other images", "model": "another model"}
_REMEDY = "bring back the file as it was, or move it away, and the same command makes it again"


def bond_of(job: Job, weights: str) -> Bond:
    """Return what results on a model with this digest of its weights are of."""
    return bond_with(job, read_json(job.workdir / ORIGINAL).get("data"), weights)


def bond_with(job: Job, images: Any, weights: str) -> Bond:
    """Return the same, where `images` is what the run records of its images (`run.inputs`)."""
    data = hashlib.sha256(json.dumps(images, sort_keys=True).encode()).hexdigest()
    return Bond(job.identity, data, weights)


def check_bond(path: Path, recorded: Any, expected: Bond) -> None:
    """Raise `InputError` unless the result in `path`, which carries `recorded`, is as expected."""
    if fault_of(recorded, Bond) is not None:
        raise InputError(f"{path} does not say which run and model it is of; {_REMEDY}")
    for name, meaning in _MEANINGS.items():
        if recorded[name] != getattr(expected, name):
            raise InputError(f"{path} is of {meaning} than this run's; {_REMEDY}")
