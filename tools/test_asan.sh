#!/usr/bin/env bash
# Builds a sanitized copy of the package in build/asan and runs the operator tests on it (make test-asan).
# Arguments: test paths, default tests/ops and tests/cpp.
set -euo pipefail
cd "$(dirname "$0")/.."
copy=$PWD/build/asan
FASTOPS_SANITIZE=address,undefined python setup.py -q build --build-base build/asan-base --build-lib "$copy"
# The sanitizer's runtime must come before everything else in a process whose main program lacks it, and libstdc++ with it
# (else it cannot find the __cxa_throw it wraps). Python itself leaks at exit by design.
runtime="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:handle_segv=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
# Safe path: child processes, too, import the copy and not the tree they are started in.
export PYTHONPATH=$copy PYTHONSAFEPATH=1 FASTOPS_REQUIRE_NATIVE=1 FASTOPS_SANITIZED=1
LD_PRELOAD=$runtime python -c "
import fastops
assert fastops.__file__.startswith('$copy'), fastops.__file__"
[ $# -gt 0 ] || set -- tests/ops tests/cpp
LD_PRELOAD=$runtime exec python -m pytest -p no:cacheprovider "$@"
