"""The classifier that a graph describes."""

import jax
import jax.numpy as jnp

from moth_jax.models.classifier import Classifier, ModelSpec, normalise
from moth_jax.models.program import Graph
from moth_jax.models.pytorch import interpreter
from moth_jax.types import Variables


def from_graph(graph: Graph, spec: ModelSpec) -> tuple[Classifier, Variables]:
    """Return the pure functions of a graph, which `spec` describes, and its variables' shapes.

    Raises:
      InputError: the graph has operators without a rule, as one of a newer version may.
    """
    interpreter.check_operators(graph)

    def predict(variables, images):
        return interpreter.run(graph, variables, normalise(spec, images), train=False)[0]

    def forward_train(variables, images):
        images = normalise(spec, images)
        logits, stats = interpreter.run(graph, variables, images, train=True)
        return logits, {**variables, "batch_stats": stats}

    outline = {
        kind: {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        for kind, shapes in graph.shapes.items()
    }
    frozen = interpreter.why_frozen(graph)
    return Classifier(spec, predict, forward_train, frozen), outline
