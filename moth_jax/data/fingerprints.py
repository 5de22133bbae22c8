"""What tells the images of one run from those of another, image by image."""

import hashlib

import numpy as np

from moth_jax.data.dataset import ImageDataset, ImageSplit
from moth_jax.data.streaming import StreamedImages

PARTS = ("train", "validation", "test")
_BYTES = 8  # of the fingerprint of an image


def fingerprints(split: ImageSplit) -> np.ndarray:
    """Return a number uint64 [n] for each image with its label; another image has another number.

    It is made of the pixels in memory. Of streamed images, which would take hours to read, it is
    made of the names, the sizes and the times of the files.

    >>> images, labels = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1), np.zeros(3, np.int32)
    >>> before = fingerprints(ImageSplit(images, labels))
    >>> images[1, 0, 0] += 1
    >>> (fingerprints(ImageSplit(images, labels)) != before).tolist()
    [False, True, False]
    """
    if isinstance(split.images, StreamedImages):
        named = zip(split.images.names(), split.images.versions(), strict=True)
        contents = (
            f"{name}\0{version}".encode(errors="surrogateescape") for name, version in named
        )
    else:
        contents = (np.ascontiguousarray(image).data for image in split.images)
    digests = bytearray()
    for label, content in zip(split.labels.tolist(), contents, strict=True):
        digest = hashlib.blake2b(label.to_bytes(8, "little", signed=True), digest_size=_BYTES)
        digest.update(content)
        digests += digest.digest()
    return np.frombuffer(bytes(digests), "<u8")


def digests(dataset: ImageDataset, prints: dict[str, np.ndarray]) -> dict:
    """Return {part: {"order": digest of the labels, "classes": {name: digest of its images}}}.

    `prints` are the `fingerprints` of the parts.
    """
    return {part: _of_part(getattr(dataset, part), prints[part], dataset) for part in PARTS}


def _of_part(split, prints, dataset):
    classes = np.unique(split.labels).tolist()
    return {
        "order": _digest(split.labels.astype("<i8")),
        "classes": {dataset.class_names[k]: _digest(prints[split.labels == k]) for k in classes},
    }


def _digest(array):
    return hashlib.sha256(array.tobytes()).hexdigest()[:32]


def image_names(split: ImageSplit) -> list[str]:
    """Return what messages call the images: their files, or else their places in the part."""
    if isinstance(split.images, StreamedImages):
        return split.images.names()
    return [f"image {i}" for i in range(len(split))] if split.names is None else list(split.names)
