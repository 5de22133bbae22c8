import subprocess
import sys

import pytest

from moth_jax.storage.folders import current_folder, replaced_folder

# Replaces a folder, and ends at the given call of `Path.rename` or in the block, as by a kill.
PROGRAM = """
import itertools, os, sys
from pathlib import Path
from moth_jax.storage.folders import replaced_folder

moment, calls, rename = int(sys.argv[2]), itertools.count(1), Path.rename

def killed(self, target):
    if next(calls) == moment:
        os._exit(9)
    return rename(self, target)

Path.rename = killed
with replaced_folder(Path(sys.argv[1])) as folder:
    folder.mkdir(parents=True)
    (folder / "file").write_text("half")
    if moment == 0:
        os._exit(9)
    (folder / "file").write_text("new")
"""


def replace(path, text):
    with replaced_folder(path) as folder:
        folder.mkdir(parents=True)
        (folder / "file").write_text(text)


def text(path):
    return (current_folder(path) / "file").read_text()


def test_the_new_folder_takes_the_place_of_the_old_one_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "model"
    for content in ("first", "second", "third"):
        replace(path, content)
        assert (path / "file").read_text() == content
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("moment", [0, 1, 2])
def test_a_kill_at_any_moment_leaves_a_whole_folder_that_can_be_replaced(tmp_path, moment):
    path = tmp_path / "model"
    replace(path, "old")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path), str(moment)], check=False)
    assert done.returncode == 9
    assert text(path) == "old"
    with pytest.raises(ZeroDivisionError), replaced_folder(path):
        raise ZeroDivisionError
    assert (path / "file").read_text() == "old"
    replace(path, "newer")
    assert text(path) == "newer"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_link_points_to_is_replaced(tmp_path):
    replace(tmp_path / "disk" / "model", "old")
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    replace(tmp_path / "model", "new")
    assert (tmp_path / "model").is_symlink()
    assert text(tmp_path / "disk" / "model") == "new"
