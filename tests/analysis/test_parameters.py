"""The number of parameters."""

from torch import nn

from foveal.analysis import count_parameters


def test_a_shared_parameter_counts_once():
    layer = nn.Linear(3, 4)
    assert count_parameters(nn.Sequential(layer, nn.Conv2d(2, 5, 3), layer)) == 3 * 4 + 4 + 2 * 5 * 9 + 5
