import json
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
from safetensors.numpy import save_file

from moth_jax import main
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
            [
                "unknown field config.harden.epoch; did you mean config.harden.epochs? ",
                "config.harden.momentum, ",
            ],
        ),
        ("phse=all", ["unknown field config.phse;", "did you mean config.phase?", "config.seed"]),
        (
            "hardn.epochs=3",
            [
                "unknown field config.hardn.epochs; did you mean config.harden.epochs? ",
                "the sections are: config.adversarial, config.backdoor, ",
            ],
        ),
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
        ("distance.victims=cat", ["unknown classes in distance.victims: cat", "0, 1, 2, 3"]),
        ("classes=('1','cat')", ["unknown classes in classes: cat", "0, 1, 2, 3"]),
        ("harden.learning_rate=nan", ["harden.learning_rate must be above 0, got nan"]),
    ],
)
def test_a_mistaken_field_is_one_line_with_what_there_is(command, tmp_path, argument, fragments):
    workdir = tmp_path / "run"
    arguments = (*FLAGS, f"--workdir={workdir}", f"--config.{argument}")
    answer = command(*arguments)
    assert_one_line(answer, *fragments)
    assert len(answer[2]) < 1200  # not every field there is
    assert not workdir.exists()


def test_the_field_at_fault_is_named_among_right_ones_of_the_data_set(command, tmp_path):
    cifar10 = f"--config={ROOT / 'configs' / 'cifar10.py'}"
    arguments = (cifar10, "--config.data.dir=here", "--workdir=run", "--config.harden.epoch=1")
    assert_one_line(command(*arguments), "unknown field config.harden.epoch;")
    arguments = (cifar10, "--config.data.dri=here", "--workdir=run")
    assert_one_line(command(*arguments), "unknown field config.data.dri;", "config.data.dir")


@pytest.mark.parametrize(
    ("option", "fragments"),
    [
        ("colour=(1.0,0.5)", ["colour must be 1 numbers in [0, 1]", "(1.0, 0.5)"]),
        ("position=left", ["unknown position 'left'", "bottom right"]),
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


@pytest.mark.parametrize("device", ["pipe", "/dev/zero"])
def test_a_configuration_that_has_no_end_is_not_waited_for(command, tmp_path, device):
    path = tmp_path / "config.py"
    os.mkfifo(path) if device == "pipe" else path.symlink_to(device)
    for given in (f"--config={path}", f"--config={path}:small"):
        assert_one_line(command(given, "--workdir=run"), "config.py is no regular file")


def config_file(line):
    """A configuration file with a line of its own, the fourth."""
    return f"""from moth_jax.run.configuration import default_config
def get_config():
    c = default_config()
    {line}
    return c
"""


FAULTY_FILES = {
    "syntax": ("def get_config(:\n", ["config.py, line 1", "syntax"]),
    "field": (config_file("c.harden.epoch = 3"), ["unknown field epoch", "mean epochs?"]),
    "section": (config_file("c.hardn.epochs = 3"), ["unknown field hardn", "mean harden?"]),
    "unlike any": (config_file("c.harden.blah = 3"), ["unknown field blah", "epochs, "]),
    "type": (config_file("c.harden.epochs = 'x'"), ["epochs"]),
    "value": (
        config_file("int('x')"),
        ["FILE: ValueError: invalid literal for int() with base 10: 'x' (line 4)"],
    ),
    "key": (config_file("{}['x']"), ["FILE: KeyError: 'x' (line 4)"]),
    "file": (config_file("open('none')"), ["FILE: FileNotFoundError: ", "'none' (line 4)"]),
    "ours": (
        "from moth_jax.errors import InputError\nraise InputError('no such class')\n",
        ["FILE: no such class (line 2)"],
    ),
    "import": ("import nothing_of_this_name\n", ["FILE: ModuleNotFoundError: No module named 'n"]),
    "no get_config": ("x = 3\n", ["get_config"]),
    "no config": ("def get_config():\n    return 3\n", ["get_config() that returns a ConfigDict"]),
}


@pytest.mark.parametrize(("text", "fragments"), FAULTY_FILES.values(), ids=FAULTY_FILES)
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


def write_npz(path, scale=1.0):
    images = np.random.default_rng(0).random((40, 32, 32, 3), np.float32) * scale
    labels = np.arange(40) % 4
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_data_file_that_is_not_there_is_one_line_and_no_folder_is_made(command, tmp_path):
    path = tmp_path / "nowhere.npz"
    assert_one_line(command(*npz_arguments(path)), str(path))
    assert not (tmp_path / "run").exists()


def test_a_truncated_data_file_is_one_line(command, tmp_path):
    write_npz(tmp_path / "mine.npz")
    cut(tmp_path / "mine.npz")
    assert_one_line(command(*npz_arguments(tmp_path / "mine.npz")), "mine.npz: ")


@pytest.mark.parametrize("fault", ["truncated", "NaN", "of something else", "not there"])
def test_weights_that_cannot_be_used_are_one_line_and_the_folder_can_be_used_again(
    command, tmp_path, fault
):
    write_npz(tmp_path / "mine.npz")
    path = tmp_path / "weights.safetensors"
    kernel = np.full((64, 64), np.nan if fault == "NaN" else 0.5, np.float32)
    if fault != "not there":
        save_file({"kernel": kernel}, path)
    if fault == "truncated":
        cut(path)
    arguments = npz_arguments(tmp_path / "mine.npz", f"--config.model.checkpoint={path}")
    says = {"of something else": "kernel"}.get(fault, str(path))
    assert_one_line(command(*arguments, "--config.model.name=auto"), says)
    assert not (tmp_path / "run" / "original").exists()
    assert_one_line(command(*arguments, "--config.seed=1"), says)  # not "another configuration"


MODEL_FOLDERS = ("original", "hardened")


@pytest.fixture
def copy(tmp_path):
    """A finished run that may be changed."""
    return shutil.copytree(finished_run(), tmp_path / "run")


def test_overwrite_starts_afresh_and_removes_the_results_and_nothing_else(command, copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "figures").mkdir()
    (copy / "figures" / "a.png").write_text("mine")
    train = ("--config.phase=train", "--config.seed=3", "--config.training.epochs=1")
    code, _, err = command(*FLAGS, f"--workdir={copy}", *train, "--overwrite")
    assert code == 0, err
    summary = json.loads((copy / "summary.json").read_text())
    assert summary["seeds"]["run"] == 3
    assert summary["distance_before"] is summary["accuracy_after"] is None
    assert steps(copy) == [("training", 1)]
    assert (copy / "notes.txt").read_text() == "mine"
    assert (copy / "figures" / "a.png").read_text() == "mine"
    assert not (copy / "hardened").exists()
    answer = command(*FLAGS, f"--workdir={copy}")
    assert_one_line(answer, "another configuration (different: ", "--overwrite")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *((folder, "is no checkpoint of this package or is damaged") for folder in MODEL_FOLDERS),
        ("config.json", "is damaged"),
        ("hardening.json", ""),
        ("distance_before.npz", ""),
    ],
)
def test_a_damaged_result_is_one_line_and_stays_for_the_user(command, copy, name, says):
    damaged = copy / name
    files = damaged.rglob("*") if damaged.is_dir() else [damaged]
    cut(max(files, key=lambda path: path.stat().st_size))
    before = contents(copy)
    assert_one_line(command(*FLAGS, f"--workdir={copy}"), f"{damaged} {says}".strip())
    assert contents(copy) == before


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
def test_what_is_unknown_is_left_out_and_what_went_wrong_is_said(changes, expected):
    lines = Summary(summary(**changes)).describe()
    assert all(any(text in line for line in lines) for text in expected)
    assert not any("nan" in line for line in lines)
    if changes.items() >= ONLY_BEFORE.items():
        assert not any("->" in line or "increase" in line for line in lines)


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
