"""The example of a backbone of one's own."""

import re

import pytest
import torch

from foveal.analysis import count_flops, count_parameters
from tests.examples.running import load, run


def test_prints_a_table():
    out, _ = run("custom_backbone.py", "--sizes", "64x64", "33x70")
    lines = out.splitlines()
    assert "48 x 16 x 16" in lines[2]
    assert "48 x 9 x 18" in lines[2]
    assert "SlidingWindowAttention + AggregatedAttention" in lines[4]
    assert "288 x 2 x 2" in lines[5]


def test_costs_add_up():
    """Those of the stages and the head are those of the whole, as the analysis counts it."""
    example = load("custom_backbone")
    net = example.build(num_classes=10).eval()
    rows = [re.split(r"  +", line) for line in example.summarize(net, [(64, 64)]).splitlines()[2:]]
    parameters, flops = ([float(row[i].replace(",", "")) for row in rows] for i in (-3, -2))
    assert sum(parameters[:-1]) == parameters[-1] == count_parameters(net)
    assert sum(flops[:-1]) == pytest.approx(flops[-1], abs=0.3)
    assert flops[-1] == pytest.approx(count_flops(net, torch.randn(1, 3, 64, 64)) / 1e6, abs=0.05)


def test_sliding_window_attention_sees_its_window_alone():
    example = load("custom_backbone")
    mixer = example.SlidingWindowAttention(12, num_heads=2, window_size=5)
    x = torch.randn(1, 9, 11, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 4, 5].square().sum(), x)
    seen = gradient[0].abs().sum(-1) > 0
    window = torch.zeros(9, 11, dtype=torch.bool)
    window[2:7, 3:8] = True
    assert torch.equal(seen, window)


def test_sliding_window_attention_is_attention():
    """A window that covers the map is plain attention."""
    example = load("custom_backbone")
    mixer = example.SlidingWindowAttention(12, num_heads=2, window_size=7)
    x = torch.randn(2, 4, 3, 12)
    q, k, v = mixer.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 4, 3, 12)
    torch.testing.assert_close(mixer(x), mixer.proj(expected))


def test_pooling_leaves_a_constant_map_alone():
    example = load("custom_backbone")
    torch.testing.assert_close(example.Pooling(3)(torch.ones(1, 4, 5, 3)), torch.zeros(1, 4, 5, 3))


def test_refuses_a_size(capsys):
    with pytest.raises(SystemExit):
        load("custom_backbone").main(["--sizes", "224"])
    assert "--sizes: expected HEIGHTxWIDTH" in capsys.readouterr().err
