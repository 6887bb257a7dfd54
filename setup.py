"""A pure Python wheel; with FOVEAL_BUILD=1, which needs torch and ninja, one with the compiled library inside."""

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def _builder():
    """foveal/ops/build.py, without importing the package."""
    spec = importlib.util.spec_from_file_location("foveal_build", Path(__file__).parent / "foveal/ops/build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        builder = _builder()
        objects = Path(self.get_finalized_command("build").build_temp).resolve()
        library = builder.compile_library(objects, builder.toolchain())
        shutil.copy(library, Path(self.build_lib) / "foveal" / "ops" / builder.library_name("cpu"))


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
