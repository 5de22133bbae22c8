import os
import shutil

import numpy as np
import pytest
from PIL import Image

from moth_jax.data.sources.gtsrb import CLASS_NAMES, load_gtsrb, read_official
from moth_jax.errors import InputError

OFFICIAL = "data/gtsrb/official"
HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"


@pytest.fixture(scope="module")
def from_npz(shared):
    return load_gtsrb(dir=str(shared / "data/gtsrb"))


@pytest.fixture
def official(shared, tmp_path):
    """A small, complete folder in the official layout: track 3 of each class is its test image."""
    source = shared / OFFICIAL / "GTSRB/Final_Training/Images"
    root = tmp_path / "GTSRB"
    shutil.copytree(source, root / "Final_Training/Images", copy_function=shutil.copyfile)
    for folder in (root / "Final_Training/Images").iterdir():
        folder.chmod(0o755)
    test = root / "Final_Test/Images"
    test.mkdir(parents=True)
    rows = []
    for k in range(43):
        shutil.copyfile(source / f"{k:05d}/00003_00005.ppm", test / f"{k:05d}.ppm")
        rows.append(f"{k:05d}.ppm;53;54;6;5;48;49;{k}\n")
    (tmp_path / "GT-final_test.csv").write_text(HEADER + "".join(rows))
    return tmp_path


def test_the_npz_file_gives_all_43_classes(from_npz):
    assert from_npz.num_classes == 43
    assert from_npz.image_shape == (32, 32, 3)
    assert len(from_npz.train) + len(from_npz.validation) == 13070
    assert len(from_npz.test) == 6315
    assert not from_npz.flip
    assert from_npz.shift == 3


def test_the_npz_file_itself_can_be_given_and_gives_the_same(shared, from_npz):
    direct = load_gtsrb(dir=str(shared / "data/gtsrb/gtsrb32.npz"))
    assert (direct.validation.labels == from_npz.validation.labels).all()


def test_validation_shares_no_track_with_training(shared, from_npz):
    arrays = np.load(shared / "data/gtsrb/gtsrb32.npz")
    tracks = arrays["y_train"].astype(int) * 1000 + arrays["track_train"]
    # Where an image is in the file, found by its bytes; copies of an image lie within one track.
    place = {image.tobytes(): i for i, image in enumerate(arrays["x_train"])}
    train = {tracks[place[image.tobytes()]] for image in from_npz.train.images}
    validation = {tracks[place[image.tobytes()]] for image in from_npz.validation.images}
    assert not train & validation
    assert train | validation == set(tracks)
    assert 0.08 < len(from_npz.validation) / 13070 < 0.13


def test_the_official_layout_is_read_as_the_npz_file_was_made(shared):
    arrays = read_official(shared / OFFICIAL)
    assert arrays.x_train.shape == (172, 32, 32, 3)
    assert arrays.y_train.tolist() == sorted(list(range(43)) * 4)
    assert arrays.track_train.tolist() == [0, 1, 2, 3] * 43
    assert arrays.x_test.shape == (86, 32, 32, 3)
    every_second = np.load(shared / "data/gtsrb/gtsrb32.npz")
    assert (arrays.x_test[::2] == every_second["x_test"][:43]).all()
    assert (arrays.y_test[::2] == every_second["y_test"][:43]).all()


def test_another_size_can_be_asked_of_the_official_layout(official):
    dataset = load_gtsrb(dir=str(official), size=24, validation_fraction=0.25)
    assert dataset.image_shape == (24, 24, 3)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (129, 43, 43)
    assert dataset.class_names == CLASS_NAMES
    assert load_gtsrb(dir=str(official / "GTSRB"), size=24).image_shape == (24, 24, 3)


def test_classes_the_sample_has_no_test_images_of_are_named(shared):
    with pytest.raises(
        InputError, match=r"gtsrb test: no samples of 14 of 43 classes: 'speed limit 20 km/h'"
    ):
        load_gtsrb(dir=str(shared / OFFICIAL))


def test_there_are_43_distinct_names():
    assert len(set(CLASS_NAMES)) == 43
    assert CLASS_NAMES[14] == "stop"
    assert CLASS_NAMES[38] == "keep right"


def write(path, text):
    return lambda root: (root / path).write_text(text)


TEST_LIST, TRAINING = "GT-final_test.csv", "GTSRB/Final_Training/Images"
IMAGE, TRACKS = f"{TRAINING}/00007/00001_00005.ppm", f"{TRAINING}/00007/GT-00007.csv"
ROW = "00000.ppm;53;54;6;5;48;49;"
DAMAGE = {
    "no training folder": (
        lambda root: shutil.rmtree(root / TRAINING),
        "no GTSRB/Final_Training/Images in .*get GTSRB",
    ),
    "no test list": (lambda root: (root / TEST_LIST).unlink(), r"no GT-final_test\.csv in"),
    "image removed": (lambda root: (root / IMAGE).unlink(), "00001_00005.ppm cannot be read"),
    "image cut short": (write(IMAGE, "P6\n40 40\n255\nabc"), "00001_00005.ppm cannot be read"),
    "no image": (write(IMAGE, "<html>"), "cannot be read"),
    "no classes in the test list": (
        write(TEST_LIST, "Filename;Width\n00000.ppm;53\n"),
        r"GT-final_test\.csv: row 1 .*ClassId",
    ),
    "another separator": (
        write(TEST_LIST, "Filename,ClassId\n00000.ppm,3\n"),
        "separated by semicolons",
    ),
    "list cut short": (
        write(TEST_LIST, f"{HEADER}{ROW}3\n00001.p"),
        "row 2 has no file name and class number",
    ),
    "another class": (write(TEST_LIST, f"{HEADER}{ROW}43\n"), r"in \[0, 43\), got 43"),
    "another name": (write(TRACKS, f"{HEADER}a.ppm;5;5;6;5;4;4;7\n"), r"TRACK_FRAME\.ppm"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_faulty_official_folder_is_refused_by_the_file(official, damage, message):
    damage(official)
    with pytest.raises(InputError, match=message):
        load_gtsrb(dir=str(official), size=16, validation_fraction=0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros([4, 16, 16, 3], np.uint8)}, "x_train .*size=8.*got .4, 16, 16, 3"),
        ({"track_train": np.zeros(3, int)}, "track_train .* must hold an integer per training"),
        ({"track_train": np.zeros(4)}, "got float64"),
        ({"y_train": np.array([0, 1, 2, 43])}, r"y_train .*in \[0, 43\), got 43"),
        ({"y_test": np.array(["a", "b", "c", "d"])}, "y_test .* must be integers"),
        ({"track_train": None}, "missing arrays 'track_train'"),
    ],
)
def test_a_faulty_npz_file_is_refused(tmp_path, changes, message):
    images, labels = np.full([4, 8, 8, 3], 7, np.uint8), np.arange(4)
    arrays = dict.fromkeys(("x_train", "x_test"), images)
    arrays |= dict.fromkeys(("y_train", "y_test", "track_train"), labels)
    arrays = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(tmp_path / "gtsrb8.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_gtsrb(dir=str(tmp_path), size=8)


@pytest.fixture
def small(tmp_path):
    """The official layout with 2 images of class 0, which is read up to the checks of the data."""
    images = tmp_path / TRAINING / "00000"
    images.mkdir(parents=True)
    (tmp_path / "GTSRB/Final_Test/Images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, [20, 18, 3], np.uint8)
    for name in (*images_of(images), tmp_path / "GTSRB/Final_Test/Images/00000.ppm"):
        Image.fromarray(pixels).save(name)
    write_list(images / "GT-00000.csv", "00000_00000.ppm", "00000_00001.ppm")
    write_list(tmp_path / TEST_LIST, "00000.ppm")
    return tmp_path


def images_of(folder):
    return [folder / f"00000_0000{i}.ppm" for i in range(2)]


def write_list(path, *names, label=0):
    rows = "".join(f"{name};53;54;6;5;48;49;{label}\n" for name in names)
    path.write_text(HEADER + rows)


def test_frames_are_resized_as_pillow_does(small):
    arrays = read_official(small, 8)
    with Image.open(images_of(small / TRAINING / "00000")[0]) as image:
        expected = np.asarray(image.resize((8, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(arrays.x_train, [expected, expected])


NAMES_OUTSIDE = ["../secret.ppm", "{}/secret.ppm", "..", "a/b.ppm", "..\\secret.ppm", "", "./x.ppm"]
NAMES_OUTSIDE += ["C:\\secret.ppm"]


@pytest.mark.parametrize("name", NAMES_OUTSIDE)
def test_no_name_in_a_list_leads_out_of_its_folder(small, name):
    Image.new("RGB", (8, 8)).save(small / "secret.ppm")
    write_list(small / TEST_LIST, name.format(small))
    with pytest.raises(InputError, match=r"GT-final_test\.csv: row 1: .* is no name of a file in"):
        read_official(small, 8)


@pytest.mark.parametrize("name", ["00000.ppm\0", "\0", "C:secret.ppm"])
def test_a_name_that_no_file_can_have_is_refused_by_its_row(small, name):
    write_list(small / TEST_LIST, name)
    with pytest.raises(InputError, match=r"^[^\n]*GT-final_test\.csv: row 1|^[^\n]*cannot be read"):
        read_official(small, 8)


def test_no_link_leads_out_of_its_folder(small):
    image = small / "GTSRB/Final_Test/Images/00000.ppm"
    image.rename(small / "secret.ppm")
    image.symlink_to(small / "secret.ppm")
    with pytest.raises(InputError, match=r"row 1: '00000\.ppm' is a link that leads out of"):
        read_official(small, 8)


def test_each_image_is_listed_once_and_of_a_class_that_there_is(small):
    write_list(small / TEST_LIST, "00000.ppm", "00000.ppm")
    with pytest.raises(InputError, match=r"row 2: '00000\.ppm' is there twice"):
        read_official(small, 8)
    for label in (10**30, -1):
        write_list(small / TEST_LIST, "00000.ppm", label=label)
        with pytest.raises(
            InputError, match=rf"row 1: the class must be in \[0, 43\), got {label}"
        ):
            read_official(small, 8)


@pytest.mark.parametrize("name", ["999999_00001.ppm", "-1_00001.ppm", "٣_00001.ppm", "x_1.ppm"])
def test_a_track_has_a_number_of_at_most_five_digits(small, name):
    folder = small / TRAINING / "00000"
    images_of(folder)[0].rename(folder / name)
    write_list(folder / "GT-00000.csv", name)
    with pytest.raises(InputError, match=r"TRACK_FRAME\.ppm"):
        read_official(small, 8)


def test_what_starts_another_program_is_no_image(small):
    image = images_of(small / TRAINING / "00000")[0]
    image.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) print\n%%EOF\n")
    with pytest.raises(InputError, match=r"00000_00000\.ppm cannot be read .no JPEG, PNG"):
        read_official(small, 8)


@pytest.mark.parametrize("path", [TEST_LIST, f"{TRAINING}/00000/00000_00001.ppm"])
def test_pipes_are_not_waited_for(small, path):
    (small / path).unlink()
    os.mkfifo(small / path)
    with pytest.raises(InputError, match=r"no GT-final_test|no regular file"):
        read_official(small, 8)


@pytest.mark.parametrize("size", [0, -3, 10**9])
def test_a_size_that_makes_no_sense_is_refused(small, size):
    with pytest.raises(InputError, match=f"image_size must be 1 to 8192 pixels, got {size}"):
        load_gtsrb(dir=str(small), size=size)
