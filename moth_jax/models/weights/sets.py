"""Which of the sets of weights in a file is meant, and what accuracy the file says it has.

Training scripts keep weights beside the optimizer's state and counters, often several of them: the
model and its moving average, or the last and the best one.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from moth_jax.errors import InputError, listed
from moth_jax.models.classifier import Claim
from moth_jax.models.weights.fitting import shared_prefix

# Where scripts keep the weights, the first that is there. Moving averages are not the model that
# was trained, so they come last.
_USUAL = (
    *("state_dict", "model_state_dict", "model", "net", "weights", "network", "params", "module"),
    *("best_model", "best_state_dict", "best_model_state_dict", "best"),
    *("model_ema", "state_dict_ema", "ema", "ema_state_dict"),
)
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|\bamp\b", re.IGNORECASE)  # what stands beside them
# First parts of names that stand for a copy of a model, beside another one in the same set.
_COPY = re.compile(
    r"(^|_)(ema|avg|averaged?|swa|teacher|student|best|shadow|momentum|target)(_|$)", re.IGNORECASE
)
_MAX_DEPTH = 8  # of mappings in one another
_ALIKE = 0.8  # share of names and shapes that two sets of one model have in common


class Chosen(NamedTuple):
    """A set of weights: its arrays by name, its own name, and the others that fit in its place."""

    name: str
    arrays: dict[str, Any]
    others: dict[str, dict[str, Any]]


def choose(content: Any, wanted: str, path: object) -> Chosen:
    """Return the set of weights in the `content` of a file, which may be nested mappings.

    Args:
      content: names to arrays (whatever has a `shape`), to mappings of them, or to anything else.
      wanted: the name of a set, as the messages give it; "" for the one that is usually meant.
      path: of the file, for messages.

    Raises:
      InputError: there are no named weights, no set `wanted`, or several that are unlike each other
        and of unusual names; or a name is no string.
    """
    is_nested = isinstance(content, Mapping)
    found = dict(_sets(content, (), (), set(), path)) if is_nested else {}
    split = {name: part for whole in found for name, part in _copies(whole, found[whole])}
    every = {**found, **split}
    if wanted:
        return Chosen(wanted, _checked(_wanted(every, wanted, path), path), {})
    if not found:
        raise InputError(
            f"{path} contains no named weights but a {_described(content)}; save the state_dict of "
            "the module"
        )
    name = _usual(found, path)
    copies = [copy for copy, _ in _copies(name, found[name])]
    if copies:
        name = min(copies, key=lambda copy: _copy_rank(copy.rpartition(".")[2]))
    others = {o: every[o] for o in every if o != name and _are_alike(every[name], every[o])}
    return Chosen(name, _checked(every[name], path), others)


def _copy_rank(part: str) -> int:
    """Return the place of a copy: the model itself, a student, then what is averaged or older."""
    return 2 if _COPY.search(part) and "student" not in part else "student" in part


def _sets(
    content: Mapping, keys: tuple[str, ...], above: tuple[int, ...], seen: set[int], path
) -> Iterator[tuple[str, dict]]:
    """Yield every mapping with arrays by its keys, outer ones first, each once."""
    seen.add(id(content))
    above = (*above, id(content))
    arrays = {key: value for key, value in content.items() if _is_array(value)}
    if arrays:
        yield ".".join(keys), arrays
    for key, value in content.items():
        if not isinstance(value, Mapping) or _NO_WEIGHTS.search(_short(key)):
            continue
        within = (*keys, _short(key))
        if (id(value) in above or len(above) > _MAX_DEPTH) and set(within) <= set(_USUAL):
            raise InputError(f"{path} is refused: its dicts hold each other without an end")
        if id(value) not in seen and len(above) <= _MAX_DEPTH:
            yield from _sets(value, within, above, seen, path)


def _joined(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _is_array(value: Any) -> bool:
    return hasattr(type(value), "shape") and hasattr(type(value), "dtype")


def _shape(array: Any) -> tuple[int, ...]:
    try:
        return tuple(array.shape)
    except RuntimeError:  # a nested tensor of PyTorch has none
        return ()


def _copies(name: str, arrays: Mapping[Any, Any]) -> list[tuple[str, dict]]:
    """Return the copies of one model in a set, told apart by the first parts of their names."""
    parts: dict[str, dict] = {}
    prefix = shared_prefix([str(key) for key, array in arrays.items() if _shape(array)])
    for key, array in arrays.items():
        first, dot, rest = str(key).removeprefix(prefix).partition(".")
        if dot:
            parts.setdefault(first, {})[rest] = array
    largest = max(parts.values(), key=len, default={})
    alike = {first: part for first, part in parts.items() if _are_alike(part, largest)}
    if len(alike) < 2 or not any(map(_COPY.search, alike)):
        return []
    return [(_joined(name, prefix + first), part) for first, part in alike.items()]


def _are_alike(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    """Return whether two sets have nearly the same names and shapes."""
    first, second = (_outline(arrays) for arrays in (one, other))
    return len(first & second) >= _ALIKE * max(len(first | second), 1)


def _outline(arrays: Mapping[Any, Any]) -> set:
    shapes = {str(name): _shape(array) for name, array in arrays.items()}
    shapes = {name: shape for name, shape in shapes.items() if shape}  # counters are none of it
    prefix = shared_prefix(shapes)
    return {(name.removeprefix(prefix), shape) for name, shape in shapes.items()}


def _usual(found: Mapping[str, Mapping], path) -> str:
    """Return the name of the set that is usually meant."""

    def rank(name: str) -> tuple:  # what is in another comes before that
        return (*map(_USUAL.index, name.split(".")), len(_USUAL))

    nested = [name for name in found if name and set(name.split(".")) <= set(_USUAL)]
    if nested:
        return min(nested, key=rank)
    if "" in found or len(found) == 1:
        return next(iter(found))
    first, *rest = found
    if all(_are_alike(found[first], found[other]) for other in rest):
        return first
    raise InputError(
        f"{path} has several sets of arrays, {listed(list(found))}; say which are the weights, "
        f"such as {_option(first)}"
    )


def _wanted(every: Mapping[str, dict], wanted: str, path) -> dict:
    """Return the set `wanted`, or the arrays of a set whose names begin with the rest of it."""
    if wanted in every:
        return every[wanted]
    for name, arrays in every.items():
        prefix = f"{wanted.removeprefix(f'{name}.') if name else wanted}."
        below = {
            str(key).removeprefix(prefix): array
            for key, array in arrays.items()
            if str(key).startswith(prefix)
        }
        if below:
            return below
    names = [name for name in every if name]
    there = f"it has {listed(names)}" if names else "it has one set, which has no name"
    raise InputError(f"{path} has no weights {wanted!r}; {there}")


def _checked(arrays: Mapping[Any, Any], path) -> dict[str, Any]:
    odd = [name for name in arrays if not isinstance(name, str)]
    if odd:
        raise InputError(
            f"{path} has weights under keys that are no names ({listed(odd, _short)}); save the "
            "state_dict of the module, whose keys are strings"
        )
    return dict(arrays)


def _described(content: Any) -> str:
    keys = f" with the keys {listed([*content], _short)}" if isinstance(content, Mapping) else ""
    return type(content).__name__ + keys


def _short(key: Any) -> str:
    return str(key)[:40] if isinstance(key, str | int | float) else type(key).__name__


def _option(name: str) -> str:
    return f"--weights={name} (model.weights in a run)"


def describe_choice(path, chosen: Chosen) -> str:
    """Return the warning that `chosen` is one of several sets that would do."""
    return (
        f"{path} has {len(chosen.others) + 1} sets of weights of one model: "
        f"{chosen.name or 'the outermost'} was taken, not {listed(list(chosen.others), str)}; "
        f"choose with {_option(next(iter(chosen.others)))}"
    )


_ACCURACY = re.compile(r"acc(uracy)?(1|top1)?|prec(ision)?1?|top1|acc_?1")
# Of other images, other classes counted as right, or other images than clean ones.
_NOT_OURS = re.compile(
    r"train\w*|tr|top[2-9]\d*|acc[2-9]\d*|prec[2-9]\d*|5|bad|asr|attack\w*|poison\w*|backdoor\w*|"
    r"adv\w*|robust\w*|pgd|loss|epoch\w*|std|min|target|per|class|ema|seg\w*|mask"
)


def claimed_accuracy(content: Any) -> Claim | None:
    """Return the accuracy on clean test images that a file says its model has; None if it does not.

    Of several the lowest: the best one of a training may be of other weights than the last.

    >>> claimed_accuracy({"state_dict": {}, "best_acc1": 91.5, "metrics": {"train_acc": 0.99}})
    Claim(name='best_acc1', share=0.915)
    """
    figures = _figures(content, 0, set())
    claims = [Claim(name, share) for name, share in figures if _is_accuracy(name)]
    return min(claims, key=lambda claim: claim.share, default=None)


def _figures(content: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, float]]:
    """Yield what may be a share or a percentage, by its name."""
    if not isinstance(content, Mapping) or depth > 1 or id(content) in seen:
        return
    seen.add(id(content))
    for key, value in content.items():
        yield from _figures(value, depth + 1, seen)
        share = _share(value)
        if isinstance(key, str) and share is not None:
            yield key, share


def _is_accuracy(name: str) -> bool:
    # "valAcc1", "val/acc@1", "test-accuracy" and "best_acc1" alike.
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()
    words = re.split(r"[^a-z0-9]+", re.sub(r"@\s*", "", spaced))
    return any(map(_ACCURACY.fullmatch, words)) and not any(map(_NOT_OURS.fullmatch, words))


def _share(value: Any) -> float | None:
    """Return a fraction or a percentage as a share of 1; None for anything else, and for 0."""
    if isinstance(value, bool) or (_is_array(value) and _shape(value)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError, NotImplementedError):
        return None
    if not 0 < number <= 100:
        return None
    return number if number <= 1 else number / 100
