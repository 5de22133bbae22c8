"""Which set of weights is taken from a file of several, and which accuracy the file says it has."""

import warnings

import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.models.weights import sets
from moth_jax.models.weights.sets import choose, claimed_accuracy


def weights(value=0.0, prefix="", **more):
    arrays = {"conv.weight": np.full((2, 3), value), "fc.weight": np.full((4, 2), value)}
    return {f"{prefix}{name}": array for name, array in arrays.items()} | more


@pytest.mark.parametrize(
    ("content", "taken", "others"),
    [
        ({"model_ema": weights(1), "model": weights()}, "model", ["model_ema"]),
        ({"state_dict_ema": weights(1), "state_dict": weights()}, "state_dict", ["state_dict_ema"]),
        ({"model": weights(1), "net": weights()}, "model", ["net"]),
        ({"best_model": weights(1), "model": weights()}, "model", ["best_model"]),
        ({"ema": {"module": weights(1)}, "net": weights()}, "net", ["ema.module"]),
        (
            {"state_dict": weights(), "swa": weights(1, "module.", n_averaged=np.array(3))},
            "state_dict",
            ["swa"],
        ),
        ({"state_dict": weights(0, "model.") | weights(1, "ema_model.")}, "state_dict.model", None),
        (weights(0, "teacher.") | weights(1, "student."), "student", ["teacher"]),
        ({"epoch1": weights(), "epoch2": weights(1)}, "epoch1", ["epoch2"]),
        # One set alone
        ({"model": weights(), "optimizer": {"state": {0: weights()}}}, "model", []),
        ({"net": weights(), "pattern": {"mask": np.zeros((2, 2))}}, "net", []),
        ({"model": {"net": weights(), "mask": np.zeros(2)}}, "model.net", []),
        (weights(), "", []),
        ({"classifier": weights()}, "classifier", []),
        ({"block1.weight": np.zeros(2), "block2.weight": np.zeros(2)}, "", []),
    ],
)
def test_the_usual_set_is_taken_and_those_that_fit_in_its_place_are_named(content, taken, others):
    chosen = choose(content, "", "w.pt")
    assert chosen.name == taken
    assert list(chosen.others) == (["state_dict.ema_model"] if others is None else others)
    if others:
        says = sets.describe_choice("w.pt", chosen)
        assert f"{taken} was taken, not {others[0]}; choose with --weights={others[0]} (m" in says


@pytest.mark.parametrize("name", ["model_ema", "state.b", "state.a.ema", "deep", "state.a"])
def test_any_set_can_be_chosen_by_its_name(name):
    content = {
        "model": weights(),
        "model_ema": weights(1),
        "state": {"b": weights(1), "a": weights(2, "net.") | weights(1, "ema.")},
        "deep": weights(1, "a.b."),
    }
    arrays = choose(content, name, "w.pt").arrays
    assert next(reversed(arrays.values())).max() == 1
    with pytest.raises(InputError, match=r"w\.pt has no weights 'mine'; it has 'model', 'model_e"):
        choose(content, "mine", "w.pt")


def test_sets_that_are_unlike_each_other_are_not_guessed_among():
    content = {"generator": {"w": np.zeros((3, 3))}, "critic": weights()}
    with pytest.raises(InputError, match=r"several sets of arrays, 'generator', 'critic'; say whi"):
        choose(content, "", "w.pt")


def test_a_prefix_of_names_is_a_set_in_a_flat_file():
    content = weights(1, "a.net.") | weights(2, "b.net.")
    assert choose(content, "b.net", "w.pt").arrays["fc.weight"].max() == 2


@pytest.mark.parametrize(
    ("content", "share"),
    [
        ({"acc": 0.687}, 0.687),
        ({"best_acc1": 68.7}, 0.687),
        ({"best_acc1": np.array(68.7)}, 0.687),
        ({"val_accuracy": "0.687"}, 0.687),
        ({"best_prec1": 91.78}, 0.9178),
        ({"best_clean_acc": 85.91, "best_bad_acc": 98.73}, 0.8591),  # of a poisoned model
        ({"metrics": {"val/acc@1": 70.0, "val/acc@5": 95.0}}, 0.7),
        ({"valAcc": 93.0, "train_acc": 99.0, "epoch": 60}, 0.93),
        ({"test-accuracy": 0.9, "best accuracy": 0.95}, 0.9),
        ({"top1": 1.0}, 1.0),
        ({"top5": 95.0, "acc5": 95.0, "acc": 0.0, "robust_acc": 40.0, "accumulate": 2}, None),
        ({"acc": [0.1, 0.9], "accuracy": True, "precision": float("nan"), "Acc": None}, None),
        ({"acc": 1e9, "accuracy": -3, "epoch": 12, "arch": "acc"}, None),
        ([0.9], None),
        (None, None),
    ],
)
def test_an_accuracy_is_read_by_its_name_as_a_fraction_or_a_percentage(content, share):
    claim = claimed_accuracy(content)
    assert claim is None if share is None else claim.share == pytest.approx(share)


def test_the_published_checkpoints_have_one_set_and_their_accuracy(shared):
    pytest.importorskip("torch")
    from moth_jax.models.weights.files import read_file

    claims = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in sorted((shared / "checkpoints").glob("*.t*")):
            claims[path.name[:16]] = read_file(path).claim
    assert {name: round(100 * claim.share, 2) for name, claim in claims.items()} == {
        "akamaster_resnet": 92.78,
        "wrn16_1_cifar10_": 82.33,
    }
