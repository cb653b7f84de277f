#!/usr/bin/env bash
# Everything of the trainer that needs a GPU, in under 9 minutes: parity of attention, a run of every mode, resume to the
# bit, micro-batches found by trying, the benches beside a plain GPT-2. One JSON line a result as it comes, a table last.
#
#     scripts/gpu_check.sh                     # where this project is installed
#     scripts/gpu_check.sh --wheels FOLDER     # no network: these wheels go to a temporary folder first
#     scripts/gpu_check.sh --cpu               # the same at tiny sizes on a CPU
#     scripts/gpu_check.sh --only parity resume --seconds 200
#
# Nothing but this checkout is read. On a machine that has torch 2.11 or later, numba, pyarrow, numpy, rich, safetensors,
# tokenizers, xxhash, fsspec and click, FOLDER holds wheels for its Python of: pydantic, pydantic-core (the version that
# pydantic asks for), annotated-types, typing-inspection, orjson, zstandard, universal-pathlib, pathlib-abc.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=${PYTHON:-$PWD/.venv/bin/python}
if [ "${1:-}" = --wheels ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    for wheel in "$2"/*.whl; do "$python" -m zipfile -e "$wheel" "$site"; done # all that pip would do, without pip
    export PYTHONPATH="$site:${PYTHONPATH:-}"
    shift 2
fi
export PYTHONPATH="$PWD:$PWD/scripts:${PYTHONPATH:-}" CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONUNBUFFERED=1
"$python" scripts/gpu_check.py "$@"
