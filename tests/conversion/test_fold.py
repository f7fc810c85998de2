"""A folded network is plain, and gives what the evaluating one gave."""

import pytest
import torch
import torchvision
import whiten_layers.models as models
from torch import nn
from torch.nn.utils import prune

from whiten_layers import GradientTransform, WhitenedConv2d, convert_batchnorm, fold, whiten
from whiten_layers.conversion.convert_batchnorm import NORMS
from whiten_layers.norm.base import WhiteningNorm

from ..norm.cases import KINDS, any_kind, draw


def trained(model, *batches):
    """The evaluating model, with statistics, weights and biases that are not what they were at first."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    for batch in batches:
        model(batch)
    return model.eval()


def assert_folds(model, x, left=()):
    """Fold a model; `left` names what has become a convolution of its own."""
    norms = {name for name, module in model.named_modules() if isinstance(module, WhiteningNorm)}
    with torch.no_grad():
        expected = model(x)
        folded = fold(model)
        result = folded(x)
    # Relative to the largest output: both are sums over channels whose rounding is of that size.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert not any(isinstance(module, (WhiteningNorm, GradientTransform)) for module in folded.modules())
    replaced = {name for name in norms if not isinstance(folded.get_submodule(name), nn.Identity)}
    assert replaced == set(left)
    return folded


@any_kind
@pytest.mark.parametrize("whitened", [False, True])
def test_a_resnet(kind, whitened):
    torch.manual_seed(0)
    build = models.whitened_resnet20 if whitened else models.resnet20
    model = convert_batchnorm(build(), kind, **({"step_size": 0.01} if kind == "swbn" else {}))
    model = trained(model, torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16))
    weights = {id(parameter) for parameter in model.parameters() if parameter.dim() > 1}
    folded = assert_folds(model, torch.randn(4, 3, 16, 16))
    assert {id(parameter) for parameter in folded.parameters() if parameter.dim() > 1} == weights
    folded.train()(torch.randn(2, 3, 16, 16)).sum().backward()


SEQUENCES = [
    (
        "linear",
        lambda norm: [nn.Linear(5, 7), norm[0](7), nn.ReLU(), nn.Linear(7, 6, bias=False), norm[0](6)],
        (9, 5),
        [],
    ),
    ("conv1d", lambda norm: [nn.Conv1d(5, 7, 2, bias=False), norm[0](7, group_size=3)], (4, 5, 6), []),
    ("conv3d", lambda norm: [nn.Conv3d(3, 6, 2, padding=1), norm[2](6, affine=False)], (3, 3, 3, 2, 4), []),
    ("transposed", lambda norm: [nn.ConvTranspose2d(3, 6, 2, stride=2), norm[1](6)], (3, 3, 4, 4), []),
    ("grouped", lambda norm: [nn.Conv2d(4, 8, 3, groups=2), norm[1](8, group_size=2)], (3, 4, 6, 6), []),
    (
        "transposed grouped",
        lambda norm: [nn.ConvTranspose2d(4, 8, 2, groups=2), norm[1](8, group_size=4)],
        (3, 4, 4, 4),
        [],
    ),
    ("across groups", lambda norm: [nn.Conv2d(4, 8, 3, groups=2), norm[1](8)], (3, 4, 6, 6), ["1"]),
    ("ragged across", lambda norm: [nn.Conv2d(4, 8, 1, groups=2), norm[1](8, group_size=3)], (3, 4, 6, 6), ["1"]),
    ("depthwise", lambda norm: [nn.Conv2d(6, 6, 3, groups=6), norm[1](6, group_size=2)], (3, 6, 6, 6), ["1"]),
    ("after a ReLU", lambda norm: [nn.Conv2d(3, 6, 3), nn.ReLU(), norm[1](6)], (3, 3, 6, 6), ["2"]),
    ("3d first", lambda norm: [norm[2](4, group_size=2), nn.Conv3d(4, 3, 1)], (3, 4, 3, 2, 2), ["0"]),
]


@any_kind
@pytest.mark.parametrize("make, shape, left", [case[1:] for case in SEQUENCES], ids=[case[0] for case in SEQUENCES])
def test_a_sequence(kind, make, shape, left):
    torch.manual_seed(0)
    model = trained(nn.Sequential(*make(KINDS[kind])), draw(shape, 1, torch.float32), draw(shape, 2, torch.float32))
    assert_folds(model, draw(shape, 3, torch.float32), left)


class Twice(nn.Module):
    """A convolution whose output is used beside its normalization, and another that is called twice."""

    def __init__(self, norm):
        super().__init__()
        self.beside, self.first = nn.Conv2d(4, 4, 1), norm(4)
        self.shared, self.second = nn.Conv2d(4, 4, 1), norm(4)

    def forward(self, x):
        x = self.beside(x)
        x = x + self.first(x)
        return self.second(self.shared(self.shared(x)))


@any_kind
def test_what_something_else_uses_is_not_folded_into(kind):
    x = draw((6, 4, 3, 3), dtype=torch.float32)
    assert_folds(trained(Twice(KINDS[kind][1]), x, x), x, ["first", "second"])


def test_normalizations_before_the_convolutions():
    model = convert_batchnorm(torchvision.models.DenseNet(4, (2, 2), 8, num_classes=5), "iter_norm")
    names = [name for name, module in model.named_modules() if isinstance(module, WhiteningNorm)]
    x = torch.randn(4, 3, 32, 32)
    left = [name for name in names if not name.endswith(("norm0", "norm2"))]
    assert_folds(trained(model, x, x), x, left)


def test_a_single_normalization():
    norm = trained(KINDS["iter_norm"][1](6), draw((4, 6, 3, 3), dtype=torch.float32))
    x = draw((2, 6, 3, 3), 5, torch.float32)
    torch.testing.assert_close(fold(norm)(x), norm(x), rtol=1e-5, atol=1e-5)


class Named(nn.Module):
    """A normalization under two names, and in a list that no module knows."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 1), norm(6)
        self.alias, self.steps = self.norm, [self.conv, self.norm]

    def forward(self, x, by_name=True):
        return self.alias(self.conv(x)) if by_name else self.steps[1](self.steps[0](x))


def test_whatever_refers_to_a_normalization_sees_it_folded():
    x = draw((6, 4, 3, 3), dtype=torch.float32)
    model = trained(Named(KINDS["iter_norm"][1]), x, x)
    expected = model(x)
    fold(model)
    for by_name in (True, False):
        torch.testing.assert_close(model(x, by_name), expected, rtol=1e-4, atol=1e-4)


def changes_output(conv):
    conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    return conv


@pytest.mark.parametrize("change", [prune.identity, nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, None])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_a_layer_with_hooks_or_a_computed_weight_takes_no_normalization(change):
    conv = nn.Conv2d(4, 6, 1)
    conv = changes_output(conv) if change is None else change(conv, "weight")
    x = draw((6, 4, 3, 3), dtype=torch.float32)
    model = trained(nn.Sequential(conv, KINDS["iter_norm"][1](6)), x, x)
    assert_folds(model, x, ["1"])


def test_hooks_of_a_normalization_stay():
    x, seen = draw((6, 4, 3, 3), dtype=torch.float32), []
    model = trained(nn.Sequential(nn.Conv2d(4, 6, 1), KINDS["iter_norm"][1](6)), x, x)
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0] is not output))
    assert_folds(model, x, ["1"])
    assert seen == [True, True]


def test_types_stay_narrow():
    model = trained(nn.Sequential(nn.ReLU(), KINDS["iter_norm"][1](4, affine=False), nn.Conv2d(4, 4, 1))).bfloat16()
    assert {p.dtype for p in fold(model).parameters()} == {torch.bfloat16}
    model(torch.randn(2, 4, 3, 3).bfloat16())


class Rectified(KINDS["iter_norm"][1]):
    def forward(self, x):
        return super().forward(x).relu()


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), KINDS["swbn"][1](4)

    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > 0 else x


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), KINDS["swbn"][1](4)), "1 cannot be folded: it is in training mode"),
        (KINDS["swbn"][1](4, track_running_stats=False).eval(), "the model cannot be folded: it has no running"),
        (nn.Sequential(nn.ReLU(), KINDS["swbn"][0](4)).eval(), "1 cannot be folded: .* rows or sequences"),
        (Branching().eval(), "torch.fx cannot trace Branching"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), Rectified(4)).eval(), "1 cannot be folded: it is a Rectified, which may"),
    ],
)
def test_what_cannot_be_folded_is_an_error_and_stays(model, message):
    whiten(model)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        fold(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_network_without_normalizations_is_unwhitened():
    assert type(fold(nn.Sequential(WhitenedConv2d(3, 4, 1)))[0]) is nn.Conv2d


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_a_converted_network_evaluates_as_before(kind, affine, tracks):
    def norm(cls, channels):
        return cls(channels, 1e-3, 0.2, affine, tracks)

    layers = [nn.Conv2d(3, 70, 3), norm(nn.BatchNorm2d, 70), nn.Flatten(2), norm(nn.BatchNorm1d, 70)]
    torch.manual_seed(0)
    model = trained(
        nn.Sequential(*layers, nn.Unflatten(2, (2, 2, 1)), norm(nn.BatchNorm3d, 70)), torch.randn(5, 3, 4, 4)
    )
    x, batches = torch.randn(5, 3, 4, 4), []
    expected = model(x)
    model[1].register_forward_hook(lambda *_: batches.append(1))
    before = dict(model.named_parameters())
    objects = list(model)
    assert convert_batchnorm(model, kind, group_size=16) is model
    assert all(a is b for a, b in zip(model, objects, strict=True))
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert [type(model[i]) for i in (1, 3, 5)] == [KINDS[kind][i] for i in (1, 0, 2)]
    assert model[1].group_size == 16 and model[1].eps == 1e-3 and model[1].momentum == 0.2 and not model[1].training
    if tracks:
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        assert len(batches) == 1 and model[1].num_batches_tracked == 1 and model[1].num_batches_skipped == 0
    elif kind == "swbn":
        # By the batch, with nothing learned: as batch normalization does it.
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.train()(x).sum().backward()
    assert "running_var" not in model.state_dict() or kind == "swbn"


def test_conversion_takes_names_and_names_what_is_wrong(caplog):
    model = torchvision.models.resnet18()
    convert_batchnorm(model, "swbn", include="layer*", skip=["*.bn2", "*downsample*"])
    names = {name for name, module in model.named_modules() if isinstance(module, WhiteningNorm)}
    assert names == {f"layer{stage}.{block}.bn1" for stage in range(1, 5) for block in range(2)}
    with pytest.raises(ValueError, match="kind='bn' is not possible: give one of iter_norm, decorrelated, swbn"):
        convert_batchnorm(model, "bn")
    with pytest.raises(ValueError, match=r"include='layr\*' matches no batch normalization: there are bn1, "):
        convert_batchnorm(model, "swbn", include="layr*")
    left = nn.Sequential(nn.SyncBatchNorm(4), nn.LazyBatchNorm1d())
    assert [type(module) for module in convert_batchnorm(left, "swbn")] == [nn.SyncBatchNorm, nn.LazyBatchNorm1d]
    (record,) = caplog.records
    assert (
        "none of 2 batch normalizations can be converted" in record.getMessage()
        and "SyncBatchNorm" in record.getMessage()
    )


@pytest.mark.parametrize("kind", NORMS)
def test_a_batch_normalization_that_was_changed_by_hand(kind):
    x = torch.randn(8, 4)
    frozen, bare, pruned = (
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4),
        prune.random_unstructured(nn.BatchNorm1d(4), "weight", 2),
    )
    frozen.track_running_stats = False
    bare.running_mean = bare.running_var = None
    model = convert_batchnorm(nn.ModuleList([frozen, bare, pruned]), kind)
    frozen(x)
    assert frozen.num_batches_tracked == 0 and not frozen.track_running_stats
    assert torch.equal(frozen.eval()(x), frozen.eval()(x)) and frozen.running_mean.abs().max() == 0
    assert bare.eval()(x).mean(0).abs().max() < 1e-6  # by the batch
    assert (pruned(x)[:, pruned.weight_mask == 0] == 0).all() and int(pruned.weight_mask.sum()) == 2
    whole = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])
    with pytest.raises(ValueError, match="group_size=0"):
        convert_batchnorm(whole, kind, group_size=0)
    assert all(type(module) is nn.BatchNorm1d for module in whole) and len(model) == 3


def test_what_is_left_is_logged(caplog):
    caplog.set_level("INFO", "whiten_layers")
    convert_batchnorm(nn.Sequential(nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.BatchNorm2d(4)), "swbn", skip="2")
    assert [record.message.partition(":")[0] for record in caplog.records] == ["left 1", "left 2"]


def test_a_shared_normalization_is_converted_once():
    norm = nn.BatchNorm1d(4)
    model = convert_batchnorm(nn.ModuleList([norm, norm]), "iter_norm", iterations=3)
    assert model[0] is model[1] is norm and norm.iterations == 3
