"""What a phase of a run is, and the models that the phases hand on to each other."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moth_jax.errors import InputError
from moth_jax.models import checkpoint
from moth_jax.models.checkpoint import SavedModel
from moth_jax.models.digest import weights_digest
from moth_jax.parallel.processes import broadcast_from_main
from moth_jax.run.binding import bond_of, check_bond
from moth_jax.run.job import Job

REPORT = "report"  # the request that computes nothing new
MODEL_FOLDERS = {"before": "original", "after": "hardened"}


class Models:
    """The models of a run "before" and "after" hardening, each read from the work folder once.

    Both have one classifier, so that programs compiled for the first serve the second.

    Args:
      workdir: the work folder.
      check: raises `InputError` for a model that a phase of this run cannot use.
    """

    def __init__(self, workdir: Path, check: Callable[[SavedModel], None] = lambda model: None):
        self.check = check
        self._workdir = workdir
        self._read: dict[str, SavedModel] = {}
        self._digests: dict[str, str] = {}

    def get(self, when: str) -> SavedModel | None:
        """Return the model, None if there is none yet."""
        folder = self._workdir / MODEL_FOLDERS[when]
        if when not in self._read and broadcast_from_main(folder.exists):
            model = checkpoint.load_model(folder)
            before = None if when == "before" else self.get("before")
            self._read[when] = model if before is None else before._replace(variables=model[1])
        return self._read.get(when)

    def digest(self, when: str) -> str | None:
        """Return the digest of the model's weights, None if there is no model yet."""
        model = self.get(when)
        if model is not None and when not in self._digests:
            self._digests[when] = weights_digest(model.variables)
        return self._digests.get(when)

    def check_of(self, job: Job, when: str, path: Path, recorded: Any) -> None:
        """Raise `InputError` unless the result in `path` is of this model of the job.

        `recorded` is what the result carries of its `Bond`.
        """
        weights = self.digest(when)
        if weights is None:
            raise InputError(
                f"{path} is there, but the model that it is of, {MODEL_FOLDERS[when]}, is not; "
                "bring that back, or move the file away"
            )
        check_bond(path, recorded, bond_of(job, weights))

    def __getitem__(self, when: str) -> SavedModel:
        """Return the model, which must be there."""
        model = self.get(when)
        if model is None:
            raise KeyError(f"there is no model {when!r} in {self._workdir}")
        return model


def _nothing_to_do(job: Job, models: Models) -> None:
    pass


def _nothing_to_check(job: Job, model: SavedModel | None) -> None:
    pass


def _nothing_left(job: Job, models: Models) -> None:
    pass


def _no_figures(job: Job, models: Models) -> dict:
    return {}


class Phase(NamedTuple):
    """One phase of a run.

    Attributes:
      do: (job, models) -> None. It leaves its result in the work folder, goes on from its
        checkpoints where it was interrupted, and does nothing where the result is there.
      requests: the values of config.phase that ask for it; None for all but "report".
      with_report: whether "report" asks for it, too.
      check: (job, model) -> None. It raises `InputError` if the phase cannot be done. It is called
        without a model (None) before anything is computed, and with the model before it is trained.
      verify: (job, models) -> None. It raises `InputError` if what it left in the work folder is
        of another run, or of another model than is there. It is called for all phases, once there
        is an original model and before anything else is done.
      figures: (job, models) -> the entries of summary.json that the phase stands for.
      files: the names of what it leaves in the work folder, files and folders.
      options: its sections of the configuration, each with the dataclass of its fields, which is
        made without arguments and finds faults in `__post_init__`.
    """

    do: Callable[[Job, Models], None] = _nothing_to_do
    requests: tuple[str, ...] | None = None
    with_report: bool = False
    check: Callable[[Job, SavedModel | None], None] = _nothing_to_check
    verify: Callable[[Job, Models], None] = _nothing_left
    figures: Callable[[Job, Models], dict] = _no_figures
    files: tuple[str, ...] = ()
    options: Mapping[str, type] = {}

    def is_asked(self, request: str) -> bool:
        """Return whether this value of config.phase asks for the phase."""
        if request == REPORT:
            return self.with_report
        return self.requests is None or request in self.requests
