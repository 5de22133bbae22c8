import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax import models
from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.errors import InputError
from moth_jax.hardening.moth import MothConfig, MothState
from moth_jax.hardening.moth import optimiser as moth_optimiser
from moth_jax.hardening.scheduler import init_state
from moth_jax.hardening.trigger_bank import TriggerBank
from moth_jax.models.checkpoint import load_model, save_distances, save_model
from moth_jax.run import checkpoints
from moth_jax.run.checkpoints import RunCheckpoints
from moth_jax.storage import trees
from moth_jax.training import (
    TrainingConfig,
    TrainState,
    train_state_arrays,
    train_state_from_arrays,
)
from moth_jax.training import optimiser as training_optimiser
from moth_jax.triggers import Trigger
from tests.helpers.runs import ROOT, contents
from tests.helpers.toys import linear_classifier, row_dataset, row_variables

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


def distances(with_triggers=True):
    values = np.array([[np.nan, 2.5, np.inf], [1.5, np.nan, 3.0], [4.0, np.nan, np.nan]])
    rng = np.random.default_rng(0)
    triggers = Trigger(
        rng.random((3, 3, 8, 8, 1)).astype("float32"), rng.random((3, 3, 8, 8, 1)).astype("float32")
    )
    return DistanceMatrix(
        values=values.astype(np.float32),
        success_rate=np.where(np.isnan(values), np.nan, 0.9).astype(np.float32),
        class_names=NAMES,
        triggers=triggers if with_triggers else None,
        details={"seconds": 1.25, "seeds": [0, 1]},
    )


def assert_same_arrays(actual, expected):
    """The same tree with the same numbers in the same types; NaN equals NaN."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a model, with what was saved there."""
    folder = tmp_path_factory.mktemp("model") / "model"
    classifier, variables = small_cnn()
    save_model(folder, classifier, variables)
    return folder, classifier, variables


# Models


def test_a_model_comes_back_with_all_it_takes_to_use_it_alone(saved):
    folder, classifier, variables = saved
    loaded = load_model(folder)
    assert loaded.classifier.spec == classifier.spec
    assert loaded.classifier.spec.class_names == NAMES
    assert loaded.distances is None
    assert_same_arrays(loaded.variables, variables)
    images = jnp.asarray(np.random.default_rng(0).random((4, 8, 8, 1)), jnp.float32)
    np.testing.assert_array_equal(
        loaded.classifier.predict(loaded.variables, images), classifier.predict(variables, images)
    )


@pytest.mark.parametrize("with_triggers", [True, False])
def test_distances_come_back_with_what_is_missing_and_what_was_not_found(tmp_path, with_triggers):
    classifier, variables = small_cnn()
    matrix = distances(with_triggers)
    save_model(tmp_path / "m", classifier, variables, matrix)
    loaded = load_model(tmp_path / "m").distances
    np.testing.assert_array_equal(loaded.values, matrix.values)
    np.testing.assert_array_equal(loaded.success_rate, matrix.success_rate)
    assert (loaded.class_names, loaded.details) == (NAMES, matrix.details)
    assert_same_arrays(loaded.triggers, matrix.triggers)


def test_distances_are_added_without_touching_the_weights(tmp_path, saved):
    folder = shutil.copytree(saved[0], tmp_path / "m")
    before = contents(folder)
    save_distances(folder, distances())
    save_distances(folder, distances(with_triggers=False))  # measured again
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"distances.npz"}
    assert load_model(folder).distances.triggers is None


def test_a_model_replaces_the_one_that_is_there_and_its_distances(tmp_path):
    classifier, variables = small_cnn(seed=1)
    save_model(tmp_path / "m", *small_cnn(seed=0), distances())
    save_model(tmp_path / "m", classifier, variables)
    loaded = load_model(tmp_path / "m")
    assert_same_arrays(loaded.variables, variables)
    assert loaded.distances is None


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


def test_damage_to_the_distances_is_reported(tmp_path, saved):
    folder = shutil.copytree(saved[0], tmp_path / "m")
    save_distances(folder, distances())
    damage(folder / "distances.npz", "cut")
    with pytest.raises(InputError, match=r"distances\.npz"):
        load_model(folder)


def empty_folder(path):
    path.mkdir()


def folder_of_something_else(path):
    path.mkdir()
    (path / "model.txt").write_text("weights")


def checkpoint_of_a_run(path):
    states = RunCheckpoints(path.parent)
    states.save(7, {"a": np.zeros(2)}, {"epoch": 7})
    states.wait()
    (path.parent / "00000007").rename(path)


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
        "from moth_jax.run.checkpoints import load_model, save_model\n"
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
    save_model(tmp_path / "m", classifier, variables, distances())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(InputError, match="cannot write"):
            save_model(tmp_path / "m", *small_cnn(seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    loaded = load_model(tmp_path / "m")
    assert_same_arrays(loaded.variables, variables)
    assert loaded.distances is not None
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
    save_model(tmp_path / "m", classifier, variables, distances())
    shutil.rmtree(tmp_path / "m" / "state")
    save_model(tmp_path / "m", classifier, variables)
    assert_same_arrays(load_model(tmp_path / "m").variables, variables)


# States of a run


def tree(step):
    return {"a": {"weights": np.full((64, 64), step, np.float32)}, "count": np.int64(step)}


def test_there_is_no_state_before_the_first_and_none_after_clearing(tmp_path):
    states = RunCheckpoints(tmp_path / "training")
    assert states.latest() is None
    states.clear()
    states.save(3, tree(3), {"epoch": 3})
    states.clear()
    assert (states.latest(), states.newest()) == (None, None)
    assert os.listdir(tmp_path) == []


def test_only_the_newest_state_is_kept_and_found(tmp_path):
    states = RunCheckpoints(tmp_path)
    for step in (2, 9, 10, 101):
        states.save(step, tree(step), {"epoch": step, "seconds": 0.1})
        arrays, metadata = states.latest()
        assert_same_arrays(arrays, tree(step))
        assert metadata == {"epoch": step, "seconds": 0.1}
        assert len(os.listdir(tmp_path)) == 1


def test_a_state_that_was_not_written_whole_is_passed_over_and_removed_with_the_next(tmp_path):
    states = RunCheckpoints(tmp_path)
    states.save(4, tree(4), {"epoch": 4})
    states.wait()
    half = shutil.copytree(tmp_path / "00000004", tmp_path / "00000009.orbax-checkpoint-tmp")
    shutil.rmtree(half / "state")
    assert_same_arrays(states.latest()[0], tree(4))
    states.save(5, tree(5), {"epoch": 5})
    states.wait()
    assert os.listdir(tmp_path) == ["00000005"]


def test_a_kill_while_states_are_written_leaves_a_whole_one(tmp_path):
    program = (
        "import sys, numpy as np\n"
        "from moth_jax.run.checkpoints import RunCheckpoints\n"
        "states = RunCheckpoints(sys.argv[1])\n"
        "for step in range(10**6):\n"
        "    tree = {'weights': np.full((300, 300), step, np.float32)}\n"
        "    states.save(step, tree, {'epoch': step})\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 120
    while not any(int(path.name[:8]) >= 3 for path in tmp_path.iterdir()):
        assert writer.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    writer.kill()
    assert writer.wait() == -signal.SIGKILL
    arrays, metadata = RunCheckpoints(tmp_path).latest()
    assert metadata["epoch"] >= 2
    assert (arrays["weights"] == metadata["epoch"]).all()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_an_input_error_and_the_last_state_stays(tmp_path):
    states = RunCheckpoints(tmp_path)
    states.save(1, tree(1), {"epoch": 1})
    noise = {"weights": np.random.default_rng(0).random((200, 200))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        states.save(2, noise, {"epoch": 2})
        with pytest.raises(InputError, match=r"cannot write .*00000002.*free some space") as raised:
            states.save(3, noise, {"epoch": 3})  # says what became of the one before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    assert_same_arrays(states.latest()[0], tree(1))
    states.save(2, noise, {"epoch": 2})
    assert_same_arrays(states.latest()[0], noise)
    assert os.listdir(tmp_path) == ["00000002"]


def slow_writing(monkeypatch):
    """Let no state be written before the event is set that this returns."""
    may_write, write = threading.Event(), trees.save_tree

    def wait_and_write(*arguments):
        may_write.wait()
        write(*arguments)

    monkeypatch.setattr(checkpoints, "save_tree", wait_and_write)
    return may_write


def test_a_state_is_copied_before_it_is_written_in_the_background(tmp_path, monkeypatch):
    may_write = slow_writing(monkeypatch)
    states = RunCheckpoints(tmp_path)
    host, device = np.ones(5), jnp.ones(5)
    states.save(1, {"host": host, "device": device}, {"epoch": 1})
    assert os.listdir(tmp_path) == []
    host[:] = 2
    device.delete()  # as of a donated buffer
    may_write.set()
    assert_same_arrays(states.latest()[0], {"host": np.ones(5), "device": np.ones(5, np.float32)})


def test_states_are_written_one_after_the_other(tmp_path, monkeypatch):
    may_write = slow_writing(monkeypatch)
    states = RunCheckpoints(tmp_path)
    states.save(1, tree(1), {"epoch": 1})
    second = threading.Thread(target=states.save, args=(2, tree(2), {"epoch": 2}))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    may_write.set()
    second.join()
    states.wait()
    assert os.listdir(tmp_path) == ["00000002"]


@pytest.mark.parametrize("then", ["save", "wait", "latest", "clear"])
def test_a_fault_in_the_background_is_raised_by_whatever_comes_next(tmp_path, monkeypatch, then):
    def fail(*_):
        raise InputError("no space left")

    monkeypatch.setattr(checkpoints, "save_tree", fail)
    states = RunCheckpoints(tmp_path)
    states.save(1, tree(1), {"epoch": 1})
    arguments = (2, tree(2), {"epoch": 2}) if then == "save" else ()
    with pytest.raises(InputError, match="no space left"):
        getattr(states, then)(*arguments)
    states.wait()  # it is told once


def moth_state(config):
    """A state as in the middle of a hardening, every part of it with numbers of its own."""
    rng = np.random.default_rng(0)
    variables = row_variables()
    tx = moth_optimiser(config, row_dataset())
    opt_state = jax.tree.map(lambda v: v + 0.5, tx.init(variables["params"]))
    bank = TriggerBank()
    for target in range(2):
        trigger = Trigger(rng.random((4, 4, 1), np.float32), rng.random((4, 4, 1), np.float32))
        bank.keep(2, target, trigger, 3.5 + target)
        bank.keep_universal(target, trigger)
    sizes = np.where(np.eye(3, dtype=bool), np.inf, rng.random((3, 3), np.float32))
    return MothState(
        train=TrainState(jax.tree.map(lambda v: v + 0.1, variables), opt_state),
        kept=variables,
        scheduler=init_state(rng.random((3, 3)), sizes),
        bank=bank,
        warmed_up=2,
        step=4,
        initial_accuracy=1 / 3,
        accuracy=0.1 + 0.2,
        accuracy_step=3,
        kept_step=2,
        stopped="",
        warmup_sizes=sizes,
        warmup_prior=rng.random((3, 3), np.float32),
        universal_sizes=np.array([1.5, np.inf, 2.5], np.float32),
    )


def test_the_state_of_a_hardening_comes_back_exactly(tmp_path):
    config = MothConfig()
    state = moth_state(config)
    states = RunCheckpoints(tmp_path)
    states.save(1, *state.to_arrays())
    loaded = MothState.from_arrays(*states.latest(), moth_optimiser(config, row_dataset()))
    expected, actual = vars(state), vars(loaded)
    assert actual.keys() == expected.keys()
    for name in expected.keys() - {"bank"}:
        assert_same_arrays(actual[name], expected[name])
    assert_same_arrays(loaded.bank.arrays, state.bank.arrays)
    assert type(loaded.scheduler) is type(state.scheduler)


def test_the_state_of_a_training_comes_back_exactly_with_the_place_in_its_schedule(tmp_path):
    tx = training_optimiser(TrainingConfig(epochs=2, batch_size=10), 100)
    variables = row_variables()
    opt_state = tx.init(variables["params"])
    for _ in range(3):
        updates, opt_state = tx.update(variables["params"], opt_state, variables["params"])
    states = RunCheckpoints(tmp_path)
    states.save(1, train_state_arrays(TrainState(variables, opt_state)), {"epoch": 1})
    loaded = train_state_from_arrays(states.latest()[0], tx)
    assert_same_arrays(loaded.opt_state, opt_state)
    assert_same_arrays(loaded.variables, variables)
    expected, _ = tx.update(updates, opt_state, variables["params"])
    actual, _ = tx.update(updates, loaded.opt_state, variables["params"])
    assert_same_arrays(actual, expected)
    assert linear_classifier().predict(loaded.variables, jnp.zeros((1, 4, 4, 1))).shape == (1, 3)


def test_a_model_without_batch_statistics_comes_back_with_none(tmp_path):
    params = {"kernel": jnp.ones((2, 3))}
    tx = training_optimiser(TrainingConfig(), 100)
    state = TrainState({"params": params, "batch_stats": {}}, tx.init(params))
    saved = RunCheckpoints(tmp_path)
    saved.save(1, train_state_arrays(state), {})
    arrays, _ = saved.latest()
    assert_same_arrays(train_state_from_arrays(arrays, tx).variables, state.variables)
