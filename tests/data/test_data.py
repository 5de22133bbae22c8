import numpy as np
import pytest

from moth_jax import data
from moth_jax.data.sources import digits
from moth_jax.errors import InputError


def test_an_unknown_data_set_is_answered_with_the_choices():
    with pytest.raises(
        InputError, match="unknown data set 'mnist'; choose one of: cifar10, digits, folder, gtsrb"
    ):
        data.load("mnist")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("digits", {"validation_fraction": "a"}, "validation_fraction must be a number, got 'a'"),
        ("npz", {"file": 3}, "file must be text, got 3"),
        ("gtsrb", {"dir": "here", "size": "32"}, "size must be a whole number, got '32'"),
        ("folder", {"dir": "here", "image_size": "a"}, "image_size must be .*, got 'a'"),
    ],
)
def test_an_option_of_another_type_is_refused_before_it_is_used(name, options, says):
    with pytest.raises(InputError, match=f"^{says}$"):
        data.load(name, **options)


@pytest.mark.parametrize("name", data.DATASETS)
def test_an_unknown_option_is_answered_with_the_choices(name):
    with pytest.raises(
        InputError, match=f"'{name}' has no option colour; its options are: .*validation_fraction"
    ):
        data.load(name, colour="red", seed=0)


@pytest.mark.parametrize(
    "name", ["cifar10", "folder", "gtsrb", "imagenet2012", "imagenette", "lisa", "svhn"]
)
@pytest.mark.parametrize("folder", ["/nowhere/at/all", "", None])
def test_a_missing_folder_is_answered_with_how_to_get_it(name, folder):
    with pytest.raises(InputError, match=r"(?s)(get|cut|prepare|give) .* as the option dir"):
        data.load(name, dir=folder)


def test_digits_are_exact_sixteenths_in_ten_classes():
    dataset = data.load("digits")
    assert dataset.image_shape == (8, 8, 1)
    assert dataset.class_names == tuple("0123456789")
    parts = (dataset.train, dataset.validation, dataset.test)
    assert sum(map(len, parts)) == 1797
    for part in parts:
        assert part.images.dtype == np.float32
        assert (part.images * 16 == np.round(part.images * 16)).all()
        assert part.images.max() == 1


def test_the_seed_changes_the_validation_digits_and_not_the_test_digits():
    first, second = digits.load_digits(seed=0), digits.load_digits(seed=1)
    assert (first.test.images == second.test.images).all()
    assert (first.validation.images != second.validation.images).any()
    assert len(digits.load_digits(validation_fraction=0.5).validation) == 719
