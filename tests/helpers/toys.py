"""Models and data so small that the right answers are known, or quickly found another way."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np

from moth_jax.data.dataset import ImageDataset, ImageSplit
from moth_jax.distance.matrix import FoundTriggers
from moth_jax.distance.measure import distance_matrix
from moth_jax.models import Classifier, ModelSpec
from moth_jax.progress import Progress
from moth_jax.progress.displays import Nothing

SIDE = 4
SHAPE = (SIDE, SIDE, 1)


def linear_classifier(num_classes=3, image_shape=SHAPE):
    """A linear classifier with one layer's worth of batch normalisation (of the mean only)."""

    def logits(variables, images):
        params = variables["params"]
        return images.reshape(len(images), -1) @ params["kernel"] + params["bias"][None]

    def predict(variables, images):
        return logits(variables, images) - variables["batch_stats"]["mean"][None]

    def forward_train(variables, images):
        raw = logits(variables, images)
        mean = raw.mean(0)
        moved = 0.9 * variables["batch_stats"]["mean"] + 0.1 * mean
        return raw - mean[None], {**variables, "batch_stats": {"mean": moved}}

    channels = image_shape[2]
    spec = ModelSpec(
        "small_cnn", num_classes, image_shape, mean=(0.5,) * channels, std=(1.0,) * channels
    )
    return Classifier(spec, predict, forward_train)


def row_variables(num_classes=3, scale=4.0):
    """Weights of `linear_classifier` that see class k where row k is the brightest."""
    kernel = np.zeros((*SHAPE, num_classes), np.float32)
    for k in range(num_classes):
        kernel[k, :, :, k] = scale
    return {
        "params": {
            "kernel": jnp.asarray(kernel.reshape(-1, num_classes)),
            "bias": jnp.zeros(num_classes),
        },
        "batch_stats": {"mean": jnp.zeros(num_classes)},
    }


def row_images(labels, seed=0):
    """Images [n, 4, 4, 1] whose row `label` is bright and whose others are dark, with noise."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0.1, 0.3, (len(labels), *SHAPE)).astype(np.float32)
    images[np.arange(len(labels)), labels] += 0.6
    return images


def row_distances(labels, **options):
    """The distance matrix of the linear classifier on row images; `labels` 0, ..., K - 1."""
    num_classes = int(labels.max()) + 1
    return distance_matrix(
        linear_classifier(num_classes).predict,
        row_images(labels),
        labels,
        variables=row_variables(num_classes),
        **{"progress": False, **options},
    )


def row_split(counts, seed=0):
    """An `ImageSplit` with `counts[k]` images of class k, in mixed order."""
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    labels = np.random.default_rng(seed).permutation(labels)
    return ImageSplit(row_images(labels, seed), labels)


def row_dataset(counts=(12, 12, 12), **options):
    """An `ImageDataset` of rows; `counts` are those of the training part."""
    num_classes = len(counts)
    parts = {
        "train": row_split(counts, seed=1),
        "validation": row_split([6] * num_classes, seed=2),
        "test": row_split([4] * num_classes, seed=3),
    }
    names = tuple(f"row{k}" for k in range(num_classes))
    fields = {"class_names": names, "mean": (0.35,), "std": (0.3,), **parts, **options}
    return ImageDataset(name="rows", **fields)


def numpy_success_rate(logits_fn, images, trigger, target):
    """The success rate of a saved trigger, stamped with NumPy alone."""
    mask, pattern = np.asarray(trigger.mask), np.asarray(trigger.pattern)
    stamped = (1 - mask) * images + mask * pattern
    return float(np.mean(np.argmax(np.asarray(logits_fn(stamped)), 1) == target))


def assert_same_arrays(actual, expected):
    """The same tree with the same numbers in the same types; NaN equals NaN."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


class StoppedError(Exception):
    """Raised by a `RecordedProgress` in the middle of the work, as Ctrl-C would be."""


class Rounds(list):
    """An `on_round` that keeps (state, records), and may interrupt."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after

    def __call__(self, state, records):
        self.append((state, records))
        if len(self) == self.stop_after:
            raise StoppedError

    @property
    def records(self):
        """All records, in order."""
        return [record for _, records in self for record in records]

    @property
    def steps(self):
        """The records of the main training."""
        return [record for record in self.records if record["phase"] == "hardening"]


class RecordedProgress(Progress):
    """Remembers what it was told, and may interrupt the work once `interrupt_after` units are done.

    `advanced` and `skipped` hold the units of each call, `figures` what was last to be shown.
    """

    def __init__(self, interrupt_after=float("inf")):
        super().__init__(Nothing())
        self.interrupt_after = interrupt_after
        self.advanced, self.skipped, self.figures = [], [], {}

    @contextlib.contextmanager
    def task(self, description, **options):
        yield self

    def advance(self, n=1, /, **figures):
        self.advanced.append(n)
        self.figures = figures
        if sum(self.advanced) >= self.interrupt_after:
            raise StoppedError

    def skip(self, n, /, **figures):
        self.skipped.append(n)
        self.figures = figures

    resume = skip


@contextlib.contextmanager
def compilations():
    """The names of the programs that are compiled in the block, ahead of time or not."""
    names = []

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def found_triggers(dense, values):
    """The triggers of found directions, of those in every place of a matrix [K, K, ...]."""
    found = np.isfinite(values)
    return FoundTriggers(
        np.argwhere(found), jax.tree.map(lambda leaf: np.asarray(leaf)[found], dense)
    )
