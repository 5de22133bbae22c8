import os
import re
import resource
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax import models
from moth_jax.errors import InputError
from moth_jax.models.checkpoint import load_model, save_model
from moth_jax.storage.trees import save_tree
from tests.helpers.runs import ROOT, contents
from tests.helpers.toys import assert_same_arrays

NAMES = ("cat", "dog", "ship")


def small_cnn(num_classes=3, seed=0):
    return models.create(
        "small_cnn",
        num_classes=num_classes,
        image_shape=(8, 8, 1),
        mean=(0.25,),
        std=(0.5,),
        class_names=NAMES[:num_classes],
        seed=seed,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a model, with what was saved there."""
    folder = tmp_path_factory.mktemp("model") / "model"
    classifier, variables = small_cnn()
    save_model(folder, classifier, variables)
    return folder, classifier, variables


def test_a_model_comes_back_with_all_it_takes_to_use_it_alone(saved):
    folder, classifier, variables = saved
    loaded = load_model(folder)
    assert loaded.classifier.spec == classifier.spec
    assert loaded.classifier.spec.class_names == NAMES
    assert_same_arrays(loaded.variables, variables)
    images = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 1)), jnp.float32)
    np.testing.assert_array_equal(
        loaded.classifier.predict(loaded.variables, images), classifier.predict(variables, images)
    )


def test_a_model_replaces_the_one_that_is_there(tmp_path):
    classifier, variables = small_cnn(seed=1)
    save_model(tmp_path / "m", *small_cnn(seed=0))
    save_model(tmp_path / "m", classifier, variables)
    loaded = load_model(tmp_path / "m")
    assert_same_arrays(loaded.variables, variables)


def damage(path, how):
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:middle])
    elif content:
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["missing", "cut", "one byte changed"])
def test_damage_to_any_file_is_reported_or_harmless_but_never_gives_other_weights(
    tmp_path, saved, how
):
    folder, _, variables = saved
    reported = []
    for name in contents(folder):
        copy = shutil.copytree(folder, tmp_path / "m")
        damage(copy / name, how)
        message = ""
        try:
            loaded = load_model(copy).variables
        except InputError as error:
            message = str(error)
        if message:
            assert message.startswith(str(copy))
            assert "\n" not in message
            reported.append(name)
        else:
            assert_same_arrays(loaded, variables)
        shutil.rmtree(copy)
    largest = max(contents(folder).items(), key=lambda item: len(item[1]))[0]
    assert largest in reported  # the file with the weights


def test_another_number_in_the_description_of_a_model_is_reported(tmp_path, saved):
    folder = shutil.copytree(saved[0], tmp_path / "m")
    path = folder / "_CHECKPOINT_METADATA"
    text = path.read_text()
    assert text.count("0.25") == 1  # the mean of the images
    path.write_text(text.replace("0.25", "0.35"))
    with pytest.raises(InputError, match="checksum"):
        load_model(folder)


def empty_folder(path):
    path.mkdir()


def folder_of_something_else(path):
    path.mkdir()
    (path / "model.txt").write_text("weights")


def checkpoint_of_a_run(path):
    save_tree(path, {"a": np.zeros(2)}, {"epoch": 7})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "there is no checkpoint folder"),
        (lambda path: path.write_text("weights"), "there is no checkpoint folder"),
        (empty_folder, "no checkpoint of this package"),
        (folder_of_something_else, "no checkpoint of this package"),
        (checkpoint_of_a_run, "no model checkpoint of this package"),
    ],
    ids=["nothing", "a file", "empty", "something else", "of a run"],
)
def test_what_is_no_model_is_an_input_error(tmp_path, make, message):
    make(tmp_path / "m")
    with pytest.raises(InputError, match=f"{tmp_path}/m.*{message}|{message} {tmp_path}/m"):
        load_model(tmp_path / "m")


def test_weights_that_do_not_fit_the_architecture_are_an_input_error(tmp_path):
    save_model(tmp_path / "m", small_cnn(3)[0], small_cnn(2)[1])
    with pytest.raises(InputError, match="does not hold the weights of a small_cnn"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_an_input_error(tmp_path, value):
    classifier, variables = small_cnn()
    variables["params"]["head.bias"] = variables["params"]["head.bias"].at[1].set(value)
    save_model(tmp_path / "m", classifier, variables)
    with pytest.raises(InputError, match="NaN or infinite weights"):
        load_model(tmp_path / "m")


def test_a_model_goes_from_one_device_to_four_and_back(tmp_path, saved):
    folder, classifier, variables = saved
    program = (
        "import jax, sys\n"
        "from moth_jax.models.checkpoint import load_model, save_model\n"
        "from moth_jax.parallel.devices import replicate\n"
        "assert jax.device_count() == 4\n"
        "model = load_model(sys.argv[1])\n"
        "on_all = replicate(model.variables)\n"
        "assert all(len(leaf.devices()) == 4 for leaf in jax.tree.leaves(on_all))\n"
        "save_model(sys.argv[2], model.classifier, on_all)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, folder, tmp_path / "m"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "4"},
        check=True,
    )
    loaded = load_model(tmp_path / "m")
    assert loaded.classifier.spec == classifier.spec
    assert_same_arrays(loaded.variables, variables)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_model_that_cannot_be_replaced_stays(tmp_path):
    classifier, variables = small_cnn(seed=0)
    save_model(tmp_path / "m", classifier, variables)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(InputError, match="cannot write"):
            save_model(tmp_path / "m", *small_cnn(seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    loaded = load_model(tmp_path / "m")
    assert_same_arrays(loaded.variables, variables)
    assert os.listdir(tmp_path) == ["m"]


def folder_of_a_run(path):
    path.mkdir()
    save_model(path / "original", *small_cnn())


def test_the_folder_of_a_run_is_not_to_be_removed_but_has_models_in_it(tmp_path):
    folder_of_a_run(tmp_path / "m")
    says = f"^{tmp_path}/m is the folder of a run; give original or hardened in it$"
    with pytest.raises(InputError, match=says):
        load_model(tmp_path / "m")


def test_a_folder_of_something_else_is_not_to_be_removed(tmp_path):
    folder_of_something_else(tmp_path / "m")
    with pytest.raises(InputError, match="is no checkpoint of this package") as caught:
        load_model(tmp_path / "m")
    assert "remove" not in str(caught.value)


def orbax_checkpoint_of_another_program(path):
    from orbax.checkpoint import v1 as ocp

    ocp.save(str(path), {"params": {"w": np.ones(3)}}, custom_metadata={"format": "theirs"})


def folder_of_hugging_face(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")


@pytest.mark.parametrize(
    ("make", "way_out"),
    [
        (orbax_checkpoint_of_another_program, "give another folder"),
        (folder_of_hugging_face, r"give the file model\.safetensors in it"),
    ],
)
def test_a_model_of_another_program_is_neither_read_nor_to_be_removed(tmp_path, make, way_out):
    make(tmp_path / "m")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"^{tmp_path}/m is no .* of this pac.*; {way_out}$") as e:
        load_model(tmp_path / "m")
    assert not re.search("remove|write", str(e.value))
    with pytest.raises(InputError, match="is a folder that is no checkpoint of this package; give"):
        save_model(tmp_path / "m", *small_cnn())
    assert contents(tmp_path) == before


def test_a_negative_variance_in_a_checkpoint_is_an_input_error(tmp_path):
    spec = {"num_classes": 3, "image_shape": (32, 32, 3), "mean": (0,) * 3, "std": (1,) * 3}
    classifier, variables = models.create("resnet20", **spec)
    variables["batch_stats"]["bn.var"] = variables["batch_stats"]["bn.var"].at[2].set(-0.5)
    save_model(tmp_path / "m", classifier, variables)
    with pytest.raises(InputError, match=r"negative variance in batch_stats\.bn\.var \(-0\.5\)"):
        load_model(tmp_path / "m")


def checkpoint_with_notes(path):
    save_model(path, *small_cnn())
    (path / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("weights"), "is a file"),
        (folder_of_something_else, "is a folder that is no checkpoint of this package"),
        (folder_of_a_run, "is a folder that is no checkpoint of this package"),
        (checkpoint_of_a_run, "is a folder that is no checkpoint of this package"),
        (checkpoint_with_notes, r"is a checkpoint with other things in it \(notes\.txt\)"),
    ],
    ids=["a file", "something else", "a run", "of a run", "with notes"],
)
def test_a_model_never_replaces_what_is_no_model(tmp_path, make, message):
    make(tmp_path / "m")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"^{tmp_path}/m {message}.*give another path$"):
        save_model(tmp_path / "m", *small_cnn())
    assert contents(tmp_path) == before


def test_a_model_replaces_an_empty_folder_and_a_damaged_model(tmp_path):
    classifier, variables = small_cnn()
    empty_folder(tmp_path / "m")
    save_model(tmp_path / "m", classifier, variables)
    shutil.rmtree(tmp_path / "m" / "state")
    save_model(tmp_path / "m", classifier, variables)
    assert_same_arrays(load_model(tmp_path / "m").variables, variables)


@pytest.mark.parametrize("kind", ["pipe", "link", "deep"])
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "state/manifest.ocdbt"])
def test_no_pipe_is_waited_for_and_no_link_followed_in_a_checkpoint(tmp_path, kind, name):
    classifier, variables = small_cnn()
    save_model(tmp_path / "model", classifier, variables)
    path = tmp_path / "model" / name
    path.rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes(b'{"a":' * 200_000)
    with pytest.raises(InputError, match=r"no (model )?checkpoint of this package, or|is damaged"):
        load_model(tmp_path / "model")
