"""The main job on a PyTorch model and a folder of images of some of its classes."""

import json
import warnings

import jax
import numpy as np
import pytest
from PIL import Image

from moth_jax import models
from moth_jax.convert import convert
from moth_jax.errors import InputError
from moth_jax.models import checkpoint
from moth_jax.models.weights import exporting
from moth_jax.run.runner import run
from tests.helpers.builders import OPTIONS, module_of, torch, write_builder
from tests.helpers.runs import ROOT, compilations_on_disk, do, load_config
from tests.helpers.toys import RecordedProgress, StoppedError

nn = torch.nn

SIZE = 16
HEAD = ("ant", "bee", "cow", "dog", "elk")  # of which there are images of three
PRESENT = ("bee", "cow", "elk")
FIELDS = {
    "data.image_size": SIZE,
    "data.flip": False,
    "distance.num_images": 6,
    "distance.num_steps": 20,
    "harden.max_steps": 6,
    "harden.batch_size": 16,
    "harden.victims_per_class": 4,
    "harden.warmup_steps": 10,
    "harden.warmup_images_per_class": 4,
    "harden.first_steps": 10,
    "harden.next_steps": 5,
    "harden.max_accuracy_drop": 1.0,
    "harden.max_trigger_share": 1.0,
    "harden.stamp_share": 0.5,
    "harden.learning_rate": 0.01,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with train and val, of images that are bright where their class says."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 10)):
        for name in PRESENT:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (SIZE, SIZE, 3))
                row = 3 * HEAD.index(name)
                pixels[row : row + 3] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    (root / "names.txt").write_text("\n".join(HEAD))
    return root


def rows_module():
    """A classifier that looks where the images of a class are bright."""
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d((SIZE, 1)),
        nn.Flatten(),
        nn.Linear(4 * SIZE, len(HEAD)),
    )
    with torch.no_grad():
        nn.init.constant_(module[0].weight, 0.1)
        weight = torch.full((len(HEAD), 4, SIZE), -1.0)
        for k in range(len(HEAD)):
            weight[k, :, 3 * k : 3 * k + 3] = 4.0
        module[5].weight.copy_(weight.reshape(len(HEAD), -1))
        nn.init.zeros_(module[5].bias)
    return module.eval()


def save_program(module, path, size=SIZE):
    """Write the program of a module for any number of images; returns its file."""
    batch = ({0: torch.export.Dim.DYNAMIC},)
    example = (torch.zeros(2, 3, size, size),)
    torch.export.save(torch.export.export(module, example, dynamic_shapes=batch), path)
    return path


@pytest.fixture
def program(tmp_path):
    return save_program(rows_module(), tmp_path / "model.pt2")


def config_for(images, checkpoint, **changes):
    config = load_config(ROOT / "configs" / "torchvision.py")
    fields = {
        **FIELDS,
        "data.dir": str(images),
        "data.resize": SIZE,
        "data.class_list": str(images / "names.txt"),
        "model.checkpoint": str(checkpoint),
        "model.mean": (0.0, 0.0, 0.0),
        "model.std": (1.0, 1.0, 1.0),
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    config.data.unlock()
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize("batch_norm", ["update", "frozen"])
def test_a_program_is_hardened_on_the_classes_there_are_images_of_and_goes_home(
    images, program, tmp_path, batch_norm
):
    config = config_for(images, program, harden__batch_norm=batch_norm)
    summary = do(config, tmp_path / "run")
    assert summary["accuracy_before"] == 1.0
    assert summary["distance_before"] > 0
    assert summary["failures_before"] == 0
    matrix = np.load(tmp_path / "run" / "distance_before.npz")["values"]
    assert matrix.shape == (3, 3)
    assert (tmp_path / "run" / "report.html").exists()

    saved = checkpoint.load_model(tmp_path / "run" / "hardened")
    assert saved.classifier.spec.class_names == HEAD
    convert(tmp_path / "run" / "hardened", tmp_path / "home.pt")
    module = rows_module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(torch.load(tmp_path / "home.pt", weights_only=True), strict=True)
    after = module.state_dict()
    assert not torch.equal(after["5.weight"], before["5.weight"])
    moved = not torch.equal(after["1.running_mean"], before["1.running_mean"])
    assert moved == (batch_norm == "update")


def test_some_of_those_classes_can_be_chosen_and_the_others_are_reported(images, program, tmp_path):
    do(config_for(images, program, classes=("elk", "bee")), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["classes"] == ["elk", "bee"]
    assert summary["accuracy_chosen_before"] == 1.0
    assert 0 <= summary["accuracy_others_after"] <= 1


def test_a_model_whose_statistics_cannot_be_updated_is_refused_before_it_is_measured(
    images, tmp_path
):
    module = rows_module()
    module[1].momentum = None
    path = save_program(module, tmp_path / "model.pt2")
    config = config_for(images, path, harden__batch_norm="update")
    with pytest.raises(InputError, match=r"'update' is impossible for this .*momentum None"):
        do(config, tmp_path / "run")
    assert not (tmp_path / "run" / "distance_before.npz").exists()


def test_a_head_of_another_size_is_refused_with_what_to_do(images, program, tmp_path):
    config = config_for(images, program, data__class_list="")
    with pytest.raises(InputError, match=r"5 classes .* 3 classes .* name all .* will do$"):
        do(config, tmp_path / "run")
    torch.save(rows_module().state_dict(), tmp_path / "rows.pt")
    builder = f"{__name__}:rows_module"
    config.model.update(checkpoint=str(tmp_path / "rows.pt"), builder=builder)
    with pytest.raises(InputError, match=r"will do, or set model.fine_tune=True for a new head of"):
        do(config, tmp_path / "run")


def fine_tuning(images, tmp_path, **changes):
    """The configuration that trains a module of 10 classes on the images, which are of five."""
    torch.save(module_of(num_classes=10).state_dict(), tmp_path / "weights.pt")
    fields = {
        "phase": "train",
        "model__builder": write_builder(tmp_path),
        "model__fine_tune": True,
        "model__mean": OPTIONS["mean"],
        "model__std": OPTIONS["std"],
        "data__image_size": 8,
        "data__resize": 8,
        "training__epochs": 2,
        "training__batch_size": 12,
        "checkpoint_seconds": 0.0,
    }
    return config_for(images, tmp_path / "weights.pt", **{**fields, **changes})


@pytest.mark.filterwarnings("ignore:the weights have a head of 10 classes")
def test_a_fine_tuned_model_has_a_new_head_and_goes_on_where_it_was_interrupted(images, tmp_path):
    config = fine_tuning(images, tmp_path)
    with pytest.warns(UserWarning, match=r"a head of 10 classes, .* is to have 5; drawn anew"):
        summary = do(config, tmp_path / "run")
    assert summary["training_seconds"] > 0
    saved = checkpoint.load_model(tmp_path / "run" / "original")
    assert saved.classifier.spec.class_names == HEAD
    given = module_of(num_classes=10)[0].weight.detach().numpy()
    assert not np.array_equal(saved.variables["params"]["0.weight"], given)
    np.testing.assert_allclose(saved.variables["params"]["0.weight"], given, atol=0.3)

    with pytest.raises(StoppedError), compilations_on_disk():
        run(config, tmp_path / "two", overwrite=False, progress=RecordedProgress(1))
    assert not (tmp_path / "two" / "original").exists()
    do(config, tmp_path / "two")
    again = checkpoint.load_model(tmp_path / "two" / "original")
    jax.tree.map(np.testing.assert_array_equal, again.variables, saved.variables)


class Notes(RecordedProgress):
    def __init__(self):
        super().__init__()
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize("claimed", ["0.9", "93.5", "0.05", None])
def test_an_imported_model_is_compared_at_once_with_the_accuracy_its_file_says(
    images, tmp_path, claimed
):
    from safetensors.numpy import save_file

    path = tmp_path / "weights.safetensors"
    spec = {"num_classes": 5, "image_shape": (SIZE, SIZE, 3), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    arrays = exporting.state_dict(*models.create("resnet20", **spec))
    save_file(arrays, path, metadata=None if claimed is None else {"val_acc": claimed})
    config = config_for(images, path, phase="train", model__builder="", model__name="auto")
    progress = Notes()
    with warnings.catch_warnings(record=True) as caught, compilations_on_disk():
        warnings.simplefilter("always")
        run(config, tmp_path / "run", overwrite=False, progress=progress)
    assert any("taken as resnet20" in note or "recognised as" in note for note in progress.notes)
    told = [text for text in map(str, (w.message for w in caught)) if str(path) in text]
    if claimed in ("0.9", "93.5"):
        share = "90.00" if claimed == "0.9" else "93.50"
        says = f"the file says that val_acc is {share} %: the model was probably not read as"
        assert len(told) == 1
        assert says in told[0]
    else:
        assert not told
        assert any(f"{path} is right on " in note for note in progress.notes)


def test_statistics_that_cannot_be_updated_stay_as_they_are_in_fine_tuning(images, tmp_path):
    module = module_of()
    module[1].momentum = None
    program = save_program(module, tmp_path / "model.pt2", size=8)
    changes = {"model__checkpoint": str(program), "model__builder": ""}
    with pytest.raises(
        InputError, match=r"'update' is impossible for this .*; use batch_norm 'froz"
    ):
        do(fine_tuning(images, tmp_path, **changes), tmp_path / "run")
    changes["training__batch_norm"] = "frozen"
    hardened = {**changes, "phase": "all", "harden__batch_norm": "update"}
    with pytest.raises(InputError, match=r"'update' is impossible for this"):
        do(fine_tuning(images, tmp_path, **hardened), tmp_path / "hardened")
    assert not (tmp_path / "hardened" / "metrics.jsonl").read_text()  # not after the training
    do(fine_tuning(images, tmp_path, **changes), tmp_path / "run")
    variables = checkpoint.load_model(tmp_path / "run" / "original").variables
    np.testing.assert_array_equal(
        variables["batch_stats"]["1.running_mean"], module[1].running_mean
    )
    assert not np.array_equal(variables["params"]["4.weight"], module[4].weight.detach())
