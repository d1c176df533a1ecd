#!/usr/bin/env bash
# Everything that needs a GPU: builds in place, tests, memory and race checks, benchmarks. Three calls of at most nine
# minutes each cover it, on one machine or on several:
#
#     STAGES="build small native memcheck racecheck headline step" benchmarks/run_gpu.sh OUT
#     STAGES="build growth plain engines profile triton" benchmarks/run_gpu.sh OUT2
#     STAGES="build compiled" benchmarks/run_gpu.sh OUT3
#
# Without STAGES all of them run in the order of this list, as far as TOTAL seconds (540) go. What they are, and for how
# many seconds at most (20 more are for the description of the machine; on an H200 with 16 cores most took half of it):
#
#     build      100  both native modules, in place; quick where they are there already
#     small       25  every native kernel on small inputs against the formulas
#     native     120  the tests of the native kernels
#     memcheck    30  compute-sanitizer over the small inputs
#     racecheck   45
#     headline   110  both ops at the headline size: native, the reference, the reference compiled
#     step        60  the exact step, the default and the feature map alone on ResNet-50 and ResNet-18 against the plain one
#     growth      60  time against B and H*W
#     plain       25  the headline without tensor cores
#     engines     60  the tests of SIBStep
#     profile     25  Nsight Compute: time, DRAM throughput and occupancy of every kernel
#     triton     240  the tests of the Triton kernels and their headline
#     compiled   410  the exact step of ResNet-18 under torch.compile
#
# Needs a GPU, nvcc, a C++ compiler, and a python3 (or $PYTHON) with torch, torchvision, setuptools, ninja, numpy and
# pytest. Installs nothing. OUT gets log.txt (everything), summary.json (kept up to date after every stage; also the last
# line that is printed) and results/<GPU>/*.json, at most eight files in all, whose plots are drawn elsewhere (bench_ops.py
# and bench_step.py --plot). A failing stage does not stop the rest; the exit status is 0 if none failed.
# Without a GPU, DEVICE=cpu runs the same stages as far as a CPU goes, at tiny sizes and with ten times the time.
set -uo pipefail
cd "$(dirname "$0")/.."
usage=$(sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0")
declare -A budget
ALL=()
while read -r name seconds _; do
  budget[$name]=$seconds
  ALL+=("$name")
done < <(grep -E '^    [a-z]+ +[0-9]+' <<<"$usage")

read -ra stages <<<"${STAGES:-${ALL[*]}}"
for name in "${stages[@]}"; do
  [[ -n ${budget[$name]:-} ]] || { echo "STAGES: there is no stage '$name'; choose of ${ALL[*]}" >&2; exit 2; }
done
[[ $# -eq 1 ]] || { echo "$usage" >&2; exit 2; }
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
[[ -z $(ls -A "$OUT") ]] || { echo "$OUT is not empty: name a new folder" >&2; exit 2; }
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
times=1
[[ $DEVICE != cpu ]] || times=10
TOTAL=${TOTAL:-$((540 * times))}
LOG=$OUT/log.txt
: >"$LOG"
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=0

record() {
  "$PYTHON" benchmarks/gpu_record.py "$OUT" "$@"
}

# run COMMAND... - a part of a stage; what is left of the stage's time is its limit.
run() {
  local left=$((deadline - SECONDS)) status=0
  printf '\n--- (at most %d s) %s\n' "$left" "$*" >>"$LOG"
  if ((left < 1)); then
    why="out of time"
    return 124
  fi
  timeout -k 5 "$left" "$@" >>"$LOG" 2>&1 || status=$?
  case $status in
  0) ;;
  124 | 137) why="out of time" ;;
  *) why="exit status $status" ;;
  esac
  return $status
}

skip() {
  skipped=$1
}

tests() {
  run "$PYTHON" -m tests.gpu.turns "$@" -q -rs --tb=short --durations=5 -p no:cacheprovider
}

bench_ops() {
  local options=(--device "$DEVICE" --out "$OUT/results" --no-plot --limit $((40 * times)))
  [[ $DEVICE != cpu ]] || options+=(--tiny --seconds 0.05)
  run "$PYTHON" benchmarks/bench_ops.py "${options[@]}" "$@"
}

bench_step() {
  local options=(--device "$DEVICE" --out "$OUT/results" --no-plot)
  [[ $DEVICE != cpu ]] || options+=(--tiny)
  run env SIB_EXT_IMPL="$1" "$PYTHON" benchmarks/bench_step.py "${options[@]}" "${@:2}"
}

# The path of a tool of the CUDA toolkit; nothing where it is missing.
tool() {
  command -v "$1" || ls "${CUDA_HOME:-/usr/local/cuda}/bin/$1" 2>/dev/null
}

sanitizer() {
  local program
  program=$(tool compute-sanitizer)
  if [[ $DEVICE == cpu ]]; then
    run "$PYTHON" -m tests.gpu.exercise --device cpu
  elif [[ -z $program ]]; then
    skip "no compute-sanitizer"
  else
    # Without the caching allocator every tensor is an allocation of its own, and its ends are watched. Errors that the
    # API returns are torch's own business: it asks for what may not be there.
    run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$program" --tool "$1" --report-api-errors no --error-exitcode 9 \
      "$PYTHON" -m tests.gpu.exercise
  fi
}

stage_build() {
  if [[ $DEVICE == cpu ]]; then
    skip "DEVICE=cpu"
  else
    run env SIB_EXT_CUDA=1 "$PYTHON" setup.py build_ext --inplace && run "$PYTHON" -m sib_ext.info
  fi
}
stage_small() { run "$PYTHON" -m tests.gpu.exercise --device "$DEVICE"; }
stage_native() { tests tests/gpu -k native; }
stage_headline() { bench_ops --only headline,balanced --implementations "native,reference,reference compiled"; }
stage_step() {
  local engines="plain;double_backward;default;features;published"
  bench_step native --engines "$engines" || {
    [[ $why == "out of time" ]] || bench_step reference --engines "$engines" --name bench_step_reference
    return 1
  }
}
stage_memcheck() { sanitizer memcheck; }
stage_racecheck() { sanitizer racecheck; }
stage_growth() { bench_ops --only batches,sizes --implementations native,reference --name bench_ops_growth; }
stage_plain() {
  SIB_EXT_TENSOR_CORES=0 bench_ops --only headline --implementations native --name bench_ops_plain
}
stage_engines() { tests tests/gpu/test_engines_on_a_gpu.py -k "not native and not triton"; }
stage_profile() {
  local program
  program=$(tool ncu)
  if [[ $DEVICE == cpu ]]; then
    skip "DEVICE=cpu"
  elif [[ -z $program ]]; then
    skip "no ncu"
  else
    run "$PYTHON" benchmarks/profile_ops.py "$program"
  fi
}
stage_compiled() {
  if [[ $DEVICE == cpu ]]; then
    skip "DEVICE=cpu: minutes of compiling"
  else
    bench_step native --networks resnet18 --compiled --engines "plain, compiled;compiled" --name bench_step_compiled
  fi
}
stage_triton() {
  local status=0
  deadline=$((deadline - 35 * times)) tests tests/gpu -k triton || status=1
  bench_ops --only headline,balanced --implementations "triton,reference" --name bench_ops_triton || status=1
  return $status
}

[[ $DEVICE == cpu ]] || export SIB_EXT_REQUIRE_GPU=1 # tests that cannot run fail
deadline=$((20 * times))
run "$PYTHON" benchmarks/gpu_record.py "$OUT" machine "$DEVICE" || echo "the machine is not described: $why" | tee -a "$LOG"
for name in "${stages[@]}"; do
  start=$SECONDS why= skipped= outcome=passed
  deadline=$((start + budget[$name] * times))
  ((deadline <= TOTAL)) || deadline=$TOTAL
  printf '\n=== %s\n' "$name" >>"$LOG"
  "stage_$name" || outcome=failed
  [[ -z $skipped ]] || outcome=skipped why=$skipped
  [[ $outcome != failed ]] || failed=1
  printf '%-10s %4d s  %s%s\n' "$name" $((SECONDS - start)) "$outcome" "${why:+: $why}" | tee -a "$LOG"
  record stage "$name" "$outcome" $((SECONDS - start)) ${why:+"$why"}
done

# What is printed fits in 12,000 characters, the end of it foremost.
print_part() {
  local text
  text=$(cut -c1-200 | head -c "$2")
  [[ -z $text ]] || printf '\n--- %s\n%s\n' "$1" "$text"
}
sed -n '/^=== profile/,/^===/p' "$LOG" | sed -n '/^kernel  /,/^$/p' | print_part "kernels" 2000
grep -E '^(FAILED|ERROR|WRONG)[ :]|^failed: |^========= (ERROR|RACECHECK|Invalid|Error|Race)|the device failed' "$LOG" |
  print_part "what failed" 2500
sed -n '/^forward + backward of both ops/,/^$/p;/^| network/,/^$/p' "$LOG" | print_part "benchmarks" 3000
printf '\n--- %d s; everything is in %s\n' "$SECONDS" "$1"
record print
exit $failed
