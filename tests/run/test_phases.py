"""What a phase may see, what it checks, and how another one is added."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from moth_jax.data import ImageSplit
from moth_jax.errors import InputError
from moth_jax.hardening import METHODS
from moth_jax.models import from_function
from moth_jax.models.checkpoint import SavedModel
from moth_jax.options import AT_LEAST_1, option
from moth_jax.run.configuration import default_config, method_config, node_of
from moth_jax.run.phases import PHASES, Phase, asked, requests
from moth_jax.run.phases.harden import clean_part
from moth_jax.run.phases.measure import measure
from tests.helpers.runs import do, finished_run, job_of, tiny_config
from tests.helpers.toys import RecordedProgress, linear_classifier, row_dataset, row_variables

DATASET = row_dataset((40, 20, 3))


def part(share, seed=0):
    return clean_part(DATASET, share, seed)


@pytest.mark.parametrize(("share", "counts"), [(0.5, [20, 10, 2]), (0.05, [2, 1, 1])])
def test_a_clean_share_is_one_of_each_class_and_never_none(share, counts):
    given = part(share)
    assert np.bincount(given.train.labels).tolist() == counts
    assert given.validation is DATASET.validation
    assert given.test is DATASET.test
    all_images = {image.tobytes() for image in DATASET.train.batch(np.arange(63))}
    assert {image.tobytes() for image in given.train.batch(np.arange(sum(counts)))} <= all_images


PLAIN = from_function(
    lambda tree, images: images.reshape(len(images), -1) @ tree["params"]["kernel"],
    {"params": {"kernel": row_variables()["params"]["kernel"]}},
    image_shape=(4, 4, 1),
)


def squared_logits(tree, images):
    """A head that also reads the sum over the channels, which no weight of its own reads."""
    maps = checkpoint_name(jnp.square(images @ tree["params"]["first"]), "maps")
    return maps.mean((1, 2)) @ tree["params"]["head"] + maps.sum((1, 2, 3))[:, None]


UNCUTTABLE = from_function(
    squared_logits,
    {"params": {"first": jnp.ones((1, 4)), "head": jnp.ones((4, 3))}},
    image_shape=(4, 4, 1),
)


@pytest.mark.parametrize(
    ("method", "model", "options", "message"),
    [
        ("nad", PLAIN, {}, "marks no feature maps"),
        ("fine_pruning", PLAIN, {}, "marks no feature maps"),
        ("fine_pruning", UNCUTTABLE, {}, "the channels of 'maps' in .* cannot be cut"),
        ("moth", PLAIN, {"pairs_per_step": 2}, r"pairs_per_step must be in 1\.\.1 for 3 classes"),
        ("pairwise", PLAIN, {"pairs_per_step": 2}, "takes one pair at a time"),
        ("uap", PLAIN, {"batch_size": 64}, "batch_size 64 is larger than the data"),
    ],
)
def test_a_method_that_cannot_harden_the_model_is_refused_before_it_is_measured(
    method, model, options, message
):
    config = default_config()
    config.method = method
    node = config[node_of(method)]
    node.batch_norm, node.batch_size = "frozen", 48
    if "victims_per_class" in node:
        node.victims_per_class = 4
    node.update(options)
    job = job_of(config, DATASET)
    PHASES["harden"].check(job, None)
    with pytest.raises(InputError, match=message):
        PHASES["harden"].check(job, SavedModel(*model))
    with pytest.raises(InputError, match=message):
        METHODS[method].harden(*model, DATASET, method_config(config), progress=False)
    assert PHASES["harden"] not in asked("measure")


def test_all_images_are_the_data_set_itself_and_the_seed_chooses_among_fewer():
    assert part(1.0) is DATASET
    first, again, other = (part(0.5, seed).train.batch(np.arange(32)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_only_the_victims_images_are_read(tmp_path, monkeypatch):
    read = []

    def batch(split, indices, original=ImageSplit.batch):
        if split is DATASET.test:  # and not of images that are in memory
            read.extend(split.labels[indices])
        return original(split, indices)

    monkeypatch.setattr(ImageSplit, "batch", batch)
    config = default_config()
    config.distance.victims, config.distance.num_steps = ("row1",), 20
    job = job_of(config, DATASET, tmp_path, RecordedProgress())
    matrix = measure(job, "before", SavedModel(linear_classifier(), row_variables()))
    assert np.argwhere(~np.isnan(matrix.values)).tolist() == [[1, 0], [1, 2]]
    assert read == [1, 1, 1, 1]


@dataclasses.dataclass(frozen=True)
class CardOptions:
    """Options of a made-up phase."""

    num_lines: int = option(2, AT_LEAST_1)


def write_card(job, models):
    lines = [models["before"].classifier.spec.arch] * job.options(CardOptions).num_lines
    (job.workdir / "card.txt").write_text("\n".join(lines))


CARD = Phase(
    do=write_card,
    requests=("card",),
    figures=lambda job, models: {"card": (job.workdir / "card.txt").exists()},
    files=("card.txt",),
    options={"card": CardOptions},
)


def test_a_phase_from_elsewhere_is_one_entry_with_its_request_options_figures_and_files(
    tmp_path, monkeypatch
):
    checkpoint = finished_run() / "original"  # shared with other tests: made without the phase
    monkeypatch.setitem(PHASES, "card", CARD)
    assert "card" in requests()
    config = tiny_config(phase="card", model__checkpoint=str(checkpoint))
    config.card.num_lines = 3
    assert do(config, tmp_path)["card"]
    assert (tmp_path / "card.txt").read_text() == "small_cnn\nsmall_cnn\nsmall_cnn"
    config.card.num_lines = 1
    with pytest.raises(InputError, match=r"different: card\.num_lines"):
        do(config, tmp_path)
    config.card.num_lines = 0
    with pytest.raises(InputError, match=r"card\.num_lines must be at least 1, got 0"):
        do(config, tmp_path)
    config.update(phase="train", card={"num_lines": 1})
    assert not do(config, tmp_path, overwrite=True)["card"]
