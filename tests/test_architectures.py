"""Architectures that others wrote, converted: one training step, the plain network's evaluation, and back."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import GatedMlp
from timm.models import beit, levit
from timm.models.mlp_mixer import MlpMixer, SpatialGatingBlock
from torchvision.models import video
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.swin_transformer import SwinTransformer3d
from torchvision.models.vision_transformer import VisionTransformer

from whiten_layers import FeatureWhitening, report, unwhiten, whiten
from whiten_layers.layers import PLAIN, TWINS

SMALL = {"img_size": 64, "num_classes": 5}
ARCHITECTURES = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "mobilenet_v3": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5),
    "squeezenet": lambda: torchvision.models.squeezenet1_1(num_classes=5),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5),
    "vision transformer": lambda: VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=5),
    "swin": lambda: SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5),
    "timm vit": lambda: timm.create_model("test_vit", **SMALL),
    "timm convnext": lambda: timm.create_model("test_convnext", num_classes=5),
    "timm efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=5),
    "timm coatnet": lambda: timm.create_model("test_coatnet", **SMALL),
    "timm mixer": lambda: MlpMixer(patch_size=16, embed_dim=32, num_blocks=2, **SMALL),
    "timm gmlp": lambda: MlpMixer(
        patch_size=16,
        embed_dim=32,
        num_blocks=2,
        mlp_ratio=2,
        block_layer=SpatialGatingBlock,
        mlp_layer=GatedMlp,
        **SMALL,
    ),
    "timm levit": lambda: levit.Levit(embed_dim=(16, 24), key_dim=8, depth=(1, 1), num_heads=(2, 3), **SMALL),
    "timm beit": lambda: beit.Beit(patch_size=16, embed_dim=32, depth=2, num_heads=2, **SMALL),
}


def mvit():
    shared = {"kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3], "stride_kv": [1, 2, 2]}
    blocks = [
        MSBlockConfig(num_heads=1, input_channels=16, output_channels=16, stride_q=[1, 1, 1], **shared),
        MSBlockConfig(num_heads=2, input_channels=16, output_channels=32, stride_q=[1, 2, 2], **shared),
    ]
    kind = {"residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}  # of mvit_v2_s
    return MViT((32, 32), 4, blocks, residual_pool=True, num_classes=5, dropout=0.0, **kind)


VIDEO = {
    "r3d_18": lambda: video.r3d_18(num_classes=5),
    "mc3_18": lambda: video.mc3_18(num_classes=5),
    "r2plus1d_18": lambda: video.r2plus1d_18(num_classes=5),
    "mvit": mvit,
    "swin3d": lambda: SwinTransformer3d(
        [2, 4, 4], 24, [2, 2], [2, 4], [2, 4, 4], stochastic_depth_prob=0.0, num_classes=5
    ),
}

# Attention that takes its layers' weights and calls not the layers: of these the gradient stays plain.
USED_AS_FUNCTIONS = {"swin": 8, "timm beit": 2, "swin3d": 8}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *VIDEO])
def test_one_step_then_the_plain_networks_evaluation_and_state(name):
    build, used_as_functions = (ARCHITECTURES | VIDEO)[name], USED_AS_FUNCTIONS.get(name, 0)
    torch.manual_seed(0)
    plain = build()
    parameters, keys = list(plain.parameters()), list(plain.state_dict())
    model = whiten(copy.deepcopy(plain), FeatureWhitening(update_interval=1))
    assert not any(type(module) in TWINS for module in model.modules())
    x, y = torch.randn(4, 3, 4, 32, 32) if name in VIDEO else torch.randn(4, 3, 64, 64), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(2):  # the second with a map that is not the identity
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert len(parameters) == len(list(model.parameters()))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert sum(row.batches == 0 for row in report(model).rows) == used_as_functions
    assert {row.batches for row in report(model).rows} - {0} == {2}

    back = unwhiten(copy.deepcopy(model))
    assert [type(module) for module in back.modules()] == [type(module) for module in plain.modules()]
    assert list(back.state_dict()) == keys
    plain.load_state_dict(back.state_dict())
    for name, value in model.state_dict().items():
        if name in keys:
            assert torch.equal(value, plain.state_dict()[name])
    with torch.no_grad():
        assert torch.equal(model.eval()(x), plain.eval()(x))


def test_a_layer_whose_weight_is_used_as_a_function_is_named():
    model = whiten(ARCHITECTURES["timm beit"]())
    assert "blocks.0.attn.qkv" not in report(model).left
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    left = report(model).left
    assert left["blocks.0.attn.qkv"].startswith(
        "WhitenedLinear, which has seen no batch: frozen, unused, used as a function"
    )
    assert {name for name, reason in left.items() if "Whitened" in reason} == {f"blocks.{i}.attn.qkv" for i in (0, 1)}
    assert type(model.blocks[0].attn.qkv) in PLAIN
