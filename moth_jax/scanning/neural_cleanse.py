"""Neural Cleanse: is one class much easier to reach than the others? (Wang et al., S&P 2019)

For every target one universal trigger is inverted, which sends images of all other classes to it.
A universal backdoor is a shortcut to its target, whose trigger is far smaller than the others'.

Note: Sizes are of verified triggers. The published code takes the last mask whose minibatches
  reached 99 % while it moved, and a failed inversion as a mask of ones.
"""

from pathlib import Path

from moth_jax.distance.subject import Subject
from moth_jax.distance.universal import universal_triggers
from moth_jax.inversion import Budget
from moth_jax.progress import Progress
from moth_jax.scanning.anomaly import with_anomaly_indices
from moth_jax.scanning.base import Evidence, Scanner, arm_images, inversion_of, row_of
from moth_jax.scanning.options import ScanOptions


def search(
    subject: Subject, options: ScanOptions, resume_dir: Path | None, progress: Progress
) -> Evidence:
    """Invert the universal trigger of every class; the suspicion is the anomaly index."""
    images = arm_images(subject, options)
    found = universal_triggers(
        images,
        budget=Budget(options.num_steps, options.mask_weight, options.minibatch_size),
        inversion=inversion_of(options),
        arms_per_chunk=options.arms_per_chunk,
        resume_dir=resume_dir,
        progress=progress,
    )
    arms = images.universal()
    rows = [
        row_of(images, arm, sizes[0], rates[0], options.success_bound)
        for arm, sizes, rates in zip(arms, found.sizes, found.rates, strict=True)
    ]
    rows, reason = with_anomaly_indices(rows)
    gradients = int(options.num_steps * images.counts(arms).sum())
    return Evidence(rows, found.trigger, gradients, reason)


SCANNER = Scanner(
    search,
    threshold=2.0,  # above it a size is, with 95 % confidence, no draw from the others'
    statistic="anomaly index",
    success_bound=0.99,
    explanation=(
        "For every class the smallest trigger was searched that makes the model take images of "
        "all other classes for it. A backdoor is a shortcut: its target is reached by a far "
        "smaller trigger than the other classes. The anomaly index says by how many deviations "
        "a size lies below the median of all."
    ),
)
