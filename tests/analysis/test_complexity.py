"""The paper's formulas against the counter, over sizes, in normal and in linear mode."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.analysis import complexity, count_flops
from foveal.blocks import AggregatedAttention, ConvGLU, PixelFocusedAttention

sides = st.integers(2, 40)
grids = st.tuples(sides, sides)
windows = st.sampled_from([1, 3, 5, 9])
few = settings(max_examples=12, deadline=None)
FORMULAS = {
    PixelFocusedAttention: complexity.pixel_focused_attention,
    AggregatedAttention: complexity.aggregated_attention,
}


def counted(block: torch.nn.Module, grid: tuple[int, int], dim: int, batch: int = 1) -> int:
    return count_flops(block, torch.empty(batch, *grid, dim, device="meta")) // 2


@few
@given(
    block=st.sampled_from(list(FORMULAS)), grid=grids, heads=st.integers(1, 3), ratio=st.integers(1, 9), window=windows
)
def test_attention_in_normal_mode(block, grid, heads, ratio, window):
    dim = 8 * heads
    ratio = min(ratio, max(grid) // 2)  # of a single pooled cell, the definitions make no matrix product
    attention = block(dim, heads, pool_ratio=ratio, window_size=window, pool_bias=None, device="meta")
    formula = FORMULAS[block](grid, attention.key_grid(grid), dim, window_size=window)
    assert counted(attention, grid, dim) == formula


@few
@given(block=st.sampled_from(list(FORMULAS)), grid=grids, pool=st.integers(2, 8))
def test_attention_in_linear_mode(block, grid, pool):
    attention = block(16, 2, pool_grid=pool, pool_bias=None, device="meta")
    assert counted(attention, grid, 16) == FORMULAS[block](grid, pool, 16)


def test_linear_mode_is_linear_in_the_pixels():
    cost = partial(complexity.aggregated_attention, pool_grid=7, dim=72)
    first, second, third = (cost((56 * n, 56)) for n in (1, 2, 3))
    assert third - second == second - first
    normal = [complexity.aggregated_attention((56 * n, 56), (7 * n, 7), 72) for n in (1, 2, 3)]
    assert normal[2] - normal[1] > normal[1] - normal[0]


@few
@given(grid=grids, dim=st.integers(1, 40), hidden=st.integers(1, 60), kernel=windows, batch=st.integers(1, 3))
def test_conv_glu(grid, dim, hidden, kernel, batch):
    block = ConvGLU(dim, hidden, kernel_size=kernel, device="meta")
    assert counted(block, grid, dim, batch) == batch * complexity.conv_glu(grid, dim, hidden, kernel_size=kernel)


def test_the_equations_as_printed():
    height, width, pooled_height, pooled_width, c, k, ratio = 30, 20, 4, 5, 48, 5, 8
    area, pooled = height * width, pooled_height * pooled_width
    printed = 5 * area * c**2 + 2 * pooled * c**2 + 2 * area * pooled * c + 2 * area * k**2 * c
    arguments = ((height, width), (pooled_height, pooled_width), c)
    assert complexity.pixel_focused_attention(*arguments, window_size=k) == printed
    assert complexity.aggregated_attention(*arguments, window_size=k) == printed + area * k**2 * c
    printed = 2 * ratio * area * c**2 + 2 / 3 * ratio * area * c * 3**2
    assert complexity.conv_glu((height, width), c, 2 * ratio * c // 3) == printed


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (complexity.pixel_focused_attention, ((5,), 2, 8), "grid must be two positive integers"),
        (complexity.aggregated_attention, (5, (0, 2), 8), "pool_grid must be two positive integers"),
        (complexity.aggregated_attention, (5, 2, 0), "dim must be a positive integer"),
        (complexity.conv_glu, (5, 8, 2.5), "hidden_dim must be a positive integer"),
    ],
)
def test_errors_name_the_argument(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_an_even_window_is_refused():
    with pytest.raises(ValueError, match="window_size must be an odd"):
        complexity.aggregated_attention(5, 2, 8, window_size=2)
