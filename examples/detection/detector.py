"""torchvision's detectors over a backbone of timm's with a feature pyramid."""

import argparse
from collections import OrderedDict
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import freeze
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from common.models import load_weights
from common.refusals import refuse
from foveal.models import Backbone


class PyramidBackbone(nn.Module):
    """The feature maps of a timm model through a feature pyramid, as torchvision's detectors want them.

    Args:
        features: a timm model made with ``features_only=True``.
        channels: of every level of the pyramid.
        extra_blocks: what makes the coarsest levels.
        frozen_stages: the first stages that are left as they are, without stochastic depth.
    """

    def __init__(self, features: nn.Module, channels: int, extra_blocks: nn.Module, frozen_stages: int = 0):
        super().__init__()
        self.body = features
        self.fpn = FeaturePyramidNetwork(features.feature_info.channels(), channels, extra_blocks)
        self.out_channels = channels
        self.frozen = [info["module"] for info in features.model.feature_info[:frozen_stages]]
        if self.frozen:
            freeze(features.model, self.frozen)

    def train(self, mode: bool = True) -> "PyramidBackbone":
        super().train(mode)
        for name in self.frozen:
            self.body.model.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.body(images))))


def check_pyramid(name: str) -> None:
    """Refuse a model that is no Backbone of four stages."""
    with torch.device("meta"):
        model = timm.create_model(name)
    if not isinstance(model, Backbone) or len(model.stages) != 4:
        variants = ", ".join(timm.list_models("transnext*"))
        refuse("--model", f"must be a TransNeXt ({variants}) or a Backbone of four stages, got {name}")


def build_detector(args: argparse.Namespace, num_classes: int) -> nn.Module:
    indices = (0, 1, 2, 3) if args.detector == "maskrcnn" else (1, 2, 3)
    kwargs: dict[str, Any] = {"features_only": True, "out_indices": indices, "drop_path_rate": args.drop_path}
    if not args.coco:
        kwargs["pretrain_size"] = args.size
        if is_model_in_modules(args.model, ["transnext"]):
            kwargs["depths"] = (1, 1, 2, 1)  # shapes are easy
    if args.interpolate_bias:
        kwargs |= {"bias_resampling": "interpolate", "img_size": args.size}
    features = timm.create_model(args.model, **kwargs)
    if args.backbone_weights:
        load_weights(features.model, args.backbone_weights, "this backbone", "--backbone-weights", choose=without_head)
    if args.grad_checkpointing:
        features.model.set_grad_checkpointing()
    channels = 256 if args.coco else 64
    maskrcnn = args.detector == "maskrcnn"
    extra = LastLevelMaxPool() if maskrcnn else LastLevelP6P7(channels, channels)
    backbone = PyramidBackbone(features, channels, extra, args.frozen_stages)
    limits = {"min_size": args.size, "max_size": args.size * 5 // 3}
    if not maskrcnn:
        return RetinaNet(backbone, num_classes, **limits)
    if args.coco:
        return MaskRCNN(backbone, num_classes, **limits)
    detector = MaskRCNN(backbone, num_classes, **limits, box_batch_size_per_image=32, rpn_post_nms_top_n_train=200)
    detector.roi_heads.mask_head = MaskRCNNHeads(channels, (channels, channels), dilation=1)
    detector.roi_heads.mask_predictor = MaskRCNNPredictor(channels, channels, num_classes)
    return detector


def without_head(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if not name.startswith("head.")}


def parameter_groups(detector: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """The backbone's with a learning rate that falls towards the stem, all others with the full one."""
    model = detector.backbone.body.model
    groups = param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay
    )
    others = nn.ModuleDict({name: module for name, module in detector.named_children() if name != "backbone"})
    others["fpn"] = detector.backbone.fpn
    return groups + param_groups_weight_decay(others, weight_decay)
