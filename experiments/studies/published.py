"""The authors' class distances of their ResNet20 on CIFAR-10, and ours beside them."""

import numpy as np
from scipy.stats import spearmanr


def published_matrix(path: str) -> np.ndarray:
    """Return the published distances [10, 10], NaN on the diagonal, from their [10, 9] .npy."""
    rows = np.load(path, allow_pickle=False)
    matrix = np.full((10, 10), np.nan)
    matrix[~np.eye(10, dtype=bool)] = rows.reshape(-1)
    return matrix


def against(published: np.ndarray, values: np.ndarray) -> dict:
    """Return how `values` [10, 10] stand to the published ones where both are known."""
    both = np.isfinite(values) & np.isfinite(published)
    ours, theirs = values[both], published[both]
    return {
        "directions": int(both.sum()),
        "not_found": int(np.isinf(values).sum()),
        "mean": float(ours.mean()),
        "published_mean_same_directions": float(theirs.mean()),
        "ratio_of_means": float(ours.mean() / theirs.mean()),
        "mean_scaled_to_all_directions": float(ours.mean() / theirs.mean() * np.nanmean(published)),
        "spearman": float(spearmanr(ours, theirs).statistic),
        "pearson": float(np.corrcoef(ours, theirs)[0, 1]),
    }
