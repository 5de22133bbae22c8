"""Programs of torch.export: read as data, in every layout of their archive, and nothing is run."""

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.models.loading import load_source
from moth_jax.models.pytorch.programs import from_program, read_program
from tests.helpers.mutations import zipped
from tests.helpers.pickles import Calls

torch = pytest.importorskip("torch")
nn, functional = torch.nn, torch.nn.functional

SIZE = 8
AS_IT_IS = {"image_shape": (SIZE, SIZE, 3), "mean": (0, 0, 0), "std": (1, 1, 1)}
FREE = ({0: torch.export.Dim.DYNAMIC},)


class Function(nn.Module):
    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, value in tensors.items():
            self.register_buffer(name, value, persistent=name.startswith("kept"))

    def forward(self, x):
        return self.function(self, x)


class Tied(nn.Module):
    """Two names for one weight, and a weight that is a part of another."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight
        whole = torch.arange(24.0).reshape(4, 6)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[1:, ::2].T)

    def forward(self, x):
        x = self.second(self.first(x)).mean((2, 3))
        return x @ self.part @ torch.ones(3, 4) + self.whole[:, :4].mean(0)


def in_half(x):
    return x.mean((2, 3)).half().float() @ torch.ones(3, 4)


def head(x):
    return x.flatten(1)[:, :4]


MODELS = {
    "a plain network": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    ),
    "in place": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Hardswish(inplace=True), nn.Flatten(),
        nn.Dropout(inplace=True), nn.Linear(144, 5),
    ),
    "an argument that is used after its change": lambda: Function(
        lambda self, x: head((y := x * 2).relu_() + y.mul_(3) + y)
    ),
    "a change after a view that nobody sees again": lambda: Function(
        lambda self, x: head((y := x * 2, y.flatten(1).sum(), y.add_(1))[2] * y)
    ),
    "buffers and constants": lambda: Function(
        lambda self, x: head(x + self.kept + self.lost) + torch.tensor([1.0, 2, 3, 4]),
        kept=torch.ones(3, 1, 1),
        lost=torch.full((1, 1, SIZE), 0.5),
    ),
    "a repeated buffer": lambda: Function(
        lambda self, x: head(x + self.kept), kept=torch.ones(1).expand(SIZE)
    ),
    "a buffer that is changed": lambda: Function(
        lambda self, x: head(x * self.kept.add_(1) + self.kept), kept=torch.ones(1)
    ),
    "tied weights": Tied,
    "several results": lambda: Function(
        lambda self, x: head(torch.cat([x.split(3, 2)[0], x.chunk(2, 2)[1]], 2))
    ),
    "sizes of the images": lambda: Function(
        lambda self, x: x.reshape(x.shape[0], x.shape[1] * x.shape[2] // 6, -1).mean(2)
    ),
    "an infinite bound": lambda: Function(lambda self, x: head(x.clamp(-1.0, float("inf")))),
}  # fmt: skip


def exported(module):
    return torch.export.export(module.eval(), (torch.zeros(2, 3, SIZE, SIZE),), dynamic_shapes=FREE)


def save(module, path):
    torch.export.save(exported(module), path)
    return path


def images(count=3):
    return np.random.default_rng(0).normal(0.4, 0.5, (count, SIZE, SIZE, 3)).astype(np.float32)


def assert_same(path, module):
    """The program gives PyTorch's logits."""
    classifier, variables = from_program(read_program(path), **AS_IT_IS)
    with torch.no_grad():
        expected = module(torch.tensor(images().transpose(0, 3, 1, 2)))
    given = jax.jit(classifier.predict)(variables, jnp.asarray(images()))
    np.testing.assert_allclose(given, expected, atol=1e-4)
    return classifier, variables


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:No complete tensor found")
def test_a_program_gives_pytorchs_logits(tmp_path, name):
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    assert_same(save(module, tmp_path / "model.pt2"), module)


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return MODELS["a plain network"]().eval()


@pytest.fixture(scope="module")
def program(module, tmp_path_factory):
    return save(module, tmp_path_factory.mktemp("programs") / "model.pt2")


def parts_of(program):
    with zipfile.ZipFile(program) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def as_written_before_2_8(part):
    """The JSON without what later versions add to it."""
    described = json.loads(part)
    for node in described["graph_module"]["graph"]["nodes"]:
        del node["name"]
        for argument in node["inputs"]:
            del argument["kind"]
    return json.dumps(described).encode()


def layout_of_2_8(program, module):
    """The weights as one file of torch.save."""
    for name, part in parts_of(program).items():
        if "data/weights/model_" in name:
            yield (
                name.replace("model_weights_config.json", "model.pt"),
                pickled(module.state_dict()),
            )
        elif "data/constants/model_" in name:
            yield name.replace("model_constants_config.json", "model.pt"), pickled({})
        elif "/weight_" not in name:
            yield name, part


def layout_of_2_6(program, module):
    (described,) = (p for n, p in parts_of(program).items() if n.endswith("models/model.json"))
    yield "serialized_exported_program.json", as_written_before_2_8(described)
    yield "serialized_state_dict.pt", pickled(module.state_dict())
    yield "serialized_constants.pt", pickled({})
    yield "serialized_example_inputs.pt", pickled(((torch.zeros(1),), {}))
    yield "version", b"8.3"


@pytest.mark.parametrize("layout", [layout_of_2_6, layout_of_2_8])
def test_archives_of_older_versions_are_read(program, module, tmp_path, layout):
    path = tmp_path / "old.pt2"
    path.write_bytes(zipped(layout(program, module)))
    classifier, variables = assert_same(path, module)
    new_classifier, new_variables = from_program(read_program(program), **AS_IT_IS)
    old, new = classifier.spec.graph, new_classifier.spec.graph
    assert old.nodes == new.nodes
    assert old.shapes == new.shapes
    assert set(old.persistent) == set(new.persistent)
    jax.tree.map(np.testing.assert_array_equal, variables, new_variables)


def test_weights_of_other_precision_are_read_as_float32(tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    half = exported(module).module().half()
    path = tmp_path / "half.pt2"
    images_ = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.float16)
    torch.export.save(torch.export.export(half, (images_,), dynamic_shapes=FREE), path)
    arrays = read_program(path).arrays
    for name, value in half.state_dict().items():
        np.testing.assert_array_equal(arrays[name], value.float().numpy())
        assert arrays[name].dtype == np.float32


def test_a_part_of_a_file_with_code_is_refused_and_the_code_does_not_run(program, module, tmp_path):
    trap = tmp_path / "trap"
    evil = pickled({"0.weight": Calls(os.mkdir, str(trap))})
    for layout, part in ((layout_of_2_6, "state_dict.pt"), (layout_of_2_8, "weights/model.pt")):
        parts = layout(program, module)
        path = tmp_path / "evil.pt2"
        path.write_bytes(zipped((n, evil if n.endswith(part) else c) for n, c in parts))
        with pytest.raises(InputError, match="contains more than weights"):
            read_program(path)
    assert not trap.exists()


# What PyTorch's own reader would run


def changed(program, path, change=lambda value: value, *, suffix=".json", add=()):
    """A copy of an archive; `change` gets each object in its JSON parts and changes it."""

    def walk(value):
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, dict | list):
                walk(item)
        if isinstance(value, dict):
            change(value)

    parts = []
    for name, content in parts_of(program).items():
        if name.endswith(suffix):
            value = json.loads(content)
            walk(value)
            content = json.dumps(value).encode()
        parts.append((name, content))
    root = parts[0][0].partition("/")[0]
    path.write_bytes(zipped([*parts, *((f"{root}/{name}", part) for name, part in add)]))
    return path


def put(field, value):
    def change(fields):
        if field in fields:
            fields[field] = value

    return change


DEFAULT_DICT = json.dumps(
    [1, {"type": "collections.defaultdict", "children_spec": [], "context": {
        "default_factory_module": "evil", "default_factory_name": "x", "dict_context": []}}]
)  # fmt: skip
ENUM = json.dumps(
    [1, {"type": "builtins.dict", "context": json.dumps(
        [{"__enum__": True, "fqn": "evil:x", "name": "a"}]),
        "children_spec": [{"type": None, "context": None, "children_spec": []}]}]
)  # fmt: skip
CALL = "__import__('os').mkdir('trap')"
NEVER_READ = {
    "an expression": dict(change=put("expr_str", CALL)),
    "a power": dict(change=put("expr_str", "9**9**9**9")),
    "many digits": dict(change=put("expr_str", "1" * 40 + "!")),
    "deep brackets": dict(change=put("expr_str", "(" * 3000 + "1" + ")" * 3000)),
    "guards": dict(change=put("guards_code", [CALL])),
    "an imported factory": dict(change=put("in_spec", DEFAULT_DICT)),
    "an imported enumeration": dict(change=put("out_spec", ENUM)),
    "a verifier": dict(change=put("verifiers", ["evil"])),
    "a function by its name": dict(change=put("torch_fn", "evil;evil.x")),
    "a library": dict(add=[("data/aotinductor/model/.wrapper.so", b"\x7fELF")]),
    "a second program": dict(add=[("models/serialization_id_model", CALL.encode())]),
    "a pickle beside": dict(
        add=[("data/constants/opaque_obj_x/byteorder", pickle.dumps(Calls(os.mkdir, "trap")))]
    ),
    "an outside name": dict(add=[("../../trap", b"x")]),
}


@pytest.mark.parametrize("name", NEVER_READ)
def test_what_a_classifier_does_not_need_is_never_read(
    program, module, tmp_path, monkeypatch, name
):
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('trap')\nx = list\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert_same(changed(program, tmp_path / "evil.pt2", **NEVER_READ[name]), module)
    assert not (tmp_path / "trap").exists()
    assert "evil" not in sys.modules


def payload(**fields):
    """Change where the weights lie."""

    def change(meta):
        if "path_name" in meta:
            meta.update(fields)

    return change


def of_tensor(field, value):
    def change(meta):
        if "strides" in meta:
            meta[field] = value

    return change


def of_node(target):
    def change(fields):
        if "inputs" in fields and "target" in fields:
            fields["target"] = target

    return change


sizes = [{"as_int": 10**5}] * 2
REFUSED = {
    "a pickled weight": (payload(use_pickle=True), "no plain tensor"),
    "an outside weight": (payload(path_name="../../../etc/passwd"), "no plain tensor"),
    "an absolute name": (payload(path_name="/etc/passwd"), "no plain tensor"),
    "a name with more": (payload(path_name="weight_0/byteorder"), "no plain tensor"),
    "a name with a line": (payload(path_name="weight_0\n"), "no plain tensor"),
    "an object": (payload(path_name="custom_obj_0"), "no plain tensor"),
    "no such part": (payload(path_name="weight_99"), "or is damaged"),
    "negative sizes": (of_tensor("sizes", [{"as_int": -5}]), "-5 is no size"),
    "sizes that are no numbers": (of_tensor("sizes", [{"as_int": "4"}]), "'4' is no size"),
    "symbolic sizes": (of_tensor("sizes", [{"as_expr": {"expr_str": CALL}}]), "or is damaged"),
    "more than there is": (of_tensor("storage_offset", {"as_int": 10**9}), "its part of the file"),
    "too few strides": (of_tensor("strides", []), "or is damaged"),
    "an unknown type": (of_tensor("dtype", 99), "no plain array of numbers"),
    "complex numbers": (of_tensor("dtype", 10), "no plain array of numbers"),
    "a sparse weight": (of_tensor("layout", 1), "no plain array of numbers"),
    "a function": (of_node("torch.ops.load_library"), "no JAX rule for .* load_library"),
    "Python's call": (of_node("_operator.call"), "no JAX rule for .* operator.call"),
    "another name of it": (of_node("os.system"), "no JAX rule for .* os.system"),
    "a lookup": (of_node("torch.ops.aten.__class__"), "no JAX rule for .* aten.__class__"),
    "another version": (put("major", 7), "a program of version 7, and version 8 is known"),
    "no version": (put("schema_version", None), "or is damaged"),
    "no nodes": (put("nodes", None), "or is damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_program_that_is_no_classifier_is_refused_in_one_line(program, tmp_path, name):
    change, says = REFUSED[name]
    path = changed(program, tmp_path / "evil.pt2", change)
    with pytest.raises(InputError, match=says) as error:
        load_source(path, **AS_IT_IS)
    assert "\n" not in str(error.value)


def test_repeated_numbers_beyond_the_file_are_refused(program, tmp_path):
    def change(meta):
        if "strides" in meta:
            meta.update(sizes=sizes, strides=[{"as_int": 0}] * 2)

    path = changed(program, tmp_path / "evil.pt2", change, suffix="weights_config.json")
    with pytest.raises(InputError, match="whose tensors claim 10000000000 numbers"):
        read_program(path)


@pytest.mark.parametrize("upper", [False, True])
def test_a_name_that_comes_twice_is_refused(program, tmp_path, upper):
    config = "data/weights/MODEL_weights_config.json" if upper else "models/model.json"
    path = changed(program, tmp_path / "evil.pt2", add=[(config, b"{}")])
    with pytest.raises(InputError, match=r"it holds 'model/.*json' more than once"):
        read_program(path)


def test_an_archive_that_is_larger_than_its_file_is_refused(program, tmp_path):
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**parts_of(program), "model/data/weights/9": bytes(10**8)}.items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match="PyTorch does not compress"):
        read_program(path)


@pytest.mark.parametrize("content", [b"null", b"[]", b"[" * 10**5, b'{"a":' + b"9" * 5000, b"\xff"])
def test_json_of_another_form_is_refused(program, tmp_path, content):
    parts = parts_of(program).items()
    path = tmp_path / "evil.pt2"
    path.write_bytes(zipped((n, content if n.endswith("model.json") else c) for n, c in parts))
    with pytest.raises(InputError, match=r"is no program of .*, or is damaged"):
        read_program(path)


@pytest.mark.parametrize("part", ["models/model.json", "weights_config.json"])
def test_json_that_names_a_field_twice_is_refused(program, tmp_path, part):
    path = tmp_path / "evil.pt2"
    twice = [
        (
            name,
            b'{"config": {}, "graph_module": {}, ' + content[1:]
            if name.endswith(part)
            else content,
        )
        for name, content in parts_of(program).items()
    ]
    path.write_bytes(zipped(twice))
    with pytest.raises(InputError, match="a field occurs twice"):
        read_program(path)


def test_a_damaged_program_is_refused(program, tmp_path):
    content = program.read_bytes()
    broken = bytearray(content)
    broken[content.index(b'"graph_module"') + 3] ^= 1
    (tmp_path / "short.pt2").write_bytes(content[: len(content) // 2])
    (tmp_path / "other.pt2").write_bytes(b"not a program")
    (tmp_path / "broken.pt2").write_bytes(broken)
    (tmp_path / "empty.pt2").write_bytes(zipped([]))
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match=r"is no program of torch\.export, or is damaged"):
            read_program(path)
    (tmp_path / "none.pt2").write_bytes(zipped([("model/byteorder", b"little")]))
    with pytest.raises(InputError, match=r"no program of torch\.export, which holds model/models"):
        read_program(tmp_path / "none.pt2")


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with torch.no_grad():
        module[1].bias[2] = float("nan")
    path = save(module, tmp_path / "model.pt2")
    with pytest.raises(InputError, match=r"NaN or infinite weights in 1\.bias"):
        load_source(path, **AS_IT_IS)


def test_variances_that_are_negative_are_refused_by_name(tmp_path):
    module = MODELS["a plain network"]()
    module[1].running_var[1] = -1
    with pytest.raises(InputError, match=r"a negative variance in 1\.running_var"):
        load_source(save(module, tmp_path / "model.pt2"), **AS_IT_IS)


def test_a_program_is_converted_without_pytorch(program):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from moth_jax.models.loading import load_source\n"
        f"load_source({str(program)!r}, image_shape=(8, 8, 3), mean=(0,) * 3, std=(1,) * 3)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Operators that change what they are given


SHOWN_ELSEWHERE = {
    "a part": lambda self, x: head((y := x * 2, y[:, 0].mul_(3))[0]),
    "the whole of a part": lambda self, x: head((y := x * 2, z := y[:, 0], y.mul_(3), z)[3]),
    "a part of a part": lambda self, x: head((y := x * 2, y.flatten(1)[:, 4:].relu_(), y)[2]),
}


@pytest.mark.parametrize("name", SHOWN_ELSEWHERE)
def test_a_change_that_other_tensors_show_is_refused_with_what_to_do(tmp_path, name):
    module = Function(SHOWN_ELSEWHERE[name])
    path = save(module, tmp_path / "model.pt2")
    with pytest.raises(InputError, match=r"changes memory that other .*run_decompositions"):
        read_program(path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_advice_on_such_a_change_helps(tmp_path):
    module = Function(SHOWN_ELSEWHERE["the whole of a part"])
    torch.export.save(exported(module).run_decompositions({}), tmp_path / "model.pt2")
    assert_same(tmp_path / "model.pt2", module)
