import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from moth_jax import data
from moth_jax.data.decoding import decode_image, make_framing
from moth_jax.data.sources import imagenet
from moth_jax.errors import InputError

IMAGENETTE = {"n01440764": 0, "n02102040": 217, "n02979186": 482}
SMALL = {"image_size": 8, "resize": 9}
COUNT = 30


def jpeg(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, [12, 16, 3], np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def pictures(seed):
    for i in range(COUNT):
        yield i, {"image": io.BytesIO(jpeg(seed + i)), "label": i % 3}


def prepare(data_dir, splits=("train", "validation"), config="320px-v2", name="imagenette"):
    """Write pictures as TFDS does; picture i of split s is jpeg(1000 * s + i), of class i % 3."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.dataset_builders.AdhocBuilder, skip_registration=True):
        def _split_generators(self, dl_manager):
            return {split: pictures(1000 * s) for s, split in enumerate(splits)}

    Tiny(
        name=name,
        version="1.0.0",
        config=config,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=list(IMAGENETTE)),
            }
        ),
        split_datasets={},
        data_dir=data_dir,
        file_format="array_record",
    ).download_and_prepare()
    return data_dir


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moth_jax"


def load(data_dir, **options):
    return data.load("imagenette", dir=str(data_dir), **{**SMALL, **options})


def images(split):
    return split.batch(np.arange(len(split)))


def by_content(split):
    return {image.tobytes(): int(k) for image, k in zip(images(split), split.labels, strict=True)}


def expected(split, i):
    framing = make_framing(**SMALL)
    pixels = decode_image(io.BytesIO(jpeg(1000 * split + i)), framing, name="")
    return (pixels / np.float32(255)).astype(np.float32).tobytes()


def test_imagenette_has_the_numbers_of_its_classes_in_the_head_of_imagenet(prepared):
    dataset = load(prepared)
    assert "tensorflow" not in sys.modules
    assert (dataset.name, dataset.num_classes) == ("imagenette", 1000)
    assert dataset.present == tuple(IMAGENETTE.values())
    assert [dataset.class_names[k] for k in dataset.present] == list(IMAGENETTE)
    assert dataset.image_shape == (8, 8, 3)
    assert (dataset.flip, dataset.shift) == (True, 0)


def test_pictures_and_labels_are_those_that_were_prepared(prepared):
    dataset = load(prepared, in_memory_limit=0, validation_fraction=0.2)
    numbers = list(IMAGENETTE.values())
    train = {expected(0, i): numbers[i % 3] for i in range(COUNT)}
    held_out = {expected(1, i): numbers[i % 3] for i in range(COUNT)}
    assert by_content(dataset.train) == train
    assert by_content(dataset.validation) | by_content(dataset.test) == held_out
    assert (len(dataset.validation), len(dataset.test)) == (6, 24)


def test_no_seed_moves_an_image_into_another_part(prepared):
    first, other = load(prepared, seed=0), load(prepared, seed=1)
    np.testing.assert_array_equal(images(first.test), images(other.test))


def test_a_head_of_the_classes_alone_numbers_them_from_0(prepared):
    dataset = load(prepared, class_list="")
    assert dataset.class_names == tuple(IMAGENETTE)
    assert dataset.present == (0, 1, 2)


def test_a_list_without_the_synsets_is_refused(prepared):
    with pytest.raises(InputError, match=r"2 of the 3 classes of imagenette .*'n02102040', 'n0297"):
        load(prepared, class_list=("n01440764", "cat"))


def test_labels_are_read_once_and_again_when_what_was_kept_is_damaged(prepared, cache, monkeypatch):
    reads = []
    read = imagenet._read_labels
    monkeypatch.setattr(imagenet, "_read_labels", lambda records: reads.append(1) or read(records))
    first, second = load(prepared), load(prepared)
    assert len(reads) == 2  # of train and validation
    np.testing.assert_array_equal(first.train.labels, second.train.labels)
    kept = sorted(cache.iterdir())
    assert [path.name.split("_")[0] for path in kept] == ["train", "validation"]
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    np.testing.assert_array_equal(load(prepared).train.labels, first.train.labels)
    assert len(reads) == 3


def test_labels_are_read_where_nothing_can_be_kept(prepared, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load(prepared).present == tuple(IMAGENETTE.values())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("imagenette", {}, r"no VERSION/dataset_info\.json under .*imagenette/320px-v2; prepare"),
        ("imagenette", {"variant": "160px"}, r"tfds\.builder\('imagenette/160px', "),
        ("imagenet2012", {}, r"imagenet2012 is not prepared.*ILSVRC2012_img_train\.tar.*registers"),
    ],
)
def test_data_that_are_not_there_are_answered_with_how_to_prepare_them(
    tmp_path, monkeypatch, name, options, message
):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=message):
        data.load(name, dir=str(tmp_path), **options)


def test_an_unknown_variant_is_answered_with_the_choices(tmp_path):
    with pytest.raises(InputError, match="unknown variant '64px'; choose one of: 160px, 160px-v2"):
        load(tmp_path, variant="64px")


def test_imagenet_without_its_training_images_is_refused(tmp_path):
    prepare(tmp_path, splits=("validation",), config=None, name="imagenet2012")
    with pytest.raises(InputError, match=r"imagenet2012/1\.0\.0 has no split 'train'; prepare"):
        data.load("imagenet2012", dir=str(tmp_path))


def test_imagenet_is_read_as_imagenette_is(tmp_path):
    prepare(tmp_path, config=None, name="imagenet2012")
    dataset = data.load("imagenet2012", dir=str(tmp_path), **SMALL)
    assert (dataset.name, dataset.num_classes, len(dataset.train)) == ("imagenet2012", 1000, COUNT)


def test_a_record_that_is_no_image_is_named_when_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "jpeg", lambda seed: b"no image")
    prepare(tmp_path)
    with pytest.raises(
        InputError, match=r"60 of 60 images .*: record 0 of train in .*1\.0\.0 \(no"
    ):
        load(tmp_path)
    monkeypatch.setattr(imagenet, "build_dataset", lambda name, train, test, **options: train)
    streamed, *_ = load(tmp_path, in_memory_limit=0)
    with pytest.raises(InputError, match=r"record 3 of train in .* cannot be read"):
        streamed[[3]]


def test_a_damaged_file_is_answered_with_what_to_delete(tmp_path):
    prepare(tmp_path)
    (record,) = tmp_path.rglob("*train.array_record*")
    record.write_bytes(record.read_bytes()[: record.stat().st_size // 2])
    with pytest.raises(InputError, match=re.escape("delete that folder and prepare it again")):
        load(tmp_path)
