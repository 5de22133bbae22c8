import dataclasses
import inspect
import math

import ml_collections
import pytest

from moth_jax import data
from moth_jax.errors import InputError
from moth_jax.hardening import METHODS
from moth_jax.hardening.moth import MothConfig
from moth_jax.inversion import INVERSIONS
from moth_jax.models import MODELS
from moth_jax.run import configuration
from moth_jax.run.configuration import check, default_config, set_adversary
from moth_jax.run.phases import requests
from moth_jax.training import PUBLISHED_ADVERSARIES, Adversary, TrainingConfig
from tests.helpers.runs import ROOT, load_config

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PARTS = {
    "training": (TrainingConfig, configuration.training_config),
    "harden": (MothConfig, configuration.method_config),
    **{
        name: (method.config, configuration.method_config)
        for name, method in METHODS.items()
        if method.config is not MothConfig
    },
}


def digits_config(**changes):
    """The defaults for the digits; `changes` name fields with __ for a dot."""
    config = default_config()
    config.data.name = "digits"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def numbers(config, prefix=""):
    """(name, value) of all fields that are numbers."""
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, value


@pytest.mark.parametrize("part", PARTS)
def test_every_option_is_a_field_with_its_own_default(part):
    options = dataclasses.asdict(PARTS[part][0]())
    of_the_run = {"seed", "classes", "check_order"} & options.keys()
    assert default_config()[part].to_dict() == {
        name: value for name, value in options.items() if name not in of_the_run
    }
    assert of_the_run <= {*default_config()}


def another_value(field):
    """An allowed value of an option that is not its default."""
    chosen = {
        "adversary": Adversary(epsilon=0.25),
        "betas": (1.0, 2.0),
        "batch_norm": "frozen",
        "classes": (4, 2),
        "inversion": "trimmed",
        "schedule": "cosine",
        "scheduler": "uniform",
    }
    if field.name in chosen:
        return chosen[field.name]
    if isinstance(field.default, bool):
        return not field.default
    is_share = isinstance(field.default, float) and 0.5 < field.default <= 1
    return field.default * (0.5 if is_share else 2) or 1


@pytest.mark.parametrize("part", PARTS)
def test_every_field_reaches_the_options(part):
    options, convert = PARTS[part]
    having = [field for field in dataclasses.fields(options) if field.default is not None]
    changed = {field.name: another_value(field) for field in having}
    assert not [name for name, value in changed.items() if getattr(options(), name) == value]
    expected = options(**changed)
    fields = dataclasses.asdict(expected)
    of_the_run = {n: fields.pop(n) for n in ("seed", "check_order") if n in fields}
    config = digits_config(**of_the_run)
    config.method = part if part in METHODS else "moth"
    # The run names classes; their labels are known once the data are.
    labels = {"classes": fields.pop("classes")} if "classes" in fields else {}
    config[part].update(fields)
    assert convert(config, **labels) == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model__mean": (float("nan"),)}, "mean must be numbers, got"),
        ({"model__mean": ("x",)}, r"mean must be numbers, got \('x',\)"),
        ({"model__std": (0.0,)}, r"std in \(0, 1\]"),
        ({"model__builder": "mine.py:build"}, "model.builder says how to read model.checkpoint"),
        ({"model__weights": "ema"}, "model.weights says how to read model.checkpoint"),
        ({"model__trust": "torchvision"}, "model.trust says how to read model.checkpoint"),
    ],
)
def test_options_of_a_model_that_cannot_be_are_found_before_the_data(fields, says):
    with pytest.raises(InputError, match=says):
        check(digits_config(**fields))


def test_a_patience_reaches_the_inversion_that_has_one_and_no_other():
    config = digits_config(harden__patience=4)
    check(config)
    assert configuration.method_config(config).patience == 4
    config.harden.inversion = "trimmed"
    with pytest.raises(InputError, match="the inversion 'trimmed' has no option 'patience'"):
        check(config)
    config.harden.patience = None
    check(config)


def adversaries(config):
    """The adversary of training, and of every method by its name."""
    found = {"training": configuration.training_config(config).adversary}
    for config.method in METHODS:
        found[config.method] = configuration.method_config(config).adversary
    return found


def test_an_adversary_is_one_of_training_and_of_every_method_or_of_the_parts_named():
    config, adversary = digits_config(), Adversary(0.05, 0.02, 3)
    set_adversary(config, adversary)
    assert adversaries(config) == dict.fromkeys(["training", *METHODS], adversary)
    config = digits_config()
    set_adversary(config, adversary, parts=["uap"])
    changed = {name for name, found in adversaries(config).items() if found == adversary}
    assert changed == {"uap"}


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if "_adversarial" in path.name], ids=lambda path: path.name
)
def test_an_adversarially_trained_model_is_hardened_with_its_adversary_by_every_method(path):
    config = load_config(path)
    published = PUBLISHED_ADVERSARIES[config.data.name]
    assert adversaries(config) == dict.fromkeys(["training", *METHODS], published)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_file_can_be_run(path):
    config = load_config(path)
    check(config)
    allowed = inspect.signature(data.DATASETS[config.data.name]).parameters
    assert configuration.data_options(config).keys() <= allowed.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_file_says_how_it_is_run_and_on_what(path):
    header = path.read_text().split('"""')[1]
    assert f"python -m moth_jax.main --config=configs/{path.name} --workdir=DIR" in header
    assert "Hardware:" in header


OWN_NUMBERS = [item for item in numbers(default_config()) if not item[0].startswith("data.")]
UNDEFINED = [(name, math.nan) for name, default in OWN_NUMBERS if isinstance(default, float)]


@pytest.mark.parametrize(
    ("name", "value"), [*((name, type(default)(-1)) for name, default in OWN_NUMBERS), *UNDEFINED]
)
def test_no_number_may_be_negative_or_undefined(name, value):
    config = digits_config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(InputError, match=rf"^{name} must be .*, got {value}$"):
        check(config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("distance.num_images", 0, "distance.num_images must be at least 1, got 0"),
        ("distance.success_bound", 1.5, r"distance.success_bound must be in \(0, 1\], got 1.5"),
        ("harden.success_bound", 0.0, r"harden.success_bound must be in \(0, 1\], got 0.0"),
        ("harden.learning_rate", math.inf, "harden.learning_rate must be above 0, got inf"),
        ("training.momentum", 1.0, r"training.momentum must be in \[0, 1\), got 1.0"),
        ("harden.max_accuracy_drop", 1.01, "harden.max_accuracy_drop must be in"),
        ("harden.adversary.epsilon", 8.0, "harden.adversary.epsilon must be in"),
        ("seed", 2**31, r"seed must be in \[0, 2\*\*31\), got 2147483648"),
        ("distance.seeds", (), r"distance.seeds must be whole numbers such as \(0,\), got \(\)"),
        ("distance.seeds", (0, -1), "distance.seeds must be whole numbers"),
        ("distance.seeds", (0.5,), "distance.seeds must be whole numbers"),
        ("harden.batch_size", 31, "batch_size 31 has no room for 16 samples of each of 2 classes"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(name, value, message):
    config = digits_config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(InputError, match=message):
        check(config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("nad.betas", (math.nan,), r"nad\.betas must be numbers, 0 or more, got \(nan,\)"),
        ("nad.betas", (500.0, -1.0), r"nad\.betas must be numbers, 0 or more"),
        ("nad.betas", (), r"nad\.betas must be numbers such as \(500.0, 1000.0, 1000.0\), got"),
        ("model.mean", (math.nan,), r"model\.mean must be numbers, got \(nan,\)"),
        ("model.mean", ("x",), r"model\.mean must be numbers, got \('x',\)"),
        ("data.seed", -1, r"data\.seed must be in \[0, 2\*\*31\), got -1"),
        ("data.validation_fraction", math.nan, r"data\.validation_fraction must be in \[0, 1\)"),
        ("distance.num_steps", 10**20, r"distance\.num_steps must be at most 2,147,483,647, got 1"),
        ("harden.epochs", 1e14, r"harden\.epochs must be at most 2,147,483,647, got 1"),
        ("classes", (True, "1"), r"classes must be names, got \(True, '1'\)"),
        ("uap.schedule", "linear", r"uap: unknown schedule 'linear'"),
        ("distance.seeds", (2**31,), r"distance\.seeds must be whole numbers, in .*, got"),
        ("training.batch_size", None, r"training\.batch_size must be a whole number, at least"),
    ],
)
def test_options_that_this_run_does_not_use_are_checked_too(name, value, message):
    config = digits_config(phase="train")
    config.update_from_flattened_dict({name: value})
    with pytest.raises(InputError, match=f"^{message}"):
        check(config)


def test_bytes_of_memory_are_counted_beyond_32_bits():
    config = default_config()
    config.data.name = "folder"
    config.data.in_memory_limit = 2**36
    check(config)
    config.data.in_memory_limit = -1
    with pytest.raises(InputError, match=r"data\.in_memory_limit must be 0 or more, got -1"):
        check(config)


def test_an_option_that_the_loader_does_not_have_is_named_before_anything_is_loaded():
    config = digits_config()
    config.data.size = 32
    with pytest.raises(InputError, match="data set 'digits' has no option size"):
        check(config)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("phase", requests()),
        ("method", METHODS),
        ("data.name", data.DATASETS),
        ("model.name", ["auto", *MODELS]),
        ("distance.inversion", ["standard", *INVERSIONS]),
        ("distance.split", ["train", "validation", "test"]),
        ("harden.scheduler", ["k_arm", "nearest", "sweep", "uniform"]),
        ("harden.schedule", ["constant", "cosine"]),
        ("harden.batch_norm", ["update", "frozen"]),
        ("training.batch_norm", ["update", "frozen"]),
    ],
)
def test_an_unknown_choice_is_answered_with_all_of_them(name, choices):
    config = digits_config()
    config.update_from_flattened_dict({name: "nonsense"})
    with pytest.raises(InputError, match=r"unknown .* 'nonsense'") as raised:
        check(config)
    listed = str(raised.value).partition("choose one of: ")[2].split(", ")
    assert listed == sorted(choices)


def test_only_a_given_model_can_be_trained_further():
    config = digits_config(model__fine_tune=True)
    with pytest.raises(InputError, match=r"fine_tune trains a given model .*checkpoint names none"):
        check(config)
    config.model.checkpoint = "model.pt"
    check(config)


def test_the_name_of_the_data_set_is_no_option_of_its_loader():
    config = digits_config(data__seed=4)
    config.data.folder = "here"  # of a data set's own
    expected = {"validation_fraction": 0.1, "seed": 4, "folder": "here"}
    assert configuration.data_options(config) == expected
