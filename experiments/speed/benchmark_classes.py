"""Cost of a hardening step over the number of classes: it must not grow with it.

    python experiments/speed/benchmark_classes.py

A small CNN with K outputs and random weights, synthetic classes of 8x8 pixels, the scheduler as
after a warm-up (its K inversions are left out), digits' budgets. For each K: seconds of a step, of
them on the host (selection, batch, bank, records: whatever is not the compiled step), size and
seconds of a checkpoint's arrays. The model's own last layer has K outputs, so that the compiled
part grows a little by itself.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path

from absl import app, flags

from moth_jax.run.origin import origin

CLASSES = flags.DEFINE_list("classes", ["10", "43", "200", "1000"], "Numbers of classes.")
ROUNDS = flags.DEFINE_integer("rounds", 12, "Timed rounds of three steps.", lower_bound=1)
PER_CLASS = flags.DEFINE_integer("per_class", 20, "Training images of a class.")
SIDE = flags.DEFINE_integer("side", 8, "Pixels of an image's side.")
PAIRS = flags.DEFINE_integer("pairs_per_step", 1, "Disjoint pairs hardened together.")
SEED = flags.DEFINE_integer("seed", 0, "Of images, weights and hardening.")
OUT = flags.DEFINE_string("out", "experiments/results/benchmark_classes", "Folder.")

_UNTIMED = 2  # rounds: the first compiles


def synthetic(num_classes: int):
    """Return a data set whose classes are noise around a random image each."""
    import numpy as np

    from moth_jax.data.dataset import ImageDataset, ImageSplit

    rng = np.random.default_rng(SEED.value)
    centres = rng.integers(40, 216, (num_classes, SIDE.value, SIDE.value, 3))

    def split(per_class: int) -> ImageSplit:
        labels = np.repeat(np.arange(num_classes), per_class).astype(np.int32)
        noise = rng.integers(-40, 40, (len(labels), *centres.shape[1:]))
        return ImageSplit((centres[labels] + noise).astype(np.uint8), labels)

    return ImageDataset(
        name=f"synthetic{num_classes}",
        train=split(PER_CLASS.value),
        validation=split(1),
        test=split(1),
        class_names=tuple(f"class{k}" for k in range(num_classes)),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        flip=False,
        shift=0,
    )


def warmed_up(setting, classifier, variables):
    """Return the state of a hardening as after a warm-up, with made-up priors and sizes."""
    import numpy as np

    from moth_jax.hardening import moth, scheduler
    from moth_jax.hardening.trigger_bank import TriggerBank
    from moth_jax.triggers import Trigger

    num_classes, rng = setting.dataset.num_classes, np.random.default_rng(SEED.value)
    prior = rng.random((num_classes, num_classes), np.float32)
    sizes = rng.uniform(5, 50, (num_classes, num_classes)).astype(np.float32)
    bank = TriggerBank()
    for target in range(num_classes):
        mask, pattern = (rng.random((SIDE.value, SIDE.value, c), np.float32) for c in (1, 3))
        bank.keep_universal(target, Trigger(mask, pattern))
    return dataclasses.replace(
        moth._start(setting, classifier, variables),
        scheduler=scheduler.init_state(prior, sizes),
        bank=bank,
        warmed_up=num_classes,
        warmup_sizes=sizes,
        warmup_prior=prior,
    )


def timed(function, clock: list):
    """Return `function`, whose seconds, results and all, are added to `clock`."""
    import jax

    def call(*arguments, **options):
        started = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(function(*arguments, **options))
        clock.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        return result

    return call


def measure(num_classes: int) -> dict:
    """Return the figures of one number of classes."""
    import jax

    from moth_jax import models
    from moth_jax.hardening import moth
    from moth_jax.hardening.moth import MothConfig
    from moth_jax.hardening.rounds import harden_round

    dataset, clock = synthetic(num_classes), []
    classifier, variables = models.create(
        "small_cnn",
        num_classes=num_classes,
        image_shape=dataset.image_shape,
        mean=dataset.mean,
        std=dataset.std,
        seed=SEED.value,
    )
    config = MothConfig(
        max_steps=3 * (ROUNDS.value + _UNTIMED),
        first_steps=60,
        next_steps=20,
        batch_norm="frozen",
        pairs_per_step=PAIRS.value,
        seed=SEED.value,
    )
    setting = moth._setting(classifier, dataset, config)
    programs = dataclasses.replace(setting.programs, step=timed(setting.programs.step, clock))
    setting = setting._replace(programs=programs)
    state = warmed_up(setting, classifier, variables)
    rounds = []
    for _ in range(ROUNDS.value + _UNTIMED):
        clock.clear()
        started = time.perf_counter(), time.process_time()
        state, records = harden_round(setting, state)
        spent = time.perf_counter() - started[0], time.process_time() - started[1]
        compiled = [sum(part) for part in zip(*clock, strict=True)]
        rounds.append([*spent, *compiled, len(records)])
    started = time.perf_counter()
    arrays, _ = state.to_arrays()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    steps = [
        {
            "step": whole / count,
            "step_cpu": whole_cpu / count,
            "host": (whole - step) / count,
            "host_cpu": max(whole_cpu - step_cpu, 0.0) / count,
        }
        for whole, whole_cpu, step, step_cpu, count in rounds[_UNTIMED:]
    ]
    return {
        **{
            f"{name}_seconds": statistics.median(figures[name] for figures in steps)
            for name in steps[0]
        },
        "checkpoint_bytes": size,
        "checkpoint_arrays_seconds": time.perf_counter() - started,
    }


def main(argv):
    del argv
    import jax

    started = time.perf_counter()
    results = {}
    print("         a step            of it on the host   checkpoint's")
    print("classes    wall       CPU      wall       CPU        arrays")
    for num_classes in map(int, CLASSES.value):
        figures = results[num_classes] = measure(num_classes)
        times = (figures[f"{name}_seconds"] for name in ("step", "step_cpu", "host", "host_cpu"))
        row = "".join(f"{1e3 * seconds:7.2f} ms" for seconds in times)
        print(f"{num_classes:7}{row}{figures['checkpoint_bytes'] / 2**20:10.1f} MB", flush=True)
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        **origin(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seeds": [SEED.value],
        "rounds": ROUNDS.value,
        "pairs_per_step": PAIRS.value,
        "wall_seconds": time.perf_counter() - started,
        "jax": jax.__version__,
        "results": results,
    }
    name = f"{jax.default_backend()}{'' if PAIRS.value == 1 else f'_{PAIRS.value}_pairs'}.json"
    (out / name).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
