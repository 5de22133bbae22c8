import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from moth_jax import main
from moth_jax.data import DATASETS
from moth_jax.hardening import METHODS
from moth_jax.inversion import INVERSIONS
from moth_jax.models import MODELS
from moth_jax.run.phases import requests
from moth_jax.run.summary import Summary
from tests.helpers.runs import (
    DIGITS,
    FLAGS,
    ROOT,
    command_server,
    contents,
    finished_run,
    steps,
    tiny_config,
)


@pytest.fixture(scope="module")
def command():
    return command_server()


def assert_one_line(answer, *fragments):
    """Exit code 2, nothing on stdout, and one line on stderr that says all of `fragments`."""
    code, out, err = answer
    assert (code, out) == (2, ""), err
    assert err.startswith("moth_jax: ")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    missing = [fragment for fragment in fragments if fragment not in err]
    assert not missing, err


def ending(monkeypatch, fault, **changes):
    """What `main` ends with where the run raises `fault`."""

    def run():
        raise fault

    for name, value in (("_GRACE", 20.0), ("_CONFIG", tiny_config(**changes))):
        monkeypatch.setattr(main, name, types.SimpleNamespace(value=value))
    monkeypatch.setattr(main.console, "prepare_console", lambda: None)
    monkeypatch.setattr(main, "_run", run)
    with pytest.raises((SystemExit, RuntimeError)) as end:
        main.main([])
    return end.value


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("moth", "harden.batch_size, harden.victims_per_class, harden.warmup_max_images"),
        ("nc", "nc.batch_size, nc.num_images"),
    ],
)
def test_memory_that_runs_out_is_one_line_with_what_to_lower(monkeypatch, capsys, method, fields):
    fault = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes")
    end = ending(monkeypatch, fault, method=method)
    out, err = capsys.readouterr()
    assert_one_line(
        (end.code, out, err),
        "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes); ",
        "another number of mesh.devices",
        f"lower training.batch_size or {fields}\n",
    )
    end = ending(monkeypatch, MemoryError())
    assert_one_line((end.code, *capsys.readouterr()), "out of memory (no more of the host)")


def test_any_other_fault_of_a_device_keeps_its_traceback(monkeypatch):
    fault = jax.errors.JaxRuntimeError("INTERNAL: a bug")
    assert ending(monkeypatch, fault) is fault


# The command line


@pytest.mark.parametrize(
    ("argument", "fragments"),
    [
        (
            "harden.epoch=3",
            ["unknown field config.harden.epoch;", "did you mean config.harden.epochs?"],
        ),
        ("harden.epoch=3", ["config.harden.momentum, "]),
        ("harden.closing_steps=60", ["unknown field config.harden.closing_steps;"]),
        ("distance.settle_after=9", ["unknown field config.distance.settle_after;"]),
        ("phse=all", ["unknown field config.phse;", "did you mean config.phase?", "config.seed"]),
        (
            "hardn.epochs=3",
            ["unknown field config.hardn.epochs;", "did you mean config.harden.epochs?"],
        ),
        ("hardn.epochs=3", ["the sections are: config.adversarial, config.backdoor, "]),
        ("hardn.epoch=3", ["did you mean config.harden?"]),
        ("hradening.epochs=3", ["the sections are: "]),
        ("harden.adversry.epsilon=3", ["mean config.harden.adversary.epsilon?", "sections are: "]),
        ("harden.epochs.x=3", ["unknown field config.harden.epochs.x;", "are: config.harden.a"]),
        ("data.dir=here", ["unknown field config.data.dir;", "config.data.validation_fraction"]),
        (
            "distance.seeds[0]=3",
            ["unknown field config.distance.seeds[0];", "config.distance.seeds"],
        ),
        ("backdoor.width=3", ["unknown field config.backdoor.width;", "config.backdoor.size, "]),
        ("backdoor.size=large", ["--config.backdoor.size=large"]),
        ("harden.epochs=many", ["--config.harden.epochs=many", "could not convert"]),
        ("harden.max_steps=1.5", ["--config.harden.max_steps=1.5"]),
        ("harden.symmetric=perhaps", ["--config.harden.symmetric=perhaps", "oolean"]),
        ("distance.seeds=(0,", ["--config.distance.seeds=(0,", "tuple"]),
        ("harden=3", ["--config.harden"]),
        ("phase=everything", ["unknown phase 'everything'", *requests()]),
        ("method=magic", ["unknown method 'magic'", *METHODS]),
        ("data.name=imagenet", ["unknown data set 'imagenet'", *DATASETS]),
        ("model.name=vgg", ["unknown model 'vgg'", *MODELS]),
        ("distance.inversion=guess", ["unknown inversion 'guess'", *INVERSIONS]),
        ("distance.split=all", ["unknown split 'all'", "train", "validation", "test"]),
        ("distance.victims=cat", ["unknown classes in distance.victims: cat", "0, 1, 2, 3"]),
        ("classes=('1','cat')", ["unknown classes in classes: cat", "0, 1, 2, 3"]),
        ("distance.num_steps=0", ["distance.num_steps must be at least 1, got 0"]),
        ("harden.learning_rate=nan", ["harden.learning_rate must be above 0, got nan"]),
    ],
)
def test_a_mistaken_field_is_one_line_with_what_there_is(command, tmp_path, argument, fragments):
    workdir = tmp_path / "run"
    arguments = (*FLAGS, f"--workdir={workdir}", f"--config.{argument}")
    assert_one_line(command(*arguments), *fragments)
    assert not workdir.exists()


def test_a_mistaken_section_does_not_print_every_field(command):
    answer = command(*FLAGS, "--workdir=run", "--config.hardn.epochs=3")
    assert_one_line(answer)
    assert len(answer[2]) < 500


def test_the_field_at_fault_is_named_among_right_ones_of_the_data_set(command, tmp_path):
    cifar10 = f"--config={ROOT / 'configs' / 'cifar10.py'}"
    arguments = (cifar10, "--config.data.dir=here", "--workdir=run", "--config.harden.epoch=1")
    assert_one_line(command(*arguments), "unknown field config.harden.epoch;")
    arguments = (cifar10, "--config.data.dri=here", "--workdir=run")
    assert_one_line(command(*arguments), "unknown field config.data.dri;", "config.data.dir")


@pytest.mark.parametrize(
    ("option", "fragments"),
    [
        ("size=9", ["9 x 9 pixels", "does not fit into images of 8 x 8"]),
        ("colour=(1.0,0.5)", ["colour must be 1 numbers in [0, 1]", "(1.0, 0.5)"]),
        ("position=left", ["unknown position 'left'", "bottom right"]),
        ("opacity=0.5", ["'patch' has no option opacity; its options are: colour, margin"]),
    ],
)
def test_the_options_of_a_backdoor_are_fields_of_every_configuration(
    command, tmp_path, option, fragments
):
    backdoor = ("--config.backdoor.kind=patch", "--config.backdoor.target=7")
    arguments = (*FLAGS, f"--workdir={tmp_path / 'run'}", *backdoor, f"--config.backdoor.{option}")
    assert_one_line(command(*arguments), *fragments)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--workdir=run"], ["--config=FILE and --workdir=DIR are required", "--help"]),
        ([f"--config={DIGITS}"], ["--config=FILE and --workdir=DIR are required"]),
        ([f"--config={DIGITS}", "--workdir="], ["--workdir=DIR are required"]),
        ([], ["--config=FILE and --workdir=DIR are required"]),
        (["--config=none.py", "--workdir=run"], ["no configuration file 'none.py'", "configs/"]),
        (
            ["--config=none.py", "--workdir=run", "--config.seed=1"],
            ["configuration file 'none.py'"],
        ),
        (["--config=.", "--workdir=run"], ["no configuration file '.'"]),
        (["--config", "none.py", "--workdir", "run"], ["no configuration file 'none.py'"]),
        (
            ["--config", DIGITS, "--workdir=run", "--config.harden.epoch", "3"],
            ["unknown field config.harden.epoch; did you mean config.harden.epochs? "],
        ),
        ([f"--config={DIGITS}", "--workdir=run", "more", "words"], ["unexpected", "more words"]),
        ([f"--config={DIGITS}", "--wrokdir=run"], ["'wrokdir'", "Did you mean: workdir"]),
        ([f"--config={DIGITS}", "--workdir=run", "--overwrite=perhaps"], ["--overwrite=perhaps"]),
    ],
)
def test_a_mistaken_command_line_is_one_line(command, arguments, fragments):
    assert_one_line(command(*arguments), *fragments)


HEAD = (
    "from moth_jax.run.configuration import default_config\n"
    "def get_config():\n"
    "    c = default_config()\n"
)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("def get_config(:\n", ["config.py, line 1", "syntax"]),
        (HEAD + "    c.harden.epoch = 3\n    return c\n", ["unknown field epoch", "mean epochs?"]),
        (HEAD + "    c.hardn.epochs = 3\n    return c\n", ["unknown field hardn", "mean harden?"]),
        (HEAD + "    c.harden.blah = 3\n    return c\n", ["unknown field blah", "epochs, "]),
        (HEAD + "    c.harden.epochs = 'x'\n    return c\n", ["epochs"]),
        (
            HEAD + "    return int('x')\n",
            ["FILE: ValueError: invalid literal for int() with base 10: 'x' (line 4)"],
        ),
        (HEAD + "    1 / 0\n", ["FILE: ZeroDivisionError: division by zero (line 4)"]),
        (HEAD + "    return {}['x']\n", ["FILE: KeyError: 'x' (line 4)"]),
        (HEAD + "    open('nothere')\n", ["FILE: FileNotFoundError: ", "'nothere' (line 4)"]),
        (HEAD + "    return nothing_of_this_name\n", ["FILE: NameError: "]),
        (
            "from moth_jax.errors import InputError\nraise InputError('no such class')\n",
            ["FILE: no such class (line 2)"],
        ),
        ("import nothing_of_this_name\n", ["FILE: ModuleNotFoundError: No module named 'nothing_"]),
        ("x = 3\n", ["get_config"]),
        ("def get_config():\n    return 3\n", ["get_config() that returns a ConfigDict"]),
    ],
    ids=[
        "syntax",
        "field",
        "section",
        "unlike any",
        "type",
        "value",
        "division",
        "key",
        "file",
        "name",
        "ours",
        "import",
        "no get_config",
        "no config",
    ],
)
@pytest.mark.parametrize("more", [(), ("--config.seed=1",)], ids=["alone", "with a field"])
def test_a_faulty_configuration_file_is_one_line(command, tmp_path, text, fragments, more):
    path = tmp_path / "config.py"
    path.write_text(text)
    said = [fragment.replace("FILE", f"cannot use --config: {path}") for fragment in fragments]
    assert_one_line(command(f"--config={path}", f"--workdir={tmp_path / 'run'}", *more), *said)


# Bad input


def npz_arguments(path, *more):
    return (
        f"--config={ROOT / 'configs' / 'npz.py'}",
        f"--config.data.file={path}",
        f"--workdir={path.parent / 'run'}",
        *more,
    )


def write_npz(path, num_images=40, num_classes=4, shape=(32, 32, 3), scale=1.0, value=None):
    images = np.random.default_rng(0).random((num_images, *shape), np.float32) * scale
    if value is not None:
        images[3, 2, 1, 0] = value
    labels = np.arange(num_images) % num_classes
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["cifar10", "gtsrb", "lisa", "npz", "svhn"])
def test_a_data_folder_that_is_not_there_is_one_line_that_says_how_to_get_it(
    command, tmp_path, name
):
    option = "file" if name == "npz" else "dir"
    answer = command(
        f"--config={ROOT / 'configs' / name}.py",
        f"--config.data.{option}={tmp_path / 'nowhere'}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert_one_line(answer, str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"scale": 255}, ["must be in [0, 1]", "255"]),
        ({"value": np.nan}, ["NaN or infinite", "index"]),
        ({"shape": (32, 32)}, ["[n, h, w, c]"]),
        ({"shape": (3, 32, 32)}, ["channels"]),
        ({"num_classes": 1}, ["at least 2 classes"]),
    ],
    ids=["0-255", "NaN", "no channels", "channels first", "one class"],
)
def test_images_that_cannot_be_used_are_one_line(command, tmp_path, options, fragments):
    write_npz(tmp_path / "mine.npz", **options)
    assert_one_line(command(*npz_arguments(tmp_path / "mine.npz")), *fragments)


def test_a_truncated_data_file_is_one_line(command, tmp_path):
    write_npz(tmp_path / "mine.npz")
    cut(tmp_path / "mine.npz")
    assert_one_line(command(*npz_arguments(tmp_path / "mine.npz")), "mine.npz: ")


def safetensors_file(path, arrays):
    from safetensors.numpy import save_file

    save_file(arrays, path)


def torch_file(path, arrays):
    torch = pytest.importorskip("torch", reason="writes a PyTorch file")
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


def keras_file(path, arrays):
    import h5py

    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[f"model_weights/conv2d_1/conv2d_1/{name}"] = array


FILES = {".safetensors": safetensors_file, ".th": torch_file, ".h5": keras_file}


@pytest.mark.parametrize("suffix", FILES)
@pytest.mark.parametrize("fault", ["truncated", "NaN", "of something else", "not there"])
def test_weights_that_cannot_be_used_are_one_line_and_the_folder_can_be_used_again(
    command, tmp_path, suffix, fault
):
    write_npz(tmp_path / "mine.npz")
    path = tmp_path / f"weights{suffix}"
    kernel = np.full((64, 64), np.nan if fault == "NaN" else 0.5, np.float32)
    if fault != "not there":
        FILES[suffix](path, {"kernel": kernel})
    if fault == "truncated":
        cut(path)
    arguments = npz_arguments(tmp_path / "mine.npz", f"--config.model.checkpoint={path}")
    says = {"of something else": "kernel"}.get(fault, str(path))
    assert_one_line(command(*arguments, "--config.model.name=auto"), says)
    assert not (tmp_path / "run" / "original").exists()
    assert_one_line(command(*arguments, "--config.seed=1"), says)  # not "another configuration"


def test_weights_of_another_architecture_are_one_line_with_every_array(command, tmp_path, shared):
    write_npz(tmp_path / "mine.npz", num_classes=10)
    path = shared / "checkpoints" / "akamaster_resnet20-12fca82f.th"
    pytest.importorskip("torch", reason="reads a PyTorch file")
    arguments = npz_arguments(tmp_path / "mine.npz", f"--config.model.checkpoint={path}")
    answer = command(*arguments, "--config.model.name=resnet32")
    assert_one_line(answer, "do not fit resnet32", "missing", "layer1.3.conv1.weight")


@pytest.fixture
def copy(tmp_path):
    """A finished run that may be changed."""
    return shutil.copytree(finished_run(), tmp_path / "run")


def test_the_folder_of_another_run_is_refused_with_the_fields_that_differ(command, copy):
    before = contents(copy)
    answer = command(*FLAGS, f"--workdir={copy}", "--config.harden.max_steps=9")
    assert_one_line(answer, "another configuration (different: harden.max_steps)", "--overwrite")
    assert contents(copy) == before


def test_overwrite_starts_afresh(command, copy):
    (copy / "notes.txt").write_text("mine")
    train = ("--config.phase=train", "--config.seed=1", "--overwrite")
    code, _, err = command(*FLAGS, f"--workdir={copy}", *train)
    assert code == 0, err
    assert {phase for phase, _ in steps(copy)} == {"training"}
    assert not (copy / "hardened").exists()
    assert (copy / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("folder", ["original", "hardened"])
def test_a_damaged_model_in_the_folder_is_one_line(command, copy, folder):
    cut(max((copy / folder).rglob("*"), key=lambda path: path.stat().st_size))
    answer = command(*FLAGS, f"--workdir={copy}")
    assert_one_line(answer, f"{copy / folder} is no checkpoint of this package or is damaged")


@pytest.mark.parametrize("name", ["distance_before.npz", "config.json", "hardening.json"])
def test_a_damaged_result_is_one_line(command, copy, name):
    cut(copy / name)
    assert_one_line(command(*FLAGS, f"--workdir={copy}"), str(copy / name))


def test_a_file_as_workdir_is_one_line(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    answer = command(*FLAGS, f"--workdir={tmp_path / 'file'}")
    assert_one_line(answer, f"cannot use {tmp_path / 'file'} as --workdir")
    assert (tmp_path / "file").read_text() == "mine"


# The command as a user gives it: a process that imports everything itself


def command_line(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "moth_jax.main", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_console_shows_progress_and_the_result_and_nothing_of_the_libraries(tmp_path):
    ended = command_line(*FLAGS, f"--workdir={tmp_path}", "--config.phase=train")
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    lines = ended.stderr.splitlines()
    assert [line for line in lines if not re.match(r"\d\d:\d\d:\d\d \S", line)] == []
    assert any("training: 2/2 epochs, 100 %" in line for line in lines)
    assert re.search(r"test accuracy +\d\d\.\d\d %$", lines[-2])
    assert lines[-1].endswith(str(tmp_path / "report.html"))


def test_a_fault_is_one_line_of_the_whole_process(tmp_path):
    write_npz(tmp_path / "mine.npz", scale=255)
    ended = command_line(*npz_arguments(tmp_path / "mine.npz"))
    assert_one_line((ended.returncode, ended.stdout, ended.stderr), "must be in [0, 1]")


def test_help_is_no_fault():
    ended = command_line("--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "--workdir" in ended.stdout


# The result in a few lines


def summary(**changes):
    fields = {
        "accuracy_before": 0.9152,
        "accuracy_after": 0.9034,
        "distance_before": 53.49,
        "distance_after": 109.7,
        "increase": 1.0862,
        "failures_before": 0,
        "failures_after": 0,
        "harden_stopped": "budget",
        "harden_steps": 60,
    }
    return {**fields, **changes}


def test_the_result_is_told_in_a_few_lines(tmp_path):
    report = tmp_path / "report.html"
    assert Summary(summary(), report).describe() == [
        "test accuracy    91.52 -> 90.34 %",
        "class distance   53.49 -> 109.70 pixels",
        "increase         +108.62 %",
        f"report           {report}",
    ]


NAN = float("nan")
ONLY_BEFORE = {
    "accuracy_after": None,
    "distance_after": None,
    "increase": None,
    "failures_after": None,
    "harden_stopped": None,
    "harden_steps": None,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (ONLY_BEFORE, ["test accuracy    91.52 %", "class distance   53.49 pixels"]),
        ({"failures_after": 3}, ["none found in    0 -> 3 directions"]),
        ({**ONLY_BEFORE, "failures_before": 4}, ["none found in    4 directions"]),
        ({"increase": -0.25}, ["increase         -25.00 %"]),
        ({"harden_stopped": "accuracy"}, ["validation accuracy fell", "step 60"]),
        ({"harden_stopped": "accuracy", "harden_steps": 0}, ["unchanged", "lower"]),
        (
            {"robustness_before": 0.428, "robustness_after": 0.43},
            ["robustness       42.80 -> 43.00 %"],
        ),
        (
            {"accuracy_chosen_before": 0.95, "accuracy_chosen_after": 0.94},
            ["- chosen classes 95.00 -> 94.00 %"],
        ),
        (
            {"accuracy_others_before": 0.85, "accuracy_others_after": None},
            ["- other classes  85.00 %"],
        ),
    ],
)
def test_what_is_unknown_is_left_out_and_what_went_wrong_is_said(changes, expected):
    lines = Summary(summary(**changes)).describe()
    assert all(any(text in line for line in lines) for text in expected)
    if changes.items() >= ONLY_BEFORE.items():
        assert not any("->" in line or "increase" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"distance_before": NAN, "distance_after": NAN, "increase": NAN},
            ["class distance   none found -> none found", "increase         unknown: "],
        ),
        (
            {"distance_before": NAN, "increase": NAN},
            ["class distance   none found -> 109.70 pixels"],
        ),
        ({**ONLY_BEFORE, "distance_before": NAN}, ["class distance   none found"]),
    ],
)
def test_distances_of_no_trigger_are_said_to_be_none_found(changes, expected):
    lines = Summary(summary(**changes)).describe()
    assert not any("nan" in line for line in lines)
    assert all(any(line.startswith(text) for line in lines) for text in expected)


SLOW_CONFIG = """
import pathlib, time
def get_config():
    pathlib.Path({marker!r}).touch()
    time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_anything_has_begun_has_its_exit_code_too(tmp_path, number, code):
    config, marker = tmp_path / "slow.py", tmp_path / "read"
    config.write_text(SLOW_CONFIG.format(marker=str(marker)))
    command = [sys.executable, "-m", "moth_jax.main", f"--config={config}", "--workdir=run"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not marker.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code, said
    assert said.startswith("moth_jax: ended by a signal before it began")
    assert len(said.splitlines()) == 1
