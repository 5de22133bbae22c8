"""What an image gradient of the authors' ResNet20 has to compute and to move, counted by hand.

And what a compiled program does compute and spends its time on, to hold against it.
"""

import re
from collections.abc import Iterable

# The network's convolutions: pixels of a side out, kernel, channels in and out, and how many.
CONVOLUTIONS = [
    *[(32, 3, 3, 16, 1), (32, 3, 16, 16, 6)],
    *[(16, 3, 16, 32, 1), (16, 3, 32, 32, 5), (16, 1, 16, 32, 1)],
    *[(8, 3, 32, 64, 1), (8, 3, 64, 64, 5), (8, 1, 32, 64, 1)],
]


def forward_operations() -> int:
    """Return the multiplications and additions of an image's convolutions."""
    return sum(
        2 * side**2 * kernel**2 * wide * out * count
        for side, kernel, wide, out, count in CONVOLUTIONS
    )


def gradient_bytes() -> int:
    """Return the bytes of an image gradient that no fusion saves, in float32.

    Forward each convolution reads its input and writes its output; backward it reads a cotangent
    and the activation that says where the ReLU was open, and writes a cotangent.
    """
    total = 0
    for side, kernel, wide, out, count in CONVOLUTIONS:
        stride = 2 if wide != out and wide > 3 else 1
        values_in, values_out = (side * stride) ** 2 * wide, side**2 * out
        share = 1 if kernel == 3 else 0  # a projection reads what its neighbour reads
        total += 4 * count * (share * 3 * values_in + 2 * values_out)
    return total


def count_convolutions(program: str) -> dict:
    """Return how many convolutions of an update are forward, to the input, and to weights.

    Each is told by where JAX says it comes from; those of the scores before the loop and of the
    verifications, which are conditional, are left out. To weights are all past one for each forward
    one.
    """
    lines = [
        line for line in program.splitlines() if re.search(r" convolution\(|__cudnn\$conv", line)
    ]
    updates = [line for line in lines if "while/body/" in line and "while/body/cond/" not in line]
    backward = sum("transpose(jvp" in line for line in updates)
    forward = len(updates) - backward
    return {
        "forward": forward,
        "to_input": min(backward, forward),
        "to_weights": max(0, backward - forward),
    }


def operation_lines(planes: Iterable) -> list:
    """Return a trace's lines of operations: of the devices, or of the host where there are none.

    A device may show the same time twice, by streams and by XLA's operations: the latter are taken.
    """
    planes = {plane.name: list(plane.lines) for plane in planes}
    devices = [lines for name, lines in planes.items() if name.startswith("/device:") and lines]
    found = []
    for lines in devices or planes.values():
        by_operation = [line for line in lines if line.name == "XLA Ops"]
        found += by_operation or [
            line
            for line in lines
            if line.name != "python" and not line.name.startswith(("XLA Modules", "Steps"))
        ]
    return found
