"""Writes docs/hosts.md: foveal's blocks in the architectures of timm, with parameters and multiply-adds measured.

    python docs/hosts.py            # writes the page
    python docs/hosts.py --print    # prints it instead

The lines of code that the page shows are the lines that run here, on models without memory (the meta device).
"""

import argparse
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn
from tqdm import tqdm

import foveal
from foveal.analysis import count_flops, count_parameters
from foveal.blocks import AggregatedAttention, ConvGLU
from foveal.blocks.layouts import attn_layer, mlp_layer, token_mixer

PAGE = Path(__file__).with_name("hosts.md")
TEMPLATE = Path(__file__).with_name("hosts.template.md")


def attention(dim: int) -> nn.Module:
    return AggregatedAttention(dim, num_heads=dim // 32, pool_grid=7)


NAMES = {
    "timm": timm,
    "foveal": foveal,
    "partial": partial,
    "ConvGLU": ConvGLU,
    "AggregatedAttention": AggregatedAttention,
    "attention": attention,
    "attn_layer": attn_layer,
    "mlp_layer": mlp_layer,
    "token_mixer": token_mixer,
}  # that the lines below may use

# The host, a model of timm, and the line.
_BLOCKS = 'foveal.swap(model, {"blocks.*.mlp": ConvGLU})'
_LAYERS = 'foveal.swap(model, {"layers.*.blocks.*.mlp": ConvGLU})'
_STAGES = 'foveal.swap(model, {"stages.*.blocks.*.mlp": ConvGLU})'
CONVGLU = [
    ("ViT, class token", "vit_small_patch16_224", _BLOCKS),
    ("DINOv2, class and register tokens", "vit_small_patch14_reg4_dinov2", _BLOCKS),
    ("DINOv3", "vit_small_patch16_dinov3", _BLOCKS),
    ("EVA-02", "eva02_small_patch14_224", _BLOCKS),
    ("ViT of SAM", "samvit_base_patch16_224", _BLOCKS),
    ("Swin", "swin_tiny_patch4_window7_224", _LAYERS),
    ("SwinV2", "swinv2_tiny_window8_256", _LAYERS),
    ("PVTv2", "pvt_v2_b1", _STAGES),
    ("ConvNeXt, channels last", "convnext_tiny", _STAGES),
    ("ConvNeXt, channels first", "convnext_nano", _STAGES),
    ("PoolFormer", "poolformerv2_s12", _STAGES),
    ("ConvFormer", "convformer_s18", _STAGES),
    ("CAFormer", "caformer_s18", _STAGES),
    ("InceptionNeXt", "inception_next_tiny", _STAGES),
    ("MaxViT", "maxvit_tiny_tf_224", 'foveal.swap(model, {"stages.*.blocks.*.attn_*.mlp": ConvGLU})'),
    ("CoAtNet", "coatnet_0_rw_224", 'foveal.swap(model, {"stages.[23].blocks.*.mlp": ConvGLU})'),
]
ATTENTION = [
    (
        "Swin, instead of windows",
        "swin_tiny_patch4_window7_224",
        'foveal.swap(model, {"layers.*.blocks.*.attn": partial(AggregatedAttention, pool_grid=7)})',
    ),
    (
        "SwinV2, instead of windows",
        "swinv2_tiny_window8_256",
        'foveal.swap(model, {"layers.*.blocks.*.attn": partial(AggregatedAttention, pool_grid=8)})',
    ),
    (
        "MaxViT, instead of windows",
        "maxvit_tiny_tf_224",
        'foveal.swap(model, {"stages.*.blocks.*.attn_block.attn": attention})',
    ),
    ("PVTv2", "pvt_v2_b1", 'foveal.swap(model, {"stages.*.blocks.*.attn": partial(AggregatedAttention, pool_grid=7)})'),
    ("ConvNeXt", "convnext_tiny", 'foveal.swap(model, {"stages.*.blocks.*.conv_dw": attention})'),
    ("PoolFormer", "poolformerv2_s12", 'foveal.swap(model, {"stages.*.blocks.*.token_mixer": attention})'),
    (
        "CAFormer, its first stages",
        "caformer_s18",
        'foveal.swap(model, {"stages.[01].blocks.*.token_mixer": attention})',
    ),
    ("InceptionNeXt", "inception_next_tiny", 'foveal.swap(model, {"stages.*.blocks.*.token_mixer": attention})'),
]
CONSTRUCTORS = """\
vit = timm.create_model("vit_small_patch16_224", mlp_layer=mlp_layer(ConvGLU, grid=14, num_prefix_tokens=1))
pool = timm.create_model("poolformerv2_s12", token_mixers=token_mixer(attention))
mixer = attn_layer(partial(AggregatedAttention, pool_ratio=2), grid=14)
flat = timm.create_model("vit_small_patch16_224", attn_layer=mixer, class_token=False, global_pool="avg")
"""


def measure(model: nn.Module, size: int) -> tuple[int, int]:
    """Parameters, and multiply-adds of one image."""
    return count_parameters(model), count_flops(model, torch.empty(1, 3, size, size, device="meta")) // 2


def row(host: str, name: str, line: str) -> str:
    model = timm.create_model(name, device="meta")
    size = model.pretrained_cfg["input_size"][-1]
    before = measure(model, size)
    exec(line, NAMES | {"model": model})
    after = measure(model, size)
    parameters, adds = (
        f"{b / unit:.2f} -> {a / unit:.2f}" for b, a, unit in zip(before, after, (1e6, 1e9), strict=True)
    )
    return f"| {host} | `{name}` | `{line}` | {parameters} | {adds} | {size} |"


def table(rows: list[tuple[str, str, str]]) -> str:
    head = "| host | model of timm | line | parameters, M | multiply-adds, G | at |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(row(*entry) for entry in tqdm(rows, leave=False))])


def page() -> str:
    """The text of docs/hosts.md."""
    template = TEMPLATE.read_text(encoding="utf-8")
    exec(CONSTRUCTORS, NAMES.copy())
    parts = {"CONVGLU": table(CONVGLU), "ATTENTION": table(ATTENTION), "CONSTRUCTORS": CONSTRUCTORS.rstrip()}
    for name, text in parts.items():
        template = template.replace(f"{{{name}}}", text)
    return template


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the page instead of writing it")
    text = page()
    if parser.parse_args().print:
        print(text, end="")
    else:
        PAGE.write_text(text, encoding="utf-8")
        print(f"wrote {PAGE}")
