"""LISA traffic signs, as the arrays people publish and the MOTH authors' code reads."""

from collections.abc import Sequence

from moth_jax.data.arrays import (
    as_class_labels,
    as_class_names,
    as_pixels,
    count_classes,
    existing_path,
)
from moth_jax.data.building import Share, build_dataset
from moth_jax.data.dataset import ImageDataset
from moth_jax.errors import InputError
from moth_jax.storage.files import load_npy

_REMEDY = (
    "cut the signs out of https://cvrr.ucsd.edu/LISA/lisa-traffic-sign-dataset.html, resize them "
    "to 32 x 32, save train_x.npy, train_y.npy, test_x.npy, test_y.npy (and val_x.npy, val_y.npy) "
    "in one folder and give it as the option dir"
)


def load_lisa(
    *,
    dir: str | None = None,
    pixel_max: float = 1.0,
    class_names: Sequence[str] | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> ImageDataset:
    """US traffic signs, 18 classes in the paper.

    The arrays are train_x.npy and train_y.npy, or x_train.npy and y_train.npy, capitals or not;
    the same for test, and for val if there are such files. Images [n, h, w, 3] are uint8 or
    floats; labels are integers [n] or one-hot [n, K].

    Args:
      dir: the folder with the arrays.
      pixel_max: the value that stands for white in images that are not uint8, as for `load_npz`.
      class_names: K names in label order. The published arrays carry none; without them classes
        are called "class 0" and so on.
      validation_fraction: share of the training images kept for validation, if no val files exist.
      seed: of that choice.
    """
    folder = existing_path(dir, what="LISA", remedy=_REMEDY)
    train = _read_part(folder, "train", pixel_max)
    test = _read_part(folder, "test", pixel_max)
    validation = Share(validation_fraction, seed)
    if _find(folder, "val", "x") or _find(folder, "val", "y"):
        validation = _read_part(folder, "val", pixel_max)
    return build_dataset(
        "lisa",
        train,
        test,
        validation=validation,
        class_names=as_class_names(class_names, count_classes(train[1], "LISA train labels")),
    )


def _read_part(folder, part, pixel_max):
    images, labels = _find(folder, part, "x"), _find(folder, part, "y")
    if images is None or labels is None:
        paths = {"x": images, "y": labels}
        absent = [f"{part}_{axis}.npy" for axis, path in paths.items() if path is None]
        raise InputError(f"no {' and no '.join(absent)} in {folder}; {_REMEDY}")
    pixels = as_pixels(load_npy(images, advice=_REMEDY), pixel_max, str(images))
    return pixels, as_class_labels(load_npy(labels, advice=_REMEDY), str(labels))


def _find(folder, part, axis):
    names = (f"{part}_{axis}.npy", f"{axis}_{part}.npy")
    found = sorted(path for path in folder.glob("*.npy") if path.name.lower() in names)
    if len(found) > 1:
        raise InputError(
            f"{folder} holds {' and '.join(path.name for path in found)}, which mean the same "
            "array; keep one of them"
        )
    return found[0] if found else None
