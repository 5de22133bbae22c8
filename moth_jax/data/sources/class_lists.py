"""The classes of a model's head, in order, and the names their folders may have."""

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moth_jax.data.arrays import existing_path
from moth_jax.data.checks import check_class_names, normal_name
from moth_jax.errors import InputError, first_line, listed
from moth_jax.storage.files import open_regular

IMAGENET = "imagenet"

_FORMS = (
    "give a text file with a class name per line, a JSON list of names, a JSON object {number: "
    "name} or {name: number}, or 'imagenet'"
)
# A list of numbers may have gaps: how many classes it may name all the same, unless it is told.
_MOST_CLASSES = 100_000
# Of a file, and of a head: more than any has.
_MOST_BYTES, _MOST_OUTPUTS = 2**26, 10**6
# A line of the list that comes with ImageNet: "n01440764 tench, Tinca tinca".
_SYNSET_LINE = re.compile(r"(n\d{8})\s+([^,]+)")


class ClassList(NamedTuple):
    """K classes in the order of the model's outputs.

    Attributes:
      names: K distinct names.
      numbers: each name a folder of a class may have, as `normal_name` -> the class's number.
    """

    names: tuple[str, ...]
    numbers: dict[str, int]


def read_class_list(source: str | Sequence[str], num_classes: int = 0) -> ClassList:
    """Return the classes that `source` lists.

    Args:
      source: K names; or the path of a list: a text file with a name per line, or JSON: a list of
        names, {"0": name, ...} or {name: 0, ...} (torchvision's `class_to_idx`). In place of a
        name there may be several, as in Keras's imagenet_class_index.json: {"0": ["n01440764",
        "tench"]}, or in a line "n01440764 tench, Tinca tinca". The class is then called "tench",
        and its folder may have any of the names. Or "imagenet": the synsets
        n01440764, n01443537, ... of ImageNet 2012, from the list in tensorflow_datasets.
      num_classes: the number of the model's outputs, which the list must have; if 0, any. Numbers
        that {name: number} leaves out are classes without a folder, "class 7" by name. Of more than
        100,000 outputs the number must be given.

    Example:
      >>> read_class_list(("cat", "dog")).numbers["dog"]
      1
    """
    if not 0 <= num_classes <= _MOST_OUTPUTS:
        raise InputError(f"num_classes must be in [0, {_MOST_OUTPUTS}], got {num_classes}")
    if isinstance(source, str):
        what = "the class list of ImageNet" if source == IMAGENET else f"class list {source}"
        entries = _read(_imagenet_path() if source == IMAGENET else source, num_classes)
    else:
        what, entries = "class_list", [(str(name),) for name in source]
    entries = [tuple(map(normal_name, entry)) for entry in entries]
    if num_classes not in (0, len(entries)):
        raise InputError(f"{what} has {len(entries)} classes, but num_classes is {num_classes}")
    names = _distinct([entry[-1] for entry in entries], [entry[0] for entry in entries])
    try:
        check_class_names(names)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    shared = Counter(alias for entry in entries for alias in set(entry))
    # A name that stands for two classes ("crane", the bird and the machine) names neither.
    numbers = {a: k for k, entry in enumerate(entries) for a in entry if shared[a] == 1}
    return ClassList(names, numbers | {name: k for k, name in enumerate(names)})


def _distinct(names, aliases):
    """The names, those that occur twice with the first alias of their class in brackets."""
    counts = Counter(names)
    pairs = zip(names, aliases, strict=True)
    return tuple(f"{n} ({a})" if counts[n] > 1 and a != n else n for n, a in pairs)


def _imagenet_path():
    # Found, not imported: importing TFDS takes seconds.
    spec = importlib.util.find_spec("tensorflow_datasets")
    if spec is None or spec.origin is None:
        raise InputError("the class list of ImageNet is part of tensorflow-datasets: install it")
    return str(Path(spec.origin).parent / "datasets" / "imagenet2012" / "labels.txt")


def _read(source, num_classes):
    """[the names of class 0, of class 1, ...], each a non-empty tuple."""
    path = existing_path(source, what="class list", remedy=_FORMS)
    try:
        with open_regular(path) as file:
            text = file.read(_MOST_BYTES + 1).decode("utf-8-sig")
        if len(text) > _MOST_BYTES:
            raise ValueError(f"longer than {_MOST_BYTES} bytes")
        if path.suffix.lower() != ".json":
            return [_line_names(line) for line in re.split("\r\n?|\n", text.rstrip())]
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise InputError(f"class list {path} cannot be read ({reason}); {_FORMS}") from error
    entries = content if isinstance(content, list) else _in_order(path, content, num_classes)
    entries = [(entry,) if isinstance(entry, str) else entry for entry in entries]
    wrong = [entry for entry in entries if not _are_names(entry)]
    if wrong or not entries:
        raise InputError(f"class list {path} has no names in {listed(wrong) or 'it'}; {_FORMS}")
    return [tuple(entry) for entry in entries]


def _without_repeats(pairs):
    """The dict of a JSON object, in which a name must not come twice: one would be lost."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"given more than once: {listed(twice)}")
    return content


def _line_names(line):
    found = _SYNSET_LINE.match(line.strip())
    return (found[1], found[2].strip()) if found else (line.strip(),)


def _are_names(entry):
    return isinstance(entry, list | tuple) and entry and all(isinstance(n, str) for n in entry)


def _in_order(path, content, num_classes):
    """The entries of {number: names} or {name: number}, by number."""
    if not isinstance(content, dict) or not content:
        raise InputError(f"class list {path} is neither a list nor an object; {_FORMS}")
    if all(type(value) is int for value in content.values()):
        pairs = [(number, name) for name, number in content.items()]
        count = num_classes or min(max(content.values()) + 1, _MOST_CLASSES)
    elif all(re.fullmatch("[0-9]{1,9}", key) for key in content):
        pairs, count = [(int(key), names) for key, names in content.items()], len(content)
    else:
        raise InputError(f"class list {path} does not give each class a number; {_FORMS}")
    entries = {}
    for number, names in pairs:
        if not 0 <= number < count or number in entries:
            raise InputError(
                f"class list {path}: the class numbers must be distinct and in [0, {count}), got "
                f"{_short(number)}; num_classes says how many outputs the model has"
            )
        entries[number] = names
    return [entries.get(k, (f"class {k}",)) for k in range(count)]


def _short(number):
    """The number, which may have any length in JSON."""
    return number if abs(number) < 10**12 else f"one of {number.bit_length()} bits"
