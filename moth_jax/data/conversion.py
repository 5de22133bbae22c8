"""Arrays of any library, and lists of them, as NumPy's: what users give is converted here, once."""

import numbers
from collections.abc import Sequence

import numpy as np

from moth_jax.data.checks import check_images, check_labels
from moth_jax.errors import InputError, first_line

_KINDS = (
    "an array of NumPy, PyTorch, JAX or TensorFlow, or a list of arrays or of Pillow images of one "
    "size"
)
_PROTOCOLS = ("__array__", "__array_interface__", "__array_struct__")
_PILLOW_MODES = ("L", "RGB", "RGBA")  # whose numbers are pixels from 0 to 255, and nothing else


def as_images(images, *, what: str = "images") -> np.ndarray:
    """Return images [n, h, w, c], uint8 or floats in [0, 1], of whatever library they are.

    Args:
      images: an array of any library, or a list of arrays or of Pillow images.
      what: how messages name it.

    Raises:
      InputError: they are no such array, or cannot be given to a classifier of images in [0, 1].

    >>> as_images([[[[0.5], [1.0]]]]).shape
    (1, 1, 2, 1)
    """
    array = as_array(images, what)
    # The last axis of small images may be as short as one of channels: PyTorch's come second.
    if _is_torch(images) and _look_channels_first(array.shape):
        raise InputError(
            f"{what} of shape {array.shape} look like channels first; give "
            "images.permute(0, 2, 3, 1)"
        )
    check_images(array, what=what)
    return array


def as_labels(
    labels, num_classes: int, *, num_images: int | None = None, what: str = "labels"
) -> np.ndarray:
    """Return labels [n], integers in [0, `num_classes`), of whatever library they are.

    Raises:
      InputError: they are no such array.
    """
    if isinstance(labels, Sequence | np.ndarray) and len(labels) and isinstance(labels[0], str):
        raise InputError(
            f"{what} must be the numbers of the classes, got the text {labels[0]!r}; give "
            "[class_names.index(label) for label in labels]"
        )
    array = as_array(labels, what)
    check_labels(array, num_classes, num_images=num_images, what=what)
    return array.astype(np.int64) if array.dtype == np.uint64 else array


def as_array(value, what: str) -> np.ndarray:
    """Return an array of numbers, of whatever library it is, as NumPy's; NumPy's own as it is.

    Raises:
      InputError: `value`, which the message calls `what`, is no array of numbers.
    """
    try:
        array = _converted(value, what)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, NotImplementedError, MemoryError) as error:
        raise InputError(
            f"{what}: this {_kind(value)} cannot be converted to a NumPy array "
            f"({first_line(error)}); give {_KINDS}"
        ) from error
    if np.ma.is_masked(array):
        raise InputError(f"{what} are masked in places; fill or drop these, and give a plain array")
    if array.dtype.kind == "V" and array.dtype.names is None:  # JAX's short floats
        array = array.astype(np.float32)
    if array.dtype.kind not in "biufc":
        raise InputError(f"{what} must be {_KINDS}, of numbers; got {array.dtype}")
    return array


def _converted(value, what: str) -> np.ndarray:
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value
    if _is_torch(value):
        return _from_torch(value)
    if type(value).__module__.startswith("PIL."):
        return _from_pillow(value, what)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | memoryview):
        return _from_list(list(value), what)
    if isinstance(value, np.ndarray) and value.ndim:  # of objects
        return _from_list(list(value), what)
    if any(hasattr(value, name) for name in _PROTOCOLS) or isinstance(value, memoryview):
        return np.asarray(value)
    if hasattr(value, "__dlpack__"):
        return np.from_dlpack(value)  # pyright: ignore[reportArgumentType]
    raise InputError(f"{what} must be {_KINDS}, got {_kind(value)}")


def _from_list(items: list, what: str) -> np.ndarray:
    if all(isinstance(item, numbers.Number) for item in items):
        return np.asarray(items)
    arrays = [as_array(item, f"{what}[{i}]") for i, item in enumerate(items)]
    first = arrays[0]
    for i, array in enumerate(arrays):
        if (array.shape, array.dtype) != (first.shape, first.dtype):
            raise InputError(
                f"{what} must be of one size and type: {what}[0] is {first.shape} of "
                f"{first.dtype}, {what}[{i}] is {array.shape} of {array.dtype}"
            )
    return np.stack(arrays)


def _look_channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[1] in (1, 3) and shape[2] == shape[3] and shape[3] in (2, 4)


def _is_torch(value) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def _from_torch(tensor) -> np.ndarray:
    """The values of a tensor of PyTorch, which need not be imported for it."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.is_floating_point() and tensor.element_size() < 4:
        tensor = tensor.float()  # NumPy has not all of the short ones
    return tensor.numpy()


def _from_pillow(image, what: str) -> np.ndarray:
    """The pixels [h, w, c] of a Pillow image."""
    if image.mode not in _PILLOW_MODES:
        raise InputError(
            f"{what} is a Pillow image of mode {image.mode!r}, whose numbers are not plain pixels; "
            "give image.convert('RGB'), or 'L' for grey"
        )
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _kind(value) -> str:
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"
