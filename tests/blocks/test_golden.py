"""Layers against the golden numbers: output, gradient of the input and of every parameter."""

import pytest
import torch

from foveal.blocks import AggregatedAttention, ConvGLU, LengthScaledCosineAttention
from foveal.blocks.log_cpb import log_spaced, relative_offsets
from foveal.models.checkpoints import from_official
from tests.golden_files import Golden, assert_close, assert_gradients_close


def aggregated_attention(meta: dict) -> AggregatedAttention:
    return AggregatedAttention(
        meta["dim"],
        meta["num_heads"],
        window_size=meta["window_size"],
        pool_grid=meta["pool"],
        pretrain_grid=meta["pretrain_size"],
    )


def cosine_attention(meta: dict) -> LengthScaledCosineAttention:
    return LengthScaledCosineAttention(meta["dim"], meta["num_heads"], pretrain_grid=meta["pretrain_size"])


def conv_glu(meta: dict) -> ConvGLU:
    return ConvGLU(meta["dim"], int(2 * meta["hidden_features"] / 3))


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("aggregated_attention_w3", aggregated_attention),
        ("aggregated_attention_w5_uneven_pool", aggregated_attention),
        ("cosine_attention", cosine_attention),
        ("conv_glu", conv_glu),
    ],
)
def test_layer(name, build):
    golden = Golden(name)
    meta = golden.meta
    layer = build(meta)
    layer.load_state_dict(from_official(golden.weights()))
    shape = meta["batch"], meta["height"] * meta["width"], meta["dim"]
    x = golden.draw("input", *shape).unflatten(1, (meta["height"], meta["width"])).requires_grad_()
    output = layer(x)
    output.backward(golden.draw("grad", *shape).view_as(output))

    assert_close(output.flatten(1, 2), golden["output"], "output")
    assert_close(x.grad.flatten(1, 2), golden["grad_input"], "gradient of the input", tol=1e-3)
    expected = from_official(golden.gradients())
    assert_gradients_close({name: p.grad for name, p in layer.named_parameters()}, expected)


def test_log_coords():
    golden = Golden("log_coords")
    for i, (query, key, pretrain) in enumerate(golden.meta["combos"]):
        pretrain = pretrain or query
        axes = []
        for axis in range(2):
            offsets, index = relative_offsets(query[axis], key[axis], torch.device("cpu"))
            axes.append(log_spaced(offsets, pretrain[axis])[index])
        shape = query[0], query[1], key[0], key[1]
        rows = axes[0][:, None, :, None].expand(shape)
        columns = axes[1][None, :, None, :].expand(shape)
        coords = torch.stack([rows, columns], dim=-1).reshape(-1, 2)
        assert_close(coords, golden[f"coords{i}"], f"coordinates of {query} against {key}", tol=1e-6)
