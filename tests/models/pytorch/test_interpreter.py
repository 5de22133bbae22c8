"""PyTorch modules as JAX functions: operators, modes, and what cannot be converted."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moth_jax.errors import InputError
from moth_jax.models import ModelSpec, outline

torch = pytest.importorskip("torch")
nn, functional = torch.nn, torch.nn.functional

from moth_jax.models.pytorch.export import from_torch  # noqa: E402  (needs torch)

SIZE = 12
AS_IT_IS = {"image_shape": (SIZE, SIZE, 3), "mean": (0, 0, 0), "std": (1, 1, 1)}


class Head(nn.Module):
    """A body of [n 3 12 12] to anything, all of which goes into 4 logits."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        with torch.no_grad():
            features = self.features(torch.zeros(2, 3, SIZE, SIZE)).shape[1]
        self.head = nn.Linear(features, 4)

    def features(self, x):
        return torch.flatten(self.body(x), 1)

    def forward(self, x):
        return self.head(self.features(x))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Attention(nn.Module):
    """Of the rows of an image and a learned token."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.attention = nn.MultiheadAttention(SIZE, 3, batch_first=True)
        self.token = nn.Parameter(torch.randn(1, 1, SIZE))

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.mean(1)], 1)
        x = self.norm(x)
        return x + self.attention(x, x, x, need_weights=False)[0]


def shuffled(x):
    """The channel shuffle of ShuffleNet."""
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


BODIES = {
    "convolution": nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "same padding": nn.Conv2d(3, 4, 3, padding="same"),
    "dilation and groups": nn.Conv2d(3, 6, 3, padding=2, dilation=2, groups=3),
    "batch norm": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "max pool": nn.MaxPool2d(3, 2, 1),
    "max pool to the end": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max pool to the end, padded": nn.MaxPool2d(2, 3, 1, ceil_mode=True),
    "mean pool": nn.AvgPool2d(3, 2, 1),
    "mean pool of what is there": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "mean pool to the end": nn.AvgPool2d(5, 4, 2, ceil_mode=True),
    "mean pool to the end of what is there": nn.AvgPool2d(
        5, 4, 2, ceil_mode=True, count_include_pad=False
    ),
    "adaptive pool": nn.AdaptiveAvgPool2d((5, 7)),
    "group norm": nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)),
    "relu6": nn.ReLU6(),
    "leaky": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(3),
    "elu": nn.ELU(),
    "gelu": nn.Sequential(nn.GELU(), nn.GELU(approximate="tanh")),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "hard": nn.Sequential(nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(-0.3, 0.4)),
    "smooth": nn.Sequential(nn.Sigmoid(), nn.Tanh(), nn.Softmax(dim=1), nn.LogSoftmax(dim=-1)),
    "dropout": nn.Sequential(nn.Dropout(), nn.Dropout2d()),
    "linear": nn.Linear(12, 5),
    "attention": Attention(),
    "shuffle": Function(lambda x: shuffled(torch.cat([x, -x], 1))),
    "arithmetic": Function(lambda x: (2 - x * x / 3 + 0.5 * (x - 1).abs()).clamp(0.1, 2.3).sqrt()),
    "more arithmetic": Function(lambda x: torch.maximum(x, -x).exp() + torch.rsub(x, 1, alpha=2)),
    "reductions": Function(lambda x: x.sum(1) + x.mean((1, 3), keepdim=True)[:, 0] + x.amax(1)),
    "parts": Function(lambda x: torch.cat([x[:, 1:, ::2, 3:-1], x[:, :2, 6:, 4:]], 1)),
    "split": Function(lambda x: torch.cat([*x.split(5, 2)[::-1], *x.chunk(2, 2)], 2)),
    "stacked": Function(lambda x: torch.stack([x[:, 0], x[:, 2]], -1)),
    "one channel": Function(lambda x: x[:, 1].unsqueeze(1) + x[:, :1].squeeze(1).unsqueeze(-3)),
    "edges": Function(lambda x: functional.pad(x, (1, 2, 0, 3), value=0.5)),
    "transposed": Function(lambda x: x.permute(0, 2, 3, 1) @ torch.ones(3, 2, dtype=x.dtype)),
}


@pytest.fixture(params=BODIES, scope="module")
def module(request):
    torch.manual_seed(0)
    module = Head(copy.deepcopy(BODIES[request.param])).eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return module


def images(count=3):
    return np.random.default_rng(0).normal(0.4, 0.5, (count, SIZE, SIZE, 3))


def test_logits_and_gradients_are_pytorchs_for_any_number_of_images(module):
    classifier, variables = from_torch(module, **AS_IT_IS)
    x = torch.tensor(images().transpose(0, 3, 1, 2), requires_grad=True)
    expected = copy.deepcopy(module).double()(x)
    weights = np.random.default_rng(1).normal(size=expected.shape)
    (expected * torch.tensor(weights)).sum().backward()
    with jax.enable_x64(True):

        @jax.jit
        def run(images):
            return jax.vjp(lambda images: classifier.predict(variables, images), images)

        logits, pullback = run(jnp.asarray(images()))
        gradient = pullback(jnp.asarray(weights))[0]
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(gradient, x.grad.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def with_batch_norm():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU())
    return Head(body)


def test_training_moves_the_statistics_as_pytorch_does_and_normalises_by_the_batch():
    module = with_batch_norm().double()
    classifier, variables = from_torch(module, **AS_IT_IS)
    expected = module.train()(torch.tensor(images(5).transpose(0, 3, 1, 2)))
    with jax.enable_x64(True):
        logits, after = jax.jit(classifier.forward_train)(variables, jnp.asarray(images(5)))
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-5)
    for name in ("body.1.running_mean", "body.1.running_var"):
        np.testing.assert_allclose(
            after["batch_stats"][name], module.state_dict()[name].numpy(), atol=1e-6
        )
    for name, value in variables["params"].items():
        np.testing.assert_array_equal(after["params"][name], value)


def test_the_module_itself_stays_as_it_was():
    module = with_batch_norm().double().train()
    before = copy.deepcopy(module.state_dict())
    from_torch(module, **AS_IT_IS)
    assert module.training
    assert module.body[1].training
    assert next(module.parameters()).dtype == torch.float64
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_parameters_have_the_modules_names_and_unused_ones_are_carried_along():
    module = with_batch_norm()
    module.extra = nn.Linear(2, 2)
    _, variables = from_torch(module, **AS_IT_IS)
    assert set(variables["params"]) == {
        *(f"body.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")),
        "head.weight",
        "head.bias",
    }
    assert set(variables["batch_stats"]) == {"body.1.running_mean", "body.1.running_var"}
    assert set(variables["unused"]) == {
        "body.1.num_batches_tracked",
        "extra.weight",
        "extra.bias",
    }


def test_a_graph_survives_json_and_runs_without_the_module(module):
    classifier, variables = from_torch(module, **AS_IT_IS, name="mine")
    spec = ModelSpec.from_json(json.loads(json.dumps(classifier.spec.to_json())))
    assert spec == classifier.spec
    again, shapes = outline(spec)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    x = jnp.asarray(images(), jnp.float32)
    np.testing.assert_array_equal(
        jax.jit(again.predict)(variables, x), jax.jit(classifier.predict)(variables, x)
    )


# What cannot be converted


def test_operators_without_a_rule_are_named_with_their_layers():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), Function(lambda x: torch.cumsum(x, 1)))
    with pytest.raises(InputError, match=r"aten\.cumsum\.default \(in body\.1 \(Function\)\)"):
        from_torch(Head(body), **AS_IT_IS)


def test_a_module_that_torch_cannot_export_is_refused_by_name():
    class Branching(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :4] if x.sum() > 0 else x.flatten(1)[:, 4:8]

    with pytest.raises(InputError, match="cannot turn Branching into a program"):
        from_torch(Branching(), **AS_IT_IS)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: (x.flatten(1)[:, :4], x), "must have one output"),
        (lambda x: x, r"must return logits \[n, K\]"),
        (lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect").flatten(1), "aten"),
    ],
)
def test_a_module_that_gives_something_else_is_refused(function, says):
    with pytest.raises(InputError, match=says):
        from_torch(Function(function), **AS_IT_IS)


def test_a_program_of_one_batch_size_is_refused():
    flat = Function(lambda x: x.reshape(2, -1)[:, :4])
    program = torch.export.export(flat, (torch.zeros(2, 3, SIZE, SIZE),))
    with pytest.raises(InputError, match="any number of images"):
        from_torch(program, **AS_IT_IS)


def test_images_of_another_size_are_refused_by_the_classifier():
    classifier, variables = from_torch(with_batch_norm(), **AS_IT_IS)
    with pytest.raises(InputError, match=r"takes images \[n, 12, 12, 3\]"):
        classifier.predict(variables, jnp.zeros((1, 8, 8, 3)))


def test_statistics_that_cannot_be_followed_are_frozen_and_the_reason_is_known():
    module = with_batch_norm()
    assert from_torch(module, **AS_IT_IS)[0].frozen == ""
    module.body[1].momentum = None
    assert "momentum None" in from_torch(module, **AS_IT_IS)[0].frozen

    class TakenApart(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(1, 3, 1, 1))

        def forward(self, x):
            return (x - self.running_mean).flatten(1)[:, :4]

    assert "running_mean" in from_torch(TakenApart(), **AS_IT_IS)[0].frozen
