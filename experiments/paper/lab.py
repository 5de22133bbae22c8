"""What the experiments share: models of the problems, their distances, and hardened ones.

A *cell* is one number of a table that takes long: a model, its distances, a model hardened by a
method. Each is a folder below --workdir, goes on where it was interrupted, and is not done again.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_collections
from absl import flags
from scales import SCALES, Problem, Scale

from moth_jax import data
from moth_jax.backdoors import attack_success
from moth_jax.data import ImageDataset
from moth_jax.distance.matrix import DistanceMatrix, relative_increase
from moth_jax.errors import InputError, listed, require_choice
from moth_jax.evaluation import Adversary, accuracy, pgd_accuracy
from moth_jax.hardening import METHODS
from moth_jax.models import Classifier, checkpoint
from moth_jax.models.checkpoint import SavedModel
from moth_jax.parallel import devices
from moth_jax.progress import console_progress
from moth_jax.run.configuration import check, data_options, make_job, node_of
from moth_jax.run.console import prepare_console
from moth_jax.run.job import Job
from moth_jax.run.metrics import MetricWriter
from moth_jax.run.origin import commit
from moth_jax.run.phases import harden as hardening
from moth_jax.run.phases.measure import measure
from moth_jax.run.phases.original import original_model
from moth_jax.run.phases.robustness import attacked_images
from moth_jax.run.workdir import changed_fields
from moth_jax.storage.files import read_json, write_json
from moth_jax.types import Variables

SCALE = flags.DEFINE_enum("scale", "smoke", list(SCALES), "How large; see scales.py.")
WORKDIR = flags.DEFINE_string("workdir", "results/experiments", "Folder of models and checkpoints.")
OUT = flags.DEFINE_string("out", "experiments/results", "Folder of the tables.")
CIFAR10_DIR = flags.DEFINE_string("cifar10_dir", "~/tensorflow_datasets", "TFDS folder.")
CIFAR10_MODEL = flags.DEFINE_string("cifar10_model", "", "ResNet20 weights; trained here if none.")
GTSRB_DIR = flags.DEFINE_string("gtsrb_dir", "~/gtsrb", "Folder of the traffic signs.")
PROBLEMS = flags.DEFINE_list("problems", [], "Only these of the script's models.")
SEEDS = flags.DEFINE_integer("seeds", 0, "How many seeds; 0 for those of the scale.")

_PARTS_OF_TABLES = ("problems", "methods", "triggers", "backdoors", "variants")  # flags

# Parts of a configuration: the options of each method, and what changes no cell.
_NODES = {node_of(method) for method in METHODS}
_NO_MATTER = {"scan", "robustness", "mesh", "checkpoint_seconds"}
COMMIT = commit()  # of the code that runs: it may be another one when the table is written
_commits: set[str] = set()


class Model(NamedTuple):
    """A model and what it is trained and measured on.

    Attributes:
      config: the configuration that it came from.
      folder: of its cell.
    """

    classifier: Classifier
    variables: Variables
    dataset: ImageDataset
    config: ml_collections.ConfigDict
    folder: Path

    @property
    def saved(self) -> SavedModel:
        """The model alone."""
        return SavedModel(self.classifier, self.variables)

    def job(self) -> Job:
        """Return the job of its configuration, in its folder."""
        return make_job(self.config, self.dataset, self.folder, progress=console_progress())


def scale() -> Scale:
    """Return what --scale asks for."""
    chosen = SCALES[SCALE.value]
    return dataclasses.replace(chosen, num_seeds=SEEDS.value or chosen.num_seeds)


def problems(of_the_script: Sequence[str] = (), on_request: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the problems of a table: a script's own, or the scale's; some of them if asked for.

    Those `on_request` are there only if asked for.

    Raises:
      InputError: one is asked for that the table does not have.
    """
    usual = tuple(of_the_script) or scale().problems
    for name in PROBLEMS.value:
        require_choice("problem", name, (*usual, *on_request))
    chosen = PROBLEMS.value or usual
    return tuple(name for name in (*usual, *on_request) if name in chosen)


def first_problems() -> tuple[str, ...]:
    """Return the problems of a table that is of the scale's first one unless others are named."""
    return problems() if PROBLEMS.value else problems()[:1]


def narrowed() -> bool:
    """Return whether the command line asks for a part of the table."""
    given = flags.FLAGS
    return any(name in given and given[name].present for name in _PARTS_OF_TABLES)


def start() -> None:
    """Do what the command does before any computation."""
    prepare_console()
    devices.use_all_cores()


def cells() -> Path:
    """Return the folder of this scale's cells."""
    return Path(WORKDIR.value).expanduser() / SCALE.value


def configured(problem: Problem, seed: int) -> ml_collections.ConfigDict:
    """Return the configuration of a problem, with the folders of the command line."""
    config = problem.config(scale())
    config.seed = seed
    if config.data.name == "cifar10":
        config.data.dir = CIFAR10_DIR.value
        if config.model.name == "preact_resnet20":
            config.model.checkpoint = CIFAR10_MODEL.value
            config.model.name = "auto" if CIFAR10_MODEL.value else "preact_resnet20"
    elif config.data.name == "gtsrb":
        config.data.dir = GTSRB_DIR.value
    return config


@functools.lru_cache(maxsize=4)
def _loaded(name: str, options: tuple) -> ImageDataset:
    return data.load(name, **dict(options))


def model(
    name: str,
    problem: Problem,
    seed: int = 0,
    *,
    change: Callable[[ml_collections.ConfigDict], None] | None = None,
) -> Model:
    """Return the model of a problem; `name` is its cell's, `change` what is special about it."""
    config = configured(problem, seed)
    if change is not None:
        change(config)
    check(config)
    dataset = _loaded(config.data.name, tuple(sorted(data_options(config).items())))
    folder = _cell(cells() / "models" / name, config, without={"method", *_NODES, "clean_share"})
    with MetricWriter(folder) as metrics:
        job = make_job(config, dataset, folder, progress=console_progress(), metrics=metrics)
        classifier, variables = original_model(job)
    return Model(classifier, variables, dataset, config, folder)


def _cell(folder: Path, config: ml_collections.ConfigDict, *, without: set[str]) -> Path:
    """Return the folder of a cell, which is there for one configuration.

    The parts in `without` decide nothing in it: another method's budget, or how a cell is scanned,
    which is part of the scan.
    """
    whole = json.loads(config.to_json_best_effort())
    ours = {name: part for name, part in whole.items() if name not in without | _NO_MATTER}
    path = folder / "config.json"
    theirs = read_json(path)
    if not theirs:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "origin.json", {"commit": COMMIT})
        write_json(path, ours)
    elif changed := changed_fields(theirs, ours):
        raise InputError(
            f"{folder} was made with another configuration ({listed(changed)} differ); remove it, "
            "or choose another --workdir"
        )
    _commits.add(read_json(folder / "origin.json").get("commit", "unknown"))
    return folder


def cell_commits() -> list[str]:
    """Return the commits that the cells of this call were begun by: this one, or earlier ones."""
    return sorted(_commits)


def distances(given: Model) -> DistanceMatrix:
    """Return the distances of a model, measured once."""
    return measure(given.job(), "before", given.saved)


def harden(
    given: Model,
    name: str,
    method: str,
    *,
    change: Callable[[ml_collections.ConfigDict], None] | None = None,
    every: int = 0,
) -> Model:
    """Return the model hardened by a method; `name` is the cell's within the model's.

    With `every`, the models on the way are kept as well, each so many steps (`snapshots`).
    """
    config = given.config.copy_and_resolve_references()
    config.method = method
    if change is not None:
        change(config)
    check(config)
    folder = _cell(given.folder / name, config, without=_NODES - {node_of(method)})
    watch = functools.partial(_keep_snapshot, given.classifier, folder, every)
    with MetricWriter(folder) as metrics:
        job = make_job(config, given.dataset, folder, progress=console_progress(), metrics=metrics)
        variables = hardening.harden(job, given.saved, watch)
    # The seed is the hardening's: the backdoor and the measured directions are as given.
    config.seed = given.config.seed
    return Model(given.classifier, variables, given.dataset, config, folder)


def measured_as(
    given: Model, name: str, change: Callable[[ml_collections.ConfigDict], None]
) -> Model:
    """Return the same model with distances of its own, in a cell `name` within the model's."""
    config = given.config.copy_and_resolve_references()
    change(config)
    folder = _cell(given.folder / name, config, without=_NODES - {node_of(config.method)})
    return given._replace(config=config, folder=folder)


def _keep_snapshot(classifier: Classifier, folder: Path, every: int, state, spent: dict) -> None:
    """Keep the first state of each `every` steps: a round may pass over a multiple of it."""
    if every and state.step >= every:
        path = folder / "snapshots" / f"{state.step // every * every:06d}"
        if not (path / "spent.json").exists():
            checkpoint.save_model(path / "hardened", classifier, state.train.variables)
            write_json(path / "spent.json", {"step": state.step, **spent})


def snapshots(hardened: Model) -> list[tuple[dict, Model]]:
    """Return the models on the way, in order: steps and seconds spent, and the model."""
    done = sorted(path.parent for path in (hardened.folder / "snapshots").glob("*/spent.json"))
    return [
        (
            read_json(path / "spent.json"),
            hardened._replace(
                variables=checkpoint.load_model(path / "hardened").variables, folder=path
            ),
        )
        for path in done
    ]


def distances_after(hardened: Model) -> DistanceMatrix:
    """Return the distances of a hardened model, measured once."""
    return measure(hardened.job(), "after", hardened.saved)


def once(path: Path, compute: Callable[[], dict]) -> dict:
    """Return the figures in `path`, computed if they are not there."""
    if not path.exists():
        write_json(path, compute())
    return read_json(path)


def quality(given: Model, *, robust: bool = False) -> dict:
    """Return test accuracy and, if asked for, robustness under the problem's PGD."""
    predict, variables = given.classifier.predict, given.variables
    figures = once(
        given.folder / "quality.json",
        lambda: {"accuracy": accuracy(predict, variables, given.dataset.test)},
    )
    if not robust:
        return figures
    options = scale().robustness[given.config.data.name]
    attack = dataclasses.asdict(options)
    num_images = attack.pop("num_images")

    def compute() -> dict:
        images = attacked_images(given.dataset, num_images)
        return {
            "robustness": pgd_accuracy(predict, variables, images, adversary=Adversary(**attack))
        }

    # Under another attack it is another figure.
    name = "_".join(f"{value:g}" for value in (num_images, *attack.values()))
    return {**figures, **once(given.folder / f"robustness_{name}.json", compute)}


def success(given: Model) -> dict:
    """Return the attack success rate of the backdoor of a model's configuration."""

    def compute() -> dict:
        backdoor, test = given.job().backdoor, given.dataset.test
        rates = attack_success(given.classifier.predict, given.variables, test, backdoor)
        return {"attack_success": rates.overall, "others": rates.others}

    return once(given.folder / "success.json", compute)


def hardening_cost(hardened: Model) -> dict:
    """Return steps and seconds of a hardening."""
    figures = read_json(hardened.folder / "hardening.json")
    return {name: figures[name] for name in ("steps", "stopped", "seconds", "cpu_seconds")}


def increase(before: DistanceMatrix, after: DistanceMatrix) -> dict:
    """Return the mean distance, what it grew by, and how many directions have none."""
    return {
        "distance": after.average(),
        "increase": relative_increase(before, after),
        "failures": after.num_failures(),
    }
