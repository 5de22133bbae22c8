"""The published hardening as a plain PyTorch loop: eager, one inversion after another.

What `benchmark.py` compares this package with. It knows nothing of `moth_jax`: it is written from
the description of the method alone (Section IV, Algorithm 1, and the authors' constants). A pair's
samples are drawn into the batch deliberately, as in this package: the authors skip a step whose
random batch has too few of them, which would be no measure of speed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from pytorch_inversion import Result, invert
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Pair = tuple[int, int]


class Options(NamedTuple):
    """The published ones, under the names that they have in the package."""

    num_steps: int = 782  # two epochs of 50,000 images
    steps_per_round: int = 3
    batch_size: int = 128
    victims: int = 16
    first_steps: int = 200
    first_mask_weight: float = 1e-3
    next_steps: int = 50
    next_mask_weight: float = 1e-2
    warmup_steps: int = 500
    warmup_images: int = 10
    stamp_share: float = 0.1
    max_trigger_share: float = 0.25
    random_share: float = 0.3
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    flip: bool = True
    shift: int = 4
    seed: int = 0


class Data(NamedTuple):
    """Images [n, c, h, w] in [0, 1], labels [n], and the rows of every class."""

    images: Tensor
    labels: Tensor
    members: list[np.ndarray]


class Triggers:
    """Per direction the largest trigger found, and per target a universal one."""

    def __init__(self):
        self.largest: dict[Pair, Result] = {}
        self.universal: dict[int, Result] = {}

    def start(self, direction: Pair) -> tuple[Tensor, Tensor] | None:
        found = self.largest.get(direction, self.universal.get(direction[1]))
        return None if found is None else (found.mask, found.pattern)

    def keep(self, direction: Pair, found: Result) -> None:
        before = self.largest.get(direction)
        if math.isfinite(found.size) and (before is None or found.size > before.size):
            self.largest[direction] = found


class Arms:
    """The K-arm scheduler. All arrays are [K, K], row victim, column target."""

    def __init__(self, prior: np.ndarray, sizes: np.ndarray):
        found = np.isfinite(sizes)
        largest = sizes[found].max(initial=0.0) or 1.0
        self.prior = prior
        self.post = np.where(found, sizes, 0.0) / largest
        self.size = sizes.copy()
        self.pairwise = np.zeros(sizes.shape, bool)  # whether `size` is of the direction's own

    def select(self, step: int, random_share: float, rng: np.random.Generator) -> Pair:
        num_classes = len(self.prior)
        if rng.random() < random_share:
            return tuple(sorted(rng.choice(num_classes, 2, replace=False).tolist()))
        alpha = min(0.1 * step / 100, 1.0)
        reward = (1 - alpha) * (self.prior + self.prior.T) + alpha * (self.post + self.post.T)
        reward[np.tril_indices(num_classes)] = -np.inf
        return divmod(int(reward.argmax()), num_classes)

    def record(self, direction: Pair, sizes: list[float]) -> None:
        found = [size for size in sizes if math.isfinite(size)]
        if not found:
            return
        mean = float(np.mean(found))
        if self.pairwise[direction]:
            growth = (mean - self.size[direction]) / self.size[direction]
            self.post[direction] = (self.post[direction] + growth) / 2
        self.size[direction], self.pairwise[direction] = mean, True


def harden(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    options: Options = Options(),  # noqa: B008
    *,
    on_round: Callable[[str, list[float]], None] | None = None,
) -> Arms:
    """Harden `model` in place; images [n, c, h, w] in [0, 1], labels [n] of all K classes.

    `on_round` is called after each target of the warm-up and each round, with "warm-up" or
    "hardening" and the sizes of the triggers.
    """
    num_classes = int(labels.max()) + 1
    members = [np.flatnonzero(labels.cpu().numpy() == k) for k in range(num_classes)]
    data, rng = Data(images, labels, members), np.random.default_rng(options.seed)
    optimizer = sgd(model, options)
    prior = np.zeros((num_classes, num_classes))
    sizes, triggers = np.full_like(prior, np.inf), Triggers()
    for target in range(num_classes):
        found = warm_up(model, optimizer, data, target, prior, options, rng)
        sizes[:, target] = found.size
        if math.isfinite(found.size):
            triggers.universal[target] = found
        if on_round is not None:
            on_round("warm-up", [found.size])
    np.fill_diagonal(sizes, np.inf)
    arms, step = Arms(prior, sizes), 0
    while step < options.num_steps:
        pair = arms.select(step, options.random_share, rng)
        count = min(options.steps_per_round, options.num_steps - step)
        sizes_of = harden_round(model, optimizer, data, pair, triggers, count, options, rng)
        for direction, values in sizes_of.items():
            arms.record(direction, values)
        step += count
        if on_round is not None:
            on_round("hardening", [size for values in sizes_of.values() for size in values])
    return arms


def warm_up(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    target: int,
    prior: np.ndarray,
    options: Options,
    rng: np.random.Generator,
) -> Result:
    """Find one trigger for all other classes, fill in its column of `prior`, train one step."""
    victims = [k for k in range(len(data.members)) if k != target]
    drawn = [rng.permutation(data.members[k])[: options.warmup_images] for k in victims]
    found = invert(
        model,
        data.images[np.concatenate(drawn)],
        target,
        num_steps=options.warmup_steps,
        mask_weight=options.first_mask_weight,
        success_bound=0.99,
        seed=int(rng.integers(2**31)),
    )
    if math.isfinite(found.size):  # a failure says nothing of how promising a pair is
        fall = (found.losses_before - found.losses_after) / found.losses_before.clamp(min=1e-6)
        parts = fall.clamp(-1, 1).split([len(rows) for rows in drawn])
        prior[victims, target] = [part.mean().item() for part in parts]
    rows = rng.choice(len(data.images), options.batch_size, replace=False)
    images, labels = augment(data.images[rows], options, rng), data.labels[rows]
    if math.isfinite(found.size):
        half = torch.from_numpy(rng.random(len(rows)) < 0.5).to(labels.device)
        chosen = (half & (labels != target)).view(-1, 1, 1, 1)
        images = torch.where(chosen, stamp(images, found), images)
    update(model, optimizer, images, labels)
    return found


def harden_round(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    pair: Pair,
    triggers: Triggers,
    num_steps: int,
    options: Options,
    rng: np.random.Generator,
) -> dict[Pair, list[float]]:
    """Harden one pair for `num_steps` training steps; return each direction's sizes."""
    directions = [pair, pair[::-1]]
    sizes, found = {direction: [] for direction in directions}, None
    for _ in range(num_steps):
        if found is None or not all(math.isfinite(result.size) for result in found):
            starts = [triggers.start(direction) for direction in directions]
            budget = options.first_steps, options.first_mask_weight
        else:
            starts = [(result.mask, result.pattern) for result in found]
            budget = options.next_steps, options.next_mask_weight
        found = harden_step(model, optimizer, data, directions, starts, budget, options, rng)
        for direction, result in zip(directions, found, strict=True):
            triggers.keep(direction, result)
            sizes[direction].append(result.size)
    return sizes


def harden_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Data,
    directions: list[Pair],
    starts: list[tuple[Tensor, Tensor] | None],
    budget: tuple[int, float],
    options: Options,
    rng: np.random.Generator,
) -> list[Result]:
    """Invert both directions, stamp a share of their victims, take one step on the whole batch."""
    drawn = [rng.permutation(data.members[victim])[: options.victims] for victim, _ in directions]
    classes = [victim for victim, _ in directions]
    rest = np.concatenate([rows for k, rows in enumerate(data.members) if k not in classes])
    count = min(options.batch_size - sum(map(len, drawn)), len(rest))
    rows = np.concatenate([*drawn, rng.choice(rest, count, replace=False)])
    images, labels = augment(data.images[rows], options, rng), data.labels[rows]
    found, first = [], 0
    batch = images.clone()
    num_stamped = max(1, int(options.stamp_share * min(map(len, drawn))))
    for (_, target), start, victims in zip(directions, starts, drawn, strict=True):
        result = invert(
            model,
            images[first : first + len(victims)],
            target,
            num_steps=budget[0],
            mask_weight=budget[1],
            seed=int(rng.integers(2**31)),
            start=start,
        )
        if result.size <= options.max_trigger_share * images[0].numel():
            chosen = slice(first, first + num_stamped)
            batch[chosen] = stamp(images[chosen], result)
        first += len(victims)
        found.append(result)
    update(model, optimizer, batch, labels)
    return found


def stamp(images: Tensor, found: Result) -> Tensor:
    return (1 - found.mask) * images + found.mask * found.pattern


def sgd(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """Return Nesterov SGD; Keras adds `weight_decay` * |w|^2 of kernels to the loss."""
    kernels = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": 2 * options.weight_decay}, {"params": others}]
    return torch.optim.SGD(groups, lr=options.learning_rate, momentum=0.9, nesterov=True)


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    """Take one training step; inversions need evaluation mode, and no gradients of weights."""
    model.train().requires_grad_(True)
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.eval().requires_grad_(False)


def augment(images: Tensor, options: Options, rng: np.random.Generator) -> Tensor:
    """Mirror half of the images, and move each by whole pixels; what comes in is black."""
    shift, (height, width) = options.shift, images.shape[2:]
    if options.flip:
        mirrored = torch.from_numpy(rng.random(len(images)) < 0.5).to(images.device)
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    padded, moved = F.pad(images, (shift,) * 4), torch.empty_like(images)
    corners = rng.integers(0, 2 * shift + 1, (len(images), 2)).tolist()
    for i, (top, left) in enumerate(corners):
        moved[i] = padded[i, :, top : top + height, left : left + width]
    return moved
