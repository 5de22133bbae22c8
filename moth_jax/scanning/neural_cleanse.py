"""Neural Cleanse: is one class much easier to reach than the others? (Wang et al., S&P 2019)

For every target one universal trigger is inverted, which sends images of all other classes to it.
A universal backdoor is a shortcut to its target, whose trigger is far smaller than the others'.

Note: Sizes are of verified triggers. The published code takes the last mask whose minibatches
  reached 99 % while it moved, and a failed inversion as a mask of ones.
"""

import functools
from pathlib import Path

from moth_jax.distance.chunks import chunk_size, measure_all, measurer
from moth_jax.distance.store import ChunkStore
from moth_jax.progress import Progress
from moth_jax.scanning.anomaly import with_anomaly_indices
from moth_jax.scanning.base import Evidence, Suspect, inversion_of
from moth_jax.scanning.options import ScanOptions


def search(
    suspect: Suspect, options: ScanOptions, resume_dir: Path | None, progress: Progress
) -> Evidence:
    """Invert the universal trigger of every class; the suspicion is the anomaly index."""
    arms = suspect.universal_arms()
    counts = suspect.num_samples(arms, options)
    size = chunk_size(options.arms_per_chunk or None, len(arms), 1)
    inversion = inversion_of(options)
    budget = {
        "num_steps": options.num_steps,
        "minibatch_size": options.minibatch_size,
        "mask_weight": options.mask_weight,
        "seeds": [options.seed],
    }
    draw = functools.partial(suspect.draw, options, int(counts.max()))
    by = measurer(suspect.logits_fn, suspect.variables, draw, inversion=inversion, **budget)
    asked = {**budget, "inversion": inversion.name, "num_images": options.num_images}
    model = suspect.seen if suspect.variables is None else suspect.variables
    store = ChunkStore(resume_dir, asked, (suspect.images, suspect.labels, model))
    with progress.task("universal triggers", total=len(arms), unit="targets") as task:
        found = measure_all(arms, size, by, store, task, fit=not options.arms_per_chunk)
    rows = [
        suspect.arm(*arm, sizes[0], rates[0])
        for arm, sizes, rates in zip(arms, found.sizes, found.rates, strict=True)
    ]
    rows, reason = with_anomaly_indices(rows)
    return Evidence(
        rows,
        found.trigger,
        int(options.num_steps * counts.sum()),
        reason,
    )
