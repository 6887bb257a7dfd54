"""ConvGLU: a gated linear unit whose gate sees its neighbours, channel attention at the price of an MLP."""

from torch import Tensor

from foveal.blocks._convolution import convolve
from foveal.blocks._plain import activation_name, is_plain
from foveal.blocks.glu import DepthwiseGLU
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

    def mix(self, gate: Tensor, value: Tensor) -> Tensor:
        return self.act(convolve(self.dwconv, gate)) * value

    def gated(self, x: Tensor) -> Tensor:
        """The same of ``x = [gate | value]``, by one op where the layers are plain."""
        act = activation_name(self.act, x)
        if act is None or not is_plain(self.dwconv, x) or type(self).mix is not ConvGLU.mix:
            return super().gated(x)
        return depthwise_gate(x, self.dwconv.weight, self.dwconv.bias, act)
