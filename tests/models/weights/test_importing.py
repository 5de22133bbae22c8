import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from moth_jax import models
from moth_jax.errors import InputError
from moth_jax.models import ModelSpec
from moth_jax.models.weights import importing
from moth_jax.models.weights.importing import (
    LAYOUTS,
    export_weights,
    identify,
    import_weights,
    read_weights,
)
from moth_jax.models.weights.name_maps import Entry

AKAMASTER = "akamaster_resnet20-12fca82f.th"
KERAS = "moth_cifar10_resnet20_nat.h5"
SHAPE = {"image_shape": (32, 32, 3), "mean": (0.5,) * 3, "std": (0.2,) * 3}


def their_shapes(arch, num_classes=10):
    _, ours = models.outline(ModelSpec(arch, num_classes, **SHAPE))
    entries = LAYOUTS[arch].entries
    return {e.theirs: e.their_shape(ours[e.kind][e.ours].shape) for e in entries}


def weights_like(arch, num_classes=10):
    """Random weights named and shaped as the layout of `arch` has them."""
    rng = np.random.default_rng(5)
    shapes = their_shapes(arch, num_classes)
    return {name: rng.random(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def resnet20():
    return weights_like("resnet20")


@pytest.fixture
def saved(tmp_path, resnet20):
    path = tmp_path / "weights.safetensors"
    save_file(resnet20, path)
    return path


# Published checkpoints


@pytest.mark.parametrize(
    ("file", "arch", "correct"), [(AKAMASTER, "resnet20", 932), (KERAS, "preact_resnet20", 935)]
)
def test_published_checkpoints_keep_their_accuracy(shared, cifar10_test, file, arch, correct):
    if file == AKAMASTER:
        pytest.importorskip("torch")
    images, labels = cifar10_test
    assert len(labels) == 1017
    classifier, variables = importing.load(shared / "checkpoints" / file)
    logits = jax.jit(classifier.predict)(variables, images)
    assert int((np.argmax(logits, 1) == labels).sum()) == correct  # 91.64 % and 91.94 %
    assert classifier.spec.arch == arch
    assert classifier.spec.num_classes == 10


def test_a_deeper_resnet_is_recognised(shared):
    pytest.importorskip("torch")
    weights = read_weights(shared / "checkpoints" / "akamaster_resnet32-d509ac18.th")
    assert identify(weights) == ("resnet32", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_authors_weights_come_with_their_normalisation(shared):
    arch, mean, std = identify(read_weights(shared / "checkpoints" / KERAS))
    assert arch == "preact_resnet20"
    np.testing.assert_allclose(np.multiply(mean, 255), (125.307, 122.950, 113.865))
    np.testing.assert_allclose(np.multiply(std, 255), (62.9932, 62.0887, 66.7048))


def test_keras_layers_are_numbered_from_one_whatever_came_before(shared, tmp_path):
    h5py = pytest.importorskip("h5py")
    original = read_weights(shared / "checkpoints" / KERAS)
    with h5py.File(tmp_path / "later.h5", "w") as file:  # as save_weights of a second model writes
        for name, array in original.items():
            layer, weight = name.split("/")
            kind, number = layer.rsplit("_", 1)
            file[f"{kind}_{int(number) + 21}/{kind}_{int(number) + 21}/{weight}:0"] = array
    again = read_weights(tmp_path / "later.h5")
    assert set(again) == set(original)
    assert all(np.array_equal(again[name], original[name]) for name in original)


# What is understood


@pytest.mark.parametrize("arch", sorted(LAYOUTS))
def test_name_tables_cover_every_array_exactly_once(arch):
    _, variables = models.outline(ModelSpec(arch, 10, **SHAPE))
    entries = LAYOUTS[arch].entries
    assert len({entry.theirs for entry in entries}) == len(entries)
    ours = sorted((entry.kind, entry.ours) for entry in entries)
    assert ours == sorted((kind, name) for kind in variables for name in variables[kind])


@pytest.mark.parametrize(
    "arch", ["resnet20", "preact_resnet20", "wrn16_1", "resnet18", "lisa_cnn", "nin"]
)
def test_weights_survive_the_way_in_and_out(arch):
    weights = weights_like(arch)
    classifier, shapes = models.outline(ModelSpec(arch, 10, **SHAPE))
    exported = export_weights(classifier.spec, import_weights(classifier.spec, shapes, weights))
    counters = [name for name in exported if name.endswith("num_batches_tracked")]
    assert len(counters) == sum(name.endswith("running_var") for name in weights)
    assert all(exported[name].dtype == np.int64 and exported[name] == 0 for name in counters)
    assert set(exported) == {*weights, *counters}
    for name, array in weights.items():
        assert exported[name].dtype == np.float32
        assert exported[name].flags.c_contiguous
        assert np.array_equal(exported[name], array)


def test_a_dense_layer_that_reads_an_image_gets_its_inputs_in_our_order():
    entry = Entry("params", "head.kernel", "fc.weight", channels=2)
    image = np.arange(12).reshape(2, 2, 3)  # [c h w], as PyTorch flattens it
    theirs = np.stack([image.ravel(), image.ravel() + 100])
    ours = entry.to_ours(theirs)
    assert ours[:, 1].tolist() == (image.transpose(1, 2, 0).ravel() + 100).tolist()
    assert np.array_equal(entry.to_theirs(ours), theirs)
    assert entry.their_shape(ours.shape) == theirs.shape


def test_variables_of_another_model_are_not_exported():
    _, variables = models.outline(ModelSpec("lisa_cnn", 4, **SHAPE))
    spec = ModelSpec("nin", 4, **SHAPE)
    with pytest.raises(InputError, match=r"not of nin: .*missing: params convs.3.kernel"):
        export_weights(spec, variables)
    spec = ModelSpec("small_cnn", 4, **SHAPE)
    with pytest.raises(
        InputError, match=r"small_cnn is .* without an original .*; write \.stablehlo"
    ):
        export_weights(spec, variables)


@pytest.mark.parametrize(
    "arch", ["resnet18", "resnet18_cifar", "resnet34", "resnet50", "wide_resnet50_2"]
)
def test_resnets_of_the_same_names_are_told_apart_by_shapes_even_with_a_fault(arch):
    weights = {name: np.zeros(shape) for name, shape in their_shapes(arch).items()}
    assert identify(weights)[0] == arch
    weights["layer2.0.conv2.weight"] = np.zeros((1, 1))
    del weights["layer1.1.bn1.bias"]
    assert identify(weights)[0] == arch


def test_images_are_of_the_size_the_source_was_trained_on_unless_given(tmp_path):
    save_file(weights_like("resnet18"), tmp_path / "w.safetensors")
    classifier, _ = importing.load(tmp_path / "w.safetensors")
    assert (classifier.spec.arch, classifier.spec.image_shape) == ("resnet18", (224, 224, 3))
    classifier, _ = importing.load(tmp_path / "w.safetensors", image_shape=(64, 48, 3))
    assert classifier.spec.image_shape == (64, 48, 3)
    save_file(weights_like("resnet20"), tmp_path / "w.safetensors")
    assert importing.load(tmp_path / "w.safetensors")[0].spec.image_shape == (32, 32, 3)


def test_a_safetensors_file_is_read_without_torch(saved, resnet20, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    weights = read_weights(saved)
    assert all(np.array_equal(weights[name], resnet20[name]) for name in resnet20)
    classifier, _ = importing.load(saved, class_names=tuple("abcdefghij"))
    assert classifier.spec.class_names[9] == "j"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_become_float32(tmp_path, resnet20, dtype):
    kind = getattr(jnp, dtype) if dtype == "bfloat16" else dtype
    save_file({k: v.astype(kind) for k, v in resnet20.items()}, tmp_path / "w.safetensors")
    _, variables = importing.load(tmp_path / "w.safetensors")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    np.testing.assert_allclose(
        variables["params"]["head.kernel"].T, resnet20["linear.weight"], rtol=1e-2, atol=1e-4
    )


def nested(weights, key):
    return {key: weights, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: nested(w, "state_dict"),
        lambda w: nested(nested(w, "model_state_dict"), "model"),
        lambda w: {f"module.{name}": value for name, value in w.items()},
        lambda w: {name: value.bfloat16() for name, value in w.items()},
        lambda w: {name: value.half() for name, value in w.items()},
        lambda w: {**w, "bn1.num_batches_tracked": w["linear.bias"].sum().long()},
    ],
    ids=["plain", "state_dict", "twice", "DataParallel", "bfloat16", "float16", "counters"],
)
def test_pytorch_files_are_understood_however_training_scripts_wrap_them(tmp_path, resnet20, wrap):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(array) for name, array in resnet20.items()}
    torch.save(wrap(tensors), tmp_path / "w.pt")
    classifier, variables = importing.load(tmp_path / "w.pt")
    assert classifier.spec.arch == "resnet20"
    want = resnet20["layer2.0.conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_allclose(variables["params"]["blocks.3.conv1.kernel"], want, 1e-2)


# What is said


def test_what_weights_do_not_show_is_said_when_they_are_recognised(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier, _ = importing.load(saved)
    assert classifier.reading.assumed == (
        "recognised as resnet20, PyTorch ResNet20 of akamaster/pytorch_resnet_cifar10; assumed, "
        "because weights do not show it: stride 2 at the second and third stage, shortcuts that "
        "take every second pixel and pad, ReLU, batch-norm epsilon 1e-5, images normalised with "
        "mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225)"
    )
    classifier, _ = importing.load(saved, arch="resnet20", mean=(0.5,) * 3, std=(0.2,) * 3)
    assert classifier.reading.assumed.startswith("taken as resnet20, ")
    assert "normalised" not in classifier.reading.assumed


@pytest.mark.parametrize("arch", sorted(LAYOUTS))
def test_every_layout_says_what_its_names_and_shapes_do_not_show(arch):
    assert LAYOUTS[arch].unseen


def test_a_network_that_is_as_common_and_looks_alike_is_warned_of(tmp_path):
    save_file(weights_like("resnet18_cifar"), tmp_path / "w.safetensors", metadata={"acc": "68.7"})
    says = (
        r"was taken for resnet18_cifar .* one that keeps the max-pooling .*; compare the accuracy"
    )
    with pytest.warns(UserWarning, match=says):
        classifier, _ = importing.load(tmp_path / "w.safetensors")
    assert classifier.reading.claim == ("acc", 0.687)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importing.load(tmp_path / "w.safetensors", arch="resnet18_cifar")


# What is refused


def test_weights_that_do_not_fit_are_all_named_in_one_message(resnet20):
    faulty = {**resnet20, "extra.weight": np.zeros(3), "another": np.zeros(2)}
    del faulty["bn1.bias"], faulty["layer1.0.conv1.weight"]
    faulty["layer3.2.bn2.weight"] = np.zeros(65)
    faulty["conv1.weight"] = np.zeros((16, 3, 3))
    classifier, shapes = models.outline(ModelSpec("resnet20", 10, **SHAPE))
    with pytest.raises(InputError) as caught:
        import_weights(classifier.spec, shapes, faulty)
    message = str(caught.value)
    assert "2 missing: bn1.bias, layer1.0.conv1.weight" in message
    assert "2 unused: extra.weight, another" in message
    assert "layer3.2.bn2.weight (65,), expected (64,)" in message
    assert "conv1.weight (16, 3, 3), expected (16, 3, 3, 3)" in message
    assert identify(faulty)[0] == "resnet20"


def test_weights_of_another_architecture_are_refused(saved):
    with pytest.raises(InputError, match=r"do not fit resnet32: .* missing"):
        importing.load(saved, arch="resnet32")
    with pytest.raises(InputError, match=r"'small_cnn'; choose one of: .*resnet20"):
        importing.load(saved, arch="small_cnn")


def test_unknown_weights_list_the_known_layouts(tmp_path):
    save_file({"features.0.weight": np.zeros((8, 3))}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"features.0.weight .*resnet20 \(PyTorch.*Keras"):
        importing.load(tmp_path / "w.safetensors")
