"""Every file of a run is damaged or exchanged: one line that names it, or the right numbers."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moth_jax.distance.store import ChunkStore
from moth_jax.errors import InputError
from moth_jax.run.checkpoints import RunCheckpoints
from moth_jax.storage.trees import load_tree, save_tree
from tests.helpers.runs import _TEMPORARY, do, figures, finished_run, matrices, tiny_config
from tests.helpers.toys import StoppedError

REMADE = ("summary.json", "report.html")  # at every call, from the others


@functools.cache
def another_run():
    """The folder of a run that differs in its seed alone."""
    workdir = Path(_TEMPORARY.name, "another")
    do(tiny_config(seed=1), workdir)
    return workdir


def stopped_run(tmp_path, monkeypatch, where):
    """The folder of a run that has stopped in a phase."""
    owner, name, call = {
        "training": (RunCheckpoints, "save", 5),
        "distances": (ChunkStore, "save", 4),
        "hardening": (RunCheckpoints, "save", 5),
    }[where]
    workdir = tmp_path / "stopped"
    if where != "training":
        shutil.copytree(finished_run(), workdir)
        shutil.rmtree(workdir / "hardened")
        names = ["hardening.json", "distance_after.npz", "summary.json", "report.html"]
        names += ["distance_before.npz"] if where == "distances" else []
        for file in names:
            (workdir / file).unlink()
    function, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            raise StoppedError
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(StoppedError):
            do(tiny_config(), workdir)
    assert any((workdir / where).iterdir())
    return workdir


def truncated(path, relative):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def emptied(path, relative):
    path.write_bytes(b"")


def removed(path, relative):
    path.unlink()


def flipped(path, relative):
    content = bytearray(path.read_bytes())
    if content:
        content[2 * len(content) // 3] ^= 1
    path.write_bytes(bytes(content))


def a_folder(path, relative):
    path.unlink()
    path.mkdir()


def null(path, relative):
    path.write_bytes(b"null\n")


def a_list(path, relative):
    path.write_bytes(b"[]\n")


def of_another_run(path, relative):
    theirs = another_run() / relative
    if theirs.exists():
        shutil.copyfile(theirs, path)


DAMAGES = (truncated, emptied, removed, flipped, a_folder, null, a_list, of_another_run)


def files_of(workdir):
    return sorted(
        str(path.relative_to(workdir))
        for path in workdir.rglob("*")
        if path.is_file() and path.name != ".lock" and "tensorboard" not in path.parts
    )


def outcome(workdir):
    """The message of the refusal, or "" where the run has the numbers of the finished one."""
    reference, says = finished_run(), ""
    try:
        do(tiny_config(), workdir)
    except InputError as error:
        says = str(error)
    if says:
        assert "\n" not in says
        assert str(workdir) in says
        return says
    assert figures(workdir) == figures(reference)
    for ours, theirs in zip(matrices(workdir), matrices(reference), strict=True):
        np.testing.assert_array_equal(ours.values_per_seed, theirs.values_per_seed)
    return ""


QUICK = [
    ("config.json", null),
    ("config.json", a_list),
    ("config.json", removed),
    ("original.json", null),
    ("original.json", flipped),
    ("hardening.json", a_list),
    ("hardening.json", removed),
    ("distance_after.npz", truncated),
    ("distance_before.npz", flipped),
    ("metrics.jsonl", flipped),
    ("metrics.jsonl", a_folder),
    ("original/_CHECKPOINT_METADATA", truncated),
]


@pytest.fixture
def copy(tmp_path):
    """A finished run that may be changed."""
    return shutil.copytree(finished_run(), tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "damage"), QUICK, ids=[f"{name} {damage.__name__}" for name, damage in QUICK]
)
def test_a_damaged_file_of_a_finished_run_is_named(copy, name, damage):
    damage(copy / name, name)
    assert name.split("/")[0] in outcome(copy)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_no_damage_to_any_file_of_a_finished_run_gives_another_number(tmp_path, damage):
    for name in files_of(finished_run()):
        workdir = shutil.copytree(finished_run(), tmp_path / "run")
        damage(workdir / name, name)
        outcome(workdir)
        shutil.rmtree(workdir)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["training", "distances", "hardening"])
def test_no_damage_to_any_file_of_a_stopped_run_gives_another_number(tmp_path, monkeypatch, where):
    stopped = stopped_run(tmp_path, monkeypatch, where)
    for damage in (truncated, emptied, removed, flipped, null):
        for name in [name for name in files_of(stopped) if name.startswith(where)]:
            workdir = shutil.copytree(stopped, tmp_path / "run")
            damage(workdir / name, name)
            outcome(workdir)
            shutil.rmtree(workdir)


# Results in each other's place


def swap(first, second):
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def test_distances_of_the_other_model_are_refused(copy):
    shutil.copyfile(copy / "distance_after.npz", copy / "distance_before.npz")
    says = outcome(copy)
    assert says.startswith(f"{copy / 'distance_before.npz'} is of another model than this run's; ")
    assert "move it away" in says


def test_models_in_each_others_place_are_refused(copy):
    swap(copy / "original", copy / "hardened")
    assert "original.json is of another model" in outcome(copy)


def test_a_hardened_model_in_the_place_of_the_original_one_is_refused(copy):
    shutil.rmtree(copy / "original")
    shutil.copytree(copy / "hardened", copy / "original")
    assert "original.json is of another model" in outcome(copy)


def test_another_model_in_the_place_of_the_hardened_one_is_refused(copy):
    shutil.rmtree(copy / "hardened")
    shutil.copytree(copy / "original", copy / "hardened")
    assert f"{copy / 'hardened'} is not the model that" in outcome(copy)


def test_distances_without_their_model_are_refused(copy):
    shutil.rmtree(copy / "hardened")
    assert "distance_after.npz is there, but the model that it is of, hardened, is" in outcome(copy)


@pytest.mark.parametrize("phase", ["measure", "report", "scan"])
def test_a_swap_is_found_whatever_is_asked_for(copy, phase):
    swap(copy / "distance_before.npz", copy / "distance_after.npz")
    with pytest.raises(InputError, match=r"distance_before\.npz is of another model"):
        do(tiny_config(phase=phase), copy)


def test_a_record_with_another_number_is_refused(copy):
    path = copy / "hardening.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "steps": record["steps"] + 1}))
    assert f"{path} is damaged: wrong or missing checksum" in outcome(copy)


def test_a_log_of_another_run_is_refused(copy):
    path = copy / "metrics.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    record = json.loads(first)
    path.write_text("".join([json.dumps({**record, "loss": record["loss"] / 2}) + "\n", *rest]))
    assert f"line 1 of {path} is damaged, or of another run" in outcome(copy)


# States that a run goes on from


def change_state(folder, change):
    """Write the newest state anew, changed, with the right checksum."""
    newest = RunCheckpoints(folder).newest()
    arrays, metadata = load_tree(newest)
    change(arrays, metadata)
    save_tree(newest, arrays, metadata)


def other_shape(arrays, metadata):
    kept = arrays["kept"]["params"]
    name = next(iter(kept))
    kept[name] = kept[name][..., :1]


def other_dtype(arrays, metadata):
    kept = arrays["kept"]["params"]
    name = next(iter(kept))
    kept[name] = kept[name].astype(np.float64)


def no_scheduler(arrays, metadata):
    del arrays["scheduler"]


def text_for_a_step(arrays, metadata):
    metadata["step"] = "3"


def no_time(arrays, metadata):
    metadata["spent"] = None


def other_run(arrays, metadata):
    metadata["of"]["run"] = "0" * 64


@pytest.fixture(scope="module")
def hardening(tmp_path_factory):
    """A run that has stopped while it hardened."""
    with pytest.MonkeyPatch.context() as patch:
        return stopped_run(tmp_path_factory.mktemp("hardening"), patch, "hardening")


@pytest.mark.parametrize(
    "change", [other_shape, other_dtype, no_scheduler, text_for_a_step, no_time, other_run]
)
def test_a_state_that_cannot_be_gone_on_from_is_named(tmp_path, hardening, change):
    workdir = shutil.copytree(hardening, tmp_path / "run")
    change_state(workdir / "hardening", change)
    says = outcome(workdir)
    assert says.startswith(str(workdir / "hardening"))
    assert says.endswith("move it away, and the same command begins this part anew")


def test_a_run_whose_folder_is_removed_while_it_hardens_does_not_end_well(
    tmp_path, hardening, monkeypatch
):
    workdir = shutil.copytree(hardening, tmp_path / "run")
    save = RunCheckpoints.save

    def remove_and_save(self, *arguments):
        shutil.rmtree(workdir, ignore_errors=True)
        save(self, *arguments)

    monkeypatch.setattr(RunCheckpoints, "save", remove_and_save)
    with pytest.raises(InputError, match=str(workdir)):
        do(tiny_config(), workdir)
    assert not workdir.exists()


def test_a_run_whose_folder_is_replaced_while_it_hardens_writes_nothing_into_the_other(
    tmp_path, hardening, monkeypatch
):
    workdir = shutil.copytree(hardening, tmp_path / "run")
    save = RunCheckpoints.save

    def replace_and_save(self, *arguments):
        if not (tmp_path / "moved").exists():
            workdir.rename(tmp_path / "moved")
            workdir.mkdir()
        save(self, *arguments)

    monkeypatch.setattr(RunCheckpoints, "save", replace_and_save)
    with pytest.raises(InputError, match=str(workdir)):
        do(tiny_config(), workdir)
    assert not (workdir / "hardened").exists()
