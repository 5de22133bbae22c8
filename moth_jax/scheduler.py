"""The K-arm scheduler: which class pair to harden next (Section IV-C).

K(K-1)/2 arms, one for each pair of classes. The reward of an arm joins the prior (how far the
warm-up's universal triggers lowered each class's loss) and the post matrix (how much the pair's
distances grew when it was last hardened). Pure functions on NumPy arrays, on the host: the state is
O(K^2) small numbers and is saved with the model.
"""

from typing import NamedTuple

import numpy as np

from moth_jax.errors import InputError


class KArmState(NamedTuple):
    """State of the scheduler; each field [K, K], row victim, column target.

    Attributes:
      prior: mean relative fall of the loss under the warm-up's trigger, at most 1.
      post: how promising further hardening looks from what it did so far.
      size: mean trigger size of the last round; the warm-up's before the first.
      pairwise: whether `size` comes from the direction's own trigger, not a universal one.
      num_selected: rounds in which the pair was selected (symmetric).
    """

    prior: np.ndarray
    post: np.ndarray
    size: np.ndarray
    pairwise: np.ndarray
    num_selected: np.ndarray


def init_state(prior: np.ndarray, sizes: np.ndarray, *, pairwise: bool = False) -> KArmState:
    """Return the state after the warm-up.

    Args:
      prior: [K, K] relative fall of the loss; 0 where the inversion failed.
      sizes: [K, K] size of the trigger of each direction; inf where the inversion failed.
      pairwise: whether `sizes` are of the directions' own triggers (warm-up without approximation).

    Note: A failed inversion says nothing of how far a pair can be pushed: its prior and post are 0,
      so that rewards of other arms, not an accident, decide. The published code let one failure
      make raw sizes the rewards.
    """
    found = np.isfinite(sizes) & ~np.eye(len(sizes), dtype=bool)
    largest = sizes[found].max(initial=0.0)
    scale = largest if largest > 0 else 1.0
    return KArmState(
        prior=np.where(found, prior, 0.0),
        post=np.where(found, np.where(found, sizes, 0.0) / scale, 0.0),
        size=np.where(found, sizes, np.inf),
        pairwise=found & pairwise,
        num_selected=np.zeros(sizes.shape, np.int64),
    )


def rewards(state: KArmState, num_steps: int) -> np.ndarray:
    """Return [K, K], symmetric: (1 - α)(prior + priorᵀ) + α(post + postᵀ), α = min(t / 1000, 1).

    The diagonal is -inf: it is no arm. `num_steps` is t, the main training steps so far.
    """
    alpha = min(0.1 * num_steps / 100, 1.0)
    reward = (1 - alpha) * (state.prior + state.prior.T) + alpha * (state.post + state.post.T)
    return np.where(np.eye(len(reward), dtype=bool), -np.inf, reward)


def select_pairs(
    state: KArmState,
    num_steps: int,
    rng: np.random.Generator,
    *,
    num_pairs: int = 1,
    random_share: float = 0.3,
) -> list[tuple[int, int]]:
    """Return `num_pairs` disjoint pairs (a, b), a < b, for the next round.

    Each is a random arm with probability `random_share`, else the arm with the largest reward among
    those that share no class with the pairs chosen before it.

    Note: The paper takes one pair a round. More are an extension for many classes.
    """
    num_classes = len(state.prior)
    if not 1 <= num_pairs <= num_classes // 2:
        raise InputError(
            f"pairs per step must be in 1..{num_classes // 2} for {num_classes} classes, "
            f"got {num_pairs}"
        )
    reward = rewards(state, num_steps)
    pairs = []
    for _ in range(num_pairs):
        if rng.random() < random_share:
            free = np.flatnonzero(np.isfinite(reward).any(1))
            a, b = sorted(rng.choice(free, size=2, replace=False).tolist())
        else:
            a, b = sorted(divmod(int(reward.argmax()), num_classes))
        pairs.append((a, b))
        reward[[a, b], :] = -np.inf
        reward[:, [a, b]] = -np.inf
    return pairs


def sweep_pair(num_classes: int, turn: int, seed: int) -> tuple[int, int]:
    """Return the pair (a, b), a < b, of a turn in which each pair has one before any has two.

    The order is random, and another one each time round.
    """
    pairs = [(a, b) for a in range(num_classes) for b in range(a + 1, num_classes)]
    time_round, place = divmod(turn, len(pairs))
    return pairs[np.random.default_rng([seed, time_round]).permutation(len(pairs))[place]]


def record(
    state: KArmState, sizes: dict[tuple[int, int], list[float]], pairs: list[tuple[int, int]]
) -> KArmState:
    """Return the state after a round.

    Args:
      state: before it.
      sizes: per direction (victim, target), the trigger sizes of the round's steps; inf for a step
        whose inversion failed, which is left out.
      pairs: the pairs that were selected.

    Note: The first size of a direction's own trigger is set against nothing: a trigger for one
      victim class is smaller than a universal one, and their ratio is no improvement.
    """
    post, size = state.post.copy(), state.size.copy()
    pairwise, num_selected = state.pairwise.copy(), state.num_selected.copy()
    for direction, values in sizes.items():
        found = [value for value in values if np.isfinite(value)]
        if not found:
            continue
        mean = float(np.mean(found))
        if pairwise[direction] and size[direction] > 0:
            growth = (mean - size[direction]) / size[direction]
            post[direction] = (post[direction] + growth) / 2
        size[direction] = mean
        pairwise[direction] = True
    for a, b in pairs:
        num_selected[a, b] += 1
        num_selected[b, a] += 1
    return KArmState(state.prior, post, size, pairwise, num_selected)
