"""The published schedule, written again in PyTorch, takes the same steps in double precision."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moth_jax.inversion import Budget, NeuralCleanse, Samples, invert
from moth_jax.inversion.base import Score
from moth_jax.triggers import Trigger, stamp, trigger_size

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

SPAN = 2 - 1e-7
NUM_SAMPLES, SIDE, CHANNELS, K, TARGET = 12, 6, 3, 3, 1
NUM_STEPS, PATIENCE, BOUND, MASK_WEIGHT = 40, 3, 0.9, 0.1
OPTIONS = {"success_bound": BOUND, "patience": PATIENCE, "jitter_scale": 0.0}


class Problem(NamedTuple):
    """A small convolutional network, samples, and where the inversion starts; NHWC, HWIO."""

    conv: np.ndarray
    head: np.ndarray
    images: np.ndarray
    mask: np.ndarray
    pattern: np.ndarray
    orders: np.ndarray  # [steps, minibatches, samples]


@pytest.fixture(autouse=True)
def one_thread():
    """On arrays this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    head = rng.normal(size=(SIDE * SIDE * 4, K)) * 0.3
    return Problem(
        conv=rng.normal(size=(3, 3, CHANNELS, 4)) * 0.4,
        head=head,
        images=rng.random((NUM_SAMPLES, SIDE, SIDE, CHANNELS)),
        mask=rng.random((SIDE, SIDE, 1)),
        pattern=rng.random((SIDE, SIDE, CHANNELS)),
        orders=np.stack([rng.permutation(NUM_SAMPLES).reshape(3, 4) for _ in range(NUM_STEPS)]),
    )


def logits_in_jax(variables, images):
    conv, head = variables
    maps = jax.lax.conv_general_dilated(
        images, conv, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(maps).reshape(len(images), -1) @ head


class Step(NamedTuple):
    """What is compared after every step."""

    mask: np.ndarray
    pattern: np.ndarray
    mask_weight: float
    losses: np.ndarray  # of the step's minibatches, before their updates
    hits: float
    size: float
    smallest: float


class Published:
    """The published schedule: one Adam update a minibatch, λ by patience, the smallest kept."""

    def __init__(self, problem):
        self.conv = torch.tensor(problem.conv.transpose(3, 2, 0, 1))
        self.head = torch.tensor(problem.head)
        self.images = torch.tensor(problem.images.transpose(0, 3, 1, 2))
        self.variables = [
            torch.atanh((torch.tensor(part.transpose(2, 0, 1)) - 0.5) * SPAN).requires_grad_()
            for part in (problem.mask, problem.pattern)
        ]
        self.adam = torch.optim.Adam(self.variables, lr=0.1, betas=(0.5, 0.9), eps=1e-7)
        self.mask_weight = MASK_WEIGHT
        self.above = self.below = 0
        self.smallest, self.kept = float("inf"), None

    def trigger(self):
        return [torch.tanh(v) / SPAN + 0.5 for v in self.variables]

    def logits(self, trigger, chosen):
        mask, pattern = trigger
        stamped = (1 - mask) * self.images[chosen] + mask * pattern
        maps = torch.nn.functional.conv2d(stamped, self.conv, padding=1)
        return maps.relu().permute(0, 2, 3, 1).flatten(1) @ self.head

    def success_rate(self, trigger):
        with torch.no_grad():
            logits = self.logits(trigger, range(NUM_SAMPLES))
        return float((logits.argmax(1) == TARGET).double().mean())

    def step(self, order):
        hits, losses = 0, []
        for chosen in order:
            trigger = self.trigger()
            logits = self.logits(trigger, chosen)
            target = torch.full([len(chosen)], TARGET)
            entropy = torch.nn.functional.cross_entropy(logits, target)
            self.adam.zero_grad()
            (entropy + self.mask_weight * trigger[0].sum()).backward()
            self.adam.step()
            hits += int((logits.argmax(1) == TARGET).sum())
            losses.append(entropy.item())
        reached = hits / NUM_SAMPLES >= BOUND
        self.above, self.below = (self.above + 1, 0) if reached else (0, self.below + 1)
        if self.above == PATIENCE:
            self.mask_weight, self.above = self.mask_weight * 1.5, 0
        elif self.below == PATIENCE:
            self.mask_weight, self.below = self.mask_weight / 1.5**1.5, 0
        trigger = [part.detach().clone() for part in self.trigger()]
        size = CHANNELS * trigger[0].sum().item()
        if reached and size < self.smallest:
            self.smallest, self.kept = size, trigger
            with torch.no_grad():
                for variable, part in zip(self.variables, trigger, strict=True):
                    variable.copy_(torch.atanh((part - 0.5) * SPAN))
        mask, pattern = (part.permute(1, 2, 0).numpy() for part in trigger)
        return Step(mask, pattern, self.mask_weight, np.array(losses), hits, size, self.smallest)


def steps_in_jax(problem):
    """The same steps by the public functions of `neural_cleanse`."""
    inversion = NeuralCleanse(**OPTIONS)

    def score(trigger, images):
        logits = logits_in_jax((problem.conv, problem.head), stamp(images, trigger))
        targets = jnp.full(len(images), TARGET)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        hits = (logits.argmax(1) == TARGET).astype(logits.dtype)
        unused = jnp.zeros(len(images))  # by the published schedule
        return Score(losses, hits, jnp.ones(len(images)), unused, unused, images)

    def trigger_of(state):
        return jax.tree.map(lambda v: jnp.tanh(v) / SPAN + 0.5, state.theta)

    @jax.jit
    def update(state, chosen):
        images = jnp.asarray(problem.images)[chosen]
        loss = score(trigger_of(state), images).losses.mean()
        return inversion.update(state, lambda trigger: score(trigger, images), 0.0), loss

    @jax.jit
    def finish(state):
        trigger, hits = trigger_of(state), state.hits
        state = inversion.observe(state, jax.random.key(0))
        return state, (trigger, state.mask_weight, hits, trigger_size(trigger))

    start = Trigger(jnp.asarray(problem.mask), jnp.asarray(problem.pattern))
    first = jax.jit(score)(start, jnp.asarray(problem.images))
    state = jax.jit(inversion.init)(start, jnp.asarray(MASK_WEIGHT), first, jax.random.key(0))
    steps = []
    for order in problem.orders:
        losses = []
        for chosen in order:
            state, loss = update(state, chosen)
            losses.append(loss)
        state, (trigger, mask_weight, hits, size) = finish(state)
        taken = (trigger.mask, trigger.pattern, mask_weight, np.array(losses), hits, size)
        steps.append(Step(*jax.device_get(taken), state.candidate_size))
    return steps


def test_forty_steps_are_the_same_in_pytorch_and_in_jax(problem):
    published = Published(problem)
    expected = [published.step(order) for order in problem.orders]
    with jax.enable_x64(True):
        ours = steps_in_jax(problem)
    for number, (got, want) in enumerate(zip(ours, expected, strict=True)):
        for name in Step._fields:
            np.testing.assert_allclose(
                getattr(got, name),
                getattr(want, name),
                rtol=1e-7,
                atol=1e-9,
                err_msg=f"{name} after step {number}",
            )
    # The comparison covers both movements of λ, successes, failures and restarts.
    weights = [step.mask_weight for step in expected]
    assert max(weights) > MASK_WEIGHT
    assert any(b < a for a, b in itertools.pairwise(weights))
    assert len({step.smallest for step in expected}) > 3
    assert {step.hits / NUM_SAMPLES >= BOUND for step in expected} == {True, False}


def test_the_whole_loop_finds_the_trigger_that_pytorch_finds(problem):
    # One minibatch, so that the order of the samples plays no part; verified after every step.
    published = Published(problem)
    verified, size, rate = None, float("inf"), 0.0
    for _ in range(NUM_STEPS):
        published.step([np.arange(NUM_SAMPLES)])
        if published.smallest < size:
            measured = published.success_rate(published.kept)
            if measured >= BOUND:
                verified, size, rate = published.kept, published.smallest, measured
        published.smallest, published.kept = size, verified
    with jax.enable_x64(True):
        find = functools.partial(
            invert,
            logits_in_jax,
            budget=Budget(NUM_STEPS, MASK_WEIGHT, NUM_SAMPLES),
            inversion=NeuralCleanse(verify_every=1, **OPTIONS),
        )
        result = jax.jit(find)(
            (problem.conv, problem.head),
            Samples(problem.images, np.ones(NUM_SAMPLES), TARGET),
            Trigger(problem.mask, problem.pattern),
            jax.random.key(0),
        )
        result = jax.device_get(result)
    assert np.isfinite(size)
    assert result.size == pytest.approx(size, rel=1e-7)
    assert result.success_rate == pytest.approx(rate)
    mask, pattern = (part.permute(1, 2, 0).numpy() for part in verified)
    np.testing.assert_allclose(result.trigger.mask, mask, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(result.trigger.pattern, pattern, rtol=1e-6, atol=1e-9)
