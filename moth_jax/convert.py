"""Convert classifiers into checkpoints of this package, and back.

    python -m moth_jax.convert SOURCE DEST [options]

SOURCE is a file of weights (PyTorch .pt/.pth/.th/.tar, .safetensors, Keras 2 .h5), a program of
torch.export (.pt2), a whole torchvision module (with --trust=torchvision), or a checkpoint folder.
DEST is, by its name:

    a folder           a checkpoint of this package; no other folder is ever replaced
    .pt .pth           a state_dict for load_state_dict(strict=True) of the original module
    .safetensors       the same; for a Keras model its arrays, such as conv2d_1/kernel
    .stablehlo         a program for jax.export.deserialize, which works without this package

A small_cnn exists in this package alone: it becomes a folder or .stablehlo.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moth_jax.errors import InputError
from moth_jax.run.console import EXIT_INTERRUPTED, fail, prepare_console
from moth_jax.storage.folders import current_folder

if TYPE_CHECKING:
    from moth_jax.models.classifier import Reading


def convert(source: Path, dest: Path, **options) -> str:
    """Convert one classifier; return what was written, and in another line what was assumed.

    A file at `dest` is replaced; a folder only if it is a checkpoint of this package.

    Args:
      source, dest: as in the module's text.
      **options: `models.loading.load_source`.

    Raises:
      InputError: what is wrong with the source, or that `dest` cannot be written.
    """
    from moth_jax.models.loading import check_alone, load_source

    write = _writer(dest)
    _check_dest(source, dest)
    if source.is_dir():
        check_alone(source, options, prefix="--")
    classifier, variables = load_source(source, **options)
    dest.parent.mkdir(parents=True, exist_ok=True)
    write(dest, classifier, variables)
    spec = classifier.spec
    size = "x".join(map(str, spec.image_shape))
    frozen = f"; batch normalisation stays frozen: {classifier.frozen}" if classifier.frozen else ""
    written = f"{dest}: {spec.arch}, {spec.num_classes} classes, images {size}{frozen}"
    return "\n".join([written, *_about_source(source, classifier.reading)])


def _about_source(source: Path, reading: "Reading") -> list[str]:
    """Return what the file does not show, and the accuracy that it says the model has."""
    claim = reading.claim
    said = claim and f"the file says that {claim.name} is {100 * claim.share:.2f} %"
    parts = [part for part in (reading.assumed, said) if part]
    return [f"{source}: {'; '.join(parts)}; compare the accuracy on your images"] if parts else []


def _writer(dest: Path) -> Callable:
    from moth_jax.models import checkpoint
    from moth_jax.models.weights import exporting
    from moth_jax.storage.files import write_atomically

    def weights(write, state_dict):
        return lambda path, classifier, variables: write(path, state_dict(classifier, variables))

    torch = weights(exporting.write_torch, exporting.torch_state_dict)
    writers = {
        "": checkpoint.save_model,
        ".pt": torch,
        ".pth": torch,
        ".safetensors": weights(exporting.write_safetensors, exporting.state_dict),
        ".stablehlo": lambda path, classifier, variables: write_atomically(
            path, exporting.stablehlo(classifier, variables)
        ),
    }
    if dest.suffix not in writers:
        raise InputError(
            f"cannot write {dest.name!r}: DEST must be a folder (no extension) or end in "
            f"{', '.join(suffix for suffix in writers if suffix)}"
        )
    return writers[dest.suffix]


def _check_dest(source: Path, dest: Path) -> None:
    """Raise `InputError` if writing `dest` would remove the source, or what is not a checkpoint."""
    from moth_jax.models import checkpoint

    there = current_folder(dest)
    if there.exists() and source.exists():
        source = source.resolve()
        if there.samefile(source):
            raise InputError(f"{dest} is SOURCE itself; give another DEST")
        if any(there.samefile(folder) for folder in source.parents):
            raise InputError(f"{dest} is a folder that SOURCE is in; give another DEST")
    if not dest.suffix:
        checkpoint.check_replaceable(dest)
    elif there.is_dir():
        raise InputError(f"{dest} is a folder, and {dest.suffix} a file; give another DEST")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see python -m moth_jax.convert --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m moth_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", type=Path)
    parser.add_argument("dest", metavar="DEST", type=Path)
    parser.add_argument(
        "--arch",
        default="auto",
        help="architecture of the weights: a name of moth_jax.models.MODELS or of torchvision "
        '("torchvision:NAME" where both have it); read off the weights if not given',
    )
    parser.add_argument(
        "--builder",
        default="",
        metavar="FILE.py:FUNCTION",
        help="a function (also PACKAGE.MODULE:FUNCTION) that returns the PyTorch module",
    )
    parser.add_argument(
        "--weights",
        default="",
        metavar="NAME",
        help="which of several sets of weights in the file, such as state_dict_ema",
    )
    parser.add_argument(
        "--trust",
        default="nothing",
        help="'torchvision' also reads whole modules, of torchvision's classes alone",
    )
    parser.add_argument(
        "--num_classes",
        "--num-classes",
        type=int,
        metavar="N",
        help="a new head of N classes, drawn at random, for weights of another number or without a "
        "head; to be trained (model.fine_tune in a run)",
    )
    parser.add_argument(
        "--class_names", "--class-names", type=_names, default=(), metavar="A,B,..."
    )
    for name, what in (("mean", "0,0,0"), ("std", "1,1,1")):
        parser.add_argument(
            f"--{name}",
            type=_numbers(float),
            metavar="R,G,B",
            help=f"what the model normalises pixels in [0, 1] with; {what} if it does not",
        )
    parser.add_argument(
        "--image_shape",
        "--image-shape",
        type=_numbers(int),
        metavar="H,W,C",
        help="such as 224,224,3",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace DEST: a file, an empty folder, or a checkpoint of this package",
    )
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _numbers(kind: type) -> Callable[[str], tuple]:
    def parse(text: str) -> tuple:
        try:
            return tuple(kind(number) for number in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"must be numbers with commas between, got {text!r}"
            ) from None

    return parse


def main(arguments: list[str] | None = None) -> None:
    """Convert; a fault of the input is one line, and exit code 2."""
    options = vars(_parser().parse_args(arguments))
    source, dest = (options.pop(name).expanduser() for name in ("source", "dest"))
    overwrite = options.pop("overwrite")
    prepare_console()
    source = current_folder(source)
    try:
        if not source.exists():
            raise InputError(f"there is no {source}")
        _check_dest(source, dest)
        if current_folder(dest).exists() and not overwrite:
            raise InputError(f"{dest} exists; give another DEST, or --overwrite to replace it")
        print(convert(source, dest, **options))
    except InputError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or dest}: {error.strerror or error}")
    except KeyboardInterrupt:
        fail("interrupted", code=EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
