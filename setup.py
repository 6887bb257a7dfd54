"""A pure Python wheel; with FOVEAL_BUILD=1, which needs torch and ninja, one with the compiled library inside.

With TORCH_CUDA_ARCH_LIST besides, which needs nvcc and no GPU, the library of those GPUs is inside too.
"""

import os
import platform
import shutil
import sys
import types
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def _builders():
    """foveal.ops.compiled, its build and its like, without importing the package and what it needs."""
    for name in ("foveal", "foveal.ops", "foveal.ops.compiled"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(__file__).parent / name.replace(".", "/"))]
        sys.modules[name] = package
    from foveal.ops.compiled import build, recipes, toolchain

    return build, recipes, toolchain


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        build, recipes, toolchain = _builders()
        targets = [recipes.cpu_target(None)]
        if "TORCH_CUDA_ARCH_LIST" in os.environ:
            targets.append(recipes.cuda_target(toolchain.architectures([])))
        objects = Path(self.get_finalized_command("build").build_temp).resolve()
        for target in targets:
            library = build.compile_library(objects / target.device, target)
            shutil.copy(library, Path(self.build_lib) / "foveal" / "ops" / "compiled" / target.name)


class PlatformWheel(bdist_wheel):
    """One library serves every Python 3."""

    def get_tag(self):
        return "py3", "none", f"linux_{platform.machine()}"


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return True


if os.environ.get("FOVEAL_BUILD") == "1":
    setup(distclass=BinaryDistribution, cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel})
else:
    setup()
