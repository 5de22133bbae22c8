import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from moth_jax.data.sources import tfds
from moth_jax.data.sources.tfds import load_cifar10, load_svhn
from moth_jax.errors import InputError
from tests.helpers.tfds_folders import prepare_cifar10

PREPARED = "data/tfds/cifar10/3.0.2"


@pytest.fixture(scope="module")
def cifar10(shared):
    return load_cifar10(dir=str(shared / "data/tfds"))


@pytest.fixture
def damaged(shared, tmp_path):
    """A copy of the prepared folder that a test may damage."""
    folder = tmp_path / "cifar10" / "3.0.2"
    shutil.copytree(shared / PREPARED, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


def test_cifar10_is_read_without_tensorflow(cifar10):
    assert "tensorflow" not in sys.modules
    assert len(cifar10.train) + len(cifar10.validation) == 5085
    assert len(cifar10.test) == 1017
    assert cifar10.train.images.dtype == np.uint8
    assert cifar10.image_shape == (32, 32, 3)
    assert cifar10.class_names[:3] == ("airplane", "automobile", "bird")
    assert (cifar10.flip, cifar10.shift) == (True, 4)
    # The channel means and deviations of all 50,000 images, to what a tenth of them can tell.
    np.testing.assert_allclose(cifar10.mean, (0.4914, 0.4822, 0.4465), atol=6e-3)
    np.testing.assert_allclose(cifar10.std, (0.2470, 0.2435, 0.2616), atol=6e-3)


def test_validation_is_a_tenth_of_every_class_of_the_training_images(cifar10):
    counts = np.bincount(cifar10.validation.labels)
    totals = counts + np.bincount(cifar10.train.labels)
    assert (np.abs(counts - totals / 10) <= 0.5).all()


def test_images_come_in_the_official_order(shared):
    import tensorflow_datasets

    builder = tensorflow_datasets.builder_from_directory(shared / PREPARED)
    source = builder.as_data_source(split="test")
    records = sorted(source.__getitems__(list(range(40))), key=lambda record: record["id"])
    images, labels = tfds._read_split(source, (32, 32, 3))
    for record in records:
        i = int(record["id"].decode().split("_")[1])
        assert (images[i] == record["image"]).all()
        assert labels[i] == record["label"]


@pytest.mark.parametrize(
    ("load", "wanted"), [(load_cifar10, "cifar10/VERSION"), (load_svhn, "svhn_cropped/VERSION")]
)
def test_a_folder_without_the_data_is_noticed_before_tfds_can_reach_for_the_network(
    load, wanted, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=rf"{wanted}/dataset_info\.json under .*download=True"):
        load(dir=str(tmp_path))


def test_a_download_that_cannot_reach_the_server_stops_at_once(tmp_path, monkeypatch):
    def unreachable(request, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r"cannot be reached .*Name or service not known"):
        load_svhn(dir=str(tmp_path), download=True)


@pytest.mark.parametrize(
    "file", ["dataset_info.json", "features.json", "cifar10-train.array_record-00000-of-00001"]
)
@pytest.mark.parametrize("damage", ["cut short", "removed"])
def test_a_damaged_folder_is_answered_with_what_to_delete(damaged, file, damage):
    path = damaged / file
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if (file, damage) == ("dataset_info.json", "removed"):
        message = "cifar10 is not prepared"
    else:
        message = "cannot be read .* delete that folder and prepare it again"
    with pytest.raises(InputError, match=message):
        load_cifar10(dir=str(damaged.parent.parent))


def test_a_folder_in_a_format_that_needs_tensorflow_is_refused(damaged):
    info = damaged / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match="stored as tfrecord, which needs TensorFlow"):
        load_cifar10(dir=str(damaged.parent.parent))


def test_the_newest_version_is_read(tmp_path):
    for version in ("3.0.2", "3.0.10", "2.9.9", "3.0.11.incomplete"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "dataset_info.json").touch()
    (tmp_path / "4.0.0").mkdir()
    assert tfds.prepared_folder(tmp_path).name == "3.0.10"
    assert tfds.prepared_folder(tmp_path / "none") is None


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare_cifar10(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def tiny(prepared, tmp_path):
    """A copy of a small folder that a test may damage."""
    return Path(shutil.copytree(prepared, tmp_path / "cifar10" / "3.0.2"))


def read(folder):
    return load_cifar10(dir=str(folder.parent.parent))


def test_a_small_folder_is_read(tiny):
    dataset = read(tiny)
    assert dataset.class_names == tuple(f"thing {k}" for k in range(10))
    assert (len(dataset.train) + len(dataset.validation), len(dataset.test)) == (20, 20)


def features(change):
    """A damage: the description of a sample is another."""

    def damage(folder):
        path = folder / "features.json"
        content = json.loads(path.read_text())
        change(content, content["featuresDict"]["features"])
        path.write_text(json.dumps(content))

    return damage


def info(change):
    """A damage: the description of the data set is another."""

    def damage(folder):
        path = folder / "dataset_info.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def template(text):
    return lambda content: [split.update(filepathTemplate=text) for split in content["splits"]]


CORE = "tensorflow_datasets.core.features"
MODULE = {"pythonClassName": "marked_module.Feature", "text": {}}
LEGACY = {"type": "marked_module.Feature", "content": {}}
HOSTILE = {
    "a feature": (
        features(lambda all, parts: parts.update(id=MODULE)),
        "feature 'id' is of 'marked",
    ),
    "another feature": (features(lambda all, parts: parts.update(x=MODULE)), "feature 'x' is of"),
    "as of old": (features(lambda all, parts: parts.update(x=LEGACY)), "feature 'x' is of None"),
    "the sample": (features(lambda all, parts: all.update(MODULE)), "does not describe a sample"),
    "the sample as of old": (
        features(lambda all, parts: all.update(LEGACY)),
        "not describe a samp",
    ),
    "within a feature": (
        features(
            lambda all, parts: parts.update(
                x={
                    "pythonClassName": f"{CORE}.sequence_feature.Sequence",
                    "sequence": {"feature": MODULE},
                }
            )
        ),
        rf"feature 'x' is of '{CORE}\.sequence_feature\.Seq",
    ),
    "beside a feature": (
        features(lambda all, parts: parts["id"].update(python_class_name="marked_module.F")),
        "feature 'id' is of",
    ),
    "under another name": (
        features(lambda all, parts: parts["id"].update(jsonFeature={"json": "{}"})),
        "feature 'id' is of",
    ),
    "a name of a file": (
        features(lambda all, parts: parts.update({"../../label": parts["label"]})),
        "feature '../../label' is of",
    ),
    "a module of the data": (
        info(lambda content: content.update(moduleName="marked_module")),
        None,
    ),
    "a file outside": (
        info(template("../../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")),
        "its split 'train' lies outside of it|cannot be read",
    ),
    "a file anywhere": (
        info(template("/etc/{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}")),
        "its split 'train' lies outside of it|cannot be read",
    ),
    "other images": (
        features(
            lambda all, parts: parts["image"]["image"].update(
                shape={"dimensions": ["100000", "100000", "3"]}
            )
        ),
        r"has images \(100000, 100000, 3\) of 10 classes, but those of cifar10 are",
    ),
    "classes without end": (
        lambda folder: [
            (folder / "label.labels.txt").unlink(),
            features(
                lambda all, parts: parts["label"]["classLabel"].update(numClasses="100000000")
            )(folder),
        ],
        "there are 100000000 classes, more than the 100000 there may be",
    ),
    "deep": (
        lambda folder: (folder / "features.json").write_text("[" * 100_000),
        "cannot be read .*; delete that folder and prepare it again",
    ),
}


@pytest.mark.parametrize(("damage", "message"), HOSTILE.values(), ids=HOSTILE)
def test_no_module_is_imported_and_no_file_read_that_a_folder_names(
    tiny, tmp_path, monkeypatch, damage, message
):
    (tmp_path / "marked_module.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    damage(tiny)
    if message is None:
        read(tiny)
    else:
        with pytest.raises(InputError, match=message):
            read(tiny)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["features.json", "label.labels.txt", "dataset_info.json"])
def test_pipes_in_a_folder_are_not_waited_for(tiny, name):
    (tiny / name).unlink()
    os.mkfifo(tiny / name)
    with pytest.raises(InputError, match=f"{name} is no regular file"):
        read(tiny)


def test_the_home_of_an_unknown_user_is_no_folder():
    with pytest.raises(InputError, match=r"cifar10: ~nobody_of_that_name/x: .*give the whole path"):
        load_cifar10(dir="~nobody_of_that_name/x")
