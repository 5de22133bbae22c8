"""A made-up entry of each kind, added from outside: one definition and one line in a dict."""

import dataclasses
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moth_jax import backdoors, data, distance, models, scanning
from moth_jax.data.building import Share, build_dataset
from moth_jax.hardening import METHODS
from moth_jax.hardening.base import HardeningConfig, Method
from moth_jax.hardening.baselines.stages import BaselineState, as_method, plain_stages
from moth_jax.inversion import INVERSIONS, Budget, Inversion, InversionResult
from moth_jax.inversion.candidates import no_candidate, verify
from moth_jax.options import POSITIVE, option
from moth_jax.run.phases import PHASES, Phase
from moth_jax.scanning.base import Evidence, Scanner, arm_images, row_of
from moth_jax.scanning.options import ScanOptions
from moth_jax.storage.files import read_json, write_json
from moth_jax.triggers import Trigger, trigger_size
from tests.helpers.runs import do, tiny_config
from tests.helpers.toys import (
    SHAPE,
    linear_classifier,
    row_dataset,
    row_images,
    row_variables,
)

LABELS = np.repeat([0, 1, 2], 4).astype(np.int32)


@flax.struct.dataclass
class FadingState:
    """A trigger over the whole image, and what of it was verified."""

    opacity: jax.Array
    candidate: Trigger
    candidate_size: jax.Array
    result: InversionResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fading(Inversion):
    """The start's pattern over the whole image, ever fainter while it still succeeds."""

    pace: float = option(0.8, POSITIVE)
    verify_every: int = 1

    method: ClassVar[str] = "fading"
    budget: ClassVar[Budget] = Budget(num_steps=10, minibatch_size=4, mask_weight=1.0)

    def start(self, key, image_shape):
        height, width, _ = image_shape
        rows = jnp.zeros(image_shape).at[1].set(1.0)  # the row of class 1 is bright
        return Trigger(jnp.ones((height, width, 1)), jnp.broadcast_to(rows, image_shape))

    def init(self, start, mask_weight, score, key):
        known = no_candidate(start, score)
        return FadingState(
            jnp.ones(()), **{**known, "candidate": start, "candidate_size": trigger_size(start)}
        )

    def update(self, state, objective, progress):
        return state.replace(opacity=self.pace * state.opacity)

    def observe(self, state, key):
        pattern = state.candidate.pattern
        faint = Trigger(jnp.full((*pattern.shape[:2], 1), state.opacity), pattern)
        return state.replace(candidate=faint, candidate_size=trigger_size(faint))

    def verify(self, state, objective):
        return verify(0.9, state, objective)


def test_an_inversion(monkeypatch):
    monkeypatch.setitem(INVERSIONS, "fading", Fading)
    matrix = distance.distance_matrix(
        linear_classifier().predict,
        row_images(LABELS),
        LABELS,
        variables=row_variables(),
        directions=[(0, 1), (0, 2)],
        inversion="fading",
        progress=False,
    )
    assert 0 < matrix.values[0, 1] < 16
    assert np.isposinf(matrix.values[0, 2])  # its only pattern is that of class 1
    assert matrix.details["inversion"] == "fading(0.8, 1)"


class Brightest(nnx.Module):
    """The brightest of as many parts of the image as there are classes."""

    def __init__(self, num_classes: int, rngs: nnx.Rngs):
        self.num_classes = num_classes
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, images):
        parts = images.reshape(len(images), self.num_classes, -1)
        return self.scale[...] * parts.mean(-1)


def test_a_model(monkeypatch):
    monkeypatch.setitem(
        models.MODELS, "brightest", lambda spec, rngs: Brightest(spec.num_classes, rngs)
    )
    classifier, variables = models.create(
        "brightest", num_classes=4, image_shape=SHAPE, mean=(0.5,), std=(0.5,)
    )
    images = np.zeros((2, *SHAPE), np.float32)
    images[0, 3], images[1, 1] = 1, 1
    assert np.argmax(classifier.predict(variables, images), -1).tolist() == [3, 1]


def load_stripes(*, num_images: int = 40, seed: int = 0) -> data.ImageDataset:
    """Two classes of noise, the second of which is brighter."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_images) % 2
    images = (rng.random((num_images, *SHAPE)) / 2 + labels[:, None, None, None] / 2).astype("f4")
    half = num_images // 2
    names = ("dark", "bright")
    parts = (images[:half], labels[:half]), (images[half:], labels[half:])
    return build_dataset("stripes", *parts, class_names=names, validation=Share(0.2, seed))


def test_a_data_source(monkeypatch):
    monkeypatch.setitem(data.DATASETS, "stripes", load_stripes)
    dataset = data.load("stripes", num_images=60)
    assert dataset.class_names == ("dark", "bright")
    assert len(dataset.train) + len(dataset.validation) == len(dataset.test) == 30


def darken(image_shape, *, share: float = 0.5) -> backdoors.Stamp:
    """Take light away from every pixel."""
    return lambda images: (1 - np.float32(share)) * images


def test_an_attack(monkeypatch):
    monkeypatch.setitem(backdoors.ATTACKS, "darken", darken)
    assert backdoors.options("darken") == ["share"]
    stamp = backdoors.create("darken", SHAPE, share=0.25)
    assert float(stamp(np.ones((1, *SHAPE), np.float32)).max()) == 0.75
    assert backdoors.option_types()["share"] is float  # a field of every configuration


@dataclasses.dataclass(frozen=True)
class GentleConfig(HardeningConfig):
    """Options of a training with a tenth of the learning rate."""

    learning_rate: float = option(1e-4, POSITIVE)


@as_method
def gentle(classifier, variables, dataset, config):
    """Train gently."""
    del variables
    return plain_stages(classifier, dataset, config)


def test_a_method_of_hardening(monkeypatch):
    monkeypatch.setitem(METHODS, "gentle", Method(gentle, GentleConfig, BaselineState))
    method, seen = METHODS["gentle"], []
    state = method.harden(
        linear_classifier(),
        row_variables(),
        row_dataset([12] * 3),
        method.config(max_steps=3, batch_size=8, max_accuracy_drop=1.0),
        on_round=lambda state, records: seen.extend(records),
        progress=False,
    )
    assert (state.step, state.stopped) == (3, "budget")
    assert [record["step"] for record in seen] == [0, 1, 2]


def search(subject, options, resume_dir, progress) -> Evidence:
    """Take a model for poisoned whose logits lean to one class."""
    images = arm_images(subject, options)
    lean = subject.probe_logits.mean(0)
    rows = tuple(
        dataclasses.replace(
            row_of(images, arm, size=1.0, rate=1.0, success_bound=options.success_bound),
            suspicion=float(lean[arm[1]] - lean.mean()),
        )
        for arm in images.universal()
    )
    return Evidence(rows, None, 0)


LEANING = Scanner(search, 2.2, "lean", success_bound=0.9, explanation="Which class is favoured?")


@pytest.mark.parametrize(("bias", "poisoned"), [(0.0, False), (9.0, True)])
def test_a_scanner(monkeypatch, bias, poisoned):
    monkeypatch.setitem(scanning.SCANNERS, "leaning", LEANING)
    tree = row_variables()
    tree = {**tree, "params": {**tree["params"], "bias": jnp.array([0.0, 0.0, bias])}}
    found = scanning.scan(
        linear_classifier().predict,
        row_images(LABELS),
        LABELS,
        variables=tree,
        method="leaning",
        options=ScanOptions(num_images=4),
        progress=False,
    )
    assert found.poisoned == poisoned
    assert f"lean {found.statistic:.2g}" in found.describe()


def count_parameters(job, models) -> None:
    """Write how many numbers the given model has."""
    parameters = models["before"].variables["params"]
    count = sum(leaf.size for leaf in parameters.values())
    write_json(job.workdir / "parameters.json", {"parameters": count})


COUNTING = Phase(
    do=count_parameters,
    requests=("all", "count"),
    figures=lambda job, models: read_json(job.workdir / "parameters.json"),
    files=("parameters.json",),
)


def test_a_phase_of_a_run(monkeypatch, tmp_path):
    monkeypatch.setitem(PHASES, "count", COUNTING)
    summary = do(tiny_config(phase="count"), tmp_path)  # a value of config.phase by itself
    model = tmp_path / "original"
    assert model.exists()
    assert not (tmp_path / "distance_before.npz").exists()
    assert summary["parameters"] > 1000
    assert read_json(tmp_path / "summary.json")["parameters"] == summary["parameters"]
    do(tiny_config(phase="train", seed=1), tmp_path, overwrite=True)
    assert not (tmp_path / "parameters.json").exists()  # it is removed with the run
