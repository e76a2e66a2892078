#!/bin/bash
# One call on a machine with a CUDA GPU and no network: build, tests marked gpu, benchmarks, sanitizer, a short table last.
# From the repository root: bash benchmarks/gpu_check.sh
# Results go to $OUT, or to benchmarks/results: check.log, <device name>/*.json, README.md. The parts' limits add up to less
# than 10 minutes, and a failing part does not stop the next. ADA2I_CHECK_DRY=1 only says what would run.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/benchmarks/results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
log=$OUT/check.log
: > "$log"
summary=()

part() {  # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS; shift 2
    echo "== $name, at most $limit s: $*" | tee -a "$log"
    [ -n "${ADA2I_CHECK_DRY:-}" ] && return
    local output; output=$(mktemp)
    timeout "$limit" "$@" > "$output" 2>&1
    local code=$?
    cat "$output" >> "$log"
    tail -n 12 "$output"
    summary+=("$(printf '%-10s exit %-4s %4d s  %s' "$name" "$code" $((SECONDS - start)) \
        "$(grep -E '(passed|failed|ERROR SUMMARY|RACECHECK SUMMARY|cases ran)' "$output" | tail -n 1)")")
    rm -f "$output"
}

measure() { part "$1" "$2" "$PYTHON" -m benchmarks.run --results "$OUT" --name "$1" --device cuda "${@:3}"; }

# Only this card's code: a fraction of the build time.
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$($PYTHON -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2> /dev/null)}
[ -n "$TORCH_CUDA_ARCH_LIST" ] || unset TORCH_CUDA_ARCH_LIST
part build 100 "$PYTHON" -m pip install -q --no-build-isolation --no-deps --no-index -e .
part info 15 "$PYTHON" -c 'from ada2i_fast import backends; print("\n".join(f"{k}: {v}" for k, v in backends.info().items()))'
part tests 110 "$PYTHON" -m pytest -q -m gpu tests
measure layer 70 -k "test_afw_layer and not mosei"
# Whole steps, eager and as CUDA graphs, in float32 and bf16; compiling the textbook is slow, so for one shape only.
measure model 130 -k "test_model and not mosei and not (meld and compiled)"
measure tf32 45 --tf32 -k "test_model and training-float32 and not mosei and not released and not compiled"
measure scaling 30 -m scaling
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        part "$tool" 30 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m benchmarks.sanitizer_case
    done
else
    summary+=("compute-sanitizer: not found")
fi

echo; echo "== summary"
[ ${#summary[@]} -gt 0 ] && printf '%s\n' "${summary[@]}"
# The table: groups and medians of the page just rendered.
[ -f "$OUT/README.md" ] && grep -E '^(##|\| [a-z])' "$OUT/README.md" | cut -c1-110
exit 0
