"""Certified distances beside verified ones: how near the two ends are, and what a bound costs.

    python experiments/studies/certified.py --models=mlp,cnn,linear
    python experiments/studies/certified.py --models=nat,adv --checkpoints=DIR --data_dir=DIR \
        --num_images=10 --victims=0 --targets=2,4

Trains a multilayer perceptron (one hidden layer of 32) and a small CNN (3x3 convolution of 8
channels at stride 2, a dense head) on the digits in a few seconds, measures all their 90 directions
by the trimmed method and certifies the same on the same images; `linear` is the README's logistic
regression, `deeper` a CNN of two convolutions. `nat` and `adv` are the authors' two ResNet20s, of
which a few directions are certified on a few images. Goes on where it was interrupted.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from moth_jax import data
from moth_jax.distance import certified_distances, distance_matrix
from moth_jax.models.weights import importing
from moth_jax.parallel import devices
from moth_jax.run.origin import origin, processor
from moth_jax.storage.files import read_own_json, write_json

MODELS = flags.DEFINE_list("models", ["mlp", "cnn", "deeper", "linear"], "Which models.")
SEED = flags.DEFINE_integer("seed", 0, "Of the training.")
CHECKPOINTS = flags.DEFINE_string("checkpoints", None, "Folder of the authors' ResNet20s.")
DATA_DIR = flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "Folder of TFDS data sets.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 100, "Images of each class.")
VICTIMS = flags.DEFINE_list("victims", [], "Labels to measure from; all if none.")
TARGETS = flags.DEFINE_list("targets", [], "Labels to measure to; all if none.")
OUT = flags.DEFINE_string("out", "experiments/results/certified", "Where the results go.")
FILES = {"nat": "moth_cifar10_resnet20_nat.h5", "adv": "moth_cifar10_resnet20_adv.h5"}
STEPS, BATCH, LEARNING_RATE = 600, 128, 3e-3


def convolved(x, kernel, stride):
    """Return images convolved with a kernel [kh kw i o], padded as little as covers them."""
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=names
    )


def flat(x):
    """Return each image as one row."""
    return x.reshape(len(x), -1)


def mlp(p, x):
    """One hidden layer."""
    return jax.nn.relu(flat(x) @ p[0] + p[1]) @ p[2] + p[3]


def cnn(p, x):
    """One convolution, one dense layer."""
    return flat(jax.nn.relu(convolved(x, p[0], 2) + p[1])) @ p[2] + p[3]


def deeper(p, x):
    """Two convolutions, one dense layer."""
    x = jax.nn.relu(convolved(x, p[0], 2) + p[1])
    return flat(jax.nn.relu(convolved(x, p[2], 2) + p[3])) @ p[4] + p[5]


NETWORKS = {
    "mlp": (mlp, [(64, 32), (32,), (32, 10), (10,)]),
    "cnn": (cnn, [(3, 3, 1, 8), (8,), (128, 10), (10,)]),
    "deeper": (deeper, [(3, 3, 1, 8), (8,), (3, 3, 8, 16), (16,), (64, 10), (10,)]),
}


def trained(name, images, labels):
    """Return a network of the digits, and its variables."""
    function, shapes = NETWORKS[name]
    rng = np.random.default_rng(SEED.value)
    scales = [0 if len(s) == 1 else np.sqrt(2 / np.prod(s[:-1])) for s in shapes]
    params = [jnp.float32(rng.normal(size=s) * c) for s, c in zip(shapes, scales, strict=True)]
    optimiser = optax.adam(LEARNING_RATE)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(function(params, x), y).mean()

    @jax.jit
    def update(params, state, x, y):
        updates, state = optimiser.update(jax.grad(loss)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    state = optimiser.init(params)
    for _ in range(STEPS):
        batch = rng.integers(0, len(images), BATCH)
        params, state = update(params, state, images[batch], labels[batch])
    return function, params


def logistic(images, labels):
    """Return the README's logistic regression."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=1000).fit(images.reshape(len(images), -1), labels)
    weights, bias = jnp.float32(model.coef_.T), jnp.float32(model.intercept_)
    return lambda p, x: flat(x) @ p[0] + p[1], [weights, bias]


def subject(name):
    """Return function, variables, images and labels of a model."""
    if name in FILES:
        classifier, variables = importing.load(Path(CHECKPOINTS.value) / FILES[name])
        test = data.load("cifar10", dir=DATA_DIR.value).test
        return classifier.predict, variables, test.batch(np.arange(len(test))), test.labels
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = np.float32(digits.images[..., None] / 16), digits.target
    made = logistic(images, labels) if name == "linear" else trained(name, images, labels)
    return *made, images, labels


def main(_) -> None:
    devices.use_all_cores()
    out = Path(OUT.value)
    rows, columns = ([int(k) for k in f.value] or range(10) for f in (VICTIMS, TARGETS))
    directions = [(a, b) for a in rows for b in columns if a != b]
    for name in MODELS.value:
        path = out / f"{name}.json"
        if read_own_json(path):
            continue
        predict, variables, images, labels = subject(name)
        options = {
            "variables": variables,
            "directions": directions,
            "num_images": NUM_IMAGES.value,
            "resume_dir": out / "chunks" / name,
        }
        matrix = distance_matrix(predict, images, labels, **options)
        started = time.perf_counter()
        lower = certified_distances(predict, images, labels, **options)
        seconds = time.perf_counter() - started
        ends = np.array([[lower[d], matrix.values[d]] for d in directions])
        ratio = ends[:, 0] / ends[:, 1]
        if not (ends[:, 0] <= ends[:, 1]).all():
            raise ValueError(f"{name}: a verified trigger is smaller than its proven bound")
        logits = jax.jit(predict)(variables, images)
        result = {
            **origin(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {processor()}",
            "model": name,
            "training_seed": SEED.value,
            "accuracy": float(np.mean(np.argmax(logits, 1) == labels)),
            "num_images": NUM_IMAGES.value,
            "inversion": matrix.details["inversion"],
            "inversion_seeds": [0],
            "directions": directions,
            "ratio_mean": float(ratio.mean()),
            "ratio_smallest": float(ratio.min()),
            "ratio_largest": float(ratio.max()),
            "verified_seconds": matrix.details["seconds"],
            "certified_seconds_of_this_run": seconds,
            "lower": ends[:, 0].tolist(),
            "verified": ends[:, 1].tolist(),
        }
        write_json(path, result)
        print({k: v for k, v in result.items() if k not in ("directions", "lower", "verified")})


if __name__ == "__main__":
    app.run(main)
