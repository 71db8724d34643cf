#!/usr/bin/env bash
# The bench on a GPU: one call, under nine minutes; the same call again goes on where it stopped. See benchmarks/gpu.sh --help.
#   benchmarks/gpu.sh               on a GPU; results in $OUT if set, else benchmarks/results
#   benchmarks/gpu.sh --rehearse    every section on this CPU, on tiny shapes
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -W ignore -m benchmarks.gpu ${OUT:+--out "$OUT"} "$@"
