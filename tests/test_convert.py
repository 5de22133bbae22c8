"""python -m moth_jax.convert: in, out, and what it refuses."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.convert import convert, main
from moth_jax.errors import InputError
from moth_jax.models import checkpoint, create
from moth_jax.models.loading import load_source
from tests.helpers.builders import OPTIONS, module_of, torch, write_builder
from tests.helpers.runs import contents


@pytest.fixture
def built(tmp_path):
    """A Python file that builds a module, the module with weights, and their file."""
    module = module_of()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    return write_builder(tmp_path), module, tmp_path / "weights.pt"


def images():
    return np.random.default_rng(0).random((3, 8, 8, 3), np.float32)


def logits_of(module, mean=0.5, std=0.2):
    with torch.no_grad():
        x = (images().transpose(0, 3, 1, 2) - mean) / std
        return module(torch.tensor(x, dtype=torch.float32)).numpy()


def test_a_module_of_ones_own_goes_in_and_home_again_and_becomes_a_program(built, tmp_path):
    builder, module, weights = built
    expected = logits_of(module)
    folder = tmp_path / "checkpoint"
    said = convert(weights, folder, builder=builder, **OPTIONS)
    assert said == f"{folder}: Sequential, 5 classes, images 8x8x3"

    classifier, variables = checkpoint.load_model(folder)
    ours = jax.jit(classifier.predict)(variables, jnp.asarray(images()))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)

    for name in ("home.pt", "home.safetensors"):
        convert(folder, tmp_path / name)
        again = copy.deepcopy(module)
        torch.nn.init.zeros_(again[4].weight)
        again.load_state_dict(read(tmp_path / name), strict=True)
        np.testing.assert_array_equal(logits_of(again.eval()), expected)

    convert(folder, tmp_path / "served.stablehlo")
    program = """
import sys, jax, numpy as np
images = np.random.default_rng(0).random((3, 8, 8, 3), np.float32)
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.save(sys.argv[2], exported.call(images))
assert "moth_jax" not in sys.modules
"""
    arguments = [tmp_path / "served.stablehlo", tmp_path / "logits.npy"]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=1e-4, atol=1e-5)


def read(path):
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True)


def test_the_published_weights_come_home_as_they_were(shared, tmp_path):
    source = shared / "checkpoints" / "akamaster_resnet32-d509ac18.th"
    convert(source, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "home.pt")
    home = torch.load(tmp_path / "home.pt", weights_only=True)
    original = torch.load(source, "cpu", weights_only=True)["state_dict"]
    assert len(home) > len(original)  # the counters that the old file lacks
    for name, tensor in original.items():
        assert torch.equal(home[name.removeprefix("module.")], tensor), name


# What is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"builder": "nowhere.py:build"}, "there is no Python file nowhere.py"),
        ({"builder": "no_such_package:build"}, "cannot import no_such_package"),
        ({"builder": "build"}, "FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION"),
        ({"builder": "{}:nothing"}, "has no function 'nothing'"),
        ({"builder": "{}:number"}, "must return a torch.nn.Module, but returns a int"),
        ({"builder": "{}:build", "mean": None, "std": None}, "say how the model of"),
        ({"builder": "{}:build", "image_shape": (9, 9, 3)}, "cannot turn"),
        ({"trust": "everything"}, "unknown trust"),
        ({"arch": "no_such_net"}, "torchvision"),
        ({}, "weights not recognised"),
    ],
)
def test_what_does_not_fit_together_is_one_clear_fault(built, tmp_path, options, says):
    builder, _, weights = built
    file = builder.rpartition(":")[0]
    options = {k: v.format(file) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(InputError) as caught:
        convert(weights, tmp_path / "out", **{**OPTIONS, **options})
    assert says in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "def build(k): pass",
            r"^builder {}:build failed: TypeError: build\(\) missing 1 required",
        ),
        ("def build():\n    return {}['a']", "^builder {}:build failed: KeyError: 'a'$"),
        ("def build():\n    exit(3)", "^builder {}:build failed: SystemExit: 3$"),
        ("1 / 0", "^cannot import {}: ZeroDivisionError: division by zero$"),
        ("import no_such_package", "^cannot import {}: ModuleNotFoundError: No module named"),
        ("def build(:", "^cannot import {}: SyntaxError: "),
    ],
)
def test_a_builder_that_fails_is_one_clear_fault(built, tmp_path, source, says):
    file = tmp_path / "broken.py"
    file.write_text(source)
    with pytest.raises(InputError, match=says.format(file)):
        convert(built[2], tmp_path / "out", builder=f"{file}:build", **OPTIONS)


def test_weights_of_another_module_are_named_all_at_once(built, tmp_path):
    builder, module, weights = built
    state = module.state_dict()
    state["4.weight"] = torch.zeros(2, 2)
    state["surplus"] = torch.zeros(1)
    del state["0.bias"]
    torch.save(state, weights)
    with pytest.raises(InputError) as caught:
        convert(weights, tmp_path / "out", builder=builder, **OPTIONS)
    for part in ("1 missing: 0.bias", "1 unused: surplus", "4.weight (2, 2), expected (5, 144)"):
        assert part in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "trust", "says"),
    [
        ("page.pth", "torchvision", "is an HTML or XML page"),
        ("page.pt2", "nothing", "is an HTML or XML page"),
        ("jit.pt", "torchvision", "got a torchscript checkpoint"),
        ("jit.pt2", "nothing", "is refused: it contains"),
    ],
)
def test_what_is_no_model_is_refused_however_it_is_read(tmp_path, name, trust, says):
    if name.startswith("jit"):
        torch.jit.save(torch.jit.trace(module_of(), torch.zeros(1, 3, 8, 8)), tmp_path / name)
    else:
        (tmp_path / name).write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(InputError, match=says):
        convert(tmp_path / name, tmp_path / "out", trust=trust, **OPTIONS)


def test_a_kind_of_file_that_is_not_written_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match="DEST must be a folder"):
        convert(tmp_path / "nothing.pt", tmp_path / "model.onnx")


@pytest.fixture
def model(tmp_path):
    """The folder of a small model."""
    classifier, variables = create(
        "small_cnn", num_classes=3, image_shape=(8, 8, 3), mean=(0.5,) * 3, std=(0.2,) * 3
    )
    checkpoint.save_model(tmp_path / "small", classifier, variables)
    return tmp_path / "small"


@pytest.mark.parametrize(
    ("dest", "says"),
    [
        ("home", "is a folder that is no checkpoint of this package"),
        (".", "is a folder that SOURCE is in"),
        ("small", "is SOURCE itself"),
        ("home/notes", "is a file, and a checkpoint is a folder"),
        ("home/folder.stablehlo", r"is a folder, and \.stablehlo a file"),
    ],
)
def test_only_a_checkpoint_is_replaced_and_never_the_source(
    model, tmp_path, monkeypatch, capsys, dest, says
):
    (tmp_path / "home" / "folder.stablehlo").mkdir(parents=True)
    (tmp_path / "home" / "notes").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for overwrite in ([], ["--overwrite"]):
        with pytest.raises(SystemExit):
            main(["small", dest, *overwrite])
        assert re.match(rf"moth_jax: {dest} {says}.*; give another \w+\n$", capsys.readouterr().err)
        with pytest.raises(InputError, match=f"^{dest} {says}"):
            convert(Path("small"), Path(dest))
    assert contents(tmp_path) == before


def test_a_checkpoint_is_a_source_in_python_too(model):
    expected = checkpoint.load_model(model)
    classifier, variables = load_source(str(model))
    assert classifier.spec == expected.classifier.spec
    np.testing.assert_array_equal(
        variables["params"]["head.kernel"], expected.variables["params"]["head.kernel"]
    )
    says = r"small is a checkpoint, which says by itself what it is; leave out arch, mean$"
    with pytest.raises(InputError, match=says):
        load_source(model, arch="nin", mean=(0.5,) * 3)


def test_a_source_that_is_none_is_told_what_it_is(model, tmp_path):
    (tmp_path / "run").mkdir()
    model.rename(tmp_path / "run" / "hardened")
    (tmp_path / "other").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"x")
    for name, says in {
        "nothing": "^there is no {}$",
        "nothing.pt": "^there is no weights file at {}$",
        "nothing.pt2": "^there is no {}$",
        "run": "^{} is the folder of a run; give original or hardened in it$",
        "other": "^{} is no checkpoint of this package",
        "model.onnx": r"'model\.onnx': the extension must be one of .* \.pt2, .*folder$",
    }.items():
        path = tmp_path / name
        with pytest.raises(InputError, match=says.format(path)):
            load_source(path)


@pytest.mark.parametrize("name", ["home.pt", "home.pth", "home.safetensors"])
def test_a_model_without_an_original_elsewhere_becomes_a_program_but_no_weights(
    model, tmp_path, name
):
    says = r"^small_cnn is .* without an original in PyTorch .*; write \.stablehlo"
    with pytest.raises(InputError, match=says):
        convert(model, tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_model_of_keras_goes_home_as_safetensors_and_not_to_a_pytorch_module(tmp_path):
    spec = {"num_classes": 3, "image_shape": (32, 32, 3), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    classifier, variables = create("preact_resnet20", **spec)
    checkpoint.save_model(tmp_path / "keras", classifier, variables)
    for name in ("home.pt", "home.pth"):
        with pytest.raises(InputError, match=r"is the Keras .*, without an original in PyTorch"):
            convert(tmp_path / "keras", tmp_path / name)
        assert not (tmp_path / name).exists()
    convert(tmp_path / "keras", tmp_path / "home.safetensors")
    assert "conv2d_1/kernel" in read(tmp_path / "home.safetensors")
    _, again = load_source(tmp_path / "home.safetensors")
    for name, value in variables["params"].items():
        np.testing.assert_array_equal(again["params"][name], value)


def test_weights_in_a_checkpoint_are_not_replaced_by_their_own(built, model):
    builder, _, weights = built
    shutil.move(weights, model / "weights.pt")
    with pytest.raises(InputError, match="small is a folder that SOURCE is in"):
        convert(model / "weights.pt", model, builder=builder, **OPTIONS)
    assert (model / "weights.pt").exists()


def test_a_checkpoint_and_a_file_are_replaced_where_that_is_asked_for(model, tmp_path, capsys):
    for dest in (tmp_path / "again", tmp_path / "served.stablehlo"):
        for _ in range(2):
            main([str(model), str(dest), "--overwrite", "--num_classes=3"])
    assert capsys.readouterr().out.count(": small_cnn, 3 classes") == 4
    assert checkpoint.load_model(tmp_path / "again").classifier.spec.num_classes == 3


# The command line


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "moth_jax.convert", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_converts_and_says_what_it_wrote(built, tmp_path):
    builder, _, weights = built
    code, out, err = command(
        weights,
        tmp_path / "model",
        f"--builder={builder}",
        "--mean=0.5,0.5,0.5",
        "--std=0.2,0.2,0.2",
        "--image_shape=8,8,3",
        "--class_names=a,b,c,d,e",
    )
    assert (code, out) == (0, f"{tmp_path}/model: Sequential, 5 classes, images 8x8x3\n"), err
    code, out, err = command(weights, tmp_path / "model")
    assert (code, out) == (2, "")
    assert err == (
        f"moth_jax: {tmp_path}/model exists; give another DEST, or --overwrite to replace it\n"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["one"], "the following arguments are required: DEST"),
        (["nowhere.pt", "out"], "there is no nowhere.pt"),
        (["{weights}", "out", "--mean=a,b"], "argument --mean: must be numbers"),
        (["{weights}", "out", "--nonsense=1"], "unrecognized arguments: --nonsense=1"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(built, arguments, says):
    code, out, err = command(*[a.format(weights=built[2]) for a in arguments])
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("moth_jax: ")
    assert says in err


def test_files_have_the_rights_of_any_new_file_and_replace_others_whole(tmp_path):
    spec = {"num_classes": 3, "image_shape": (28, 28, 3), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    checkpoint.save_model(tmp_path / "model", *create("lisa_cnn", **spec))
    old = os.umask(0o027)
    try:
        for name in ("a.safetensors", "a.pt", "a.stablehlo"):
            convert(tmp_path / "model", tmp_path / name)
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o640, name
    finally:
        os.umask(old)
    assert len(list(tmp_path.iterdir())) == 4


def test_one_of_several_sets_of_weights_is_chosen_by_the_command(built, tmp_path, capsys):
    builder, module, weights = built
    state = module.state_dict()
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"model": state, "model_ema": other, "best_acc1": 68.7}, weights)
    given = [str(weights), str(tmp_path / "model"), f"--builder={builder}", "--overwrite"]
    given += ["--mean=0.5,0.5,0.5", "--std=0.2,0.2,0.2", "--image_shape=8,8,3"]
    main(given)
    said = (
        f"{weights}: the file says that best_acc1 is 68.70 %; compare the accuracy on your images"
    )
    shown = capsys.readouterr()
    assert said in shown.out
    assert "model was taken, not model_ema; choose with --weights=model_ema (mod" in shown.err
    main([*given, "--weights=model_ema"])
    assert not checkpoint.load_model(tmp_path / "model").variables["params"]["4.weight"].any()
    with pytest.raises(SystemExit):
        main([*given, "--weights=mine"])
    assert "has no weights 'mine'; it has 'model', 'model_ema'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mean": None}, "mean must be given, one number per channel"),
        ({"mean": 0.5}, "mean must be numbers, one per channel, got 0.5"),
        ({"std": None}, "std must be given"),
        ({"std": (0.2, 0.2, float("nan"))}, "std must be finite"),
        ({"image_shape": (8, 8)}, "image_shape must be"),
    ],
)
def test_a_module_needs_a_normalisation_before_it_is_exported(monkeypatch, options, says):
    from moth_jax.models import from_torch

    monkeypatch.setattr(torch.export, "export", None)
    with pytest.raises(InputError, match=says):
        from_torch(module_of(), **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("weight", float("nan"), r"NaN or infinite weights in 4\.weight"),
        ("running_var", -1.0, r"negative variance in 1\.running_var \(-1\)"),
    ],
)
def test_a_module_whose_numbers_cannot_be_is_refused(part, value, says):
    from moth_jax.models import from_torch

    module = module_of()
    getattr(module[4 if part == "weight" else 1], part).data.fill_(value)
    with pytest.raises(InputError, match=says):
        from_torch(module, **OPTIONS)


def test_a_module_without_batch_norm_goes_through_a_checkpoint(tmp_path):
    from moth_jax.models import from_torch

    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)).eval()
    classifier, variables = from_torch(module, **OPTIONS)
    checkpoint.save_model(tmp_path / "model", classifier, variables)
    again = checkpoint.load_model(tmp_path / "model")
    logits = again.classifier.predict(again.variables, jnp.asarray(images()))
    np.testing.assert_allclose(logits, logits_of(module), rtol=1e-4, atol=1e-5)


def test_torchvisions_classifiers_are_read_by_name_or_whole_if_that_is_trusted(tmp_path):
    from tests.helpers.torchvision_shim import torchvision

    torch.manual_seed(0)
    module = torchvision.models.squeezenet1_1(num_classes=7).eval()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    torch.save(module, tmp_path / "whole.pt")
    x = np.random.default_rng(0).random((2, 40, 40, 3), np.float32)
    options = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "image_shape": (40, 40, 3)}
    with torch.no_grad():
        expected = module(torch.tensor((x.transpose(0, 3, 1, 2) - 0.5) / 0.2)).numpy()

    with pytest.raises(InputError, match="contains more than weights"):
        convert(tmp_path / "whole.pt", tmp_path / "refused", **options)
    sources = {"weights": {"arch": "squeezenet1_1"}, "whole": {"trust": "torchvision"}}
    for name, how in sources.items():
        said = convert(tmp_path / f"{name}.pt", tmp_path / name, **options, **how)
        assert "7 classes" in said
        classifier, variables = checkpoint.load_model(tmp_path / name)
        logits = jax.jit(classifier.predict)(variables, jnp.asarray(x))
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
