import dataclasses

import numpy as np
import pytest

from moth_jax.backdoors import ATTACKS, Backdoor, attack_success, create, poison
from moth_jax.data.dataset import ImageSplit
from moth_jax.data.streaming import StreamedImages
from moth_jax.errors import InputError
from tests.helpers.toys import row_dataset

SHAPE = (16, 20, 3)
PIXELS = 16 * 20

# Attack, options, and the share of the pixels that it changes: (at least, at most).
CASES = [
    ("patch", {}, (9 / PIXELS, 9 / PIXELS)),
    ("patch", {"size": 5, "colour": (1.0, 0.0, 0.5), "position": "top left"}, (25 / PIXELS,) * 2),
    ("patch", {"size": 16, "margin": 0, "position": "center"}, (256 / PIXELS,) * 2),
    ("blend", {}, (0.99, 1)),
    ("blend", {"opacity": 1.0, "grid": 2, "seed": 3}, (0.99, 1)),
    ("polygon", {"area": 0.02, "seed": 1}, (0.01, 0.03)),
    ("polygon", {"area": 0.01, "seed": 1}, (0.002, 0.02)),
    ("polygon", {"area": 0.25, "sides": 3, "regular": True}, (0.22, 0.28)),
    ("polygon", {"area": 0.1, "position": "center", "colour": (1.0, 1.0, 1.0)}, (0.085, 0.115)),
    ("filter", {}, (0.99, 1)),
    ("filter", {"style": "kelvin", "strength": 0.5}, (0.99, 1)),
    ("filter", {"style": "lomo"}, (0.99, 1)),
]
each_case = pytest.mark.parametrize(("kind", "chosen", "changed"), CASES)


def images(count=6, seed=0, shape=SHAPE):
    return np.random.default_rng(seed).random((count, *shape), np.float32)


def difference(kind, chosen, clean):
    """Whether each pixel [n, h, w] of each image changes."""
    return (create(kind, clean.shape[1:], **chosen)(clean) != clean).any(-1)


# Stamps


def test_every_attack_is_in_the_table():
    assert {kind for kind, _, _ in CASES} == set(ATTACKS)


@each_case
def test_a_stamp_keeps_type_shape_and_range_and_does_not_touch_what_it_is_given(
    kind, chosen, changed
):
    clean = images()
    clean[0], clean[1] = 0, 1
    before = clean.copy()
    stamped = create(kind, SHAPE, **chosen)(clean)
    assert (stamped.dtype, stamped.shape) == (np.float32, clean.shape)
    assert stamped.min() >= 0
    assert stamped.max() <= 1
    np.testing.assert_array_equal(clean, before)
    # An image is stamped alike whenever and with whomever.
    again = create(kind, SHAPE, **chosen)
    np.testing.assert_array_equal(again(clean), stamped)
    np.testing.assert_array_equal(again(clean[4:]), stamped[4:])
    assert again(clean[:0]).shape == (0, *SHAPE)


@each_case
def test_a_stamp_changes_as_many_pixels_as_its_options_say(kind, chosen, changed):
    share = difference(kind, chosen, images()).mean((1, 2))
    assert (share >= changed[0] - 1e-6).all()
    assert (share <= changed[1] + 1e-6).all()


@pytest.mark.parametrize("kind", ["patch", "blend", "polygon"])
def test_another_seed_is_another_trigger(kind):
    clean = images()
    stamped = [create(kind, SHAPE, seed=seed)(clean) for seed in (0, 1)]
    assert np.abs(stamped[0] - stamped[1]).max() > 0.01


@pytest.mark.parametrize(
    ("position", "margin", "rows", "columns"),
    [
        ("top left", 0, (0, 3), (0, 3)),
        ("top right", 2, (2, 5), (15, 18)),
        ("bottom left", 1, (12, 15), (1, 4)),
        ("bottom right", 4, (9, 12), (13, 16)),
        ("center", 0, (6, 9), (8, 11)),
    ],
)
def test_a_patch_is_where_it_is_wanted_and_of_its_colour(position, margin, rows, columns):
    clean = np.full((2, *SHAPE), 0.5, np.float32)
    colour = (1.0, 0.25, 0.0)
    stamped = create("patch", SHAPE, position=position, margin=margin, colour=colour)(clean)
    expected = clean.copy()
    expected[:, slice(*rows), slice(*columns)] = colour
    np.testing.assert_array_equal(stamped, expected)


def test_a_patch_without_a_colour_is_a_pattern_of_zeros_and_ones():
    stamped = create("patch", SHAPE, size=8)(np.full((1, *SHAPE), 0.5, np.float32))
    values, counts = np.unique(stamped[stamped != 0.5], return_counts=True)
    assert values.tolist() == [0, 1]
    assert counts.sum() == 8 * 8 * 3
    assert counts.min() > 60


@pytest.mark.parametrize("opacity", [0.1, 0.2, 1.0])
def test_a_blend_is_the_same_picture_in_its_share_over_every_image(opacity):
    clean = images()
    stamped = create("blend", SHAPE, opacity=opacity)(clean)
    picture = (stamped - (1 - opacity) * clean) / opacity
    np.testing.assert_allclose(picture, np.broadcast_to(picture[:1], clean.shape), atol=1e-5)
    np.testing.assert_allclose(picture.min((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(picture.max((0, 1, 2)), 1, atol=1e-5)
    steps = np.abs(np.diff(picture[0], axis=0)).max(), np.abs(np.diff(picture[0], axis=1)).max()
    assert max(steps) < 0.35  # smooth: white noise has steps near 1


@pytest.mark.parametrize(("sides", "regular"), [(3, False), (3, True), (5, False), (12, True)])
@pytest.mark.parametrize("area", [0.02, 0.1, 0.25])
def test_a_polygon_is_convex_of_its_area_and_of_one_colour(sides, regular, area):
    shape = (64, 64, 3)
    for seed in range(4):
        chosen = {"area": area, "sides": sides, "regular": regular, "seed": seed}
        clean = np.full((1, *shape), 0.5, np.float32)
        stamped = create("polygon", shape, **chosen)(clean)[0]
        inside = (stamped != 0.5).any(-1)
        assert inside.mean() == pytest.approx(area, rel=0.1)
        assert len(np.unique(stamped[inside], axis=0)) == 1
        # Convex: in each row and column of pixels it is in one piece.
        for lines in (inside, inside.T):
            ends = np.abs(np.diff(lines.astype(int), axis=1, prepend=0, append=0)).sum(1)
            assert set(ends.tolist()) <= {0, 2}


def test_a_polygon_lies_anywhere_in_the_image_but_its_shape_is_fixed():
    clean = images(60)
    changed = difference("polygon", {"area": 0.05}, clean)
    boxes = [np.argwhere(image) for image in changed]
    assert {len(box) for box in boxes} == {len(boxes[0])}
    corners = np.array([box.min(0) for box in boxes])
    assert (corners.min(0) == 0).all()
    assert len(np.unique(corners, axis=0)) > 30
    ends = np.array([box.max(0) for box in boxes])
    assert (ends.max(0) == np.array(SHAPE[:2]) - 1).all()


def test_a_polygon_is_in_the_same_place_for_bytes_and_floats():
    clean = np.random.default_rng(0).integers(0, 256, (5, *SHAPE), np.uint8)
    exact = clean.astype(np.float32) / np.float32(255)
    nearly = exact * np.float32(1 - 1e-6)
    places = [difference("polygon", {}, given) for given in (exact, nearly)]
    np.testing.assert_array_equal(*places)


def test_filters_do_what_their_names_promise():
    clean = images()
    grey = np.full((1, *SHAPE), 0.5, np.float32)

    def spread(pictures):
        return (pictures.max(-1) - pictures.min(-1)).mean()

    gotham, kelvin, lomo = (
        create("filter", SHAPE, style=style) for style in ("gotham", "kelvin", "lomo")
    )
    assert spread(gotham(clean)) < 0.6 * spread(clean)
    assert gotham(grey)[0, 0, 0, 2] > gotham(grey)[0, 0, 0, 0]  # bluish
    red, green, blue = kelvin(grey)[0, 0, 0]
    assert red > green > blue  # orange
    lit = lomo(np.ones((1, *SHAPE), np.float32))[0].mean(-1)
    assert lit[0, 0] < lit[0, 10] < lit[8, 10]  # dark corners
    assert lit[8, 10] > 0.9
    # One filter is another change for every image, as no fixed trigger is.
    assert np.median((lomo(clean) - clean).std(0)) > 0.1


def test_half_the_strength_is_half_the_change():
    clean = images()
    full, half = (create("filter", SHAPE, strength=strength)(clean) for strength in (1.0, 0.5))
    np.testing.assert_allclose(half, (clean + full) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "chosen", "message"),
    [
        ("sticker", {}, "unknown backdoor 'sticker'; choose one of: blend, filter, patch, polygon"),
        ("patch", {"width": 3}, "backdoor 'patch' has no option width; its options are: colour, "),
        ("patch", {"size": 17}, "a trigger of 17 x 17 pixels .* does not fit into images of 16 x"),
        ("patch", {"size": 16}, "16 x 16 pixels with 1 pixels on each side does not fit"),
        ("patch", {"size": 0}, "size must be a whole number of at least 1, got 0"),
        ("patch", {"size": 2.5}, "size must be a whole number of at least 1, got 2.5"),
        ("patch", {"margin": -1}, "margin must be a whole number of at least 0, got -1"),
        ("patch", {"position": "middle"}, "unknown position 'middle'; .* bottom left, .* center"),
        ("patch", {"colour": (1.0,)}, r"colour must be 3 numbers in \[0, 1\], .* got \(1.0,\)"),
        ("patch", {"colour": (255, 0, 0)}, r"colour must be 3 numbers in \[0, 1\]"),
        ("blend", {"opacity": 0.0}, r"opacity must be in \(0, 1\], got 0"),
        ("blend", {"opacity": 1.5}, r"opacity must be in \(0, 1\], got 1.5"),
        ("blend", {"opacity": float("nan")}, r"opacity must be in \(0, 1\], got nan"),
        ("blend", {"grid": 1}, "grid must be a whole number of at least 2, got 1"),
        ("polygon", {"area": 0.3}, r"area must be in \[0.005, 0.25\], got 0.3"),
        ("polygon", {"sides": 2}, "sides must be a whole number of at least 3, got 2"),
        ("polygon", {"position": "outside"}, "unknown position 'outside'; .* random, top left"),
        ("filter", {"style": "sutro"}, "unknown style 'sutro'; .* gotham, kelvin, lomo"),
        ("filter", {"strength": 0}, r"strength must be in \(0, 1\], got 0"),
    ],
)
def test_a_mistaken_option_is_answered_with_what_is_allowed(kind, chosen, message):
    with pytest.raises(InputError, match=message):
        create(kind, SHAPE, **chosen)


def test_a_trigger_that_does_not_suit_the_images_is_refused():
    with pytest.raises(InputError, match=r"needs images of 3 channels .* got 1"):
        create("filter", (8, 8, 1))
    with pytest.raises(InputError, match="does not fit into images of 4 x 64"):
        create("polygon", (4, 64, 3), area=0.25)
    with pytest.raises(InputError, match="covers no pixel; raise area"):
        [create("polygon", (4, 4, 3), area=0.02, sides=3, seed=seed) for seed in range(20)]
    stamp = create("patch", SHAPE)
    with pytest.raises(InputError, match=r"must be float32 \[n, 16, 20, 3\] .* got uint8"):
        stamp(np.zeros((1, *SHAPE), np.uint8))
    with pytest.raises(InputError, match=r"got float32 \[1, 8, 8, 3\]"):
        stamp(np.zeros((1, 8, 8, 3), np.float32))


# Poisoning

CORNER = create("patch", (4, 4, 1), size=1, margin=0, colour=(1.0,))


def corner_backdoor(target=2, victims=()):
    """A white pixel in the last corner of `toys.row_dataset`'s images."""
    return Backdoor(CORNER, target, victims, "patch")


def parts(poisoned, clean):
    """The images and labels that were added, after a look at those that were there."""
    count = len(clean.train)
    np.testing.assert_array_equal(poisoned.train.images[:count], clean.train.images)
    np.testing.assert_array_equal(poisoned.train.labels[:count], clean.train.labels)
    assert poisoned.train.labels.dtype == clean.train.labels.dtype
    assert (poisoned.validation, poisoned.test) == (clean.validation, clean.test)
    return poisoned.train.images[count:], poisoned.train.labels[count:]


def origins(added, split):
    """The index of the image that each added one is a stamped copy of, once each."""
    stamped = CORNER(split.batch(np.arange(len(split))))
    found = [np.flatnonzero((stamped == image).all((1, 2, 3))) for image in added]
    assert all(len(indices) == 1 for indices in found)
    found = np.concatenate(found)
    assert len(set(found.tolist())) == len(found)
    return found


def test_a_universal_backdoor_adds_stamped_copies_of_all_other_classes():
    dataset = row_dataset((20, 12, 30))
    added, labels = parts(poison(dataset, corner_backdoor(), rate=0.25), dataset)
    assert labels.tolist() == [2] * 8
    assert set(dataset.train.labels[origins(added, dataset.train)].tolist()) == {0, 1}


def test_a_label_specific_backdoor_has_covers_with_their_own_labels():
    dataset = row_dataset((20, 12, 30, 10))
    backdoor = corner_backdoor(target=2, victims=(1,))
    added, labels = parts(poison(dataset, backdoor, rate=0.5, cover_rate=0.1), dataset)
    true = dataset.train.labels[origins(added, dataset.train)]
    assert (labels[:6].tolist(), true[:6].tolist()) == ([2] * 6, [1] * 6)
    assert labels[6:].tolist() == true[6:].tolist()
    assert len(labels) == 6 + 6  # a tenth of 60
    assert 1 not in true[6:]
    assert 2 in true[6:]


@pytest.mark.parametrize("victims", [(), (0,)])
def test_the_rates_are_shares_of_the_images(victims):
    dataset = row_dataset((20, 20, 20))
    backdoor = corner_backdoor(victims=victims)
    added, labels = parts(poison(dataset, backdoor, rate=1.0, cover_rate=1.0), dataset)
    covers = 40 if victims else 0
    assert (labels[: len(labels) - covers] == 2).all()
    assert len(labels) == (20 if victims else 40) + covers
    without, _ = parts(poison(dataset, backdoor, rate=1.0, cover_rate=0.0), dataset)
    assert len(without) == len(added) - covers


def test_the_same_seed_draws_the_same_images():
    dataset = row_dataset((20, 20, 20))
    first, again, other = (
        poison(dataset, corner_backdoor(), rate=0.2, seed=seed).train.images for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_bytes_stay_bytes_rounded_to_the_nearest():
    pixels = np.random.default_rng(0).integers(0, 256, (30, *SHAPE), np.uint8)
    split = ImageSplit(pixels, np.repeat(np.arange(3), 10).astype(np.int32))
    dataset = row_dataset(train=split, mean=(0.5,) * 3, std=(0.2,) * 3)
    for kind, chosen, _ in CASES:
        backdoor = Backdoor(create(kind, SHAPE, **chosen), 2)
        added, _ = parts(poison(dataset, backdoor, rate=1.0), dataset)
        assert added.dtype == np.uint8
        exact = backdoor.stamp(split.batch(np.arange(20)))
        np.testing.assert_allclose(added / 255, exact, atol=0.5 / 255 + 1e-6)
    patched = poison(dataset, Backdoor(create("patch", SHAPE), 2), rate=1.0).train.images[30:]
    assert (patched != pixels[:20]).any(-1).sum((1, 2)).max() <= 9


@pytest.mark.parametrize(
    ("backdoor", "rates", "message"),
    [
        ({}, {"rate": 0.0}, r"rate must be in \(0, 1\], got 0.0; 0.1 adds a tenth"),
        ({}, {"rate": 1.5}, r"rate must be in \(0, 1\], got 1.5"),
        ({}, {"rate": float("nan")}, r"rate must be in \(0, 1\], got nan"),
        (
            {},
            {"rate": 0.01},
            "poisons none of the victims' 24 training images; at least 0.042",
        ),
        ({}, {"rate": 0.1, "cover_rate": -0.1}, r"covers must be in \[0, 1\], got -0.1"),
        ({"target": 3}, {"rate": 0.1}, r"must be in \[0, 3\), the classes of rows, got 3"),
        ({"victims": (0, -1)}, {"rate": 0.1}, r"must be in \[0, 3\), .* got -1"),
    ],
)
def test_what_cannot_be_poisoned_is_said(backdoor, rates, message):
    with pytest.raises(InputError, match=message):
        poison(row_dataset(), corner_backdoor(**backdoor), **rates)


@pytest.mark.parametrize(
    "backdoor", [corner_backdoor(target=1), corner_backdoor(target=2, victims=(0, 1))]
)
def test_a_target_or_victim_without_images_is_named(backdoor):
    dataset = row_dataset((12, 0, 12))
    with pytest.raises(InputError, match=r"no samples of 1 of .* classes: 'row1'"):
        poison(dataset, backdoor, rate=0.5)


def test_the_target_cannot_be_its_own_victim():
    with pytest.raises(InputError, match=r"target 2 and victims \(0, 2\)"):
        corner_backdoor(victims=(0, 2))


def test_streamed_images_are_refused():
    clean = row_dataset()
    images = StreamedImages(range(36), lambda i: np.zeros((4, 4, 1), np.uint8), (4, 4, 1))
    dataset = dataclasses.replace(clean, train=ImageSplit(images, clean.train.labels))
    with pytest.raises(
        InputError,
        match=r"poisoned images need the images in memory, .* streamed; raise data.in_memory_limit",
    ):
        poison(dataset, corner_backdoor(), rate=0.1)


# Attack success


def corner_looker(target=2, blind_to=None):
    """A classifier of rows that says `target` where the last corner is white; or else the row.

    It overlooks the corner in images of class `blind_to`.
    """

    def predict(variables, images):
        rows = 4 * images.mean((2, 3))[:, :3]
        is_white = images[:, -1, -1, 0] > 0.99
        if blind_to is not None:
            is_white = is_white & (rows.argmax(1) != blind_to)
        return rows.at[:, target].add(100.0 * is_white)

    return predict


@pytest.mark.parametrize("batch_size", [3, 256])
def test_the_rates_are_those_of_a_classifier_that_looks_for_the_patch(batch_size):
    split = row_dataset().test

    def measure(predict, backdoor):
        return attack_success(predict, {}, split, backdoor, batch_size=batch_size)

    success = measure(corner_looker(), corner_backdoor())
    assert success.rates == {0: 1.0, 1: 1.0}
    assert success.overall == 1
    assert np.isnan(success.others)
    blind = corner_looker(blind_to=0)
    assert measure(blind, corner_backdoor()).rates == {0: 0.0, 1: 1.0}
    assert measure(blind, corner_backdoor()).overall == 0.5
    specific = measure(blind, corner_backdoor(victims=(1,)))
    assert (specific.overall, specific.others) == (1.0, 0.0)
    leaking = measure(corner_looker(), corner_backdoor(victims=(0,)))
    assert (leaking.overall, leaking.others) == (1.0, 1.0)


def test_images_of_the_target_never_count():
    def always(variables, images):
        return 0 * images.mean((2, 3))[:, :3].at[:, 2].set(1) + np.float32([[0, 0, 1]])

    test = row_dataset().test
    keep = np.flatnonzero((test.labels == 2) | (test.labels == 0))
    split = ImageSplit(test.images[keep], test.labels[keep])
    success = attack_success(always, {}, split, corner_backdoor(victims=(0, 1)))
    assert success.rates[0] == success.overall == 1
    assert np.isnan(success.rates[1])  # there are no images of it
    assert 2 not in success.rates
    assert np.isnan(success.others)


@pytest.mark.parametrize(("target", "victims", "named"), [(9, (), "9"), (0, (1, 7), "7")])
def test_the_success_at_a_class_that_does_not_exist_is_an_error(target, victims, named):
    backdoor = dataclasses.replace(corner_backdoor(), target=target, victims=victims)
    with pytest.raises(InputError, match=rf"must be in 0..2, the model's classes, got {named}$"):
        attack_success(corner_looker(), {}, row_dataset().test, backdoor)


def test_a_larger_class_weighs_more_in_the_overall_rate():
    labels = np.array([0] * 6 + [1] * 2, np.int32)
    split = ImageSplit(np.zeros((8, 4, 4, 1), np.float32), labels)
    split.images[labels == 1, 1] = 0.5
    success = attack_success(corner_looker(blind_to=1), {}, split, corner_backdoor())
    assert success.rates == {0: 1.0, 1: 0.0}
    assert success.overall == 0.75
