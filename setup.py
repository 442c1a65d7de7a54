"""Packaging: CMake builds, this only calls it and says what goes into the wheel."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_folder() -> str:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            "fastops builds against the torch you run: install torch>=2.11 first, then\n"
            "    pip install --no-build-isolation ."
        )
    return str(Path(spec.origin).parent)


class CMakeBuild(build_ext):
    """Configures and builds everything in build/cmake*, then installs into the package folder."""

    def run(self) -> None:
        import pybind11

        sanitize = os.environ.get("FASTOPS_SANITIZE", "")
        build = ROOT / "build" / ("cmake-" + sanitize.replace(",", "-") if sanitize else "cmake")
        target = ROOT / "fastops" if self.inplace else Path(self.build_lib).resolve() / "fastops"
        # cmake and ninja may come from pip, beside this interpreter, in an environment nobody
        # activated.
        env = dict(os.environ)
        env["PATH"] = str(Path(sys.executable).parent) + os.pathsep + env.get("PATH", "")
        ninja = shutil.which("ninja", path=env["PATH"])
        if ninja is None or shutil.which("cmake", path=env["PATH"]) is None:
            sys.exit("fastops builds with cmake and ninja: pip install cmake ninja")
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--log-level=NOTICE",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",  # the one cached may have gone with its environment
            f"-DFASTOPS_TORCH_DIR={torch_folder()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTOPS_SANITIZE={sanitize}",
            f"-DFASTOPS_CUDA_ARCHS={os.environ.get('FASTOPS_CUDA_ARCHS', '').replace(' ', ';')}",
            "-DCMAKE_INSTALL_MESSAGE=NEVER",
        ]  # fmt: skip
        for command in (
            configure,
            ["cmake", "--build", str(build)],
            ["cmake", "--install", str(build), "--prefix", str(target)],
        ):
            subprocess.run(command, check=True, env=env)


class BinaryExtension(Extension):
    """Marks the wheel as platform-specific; CMakeBuild does the work."""

    def __init__(self) -> None:
        super().__init__("fastops._C", sources=[])


setup(
    ext_modules=[BinaryExtension()],
    cmdclass={"build_ext": CMakeBuild},
)
