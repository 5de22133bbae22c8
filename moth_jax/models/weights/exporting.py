"""Models for others: weights that PyTorch reads, and programs that run without this package."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moth_jax.errors import InputError
from moth_jax.models.classifier import Classifier
from moth_jax.models.weights.importing import LAYOUTS, export_weights
from moth_jax.storage.files import replaced_file, write_atomically
from moth_jax.types import Variables

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def state_dict(classifier: Classifier, variables: Variables) -> dict[str, np.ndarray]:
    """The arrays under the names of the model's source, in its order of axes.

    Raises:
      InputError: the architecture has no known source.
    """
    spec = classifier.spec
    if spec.graph is None:
        return export_weights(spec, variables)
    arrays = {name: array for kind in variables.values() for name, array in kind.items()}
    return {name: _home(name, arrays[name]) for name in spec.graph.persistent}


def torch_state_dict(classifier: Classifier, variables: Variables) -> dict[str, np.ndarray]:
    """As `state_dict`, for a PyTorch module.

    Raises:
      InputError: the architecture has no source in PyTorch.
    """
    layout = LAYOUTS.get(classifier.spec.arch) if classifier.spec.graph is None else None
    if layout is not None and layout.framework != "PyTorch":
        raise InputError(
            f"{classifier.spec.arch} is the {layout.description}, without an original in PyTorch "
            "that could take its weights; write .stablehlo, or .safetensors with the names of "
            f"{layout.framework}"
        )
    return state_dict(classifier, variables)


def _home(name: str, array) -> np.ndarray:
    counter = name.endswith("num_batches_tracked")  # which JAX has in 32 bits
    return np.ascontiguousarray(array, np.int64 if counter else None)


def write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a state_dict as safetensors."""
    from safetensors.numpy import save

    write_atomically(path, save(arrays))  # the library's own files are for their owner alone


def write_torch(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a state_dict as `torch.save` does."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"writing {path.name} needs PyTorch: pip install 'moth-jax[torch]'; "
            "or write .safetensors, which need nothing"
        ) from None
    with replaced_file(path) as file:
        torch.save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, file)


def stablehlo(classifier: Classifier, variables: Variables) -> bytearray:
    """A program from images [n h w c] in [0,1], any n, to logits [n K], its weights inside.

    `jax.export.deserialize(bytes).call(images)` runs it on a CPU, GPU or TPU without this package.
    """
    from jax import export

    (count,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((count, *classifier.spec.image_shape), jnp.float32)
    predict = jax.jit(lambda images: classifier.predict(variables, images))
    return export.export(predict, platforms=PLATFORMS)(images).serialize()
