"""What the console keeps to itself, and what it must not; where compiled programs are kept."""

import subprocess
import sys

import jax
import pytest

from moth_jax.run.console import default_folder, fail, keep_compilations

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
