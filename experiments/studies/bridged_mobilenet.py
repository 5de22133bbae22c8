"""A converted PyTorch model, hardened end to end: torchvision's MobileNet v2 on CIFAR-10.

    python experiments/studies/bridged_mobilenet.py --data_dir=DIR

Converts an untrained MobileNet v2 with 10 classes at 64x64 pixels through torch.export, trains it
briefly here (batch normalisation updated, so training mode of a converted graph is what is shown),
measures sampled directions, hardens it, measures them again, and takes the weights home into the
PyTorch module, whose accuracy is measured there. Needs torchvision. On two CPU cores about half an
hour. The images are CIFAR-10's, enlarged.
"""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from moth_jax import MothConfig, data, harden
from moth_jax.data import ImageDataset, ImageSplit
from moth_jax.distance import measure
from moth_jax.distance.matrix import relative_increase
from moth_jax.evaluation import accuracy
from moth_jax.inversion import NeuralCleanse
from moth_jax.models import from_torch
from moth_jax.models.weights import exporting
from moth_jax.parallel import devices
from moth_jax.run.origin import origin, processor
from moth_jax.training import TrainingConfig, train

DATA_DIR = flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "Folder of TFDS data sets.")
OUT = flags.DEFINE_string("out", "experiments/results/bridged_mobilenet", "Where the result goes.")
EPOCHS = flags.DEFINE_integer("epochs", 12, "Of the training.")
STEPS = flags.DEFINE_integer("harden_steps", 120, "Of the hardening.")
DIRECTIONS = flags.DEFINE_integer("directions", 8, "How many directions are measured.")
INVERSION_STEPS = flags.DEFINE_integer("inversion_steps", 120, "Of each inversion.")
SIZE = 64


def enlarged(split: ImageSplit) -> ImageSplit:
    """Return the images twice as large, each pixel four times."""
    return ImageSplit(split.images.repeat(2, axis=1).repeat(2, axis=2), split.labels)


def cifar10() -> ImageDataset:
    small = data.load("cifar10", dir=DATA_DIR.value)
    parts = {name: enlarged(getattr(small, name)) for name in ("train", "validation", "test")}
    return ImageDataset(
        "cifar10 at 64 px",
        **parts,
        class_names=small.class_names,
        mean=small.mean,
        std=small.std,
        flip=True,
        shift=8,
    )


def torch_accuracy(module, spec, split: ImageSplit) -> float:
    """Return the accuracy of the PyTorch module itself."""
    import torch

    right = 0
    with torch.no_grad():
        for first in range(0, len(split), 256):
            indices = np.arange(first, min(first + 256, len(split)))
            images = (split.batch(indices) - np.float32(spec.mean)) / np.float32(spec.std)
            logits = module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
            right += int((logits.argmax(1).numpy() == split.labels[indices]).sum())
    return right / len(split)


def main(_) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import torch

    from tests.helpers.torchvision_shim import torchvision

    devices.use_all_cores()
    torch.manual_seed(0)
    dataset = cifar10()
    module = torchvision.models.mobilenet_v2(num_classes=10)
    clock = time.perf_counter()
    seconds = {}

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()
        print(f"{name}: {seconds[name]:.0f} s", flush=True)

    classifier, variables = from_torch(
        module,
        image_shape=(SIZE, SIZE, 3),
        mean=dataset.mean,
        std=dataset.std,
        class_names=dataset.class_names,
    )
    lap("convert")
    options = TrainingConfig(epochs=EPOCHS.value, batch_size=64, learning_rate=0.05)
    trained = train(classifier, variables, dataset, options)
    lap("train")
    test = dataset.test
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    chosen = np.random.default_rng(0).choice(len(pairs), DIRECTIONS.value, replace=False)

    def measured(variables):
        return measure.distance_matrix(
            classifier.predict,
            test.batch(np.arange(len(test))),
            test.labels,
            variables=variables,
            class_names=dataset.class_names,
            directions=[pairs[i] for i in sorted(chosen)],
            num_images=32,
            num_steps=INVERSION_STEPS.value,
            inversion=NeuralCleanse(),
        )

    before = measured(trained)
    lap("measure before")
    options = MothConfig(
        max_steps=STEPS.value,
        max_accuracy_drop=0.1,
        batch_size=64,
        warmup_steps=30,
        first_steps=40,
        next_steps=15,
        stamp_share=0.25,
        learning_rate=2e-3,
        schedule="cosine",
        victims_per_class=16,
    )
    state = harden(classifier, trained, dataset, options)
    lap("harden")
    after = measured(state.kept)
    lap("measure after")
    arrays = exporting.state_dict(classifier, state.kept)
    module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in arrays.items()}, strict=True)
    result = {
        **origin(),
        "device": f"{processor()}, {jax.device_count()} devices",
        "seed": 0,
        "epochs": EPOCHS.value,
        "harden_steps": state.kept_step,
        "accuracy_before": accuracy(classifier.predict, trained, test),
        "accuracy_after": accuracy(classifier.predict, state.kept, test),
        "accuracy_after_in_pytorch": torch_accuracy(module.eval(), classifier.spec, test),
        "distance_before": before.average(),
        "distance_after": after.average(),
        "increase": relative_increase(before, after),
        "not_found": [before.num_failures(), after.num_failures()],
        "directions": [
            [
                dataset.class_names[a],
                dataset.class_names[b],
                float(before.values[a, b]),
                float(after.values[a, b]),
            ]
            for a, b in (pairs[i] for i in sorted(chosen))
        ],
        "seconds": seconds,
    }
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "bridged_mobilenet.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "directions"}, indent=2))


if __name__ == "__main__":
    app.run(main)
