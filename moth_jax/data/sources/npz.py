"""A user's own images, in one npz file."""

from collections.abc import Sequence

from moth_jax.data.arrays import (
    as_class_labels,
    as_class_names,
    as_pixels,
    count_classes,
    existing_path,
    read_npz,
    warn_of_mixed_types,
)
from moth_jax.data.building import Share, build_dataset
from moth_jax.data.dataset import ImageDataset
from moth_jax.errors import InputError
from moth_jax.storage.files import UNPACKED_LIMIT

_REQUIRED = ("x_train", "y_train", "x_test", "y_test")
_OPTIONAL = ("x_val", "y_val", "class_names", "group_train", "track_train")
_REMEDY = (
    f"give as the option file an .npz with {', '.join(_REQUIRED)}, as written by "
    "numpy.savez_compressed"
)


def load_npz(
    *,
    file: str | None = None,
    pixel_max: float = 1.0,
    class_names: Sequence[str] | None = None,
    flip: bool = False,
    shift: int = 0,
    validation_fraction: float = 0.1,
    seed: int = 0,
    unpacked_limit: int = UNPACKED_LIMIT,
) -> ImageDataset:
    """Images from the arrays x_train, y_train, x_test, y_test of an npz file.

    Images [n, h, w, c] are uint8 or floats; labels are integers [n] or one-hot [n, K]. The file may
    also hold x_val and y_val (otherwise validation is taken out of train), class_names [K] (text),
    and group_train [n] (or track_train): training images of one group, such as frames of one video,
    then go to validation together or not at all.

    Args:
      file: path of the npz file.
      pixel_max: the value that stands for white in images that are not uint8: 1 or 255, or 1023,
        4095, 16383 or 65535 for 10, 12, 14 or 16 bits.
      class_names: K names in label order, instead of those in the file.
      flip: whether a mirrored image keeps its class.
      shift: by how many pixels images are moved at most when they are augmented.
      validation_fraction: share of the training images kept for validation.
      seed: of that choice.
      unpacked_limit: bytes that a file may unpack to; one that is not packed to less than a
        hundredth may always.
    """
    path = existing_path(file, what="image file", remedy=_REMEDY)
    arrays = read_npz(path, required=_REQUIRED, optional=_OPTIONAL, unpacked_limit=unpacked_limit)
    if ("x_val" in arrays) != ("y_val" in arrays):
        raise InputError(f"{path} must hold both x_val and y_val, or neither")
    warn_of_mixed_types({name: array for name, array in arrays.items() if name[:2] == "x_"})
    parts = {
        part: (
            as_pixels(arrays[f"x_{part}"], pixel_max, f"x_{part} in {path}"),
            as_class_labels(arrays[f"y_{part}"], f"y_{part} in {path}"),
        )
        for part in ("train", "val", "test")
        if f"x_{part}" in arrays
    }
    groups = arrays.get("group_train", arrays.get("track_train"))
    num_classes = count_classes(parts["train"][1], f"y_train in {path}")
    return build_dataset(
        path.stem,
        parts["train"],
        parts["test"],
        validation=parts.get("val", Share(validation_fraction, seed, groups)),
        class_names=as_class_names(
            arrays.get("class_names") if class_names is None else class_names, num_classes
        ),
        flip=flip,
        shift=shift,
    )
