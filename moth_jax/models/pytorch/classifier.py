"""The classifier that a graph describes."""

from moth_jax.models.classifier import Classifier, ModelSpec, normalise
from moth_jax.models.program import Graph
from moth_jax.models.pytorch import interpreter
from moth_jax.types import Variables


def from_graph(graph: Graph, spec: ModelSpec) -> tuple[Classifier, Variables]:
    """Return the pure functions of a graph, which `spec` describes, and its variables' shapes.

    Raises:
      InputError: the graph has operators without a rule, as one of a newer version may, or does
        not give logits for any number of images.
    """
    interpreter.check(graph, spec.image_shape, spec.num_classes)

    def predict(variables, images):
        return interpreter.run(graph, variables, normalise(spec, images), train=False)[0]

    def forward_train(variables, images):
        images = normalise(spec, images)
        logits, stats = interpreter.run(graph, variables, images, train=True)
        return logits, {**variables, "batch_stats": stats}

    frozen = interpreter.why_frozen(graph)
    return Classifier(spec, predict, forward_train, frozen), interpreter.outline(graph)
