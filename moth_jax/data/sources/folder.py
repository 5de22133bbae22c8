"""A user's own image files: a sub-folder for each class."""

import functools
import os
import re
import warnings
from collections.abc import Sequence

import numpy as np

from moth_jax.data.arrays import existing_path
from moth_jax.data.building import build_dataset
from moth_jax.data.dataset import ImageDataset
from moth_jax.data.decoding import (
    DEEP_EXTENSIONS,
    WHITES,
    UnreadableImageError,
    check_header,
    decode_image,
    largest_value,
    make_framing,
)
from moth_jax.data.sources.class_lists import ClassList, read_class_list
from moth_jax.data.sources.folder_scan import PARTS, WHOLE, check_faults, describe_strays, scan
from moth_jax.data.splitting import split_validation
from moth_jax.data.streaming import (
    DEFAULT_MEMORY,
    Listing,
    parallel_map,
    read_parts,
    version_of,
)
from moth_jax.errors import InputError, listed, require_choice

# The test part is the same for every seed: a seed may only change what is trained on.
_TEST_FRACTION, _TEST_SEED = 0.2, 0
_REMEDY = (
    "give a folder that holds a sub-folder of images for each class, or train, val and test "
    "folders with such sub-folders (get the images there first), as the option dir"
)


def load_folder(
    *,
    dir: str | None = None,
    image_size: int = 224,
    resize: int = 0,
    fit: str = "crop",
    interpolation: str = "bilinear",
    pixel_max: int = 0,
    class_list: str | Sequence[str] = "",
    class_order: str = "",
    num_classes: int = 0,
    validation_fraction: float = 0.1,
    seed: int = 0,
    flip: bool = False,
    shift: int = 0,
    in_memory_limit: int = DEFAULT_MEMORY,
    skip_unreadable: bool = False,
) -> ImageDataset:
    """Images [image_size, image_size, 3] from JPEG, PNG, PPM, BMP and WebP files.

    `dir` holds a sub-folder for each class, or folders train, val (or validation) and test that
    hold them. What is missing is taken out of what is there, class by class:

        train, val, test    as they are
        train, test         validation is `validation_fraction` of train
        train, val          validation is `validation_fraction` of val, and test the rest of it: a
                            model that was trained on train elsewhere has seen neither
        train, or no parts  test is a fifth, the same for every seed; validation is
                            `validation_fraction` of the rest

    Images are decoded once if all fit into `in_memory_limit`, and otherwise whenever they are used,
    on all cores. Both give the same pixels.

    Args:
      dir: the folder.
      image_size: side in pixels of the images a model gets.
      resize: length of the shorter side before the centre is cut out; 0 for 256/224 of image_size,
        which is what most of torchvision's weights expect.
      fit: "crop", or "stretch" to resize whole images to a square, as suits cut-out signs.
      interpolation: "bilinear", "bicubic" or "nearest".
      pixel_max: the value that stands for white in files of 16 bits: 255, 1023, 4095, 16383 or
        65535; 0 for the least of these that no value in the folder exceeds, with a warning where
        that is not 65535.
      class_list: the classes of the model's head in order, for a head with more classes than there
        are folders or with another order: names, the path of a list (`read_class_list`), or
        "imagenet". Folders are looked up in it. Without it the folders are the classes.
      class_order: the order of the folders if there is no `class_list`: "name", as torchvision has
        it, in which 10 comes before 2, or "number", in which 2 comes before 10; "" for "name" with
        a warning where that makes a difference.
      num_classes: the number of classes, to be checked; 0 for no check.
      validation_fraction: share of each class's images, as above.
      seed: of the choice out of train.
      flip: whether a mirrored image keeps its class.
      shift: by how many pixels images are moved at most when they are augmented.
      in_memory_limit: bytes that the images may take in memory.
      skip_unreadable: leave out, with a warning, what cannot be read, instead of refusing the
        folder.
    """
    root = existing_path(dir, what="image folder", remedy=_REMEDY)
    if not root.is_dir():
        raise InputError(f"{root} is a file; {_REMEDY}")
    framing = make_framing(
        image_size=image_size, resize=resize, fit=fit, interpolation=interpolation
    )
    require_choice("class_order", class_order, ("", "name", "number"))
    if pixel_max not in (0, *WHITES):
        raise InputError(f"pixel_max must be 0 or one of {listed(WHITES)}, got {pixel_max}")
    files, classes = _checked(root, class_list, class_order, num_classes, skip_unreadable)
    framing = framing._replace(white=pixel_max or _white(files))
    listings = {part: _listing(root, files[part], classes, framing) for part in files}
    check_faults(root, _too_few(listings, classes))
    images = read_parts(
        _complete(listings, validation_fraction, seed),
        framing.image_shape,
        in_memory_limit=in_memory_limit,
        look=_look,
        skip_unreadable=skip_unreadable,
    )
    return build_dataset(
        root.resolve().name,
        images["train"],
        images["test"],
        validation=images["validation"],
        class_names=classes.names,
        seed=seed,
        flip=flip,
        shift=shift,
        every_class=not class_list,
    )


def _decode(path, framing):
    return decode_image(path, framing, name=path)


def _name(path, root):
    return os.path.relpath(path, root)


def _look(path):
    check_header(path, name=path)


def _white(files):
    """The value that stands for white in the files of 16 bits: the least that none exceeds."""
    paths = [
        path
        for part in files.values()
        for inner in part.values()
        for path in inner
        if path.lower().endswith(DEEP_EXTENSIONS)
    ]
    largest = dict(zip(paths, parallel_map(_largest, paths), strict=True))
    deep = [path for path, value in largest.items() if value > 0]
    white = min(w for w in WHITES if w >= max(largest.values(), default=0))
    if deep and white < max(WHITES):
        warnings.warn(
            f"{len(deep)} images have 16 bits and values up to {max(largest.values())}, such as "
            f"{deep[0]}: {white} is taken for white; set pixel_max (data.pixel_max) if it is "
            f"another of {listed(WHITES)}",
            stacklevel=3,
        )
    return white


def _largest(path):
    try:
        return largest_value(path, name=path)
    except (UnreadableImageError, InputError, OSError):
        return 0  # Reading it will say so.


def _checked(root, class_list, class_order, num_classes, skip_unreadable):
    """(part -> class folder -> paths, the classes) once all faults are found to be none."""
    files, strays, faults, *_ = scan(root)
    if strays and skip_unreadable:
        warnings.warn(f"left out: {describe_strays(strays)}", stacklevel=3)
    elif strays:
        faults.append(
            f"{describe_strays(strays)}; move them away, or leave them out with "
            "skip_unreadable=True"
        )
    folders = {name for classes in files.values() for name in classes}
    folders = sorted(folders) if class_list else _in_order(folders, class_order)
    if class_list:
        classes = read_class_list(class_list, num_classes)
        faults += _unlisted(folders, classes)
    else:
        classes = ClassList(tuple(folders), {name: k for k, name in enumerate(folders)})
        if num_classes not in (0, len(folders)):
            faults.append(
                f"there are {len(folders)} class folders for num_classes={num_classes}; name the "
                "classes of the head in order with class_list"
            )
    faults += _empty(files) + _lacking(files, classes, every_class=not class_list)
    check_faults(root, faults)
    return files, classes


def _in_order(names, class_order):
    """The names of the class folders in the order asked for."""
    by_name, by_number = sorted(names), sorted(names, key=_with_numbers)
    if class_order == "number":
        return by_number
    if not class_order and _are_numbered(by_name) and by_name != by_number:
        at = next(
            k for k, pair in enumerate(zip(by_name, by_number, strict=True)) if len({*pair}) > 1
        )
        warnings.warn(
            "the classes are the folders in the order of their names, as torchvision has it: class "
            f"{at} is {by_name[at]!r}; set class_order='number' if class {at} of "
            f"the model is {by_number[at]!r}, or 'name' if the order is right",
            stacklevel=4,
        )
    return by_name


def _with_numbers(name):
    """What sorts names with the numbers in them as numbers."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _are_numbered(names):
    """Whether names count classes: some are numbers alone, or all are, after the same letters."""
    alone = [name for name in names if re.fullmatch("[0-9]+", name)]
    return len(alone) > 1 or len({re.split("[0-9]", name)[0] for name in names}) == 1


def _unlisted(folders, classes):
    unknown = [name for name in folders if name not in classes.numbers]
    if not unknown:
        return []
    return [
        f"{len(unknown)} of {len(folders)} class folders are not in class_list: {listed(unknown)} "
        f"(it has {listed(classes.names)}); rename them or correct the list"
    ]


def _empty(files):
    names = [
        name if part == WHOLE else f"{part}/{name}"
        for part in files
        for name, paths in files[part].items()
        if not paths
    ]
    if not names:
        return []
    return [f"no images in {len(names)} class folders: {listed(names)}; add images or remove them"]


def _lacking(files, classes, every_class):
    """The faults of parts that are missing, and of parts that lack a class others have."""
    if WHOLE in files:
        return []
    if files and "train" not in files:
        there = " and ".join(files)
        return [f"there is {there} but no train part; give the path of {there} itself to split it"]
    there = {part: {classes.numbers.get(name) for name in files[part]} for part in files}
    # Of a head's further classes there may be test images alone; without a list it is a slip.
    wanted = set().union(*there.values()) if every_class else there.get("train", set())
    lacking = {part: sorted(wanted - found - {None}) for part, found in there.items()}
    return [
        f"{part} has no folders of {len(missing)} classes that other parts have: "
        f"{listed([classes.names[k] for k in missing])}; add them, or remove these classes "
        "everywhere"
        for part, missing in lacking.items()
        if missing
    ]


def _listing(root, files, classes, framing):
    paths = [path for name in files for path in files[name]]
    labels = [classes.numbers[name] for name in files for _ in files[name]]
    return Listing(
        paths,
        np.array(labels, np.int32),
        functools.partial(_decode, framing=framing),
        name=functools.partial(_name, root=root),
        version=version_of,
    )


def _too_few(listings, classes):
    """The fault that classes have too few images to give one to each part that is made of them."""
    source = "validation" if "validation" in listings else "train" if "train" in listings else WHOLE
    made = [part for part in PARTS if part not in listings or part == source]
    labels, counts = np.unique(listings[source].labels, return_counts=True)
    few = [
        f"{classes.names[k]!r} has {count}"
        for k, count in zip(labels, counts, strict=True)
        if count < len(made)
    ]
    if set(PARTS) <= set(listings) or not few:
        return []
    return [
        f"{len(few)} classes have too few images for {' and '.join(made)}, which are made of the "
        f"same images: each needs {len(made)}, and {listed(few, str)}; add images, or sort them "
        "into folders train, val and test yourself"
    ]


def _complete(parts, validation_fraction, seed):
    """The listings of all three parts, those not there taken out of the others."""
    parts = dict(parts)
    if WHOLE in parts:
        parts["train"] = parts.pop(WHOLE)
    if "test" not in parts and "validation" in parts:
        test, validation = split_validation(
            parts["validation"].labels, validation_fraction, _TEST_SEED
        )
        parts["test"] = parts["validation"].take(test)
        parts["validation"] = parts["validation"].take(validation)
    for part, fraction, part_seed in (
        ("test", _TEST_FRACTION, _TEST_SEED),
        ("validation", validation_fraction, seed),
    ):
        if part not in parts:
            kept, taken = split_validation(parts["train"].labels, fraction, part_seed)
            parts[part] = parts["train"].take(taken)
            parts["train"] = parts["train"].take(kept)
    return {part: parts[part] for part in PARTS}
