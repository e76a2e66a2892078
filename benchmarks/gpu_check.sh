#!/bin/bash
# One call on a machine with a CUDA GPU and no network: build, benchmarks, tests marked gpu, sanitizer, a short table last.
# From the repository root: bash benchmarks/gpu_check.sh [PART ..]; without names all parts.
# Results go to $OUT, or to benchmarks/results: check.log, <device name>/*.json, README.md. The parts' limits add up to less
# than 10 minutes, and a failing part does not stop the next; one that is cut off is interrupted, so pytest still sums up and
# benchmarks keep the groups that are complete. ADA2I_CHECK_DRY=1 only says what would run.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/benchmarks/results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
log=$OUT/check.log
: > "$log"
summary=$(mktemp)
wanted=" $* "

asked() { [ "$wanted" = "  " ] || [[ $wanted == *" $1 "* ]]; }

part() {  # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS; shift 2
    asked "$name" || return
    echo "== $name, at most $limit s: $*" | tee -a "$log"
    [ -n "${ADA2I_CHECK_DRY:-}" ] && return
    local output; output=$(mktemp)
    timeout --signal INT --kill-after 15 "$limit" "$@" > "$output" 2>&1
    local code=$?
    { echo "== $name"; cat "$output"; } >> "$log"
    grep -E '^(FAILED|ERROR)|\] (FAILED|ERROR) |^[A-Za-z_.]+(Error|Exception|Result): |passed|failed' "$output" | cut -c1-200 | tail -n 12
    printf '%-10s exit %-4s %4d s  %s\n' "$name" "$code" $((SECONDS - start)) \
        "$(grep -E '(passed|failed|ERROR SUMMARY|RACECHECK SUMMARY|cases ran)' "$output" | tail -n 1)" >> "$summary"
    rm -f "$output"
}

measure() { part "$1" "${limit:-$2}" "$PYTHON" -m benchmarks.run --results "$OUT" --name "$1" --device cuda --rounds "$rounds" "${@:3}"; }

measure_part() {  # measure_part NAME ROUNDS [SECONDS]
    local rounds=$2 limit=${3:-} others="not mosei and not algebra and not compiled"
    case $1 in
        # A layer for 1,000 dialogues.
        many) measure many 35 -m scaling -k "test_many_dialogues and not algebra" ;;
        # Compiling the textbook is slow: for one shape only.
        compiled-layer) measure compiled-layer 35 --tf32 -k "iemocap-training-float32 and test_afw_layer and not algebra" ;;
        compiled) measure compiled 40 --tf32 -k "iemocap-training-float32 and test_model and not algebra" ;;
        # Whole steps, eager and as CUDA graphs.
        tf32) measure tf32 45 --tf32 -k "test_model and training-float32 and $others and not released" ;;
        released) measure released 40 --tf32 -k "test_model and training-float32 and $others and released and iemocap" ;;
        bf16) measure bf16 45 -k "test_model and training-bfloat16 and $others" ;;
        model) measure model 40 -k "test_model and float32 and $others and not released and not meld-training" ;;
        layer) measure layer 40 -k "test_afw_layer and training and $others" ;;
    esac
}

sanitize() {
    if command -v compute-sanitizer > /dev/null; then
        for tool in memcheck racecheck; do
            part "$tool" 70 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m benchmarks.sanitizer_case
        done
    else
        echo "compute-sanitizer: not found" >> "$summary"
    fi
}

# Only this card's code, and of the CPU's no more than tests compare with: a fraction of the build time.
export ADA2I_FAST_CPU_TIERS=${ADA2I_FAST_CPU_TIERS:-baseline} CXXFLAGS=${CXXFLAGS:--O1}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$($PYTHON -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2> /dev/null)}
[ -n "$TORCH_CUDA_ARCH_LIST" ] || unset TORCH_CUDA_ARCH_LIST
part build 60 "$PYTHON" -m pip install -q --no-build-isolation --no-deps --no-index -e .
part info 5 "$PYTHON" -c 'from ada2i_fast import backends; print("\n".join(f"{k}: {v}" for k, v in backends.info().items()))'
# First the tests and, beside them, where this is wanted, what takes compilers long: their caches serve the measurements.
workers=$($PYTHON -c 'import os, xdist; print("-n", min(13, os.cpu_count()), "--dist worksteal")' 2> /dev/null)
sanitize &
for name in compiled compiled-layer many layer; do
    asked "$name" && [ -z "${ADA2I_CHECK_DRY:-}" ] && (OUT=$(mktemp -d); log=/dev/null; summary=/dev/null; measure_part "$name" 1 170) > /dev/null 2>&1 &
done
part tests 170 "$PYTHON" -m pytest -q --no-header -m gpu tests -p no:cacheprovider $workers
wait
for name in many compiled-layer compiled tf32 bf16 released layer model; do measure_part "$name" 7; done
part profile 40 "$PYTHON" -m benchmarks.profile --device cuda --results "$OUT"

echo; echo "== summary"
cat "$summary"
# The table: groups and medians of the page just rendered.
[ -f "$OUT/README.md" ] && grep -E '^(##|\| [a-z])' "$OUT/README.md" | cut -c1-110
exit 0
