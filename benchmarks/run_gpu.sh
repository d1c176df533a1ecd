#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes: builds in place, tests, memory and race checks,
# benchmarks.
#
#     benchmarks/run_gpu.sh OUT
#
# Needs a GPU, nvcc, a C++ compiler, and a python3 (or $PYTHON) with torch, setuptools, ninja, numpy and pytest;
# matplotlib for the plots (they can be drawn elsewhere: bench_ops.py --plot). Installs nothing.
# OUT gets log.txt (everything), summary.txt (one line a stage) and results/<GPU>/*. Each stage has a time limit and a
# failing one does not stop the rest; the exit status is 0 if all succeeded.
# Without a GPU, DEVICE=cpu runs the same stages as far as a CPU goes, at tiny sizes.
set -uo pipefail
cd "$(dirname "$0")/.."
[[ $# -eq 1 ]] || { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
TOTAL=${TOTAL:-535} # seconds for all stages together
LOG=$OUT/log.txt
SUMMARY=$OUT/summary.txt
: >"$LOG"
: >"$SUMMARY"
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0

# stage NAME SECONDS COMMAND...
stage() {
  local name=$1 limit=$2 left=$((TOTAL - SECONDS)) start=$SECONDS status=0 outcome
  shift 2
  ((limit < left)) || limit=$left
  printf '\n=== %s (at most %d s): %s\n' "$name" "$limit" "$*" | tee -a "$LOG"
  if ((limit < 5)); then
    outcome="NOT RUN, no time left"
    failed=1
  else
    timeout -k 5 "$limit" "$@" >>"$LOG" 2>&1 || status=$?
    case $status in
    0) outcome=ok ;;
    124 | 137) outcome="FAILED, out of time" ;;
    *) outcome="FAILED, exit status $status" ;;
    esac
    ((status == 0)) || failed=1
  fi
  printf '%-28s %4d s  %s\n' "$name" $((SECONDS - start)) "$outcome" | tee -a "$SUMMARY" "$LOG"
}

skip() {
  printf '%-28s    -    skipped: %s\n' "$1" "$2" | tee -a "$SUMMARY" "$LOG"
}

have() {
  "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

for package in torch setuptools ninja numpy pytest; do
  have "$package" || echo "$PYTHON has no $package: stages that need it will fail" | tee -a "$LOG" "$SUMMARY"
done

sanitizer() {
  local tool=$1 seconds=$2 program
  program=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null)
  if [[ $DEVICE == cpu ]]; then
    stage "$tool" "$seconds" "$PYTHON" -m tests.gpu.exercise --device cpu
  elif [[ -z $program ]]; then
    skip "$tool" "no compute-sanitizer"
  else
    # Without the caching allocator every tensor is an allocation of its own, and its ends are watched.
    stage "$tool" "$seconds" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m tests.gpu.exercise
  fi
}

if [[ $DEVICE == cuda ]]; then
  export SIB_EXT_REQUIRE_GPU=1 # tests that cannot run fail
  stage "GPU" 30 nvidia-smi
  stage "build" 150 env SIB_EXT_CUDA=1 "$PYTHON" setup.py build_ext --inplace
else
  skip "build" "DEVICE=$DEVICE"
fi
stage "what runs" 30 "$PYTHON" -m sib_ext.info
stage "small inputs" 60 "$PYTHON" -m tests.gpu.exercise --device "$DEVICE"
stage "tests, CUDA kernels" 120 "$PYTHON" -m pytest tests/gpu -k native -q -rfEs --tb=short --durations=5 -p no:cacheprovider
bench=(--device "$DEVICE" --out "$OUT/results")
if [[ $DEVICE == cpu ]]; then bench+=(--tiny --seconds 0.05); fi
stage "benchmark of the ops" 150 "$PYTHON" benchmarks/bench_ops.py "${bench[@]}"
# For comparison: the products without tensor cores.
stage "ops, plain products" 40 env SIB_EXT_TENSOR_CORES=0 "$PYTHON" benchmarks/bench_ops.py "${bench[@]}" --parts native
sanitizer memcheck 80
sanitizer racecheck 80
step=(--device "$DEVICE" --out "$OUT/results")
if [[ $DEVICE == cpu ]]; then step+=(--tiny); fi
stage "benchmark of a step" 110 "$PYTHON" benchmarks/bench_step.py "${step[@]}"
stage "tests, engines" 90 "$PYTHON" -m pytest tests/gpu/test_engines_on_a_gpu.py -k 'not native and not triton' -q -rfEs \
  --tb=short --durations=5 -p no:cacheprovider
stage "tests, Triton" 120 "$PYTHON" -m pytest tests/gpu -k triton -q -rfEs --tb=short --durations=5 -p no:cacheprovider

printf '\n--- the benchmark\n'
sed -n '/^forward + backward of both ops/,/^=== memcheck/p' "$LOG" | head -70
printf '\n--- what failed in the tests and checks\n'
grep -E '^(FAILED|ERROR)[ :]|^RuntimeError|^========= (ERROR|RACECHECK|Invalid|Error|Race)' "$LOG" | cut -c1-250 | head -60
printf '\n--- summary (%d s; everything in %s)\n' "$SECONDS" "$OUT"
cat "$SUMMARY"
exit $failed
