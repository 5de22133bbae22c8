import dataclasses
import importlib.metadata
import json
import shutil
import types
import warnings

import jax
import numpy as np
import pytest

from moth_jax import data, models
from moth_jax.distance.matrix import DistanceMatrix, relative_increase
from moth_jax.errors import InputError
from moth_jax.evaluation import accuracy
from moth_jax.models import checkpoint
from moth_jax.parallel import processes
from moth_jax.run.configuration import as_json
from moth_jax.run.phases import Models, original
from moth_jax.run.summary import summarise
from moth_jax.run.workdir import claim
from moth_jax.triggers import AddedTrigger
from tests.helpers.runs import (
    FIELDS,
    contents,
    do,
    figures,
    finished_run,
    job_of,
    matrices,
    steps,
    tiny_config,
)

NAMES = tuple("0123456789")
NUM_VICTIMS = len(FIELDS["distance.victims"])
NUM_STEPS = FIELDS["harden.max_steps"]


@pytest.fixture(scope="module")
def workdir():
    return finished_run()


@pytest.fixture(scope="module")
def summary(workdir):
    return json.loads((workdir / "summary.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture
def copy(workdir, tmp_path):
    """A finished run that may be changed."""
    return shutil.copytree(workdir, tmp_path / "run")


# What a run leaves


def test_a_finished_run_leaves_its_results_and_nothing_else(workdir):
    assert sorted(path.name for path in workdir.iterdir()) == [
        ".lock",
        "config.json",
        "distance_after.npz",
        "distance_before.npz",
        "hardened",
        "hardening.json",
        "images.npz",
        "metrics.jsonl",
        "original",
        "original.json",
        "report.html",
        "summary.json",
        "tensorboard",
    ]


def test_the_summary_agrees_with_the_files_it_sums_up(workdir, summary):
    before, after = matrices(workdir)
    test_images = data.load("digits").test
    for when, folder in (("before", "original"), ("after", "hardened")):
        model = checkpoint.load_model(workdir / folder)
        expected = accuracy(model.classifier.predict, model.variables, test_images)
        assert summary[f"accuracy_{when}"] == expected
        assert 0.5 < expected <= 1
    assert summary["distance_before"] == pytest.approx(before.values[before.found].mean())
    assert summary["distance_after"] == pytest.approx(after.values[after.found].mean())
    assert summary["increase"] == pytest.approx(relative_increase(before, after))
    assert summary["failures_before"] == np.isinf(before.values).sum()
    assert summary["failures_after"] == np.isinf(after.values).sum()
    assert 0 < summary["distance_before"] < 64  # pixels of an image


def test_the_summary_says_how_it_came_about(summary):
    assert (summary["data"], summary["model"], summary["method"]) == ("digits", "small_cnn", "moth")
    assert summary["seeds"] == {"run": 0, "distance": [0]}
    assert summary["device"].startswith(f"{jax.device_count()} x ")
    assert summary["packages"]["jax"] == jax.__version__
    for name in ("jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        assert summary["packages"][name] == importlib.metadata.version(name)
    assert (summary["harden_steps"], summary["harden_stopped"]) == (NUM_STEPS, "budget")
    seconds = [summary["training_seconds"], summary["harden_seconds"]]
    seconds += [summary["distance_seconds"]["before"], summary["distance_seconds"]["after"]]
    assert all(0 < value < 3600 for value in seconds)


@pytest.mark.parametrize("when", ["before", "after"])
def test_distances_are_there_for_the_chosen_victims_and_nan_elsewhere(workdir, when):
    with np.load(workdir / f"distance_{when}.npz", allow_pickle=False) as file:
        values, rates, names = (file[n] for n in ("values", "success_rate", "class_names"))
    measured = ~np.eye(10, dtype=bool)
    measured[NUM_VICTIMS:] = False
    assert values.shape == rates.shape == (10, 10)
    assert tuple(names) == NAMES
    np.testing.assert_array_equal(np.isnan(values), ~measured)
    np.testing.assert_array_equal(np.isnan(rates), ~measured)
    found = np.isfinite(values)
    assert found.sum() > 9
    assert (rates[found] >= 0.9).all()
    assert (rates[np.isinf(values)] < 0.9).all()
    assert (values[found] > 0).all()


def test_every_step_is_on_record_once_in_order(workdir):
    epochs = [("training", epoch) for epoch in range(1, FIELDS["training.epochs"] + 1)]
    classes = [("warm-up", k) for k in range(10)]
    hardened = [("hardening", step) for step in range(NUM_STEPS)]
    assert steps(workdir) == epochs + classes + hardened


def test_the_record_is_strict_json_with_the_figures_a_person_watches(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    by_phase = {record["phase"]: record for record in records}
    assert {"loss", "validation_accuracy"} < by_phase["training"].keys()
    assert {"target", "size", "prior", "loss"} < by_phase["warm-up"].keys()
    assert {"directions", "sizes", "success_rates", "loss"} < by_phase["hardening"].keys()
    checked = [
        r["step"] for r in records if r["phase"] == "hardening" and "validation_accuracy" in r
    ]
    assert checked == [2, 5, 8, 11]  # every third


def test_tensorboard_and_the_report_are_there(workdir):
    (events,) = (workdir / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents.")
    assert events.stat().st_size > 1000
    report = (workdir / "report.html").read_text()
    assert "small_cnn on digits" in report
    assert "<svg" in report


@pytest.mark.parametrize("folder", ["original", "hardened"])
def test_a_model_can_be_used_away_from_its_run(workdir, tmp_path, folder):
    alone = shutil.copytree(workdir / folder, tmp_path / "model")
    classifier, variables = checkpoint.load_model(alone)
    digits = data.load("digits")
    assert classifier.spec.class_names == NAMES
    assert (classifier.spec.arch, classifier.spec.image_shape) == ("small_cnn", (8, 8, 1))
    assert (classifier.spec.mean, classifier.spec.std) == (digits.mean, digits.std)
    logits = classifier.predict(variables, digits.test.batch([0, 1]))
    assert logits.shape == (2, 10)


# Doing it again, in parts, and with other configurations


def test_the_same_run_again_does_nothing_twice(copy, summary):
    done = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    again = do(tiny_config(), copy)
    written = {p.name for p, time in done.items() if p.stat().st_mtime_ns != time}
    assert written <= {"summary.json", "report.html", ".lock"}
    assert len(contents(copy)) == len(done)
    assert again == summary
    assert json.loads((copy / "summary.json").read_text()) == summary


def test_phases_one_by_one_give_the_figures_of_all_at_once(workdir, tmp_path):
    seen = []
    for phase in ("train", "measure", "harden", "all"):
        partial = do(tiny_config(phase=phase), tmp_path)
        # Intervals are of samples of the directions only, lower ends of certified ones.
        optional = ("interval", "lower")
        values = {k: v for k, v in partial.items() if not any(name in k for name in optional)}
        seen.append([name for name, value in values.items() if value in (None, {})])
        names = [path.name for path in tmp_path.iterdir()]
        assert ("distance_before.npz" in names) == (phase != "train")
        assert ("hardened" in names) == (phase in ("harden", "all"))
        assert ("distance_after.npz" in names) == (phase == "all")
    assert seen[-1] == []
    assert {"accuracy_after", "distance_before", "distance_seconds", "increase"} < {*seen[0]}
    assert figures(tmp_path) == figures(workdir)
    assert steps(tmp_path) == steps(workdir)


def test_the_report_alone_writes_summary_and_report_anew(copy, summary):
    (copy / "summary.json").unlink()
    (copy / "report.html").write_text("old")
    assert do(tiny_config(phase="report"), copy) == summary
    assert json.loads((copy / "summary.json").read_text()) == summary
    assert "small_cnn on digits" in (copy / "report.html").read_text()


def test_another_method_hardens_the_model_of_a_run_and_is_named_in_its_summary(workdir, tmp_path):
    fields = {"max_steps": 4, "max_accuracy_drop": 1.0}
    fields["adversary"] = {"epsilon": 0.1, "step_size": 0.05, "num_steps": 2}
    config = tiny_config(method="adversarial", model__checkpoint=str(workdir / "original"))
    config.adversarial.update(fields)
    do(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["method"], summary["harden_steps"]) == ("adversarial", 4)
    assert "adversarial" in (tmp_path / "run" / "report.html").read_text()
    given, hardened = (
        checkpoint.load_model(folder).variables["params"]
        for folder in (workdir / "original", tmp_path / "run" / "hardened")
    )
    assert all(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(hardened), strict=True)
    )


def test_there_is_no_report_of_nothing(tmp_path):
    with pytest.raises(InputError, match=r"no run in .*/new to report on"):
        do(tiny_config(phase="report"), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_another_configuration_is_refused_with_the_fields_that_differ(copy):
    before = contents(copy)
    config = tiny_config(seed=3, harden__epochs=4.0, distance__victims=("0",))
    with pytest.raises(InputError) as raised:
        do(config, copy)
    message = str(raised.value)
    assert "(different: distance.victims, harden.epochs, seed)" in message
    assert "--overwrite" in message
    assert contents(copy) == before


def test_a_run_of_an_earlier_version_goes_on_where_new_fields_have_their_defaults(copy, summary):
    fields = json.loads((copy / "config.json").read_text())
    assert fields.pop("classes") == []
    (copy / "config.json").write_text(json.dumps(fields))
    assert do(tiny_config(), copy) == summary
    with pytest.raises(InputError, match="different: classes"):
        do(tiny_config(classes=("0", "1")), copy)


def test_an_overwriting_that_cannot_be_is_refused_before_anything_is_removed(copy):
    before = contents(copy)
    for changes, message in (
        ({"model__checkpoint": str(copy / "original")}, "which --overwrite would remove"),
        ({"model__checkpoint": "missing.pth"}, "missing.pth"),
        ({"model__mean": (0.5, 0.5)}, "mean"),
        ({"phase": "report"}, "nothing to report on"),
    ):
        with pytest.raises(InputError, match=message):
            do(tiny_config(seed=3, **changes), copy, overwrite=True)
        assert contents(copy) == before


def test_an_overwriting_that_stops_halfway_leaves_no_mixture_of_two_runs(copy, monkeypatch):
    removed = []

    def stop_at_the_third(path):
        removed.append(path)
        if len(removed) == 3:
            raise KeyboardInterrupt
        rmtree(path)

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        claim(copy, as_json(tiny_config(seed=3)), overwrite=True)
    monkeypatch.undo()
    with pytest.raises(InputError, match="different: seed"):
        claim(copy, as_json(tiny_config(seed=3)), overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["original", "training", "summary.json"])
def test_a_folder_with_files_of_these_names_but_of_no_run_is_left_alone(tmp_path, name, overwrite):
    path = tmp_path / name
    if path.suffix:
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "photo.jpg").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"holds {name}, but not the config.json of a run"):
        claim(tmp_path, as_json(tiny_config()), overwrite=overwrite)
    assert contents(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=f"cannot use {path} as --workdir"):
            do(tiny_config(), path)
    assert (tmp_path / "file").read_text() == "mine"


# What is measured and hardened


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distance__victims": (0, 10)}, "unknown classes in distance.victims: 10; "),
        ({"data__validation_fraction": 2.0}, "validation_fraction"),
        ({"model__mean": (0.1, 0.2, 0.3)}, r"mean must have one value per channel \(1\)"),
        ({"model__std": (64.0,)}, "divide by 255"),
    ],
)
def test_a_fault_of_the_configuration_is_found_before_anything_is_computed(
    tmp_path, changes, message
):
    with pytest.raises(InputError, match=message):
        do(tiny_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "original").exists()
    assert not (tmp_path / "run" / "training").exists()


def test_too_few_clean_images_for_a_batch_are_found_before_the_training(tmp_path):
    with pytest.raises(InputError, match=r"batch_size 128 is larger than the data: \d\d training"):
        do(tiny_config(clean_share=0.05), tmp_path / "run")
    assert steps(tmp_path / "run") == []


def test_a_number_of_directions_is_drawn_once_for_before_and_after():
    digits = data.load("digits")

    def drawn(count, seed=0):
        changes = {"distance__victims": (), "distance__num_directions": count, "seed": seed}
        return job_of(tiny_config(**changes), digits).directions.directions

    assert len(set(drawn(7))) == 7
    assert drawn(7) == drawn(7) != drawn(7, seed=1)
    assert len(drawn(0)) == 90


def test_distances_of_triggers_that_are_added_are_measured_and_shown(workdir, tmp_path):
    config = tiny_config(
        phase="measure",
        model__checkpoint=str(workdir / "original"),
        distance__inversion="pixel",
        distance__num_steps=150,
    )
    result = do(config, tmp_path)
    before = DistanceMatrix.load(tmp_path / "distance_before.npz")
    assert before.details["inversion"].startswith("pixel(")
    assert before.found.any()
    victim, target = before.smallest(1)[0]
    assert isinstance(before.trigger(victim, target), AddedTrigger)
    assert 0 < before.changed_pixels[victim, target] <= 64
    assert result["distance_before"] == pytest.approx(before.average())
    page = (tmp_path / "report.html").read_text()
    assert "added alike to every image" in page
    assert f"{int(before.changed_pixels[victim, target])} pixels changed" in page


def test_a_model_of_this_package_is_taken_as_it_is(workdir, tmp_path):
    given = str(workdir / "hardened")
    do(tiny_config(model__checkpoint=given, phase="train"), tmp_path)
    ours, theirs = checkpoint.load_model(tmp_path / "original"), checkpoint.load_model(given)
    assert ours.classifier.spec == theirs.classifier.spec
    jax.tree.map(np.testing.assert_array_equal, ours.variables, theirs.variables)
    assert steps(tmp_path) == []


def test_a_checkpoint_that_was_replaced_is_not_taken_for_the_model_of_the_run(workdir, tmp_path):
    given = shutil.copytree(workdir / "original", tmp_path / "given")
    config = tiny_config(model__checkpoint=str(given), phase="train")
    first = do(config, tmp_path / "run")
    assert first["checkpoint"] == str(given)
    assert len(first["checkpoint_sha256"]) == 64
    checkpoint.save_model(given, *checkpoint.load_model(given))  # the same weights
    assert do(config, tmp_path / "run")["checkpoint_sha256"] == first["checkpoint_sha256"]
    shutil.rmtree(given)
    do(config, tmp_path / "run")  # which has its own copy
    shutil.copytree(workdir / "hardened", given)
    with pytest.raises(InputError, match="given is not the model that this run began with"):
        do(config, tmp_path / "run")
    do(config, tmp_path / "run", overwrite=True)


def npz_config(file, images, **changes):
    """Write `images` of four classes to a file; returns the configuration of a run on it."""
    labels = np.arange(len(images)) % 4
    np.savez(file, x_train=images, y_train=labels, x_test=images, y_test=labels)
    config = tiny_config(distance__victims=(), **changes)
    config.data.unlock()
    config.data = {"name": "npz", "file": str(file)}
    return config


@pytest.mark.parametrize("changed", ["x_test", "y_train"])
def test_images_that_were_replaced_are_not_taken_for_those_of_the_run(tmp_path, changed):
    images = np.random.default_rng(0).integers(0, 100, (80, 8, 8, 1), np.uint8)
    file = tmp_path / "mine.npz"
    config = npz_config(file, images, phase="train", training__batch_size=20)
    arrays = dict(np.load(file))
    do(config, tmp_path / "run")
    do(config, tmp_path / "run")
    other = {"x_test": 255 - images, "y_train": arrays["y_train"][::-1]}[changed]
    np.savez(file, **{**arrays, changed: other})
    with pytest.raises(InputError, match=r"the images of .* are not those of this run"):
        do(config, tmp_path / "run")


def change_one(images):
    images[33] = images[33, ::-1]


def leave_one_out(images):
    images[33] = images[32]


ONE_IMAGE = {
    "changed": (
        change_one,
        r"test has other ones of 1 classes \('class 1'\), 1 of 80 .*: image 33;",
    ),
    "replaced": (
        leave_one_out,
        r"test has other ones of 1 classes \('class 1'\), 1 of 80 .*image 33;",
    ),
    "swapped within a class": (
        lambda images: images.__setitem__([33, 37], images[[37, 33]]),
        r"test has other ones of 1 classes \('class 1'\), 0 of 80 .* and 0 are gone;",
    ),
    "swapped between classes": (
        lambda images: images.__setitem__([33, 34], images[[34, 33]]),
        r"test has other ones of 2 classes \('class 1', 'class 2'\), 2 of 80 .*image 33, image 34;",
    ),
}


@pytest.mark.parametrize(("change", "message"), ONE_IMAGE.values(), ids=ONE_IMAGE)
def test_one_image_that_is_another_is_found_and_named(change, message, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 1), np.uint8)
    config = npz_config(tmp_path / "mine.npz", images, phase="train", training__batch_size=20)
    arrays = dict(np.load(tmp_path / "mine.npz"))
    do(config, tmp_path / "run")
    change(images)
    np.savez(tmp_path / "mine.npz", **{**arrays, "x_test": images})
    with pytest.raises(InputError, match=message):
        do(config, tmp_path / "run")
    config.phase = "report"
    with pytest.raises(InputError, match=message):
        do(config, tmp_path / "run")


@pytest.mark.parametrize("field", ["mean", "std", "builder", "trust"])
def test_a_checkpoint_says_itself_what_it_is(workdir, tmp_path, field):
    value = {"mean": (0.9,), "std": (0.1,), "builder": "a.py:b", "trust": "torchvision"}[field]
    options = {"model__checkpoint": str(workdir / "original"), f"model__{field}": value}
    with pytest.raises(InputError, match=rf"leave out model\.{field}"):
        do(tiny_config(**options), tmp_path / "run")


def with_names(workdir, tmp_path, names):
    """The model of a run under other names of its classes."""
    classifier, variables = checkpoint.load_model(workdir / "original")
    spec = dataclasses.replace(classifier.spec, class_names=tuple(names))
    checkpoint.save_model(tmp_path / "named", models.outline(spec)[0], variables)
    return tiny_config(model__checkpoint=str(tmp_path / "named"), phase="train")


def test_a_model_with_the_classes_in_another_order_is_refused(workdir, tmp_path):
    config = with_names(workdir, tmp_path, NAMES[::-1])
    with pytest.raises(InputError, match=r"output 0 .* is '9', class 0 of digits is '0'.*order"):
        do(config, tmp_path / "run")


SOME_MOVED = ["nine", *NAMES[1:9], "0"]


def test_a_model_some_of_whose_classes_have_other_places_is_refused_and_others_named(
    workdir, tmp_path
):
    config = with_names(workdir, tmp_path, SOME_MOVED)
    with pytest.raises(
        InputError,
        match=r"output 9 .* is '0', class 9 of digits is '9': 1 classes are in another place\. '9' "
        r"of the data are not among .*'nine'.*data\.class_list",
    ):
        do(config, tmp_path / "run")


def test_names_that_are_written_otherwise_are_the_same(tmp_path):
    dataset = data.load("digits")
    names = ("Café", "sea_lion", "DOG")
    given = dataclasses.replace(dataset, class_names=("cafe\u0301", "Sea Lion", "dog"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        original._check_names(tmp_path, names, given)
    with pytest.raises(InputError, match="the same classes in another order"):
        original._check_names(tmp_path, names[::-1], given)


def test_a_model_with_other_names_is_taken_with_a_warning(workdir, tmp_path):
    config = with_names(workdir, tmp_path, ["zero", "one", *NAMES[2:]])
    with pytest.warns(UserWarning, match=r"output 0 .* is 'zero'.*'0', and 1 more differ"):
        do(config, tmp_path / "run")


def test_a_model_that_guesses_is_warned_of(tmp_path):
    config = tiny_config(phase="train", training__learning_rate=1e-9, training__epochs=1)
    with pytest.warns(UserWarning, match="no more than by guessing"):
        do(config, tmp_path / "run")


def test_a_model_of_other_images_is_refused_with_both_shapes(workdir, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 1), np.uint8)
    given = str(workdir / "original")
    config = npz_config(tmp_path / "mine.npz", images, model__checkpoint=given)
    with pytest.raises(InputError, match=r"10 classes and images \(8, 8, 1\).*4 .*\(6, 6, 1\)"):
        do(config, tmp_path / "run")


def test_a_model_whose_training_diverged_is_named_as_that(tmp_path):
    config = tiny_config(training__learning_rate=1e9, phase="measure")
    with pytest.raises(InputError, match=r"training diverged[;,] lower"):
        do(config, tmp_path)


def test_every_process_takes_part_in_whatever_the_summary_reads(copy, monkeypatch):
    said, heard = [], []
    job = job_of(tiny_config(), data.load("digits"), copy)

    def summary_in(process, broadcast):
        kind = types.SimpleNamespace(process_count=lambda: 2, process_index=lambda: process)
        monkeypatch.setattr(processes, "jax", kind)
        monkeypatch.setattr(processes, "_broadcast", broadcast)
        return summarise(job, Models(copy)).figures

    def tell(message):
        said.append(message)
        return message

    def hear(_):
        heard.append(said[len(heard)])
        return heard[-1]

    figures_of_main = summary_in(0, tell)
    (copy / "report.html").unlink()
    assert summary_in(1, hear) == figures_of_main
    assert len(heard) == len(said) > 5
    assert not (copy / "report.html").exists()
