"""Files of weights that are damaged, of another kind or dangerous: one clear refusal each."""

import os
import pickle
import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file

from moth_jax.errors import InputError
from moth_jax.models.weights.files import check_content, read_file, read_weights
from tests.helpers.pickles import Calls

KERAS = "moth_cifar10_resnet20_nat.h5"


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {f"layer{i}.weight": rng.normal(size=(64, 64)).astype(np.float32) for i in range(10)}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_numbers_are_named(tmp_path, arrays, value):
    broken = {**arrays, "bn1.bias": np.full(16, value, np.float32)}
    save_file(broken, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"NaN or infinite weights in bn1.bias;"):
        read_weights(tmp_path / "w.safetensors")


def test_a_missing_file_and_an_unknown_extension_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no weights file at .*nowhere.pt"):
        read_weights(tmp_path / "nowhere.pt")
    (tmp_path / "w.ckpt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"'w.ckpt': .* one of .h5, .hdf5, .pt, .pth, .saf"):
        read_weights(tmp_path / "w.ckpt")


@pytest.mark.parametrize("extension", [".pt", ".pt2", ".safetensors", ".h5"])
def test_what_is_there_and_no_file_is_not_called_missing(tmp_path, extension):
    os.mkfifo(tmp_path / f"pipe{extension}")
    (tmp_path / f"folder{extension}").mkdir()
    (tmp_path / f"device{extension}").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "device"):
        with pytest.raises(InputError, match="is no file, but a folder, a pipe or a device"):
            check_content(tmp_path / f"{name}{extension}")


@pytest.mark.parametrize("extension", [".pt", ".safetensors", ".h5"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"no weights at all, only some text that is longer", "truncated or damaged|is refused"),
    ],
)
def test_files_that_hold_something_else_are_refused(tmp_path, extension, content, message):
    if extension == ".pt":
        pytest.importorskip("torch")
    (tmp_path / f"w{extension}").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_weights(tmp_path / f"w{extension}")


@pytest.mark.parametrize("keep", [0.003, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["legacy.th", "zip.pt", "w.safetensors", "w.h5"])
def test_truncated_files_are_refused(shared, tmp_path, arrays, kind, keep):
    path = tmp_path / kind
    if kind == "w.safetensors":
        save_file(arrays, path)
    elif kind == "w.h5":
        path.write_bytes((shared / "checkpoints" / KERAS).read_bytes())
    else:
        torch = pytest.importorskip("torch")
        tensors = {name: torch.tensor(array) for name, array in arrays.items()}
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip.pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError, match=r"truncated or damaged|is refused"):
        read_weights(path)


def test_a_zip_archive_with_a_flipped_bit_is_refused(tmp_path, arrays):
    torch = pytest.importorskip("torch")
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, tmp_path / "w.pt")
    content = bytearray((tmp_path / "w.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"damaged \(wrong checksum of"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    trace = tmp_path / "trace"
    payload = {"state_dict": Calls(open, str(trace), "w")}
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(payload, protocol=protocol))
    torch.save(payload, tmp_path / "torch.pth", pickle_protocol=protocol)
    for name in ("bare.pth", "torch.pth"):
        with pytest.raises(InputError, match=r"is refused: it contains more .* \(_?io\.open\)"):
            read_weights(tmp_path / name)
    assert not trace.exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("beside", [False, True])
def test_a_pickle_that_runs_a_command_is_refused_by_its_name(tmp_path, protocol, beside):
    torch = pytest.importorskip("torch")
    weights = {"weight": torch.zeros(2)} if beside else {}
    command = Calls(os.system, "true")  # of a module that PyTorch itself blocks
    torch.save({**weights, "x": command}, tmp_path / "w.pt", pickle_protocol=protocol)
    with pytest.raises(InputError, match=r"is refused: .* \((posix|nt)\.system\), .*") as caught:
        read_weights(tmp_path / "w.pt")
    assert "trust" not in str(caught.value)


@pytest.mark.filterwarnings("error")
def test_weights_of_a_protocol_that_pytorch_does_not_read_are_not_taken_for_code(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pt", pickle_protocol=4)
    with pytest.raises(InputError, match="is refused: not a PyTorch file of weights alone"):
        read_weights(tmp_path / "w.pt")


def test_a_pickled_module_is_refused_by_the_name_of_its_class(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"Linear\), .*--trust=torchvision .*model\.trust="):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"lr": 0.1}}])
def test_a_pytorch_file_without_weights_is_refused(tmp_path, content):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match="contains no named weights"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "w.pt")
    with pytest.raises(InputError, match="TorchScript archive"):
        read_weights(tmp_path / "w.pt")


def test_without_torch_the_message_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "w.pt").write_bytes(b"something")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install 'moth-jax\[torch\]'"):
        read_weights(tmp_path / "w.pt")


def test_a_keras_3_file_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["layers/conv2d/vars/0"] = np.zeros(3)
    with pytest.raises(InputError, match="layout of Keras 3"):
        read_weights(tmp_path / "w.h5")


# Valid files, and numbers that no trained model has


def test_a_safetensors_file_is_not_taken_for_a_page_by_the_length_of_its_header(tmp_path):
    arrays, path = {"conv.weight": np.ones((2, 2), np.float32)}, tmp_path / "w.safetensors"
    for length in (0x3C20, 0x3C0A, 0x76):  # " <", a new line and "<", the "v" of a Git LFS pointer
        save_file(arrays, path, metadata={"n": ""})
        header = path.read_bytes()[8:-16].rstrip()
        header = header.ljust(length) if length > len(header) else header
        path.write_bytes(len(header).to_bytes(8, "little") + header + path.read_bytes()[-16:])
        np.testing.assert_array_equal(read_weights(path)["conv.weight"], 1)


@pytest.mark.parametrize(
    "start", [b"<html>", b"\xef\xbb\xbf\r\n<?xml version", b"  <!DOCTYPE html>"]
)
def test_pages_are_told_however_they_begin(tmp_path, start):
    (tmp_path / "w.safetensors").write_bytes(start + b" not found " * 9)
    with pytest.raises(InputError, match="is an HTML or XML page"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("bn.running_var", np.array([1.0, -1.0], np.float32), r"negative variance in bn.running_v"),
        ("bn.running_var", np.array([-0.5], np.float16), r"negative variance .* \(-0\.5\)"),
        ("x.moving_variance", np.array([-2.0], np.float32), r"negative variance in x.moving_vari"),
        ("fc.weight", np.ones(2, np.complex64), r"complex numbers in fc\.weight"),
    ],
)
def test_numbers_that_no_trained_model_has_are_refused_by_name(tmp_path, name, array, says):
    save_file({"a": np.ones(2, np.float32), name: array}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=says):
        read_weights(tmp_path / "w.safetensors")


def test_faulty_weights_are_named_in_a_line_of_bounded_length(tmp_path):
    many = {f"layer{i}.weight": np.full(2, np.nan, np.float32) for i in range(300)}
    save_file(many, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"layer0\.weight, .* and 292 more; a diverged") as caught:
        read_weights(tmp_path / "w.safetensors")
    assert len(str(caught.value)) < 400


def test_an_accuracy_in_the_metadata_of_a_safetensors_file_is_read(tmp_path, arrays):
    save_file(arrays, tmp_path / "w.safetensors", metadata={"val_acc": "0.93", "format": "pt"})
    assert read_file(tmp_path / "w.safetensors").claim == ("val_acc", 0.93)
    save_file(arrays, tmp_path / "w.safetensors")
    assert read_file(tmp_path / "w.safetensors").claim is None


def test_of_several_sets_the_one_taken_is_said_unless_they_are_equal(tmp_path, arrays):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    path = tmp_path / "w.pt"
    torch.save({"state_dict_ema": other, "state_dict": tensors, "best_acc1": 0.5}, path)
    with pytest.warns(
        UserWarning, match=r"w\.pt has 2 sets .*: state_dict was taken, not state_dict_"
    ):
        assert read_file(path).arrays["layer0.weight"][0, 0] == arrays["layer0.weight"][0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = read_file(path, chosen="state_dict_ema").arrays
        np.testing.assert_array_equal(chosen["layer3.weight"], other["layer3.weight"])
        torch.save({"model": tensors, "best_model": dict(tensors)}, path)
        assert read_file(path).claim is None
