#!/bin/bash
# One call on a machine with a CUDA GPU and no network: build, tests marked gpu, sanitizer, benchmarks, a short table last.
# From the repository root: bash benchmarks/gpu_check.sh
# Results go to $OUT, or to benchmarks/results. Meant to end within 10 minutes; each part has its own limit and a failing
# part does not stop the next. ADA2I_CHECK_DRY=1 only says what would run.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-$PWD/benchmarks/results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
summary=()

part() {  # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS; shift 2
    echo "== $name: $*"
    [ -n "${ADA2I_CHECK_DRY:-}" ] && return
    timeout "$limit" "$@" > "$OUT/$name.log" 2>&1
    local code=$?
    tail -n 12 "$OUT/$name.log"
    summary+=("$(printf '%-12s exit %-4s %4d s   %s' "$name" "$code" $((SECONDS - start)) "$(grep -E 'passed|failed|ERROR SUMMARY|RACECHECK SUMMARY' "$OUT/$name.log" | tail -n 1)")")
}

# Only this card's code: a fraction of the build time.
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$($PYTHON -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null)}
part build 120 $PYTHON -m pip install -q --no-build-isolation --no-deps --no-index -e .
part info 30 $PYTHON -c 'from ada2i_fast import backends; print("\n".join(f"{k}: {v}" for k, v in backends.info().items()))'
part tests 150 $PYTHON -m pytest -q -m gpu tests
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        part "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 $PYTHON -m benchmarks.sanitizer_case
    done
else
    summary+=("compute-sanitizer: not found")
fi
part benchmarks 210 $PYTHON -m benchmarks.run --results "$OUT" --name default --device cuda -k "(afw_layer and not mosei) or (model and not mosei)"

echo; echo "== summary"
[ ${#summary[@]} -gt 0 ] && printf '%s\n' "${summary[@]}"
# The table: groups and medians of the page just rendered.
[ -f "$OUT/README.md" ] && grep -E '^(##|\| [a-z])' "$OUT/README.md" | cut -c1-110
exit 0
