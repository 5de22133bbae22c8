import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.distance import measure
from moth_jax.distance.store import BoundStore, Chunk, ChunkStore
from moth_jax.errors import InputError
from moth_jax.inversion import NeuralCleanse
from moth_jax.storage.files import load_npz, save_npz
from moth_jax.triggers import AddedTrigger, Trigger

IMAGES = (np.arange(6 * 4 * 4, dtype=np.float32) / 128).reshape(6, 4, 4, 1)
LABELS = np.array([0, 1, 2, 0, 1, 2], np.int32)
VARIABLES = {"params": {"scale": np.full(3, 2.0, np.float32)}, "batch_stats": {}}
DIRECTIONS = [(0, 1), (2, 0), (1, 2)]


def with_variables(variables, images):
    return images[:, 0, :3, 0] * variables["params"]["scale"][None]


def closed(images):
    return images[:, 0, :3, 0] * 2.0


# Recorded with version 0.1.0: a chunk that was measured then is found today.
RECORDED = {
    "with variables": ["293075b6a5101f1bf6dea17b.npz", "35a86b3e375108532652ad1d.npz"],
    "closed": ["272806a4013f2f4416b2faa3.npz", "5f15be853d403763d7cebb7d.npz"],
}


@pytest.mark.parametrize("kind", RECORDED)
def test_chunks_are_named_and_laid_out_as_they_always_were(tmp_path, kind):
    logits_fn, model = {
        "with variables": (with_variables, {"variables": VARIABLES}),
        "closed": (closed, {}),
    }[kind]
    budget = {"num_steps": 2, "minibatch_size": 2, "seeds": (0, 3), "directions_per_chunk": 2}
    inversion = NeuralCleanse(patience=3)
    options = {**model, **budget, "inversion": inversion, "progress": False}
    measure.distance_matrix(
        logits_fn, IMAGES, LABELS, directions=DIRECTIONS, resume_dir=tmp_path, **options
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == RECORDED[kind]
    with np.load(tmp_path / RECORDED[kind][0]) as file:
        shapes = {name: array.shape for name, array in file.items()}
    assert shapes == {
        "directions": (2, 2),
        "sizes": (2, 2),
        "rates": (2, 2),
        "mask": (2, 4, 4, 1),
        "pattern": (2, 4, 4, 1),
        "changed_pixels": (2,),
        "seconds": (),
        "of": (),
    }


def a_chunk():
    rng = np.random.default_rng(0)
    return Chunk(
        directions=np.array([[0, 1], [2, 0]]),
        sizes=np.array([[1.5, np.inf], [2.0, 3.0]], np.float32),
        rates=np.array([[0.9, 0.0], [1.0, 1.0]], np.float32),
        trigger=Trigger(rng.random((2, 4, 4, 1)), rng.random((2, 4, 4, 3))),
        changed_pixels=np.array([5.0, np.inf], np.float32),
        seconds=1.25,
    )


def test_a_chunk_that_was_saved_is_loaded_for_its_directions_in_any_company(tmp_path):
    chunk = a_chunk()
    ChunkStore(tmp_path, {"num_steps": 3}, IMAGES).save(chunk)
    store = ChunkStore(tmp_path, {"num_steps": 3}, IMAGES)
    for directions in ([(0, 1), (2, 0)], [(2, 0), (1, 2), (0, 1)]):
        (loaded,) = store.load(directions)
        jax.tree.map(np.testing.assert_array_equal, loaded, chunk)
    (part,) = store.load([(1, 2), (2, 0)])
    assert part.directions.tolist() == [[2, 0]]
    np.testing.assert_array_equal(part.sizes, chunk.sizes[1:])
    np.testing.assert_array_equal(part.trigger.mask, chunk.trigger.mask[1:])
    assert part.seconds == chunk.seconds / 2
    assert store.load([(1, 2)]) == []


def test_a_chunk_of_added_triggers_is_loaded_as_such(tmp_path):
    delta = np.random.default_rng(0).random((2, 4, 4, 3))
    chunk = a_chunk()._replace(trigger=AddedTrigger(delta))
    store = ChunkStore(tmp_path, {}, IMAGES)
    store.save(chunk)
    (loaded,) = store.load([(0, 1), (2, 0)])
    assert isinstance(loaded.trigger, AddedTrigger)
    jax.tree.map(np.testing.assert_array_equal, loaded, chunk)


def test_a_chunk_that_does_not_know_its_changed_pixels_is_loaded_without_them(tmp_path):
    store = ChunkStore(tmp_path, {}, IMAGES)
    store.save(a_chunk())
    (path,) = tmp_path.glob("*.npz")
    arrays = load_npz(path)
    del arrays["changed_pixels"]
    save_npz(path, arrays)
    (loaded,) = store.load([(2, 0)])
    assert np.isnan(loaded.changed_pixels).tolist() == [True]
    np.testing.assert_array_equal(loaded.sizes, a_chunk().sizes[1:])


def test_a_direction_that_is_in_two_chunks_is_loaded_once(tmp_path):
    store = ChunkStore(tmp_path, {}, IMAGES)
    chunk = a_chunk()
    store.save(chunk)
    store.save(jax.tree.map(lambda v: v[::-1] if np.ndim(v) else v, chunk))
    loaded = store.load([(0, 1), (2, 0)])
    assert sum(len(part.directions) for part in loaded) == 2


def test_a_damaged_chunk_is_reported_and_measured_again_once_it_is_removed(tmp_path):
    store = ChunkStore(tmp_path, {}, IMAGES)
    store.save(a_chunk())
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=rf"cannot read {path}: .*; move it away, and its"):
        store.load(DIRECTIONS)
    path.unlink()
    assert store.load(DIRECTIONS) == []


def test_bounds_of_another_victim_or_measurement_are_not_taken_up(tmp_path):
    store = BoundStore(tmp_path, {"certified": 1}, IMAGES)
    store.save(0, [1, 2], np.array([1.0, 2.0]))
    store.save(1, [0, 2], np.array([3.0, 4.0]))
    assert store.load(0, [1, 2]).tolist() == [1, 2]
    assert store.load(0, [1]) is None
    first, second = (tmp_path / store._name([(v, t), (v, 2)]) for v, t in ((0, 1), (1, 0)))
    first.write_bytes(second.read_bytes())
    assert store.load(0, [1, 2]) is None
    assert store.load(1, [0, 2]).tolist() == [3, 4]
    other = BoundStore(tmp_path, {"certified": 2}, IMAGES)
    (tmp_path / other._name([(1, 0), (1, 2)])).write_bytes(second.read_bytes())
    assert other.load(1, [0, 2]) is None


def test_without_a_folder_nothing_is_kept():
    store = ChunkStore(None, {}, IMAGES)
    store.save(a_chunk())
    assert store.load([(0, 1), (2, 0)]) == []


def test_a_model_in_bfloat16_has_a_digest_too(tmp_path):
    def folders_file(value):
        weights = jnp.full(3, value, jnp.bfloat16)
        ChunkStore(tmp_path, {}, {"weights": weights, "none": np.zeros((3, 0))}).save(a_chunk())
        return {path.name for path in tmp_path.glob("*.npz")}

    first = folders_file(1.0)
    assert len(first) == 1
    assert folders_file(1.0) == first
    assert len(folders_file(2.0)) == 2
