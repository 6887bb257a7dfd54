"""ConvGLU: a gated linear unit whose gate sees its neighbours, channel attention at the price of an MLP."""

from torch import Tensor

from foveal.blocks._checks import check_map
from foveal.blocks._plain import activation_name, is_plain
from foveal.blocks.depthwise_conv import convolve
from foveal.blocks.glu import DepthwiseGLU, halves
from foveal.ops import depthwise_gate


class ConvGLU(DepthwiseGLU):
    """``fc2(act(dwconv(gate)) * value)`` where ``gate, value = fc1(x)`` (equation 19).

    Maps ``(B, H, W, C)`` to ``(B, H, W, out_dim)``. With ``hidden_dim`` two thirds of an MLP's, it has the MLP's size.

    Args:
        dim: channels C.
        hidden_dim: width of the gate and of the value; None means int(dim * 4 * 2 / 3).
        out_dim: output channels; None means dim.
        act_layer: activation of the gate.
        kernel_size: side of the depthwise convolution, odd.
        drop: dropout before and after the last Linear.

    Example:
        >>> ConvGLU(96, hidden_dim=256)(torch.randn(2, 14, 14, 96)).shape
        torch.Size([2, 14, 14, 96])
    """

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.dim)
        return self.drop(self.fc2(self.drop(self.gated(self.fc1(x)))))

    def gated(self, x: Tensor) -> Tensor:
        """``act(dwconv(gate)) * value`` of ``x = [gate | value]``, by one op where both layers are plain."""
        act = activation_name(self.act, x)
        if act and is_plain(self.dwconv, x):
            return depthwise_gate(x, self.dwconv.weight, self.dwconv.bias, act)
        gate, value = halves(x)
        return self.act(convolve(self.dwconv, gate)) * value
