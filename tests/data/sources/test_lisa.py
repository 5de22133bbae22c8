import numpy as np
import pytest

from moth_jax.data.sources.lisa import load_lisa
from moth_jax.errors import InputError

NUM_CLASSES = 18


def part(n, seed):
    images = np.random.default_rng(seed).integers(0, 256, [n, 32, 32, 3], np.uint8)
    return images, np.arange(n) % NUM_CLASSES


def save(folder, pattern="{part}_{axis}", one_hot=False, scale=None, **parts):
    for name, (images, labels) in parts.items():
        images = images if scale is None else (images * scale).astype(np.float32)
        labels = np.eye(NUM_CLASSES)[labels] if one_hot else labels
        np.save(folder / f"{pattern.format(part=name, axis='x')}.npy", images)
        np.save(folder / f"{pattern.format(part=name, axis='y')}.npy", labels)


@pytest.fixture
def plain(tmp_path):
    save(tmp_path, train=part(72, 0), test=part(36, 1))
    return load_lisa(dir=str(tmp_path))


def test_the_arrays_give_18_classes_and_no_flip(plain):
    assert plain.num_classes == NUM_CLASSES
    assert plain.class_names[17] == "class 17"
    assert (len(plain.train), len(plain.validation), len(plain.test)) == (54, 18, 36)
    assert not plain.flip


@pytest.mark.parametrize("pattern", ["{part}_{axis}", "{axis}_{part}", "{axis}_{part} capital"])
@pytest.mark.parametrize(("scale", "pixel_max"), [(None, 1), (1 / 255, 1), (1, 255)])
@pytest.mark.parametrize("one_hot", [False, True])
def test_all_published_forms_give_the_same_data(
    plain, tmp_path_factory, pattern, scale, pixel_max, one_hot
):
    folder = tmp_path_factory.mktemp("lisa")
    pattern, _, capital = pattern.partition(" ")
    save(folder, pattern, one_hot, scale, train=part(72, 0), test=part(36, 1))
    if capital:
        for path in list(folder.iterdir()):
            path.rename(folder / path.name.capitalize())
    dataset = load_lisa(dir=str(folder), pixel_max=pixel_max)
    np.testing.assert_allclose(dataset.test.batch([5]), plain.test.batch([5]), atol=1e-7)
    np.testing.assert_array_equal(dataset.train.labels, plain.train.labels)


def test_validation_files_and_names_are_used_where_they_are(tmp_path):
    save(tmp_path, train=part(72, 0), test=part(36, 1), val=part(18, 2))
    names = tuple(f"sign {k}" for k in range(NUM_CLASSES))
    dataset = load_lisa(dir=str(tmp_path), class_names=names)
    assert (len(dataset.train), len(dataset.validation)) == (72, 18)
    assert dataset.class_names == names


def test_faulty_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no train_x\.npy and no train_y\.npy in .*cvrr"):
        load_lisa(dir=str(tmp_path))
    save(tmp_path, train=part(72, 0), test=part(36, 1), val=part(18, 2))
    np.save(tmp_path / "X_train.npy", part(72, 0)[0])
    with pytest.raises(InputError, match=r"X_train\.npy and train_x\.npy, which mean the same"):
        load_lisa(dir=str(tmp_path))
    (tmp_path / "X_train.npy").unlink()
    (tmp_path / "val_x.npy").unlink()
    with pytest.raises(InputError, match=r"no val_x\.npy in"):
        load_lisa(dir=str(tmp_path))


def test_faulty_files_are_refused(tmp_path):
    save(tmp_path, train=part(72, 0), test=part(36, 1))
    content = (tmp_path / "train_x.npy").read_bytes()
    (tmp_path / "train_x.npy").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cannot read .*train_x\.npy"):
        load_lisa(dir=str(tmp_path))
    np.save(tmp_path / "train_x.npy", np.empty(3, object))
    with pytest.raises(InputError, match=r"Object arrays.*running code"):
        load_lisa(dir=str(tmp_path))
    with (tmp_path / "train_x.npy").open("wb") as file:
        np.savez(file, a=np.zeros(2))
    with pytest.raises(InputError, match=r"cannot read .*magic string"):
        load_lisa(dir=str(tmp_path))
    save(tmp_path, scale=1, train=part(72, 0), test=part(36, 1))
    with pytest.raises(InputError, match=r"lisa train images must be in \[0, 1\], got 0 to 255"):
        load_lisa(dir=str(tmp_path))
