"""Weights under a foreign prefix, and with another head than the model's."""

import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax import models
from moth_jax.convert import convert
from moth_jax.errors import InputError
from moth_jax.models import ModelSpec, checkpoint
from moth_jax.models.loading import load_source
from moth_jax.models.weights.files import read_weights
from moth_jax.models.weights.fitting import fit, foreign_prefix, shared_prefix
from moth_jax.models.weights.importing import export_weights, identify, import_weights, load
from tests.helpers.builders import OPTIONS, module_of, torch, write_builder
from tests.helpers.torch_models import arrays

LISA = ModelSpec("lisa_cnn", 6, (32, 32, 3), mean=(0, 0, 0), std=(1, 1, 1))
PREFIXES = ["module.", "model.", "_orig_mod.", "net.backbone.", "module._orig_mod.model."]

from moth_jax.models.weights.torch_builders import (  # noqa: E402  (needs torch)
    built_with_weights,
    torchvision_module,
)


@pytest.fixture(scope="module")
def lisa():
    """Weights as a file of the LISA CNN has them."""
    rng = np.random.default_rng(3)
    shapes = models.outline(LISA)[1]
    return export_weights(LISA, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes))


@pytest.fixture
def save(tmp_path):
    """A function that writes weights as a PyTorch file."""

    def write(weights, name="weights.pt"):
        arrays = {key: np.asarray(value) for key, value in weights.items()}
        torch.save({key: torch.tensor(value) for key, value in arrays.items()}, tmp_path / name)
        return tmp_path / name

    return write


def prefixed(prefix, weights):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def headless(weights, head="fc."):
    return {name: value for name, value in weights.items() if not name.startswith(head)}


def equal(ours, weights):
    """Whether the body of our LISA CNN is that of `weights`."""
    kernel = weights["conv2.weight"].transpose(2, 3, 1, 0)
    return np.array_equal(ours["params"]["convs.1.kernel"], kernel)


# Prefixes


@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_of_a_known_layout_are_understood_below_any_prefix(lisa, save, prefix):
    weights = prefixed(prefix, lisa)
    assert identify(weights)[0] == "lisa_cnn"
    classifier, variables = load(save(weights))
    assert (classifier.spec.arch, classifier.spec.num_classes) == ("lisa_cnn", 6)
    assert equal(variables, lisa)
    assert equal(import_weights(LISA, variables, weights), lisa)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_of_a_module_of_ones_own_are_understood_below_any_prefix(tmp_path, prefix):
    weights = arrays(module_of())
    built = built_with_weights(write_builder(tmp_path), prefixed(prefix, weights))
    np.testing.assert_array_equal(arrays(built)["4.weight"], weights["4.weight"])


@pytest.mark.parametrize("above", ["", "module.", "net."])
def test_a_prefix_that_is_the_modules_own_stays(tmp_path, above):
    weights = arrays(module_of("Net"))
    built = built_with_weights(write_builder(tmp_path, "Net"), prefixed(above, weights))
    np.testing.assert_array_equal(arrays(built)["net.4.weight"], weights["net.4.weight"])


def test_a_prefix_that_does_not_help_is_named(tmp_path, lisa, save):
    weights = save({f"deep.inner.part{i}.weight": np.zeros(3, np.float32) for i in range(4)})
    with pytest.raises(InputError, match=r"not recognised: 4 .* of the prefix 'deep\.inner\.'; na"):
        load(weights)
    with pytest.raises(InputError, match=r"; all names of the file begin with 'deep\.inner\.'"):
        built_with_weights(write_builder(tmp_path), read_weights(weights))
    with pytest.raises(InputError, match=r"; all names of the model begin with 'net\.'"):
        built_with_weights(write_builder(tmp_path, "Net"), arrays(module_of()))


def test_what_lies_beside_the_prefix_is_named_as_it_is(lisa):
    weights = {**prefixed("module.", lisa), "extra": np.zeros(())}
    with pytest.raises(InputError) as caught:
        import_weights(LISA, models.outline(LISA)[1], weights)
    assert str(caught.value) == (
        "the weights do not fit lisa_cnn: 1 unused: extra (names without their prefix 'module.')"
    )


def test_no_prefix_goes_where_two_arrays_would_get_one_name():
    assert foreign_prefix(["a", "net.a", "net.b"], ["a", "b"]) == ""
    assert foreign_prefix(["net.a", "net.b"], ["a", "b"]) == "net."
    assert foreign_prefix(["features.0", "features.1"], ["features.0", "features.1", "fc"]) == ""
    assert shared_prefix([]) == ""


# Another head


def test_weights_of_another_number_of_classes_get_a_new_head_and_a_warning(lisa, save):
    weights = save(prefixed("module.", lisa))
    with pytest.warns(UserWarning, match="a head of 6 classes") as warned:
        classifier, variables = load_source(weights, num_classes=9)
    assert [str(warning.message) for warning in warned] == [
        "the weights have a head of 6 classes, lisa_cnn is to have 9; drawn anew: fc.weight, "
        "fc.bias; train the model before its numbers mean anything"
    ]
    assert classifier.spec.num_classes == 9
    assert equal(variables, lisa)
    fresh = models.build(classifier.spec)[1]["params"]["head.kernel"]
    np.testing.assert_array_equal(variables["params"]["head.kernel"], fresh)


def test_a_file_without_a_head_gets_one(lisa, save):
    weights = save(headless(lisa))
    with pytest.raises(InputError, match=r"2 missing: fc.weight, fc.bias; .* --num-classes \(num"):
        load_source(weights)
    with pytest.warns(UserWarning, match="weights have no head, lisa_cnn is to have 4; drawn anew"):
        classifier, variables = load_source(weights, num_classes=4)
    assert variables["params"]["head.kernel"].shape == (512, 4)
    assert equal(variables, lisa)
    assert classifier.spec.num_classes == 4


def test_only_the_arrays_that_do_not_fit_are_drawn(lisa, save):
    weights = save({name: value for name, value in lisa.items() if name != "fc.bias"})
    with pytest.warns(UserWarning, match="drawn anew: fc.bias;"):
        _, variables = load_source(weights, num_classes=6)
    np.testing.assert_array_equal(variables["params"]["head.bias"], np.zeros(6))
    assert np.isin(variables["params"]["head.kernel"], lisa["fc.weight"]).all()


def test_with_the_number_that_the_head_has_nothing_is_drawn_and_nothing_said(lisa, save, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, variables = load_source(save(lisa), num_classes=6)
        built_with_weights(write_builder(tmp_path), arrays(module_of()), num_classes=5)
    assert np.isin(variables["params"]["head.kernel"], lisa["fc.weight"]).all()


def test_a_head_does_not_excuse_other_faults(lisa, save):
    weights = save({**headless(lisa), "classifier.weight": np.zeros(3, np.float32)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"1 unused: classifier\.weight"):
            load_source(weights, num_classes=6)


def test_the_refusal_says_both_sizes_and_the_way_out(lisa, save, tmp_path):
    way_out = r"--num-classes={} \(num_classes in Python, model.fine_tune in a run\)"
    with pytest.raises(InputError, match="head has 6 classes, the model 2: " + way_out.format(2)):
        import_weights(ModelSpec(**{**vars(LISA), "num_classes": 2}), _outline(2), lisa)
    with pytest.raises(InputError, match=r"head has 6 classes, but 3 are named: .*num-classes=3"):
        load_source(save(lisa), class_names=("a", "b", "c"))
    builder, ten = write_builder(tmp_path), arrays(module_of(num_classes=10))
    with pytest.raises(InputError, match="head has 10 classes, the model 5: " + way_out.format(5)):
        built_with_weights(builder, ten)
    with pytest.raises(InputError, match="the model 5: --num-classes=5"):
        built_with_weights(builder, ten, num_classes=7)


def _outline(num_classes):
    return models.outline(ModelSpec(**{**vars(LISA), "num_classes": num_classes}))[1]


def test_the_number_of_classes_must_be_one(lisa, save):
    with pytest.raises(InputError, match="num_classes must be at least 2, got 0"):
        load_source(save(lisa), num_classes=0)


@pytest.mark.parametrize("kept", [True, False])
def test_the_module_of_a_builder_keeps_its_own_head(tmp_path, kept):
    weights = arrays(module_of(num_classes=10))
    given = weights if kept else headless(weights, "4.")
    builder = write_builder(tmp_path)

    def build():
        with pytest.warns(UserWarning, match=r"mine.py:build is to have 5; drawn anew: 4.weight, "):
            return arrays(built_with_weights(builder, given, num_classes=5))

    one, other = build(), build()
    assert len(one["4.weight"]) == len(one["4.bias"]) == 5
    np.testing.assert_array_equal(one["4.weight"], other["4.weight"])
    np.testing.assert_array_equal(one["0.weight"], weights["0.weight"])


def test_a_builder_of_another_number_of_classes_is_named(tmp_path, save):
    weights = save(module_of().state_dict())
    with pytest.raises(InputError, match=r"mine.py:build builds a model of 5 classes, not 7; cha"):
        load_source(weights, builder=write_builder(tmp_path), num_classes=7, **OPTIONS)


def test_a_classifier_of_torchvision_gets_a_new_head(save):
    from tests.helpers.torchvision_shim import torchvision

    weights = arrays(torchvision.models.squeezenet1_1(num_classes=7))
    given = prefixed("module.", weights)
    with pytest.warns(UserWarning, match=r"a head of 7 classes, squeezenet1_1 is to have 3; drawn"):
        built = arrays(torchvision_module("squeezenet1_1", given, num_classes=3))
    assert len(built["classifier.1.weight"]) == 3
    np.testing.assert_array_equal(built["features.0.weight"], weights["features.0.weight"])
    assert len(arrays(torchvision_module("squeezenet1_1", given))["classifier.1.weight"]) == 7
    options = {"arch": "squeezenet1_1", "image_shape": (40, 40, 3), "class_names": ("a", "b")}
    with pytest.raises(InputError, match="head has 7 classes, but 2 are named: --num-classes=2"):
        load_source(save(given), **options)


@pytest.mark.parametrize("has_auxiliary", [True, False])
def test_the_auxiliary_heads_of_googlenet_are_renewed_with_its_own(has_auxiliary):
    from tests.helpers.torchvision_shim import torchvision

    options = {"init_weights": False, "aux_logits": has_auxiliary}
    weights = arrays(torchvision.models.googlenet(num_classes=6, **options))
    with pytest.warns(UserWarning, match="a head of 6 classes, googlenet is to have 4") as warned:
        built = torchvision_module("googlenet", prefixed("model.", weights), num_classes=4)
    renewed = ["fc.weight", "fc.bias"]
    if has_auxiliary:
        renewed = [f"aux{k}.fc2.{part}" for k in (1, 2) for part in ("weight", "bias")] + renewed
    assert f"drawn anew: {', '.join(renewed)}; " in str(warned[0].message)
    assert all(len(arrays(built)[name]) == 4 for name in renewed)


def test_the_head_of_a_program_is_what_it_is(tmp_path):
    batch = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(module_of(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=batch)
    torch.export.save(program, tmp_path / "model.pt2")
    assert load_source(tmp_path / "model.pt2", num_classes=5, **OPTIONS)
    with pytest.raises(InputError, match="has a head of 5 classes that is part of a whole model"):
        load_source(tmp_path / "model.pt2", num_classes=3, **OPTIONS)


def test_a_checkpoint_of_ours_gets_a_new_head_and_a_converted_one_does_not(lisa, save, tmp_path):
    convert(save(lisa), tmp_path / "ours")
    with pytest.warns(UserWarning, match="head of 6 classes, lisa_cnn is to have 3; drawn anew"):
        convert(tmp_path / "ours", tmp_path / "three", num_classes=3)
    classifier, variables = checkpoint.load_model(tmp_path / "three")
    assert classifier.spec.num_classes == 3
    assert equal(variables, lisa)
    assert classifier.predict(variables, jnp.zeros((1, 32, 32, 3))).shape == (1, 3)

    builder = write_builder(tmp_path)
    convert(save(module_of().state_dict()), tmp_path / "converted", builder=builder, **OPTIONS)
    assert convert(tmp_path / "converted", tmp_path / "same.pt", num_classes=5)
    with pytest.raises(InputError, match=r"converted Sequential of 5 classes, .*num-classes=3"):
        convert(tmp_path / "converted", tmp_path / "other.pt", num_classes=3)
    with pytest.raises(InputError, match=r"is a checkpoint, .* leave out --arch, --mean"):
        convert(tmp_path / "ours", tmp_path / "x", arch="nin", mean=(0, 0, 0), class_names=())


# What files hold beside the weights


@pytest.mark.parametrize("name", ["criterion.weight", "loss_fn.pos_weight", "net.loss.center"])
def test_weights_of_a_loss_are_left_out_with_a_warning(lisa, save, name):
    with pytest.warns(UserWarning, match=f"left out, as weights of a loss, .*: {name}$"):
        _, variables = load_source(save({**lisa, name: np.ones(6, np.float32)}))
    np.testing.assert_array_equal(variables["params"]["head.bias"], lisa["fc.bias"])


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "module._orig_mod.", "model.net."])
def test_wrappers_and_the_counter_of_an_average_are_seen_through(lisa, save, wrap):
    averaged = {**prefixed(wrap, lisa), "n_averaged": np.array(7)}
    classifier, variables = load_source(save(averaged))
    assert classifier.spec.arch == "lisa_cnn"
    np.testing.assert_array_equal(variables["params"]["head.bias"], lisa["fc.bias"])


@pytest.mark.parametrize(
    ("names", "prefix", "scale"),
    [
        (("mu", "sigma"), "", 1),
        (("0.mean", "0.std"), "1.", 1),
        (("normalize.mean", "normalize.std"), "model.", 1),
        (("pixel_mean", "pixel_std"), "", 255),
    ],
)
def test_a_normalisation_in_the_model_is_named_with_its_numbers(lisa, save, names, prefix, scale):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.2)
    numbers = {
        name: np.array(values, np.float32).reshape(1, 3, 1, 1) * scale
        for name, values in zip(names, (mean, std), strict=True)
    }
    path = save({**numbers, **prefixed(prefix, lisa)})
    says = (
        rf"2 unused: {names[0]}, {names[1]}.*; {names[0]} and {names[1]} seem to normalise images "
        r"in the model: give --mean=0\.5,0\.4,0\.3 --std=0\.2,0\.25,0\.2 \(mean and std in Py"
    )
    with pytest.raises(InputError, match=says):
        load_source(path)
    with pytest.raises(InputError, match="seem to normalise images"):
        load_source(path, mean=(0.0,) * 3, std=(1.0,) * 3)
    classifier, variables = load_source(path, mean=mean, std=std)
    assert classifier.spec.mean == mean
    np.testing.assert_array_equal(variables["params"]["head.bias"], lisa["fc.bias"])


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, bool])
def test_integers_in_place_of_weights_are_refused(lisa, save, kind, tmp_path):
    path = save({**lisa, "conv2.weight": lisa["conv2.weight"].astype(kind)})
    with pytest.raises(InputError, match=r"lisa_cnn has floating-.*: conv2\.weight \("):
        load_source(path)


# Options that no model can have, before anything is read


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_classes": 10**12}, "up to 100,000 classes"),
        ({"mean": (float("nan"),) * 3}, "mean must be finite numbers"),
        ({"std": (0.0,) * 3}, r"std in \(0, 1\]"),
        ({"mean": ("x",)}, "mean must be numbers"),
        ({"image_shape": (999999999, 1, 3)}, "up to 67,108,864 pixels"),
        ({"image_shape": (8, 8, 3), "mean": (0.5,)}, r"one value per channel \(3\)"),
        ({"class_names": ("a", "a")}, "distinct"),
        ({"class_names": ("a", "")}, "not empty"),
        ({"weights": "ema", "trust": "torchvision"}, "read as a whole model; leave out weights"),
        ({"arch": "swin_t"}, "torchvision's swin_t cannot be converted"),
        ({"arch": "torchvision:maxvit_t"}, "torchvision's maxvit_t cannot be converted"),
        ({"arch": "resnet21"}, "torchvision has no classifier 'resnet21'"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_the_file_is_read(tmp_path, options, says):
    if "arch" in options:
        from tests.helpers import torchvision_shim  # noqa: F401
    (tmp_path / "w.pt").write_bytes(b"never read")
    with pytest.raises(InputError, match=says):
        load_source(tmp_path / "w.pt", **options)


def test_the_command_warns_in_one_line(lisa, save, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "moth_jax.convert", save(lisa), tmp_path / "out", "--num-classes=3"],
        capture_output=True,
        text=True,
        check=True,
    )
    written, assumed = done.stdout.splitlines()
    assert written == f"{tmp_path}/out: lisa_cnn, 3 classes, images 32x32x3"
    assert assumed == (
        f"{tmp_path}/weights.pt: recognised as lisa_cnn, PyTorch LisaCNN; assumed, because weights "
        "do not show it: strides 2, 2 and 1, no pooling, ReLU, images normalised with mean (0, 0, "
        "0) and std (1, 1, 1); compare the accuracy on your images"
    )
    assert done.stderr == (
        "moth_jax: warning: the weights have a head of 6 classes, lisa_cnn is to have 3; drawn "
        "anew: fc.weight, fc.bias; train the model before its numbers mean anything\n"
    )


def test_a_hidden_layer_of_another_width_is_not_taken_for_the_head():
    shapes = {"a.weight": (8, 3), "b.weight": (5, 8)}
    weights = {"a.weight": np.zeros((4, 3)), "b.weight": np.zeros((5, 4))}
    with pytest.raises(InputError) as caught:
        fit(weights, shapes, what="it", head={})
    assert "head" not in str(caught.value)
