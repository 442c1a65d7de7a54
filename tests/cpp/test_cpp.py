"""The C library as C and C++ programs see it: headers, linking, symbols, and random descriptors."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fastops
from fastops import _ops

HERE = Path(__file__).parent
PACKAGE = Path(fastops.__file__).parent
LIB, INCLUDE = PACKAGE / "lib", PACKAGE / "include"
BUILD = HERE.parent.parent / "build" / "cmake"
CC, CXX = shutil.which(os.environ.get("CC", "cc")), shutil.which(os.environ.get("CXX", "c++"))
SANITIZE = ["-fsanitize=address,undefined"] if os.environ.get("FASTOPS_SANITIZED") else []
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "FASTOPS_ISA")}

pytestmark = [
    pytest.mark.skipif(_ops.missing is not None, reason=str(_ops.missing)),
    pytest.mark.skipif(CC is None or CXX is None, reason="no C and C++ compiler"),
]


def run(*command, **options):
    result = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **options
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def link():
    return [f"-I{INCLUDE}", f"-L{LIB}", "-lfastops", "-lm", "-pthread", f"-Wl,-rpath,{LIB}"]


def test_c11_program(tmp_path):
    program = tmp_path / "consumer"
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", *SANITIZE]
    run(CC, *strict, HERE / "consumer" / "consumer.c", *link(), "-o", program)
    version, variant = run(program).split()[1:]
    assert version == fastops.__version__
    assert variant in _ops.control.isa_names()


def test_cmake_package(tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    if SANITIZE:
        pytest.skip("links without the sanitizers")
    source = HERE / "consumer"
    run(cmake, "-S", source, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={PACKAGE}")
    run(cmake, "--build", tmp_path)
    assert run(tmp_path / "consumer").split() == ["ok", fastops.__version__]


def test_pkg_config_file(tmp_path):
    pkg_config = shutil.which("pkg-config")
    if pkg_config is None:
        pytest.skip("no pkg-config")
    flags = run(pkg_config, "--cflags", "--libs", LIB / "pkgconfig" / "fastops.pc").split()
    assert any(f.startswith("-I") and Path(f[2:]).samefile(INCLUDE) for f in flags)
    assert "-lfastops" in flags


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_core_needs_no_torch_and_no_python():
    text = run("readelf", "-d", LIB / "libfastops.so")
    needed = re.findall(r"NEEDED.*\[(.*)\]", text)
    assert needed
    assert not [n for n in needed if re.search(r"torch|c10|python|gomp|omp", n)]


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_core_exports_the_c_api_only():
    header = (INCLUDE / "fastops" / "fastops.h").read_text()
    declared = set(re.findall(r"FASTOPS_API [^;(]*?(fastops_\w+)\(", header))
    lines = run("nm", "-D", "--defined-only", LIB / "libfastops.so").splitlines()
    exported = {line.split()[-1] for line in lines if line.split()[-2] in "TDB"}
    if SANITIZE:  # the sanitizers export names of their own
        exported = {name for name in exported if name.startswith("fastops")}
    assert exported == declared


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_no_library_code_is_compiled_for_an_instruction_set():
    """A weak std:: function in such an object could win at link time and then crash older machines."""
    objects = BUILD / "CMakeFiles" / "fastops.dir" / "csrc" / "cpu"
    if not objects.exists():
        pytest.skip(f"{BUILD} is missing: fastops was installed from a wheel")
    checked = 0
    for path in sorted(objects.glob("*/*.o")):
        if not re.search(r"_(avx2|avx512|avx512_vnni|avx512_bf16|amx|amx_emu)\.cpp\.o$", path.name):
            continue
        checked += 1
        weak = [line for line in run("nm", "-C", path).splitlines() if re.match(r"\w* +[WVu] ", line)]
        outside = [line for line in weak if " fastops::" not in line]
        assert not outside, f"{path.name}: {outside}"
    assert checked >= 5


def test_random_descriptors(tmp_path):
    program = tmp_path / "fuzz"
    run(CXX, "-std=c++17", "-O1", "-Wall", "-Wextra", *SANITIZE, HERE / "fuzz.cpp", *link(), "-o", program)
    for isa in ("scalar", _ops.control.isa_active()):
        run("env", f"FASTOPS_ISA={isa}", program, 0, 3000)
