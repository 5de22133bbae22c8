"""Convert classifiers: into checkpoints of this package, and home again.

    python -m moth_jax.convert SOURCE DEST [options]

SOURCE is a file of weights (PyTorch .pt/.pth/.th/.tar, .safetensors, Keras 2 .h5), a program of
torch.export (.pt2), a whole torchvision module (with --trust=torchvision), or a checkpoint folder.
DEST is, by its name:

    a folder           a checkpoint of this package
    .pt .pth           a state_dict for load_state_dict(strict=True) of the original module
    .safetensors       the same
    .stablehlo         a program for jax.export.deserialize, which needs nothing of this package
"""

from collections.abc import Callable
from pathlib import Path

from absl import app, flags

from moth_jax.console import fail, keep_libraries_quiet
from moth_jax.errors import InputError

_ARCH = flags.DEFINE_string(
    "arch", "auto", "Architecture of the weights: a name of moth_jax.models.MODELS or torchvision."
)
_BUILDER = flags.DEFINE_string(
    "builder", "", "FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION that returns the PyTorch module."
)
_TRUST = flags.DEFINE_string(
    "trust", "nothing", "'torchvision' also reads whole modules, of torchvision's classes alone."
)
_CLASS_NAMES = flags.DEFINE_list("class_names", [], "Names of the classes, in order.")
_MEAN = flags.DEFINE_list("mean", [], "Per channel, of pixels in [0, 1]; 0,0,0 for none.")
_STD = flags.DEFINE_list("std", [], "Per channel, of pixels in [0, 1]; 1,1,1 for none.")
_IMAGE_SHAPE = flags.DEFINE_list("image_shape", [], "Height, width and channels: 224,224,3.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace DEST if it is there.")


def convert(source: Path, dest: Path, **options) -> str:
    """Convert one classifier; return what was written, in a line.

    Args:
      source, dest: as in the module's text.
      **options: `models.sources.load_source`.

    Raises:
      InputError: what is wrong with the source, or that `dest` cannot be written.
    """
    from moth_jax import checkpoints
    from moth_jax.models.sources import load_source

    write = _writer(dest)
    if source.is_dir():
        classifier, variables, _ = checkpoints.load_model(source)
    else:
        classifier, variables = load_source(source, **options)
    dest.parent.mkdir(parents=True, exist_ok=True)
    write(dest, classifier, variables)
    spec = classifier.spec
    size = "x".join(map(str, spec.image_shape))
    frozen = f"; batch normalisation stays frozen: {classifier.frozen}" if classifier.frozen else ""
    return f"{dest}: {spec.arch}, {spec.num_classes} classes, images {size}{frozen}"


def _writer(dest: Path) -> Callable:
    from moth_jax import checkpoints
    from moth_jax.models import exporting

    def weights(write):
        return lambda path, classifier, variables: write(
            path, exporting.state_dict(classifier, variables)
        )

    writers = {
        "": checkpoints.save_model,
        ".pt": weights(exporting.write_torch),
        ".pth": weights(exporting.write_torch),
        ".safetensors": weights(exporting.write_safetensors),
        ".stablehlo": lambda path, classifier, variables: path.write_bytes(
            exporting.stablehlo(classifier, variables)
        ),
    }
    if dest.suffix not in writers:
        raise InputError(
            f"cannot write {dest.name!r}: DEST must be a folder (no extension) or end in "
            f"{', '.join(suffix for suffix in writers if suffix)}"
        )
    return writers[dest.suffix]


def main(argv: list[str]) -> None:
    """Convert; a fault of the input is one line, and exit code 2."""
    keep_libraries_quiet()
    try:
        print(convert(*_paths(argv), **_options()))
    except InputError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or argv[-1]}: {error.strerror or error}")


def _paths(argv: list[str]) -> list[Path]:
    if len(argv) != 3:
        raise InputError("two paths are needed: python -m moth_jax.convert SOURCE DEST; see --help")
    source, dest = (Path(argument).expanduser() for argument in argv[1:])
    if not source.exists():
        raise InputError(f"there is no {source}")
    if dest.exists() and not _OVERWRITE.value:
        raise InputError(f"{dest} exists; give another DEST, or --overwrite to replace it")
    return [source, dest]


def _options() -> dict:
    shape = _numbers("image_shape", _IMAGE_SHAPE.value, int)
    return {
        "arch": _ARCH.value,
        "builder": _BUILDER.value,
        "trust": _TRUST.value,
        "class_names": tuple(_CLASS_NAMES.value),
        "mean": _numbers("mean", _MEAN.value, float),
        "std": _numbers("std", _STD.value, float),
        "image_shape": shape,
    }


def _numbers(name: str, values: list[str], kind: type) -> tuple | None:
    try:
        return tuple(map(kind, values)) or None
    except ValueError:
        raise InputError(
            f"--{name} must be numbers with commas between, got {','.join(values)!r}"
        ) from None


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        fail(str(error).splitlines()[0])


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
