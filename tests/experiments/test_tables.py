"""The experiments at scale smoke: every table is written, with where it comes from."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.runs import ROOT

FOLDER = ROOT / "experiments" / "paper"
# Name of the script and of its table: how many rows that has.
TABLES = {
    "table1_natural": 7,
    "table2_adversarial": 7,
    "table3_ablation": 6,
    "table4_false_positives": 9,
    "table5_removal": 14,
    "figure6_symmetric": 6,
    "figure7_heatmaps": 4,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """One folder of models and compilations: the experiments share them."""
    return tmp_path_factory.mktemp("experiments")


def run(script, workdir, *options):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(workdir / "compilations"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--scale=smoke", "--seeds=1"]
    folders = [f"--workdir={workdir / 'cells'}", f"--out={workdir / 'out'}"]
    return subprocess.run(
        [*command, *folders, *options],
        capture_output=True,
        text=True,
        env=environment,
        cwd=workdir,
        check=False,
    )


def test_every_experiment_is_listed():
    scripts = {
        path.stem for path in FOLDER.glob("*.py") if path.stem.startswith(("table", "figure"))
    }
    assert scripts - {"tables"} == set(TABLES)


@pytest.mark.parametrize("script", TABLES)
def test_an_experiment_writes_its_table_as_markdown_csv_and_json(script, workdir):
    done = run(script, workdir)
    assert done.returncode == 0, done.stderr[-2000:]
    num_rows = TABLES[script]
    folder = workdir / "out" / script
    text = (folder / "smoke.md").read_text()
    assert f"python experiments/paper/{script}.py --scale=smoke --seeds=1 --workdir=DIR" in text
    assert str(workdir) not in text
    lines = list(csv.reader((folder / "smoke.csv").open()))
    assert len(lines) == num_rows + 1
    assert "| " + " | ".join(lines[0]) + " |" in text
    record = json.loads((folder / "smoke.json").read_text())
    assert record["scale"] == "smoke"
    assert len(record["rows"]) == num_rows
    assert all(row["figures"] for row in record["rows"])
    # The digits are in no table of the paper.
    assert not any("(paper)" in title for title in lines[0])
    if script.startswith("figure"):
        assert (folder / "smoke-digits-small_cnn.png").stat().st_size > 5000


def test_a_second_run_does_nothing_again_and_writes_the_same_figures(workdir):
    table = workdir / "out" / "figure7_heatmaps" / "smoke.csv"
    if not table.exists():
        run("figure7_heatmaps", workdir)
    before = table.read_text()
    models = {path: path.stat().st_mtime_ns for path in workdir.glob("cells/**/hardening.json")}
    again = run("figure7_heatmaps", workdir)
    assert again.returncode == 0
    assert table.read_text() == before
    assert models == {
        path: path.stat().st_mtime_ns for path in workdir.glob("cells/**/hardening.json")
    }


def test_every_seed_of_a_hardening_is_measured_in_the_directions_of_the_given_model(workdir):
    done = run("table1_natural", workdir, "--seeds=2", "--methods=nc", f"--out={workdir / 'seeds'}")
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((workdir / "seeds" / "table1_natural" / "smoke.json").read_text())
    (figures,) = [row["figures"] for row in record["rows"] if row["keys"][1] == "nc"]
    assert [np.isfinite(values["increase"]) for values in figures] == [True, True]
    assert figures[0] != figures[1]


def test_a_call_for_some_problems_leaves_the_rows_of_the_others(workdir):
    table = workdir / "out" / "table4_false_positives" / "smoke.csv"
    if not table.exists():
        run("table4_false_positives", workdir)
    before = table.read_text()
    done = run("table4_false_positives", workdir, "--problems=clean")
    assert done.returncode == 0, done.stderr[-2000:]
    assert table.read_text() == before
    text = table.with_suffix(".md").read_text()
    assert "--problems=clean" in text
    assert "Rows 1-3, 7-9: 1 seed(s)" in text
    assert "Rows 4-6: 1 seed(s)" in text
    record = json.loads(table.with_suffix(".json").read_text())
    assert [row["source"] for row in record["rows"]] == [0, 0, 0, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("script", "option", "message"),
    [
        ("table1_natural", "--scale=huge", "smoke|cpu|full"),
        (
            "table1_natural",
            "--problems=mnist-resnet9",
            "unknown problem 'mnist-resnet9'; choose one of: digits-small_cnn",
        ),
        ("table5_removal", "--methods=uap", "unknown method 'uap'; choose one of: fine_pruning"),
        ("table3_ablation", "--variants=w/o", "unknown variant 'w/o'; choose one of: MOTH"),
        ("table5_removal", "--triggers=blob", "unknown trigger 'blob'; choose one of: patch"),
    ],
)
def test_an_unknown_part_of_a_table_is_answered_with_the_choices(workdir, script, option, message):
    done = run(script, workdir, option)
    assert done.returncode
    assert message in done.stderr + done.stdout
