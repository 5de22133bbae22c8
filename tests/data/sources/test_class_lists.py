import json
import os

import pytest

from moth_jax.data.sources.class_lists import read_class_list
from moth_jax.errors import InputError

FORMS = {
    "text": ("list.txt", "cat\ndog\nsea lion\n\n"),
    "text with a byte order mark": ("list.txt", "\ufeffcat\r\ndog\r\nsea lion\r\n"),
    "JSON list": ("list.json", ["cat", "dog", "sea lion"]),
    "numbered": ("list.json", {"1": "dog", "0": "cat", "2": "sea lion"}),
    "class_to_idx": ("list.json", {"sea lion": 2, "cat": 0, "dog": 1}),
}


@pytest.mark.parametrize(("name", "content"), FORMS.values(), ids=FORMS)
def test_every_form_of_a_list_gives_the_same_classes(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    classes = read_class_list(str(path), num_classes=3)
    assert classes == read_class_list(["cat", "dog", "sea lion"])
    assert classes.numbers == {"cat": 0, "dog": 1, "sea lion": 2}


SYNSETS = {
    "Keras": ("list.json", '{"0": ["n01", "tench"], "1": ["n02", "crane"], "2": ["n03", "crane"]}'),
    "Kaggle": ("list.txt", "n00000001 tench, Tinca tinca\nn00000002 crane\nn00000003 crane\n"),
}


@pytest.mark.parametrize(("name", "content"), SYNSETS.values(), ids=SYNSETS)
def test_folders_may_have_any_name_of_a_class_that_is_its_own(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    names, numbers = read_class_list(str(tmp_path / name))
    synsets = [name for name in numbers if name.startswith("n0")]
    assert [numbers[synset] for synset in synsets] == [0, 1, 2]
    assert names == ("tench", f"crane ({synsets[1]})", f"crane ({synsets[2]})")
    assert numbers["tench"] == 0
    assert numbers[names[2]] == 2
    assert "crane" not in numbers


def test_imagenet_classes_are_the_synsets_in_the_order_of_torchvision_heads():
    names, numbers = read_class_list("imagenet", num_classes=1000)
    assert len(names) == len(set(names)) == 1000
    assert names[0] == "n01440764"
    assert list(names) == sorted(names)
    assert numbers["n02102040"] == 217


def test_a_mapping_of_few_folders_into_a_large_head_leaves_the_others_unnamed(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('{"cat": 3, "dog": 1}')
    classes = read_class_list(str(path), num_classes=5)
    assert classes.names == ("class 0", "dog", "class 2", "cat", "class 4")


BAD_LISTS = {
    "absent": (None, r"class list not found at .*list\.json; give a text file"),
    "no JSON": ("cat\ndog", "cannot be read .*Expecting value"),
    "a number": ("3", "neither a list nor an object"),
    "empty object": ("{}", "neither a list nor an object"),
    "empty list": ("[]", "has no names in it"),
    "numbers": ("[1, 2]", "has no names in 1, 2; give a text file"),
    "unnumbered": ('{"a": "cat", "b": "dog"}', "does not give each class a number"),
    "numbers with a gap": ('{"0": "cat", "2": "dog"}', r"distinct and in \[0, 2\), got 2"),
    "number too high": ('{"cat": 0, "dog": 3}', r"distinct and in \[0, 3\), got 3"),
    "number twice": ('{"cat": 0, "dog": 0}', "distinct .*got 0"),
    "name twice": ('["cat", "dog", "cat"]', "must be distinct, given more than once: 'cat'"),
    "one class": ('["cat"]', "has 1 classes, but num_classes is 3"),
}


@pytest.mark.parametrize(("content", "message"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_bad_list_is_refused_with_its_path(tmp_path, content, message):
    path = tmp_path / "list.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        read_class_list(str(path), num_classes=3)
    assert "list.json" in str(raised.value)


def test_an_empty_line_in_a_list_is_refused_because_all_after_it_would_be_misnumbered(tmp_path):
    (tmp_path / "list.txt").write_text("cat\n\ndog\n")
    with pytest.raises(InputError, match="class names must be non-empty"):
        read_class_list(str(tmp_path / "list.txt"))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00cat")
    with pytest.raises(InputError, match=r"class list .*list\.txt cannot be read"):
        read_class_list(str(tmp_path / "list.txt"))


HOSTILE = {
    "a number far beyond": (
        {"a": 0, "b": 2_000_000_000},
        r"in \[0, 100000\), got 2000000000; num_cl",
    ),
    "a number of many digits": ({"a": 0, "b": 10**400}, r"got one of 1329 bits"),
    "a key of many digits": ({"0": "a", "9" * 5000: "b"}, "does not give each class a number"),
    "digits of other scripts": ({"٠": "a", "١": "b"}, "does not give each class a number"),
    "an escape code": (["a", "\x1b]0;b"], r"without control characters, got '\\x1b\]0;b'"),
    "half a letter": (["a", "\ud800"], r"without control characters, got '\\ud800'"),
    "one name in two forms": (["café", "cafe\u0301"], "more than once: 'café'"),
    "an empty name": (["a", "  "], "non-empty strings"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_list_is_refused_at_once(tmp_path, content, message):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_class_list(str(path))


def test_names_that_come_twice_in_an_object_are_refused_and_none_lost(tmp_path):
    (tmp_path / "list.json").write_text('{"cat": 0, "dog": 1, "cat": 2}')
    with pytest.raises(InputError, match="given more than once: 'cat'"):
        read_class_list(str(tmp_path / "list.json"))


def test_a_list_that_is_nested_without_end_or_is_no_file_is_refused(tmp_path):
    (tmp_path / "list.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"list\.json cannot be read"):
        read_class_list(str(tmp_path / "list.json"))
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match=r"pipe\.json is no regular file"):
        read_class_list(str(tmp_path / "pipe.json"))


@pytest.mark.parametrize("count", [-1, 10**12])
def test_no_head_has_so_many_outputs(count):
    with pytest.raises(InputError, match=rf"num_classes must be in \[0, 1000000\], got {count}"):
        read_class_list(("a", "b"), num_classes=count)


def test_names_are_looked_up_in_their_normal_form(tmp_path):
    (tmp_path / "list.txt").write_text("cafe\u0301\rbar\r\n")
    assert read_class_list(str(tmp_path / "list.txt")).numbers == {"caf\u00e9": 0, "bar": 1}
