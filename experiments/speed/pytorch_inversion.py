"""The published inversion as a plain PyTorch loop, and the authors' ResNet20 as a PyTorch module.

What `benchmark.py` compares this package with. It knows nothing of `moth_jax`.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

SPAN = 2 - 1e-7


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: the odd row and column at the bottom and right."""

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (1, 1):
            return super().forward(x)
        below = self.kernel_size[0] - 2 + x.shape[-1] % 2  # kernels of 3 and 1 at stride 2
        return super().forward(F.pad(x, (0, below, 0, below)) if below > 0 else x)


def conv(width_in: int, width: int, size: int = 3, stride: int = 1) -> SameConv:
    return SameConv(width_in, width, size, stride, padding=size // 2 if stride == 1 else 0)


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = conv(width_in, width, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width)
        self.projection = conv(width_in, width, 1, stride) if width != width_in else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.projection is None else self.projection(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


class PreactResNet20(nn.Module):
    """The authors' ResNet20: images [n, 3, 32, 32] in [0, 1] to logits [n, 10]."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.conv = conv(3, 16)
        plan = [(16, 16, 1)] * 3 + [
            (16, 32, 2),
            *[(32, 32, 1)] * 2,
            (32, 64, 2),
            *[(64, 64, 1)] * 2,
        ]
        self.blocks = nn.Sequential(*[Block(*block) for block in plan])
        self.bn = nn.BatchNorm2d(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.conv((x - self.mean) / self.std))
        return self.head(F.relu(self.bn(x)).mean((2, 3)))


def load_keras(weights: dict[str, np.ndarray], mean, std) -> PreactResNet20:
    """Return the authors' model for inversion: evaluation mode, no gradients of its weights.

    Keras numbers the layers of a kind in the order of their creation, which is that of
    `modules()` here: in a block the two 3x3 convolutions, then the projection.
    """
    model, numbers = PreactResNet20(mean, std), {}

    def copy_next(kind: str, tensors: dict[str, Tensor]) -> None:
        numbers[kind] = numbers.get(kind, 0) + 1
        for name, tensor in tensors.items():
            array = torch.from_numpy(weights[f"{kind}_{numbers[kind]}/{name}"])
            order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
            tensor.copy_(array.permute(order))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                copy_next("conv2d", {"kernel": module.weight, "bias": module.bias})
            elif isinstance(module, nn.Linear):
                copy_next("dense", {"kernel": module.weight, "bias": module.bias})
            elif isinstance(module, nn.BatchNorm2d):
                statistics = {"moving_mean": module.running_mean}
                statistics["moving_variance"] = module.running_var
                affine = {"gamma": module.weight, "beta": module.bias}
                copy_next("batch_normalization", affine | statistics)
    return model.eval().requires_grad_(False)


class Result(NamedTuple):
    """The smallest trigger found: size (inf if none), mean loss, and what was computed for it.

    Mask and pattern are those of the size, the start's if none was found; the losses [n] are each
    image's in the first pass, and in the pass that kept the trigger.
    """

    size: float
    cross_entropy: float
    image_gradients: int
    mask: Tensor
    pattern: Tensor
    losses_before: Tensor
    losses_after: Tensor


def invert(
    model: nn.Module,
    images: Tensor,
    target: int,
    *,
    num_steps: int,
    seed: int = 0,
    mask_weight: float = 1e-3,
    success_bound: float = 0.9,
    patience: int = 10,
    start: tuple[Tensor, Tensor] | None = None,
) -> Result:
    """Search the smallest trigger that sends `images` [n, c, h, w] to `target`, as published."""
    generator = torch.Generator().manual_seed(seed)
    num_images, channels, height, width = images.shape
    labels = torch.full((num_images,), target, device=images.device)
    if start is None:
        start = tuple(
            torch.rand(c, height, width, generator=generator).to(images.device)
            for c in (1, channels)
        )
    theta = [to_theta(value).requires_grad_() for value in start]
    optimizer = torch.optim.Adam(theta, lr=0.1, betas=(0.5, 0.9), eps=1e-7)
    best_size, best = math.inf, start
    losses = torch.zeros(num_images, device=images.device)
    losses_before = losses_after = None
    above = below = image_gradients = 0

    for _ in range(num_steps):
        hits = 0.0
        for chosen in torch.randperm(num_images, generator=generator).split(32):
            mask, pattern = map(to_unit, theta)
            logits = model((1 - mask) * images[chosen] + mask * pattern)
            cross_entropy = F.cross_entropy(logits, labels[chosen], reduction="none")
            optimizer.zero_grad()
            (cross_entropy.mean() + mask_weight * mask.sum()).backward()
            optimizer.step()
            hits += (logits.argmax(1) == target).sum().item()
            losses[chosen] = cross_entropy.detach()
            image_gradients += len(chosen)
        if losses_before is None:
            losses_before = losses_after = losses.clone()

        reached = hits / num_images >= success_bound
        above, below = (above + 1, 0) if reached else (0, below + 1)
        if above == patience:
            mask_weight, above = mask_weight * 1.5, 0
        elif below == patience:
            mask_weight, below = mask_weight / 1.5**1.5, 0

        with torch.no_grad():
            trigger = tuple(map(to_unit, theta))
            size = channels * trigger[0].sum().item()
            if reached and size < best_size:
                best_size, best, losses_after = size, trigger, losses.clone()
                for variable, value in zip(theta, trigger, strict=True):
                    noise = 0.02 * torch.rand(value.shape, generator=generator) - 0.01
                    variable.copy_(to_theta((value + noise.to(value.device)).clamp(0, 1)))
    mean_loss = losses_after.mean().item() if math.isfinite(best_size) else math.nan
    return Result(best_size, mean_loss, image_gradients, *best, losses_before, losses_after)


def to_unit(theta: Tensor) -> Tensor:
    """Return what the free variables stand for, in [0, 1]."""
    return torch.tanh(theta) / SPAN + 0.5


def to_theta(value: Tensor) -> Tensor:
    return torch.atanh((value - 0.5) * SPAN)
