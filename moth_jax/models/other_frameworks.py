"""Classifiers of other JAX libraries: any function of a pytree and images."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from moth_jax.errors import InputError
from moth_jax.models.classifier import Classifier, ModelSpec, flat, normalise
from moth_jax.types import Variables


def from_function(
    logits_fn: Callable[[dict, Array], Array],
    variables: dict,
    *,
    image_shape: tuple[int, int, int],
    train_fn: Callable[[dict, Array], tuple[Array, dict]] | None = None,
    class_names: Sequence[str] = (),
    name: str = "function",
) -> tuple[Classifier, Variables]:
    """Turn a function of variables and images into a classifier that can be hardened.

    Args:
      logits_fn: (variables, images [n h w c] in [0,1]) -> logits [n K], in inference mode,
        normalisation inside.
      variables: {"params": any pytree of arrays}, which is trained, and, if the model has any,
        "batch_stats": a pytree of what batch normalisation keeps.
      image_shape: (h, w, c).
      train_fn: as `logits_fn`, but in training mode -> (logits, variables with new "batch_stats");
        needed for hardening with batch_norm "update" where there are batch statistics.
      class_names: K names, if known.
      name: what the model is called.

    Returns:
      The classifier, and the variables as flat dicts of arrays, the names joined by dots.
      `like(tree, variables)` gives them their structure back.

    Raises:
      InputError: the variables are no such dict, or the function does not give logits.

    >>> def linear(variables, images):
    ...     return images.reshape(images.shape[0], -1) @ variables["params"]["w"]
    >>> classifier, variables = from_function(
    ...     linear, {"params": {"w": jnp.ones((4, 3))}}, image_shape=(2, 2, 1))
    >>> classifier.predict(variables, jnp.ones((5, 2, 2, 1))).shape
    (5, 3)
    """
    if "params" not in variables or not set(variables) <= {"params", "batch_stats"}:
        raise InputError(
            'variables must be {"params": ..., "batch_stats": ...}, the second if there are any; '
            f"got {', '.join(map(repr, variables)) or 'nothing'}"
        )
    variables = {"batch_stats": {}, **variables}
    given = {kind: flat(tree) for kind, tree in variables.items()}
    spec = ModelSpec(
        name,
        _num_classes(logits_fn, variables, image_shape),
        image_shape,
        mean=(0.0,) * image_shape[-1],
        std=(1.0,) * image_shape[-1],
        class_names=tuple(class_names),
    )

    def predict(given, images):
        return logits_fn(like(variables, given), normalise(spec, images))

    def forward_train(given, images):
        if train_fn is None:
            return predict(given, images), given
        logits, after = train_fn(like(variables, given), normalise(spec, images))
        return logits, {**given, "batch_stats": flat(after["batch_stats"])}

    lacking = train_fn is None and given["batch_stats"]
    frozen = "it was given without a train_fn, which would move them" if lacking else ""
    return Classifier(spec, predict, forward_train, frozen), given


def like(tree: dict, variables: Variables) -> dict:
    """Flat `variables` in the structure of `tree`, as their own library knows them.

    >>> like({"params": {"a": [0, 0]}}, {"params": {"a.0": 1, "a.1": 2}})
    {'params': {'a': [1, 2]}}
    """
    return {
        kind: jax.tree.unflatten(
            jax.tree.structure(part), [variables[kind][name] for name in flat(part)]
        )
        for kind, part in tree.items()
    }


def _num_classes(logits_fn, variables, image_shape) -> int:
    images = jax.ShapeDtypeStruct((3, *image_shape), jnp.float32)
    shape = getattr(jax.eval_shape(logits_fn, variables, images), "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != 3:
        raise InputError(
            f"the function must return logits [n, K], but returns {shape or 'no array'} for 3 "
            f"images {tuple(image_shape)}"
        )
    return shape[1]
