import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from moth_jax import backdoors, data
from moth_jax.backdoors import options
from moth_jax.data import ImageSplit
from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.errors import InputError
from moth_jax.report.backdoor import backdoor_section
from moth_jax.run.configuration import backdoor_options, check, default_config
from moth_jax.run.job import choose_backdoor
from moth_jax.run.phases import PHASES, Models
from moth_jax.run.summary import summarise
from moth_jax.storage.files import write_record
from tests.helpers.runs import do, job_of, summary_of, tiny_config
from tests.helpers.toys import row_dataset


def digits_backdoor(**changes):
    fields = {"kind": "patch", "target": "7", **changes}
    return {f"backdoor__{name}": value for name, value in fields.items()}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(folder, summary, configuration) of a run that trains a model with a backdoor."""
    workdir = tmp_path_factory.mktemp("planted") / "run"
    backdoor = digits_backdoor(rate=0.5, victims=("1", "2"), cover_rate=0.2)
    training = {"training__epochs": 8, "training__batch_size": 128}
    config = tiny_config(phase="train", **backdoor, **training)
    return workdir, do(config, workdir), config


def save_distances(workdir):
    """Put measurements into a run's folder which found no trigger."""
    rates = np.where(np.eye(10), np.nan, 0).astype(np.float32)
    matrix = DistanceMatrix(rates + np.float32(np.inf), rates, tuple("0123456789"))
    of = json.loads((workdir / "original.json").read_text())["of"]
    matrix.details.update(seconds=1.0, of=of)
    for when in ("before", "after"):
        matrix.save(workdir / f"distance_{when}.npz")


def save_record(workdir):
    """Write the record of a hardening that has changed nothing."""
    of = json.loads((workdir / "original.json").read_text())["of"]
    fields = {"seconds": 1.0, "cpu_seconds": 1.0, "steps": 0, "stopped": "budget"}
    accuracies = dict.fromkeys(("validation_accuracy_before", "validation_accuracy_at_stop"), 0.9)
    record = {**fields, **accuracies, "num_selected": None, "of": of, "model": of["model"]}
    write_record(workdir / "hardening.json", record)


def test_poisoned_training_plants_a_backdoor(planted):
    _, summary, _ = planted
    assert summary["attack_success_before"] > 0.9
    assert summary["attack_success_others_before"] < 0.2
    assert summary["accuracy_before"] > 0.9


def test_the_summary_has_the_attack_success_of_each_victim(planted):
    workdir, summary, _ = planted
    assert summary["backdoor"] == {"kind": "patch", "target": "7", "victims": ["1", "2"]}
    rates = summary["attack_success_per_class_before"]
    assert rates.keys() == {"1", "2"}
    assert min(rates.values()) <= summary["attack_success_before"] <= max(rates.values())
    assert not [name for name in summary if name.startswith("attack") and name.endswith("after")]
    written = json.loads((workdir / "summary.json").read_text())
    assert written["attack_success_per_class_before"] == rates


def test_the_hardened_model_is_shown_beside_the_original(planted, tmp_path):
    workdir, before, config = planted
    copy = shutil.copytree(workdir, tmp_path / "run")
    shutil.copytree(copy / "original", copy / "hardened")
    save_distances(copy)
    save_record(copy)
    report = config.copy_and_resolve_references()
    report.phase = "report"
    told = summary_of(report, copy)
    summary = told.figures
    for name in ("attack_success", "attack_success_per_class", "attack_success_others"):
        assert summary[f"{name}_after"] == before[f"{name}_before"]
    overall = f"{100 * before['attack_success_before']:.2f}"
    others = f"{100 * before['attack_success_others_before']:.2f}"
    lines = [line.split() for line in told.describe()]
    at = lines.index(["attack", "success", overall, "->", overall, "%"])
    assert lines[at + 1] == ["-", "other", "classes", others, "->", others, "%"]
    page = (copy / "report.html").read_text()
    assert "<h2>Backdoor</h2>" in page
    assert page.count("an image of class 1, clean") == page.count("class 1, stamped") == 1


def test_hardening_and_measuring_see_the_clean_images(tmp_path, monkeypatch):
    seen, trained = {}, []
    monkeypatch.setattr(
        "moth_jax.training.train",
        lambda classifier, variables, dataset, *_, **__: trained.append(dataset) or variables,
    )
    for name in ("measure_before", "harden", "measure_after"):

        def record(job, models, name=name):
            seen[name] = len(job.dataset.train)

        monkeypatch.setitem(PHASES, name, PHASES[name]._replace(do=record))
    do(tiny_config(**digits_backdoor(rate=0.1)), tmp_path / "run")
    (poisoned,) = trained
    assert len(set(seen.values())) == 1
    assert len(poisoned.train) > seen["harden"]


def test_without_a_backdoor_there_is_nothing_about_one(planted, tmp_path):
    workdir = shutil.copytree(planted[0], tmp_path / "run")
    save_distances(workdir)
    (workdir / "metrics.jsonl").unlink()  # of a run with other options
    job = job_of(tiny_config(), data.load("digits"), workdir)
    summary = summarise(job, Models(workdir))
    assert not [name for name in summary.figures if "backdoor" in name or "attack" in name]
    assert not [line for line in summary.describe() if "attack" in line]
    assert "ackdoor</h2>" not in (workdir / "report.html").read_text()


def test_the_report_has_a_section_on_the_backdoor_of_the_summary():
    summary = {
        "backdoor": {"kind": "patch", "target": "<deer>", "victims": ["cat & co", "dog"]},
        "attack_success_before": 0.998,
        "attack_success_per_class_before": {"cat & co": 0.996, "dog": None},
        "attack_success_others_before": 0.012,
    }
    section = backdoor_section(summary, [("cat & co", *np.zeros((2, 8, 8, 3)))])
    assert "<deer>" not in section
    assert section.count("&lt;deer&gt;") == 1
    assert section.count("<img") == 2
    text = re.sub(r"<[^>]*>", " ", section).replace("\u00a0", " ").split()
    text = " ".join(text)
    assert "Victim Attack success cat &amp; co 99.6 % dog – all victims 99.8 % other" in text
    assert "hardening" not in text
    after = {name.replace("before", "after"): value for name, value in summary.items()}
    both = backdoor_section({**summary, **after, "attack_success_others_after": 0.0}, [])
    assert "Before hardening" in both
    assert "0.0\u00a0%" in both
    assert "<img" not in both
    assert backdoor_section({}, []) == ""


def test_classes_are_found_by_name_or_by_number():
    dataset = row_dataset(class_names=("cat", "2", "dog"))
    for target, victims, expected in [
        ("dog", ("cat",), (2, (0,))),
        ("2", (), (1, ())),  # a name goes before a number
        ("0", ("1",), (0, (1,))),
    ]:
        fields = {"target": target, "victims": victims, "margin": 0}
        config = tiny_config()
        config.backdoor.update({"kind": "patch", **fields})
        backdoor = choose_backdoor(backdoor_options(config), dataset)
        assert (backdoor.target, backdoor.victims) == expected
    assert choose_backdoor(backdoor_options(tiny_config()), dataset) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "sticker"}, "unknown backdoor 'sticker'; choose one of: blend, filter, patch"),
        ({"target": ""}, "backdoor.target must name a class, got ''"),
        ({"target": "cat"}, "unknown classes in backdoor.target: cat; the classes are: 0, 1"),
        ({"victims": ("12",)}, "unknown classes in backdoor.victims: 12"),
        ({"victims": ("7",)}, r"target 7 and victims \(7,\)"),
        ({"rate": 0.0}, r"backdoor.rate must be in \(0, 1\], got 0.0"),
        ({"cover_rate": 2.0}, r"backdoor.cover_rate must be in \[0, 1\], got 2.0"),
        ({"size": 9}, "9 x 9 pixels .* does not fit into images of 8 x 8"),
        ({"colour": (1.0, 1.0, 1.0)}, "colour must be 1 numbers"),
        ({"opacity": 0.5}, "backdoor 'patch' has no option opacity; its options are: colour, mar"),
        ({"kind": "filter"}, "a filter needs images of 3 channels"),
    ],
)
def test_a_mistaken_backdoor_of_a_run_is_found_before_anything_is_done(tmp_path, fields, message):
    config = tiny_config()
    config.backdoor.update({"kind": "patch", "target": "7", **fields})
    with pytest.raises(InputError, match=message):
        do(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", backdoors.ATTACKS)
def test_every_option_of_every_attack_is_a_field_and_none_is_set(kind):
    fields = default_config().backdoor
    for name in set(options(kind)) - {"seed"}:
        assert fields[name] is None
        assert fields.get_type(name) is backdoors.option_types()[name]


@pytest.mark.parametrize(
    ("kind", "name", "one", "other"),
    [
        ("patch", "size", 1, 2),
        ("patch", "colour", (0.2,), (0.9,)),
        ("blend", "opacity", 0.1, 0.4),
        ("blend", "seed", 0, 1),
        ("polygon", "position", "top left", "bottom right"),
        ("polygon", "regular", True, False),
    ],
)
def test_an_option_that_is_given_reaches_the_trigger(kind, name, one, other):
    clean = np.full((1, 12, 12, 1), 0.5, np.float32)
    dataset = dataclasses.replace(
        row_dataset(),
        **{part: ImageSplit(clean, np.zeros(1, np.int32)) for part in ("train", "test")},
    )
    base = digits_backdoor(kind=kind, target="0", area=0.1 if kind == "polygon" else None)
    stamped = []
    for value in (one, one, other):
        config = tiny_config(**base, **{f"backdoor__{name}": value})
        stamped.append(choose_backdoor(backdoor_options(config), dataset).stamp(clean))
    np.testing.assert_array_equal(stamped[0], stamped[1])
    assert (stamped[0] != stamped[2]).any()


@pytest.mark.parametrize(("field", "value"), [("target", "7"), ("victims", ("1",)), ("size", -1)])
def test_a_backdoor_without_a_kind_is_warned_of(field, value):
    with pytest.warns(
        UserWarning, match=rf"backdoor\.{field} is given, but no backdoor\.kind: none"
    ):
        check(tiny_config(**{f"backdoor__{field}": value}))


@pytest.mark.parametrize("size", [-1, 3])
def test_options_of_an_attack_that_is_not_chosen_are_refused_before_data_are_read(size):
    config = tiny_config(**digits_backdoor(kind="blend"), backdoor__size=size)
    with pytest.raises(InputError, match="backdoor 'blend' has no option size; its options are: g"):
        check(config)
