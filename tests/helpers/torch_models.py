"""Plain PyTorch modules of the architectures that torchvision does not have, by public names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.models import ModelSpec

torch = pytest.importorskip("torch")
F = torch.nn.functional


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state_dict as NumPy arrays."""
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def to_torch(images, dtype, spec: ModelSpec | None = None) -> torch.Tensor:
    """Images [n h w c] as PyTorch takes them, [n c h w], normalised if `spec` is given."""
    images = images.astype(np.float64)
    if spec is not None:
        images = (images - np.array(spec.mean)) / np.array(spec.std)
    return torch.tensor(images.transpose(0, 3, 1, 2), dtype=dtype)


def in_float64(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)


class CifarBlock(torch.nn.Module):
    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(width)
        self.stride, self.extra = stride, (width - width_in) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.extra, self.extra)))


class CifarResNet(torch.nn.Module):
    """akamaster's ResNet of depth 6 `blocks` + 2."""

    def __init__(self, blocks=3, num_classes=10):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            rest = [CifarBlock(widths[stage], widths[stage], 1) for _ in range(blocks - 1)]
            first = CifarBlock(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            setattr(self, f"layer{stage}", torch.nn.Sequential(first, *rest))
        self.linear = torch.nn.Linear(64, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class WideBlock(torch.nn.Module):
    def __init__(self, width_in, width, stride):
        super().__init__()
        self.bn1 = torch.nn.BatchNorm2d(width_in)
        self.conv1 = torch.nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut = (
            None
            if width == width_in
            else torch.nn.Conv2d(width_in, width, 1, stride, 0, bias=False)
        )

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideResNet(torch.nn.Module):
    """xternalz's wide ResNet of depth 6 `blocks` + 4."""

    def __init__(self, blocks=2, widening=1, num_classes=10):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        widths = (16, 16 * widening, 32 * widening, 64 * widening)
        for stage in (1, 2, 3):
            rest = [WideBlock(widths[stage], widths[stage], 1) for _ in range(blocks - 1)]
            first = WideBlock(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            layer = torch.nn.Sequential(first, *rest)
            setattr(self, f"block{stage}", torch.nn.ModuleDict({"layer": layer}))
        self.bn1 = torch.nn.BatchNorm2d(widths[3])
        self.fc = torch.nn.Linear(widths[3], num_classes)

    def forward(self, x):
        x = self.conv1(x)
        for block in (self.block1, self.block2, self.block3):
            x = block["layer"](x)
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class CifarVGG19(torch.nn.Module):
    """kuangliu's VGG19 for 32x32 images: one dense layer, of the single position that is left."""

    def __init__(self, num_classes=10):
        super().__init__()
        layers, before = [], 3
        for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(count):
                layers += [
                    torch.nn.Conv2d(before, width, 3, padding=1),
                    torch.nn.BatchNorm2d(width),
                    torch.nn.ReLU(),
                ]
                before = width
            layers.append(torch.nn.MaxPool2d(2))
        self.features = torch.nn.Sequential(*layers)
        self.classifier = torch.nn.Linear(512, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def _mlpconv(width_in, kernel, *widths):
    layers = []
    for width in widths:
        layers += [
            torch.nn.Conv2d(width_in, width, kernel, padding=kernel // 2),
            torch.nn.ReLU(),
        ]
        width_in, kernel = width, 1
    return torch.nn.Sequential(*layers)


class NiN(torch.nn.Module):
    """The MOTH authors' Network in Network; ceil_mode is Keras' "same" at even sizes."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.block1 = _mlpconv(3, 5, 192, 160, 96)
        self.block2 = _mlpconv(96, 5, 192, 192, 192)
        self.block3 = _mlpconv(192, 3, 192, 192, num_classes)

    def forward(self, x):
        for block in (self.block1, self.block2):
            x = F.max_pool2d(block(x), 3, 2, ceil_mode=True)
        return self.block3(x).mean((2, 3))


class LisaCNN(torch.nn.Module):
    """The network of Eykholt et al. for 32x32 images."""

    def __init__(self, num_classes=18):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 64, 8, 2, 3)
        self.conv2 = torch.nn.Conv2d(64, 128, 6, 2)
        self.conv3 = torch.nn.Conv2d(128, 128, 5)
        self.fc = torch.nn.Linear(512, num_classes)

    def forward(self, x):
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x))
        return self.fc(x.flatten(1))
