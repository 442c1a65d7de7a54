#!/usr/bin/env bash
# One session on a machine with a GPU: build, test, sanitise, measure. Ends within ten minutes on 16 cores.
#   bench/gpu_session.sh [OUT]      results go to OUT (default: bench/results)
# Needs nvcc, a torch with CUDA, cmake, ninja and pybind11; wheels in ./wheels (rivals and what they need) are installed
# first when they are there, each for itself: one that cannot be is left out.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
mkdir -p "$out"
for wheel in wheels/*.whl; do
  [ -e "$wheel" ] && { pip install --no-index --no-deps "$wheel" || echo "left out: $wheel"; }
done
arch=$(python - <<'PY'
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if major == 9 else ""))
PY
)
FASTOPS_CUDA_ARCHS=$arch pip install --no-build-isolation --no-deps -e .
python -m fastops info
name=$(python -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))")
python tools/instructions.py --gpu "$out/$name-instructions.json" || echo "instructions differ from the emulator's"
timeout 200 python -m pytest tests/cuda -q -x -k "not compiles_without_spills" 2>&1 | tee "$out/gpu-tests.log"
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    timeout 90 compute-sanitizer --tool "$tool" --error-exitcode 9 python bench/gpu.py --small 2>&1 | tail -20 | tee "$out/gpu-$tool.log"
  done
fi
timeout 240 python bench/gpu.py --json "$out/$(date +%F)-$name.json"
