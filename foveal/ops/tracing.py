"""What a call is traced for, in every version of PyTorch that foveal runs on."""

import torch


def is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which in PyTorch 2.11 answers yes in every graph of ``torch.compile``."""
    return torch.compiler._is_exporting_flag
