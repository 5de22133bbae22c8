"""The published hardening in plain PyTorch, which the benchmark compares with."""

import sys

import numpy as np
import pytest

from moth_jax.hardening.moth_config import MothConfig
from tests.helpers.runs import ROOT

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

NUM_CLASSES, SIDE = 3, 4


@pytest.fixture(scope="module", autouse=True)
def experiments():
    """The folder of the scripts is where they find each other; small arrays need one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "experiments" / "speed"))
    yield
    sys.path.remove(str(ROOT / "experiments" / "speed"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def published():
    import pytorch_hardening

    return pytorch_hardening


@pytest.fixture
def rows():
    """Images [n, 1, 4, 4] whose row `label` is bright, labels, and a model that sees it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % NUM_CLASSES
    images = 0.1 + 0.2 * torch.rand(60, 1, SIDE, SIDE, generator=generator)
    images[torch.arange(60), 0, labels] += 0.6
    linear = torch.nn.Linear(SIDE * SIDE, NUM_CLASSES)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
        for k in range(NUM_CLASSES):
            linear.weight.view(NUM_CLASSES, SIDE, SIDE)[k, k] = 2.0
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(SIDE * SIDE), linear)
    model[1].running_mean.fill_(0.3)
    model[1].running_var.fill_(0.07)
    return model.eval().requires_grad_(False), images, labels


def small(published, **changes):
    options = {
        "num_steps": 7,
        "batch_size": 24,
        "victims": 8,
        "first_steps": 40,
        "next_steps": 10,
        "warmup_steps": 40,
        "shift": 1,
        "flip": False,
        "max_trigger_share": 1.0,
    }
    return published.Options(**{**options, **changes})


def test_every_class_is_warmed_up_and_rounds_have_three_steps(published, rows):
    model, images, labels = rows
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    arms = published.harden(
        model, images, labels, small(published), on_round=lambda *what: seen.append(what)
    )
    assert [phase for phase, _ in seen] == ["warm-up"] * 3 + ["hardening"] * 3
    assert [len(sizes) for phase, sizes in seen if phase == "hardening"] == [6, 6, 2]
    assert all(0 < size <= SIDE * SIDE for _, sizes in seen for size in sizes)
    assert arms.pairwise.sum() in (2, 4, 6)
    assert not arms.pairwise.diagonal().any()
    # It was trained, and is left as inversions need it.
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_failed_inversion_promises_nothing_and_stamps_nothing(published, rows):
    model, images, labels = rows
    # No step, no trigger: the losses before are those of no pass at all.
    arms = published.Arms(np.zeros((3, 3)), np.full((3, 3), np.inf))
    assert not arms.post.any()
    arms.record((0, 1), [float("inf")])
    assert not arms.pairwise.any()
    found = published.invert(model, images[labels == 0], 1, num_steps=1, success_bound=1.0)
    assert found.size == float("inf")


def test_the_arm_with_the_largest_reward_is_selected(published):
    prior = np.zeros((4, 4))
    prior[1, 3] = 0.5
    arms, rng = published.Arms(prior, np.ones((4, 4))), np.random.default_rng(0)
    assert arms.select(0, 0.0, rng) == (1, 3)
    drawn = {arms.select(0, 1.0, rng) for _ in range(100)}
    assert drawn == {(a, b) for a in range(4) for b in range(a + 1, 4)}


def test_a_size_is_compared_with_one_of_the_same_direction_only(published):
    arms = published.Arms(np.zeros((2, 2)), np.full((2, 2), 10.0))
    before = arms.post.copy()
    arms.record((0, 1), [4.0, 6.0])
    np.testing.assert_array_equal(arms.post, before)
    arms.record((0, 1), [10.0])
    assert arms.size[0, 1] == 10.0
    assert arms.post[0, 1] == pytest.approx((1.0 + 1.0) / 2)


def test_images_are_moved_by_whole_pixels_and_what_comes_in_is_black(published):
    images = torch.rand(50, 1, 6, 6)
    options = published.Options(shift=2, flip=False)
    for image, moved in zip(
        images, published.augment(images, options, np.random.default_rng(0)), strict=True
    ):
        places = [
            torch.nn.functional.pad(image, (left, -left, top, -top))
            for left in range(-2, 3)
            for top in range(-2, 3)
        ]
        assert any(torch.equal(moved, place) for place in places)


def test_the_options_are_those_of_the_package(published):
    ours, theirs = MothConfig(), published.Options()
    renamed = {"victims": "victims_per_class", "warmup_images": "warmup_images_per_class"}
    of_the_data = {"num_steps", "flip", "shift"}
    for name, value in theirs._asdict().items():
        if name not in of_the_data:
            assert value == getattr(ours, renamed.get(name, name)), name
    assert theirs.num_steps == ours.num_steps(50_000) + 1  # 781.25: the last batch is a part


def test_it_knows_nothing_of_this_package():
    for name in ("pytorch_hardening", "pytorch_inversion"):
        source = (ROOT / "experiments" / "speed" / f"{name}.py").read_text()
        assert "import moth_jax" not in source
        assert "from moth_jax" not in source
