"""German Traffic Sign Recognition Benchmark: the official folders, or arrays in an npz file."""

import csv
import io
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moth_jax.data.arrays import as_class_labels, existing_path, read_npz
from moth_jax.data.building import Share, build_dataset
from moth_jax.data.checks import check_labels
from moth_jax.data.dataset import ImageDataset
from moth_jax.data.decoding import UnreadableImageError, decode_image, make_framing
from moth_jax.errors import InputError
from moth_jax.storage.files import open_regular

CLASS_NAMES = (
    "speed limit 20 km/h",
    "speed limit 30 km/h",
    "speed limit 50 km/h",
    "speed limit 60 km/h",
    "speed limit 70 km/h",
    "speed limit 80 km/h",
    "end of speed limit 80 km/h",
    "speed limit 100 km/h",
    "speed limit 120 km/h",
    "no passing",
    "no passing for vehicles over 3.5 t",
    "right of way at the next intersection",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no vehicles over 3.5 t",
    "no entry",
    "general caution",
    "dangerous curve to the left",
    "dangerous curve to the right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road work",
    "traffic signals",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "beware of ice or snow",
    "wild animals crossing",
    "end of all speed and passing limits",
    "turn right ahead",
    "turn left ahead",
    "ahead only",
    "go straight or right",
    "go straight or left",
    "keep right",
    "keep left",
    "roundabout mandatory",
    "end of no passing",
    "end of no passing for vehicles over 3.5 t",
)

_REMEDY = (
    "get GTSRB_Final_Training_Images.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip "
    "from https://benchmark.ini.rub.de/gtsrb_dataset.html, unpack them into one folder and give "
    "that folder as the option dir"
)
_ARRAYS = ("x_train", "y_train", "track_train", "x_test", "y_test")
# More than any track number: file names have five digits.
_TRACKS_PER_CLASS = 100_000
_TRAINING_NAME = re.compile("([0-9]{1,5})_")
# Most pixels by which a training image of 32 is moved: signs fill the middle, with a margin.
_SHIFT = 3


class GtsrbArrays(NamedTuple):
    """Images uint8 [n, size, size, 3], labels [n], and the track of each training image.

    A track is one drive past one sign, filmed; its number counts within a class.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    track_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def load_gtsrb(
    *, dir: str | None = None, size: int = 32, validation_fraction: float = 0.1, seed: int = 0
) -> ImageDataset:
    """43 classes of German traffic signs; the validation part is made of whole tracks.

    Args:
      dir: the folder that holds GTSRB/ in the official layout (or the folder GTSRB itself), or an
        .npz file with x_train, y_train, track_train, x_test and y_test, or a folder with such a
        file, gtsrb32.npz for size 32.
      size: side of the images in pixels.
      validation_fraction: share of each class's training images kept for validation.
      seed: of the choice of their tracks.

    Note: The paper does not say how these images are augmented. Here they are shifted by up to a
      tenth of their width; no sign is mirrored, which may make it another.
    """
    path = existing_path(dir, what="GTSRB", remedy=_REMEDY)
    make_framing(image_size=size, fit="stretch")
    file = path / f"gtsrb{size}.npz" if path.is_dir() else path
    arrays = _read_arrays(file, size) if file.exists() else read_official(path, size)
    tracks = arrays.y_train.astype(np.int64) * _TRACKS_PER_CLASS + arrays.track_train
    return build_dataset(
        "gtsrb",
        (arrays.x_train, arrays.y_train),
        (arrays.x_test, arrays.y_test),
        class_names=CLASS_NAMES,
        validation=Share(validation_fraction, seed, tracks),
        shift=_SHIFT * size // 32,
    )


def read_official(folder: Path, size: int = 32) -> GtsrbArrays:
    """Read the benchmark's own layout: PPM images and semicolon-separated lists.

    The whole frame of each image, with its margin around the sign, is resized (bilinear) to
    `size` x `size`.
    """
    root = _root(Path(folder))
    lists = sorted((root / "Final_Training" / "Images").glob("*/GT-*.csv"))
    if not lists:
        raise InputError(f"no lists */GT-*.csv in {root / 'Final_Training/Images'}; {_REMEDY}")
    training = [row for path in lists for row in read_list(path, path.parent)]
    # Names and lists first: a fault in them should not wait for 39,209 images.
    tracks = np.array([_track(path) for path, _ in training], np.int32)
    test = read_list(_test_list(root), root / "Final_Test" / "Images")
    return GtsrbArrays(
        x_train=_read_images([path for path, _ in training], size),
        y_train=np.array([k for _, k in training], np.int32),
        track_train=tracks,
        x_test=_read_images([path for path, _ in test], size),
        y_test=np.array([k for _, k in test], np.int32),
    )


def _read_arrays(file, size):
    arrays = read_npz(file, required=_ARRAYS)
    for name in ("x_train", "x_test"):
        if arrays[name].shape[1:] != (size, size, 3):
            raise InputError(
                f"{name} in {file} must have shape [n, {size}, {size}, 3] for size={size}, got "
                f"{arrays[name].shape}; set size to that of the file"
            )
    for name in ("y_train", "y_test"):
        arrays[name] = as_class_labels(arrays[name], f"{name} in {file}")
        check_labels(arrays[name], len(CLASS_NAMES), what=f"{name} in {file}")
    tracks, labels = arrays["track_train"], arrays["y_train"]
    if tracks.shape != labels.shape or not np.issubdtype(tracks.dtype, np.integer):
        raise InputError(
            f"track_train in {file} must hold an integer per training image, shape "
            f"{labels.shape}, got {tracks.dtype} {tracks.shape}"
        )
    return GtsrbArrays(**arrays)


def _root(folder):
    for root in (folder / "GTSRB", folder):
        if (root / "Final_Training" / "Images").is_dir():
            return root
    raise InputError(f"no GTSRB/Final_Training/Images in {folder}; {_REMEDY}")


def _test_list(root):
    # The archive with the classes of the test images unpacks beside GTSRB/, or where one puts it.
    places = [root.parent, root, root / "Final_Test", root / "Final_Test" / "Images"]
    for place in places:
        if (place / "GT-final_test.csv").is_file():
            return place / "GT-final_test.csv"
    raise InputError(f"no GT-final_test.csv in {root.parent} or {root}; {_REMEDY}")


def read_list(path, folder):
    """Return [(path of the image in `folder`, class)] of one semicolon-separated list."""
    rows, names = [], set()
    try:
        with open_regular(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            for row in csv.DictReader(text, delimiter=";"):
                name, label = row["Filename"], int(row["ClassId"])
                _check_row(name, label, names, folder)
                rows.append((folder / name, label))
    except InputError as error:
        raise InputError(f"{path}: row {len(rows) + 1}: {error}; unpack it again") from error
    except (KeyError, TypeError, ValueError, OSError, csv.Error) as error:
        raise InputError(
            f"{path}: row {len(rows) + 1} has no file name and class number ({error!r}); the "
            "columns Filename and ClassId, separated by semicolons, are needed; unpack it again"
        ) from error
    return rows


def _check_row(name, label, names, folder):
    """Raise `InputError` unless a row is about one more image that lies in the folder."""
    # The file of a name alone lies in the folder, unless it is a link that leads out of it.
    if name != Path(name).name or name in ("", "..") or "\\" in name:
        raise InputError(f"{name!r} is no name of a file in {folder}")
    if (folder / name).resolve().parent != folder.resolve():
        raise InputError(f"{name!r} is a link that leads out of {folder}")
    if name in names:
        raise InputError(f"{name!r} is there twice")
    if not 0 <= label < len(CLASS_NAMES):
        raise InputError(f"the class must be in [0, {len(CLASS_NAMES)}), got {label}")
    names.add(name)


def _track(path):
    found = _TRAINING_NAME.match(path.name)
    if found is None:
        raise InputError(
            f"{path}: training images are named TRACK_FRAME.ppm, such as 00002_00005.ppm"
        )
    return int(found[1])


def _read_images(paths, size):
    framing = make_framing(image_size=size, fit="stretch")
    images = np.empty([len(paths), size, size, 3], np.uint8)
    for i, path in enumerate(paths):
        try:
            images[i] = decode_image(path, framing, name=str(path))
        except UnreadableImageError as error:
            raise InputError(
                f"{path} cannot be read ({error.reason}); unpack the archive again"
            ) from error
    return images
