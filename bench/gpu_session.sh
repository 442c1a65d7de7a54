#!/usr/bin/env bash
# One session on a machine with a GPU: build, test, sanitise, measure, in this order, within ten minutes on 16 cores. A
# step that fails or runs out of time does not keep the others from running; the script fails then.
#   bench/gpu_session.sh [OUT]      results go to OUT (default: bench/results)
# Needs nvcc, a torch with CUDA, cmake, ninja and pybind11; wheels in ./wheels (rivals and what they need) are installed
# first when they are there, each for itself: one that cannot be is left out.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
mkdir -p "$out"
failed=""
step() { # NAME SECONDS COMMAND...: its output is shown and kept
  local name=$1 limit=$2 left=$((590 - SECONDS))
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -lt 1 ]; then
    failed="$failed $name(no time left)"
  elif ! timeout "$limit" "$@" 2>&1 | tee "$out/gpu-$name.log"; then
    failed="$failed $name"
  fi
}
for wheel in wheels/*.whl; do
  [ -e "$wheel" ] && { pip install --no-index --no-deps "$wheel" || echo "left out: $wheel"; }
done
arch=$(python -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + ("a" if a == 9 else ""))') || exit 1
gpu=$(python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
FASTOPS_CUDA_ARCHS=$arch pip install --no-build-isolation --no-deps -e . || exit 1
python -m fastops info
step instructions 30 python tools/instructions.py --gpu "$out/$gpu-instructions.json"
step tests 170 python -m pytest tests/cuda -q -k "not compiles_without_spills"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" 70 compute-sanitizer --tool "$tool" --error-exitcode 9 python bench/gpu.py --small
  done
fi
step bench 220 python bench/gpu.py --json "$out/$(date +%F)-$gpu.json"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
