"""Files of `torch.save`: no plain arrays, dicts without an end, claims beyond the file."""

import re
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.models.weights.files import read_weights
from tests.helpers.mutations import zipped

torch = pytest.importorskip("torch")


def endless(key):
    content = {}
    content[key] = content
    return content


def two_in_each_other():
    first, second = {}, {}
    first["model"], second["state_dict"] = second, first
    return first


def nested_too_deep():
    content = {"w": torch.zeros(2)}
    for _ in range(50):
        content = {"net": content}
    return content


@pytest.mark.parametrize(
    "content",
    [endless("state_dict"), endless("weights"), two_in_each_other(), nested_too_deep()],
    ids=["itself", "itself by another name", "each other", "a very deep dict"],
)
def test_dicts_that_hold_each_other_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match="hold each other without an end"):
        read_weights(tmp_path / "w.pt")


def itself_by_no_known_name():
    content = endless("more")
    content["list"] = [content]
    return content


@pytest.mark.parametrize("content", [itself_by_no_known_name(), {("a",) * 99: 1}, {"a" * 999: 1}])
def test_what_holds_no_weights_is_refused_with_short_keys(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match="contains no named weights but a dict with the keys") as e:
        read_weights(tmp_path / "w.pt")
    assert len(str(e.value)) < 250 + len(str(tmp_path))


@pytest.mark.parametrize("key", [0, None, 1.5, ("w", 1), b"w"])
def test_weights_under_keys_that_are_no_strings_are_refused(tmp_path, key):
    torch.save({"b": torch.zeros(2), key: torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="weights under keys that are no names"):
        read_weights(tmp_path / "w.pt")


def test_other_things_under_keys_that_are_no_strings_are_left_alone(tmp_path):
    torch.save({"w": torch.ones(2), 3: "epochs", None: None}, tmp_path / "w.pt")
    np.testing.assert_array_equal(read_weights(tmp_path / "w.pt")["w"], [1, 1])


UNUSUAL = {
    "a sparse": lambda: torch.eye(3).to_sparse(),
    "a sparse tensor": lambda: torch.eye(4).to_sparse_csr(),
    "a meta": lambda: torch.zeros(3, device="meta"),
    "a meta (without values)": lambda: torch.zeros(10**9, 10**9, device="meta"),
    "a quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "torch.bits8": lambda: torch.zeros(4, dtype=torch.uint8).view(torch.bits8),
    "a complex": lambda: torch.ones(3, dtype=torch.complex64),
    "a complex tensor": lambda: torch.ones(3, dtype=torch.complex64).conj(),
}


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_is_no_plain_array_is_refused_by_name(tmp_path, kind):
    torch.save({"fine": torch.ones(2), "odd": UNUSUAL[kind]()}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=f"holds 'odd' as {re.escape(kind)}"):
        read_weights(tmp_path / "w.pt")


def test_tensors_as_pytorch_keeps_them_are_read(tmp_path):
    """Negative, transposed, of half precision, shared, with a gradient; parameters; numbers."""
    base = torch.arange(6.0).reshape(2, 3)
    tensors = OrderedDict(
        negative=torch._neg_view(base),
        transposed=base.T,
        part=base[:, 1:],
        half=base.half(),
        bfloat=base.bfloat16(),
        double=base.double(),
        parameter=torch.nn.Parameter(base),
        positions=torch.arange(4).expand(1, -1),
        number=torch.tensor(5),
        nothing=torch.zeros(0, 3),
        truth=torch.tensor([True, False]),
    )
    torch.save(tensors, tmp_path / "w.pt")
    for name, array in read_weights(tmp_path / "w.pt").items():
        expected = tensors[name].detach().resolve_neg()
        expected = expected.float() if expected.is_floating_point() else expected
        np.testing.assert_array_equal(array, expected.numpy(), err_msg=name)
        assert array.dtype == expected.numpy().dtype


@pytest.mark.parametrize("legacy", [False, True])
def test_a_view_that_repeats_its_numbers_beyond_the_file_is_refused(tmp_path, legacy):
    options = {"_use_new_zipfile_serialization": not legacy}
    torch.save({"w": torch.zeros(1).expand(10**5, 10**5)}, tmp_path / "w.pt", **options)
    with pytest.raises(InputError, match="whose tensors claim 10000000000 numbers"):
        read_weights(tmp_path / "w.pt")


def test_many_views_of_one_storage_beyond_the_file_are_refused(tmp_path):
    base = torch.zeros(10**5)
    torch.save({str(i): base for i in range(200)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="whose tensors claim 20000000 numbers"):
        read_weights(tmp_path / "w.pt")


def parts_of(path):
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def test_an_archive_that_is_compressed_beyond_its_size_is_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    parts = parts_of(tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in [*parts, ("w/data/9", bytes(10**7))]:
            archive.writestr(name, content)
    with pytest.raises(InputError, match="PyTorch does not compress"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("other", ["w/data.pkl", "w/DATA.pkl"])
def test_an_archive_with_a_name_twice_is_refused(tmp_path, other):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    parts = parts_of(tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(zipped([*parts, (other, b"x")]))
    with pytest.raises(InputError, match=r"it holds 'w/data\.pkl' more than once"):
        read_weights(tmp_path / "w.pt")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_archive_is_refused_before_it_is_opened(tmp_path, mode):
    with tarfile.open(tmp_path / "w.tar", mode) as archive:
        link = tarfile.TarInfo("storages")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(InputError, match="is a tar archive; extract it"):
        read_weights(tmp_path / "w.tar")
