"""Weights in the HDF5 files of Keras 2.

An HDF5 file can name other files, and a few bytes of it can stand for many. So the whole file is
looked through before any number is read, and whatever no file of weights needs is refused.
"""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from moth_jax.errors import InputError, first_line, listed
from moth_jax.storage.limits import check_expansion

_MAX_DEPTH = 16  # of groups in one another
_BYTES_PER_CHUNK = 16  # that a file has at least for each chunk, in its index
_LINKS = {h5py.SoftLink: "a soft link", h5py.ExternalLink: "a link to another file"}
# The filters that come with HDF5; others are libraries that it would look for and load.
_FILTERS = {
    h5py.h5z.FILTER_DEFLATE,
    h5py.h5z.FILTER_SHUFFLE,
    h5py.h5z.FILTER_FLETCHER32,
    h5py.h5z.FILTER_SZIP,
    h5py.h5z.FILTER_NBIT,
    h5py.h5z.FILTER_SCALEOFFSET,
    h5py.h5z.FILTER_LZF,
}
# What h5py raises for a damaged file.
_FAULTS = (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, MemoryError)


def read_keras(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file by layer and name (`conv2d_1/kernel`), layers numbered from 1.

    Raises:
      InputError: the file is damaged, of Keras 3, or has what no file of weights has.
    """
    try:
        with h5py.File(path, "r") as file:
            found = _checked(path, file)
            check_expansion(path, (d.size * d.dtype.itemsize for d in found.values()))
            arrays = {name: np.asarray(dataset) for name, dataset in found.items()}
    except InputError:
        raise
    except _FAULTS as error:
        raise InputError(
            f"{path} is truncated or damaged ({first_line(error)}); get it again"
        ) from error
    numbered = _numbered_from_one({layer for layer, _ in arrays})
    return {f"{numbered[layer]}/{weight}": array for (layer, weight), array in arrays.items()}


def _checked(path: Path, file: h5py.File) -> dict[tuple[str, str], h5py.Dataset]:
    """Return the data sets of the weights by layer and name, none of them read yet."""
    # "in" would follow links, and open the files that they name.
    nested = "model_weights" in list(file)
    root = _member(path, file, "model_weights", "model_weights") if nested else file
    if not isinstance(root, h5py.Group):
        raise _refused(path, "model_weights", "no group of layers")
    if "layers" in list(root):
        raise InputError(
            f"{path} is in the layout of Keras 3; only that of Keras 2 is known "
            "(model.save('x.h5') or save_weights('x.h5') there)"
        )
    found = {}
    for name, dataset in _datasets(path, root, "", set()):
        key = name.split("/")[0], name.split("/")[-1].split(":")[0]
        if key in found:
            raise InputError(
                f"{path} has several arrays {key[1]} in {key[0]}, a model in the model; save the "
                "weights of the inner one"
            )
        found[key] = dataset
    if not found:
        raise InputError(f"{path} contains no weights")
    return found


def _datasets(
    path: Path, group: h5py.Group, above: str, seen: set
) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield all data sets below a group with their names, each checked, none read."""
    for key in list[str](group):
        name = f"{above}{key}"
        item = _member(path, group, key, name)
        if isinstance(item, h5py.Datatype):
            continue
        if item in seen:  # by its place in the file
            raise _refused(path, name, "a second link to the same object")
        seen.add(item)
        if isinstance(item, h5py.Dataset):
            _check_dataset(path, name, item)
            yield name, item
        elif name.count("/") < _MAX_DEPTH:
            yield from _datasets(path, item, f"{name}/", seen)
        else:
            raise _refused(path, name, f"more than {_MAX_DEPTH} groups in one another")


def _member(path: Path, group: h5py.Group, key: str, name: str):
    """Return what a group holds itself under `key`, following no link."""
    link = group.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise _refused(path, name, _LINKS.get(type(link), "a link of an unknown kind"))
    return group[key]


def _check_dataset(path: Path, name: str, dataset: h5py.Dataset) -> None:
    if dataset.shape is None:
        raise _refused(path, name, "an empty data set")
    if dataset.dtype.kind not in "fiub" or dataset.dtype.subdtype is not None:
        raise _refused(path, name, f"values of type {_type_name(dataset)}, which are no numbers")
    properties = dataset.id.get_create_plist()
    layout = properties.get_layout()
    if layout == h5py.h5d.VIRTUAL:
        raise _refused(path, name, "a virtual data set, which reads other files")
    if properties.get_external_count():
        raise _refused(path, name, f"numbers in another file ({_external(properties)})")
    if layout == h5py.h5d.CHUNKED:
        _check_chunks(path, name, dataset, properties)


def _check_chunks(path: Path, name: str, dataset: h5py.Dataset, properties) -> None:
    """Refuse what takes far more memory or time to unpack than the file has bytes."""
    kinds = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    unknown = [kind for kind in kinds if kind not in _FILTERS]
    if unknown:
        raise _refused(path, name, f"compression by an unknown filter, {listed(unknown, str)}")
    chunk, shape = properties.get_chunk(), dataset.shape
    check_expansion(path, [int(np.prod(chunk, dtype=object)) * dataset.dtype.itemsize], "chunks")
    count = np.prod([-(-n // size) for n, size in zip(shape, chunk, strict=True)], dtype=object)
    if count > 1 and count * _BYTES_PER_CHUNK > path.stat().st_size:
        raise _refused(path, name, f"{count:,} chunks, more than a file of this size has")


def _type_name(dataset: h5py.Dataset) -> str:
    kinds = ((h5py.check_ref_dtype, "reference"), (h5py.check_string_dtype, "string"))
    names = [what for check, what in kinds if check(dataset.dtype) is not None]
    return names[0] if names else str(dataset.dtype)


def _external(properties) -> str:
    return properties.get_external(0)[0].decode(errors="replace")


def _refused(path: Path, name: str, what: str) -> InputError:
    return InputError(
        f"{path} is refused: {name} is or has {what}; save the weights anew with Keras 2"
    )


def _numbered_from_one(layers: set[str]) -> dict[str, str]:
    """Return `conv2d_8`, `conv2d_9` as `conv2d_1`, `conv2d_2`, and so on for each kind of layer.

    Keras counts on over all models of a process.
    """

    def parts(layer):
        kind, _, number = layer.rpartition("_")
        return (kind, int(number)) if kind and number.isdecimal() else (layer, 0)

    renamed, counts = {}, {}
    for layer in sorted(layers, key=parts):
        kind = parts(layer)[0]
        counts[kind] = counts.get(kind, 0) + 1
        renamed[layer] = f"{kind}_{counts[kind]}"
    return renamed
