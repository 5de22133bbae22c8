"""Models of other JAX libraries, measured and hardened with the same three lines (README)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax import MothConfig, harden
from moth_jax.distance import measure
from moth_jax.errors import InputError
from moth_jax.models import from_function, like
from tests.helpers.toys import SHAPE, row_dataset

KEY = jax.random.key(0)
DATASET = row_dataset()


def plain_function():
    def logits_fn(variables, images):
        w, b = variables["params"]
        return images.reshape(images.shape[0], -1) @ w + b.reshape(1, -1)

    return logits_fn, {"params": (jax.random.normal(KEY, (16, 3)), jnp.zeros(3))}, None


def flax_nnx():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
            self.head = nnx.Linear(32, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.conv(x)).reshape(x.shape[0], -1))

    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)

    def logits_fn(variables, images):
        return nnx.merge(graph, variables["params"])(images)

    return logits_fn, {"params": nnx.as_pure(params)}, None


def flax_linen():
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(8, (3, 3), strides=2)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    model = Net()
    variables = model.init(KEY, jnp.zeros((1, *SHAPE)), train=False)

    def logits_fn(variables, images):
        return model.apply(variables, images, train=False)

    def train_fn(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    return logits_fn, variables, train_fn


def equinox():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(KEY)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 8, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(32, 3, key=keys[1]),
        ]
    )
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def logits_fn(variables, images):
        model = eqx.combine(variables["params"], rest)
        return jax.vmap(model)(images.transpose(0, 3, 1, 2))

    return logits_fn, {"params": params}, None


def haiku():
    hk = pytest.importorskip("haiku")

    @hk.without_apply_rng
    @hk.transform_with_state
    def net(images, train):
        x = hk.Conv2D(8, 3, stride=2)(images)
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(x, is_training=train))
        return hk.Linear(3)(x.reshape(x.shape[0], -1))

    params, state = net.init(KEY, jnp.zeros((1, *SHAPE)), True)

    def logits_fn(variables, images):
        return net.apply(variables["params"], variables["batch_stats"], images, False)[0]

    def train_fn(variables, images):
        logits, state = net.apply(variables["params"], variables["batch_stats"], images, True)
        return logits, {"batch_stats": state}

    return logits_fn, {"params": params, "batch_stats": state}, train_fn


MODELS = [plain_function, flax_nnx, flax_linen, equinox, haiku]
SHORT = MothConfig(
    max_steps=2,
    max_accuracy_drop=1.0,
    batch_size=32,
    victims_per_class=8,
    first_steps=20,
    next_steps=5,
    warmup_steps=20,
    stamp_share=0.5,
    max_trigger_share=1.0,
    learning_rate=0.01,
)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries themselves
def test_a_model_of_any_library_is_measured_and_hardened(model):
    # The libraries broadcast as they like.
    with jax.numpy_rank_promotion("allow"):
        logits_fn, variables, train_fn = model()

        classifier, flat = from_function(logits_fn, variables, image_shape=SHAPE, train_fn=train_fn)
        test = DATASET.test
        options = {"variables": flat, "num_steps": 20, "progress": False}
        matrix = measure.distance_matrix(classifier.predict, test.images, test.labels, **options)
        state = harden(classifier, flat, DATASET, SHORT, progress=False)

        assert matrix.num_measured() == 6
        hardened = like(variables, state.kept)
        logits = logits_fn(hardened, jnp.asarray(test.images))
    assert logits.shape == (len(test), 3)
    assert np.isfinite(logits).all()
    before, after = (jax.tree.leaves(tree["params"]) for tree in (variables, hardened))
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    if train_fn is not None:
        moved = [jax.tree.leaves(tree["batch_stats"]) for tree in (variables, hardened)]
        assert any(not np.array_equal(a, b) for a, b in zip(*moved, strict=True))


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "got nothing"),
        ({"w": 1}, "got 'w'"),
        ({"params": {}, "cache": {}}, "got 'params', 'cache'"),
    ],
)
def test_variables_of_another_form_are_refused(variables, says):
    with pytest.raises(InputError, match=says):
        from_function(lambda v, x: x, variables, image_shape=SHAPE)


def test_a_function_that_gives_no_logits_is_refused():
    with pytest.raises(InputError, match=r"must return logits \[n, K\]"):
        from_function(lambda v, x: x, {"params": {}}, image_shape=SHAPE)


def test_batch_statistics_that_nothing_moves_are_frozen_and_updating_them_is_refused():
    logits_fn, variables, _ = plain_function()
    variables["batch_stats"] = {"mean": jnp.zeros(3)}
    classifier, flat = from_function(logits_fn, variables, image_shape=SHAPE)
    with pytest.raises(InputError, match=r"'update' is impossible .* without a train_fn"):
        harden(classifier, flat, DATASET, SHORT, progress=False)
