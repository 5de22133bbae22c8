import itertools

import jax
import numpy as np
import pytest

from moth_jax.distance import chunks
from moth_jax.distance.store import Chunk, ChunkStore
from moth_jax.distance.subject import Subject
from moth_jax.errors import InputError
from moth_jax.parallel import memory
from moth_jax.progress import silent_progress
from moth_jax.triggers import Trigger
from tests.distance.test_measure import assert_same_matrix, measure
from tests.helpers.toys import RecordedProgress, compilations

GIB = 2.0**30
NINETY = list(itertools.permutations(range(10), 2))
NOTHING_KEPT = ChunkStore(None, {}, ())


# What a program needs, and what there is


def test_a_program_needs_its_arguments_results_and_what_is_between():
    def program(x):
        return jax.numpy.linalg.inv(x @ x.T), x + 1

    compiled = jax.jit(program).lower(np.zeros((100, 50), np.float32)).compile()
    assert 2 * 4 * 100 * 50 + 4 * 100 * 100 <= memory.program_bytes(compiled) < 500_000


def test_the_bytes_of_a_chunk_are_those_of_its_images_and_of_the_inversions(monkeypatch):
    asked = []

    def fitting(wanted, needed, free, rounded):
        asked.append(needed(2))
        return 2

    monkeypatch.setattr(chunks, "fitting_size", fitting)
    jax.clear_caches()
    with compilations() as compiled:
        measure(directions_per_chunk=None)
    images = 2 * 8 * 4 * 4 * 4
    assert images < asked[0] < 100 * images
    # That for the question is the one that measures.
    assert compiled.count("jit(invert_with_seeds)") == 1


def test_images_of_one_direction_are_drawn_to_ask_what_a_chunk_needs(monkeypatch):
    drawn, whole = [], Subject.victims_images

    def victims_images(subject, num_images, directions):
        drawn.append(len(directions))
        return whole(subject, num_images, directions)

    monkeypatch.setattr(Subject, "victims_images", victims_images)
    measure(directions_per_chunk=None)
    assert drawn[0] == 1
    assert sum(drawn) <= 1 + 6


def test_the_free_memory_of_the_host_is_the_least_that_anything_allows(tmp_path):
    meminfo = tmp_path / "meminfo"
    assert memory.host_free_bytes(meminfo, tmp_path) == np.inf
    meminfo.write_text("MemTotal:       16000000 kB\nMemAvailable:    8388608 kB\n")
    assert memory.host_free_bytes(meminfo, tmp_path) == 8 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{int(GIB)}\n")
    assert memory.host_free_bytes(meminfo, tmp_path) == 8 * GIB
    (tmp_path / "memory.max").write_text(f"{int(4 * GIB)}\n")
    assert memory.host_free_bytes(meminfo, tmp_path) == 3 * GIB
    # Of what is used, files that were read before and can be dropped.
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {int(GIB) // 2}\n")
    assert memory.host_free_bytes(meminfo, tmp_path) == 3.5 * GIB
    assert 0 < memory.free_bytes() < np.inf


def test_the_free_memory_of_accelerators_is_that_of_the_fullest(monkeypatch):
    class Device:
        def __init__(self, used):
            self._used = used

        def memory_stats(self):
            return {"bytes_limit": 10 * GIB, "bytes_in_use": self._used * GIB}

    monkeypatch.setattr(memory.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [Device(1), Device(6), Device(2)])
    assert memory.free_bytes() == pytest.approx(0.9 * 4 * GIB)


# Sizes that fit


@pytest.mark.parametrize(
    ("wanted", "free", "size"),
    [(96, 1000, 96), (96, 960, 96), (96, 200, 20), (96, 5, 1), (1, 5, 1), (3, 29, 2)],
)
def test_the_size_is_the_wanted_one_if_it_fits_and_else_as_many_as_do(wanted, free, size):
    assert memory.fitting_size(wanted, lambda n: 10 * n, free) == size


def test_a_size_that_cannot_even_be_compiled_does_not_fit():
    def needed(size):
        if size > 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: while tuning a convolution")
        return size

    assert memory.fitting_size(32, needed, 100.0) == 4


@pytest.mark.parametrize(("devices", "sizes"), [(4, [16, 8, 4, 2, 1]), (3, [12, 6, 3, 1])])
def test_a_smaller_size_is_a_multiple_of_the_devices_while_there_are_enough(
    monkeypatch, devices, sizes
):
    monkeypatch.setattr(memory, "num_devices", lambda: devices)
    for larger, smaller in itertools.pairwise(sizes):
        assert memory.smaller(larger) == smaller


# Memory that runs out all the same


def limited(monkeypatch, most, error=jax.errors.JaxRuntimeError):
    """Let chunks of more than `most` directions exhaust the memory; return the sizes tried."""
    tried, whole = [], chunks.measure_chunk

    def measure_chunk(measurement, directions, size):
        tried.append(size)
        if size > most:
            raise error("RESOURCE_EXHAUSTED: Out of memory allocating 64424509440 bytes.")
        return whole(measurement, directions, size)

    monkeypatch.setattr(chunks, "measure_chunk", measure_chunk)
    return tried


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError, MemoryError])
def test_where_memory_runs_out_the_chunk_is_halved_with_a_warning_and_nothing_is_lost(
    monkeypatch, error
):
    whole = measure(directions_per_chunk=2)
    tried, progress = limited(monkeypatch, 2, error), RecordedProgress()
    with pytest.warns(UserWarning, match="out of memory with 4 at a time, going on with 2") as seen:
        matrix = measure(directions_per_chunk=4, progress=progress)
    assert len(seen) == 1
    assert tried == [4, 2, 2, 2]
    assert progress.advanced == [2, 2, 2]
    assert_same_matrix(matrix, whole)


def test_memory_that_does_not_hold_one_direction_is_an_error_that_says_what_to_lower(monkeypatch):
    limited(monkeypatch, 0)
    with (
        pytest.warns(UserWarning, match="going on with 1"),
        pytest.raises(InputError, match="with 1 at a time; lower num_images, minibatch_size or"),
    ):
        measure()


def test_other_faults_of_a_program_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def measure_chunk(*inputs, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: RESOURCE_EXHAUSTED is not what this is")

    monkeypatch.setattr(chunks, "measure_chunk", measure_chunk)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measure()


@pytest.mark.parametrize(
    ("wanted", "directions", "size"),
    [(None, 200, 67), (None, 90, 90), (None, 97, 49), (96, 97, 96)],
)
def test_chunks_are_equal_so_that_the_last_one_repeats_little(
    monkeypatch, wanted, directions, size
):
    monkeypatch.setattr(chunks.jax, "default_backend", lambda: "gpu")
    assert chunks.chunk_size(wanted, directions, 1) == size
    for module in (chunks, memory):
        monkeypatch.setattr(module, "num_devices", lambda: 4)
    assert chunks.chunk_size(None, 800, 1) == 268  # of 384: three chunks, not two and a rest


def sizes_of_chunks(size, *, fit, store=NOTHING_KEPT, directions=NINETY, fits=80):
    """The sizes of the chunks of 90 directions where memory has room for 80, and what was asked."""
    tried, asked = [], []

    def measure_chunk(measurement, directions, size):
        if size > fits:
            raise MemoryError
        tried.append(size)
        chosen = np.array(directions)
        ones = np.ones((len(chosen), 1))
        trigger = Trigger(np.ones((len(chosen), 2, 2, 1)), np.ones((len(chosen), 2, 2, 1)))
        return Chunk(chosen, ones, ones, trigger, ones[:, 0], seconds=1.0)

    def needed(measurement, directions, size):
        asked.append(size)
        return size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "measure_chunk", measure_chunk)
        patch.setattr(chunks, "chunk_bytes", needed)
        with silent_progress().task("distances", total=len(directions)) as task:
            found = chunks.measure_all(None, directions, size, store, task, fit=fit)
    assert found.directions.tolist() == [list(direction) for direction in directions]
    return tried, asked


def test_chunks_that_had_to_be_smaller_to_fit_are_equal_again(monkeypatch):
    monkeypatch.setattr(chunks, "free_bytes", lambda: 80)
    # 45 and 45, not 80 and ten of 80; and each size asked for is a compilation.
    assert sizes_of_chunks(90, fit=True) == ([45, 45], [90, 45])


def test_a_resumed_measurement_has_chunks_of_what_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(chunks, "free_bytes", lambda: 80)
    store = ChunkStore(tmp_path, {}, np.zeros(1))
    sizes_of_chunks(80, fit=False, store=store, directions=NINETY[:80])
    assert sizes_of_chunks(80, fit=True, store=store) == ([10], [10])
    store = ChunkStore(tmp_path, {"other": 1}, np.zeros(1))
    sizes_of_chunks(80, fit=False, store=store, directions=NINETY[:80])
    assert sizes_of_chunks(80, fit=False, store=store) == ([10], [])


def test_chunks_are_equal_again_after_a_halving_and_as_asked_for_before_it():
    assert sizes_of_chunks(80, fit=False) == ([80, 80], [])
    with pytest.warns(UserWarning, match="out of memory with 64 at a time, going on with 30"):
        assert sizes_of_chunks(64, fit=False, fits=32) == ([30, 30, 30], [])


@pytest.mark.parametrize("devices", [1, 3, 4, 8])
def test_equal_chunks_are_no_more_and_no_larger_and_whole_on_the_devices(monkeypatch, devices):
    monkeypatch.setattr(memory, "num_devices", lambda: devices)
    for size in [*range(1, devices), *range(devices, 13 * devices, devices)]:
        for count in range(1, 100):
            even = memory.equal(size, count)
            assert even <= size
            assert even < devices or even % devices == 0
            assert -(-count // even) == -(-count // size)
            assert memory.equal(even, count) == even
