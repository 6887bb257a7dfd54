"""The attention blocks once more: cell by cell, in Python loops and float64, straight from the paper's equations."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def pooling_bin(cells: int, bins: int, a: int) -> range:
    return range(math.floor(a * cells / bins), math.ceil((a + 1) * cells / bins))


def log_cpb(module, offset: tuple[float, float], pretrain_grid: Grid) -> Tensor:
    """The MLP at one relative offset, in cells: ``(heads,)``."""
    coordinates = []
    for cells, length in zip(offset, pretrain_grid, strict=True):
        r = 0.0 if length == 1 else cells / (length - 1) * 8
        coordinates.append(math.copysign(math.log2(1 + abs(r)) / math.log2(8), r))
    hidden = F.relu(module.fc1.weight @ torch.tensor(coordinates, dtype=torch.float64) + module.fc1.bias)
    return module.fc2.weight @ hidden + module.fc2.bias


def pixel_focused_attention(
    block,
    x: Tensor,
    key_grid: Grid,
    pretrain_grid: Grid,
    *,
    cosine=False,
    length_scaled=False,
    window_bias="learned",
    pool_bias="log-cpb",
) -> Tensor:
    """One map ``(H, W, C)``. Embedding and tokens count where the block has them; the rest is stated."""
    height, width, dim = x.shape
    heads, k = block.num_heads, block.window_size
    d, radius = dim // heads, k // 2

    def project(cell: Tensor) -> Tensor:
        bias = 0 if block.qkv.bias is None else block.qkv.bias
        return (block.qkv.weight @ cell + bias).view(3, heads, d)

    def unit(vector: Tensor) -> Tensor:
        return vector / max(vector.norm().item(), 1e-12) if cosine else vector

    pooled = {}
    for a in range(key_grid[0]):
        for b in range(key_grid[1]):
            members = [(i, j) for i in pooling_bin(height, key_grid[0], a) for j in pooling_bin(width, key_grid[1], b)]
            mean = sum(F.gelu(block.pool.proj.weight @ x[m] + block.pool.proj.bias) for m in members) / len(members)
            mean = (mean - mean.mean()) / (mean.var(correction=0) + 1e-5).sqrt()
            centre = tuple(sum(m[axis] for m in members) / len(members) for axis in (0, 1))
            pooled[a, b] = project(mean * block.pool.norm.weight + block.pool.norm.bias), centre
    projected = {(i, j): project(x[i, j]) for i in range(height) for j in range(width)}

    out = torch.zeros(height, width, heads, d, dtype=torch.float64)
    for (i, j), (q, _, _) in projected.items():
        cells = [((i + c // k - radius, j + c % k - radius), c) for c in range(k * k)]
        cells = [(cell, c) for cell, c in cells if cell in projected]
        for h in range(heads):
            scale = F.softplus(block.temperature[h]) if cosine else 1 / math.sqrt(d)
            scale = scale * (math.log(len(cells) + len(pooled)) if length_scaled else 1)
            query = unit(q[h])
            scaled = (query + (0 if block.query_embedding is None else block.query_embedding[h])) * scale
            logits = []
            for cell, c in cells:
                bias = 0
                if window_bias == "learned":
                    bias = block.window_bias[h, c]
                elif window_bias == "log-cpb":
                    bias = log_cpb(block.log_cpb, (c // k - radius, c % k - radius), pretrain_grid)[h]
                logits.append(scaled @ unit(projected[cell][1][h]) + bias)
            for (a, b), (kv, centre) in pooled.items():
                bias = 0
                if pool_bias == "learned":
                    bias = block.pool_bias[h, a, b]
                elif pool_bias == "log-cpb":
                    bias = log_cpb(block.log_cpb, (i - centre[0], j - centre[1]), pretrain_grid)[h]
                logits.append(scaled @ unit(kv[1][h]) + bias)
            weights = torch.stack(logits).softmax(0)
            for weight, (cell, c) in zip(weights, cells, strict=False):
                if block.positional_tokens is not None:
                    weight = weight + query @ block.positional_tokens[h, :, c] + block.positional_bias[h, c]
                out[i, j, h] += weight * projected[cell][2][h]
            for weight, (kv, _) in zip(weights[len(cells) :], pooled.values(), strict=True):
                out[i, j, h] += weight * kv[2][h]
    return out.flatten(2) @ block.proj.weight.T + block.proj.bias


def cosine_attention(block, x: Tensor, pretrain_grid: Grid, *, length_scaled=True, position_bias="log-cpb") -> Tensor:
    """Length-scaled cosine attention over one map ``(H, W, C)``."""
    height, width, dim = x.shape
    heads, cells = block.num_heads, [(i, j) for i in range(height) for j in range(width)]
    bias = 0 if block.qkv.bias is None else block.qkv.bias
    qkv = {cell: (block.qkv.weight @ x[cell] + bias).view(3, heads, dim // heads) for cell in cells}
    out = torch.zeros(height, width, heads, dim // heads, dtype=torch.float64)
    for i, j in cells:
        for h in range(heads):
            query = qkv[i, j][0, h] / qkv[i, j][0, h].norm()
            query = query + (0 if block.query_embedding is None else block.query_embedding[h])
            query = query * F.softplus(block.temperature[h]) * (math.log(len(cells)) if length_scaled else 1)
            logits = []
            for a, b in cells:
                key = qkv[a, b][1, h] / qkv[a, b][1, h].norm()
                bias = log_cpb(block.log_cpb, (i - a, j - b), pretrain_grid)[h] if position_bias else 0
                logits.append(query @ key + bias)
            for weight, cell in zip(torch.stack(logits).softmax(0), cells, strict=True):
                out[i, j, h] += weight * qkv[cell][2, h]
    return out.flatten(2) @ block.proj.weight.T + block.proj.bias
