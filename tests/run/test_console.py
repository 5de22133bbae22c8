"""What the console keeps to itself, and what it must not; where compiled programs are kept."""

import io
import os
import re
import subprocess
import sys

import jax
import pytest

from moth_jax.errors import InputError
from moth_jax.progress import console_progress
from moth_jax.run.console import default_folder, fail, keep_compilations
from moth_jax.run.metrics import MetricWriter, read_metrics
from moth_jax.run.summary import Summary
from moth_jax.storage.files import read_json, write_json

SWALLOWED = """
import time
from moth_jax.run.console import prepare_console

class Careless:
    def __del__(self):
        raise KeyboardInterrupt

prepare_console()
try:
    del_me = Careless()
    del del_me
    for _ in range(200):
        time.sleep(0.01)
    print("went on")
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_that_hits_a_callback_is_not_lost():
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True)
    assert done.stdout.strip() == "interrupted", done.stderr


# Compiled programs


@pytest.fixture
def as_before():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("as_before")
def test_the_folder_is_below_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compilations()
    folder = jax.config.jax_compilation_cache_dir
    assert folder == str(default_folder())
    assert folder.startswith(str(tmp_path / "moth_jax"))


@pytest.mark.usefixtures("as_before")
def test_a_folder_that_was_named_before_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    keep_compilations()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_processors_with_other_instructions_have_other_folders(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("model name : A\nflags : avx2\n")
    other.write_text("model name : A\nflags : avx2 avx512f\n")
    assert default_folder(one) != default_folder(other)
    assert default_folder(one) == default_folder(one)
    assert default_folder(tmp_path / "none").name  # of a machine that does not tell


WARNS = """
import warnings
from moth_jax import anomaly
from moth_jax.run.console import prepare_console

prepare_console()
warnings.warn_explicit("few images", UserWarning, anomaly.__file__, 3)
"""


def test_a_warning_of_any_part_of_the_package_is_one_line():
    done = subprocess.run([sys.executable, "-c", WARNS], capture_output=True, text=True)
    assert done.stderr == "moth_jax: warning: few images\n"


HOSTILE = "cat\x1b[2J\nmoth_jax: scan  looks clean\r\x9b1A\udce9\u202e"


def test_what_a_console_would_obey_is_shown_as_text(capsys):
    with pytest.raises(SystemExit):
        fail(f"unknown class {HOSTILE}")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("moth_jax: unknown class cat\\x1b[2J moth_jax: scan looks clean \\x9b1A")
    assert said.endswith("\\udce9\\u202e\n")


FORGED = "cat\nmoth_jax: all is well\x1b[2J\x9b\u202e\udcff"


def test_names_cannot_forge_lines_of_the_result():
    figures = {"increase": None, "harden_stopped": None, "directions": f"1 direction {FORGED}"}
    scan = {"text": f"looks clean: {FORGED}\ncost"}
    lines = Summary({**figures, "scan": scan}).describe()
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert "cat\\nmoth_jax: all is well\\x1b[2J\\x9b\\u202e\\udcff" in lines[0]


def test_names_cannot_forge_lines_of_the_progress():
    stream = io.StringIO()
    with console_progress(stream).task("warm-up", total=1, unit="classes") as task:
        task.advance(1, victim=FORGED)
    console_progress(stream).note(FORGED)
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in stream.getvalue().splitlines())
    assert "\x1b" not in stream.getvalue()


def test_names_that_are_no_text_can_be_written_and_come_back(tmp_path):
    write_json(tmp_path / "a.json", {"name": FORGED})
    assert read_json(tmp_path / "a.json") == {"name": FORGED}
    content = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in content.splitlines())
    with MetricWriter(tmp_path) as metrics:
        metrics.write("warm-up", 0, victim=FORGED)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["victim"] == FORGED


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "[]",
        '"text"',
        "3",
        "",
        "{",
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
        "\x00",
    ],
)
def test_a_file_that_holds_no_named_fields_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"a\.json is damaged: .*; bring back the file") as raised:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(raised.value)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(InputError, match="pipe"):
        read_json(tmp_path / "a.json")
