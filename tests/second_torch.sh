#!/usr/bin/env bash
# The libraries that were built against one torch, run under another: one wheel, installed where
# nothing is compiled, and the same SHA-256 in both environments. The second torch is, on Linux,
# a CUDA build, as PyPI has no other (some 5 GB): there the CUDA half is loaded too, if it was
# built (HQQLORA_CUDA_ARCHITECTURES), and does what it can without a GPU.
#
#   BUILT_VENV=.venv tests/second_torch.sh               (make test-torch-versions)
#   SECOND_TORCH=torch==2.10.0 make test-torch-versions
#   SECOND_VENV=DIR                                      an environment to use instead of
#                                                        .venv-second-torch beside BUILT_VENV
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
built=$(cd "${BUILT_VENV:-.venv}" && pwd)
second=${SECOND_VENV:-$(dirname "$built")/.venv-second-torch}
torch=${SECOND_TORCH:-torch==2.14.1}
# as the Makefile has it, so that both environments get the same libraries
export HQQLORA_CUDA=${HQQLORA_CUDA:-${HQQLORA_CUDA_ARCHITECTURES:+ON}}
export HQQLORA_CUDA=${HQQLORA_CUDA:-OFF}
pip() { "$1/bin/python" -m pip --quiet --disable-pip-version-check "${@:2}"; }

rm -rf build/wheel
pip "$built" wheel --no-deps --no-build-isolation --wheel-dir build/wheel .

[ -x "$second/bin/python" ] || "$python" -m venv "$second"
pip "$second" install "$torch" numpy safetensors tqdm setuptools expecttest
pip "$second" install --no-deps --force-reinstall build/wheel/hqqlora-*.whl

# from elsewhere, so that neither finds the sources
smoke=$PWD/tests/second_torch_smoke.py
cuda_tests=("$PWD"/tests/test_cuda_{shim,device}.py)
mkdir -p build/second-torch && cd build/second-torch
"$built/bin/python" "$smoke" | tee built.txt
"$second/bin/python" "$smoke" | tee second.txt
if ! diff <(tail -n +2 built.txt) <(tail -n +2 second.txt); then
    echo "these are not the same libraries" >&2
    exit 1
fi
if diff <(head -n 1 built.txt) <(head -n 1 second.txt) >/dev/null; then
    echo "these are not two versions of torch" >&2
    exit 1
fi
echo "two versions of torch, the same libraries"

if "$second/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    pip "$second" install 'pytest>=8' 'hypothesis>=6'
    "$second/bin/python" -m pytest -p no:cacheprovider "${cuda_tests[@]}"
fi
