"""Class distances: the size of the smallest trigger of every direction (Definition III.2).

    from moth_jax import distance
    matrix = distance.distance_matrix(logits_fn, images, labels)

`logits_fn` is any JAX function from images in [0, 1] to logits. A distance is an upper bound found
by trigger inversion, and it belongs to a trigger that was measured to reach the success bound. A
direction where no trigger was found is infinite: counted, shown, and never averaged in.
`certified_distances` is the other end: no trigger at all is smaller.
"""

from moth_jax.distance.certified import certified_distances
from moth_jax.distance.directions import DirectionChoice, choose_directions
from moth_jax.distance.matrix import DistanceMatrix, increase_per_direction, relative_increase
from moth_jax.distance.measure import class_distance, distance_matrix

__all__ = [
    "DirectionChoice",
    "DistanceMatrix",
    "certified_distances",
    "choose_directions",
    "class_distance",
    "distance_matrix",
    "increase_per_direction",
    "relative_increase",
]
