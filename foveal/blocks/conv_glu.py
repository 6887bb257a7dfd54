"""ConvGLU: a gated linear unit whose gate sees its neighbours, channel attention at the price of an MLP."""

import torch.nn.functional as F
from torch import Tensor

from foveal.blocks._activation import activation_name
from foveal.blocks.glu import DepthwiseGLU
from foveal.blocks.inference import infers_on_cpu, is_plain_linear
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

    def _hidden(self, x: Tensor) -> Tensor:
        name = activation_name(self.act)
        if name is None or not infers_on_cpu(x, self.training) or not is_plain_linear(self.fc1):
            return super()._hidden(x)
        x = F.linear(x, self.fc1.weight)
        return depthwise_gate(x, self.dwconv.weight, self.dwconv.bias, name, input_bias=self.fc1.bias)

    def mix(self, x: Tensor) -> Tensor:
        name = activation_name(self.act)
        if name is not None:
            return depthwise_gate(x, self.dwconv.weight, self.dwconv.bias, name)
        gate, value = x.chunk(2, dim=-1)
        return self.act(self.dwconv(gate)) * value
