"""The wheel: everything is in it, and it works where nothing else is."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fastops import _ops

ROOT = Path(__file__).parent.parent.parent

pytestmark = [
    pytest.mark.skipif(_ops.missing is not None, reason=str(_ops.missing)),
    pytest.mark.skipif(not (ROOT / "build" / "cmake").exists(), reason="fastops was not built from this tree"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    for stale in (ROOT / "build").glob("lib*"):
        shutil.rmtree(stale)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", target, ROOT]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_is_for_this_platform(wheel):
    assert not wheel.name.endswith("none-any.whl")


def test_wheel_has_everything(unpacked):
    for name in (
        "fastops/lib/libfastops.so",
        "fastops/lib/libfastops_torch.so",
        "fastops/lib/libfastops_emulated.so",
        "fastops/include/fastops/fastops.h",
        "fastops/lib/cmake/fastops/fastops-config.cmake",
        "fastops/lib/cmake/fastops/fastops-config-version.cmake",
        "fastops/lib/pkgconfig/fastops.pc",
        "fastops/py.typed",
        "fastops/_C.pyi",
    ):
        assert (unpacked / name).is_file(), name
    assert list((unpacked / "fastops").glob("_C.*.so"))
    sources = {p.relative_to(ROOT / "fastops") for p in (ROOT / "fastops").rglob("*.py")}
    sources |= {"bench" / p.relative_to(ROOT / "bench") for p in (ROOT / "bench").rglob("*.py")}
    packed = {p.relative_to(unpacked / "fastops") for p in (unpacked / "fastops").rglob("*.py")}
    assert packed == sources
    (meta,) = unpacked.glob("fastops-*.dist-info")
    assert "fastops = fastops.cli:main" in (meta / "entry_points.txt").read_text()
    assert "License-Expression: Apache-2.0" in (meta / "METADATA").read_text()
    assert "Apache License" in (meta / "licenses" / "LICENSE").read_text()
    assert {p.name for p in unpacked.iterdir()} == {"fastops", meta.name}


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_libraries_look_for_each_other_inside_the_package_only(unpacked):
    for library in (unpacked / "fastops").rglob("*.so"):
        text = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        for path in re.findall(r"R(?:UN)?PATH.*\[(.*)\]", text):
            assert path in ("$ORIGIN", "$ORIGIN/lib"), f"{library.name}: {path}"


CODE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, fastops, fastops.bench
assert fastops.__file__.startswith(sys.argv[1]), fastops.__file__
assert fastops.bench.__file__.startswith(sys.argv[1]), fastops.bench.__file__
q = torch.randn(1, 5, 4, 64)
out = fastops.attention(q, q, q, causal=True)
exact = torch.nn.functional.scaled_dot_product_attention(*[q.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
assert torch.allclose(out, exact, atol=1e-5)
print(fastops._ops.control.last_variant(), fastops.explain("attention", q, q, q).chosen)
"""


def test_wheel_works_elsewhere_without_a_compiler(unpacked, tmp_path):
    paths = [p for p in sys.path if p and "site-packages" in p]
    paths.append(str(Path(torch.__file__).parent.parent))
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        [sys.executable, "-P", "-c", CODE, str(unpacked)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    variant, provider = result.stdout.split()
    assert provider == "cpp"
    assert variant in _ops.control.isa_names()
