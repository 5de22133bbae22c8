import dataclasses
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from moth_jax.distance.heat_map import distance_scale, increase_scale
from moth_jax.distance.matrix import DistanceMatrix
from moth_jax.errors import InputError
from moth_jax.report import Report, write_report
from moth_jax.report.curves import history_section, history_svg, training_svg
from moth_jax.report.gallery import png_uri
from moth_jax.report.headline import verdict
from moth_jax.storage.files import write_json
from moth_jax.triggers import AddedTrigger, Trigger
from tests.helpers.toys import found_triggers

VOID = {"meta", "img", "br", "link", "hr", "input"}
SUMMARY = {
    "accuracy_before": 0.9152,
    "accuracy_after": 0.9034,
    "increase": 1.0862,
    "distance_seconds": 3406.0,
    "harden_seconds": 1780.8,
    "device": "NVIDIA H200",
    "seeds": [0, 1, 2],
    "packages": {"jax": "0.10.2", "flax": "0.12.8"},
}


class Page(HTMLParser):
    """Parses a page strictly, and keeps what the tests ask about."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.text += data.replace("\u00a0", " ")

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def _matrix(values, names=None, shape=(8, 8, 3), with_triggers=True):
    values = np.array(values, np.float32)
    k, (h, w, c) = len(values), shape
    np.fill_diagonal(values, np.nan)
    level = np.where(np.isfinite(values), values / (h * w * c), 0).clip(0, 1)
    mask = np.broadcast_to(level[..., None, None, None], (k, k, h, w, 1)).astype(np.float32)
    pattern = np.full((k, k, h, w, c), 0.9, np.float32)
    return DistanceMatrix(
        values=values,
        success_rate=np.where(np.isfinite(values), 0.93, np.nan).astype(np.float32),
        class_names=tuple(names or [f"c{i}" for i in range(k)]),
        triggers=found_triggers(Trigger(mask, pattern), values) if with_triggers else None,
        details={"num_steps": 1000},
    )


def _values(k, seed=0):
    return np.random.default_rng(seed).uniform(5, 60, (k, k))


def _history(n=40):
    records = [{"step": i, "sizes": [40.0 + i, 50.0 + i], "loss": 0.1} for i in range(n)]
    records[3]["sizes"] = [float("inf"), None]
    for i in range(9, n, 10):
        records[i]["validation_accuracy"] = 0.91 - i / 10_000
    return records


def _report(tmp_path, k=4, shape=(8, 8, 3), **changes):
    selections = np.random.default_rng(1).integers(0, 9, (k, k))
    examples = np.random.default_rng(2).random((k, *shape)).astype(np.float32)
    arguments = {
        "title": "a run",
        "summary": SUMMARY,
        "before": _matrix(_values(k), shape=shape),
        "after": _matrix(2.5 * _values(k), shape=shape),
        "history": _history(),
        "selections": selections + selections.T,
        "examples": examples,
        **changes,
    }
    write_report(tmp_path / "report.html", Report(**arguments))
    return Page(tmp_path / "report.html")


def _check(page):
    """What holds for every page: well-formed (by `Page`), self-contained, accessible."""
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert not page.attributes("script")
    assert not page.attributes("link")
    assert "url(" not in page.source.replace("url(#", "")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        for link in (attributes.get("src"), attributes.get("href"), attributes.get("xlink:href")):
            assert link is None or link.startswith("data:image/png;base64,") or link[1:] in ids
        assert tag != "img" or attributes["alt"]
        assert tag != "svg" or (attributes["role"] == "img" and attributes["aria-label"])
    assert len(page.attributes("caption")) == len(page.attributes("table"))
    assert "nan" not in re.findall(r"[a-z]+", page.text)


def test_the_page_holds_every_part_and_nothing_from_outside(tmp_path):
    page = _report(tmp_path)
    _check(page)
    headings = re.findall("<h2>(.*?)</h2>", page.source)
    along, selected = "Distances along hardening", "Selected pairs"
    assert {"Distances", along, selected, "Smallest distances", "The run"} <= set(headings)
    # Before, after, increase; curves; selections.
    assert len(page.attributes("svg")) == 5
    # Six directions before and six after: victim, two triggers, two stamped victims, target.
    assert len([a for a in page.attributes("img") if a["src"].startswith("data:")]) == 12 * 6
    assert (tmp_path / "report.html").stat().st_size < 1e6


@pytest.mark.parametrize("share", [None, 0.97])
def test_victims_that_are_predicted_as_the_target_need_no_trigger_and_the_page_says_so(
    tmp_path, share
):
    matrix = _matrix(_values(3), names=["cat", "<dog>", "cow"])
    matrix.values[0, 1] = 0 if share is None else 3
    if share is not None:
        shares = np.where(np.eye(3), np.nan, 0).astype(np.float32)
        shares[0, 1] = share
        details = {**matrix.details, "success_bound": 0.9}
        matrix = dataclasses.replace(matrix, share_there=shares, details=details)
    page = _report(tmp_path, k=3, before=matrix, after=None, selections=None)
    _check(page)
    assert "Class distances: images of cat as <dog> are predicted without a trigger" in page.text
    assert "no sign of a backdoor" in page.text
    assert page.text.count("predicted so without a trigger") == 1  # beside the one direction
    assert "without a trigger" not in _report(tmp_path, k=3).text


def test_the_page_shows_the_numbers_of_the_summary(tmp_path):
    page = _report(tmp_path)
    for text in ("91.5 → 90.3 %", "−1.2 points", "+108.6 %", "29 min 41 s", "56 min 46 s"):
        assert text in page.text
    for text in ("NVIDIA H200", "0, 1, 2", "jax 0.10.2, flax 0.12.8", "1000"):
        assert text in page.text
    before, after = _values(4), 2.5 * _values(4)
    off_diagonal = ~np.eye(4, dtype=bool)
    assert f"{before[off_diagonal].mean():.1f} → {after[off_diagonal].mean():.1f}" in page.text
    assert "a whole image of 8×8×3 has size 192" in page.text
    for victim, target in np.argwhere(off_diagonal):
        assert f">{before[victim, target]:.1f}</text>" in page.source


def test_the_accuracy_on_chosen_and_on_other_classes_is_shown_where_classes_were_chosen(tmp_path):
    parts = {
        "accuracy_chosen_before": 0.95,
        "accuracy_chosen_after": 0.94,
        "accuracy_others_before": 0.852,
        "accuracy_others_after": 0.853,
        "classes": ["cat", "dog"],
    }
    page = _report(tmp_path, summary={**SUMMARY, **parts})
    _check(page)
    for text in ("On the chosen classes", "95.0 → 94.0 %", "85.2 → 85.3 %", "+0.1 points"):
        assert text in page.text
    assert "cat, dog" in page.text
    assert "On the chosen classes" not in _report(tmp_path).text


def test_the_same_run_gives_the_same_page_and_leaves_no_figure_of_pyplot(tmp_path):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    first = _report(tmp_path).source
    assert _report(tmp_path).source == first
    assert pyplot.get_fignums() == before


def test_class_names_and_titles_are_escaped(tmp_path):
    names = ["<b>cat</b> & co", 'quo"te', "$x_1$ and a very long name indeed", "鹿 ↔ 狗"]
    page = _report(
        tmp_path,
        title="<script>alert(1)</script>",
        before=_matrix(_values(4), names),
        after=_matrix(2 * _values(4), names),
    )
    _check(page)
    assert "<b>cat" not in page.source
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.source
    assert "<b>cat</b> & co" in page.text
    assert ">$x_1$ and a very long…</text>" in page.source


def test_triggers_that_are_added_are_drawn_and_have_both_sizes(tmp_path):
    matrix = _matrix([[0, 30.0], [24.0, 0]])
    delta = np.zeros((2, 2, 8, 8, 3), np.float32)
    delta[0, 1, 2, 3], delta[1, 0, 4, :3] = 0.5, -0.25
    changed = np.array([[np.nan, 12], [9, np.nan]], np.float32)
    before = dataclasses.replace(
        matrix,
        triggers=found_triggers(AddedTrigger(delta), matrix.values),
        changed_pixels=changed,
    )
    grey = np.full((2, 8, 8, 3), 0.5, np.float32)
    page = _report(tmp_path, k=2, before=before, after=None, examples=grey, selections=None)
    _check(page)
    for text in ("30.0 · 15.6 % of the image · 12 pixels changed", "9 pixels changed"):
        assert text in page.text
    assert "aggregated pixels; 10.5 pixels changed" in page.text
    assert "average 27.0, 10.5 pixels changed" in page.text
    assert "added alike to every image" in page.text
    pictures = [a["src"] for a in page.attributes("img")]
    assert png_uri(grey[0] + delta[0, 1]) in pictures
    assert "pixels changed" not in _report(tmp_path).text  # where it is not known


def test_a_run_that_only_measured_has_no_after(tmp_path):
    summary = {"accuracy_before": 0.9152, "distance_seconds": 12.3}
    page = _report(tmp_path, summary=summary, after=None, history=(), selections=None)
    _check(page)
    assert "its test accuracy is 91.5 %" in page.text
    assert "Measuring took" in page.text
    assert not re.search("[Hh]ardening|after|Increase", page.text)
    assert len(page.attributes("img")) == 6 * 4


@pytest.mark.parametrize("found_after", [False, True])
def test_a_matrix_without_a_single_trigger_is_a_result(tmp_path, found_after):
    nothing = np.full((4, 4), np.inf)
    after = _matrix(_values(4) if found_after else nothing)
    page = _report(tmp_path, before=_matrix(nothing), after=after)
    _check(page)
    assert f"12 → {0 if found_after else 12}" in page.text
    assert "Grey cells (with a cross): no trigger was found." in page.text
    if not found_after:
        assert "No trigger was found in any of 12 directions." in page.text
        assert "No trigger was found in any direction." in page.text


def test_cells_not_measured_and_cells_not_found_differ(tmp_path):
    plain, not_found, not_measured = _values(3), _values(3), _values(3)
    not_found[0, 1], not_measured[0, 1] = np.inf, np.nan
    maps = []
    for values in (plain, not_found, not_measured):
        page = _report(tmp_path, k=3, before=_matrix(values), after=None)
        _check(page)
        maps.append(re.search(r"<svg.*?</svg>", page.source, re.DOTALL).group())
        assert ("Empty cells: not measured." in page.text) == np.isnan(values[0, 1])
    assert len(set(maps)) == 3


def test_two_classes_one_channel_and_other_numbers_of_channels_work(tmp_path):
    _check(_report(tmp_path, k=2, shape=(8, 8, 1)))
    _check(_report(tmp_path, k=3, shape=(5, 7, 4)))


@pytest.mark.parametrize("k", [43, 100])
def test_many_classes_are_named_and_the_page_stays_small(tmp_path, k):
    names = [f"Speed limit ({i} km/h)" for i in range(k)]
    page = _report(
        tmp_path,
        k=k,
        before=_matrix(np.where(_values(k) > 55, np.inf, _values(k)), names, shape=(2, 2, 1)),
        after=_matrix(2 * _values(k), names, shape=(2, 2, 1)),
        examples=np.zeros((k, 2, 2, 1), np.float32),
    )
    _check(page)
    assert page.source.count(f"Speed limit ({k - 1} km/h)</text>") == 8  # two axes of four maps
    assert len(page.source) < 2e6


def test_a_long_history_and_large_images_keep_the_page_small(tmp_path):
    page = _report(tmp_path, k=2, shape=(224, 224, 3), history=_history(20_000))
    _check(page)
    assert len(page.source) < 5e6


def test_missing_triggers_examples_and_figures_leave_dashes(tmp_path):
    before = _matrix(_values(3), with_triggers=False)
    page = _report(
        tmp_path,
        k=3,
        summary={"accuracy_before": None, "increase": float("nan")},
        before=before,
        after=before,
        examples=None,
        history=[{"step": 1, "loss": 0.1}],
        selections=np.zeros((3, 3), int),
    )
    _check(page)
    assert not page.attributes("img")
    assert "Selected pairs" not in page.text
    assert "along hardening" not in page.text
    assert "Increase" in page.text  # the map; the headline figure is left out
    assert "+0.0 %" not in page.text
    assert "Test accuracy" not in page.text


def test_matrices_of_different_classes_are_refused(tmp_path):
    with pytest.raises(InputError, match="different classes"):
        _report(tmp_path, before=_matrix(_values(4), ["a", "b", "c", "d"]))
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        _report(tmp_path / "missing")


def test_the_summary_is_strict_json(tmp_path):
    numbers = {"distance_after": np.float32("nan"), "increase": np.inf, "num": np.int64(3)}
    summary = {**SUMMARY, **numbers, "name": "catégorie"}
    write_json(tmp_path / "summary.json", summary)

    def refuse(name):
        raise AssertionError(f"{name} is no strict JSON")

    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    read = json.loads(text, parse_constant=refuse)
    assert read["accuracy_before"] == 0.9152
    assert (read["distance_after"], read["increase"], read["num"]) == (None, "inf", 3)
    assert read["packages"] == SUMMARY["packages"]
    assert "catégorie" in text


def test_before_and_after_share_one_scale_and_the_increase_is_centred_on_no_change():
    scale = distance_scale(np.array([[10.0, np.inf]]), np.array([[np.nan, 50.0]]))
    assert (scale.low, scale.high) == (0.0, 50.0)
    scale = increase_scale(np.array([[-0.2, 1.0, np.nan]]))
    assert (scale.low, scale.high) == (-1.0, 1.0)


def test_a_few_outliers_do_not_set_the_end_of_the_scale():
    values = np.concatenate([np.linspace(10, 50, 199), [900.0]])
    assert distance_scale(values).high < 51


def test_curves_need_sizes_losses_or_accuracies():
    assert history_svg([], name="h") is None
    assert history_svg([{"step": 0, "loss": None, "target": "cat"}], name="h") is None
    assert "no trigger was found" in history_svg([{"step": 0, "sizes": [np.inf]}], name="h")
    accuracy_only = history_svg([{"step": 0, "validation_accuracy": 0.9}], name="h")
    assert "trigger size" not in accuracy_only


def _records(count=3, **figures):
    return [{"step": k, **figures} for k in range(count)]


@pytest.mark.parametrize(
    ("history", "heading", "drawn", "absent"),
    [
        (_records(sizes=[4.0], loss=0.1), "Distances along hardening", "selected pair", "loss"),
        (_records(size=4.0, target="cat"), "Triggers along hardening", "universal trigger", "pair"),
        (_records(loss=0.1), "Hardening", "loss", "trigger"),
        (_records(100, loss=0.1, validation_accuracy=1.0), "Hardening", "accuracy (%)", "trigger"),
        (_records(loss=float("inf"), validation_accuracy=0.1), "Hardening", "validation", "pair"),
    ],
)
def test_the_section_on_a_hardening_says_what_its_method_records(history, heading, drawn, absent):
    section = history_section(history)
    assert f"<h2>{heading}</h2>" in section
    svg = section[section.index("<svg") :]
    assert drawn in svg
    assert absent not in svg


def test_an_accuracy_is_drawn_within_0_and_100_percent():
    for value in (0.0, 1.0):
        svg = training_svg(_records(validation_accuracy=value), name="t")
        labels = [float(label) for label in re.findall(r">([\d.]+)<", svg)]
        assert min(labels) >= 0
        assert max(labels) <= 100


def test_pairs_selected_in_a_hardening_without_distances_are_named(tmp_path):
    names = ["ant", "bee", "cow", "dog"]
    page = _report(tmp_path, before=None, after=None, class_names=names)
    _check(page)
    assert "Selected pairs" in page.text
    assert "ant ↔ " in page.text
    assert "Distances before" not in page.text


TRAINED = {"accuracy_before": 0.912, "training_seconds": 83.0, "accuracy_after": None}


def test_a_run_that_only_trained_shows_its_training(tmp_path):
    records = _records(5, loss=0.4, validation_accuracy=0.9)
    nothing = {"before": None, "after": None, "history": (), "selections": None, "examples": None}
    page = _report(tmp_path, summary=TRAINED, training=records, **nothing)
    _check(page)
    assert "The test accuracy of this model is 91.2 %." in page.text
    assert "Training took1 min 23 s" in page.text
    assert "<h2>Training</h2>" in page.source
    assert len(page.attributes("svg")) == 1
    assert not re.search("[Hh]ardening|distance|→|Measuring|–", page.text)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"attack_success_before": 0.998}, "is 91.2 %, the attack success rate of its backdoor 99"),
        ({"accuracy_after": 0.9, "method": "nad"}, "Hardening (nad) took test accuracy from 91.2"),
        (
            {"accuracy_after": 0.9, "attack_success_before": 0.998, "attack_success_after": 0.01},
            "Hardening took test accuracy from 91.2 % to 90.0 %, attack success from 99.8 % to 1.0",
        ),
        ({"accuracy_before": None}, ""),
    ],
)
def test_the_verdict_on_a_model_that_was_not_measured(changes, expected):
    sentence = verdict({**TRAINED, **changes}, None, None).replace("\u00a0", " ")
    assert expected in sentence
    assert bool(expected) == bool(sentence)


def test_another_method_than_moth_is_named(tmp_path):
    page = _report(tmp_path, summary={**SUMMARY, "method": "fine_tuning"}, selections=None)
    assert "Hardening (fine_tuning) raised the mean class distance" in page.text


@pytest.mark.parametrize("scale", [1.0, 1.0001])
def test_a_mean_distance_that_did_not_change_is_said_to_be_left(tmp_path, scale):
    after = _matrix(scale * np.full((4, 4), 4.9))
    page = _report(tmp_path, before=_matrix(np.full((4, 4), 4.9)), after=after)
    assert "Hardening left the mean class distance at 4.9, while test accuracy" in page.text
    page = _report(tmp_path, before=_matrix(np.full((4, 4), 4.8)), after=after)
    assert "Hardening raised the mean class distance from 4.8 to 4.9, while" in page.text


@pytest.mark.parametrize(
    ("figures", "count", "columns"),
    [
        ({}, 5, 5),
        ({"training_seconds": 3.0}, 6, 3),
        ({"training_seconds": 3.0, "attack_success_before": 1.0}, 7, 4),
    ],
)
def test_no_card_stands_alone_in_a_row_at_the_top(tmp_path, figures, count, columns):
    page = _report(tmp_path, summary={**SUMMARY, **figures})
    assert sum("tile" in tag.get("class", "").split() for tag in page.attributes("div")) == count
    assert page.attributes("dl")[0]["style"] == f"--columns: {columns}"


def test_the_run_is_told_in_words_and_without_what_a_section_shows(tmp_path):
    rates = {f"c{k}": 1.0 for k in range(4)}
    recorded = {
        **SUMMARY,
        "attack_success_before": 1.0,
        "attack_success_per_class_before": rates,
        "backdoor": {"kind": "patch", "target": "c1", "victims": "all"},
        "scan": {
            "verdict": "looks poisoned",
            "method": "pairs",
            "poisoned": True,
            "statistic": 10.26,
            "statistic_name": "anomaly index",
            "threshold": 2.0,
        },
        "robustness": {"epsilon": 0.03, "step_size": 0.001},
        "distance_interval_before": [4.5, 45.5],
        "increase_interval": [-0.25, 0.5],
        "distance_seconds": {"before": 12.3, "after": 100.0},
        "harden_steps": 120,
    }
    page = _report(tmp_path, summary=recorded)
    _check(page)
    run = page.text[page.text.index("The run") :]
    for text in (
        "accuracy before91.52 %",
        "attack success before100.00 %",
        "increase+108.62 %",
        "increase interval−25.00 % to +50.00 %",
        "distance interval before4.5 to 45.5",
        "distance secondsbefore 12.3 s, after 1 min 40 s",
        "backdoorkind patch, target c1, victims all",
        "robustnessepsilon 0.03, step size 0.001",
        "harden steps120",
    ):
        assert text in run
    for absent in ("per class", "scan", "statistic", "True"):
        assert absent not in run


def test_robustness_is_a_figure_at_the_top(tmp_path):
    figures = {"robustness_before": 0.428, "robustness_after": 0.43}
    page = _report(tmp_path, summary={**SUMMARY, **figures})
    assert "Robustness (PGD)42.8 → 43.0 %+0.2 points" in page.text


def test_the_steps_of_a_short_hardening_are_whole_numbers():
    svg = history_svg([{"step": k, "validation_accuracy": 0.9} for k in range(3)], name="h")
    labels = re.findall(r">([\d.]+)<", svg)
    assert labels[: labels.index("2") + 1] == ["0", "1", "2"]


def test_pictures_keep_the_pixels_of_small_images():
    import base64
    import io

    from PIL import Image

    image = np.arange(8 * 8 * 3, dtype=np.float32).reshape(8, 8, 3) / 255
    encoded = base64.b64decode(png_uri(image).removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(encoded))), np.round(image * 255).astype(np.uint8)
    )


def test_a_matrix_can_be_plotted_in_a_notebook_with_or_without_axes():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matrix = _matrix(_values(3), ["a$", "b", "c"])
    ax = matrix.plot()
    assert ax.get_title() == f"average distance {matrix.average():.2f}"
    _, own = pyplot.subplots()
    assert matrix.plot(ax=own, title="before $x") is own
    assert own.get_title() == "before $x"
    own.figure.canvas.draw()
    pyplot.close("all")


def test_the_mean_of_a_sample_is_shown_with_its_interval_and_what_it_is_of(tmp_path):
    selection, values = {"kind": "sample", "of": 999_000}, _values(4)
    values[1, 2] = np.nan
    before, after = (
        dataclasses.replace(_matrix(scale * values), details={"selection": selection})
        for scale in (1.0, 2.0)
    )
    summary = {**SUMMARY, "increase": 1.0, "increase_interval": [0.91, 1.09]}
    page = _report(tmp_path, summary=summary, before=before, after=after, selections=None)
    low, high = before.interval()
    assert f"95 % interval {low:.1f} to {high:.1f} → {2 * low:.1f} to {2 * high:.1f}" in page.text
    assert "95 % interval +91.0 % to +109.0 %" in page.text
    assert "mean class distance (11 sampled of 999,000 directions) from" in page.text
