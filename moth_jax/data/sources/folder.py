"""A user's own image files: a sub-folder for each class."""

import functools
import warnings
from collections.abc import Sequence

import numpy as np

from moth_jax.data.arrays import existing_path
from moth_jax.data.building import build_dataset
from moth_jax.data.dataset import ImageDataset
from moth_jax.data.decoding import check_header, decode_image, make_framing
from moth_jax.data.sources.class_lists import ClassList, read_class_list
from moth_jax.data.sources.folder_scan import PARTS, WHOLE, check_faults, describe_strays, scan
from moth_jax.data.splitting import split_validation
from moth_jax.data.streaming import DEFAULT_MEMORY, Listing, read_parts
from moth_jax.errors import InputError, listed

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
    class_list: str | Sequence[str] = "",
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
      class_list: the classes of the model's head in order, for a head with more classes than there
        are folders or with another order: names, the path of a list (`read_class_list`), or
        "imagenet". Folders are looked up in it. Without it the folders are the classes, in the
        order of their names.
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
    files, classes = _checked(root, class_list, num_classes, skip_unreadable)
    listings = {part: _listing(files[part], classes, framing) for part in files}
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


def _look(path):
    check_header(path, name=path)


def _checked(root, class_list, num_classes, skip_unreadable):
    """(part -> class folder -> paths, the classes) once all faults are found to be none."""
    files, strays, faults = scan(root)
    faults = list(faults)
    if strays and skip_unreadable:
        warnings.warn(f"left out: {describe_strays(strays)}", stacklevel=3)
    elif strays:
        faults.append(
            f"{describe_strays(strays)}; move them away, or leave them out with "
            "skip_unreadable=True"
        )
    folders = sorted({name for classes in files.values() for name in classes})
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


def _listing(files, classes, framing):
    paths = [path for name in files for path in files[name]]
    labels = [classes.numbers[name] for name in files for _ in files[name]]
    return Listing(paths, np.array(labels, np.int32), functools.partial(_decode, framing=framing))


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
