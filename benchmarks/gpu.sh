#!/usr/bin/env bash
# The day a GPU is at hand: builds for it, tests on it, measures on it. Ten minutes at most.
#
#     benchmarks/gpu.sh                    with `python3`; PYTHON=... chooses another
#     SECONDS_IN_ALL=900 benchmarks/gpu.sh
#
# Needs an NVIDIA driver, nvcc, and a Python with a CUDA build of torch, pytest, scikit-build-core,
# cmake and ninja; compares with hqq and bitsandbytes where they are installed. Leaves
# build/gpu/{gpu_bench.md,gpu_bench.json,*.log}. Ends with 1 if any step failed, and goes on to the
# measurements even if a test failed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-600}
OUT=build/gpu
mkdir -p "$OUT"
failed=()

stop() {
  echo "gpu.sh: $*" >&2
  exit 1
}
left() { echo $((SECONDS_IN_ALL - SECONDS)); }

# step NAME LIMIT COMMAND...: its output in a log, its end on the screen
step() {
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  if [ "$limit" -le 0 ]; then
    echo "-- $name: no time left"
    failed+=("$name (no time left)")
    return 1
  fi
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  tail -n 3 "$OUT/$name.log" | sed 's/^/   /'
  if [ $status -eq 0 ]; then
    echo "-- $name: $((SECONDS - began)) s"
  else
    echo "-- $name: FAILED with $status after $((SECONDS - began)) s, see $OUT/$name.log"
    failed+=("$name")
  fi
  return $status
}

command -v nvidia-smi >/dev/null || stop "no nvidia-smi: no NVIDIA driver, so no GPU to measure on"
nvidia-smi -L | grep -q GPU || stop "nvidia-smi lists no GPU"
command -v nvcc >/dev/null || stop "no nvcc on PATH (CUDA 12.4 or later)"
architecture=$("$PYTHON" - <<'EOF'
import sys
try:
    import torch
except ImportError:
    sys.exit(f"{sys.executable} has no torch")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA device (built for CUDA {torch.version.cuda})")
print("%d%d" % torch.cuda.get_device_capability())
EOF
) || stop "$PYTHON cannot use the GPU"
for module in pytest scikit_build_core; do
  "$PYTHON" -c "import $module" 2>/dev/null || stop "$PYTHON has no $module: pip install it first"
done
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

echo "-- building for compute capability $architecture"
HQQLORA_CUDA=ON HQQLORA_CUDA_ARCHITECTURES=$architecture-real \
  step build 360 "$PYTHON" -m pip install --disable-pip-version-check --no-build-isolation -e . ||
  stop "nothing to test without a build"

step pytest 150 "$PYTHON" -m pytest tests/test_cuda_device.py -q
grep -Eq '[0-9]+ passed' "$OUT/pytest.log" || failed+=("pytest (nothing passed: all skipped?)")

# A short part under the sanitizers: one product of each kind, where the tool is.
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$PYTHON" benchmarks/gpu_bench.py --shapes 256x512 --rows 1 16 --peers --seconds 0 \
      --out "$OUT/$tool"
    # many tokens on warpgroups, which so small a weight would not get of itself
    HQQLORA_KERNEL=tiled step "$tool-tiled" 60 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 --target-processes all "$PYTHON" benchmarks/gpu_bench.py \
      --shapes 256x512 --rows 300 --ops linear linear_dgrad --peers --seconds 0 \
      --out "$OUT/$tool-tiled"
  done
else
  echo "-- no compute-sanitizer: skipped"
fi

# predictions beside the measurements, where the tools for them are; not a reason to fail
step predictions 90 "$PYTHON" benchmarks/sass_report.py --archs "sm_$architecture" ||
  unset 'failed[-1]'

# what the choice between the wide kernel and blocks was reckoned to be worth
for kernel in tiled blocked; do
  HQQLORA_KERNEL=$kernel step "many-$kernel" 40 "$PYTHON" benchmarks/gpu_bench.py \
    --shapes 4096x4096 14336x4096 --rows 256 512 4096 --ops linear linear_dgrad --peers \
    --limit 30 --out "$OUT/many-$kernel"
done

limit=$(($(left) - 20))
[ $limit -gt 240 ] && limit=240
step measurements $((limit + 20)) "$PYTHON" benchmarks/gpu_bench.py --limit "$limit" --out "$OUT"
echo
cat "$OUT/gpu_bench.md" 2>/dev/null

echo "$SECONDS seconds in all; results in $OUT"
if [ ${#failed[@]} -gt 0 ]; then
  echo "gpu.sh: failed: $(printf '%s; ' "${failed[@]}")" >&2
  exit 1
fi
