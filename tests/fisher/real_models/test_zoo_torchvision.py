"""Models of torchvision, without the width and depth that only cost time."""

import pytest
import torch
from torch import nn
from torchvision import models

from tests.support.fisher.zoo import (
    CLASSES,
    VARIANTS,
    Case,
    N,
    cases,
    check_case,
    classes,
    images,
    in_float32,
    sum_of_pixels,
)

D = 8


def shallow(resnet, width):
    """Without the last two stages, which have nothing that the first two do not have but millions of weights."""
    resnet.layer3 = resnet.layer4 = nn.Identity()
    resnet.fc = nn.Linear(width, CLASSES)
    return resnet


def resnet(block=models.resnet.BasicBlock, width=128, **options):
    return shallow(models.ResNet(block, [1, 1, 1, 1], **options), width)


def vgg(batch_norm):
    with torch.device("meta"):  # 100 million weights, all of them replaced
        model = models.VGG(nn.Identity(), init_weights=False)
    model.features = models.vgg.make_layers([8, "M", 8, 8, "M"], batch_norm)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, CLASSES))
    return model


def googlenet():
    model = models.GoogLeNet(CLASSES, aux_logits=False, init_weights=False)
    model.inception4b = model.inception4c = model.inception4d = model.inception5a = model.inception5b = nn.Identity()
    model.inception4e = nn.Identity()
    model.fc = nn.Linear(512, CLASSES)
    return model


def densenet(memory_efficient):
    return models.DenseNet(4, (2, 2), 8, 2, num_classes=CLASSES, memory_efficient=memory_efficient)


def mobilenet_v3():
    config = models.mobilenetv3.InvertedResidualConfig
    rows = [config(8, 3, 8, 8, True, "RE", 2, 1, 1), config(8, 3, 16, 12, True, "HS", 1, 1, 1)]
    return models.MobileNetV3(rows, 16, CLASSES)


def efficientnet():
    config = models.efficientnet
    rows = [config.FusedMBConvConfig(2, 3, 1, 8, 8, 2), config.MBConvConfig(2, 3, 2, 8, 12, 2)]
    return models.EfficientNet(rows, 0.2, num_classes=CLASSES, last_channel=16)


def regnet():
    parameters = models.regnet.BlockParams([1, 2], [8, 16], [4, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return models.RegNet(parameters, CLASSES, stem_width=8)


def swin(version):
    options = {} if version == 1 else {"block": models.swin_transformer.SwinTransformerBlockV2}
    options |= {} if version == 1 else {"downsample_layer": models.swin_transformer.PatchMergingV2}
    return models.SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], num_classes=CLASSES, **options)


def convnext():
    config = models.convnext.CNBlockConfig
    return models.ConvNeXt([config(8, 12, 2), config(12, None, 1)], num_classes=CLASSES)


def maxvit():
    return models.MaxVit((32, 32), 8, 4, [8], [1], 4, 0.0, num_classes=CLASSES)


def vit(tokens_of_a_sample):
    side = {5: 16, 17: 8}[tokens_of_a_sample]
    return models.VisionTransformer(32, side, 2, 2, D, 12, num_classes=CLASSES)


class Pixels(nn.Module):
    """The segmentation's scores as a tensor, so that the loss goes by name."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)["out"]


def backbone(layers):
    return models._utils.IntermediateLayerGetter(resnet(), layers)


def fcn():
    heads = models.segmentation.fcn.FCNHead
    return models.segmentation.FCN(
        backbone({"layer1": "aux", "layer2": "out"}), heads(128, CLASSES), heads(64, CLASSES)
    )


def deeplab():
    head = models.segmentation.deeplabv3
    layers = head.ASPP(64, [2, 3], 12), nn.Conv2d(12, CLASSES, 1)
    return head.DeepLabV3(backbone({"layer1": "out"}), nn.Sequential(*layers))


def lraspp():
    features = models._utils.IntermediateLayerGetter(mobilenet_v3().features, {"1": "low", "2": "high"})
    return models.segmentation.LRASPP(features, 8, 16, CLASSES, 8)


def segmented(model, loss="cross_entropy"):
    model = Pixels(model) if loss == "cross_entropy" else model
    return Case(model, images(16), torch.randint(0, CLASSES, (N, 16, 16)), loss)


def with_auxiliary(output, target):
    return sum_of_pixels(output["out"], target) + 0.4 * sum_of_pixels(output["aux"], target)


def classified(model, size=32, **options):
    return Case(model, images(size), classes(), **options)


TORCHVISION = {
    "resnet": lambda: classified(resnet()),
    "resnext": lambda: classified(resnet(models.resnet.Bottleneck, 512, groups=4, width_per_group=4)),
    "densenet": lambda: classified(densenet(False)),
    "densenet, memory efficient": lambda: classified(densenet(True), recomputes=True),
    "vgg": lambda: classified(vgg(False)),
    "vgg, batch norm": lambda: classified(vgg(True)),
    "mobilenet v2": lambda: classified(
        models.MobileNetV2(CLASSES, inverted_residual_setting=[[1, 8, 1, 1], [3, 8, 2, 2]])
    ),
    "mobilenet v3": lambda: classified(mobilenet_v3()),
    "efficientnet": lambda: classified(efficientnet()),
    "squeezenet": lambda: classified(models.SqueezeNet("1_1", CLASSES)),
    "shufflenet": lambda: classified(models.ShuffleNetV2([1, 1, 2], [8, 8, 12, 16, 16], CLASSES)),
    "googlenet": lambda: classified(googlenet()),
    "regnet": lambda: classified(regnet()),
    "swin": lambda: classified(swin(1)),
    "swin v2": lambda: classified(swin(2)),
    "vit": lambda: classified(vit(5)),
    "vit, 17 tokens": lambda: classified(vit(17)),
    "convnext": lambda: classified(convnext()),
    "maxvit": lambda: classified(maxvit()),
    "fcn": lambda: segmented(fcn(), with_auxiliary),
    "deeplab": lambda: segmented(deeplab()),
    "lraspp": lambda: segmented(lraspp()),
}
vision = cases(TORCHVISION)


@pytest.mark.parametrize("variant", VARIANTS)
def test_torchvision(vision, variant):
    check_case(vision, variant)


smooth = cases({name: TORCHVISION[name] for name in ("swin", "vit", "convnext")})


def test_torchvision_in_float32(smooth):
    in_float32(smooth)
