"""Images that stay where they are and are decoded when asked for, by Grain, on all cores."""

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moth_jax.data.decoding import UnreadableImageError
from moth_jax.errors import InputError, listed

DEFAULT_MEMORY = 2 * 1024**3
_BLOCK = 1024


class Listing(NamedTuple):
    """Images of one part that are yet to be read.

    Attributes:
      items: n things that name an image each, such as paths.
      labels: int32 [n].
      decode: item -> uint8 [h, w, c], or `UnreadableImageError`.
      name: item -> what messages call the image.
      version: item -> text that changes if the file of the image does, which is not read.
    """

    items: Sequence
    labels: np.ndarray
    decode: Callable[[Any], np.ndarray]
    name: Callable[[Any], str] = str
    version: Callable[[Any], str] = str

    def take(self, indices) -> "Listing":
        """Those at `indices`."""
        items = [self.items[i] for i in indices]
        return self._replace(items=items, labels=self.labels[indices])


class StreamedImages:
    """Images decoded when asked for; stands where an array uint8 [n, h, w, c] would.

    The same indices give the same pixels as that array, however many threads decode them. It has
    what an `ImageSplit` needs of an array: shape, dtype, and an array of indices in brackets.

    Args:
      items: n things that name an image each.
      decode: item -> uint8 [h, w, c]; called in several threads at once.
      image_shape: (h, w, c).
      name, version: as in `Listing`.

    Example:
      >>> images = StreamedImages([3, 5, 7], lambda item: np.full([2, 2, 1], item, np.uint8),
      ...                         (2, 2, 1))
      >>> images.shape, images[[2, 0]][:, 0, 0, 0]
      ((3, 2, 2, 1), array([7, 3], dtype=uint8))
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        items: Sequence,
        decode: Callable[[Any], np.ndarray],
        image_shape: tuple[int, int, int],
        name: Callable[[Any], str] = str,
        version: Callable[[Any], str] = str,
    ):
        self._items, self._decode = items, decode
        self._name, self._version = name, version
        self.shape = (len(items), *image_shape)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, indices) -> np.ndarray:
        return next(self.batches([indices]))

    def names(self) -> list[str]:
        """What messages call the images."""
        return [self._name(item) for item in self._items]

    def versions(self) -> list[str]:
        """Text for each image that changes if its file does; no image is read."""
        # In blocks: to ask for one takes less time than to hand it to a thread.
        starts = range(0, len(self), _BLOCK)
        blocks = [self._items[start : start + _BLOCK] for start in starts]
        versions = parallel_map(lambda block: list(map(self._version, block)), blocks)
        return list(itertools.chain.from_iterable(versions))

    def batches(self, batches: Sequence) -> Iterator[np.ndarray]:
        """Yield the images of each array of indices; the next ones are decoded meanwhile."""
        largest = max(map(len, batches), default=0)
        items = [self._items[i] for i in itertools.chain.from_iterable(batches)]
        images = parallel_map(self._decode, items, ahead=largest)
        for indices in batches:
            out = np.empty([len(indices), *self.shape[1:]], self.dtype)
            for i, image in enumerate(itertools.islice(images, len(indices))):
                out[i] = image
            yield out


def version_of(path: str | os.PathLike) -> str:
    """What tells a file from the one that was there before: its size and when it was written."""
    status = os.stat(path)
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"


def parallel_map(function: Callable, items: Sequence, *, ahead: int = 0) -> Iterator:
    """Yield function(item) for each of `items`, in their order, computed by a thread per core.

    Args:
      function: called in several threads at once; must not return None, which Grain leaves out.
      items: what it is called with.
      ahead: how many results may be ready before they are asked for; at least twice the threads.

    Example:
      >>> list(parallel_map(lambda x: 2 * x, [3, 1, 2]))
      [6, 2, 4]
    """
    if len(items) == 0:
        return
    import grain

    num_threads = _num_cores()
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(ahead, 2 * num_threads)
    )
    results = iter(grain.MapDataset.source(items).map(function).to_iter_dataset(options))
    try:
        yield from results
    finally:
        results.close()  # Ends the threads, also where only some results were asked for.


def read_parts(
    listings: Mapping[str, Listing],
    image_shape: tuple[int, int, int],
    *,
    in_memory_limit: int = DEFAULT_MEMORY,
    look: Callable[[Any], None] | None = None,
    skip_unreadable: bool = False,
) -> dict[str, tuple[np.ndarray | StreamedImages, np.ndarray, list[str] | None]]:
    """Return the images, labels and names of each part: arrays if all fit in memory, else streamed.

    Streamed images know their names themselves.

    Arrays are decoded at once, and every unreadable image is reported in one message. Streamed
    images are looked at with `look`; one that cannot be decoded later raises when it is asked for.

    Args:
      listings: part -> what is in it.
      image_shape: (h, w, c).
      in_memory_limit: bytes the images of all parts may take in memory.
      look: item -> None or `UnreadableImageError`; a cheap check.
      skip_unreadable: leave unreadable images out, with a warning. Streamed images are then all
        decoded once to find them.
    """
    if in_memory_limit < 0:
        raise InputError(f"in_memory_limit must be 0 or more bytes, got {in_memory_limit}")
    count = sum(len(listing.items) for listing in listings.values())
    fits = count * int(np.prod(image_shape)) <= in_memory_limit
    parts, faults = {}, []
    for part, listing in listings.items():
        if fits:
            images, found = _decode_all(listing, image_shape)
        else:
            images, found = None, _faults(listing, listing.decode if skip_unreadable else look)
        if found:
            faults += found.values()
            kept = np.setdiff1d(np.arange(len(listing.items)), list(found))
            listing, images = listing.take(kept), None if images is None else images[kept]
        if images is None:
            items, labels, decode, name, version = listing
            streamed = StreamedImages(items, decode, image_shape, name, version)
            parts[part] = streamed, labels, None
        else:
            parts[part] = images, listing.labels, list(map(listing.name, listing.items))
    _report(faults, count, skip_unreadable)
    return parts


def _decode_all(listing, image_shape):
    """(uint8 [n, h, w, c], {index: the fault of an image that cannot be read})."""
    images, faults = np.zeros([len(listing.items), *image_shape], np.uint8), {}
    for i, result in enumerate(_attempts(listing.items, listing.decode)):
        if isinstance(result, UnreadableImageError):
            faults[i] = result
        else:
            images[i] = result
    return images, faults


def _faults(listing, check):
    """{index: the fault} of the items that `check` refuses."""
    results = enumerate(_attempts(listing.items, check) if check else ())
    return {i: result for i, result in results if isinstance(result, UnreadableImageError)}


def _attempts(items, function):
    def attempt(item):
        try:
            result = function(item)
        except UnreadableImageError as error:
            return error
        return True if result is None else result

    return parallel_map(attempt, items)


def _report(faults, count, skip_unreadable):
    if not faults:
        return
    named = listed(faults, lambda fault: f"{fault.name} ({fault.reason})")
    found = f"{len(faults)} of {count} images cannot be read: {named}"
    if not skip_unreadable:
        raise InputError(
            f"{found}; delete or replace them, or leave them out with skip_unreadable=True"
        )
    warnings.warn(f"left out: {found}", stacklevel=4)


def _num_cores():
    """The cores this process may use, which on a shared machine are fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
