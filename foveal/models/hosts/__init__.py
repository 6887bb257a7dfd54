"""foveal's blocks in the place of modules of models that exist already."""

from foveal.models.hosts.swap import Replacement, Replacements, swap

__all__ = ["Replacement", "Replacements", "swap"]
