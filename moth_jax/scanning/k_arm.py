"""The K-Arm scanner: a shared budget for the arms that look most promising.

    Shen et al.: Backdoor Scanning for Deep Neural Networks through K-Arm Optimization. ICML 2021

Arms are universal targets and pairs (victim, target). The predictions of clean images pre-screen
them. Their inversions go on in turns, a few arms together in each round. An arm is suspect if its
trigger is small. A pair must also be much longer in the reverse direction: two classes that look
alike are near in both directions, an injected backdoor is a shortcut in one.

The published rule, "smaller than the size bound, and ratio above the ratio bound", is one number
here, the suspicion: min(size bound / size, ratio / ratio bound), flagged above 1. Like this it can
be calibrated on clean models.

Note: The published objective is the size's speed of decrease plus 10^4 / size, in pixels of 224x224
  images; here it is the smallest verified size, and universal arms and pairs take turns.
Note: The published success bound is 0.99. Of the few images of one class that means all, which a
  planted trigger that works on 97 % of them does not reach: it is 0.9 here, as for class distances.
Note: Where a universal arm survives the pre-screening the published code looks at it alone, and it
  measures the reverse of the smallest pair alone. Here all arms compete, and the reverse of a few
  pairs is measured: a natural pair of twins must not hide a backdoor behind it.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from moth_jax.distance.subject import Subject
from moth_jax.distance.universal import ArmImages
from moth_jax.progress import Progress
from moth_jax.scanning.bandit import Bandit
from moth_jax.scanning.base import Evidence, Scanner, arm_images, row_of
from moth_jax.scanning.options import ScanOptions
from moth_jax.scanning.prescreening import prescreen
from moth_jax.scanning.result import ANY, Arm


def search(
    subject: Subject, options: ScanOptions, resume_dir: Path | None, progress: Progress
) -> Evidence:
    """Spend the shared budget on the arms that survive the pre-screening.

    It has no parts to resume: `resume_dir` is not used.
    """
    images = arm_images(subject, options)
    arms = prescreen(images, options)
    if not arms:
        return Evidence(
            (), None, 0, "no class is often enough among the top predictions of another's images"
        )
    bandit = Bandit(images, options, arms)
    with progress.task("K-Arm rounds", unit="rounds") as task:
        for chosen in bandit.turns():
            bandit.play(chosen)
            task.advance(1, arms=len(arms), smallest=float(bandit.sizes().min()))
    rows = [
        row_of(images, arm, bandit.size(arm), bandit.rate(arm), options.success_bound)
        for arm in arms
    ]
    telling = [arm for arm, row in zip(arms, rows, strict=True) if not row.there]
    checked = _smallest_pairs(telling, bandit, images.any, options.num_checked)
    back = _reverse_direction(images, options, bandit, checked, progress) if checked else None
    if back is not None:
        for arm, size in zip(checked, back.sizes(), strict=True):
            place = arms.index(arm)
            ratio = float(size / rows[place].size)
            rows[place] = dataclasses.replace(rows[place], ratio=ratio)
    rows = tuple(dataclasses.replace(row, suspicion=suspicion(row, options)) for row in rows)
    triggers = jax.tree.map(lambda *parts: np.stack(parts), *map(bandit.trigger, arms))
    gradients = bandit.num_gradients + (back.num_gradients if back else 0)
    reason = "" if any(row.found for row in rows) else "no trigger was found on any arm"
    return Evidence(rows, triggers, gradients, reason)


def suspicion(arm: Arm, options: ScanOptions) -> float:
    """Return min(size bound / size, ratio / ratio bound), without the ratio for a universal arm.

    It is 0 where none was found, and NaN for a pair whose reverse was not measured and where the
    victims are predicted as the target without a trigger.

    >>> options = ScanOptions(max_pair_size=0.02, min_ratio=10.0)
    >>> suspicion(Arm("cat", "dog", 4.0, 0.01, 1.0, ratio=30.0), options)
    2.0
    >>> suspicion(Arm("cat", "dog", 4.0, 0.01, 1.0, ratio=5.0), options)
    0.5
    """
    if arm.there:
        return float("nan")
    if not arm.found:
        return 0.0
    by_size = options.max_size(arm.victim) / max(arm.relative_size, 1e-9)  # of size 0, too
    return (
        by_size if arm.victim == ANY else float(np.minimum(by_size, arm.ratio / options.min_ratio))
    )


def _smallest_pairs(arms, bandit: Bandit, any_class: int, count: int) -> list[tuple[int, int]]:
    """Return up to `count` pairs with the smallest triggers."""
    pairs = [arm for arm in arms if arm[0] != any_class and np.isfinite(bandit.size(arm))]
    return sorted(pairs, key=bandit.size)[:count]


def _reverse_direction(
    images: ArmImages,
    options: ScanOptions,
    bandit: Bandit,
    pairs: list[tuple[int, int]],
    progress: Progress,
) -> Bandit:
    """Return the inversions of the reversed `pairs`, with as many steps as any of them had.

    As published; a reverse that was not found has infinite size.
    """
    steps = max(bandit.steps(pair) for pair in pairs)
    back = Bandit(images, options, [(b, a) for a, b in pairs], like=bandit)
    rounds = -(-steps // options.steps_per_round)
    with progress.task("ways back", total=rounds, unit="rounds") as task:
        for _ in range(rounds):
            for chosen in back.chunks(back.arms):
                back.play(chosen)
            task.advance(1)
    return back


SCANNER = Scanner(
    search,
    threshold=1.0,
    statistic="suspicion",
    success_bound=0.9,
    explanation=(
        "Targets, and pairs of victim and target, that clean images already lean towards were "
        "searched for small triggers, the most promising ones longest. An arm is suspect if its "
        "trigger is small and, for a pair, the trigger back is much larger: classes that look "
        "alike are near in both directions, an injected backdoor in one."
    ),
)
