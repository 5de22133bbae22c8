"""Compiled programs are kept where the user's caches are, or where JAX was told to."""

import jax
import pytest

from moth_jax.run.compilations import default_folder, keep_compilations


@pytest.fixture(autouse=True)
def as_before():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_folder_is_below_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compilations()
    folder = jax.config.jax_compilation_cache_dir
    assert folder == str(default_folder())
    assert folder.startswith(str(tmp_path / "moth_jax"))


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


def test_a_machine_that_does_not_tell_has_a_folder(tmp_path):
    assert default_folder(tmp_path / "none").name
