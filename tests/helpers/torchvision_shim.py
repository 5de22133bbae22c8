"""torchvision beside a PyTorch without CUDA, as far as its classifiers need it.

The ordinary wheel of torchvision is linked against CUDA. On a CPU-only torch its compiled operators
cannot load, and importing it fails because it describes the shapes of operators that do not exist.
Declaring them is enough: classifiers use none. Skips what imports it where either is missing.
"""

import pytest

torch = pytest.importorskip("torch")

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _import_torchvision():
    try:
        return pytest.importorskip("torchvision"), None
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for operator in OPERATORS:
        library.define(operator)
    return pytest.importorskip("torchvision"), library


torchvision, _LIBRARY = _import_torchvision()  # the declarations go when the library is collected
