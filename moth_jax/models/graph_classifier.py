"""The classifier that a graph describes."""

import jax
import jax.numpy as jnp

from moth_jax.models import graph
from moth_jax.models.functional import Classifier, ModelSpec, Variables, normalise


def from_graph(spec: ModelSpec) -> tuple[Classifier, Variables]:
    """The pure functions of `spec.graph`, and the shapes of its variables."""

    def predict(variables, images):
        return graph.run(spec.graph, variables, normalise(spec, images), train=False)[0]

    def forward_train(variables, images):
        images = normalise(spec, images)
        logits, stats = graph.run(spec.graph, variables, images, train=True)
        return logits, {**variables, "batch_stats": stats}

    outline = {
        kind: {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        for kind, shapes in spec.graph.shapes.items()
    }
    frozen = graph.why_frozen(spec.graph)
    return Classifier(spec, predict, forward_train, frozen), outline
