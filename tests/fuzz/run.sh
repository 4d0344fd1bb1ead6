#!/usr/bin/env bash
# Builds a fuzz target and runs it: run.sh [SECONDS [TARGET]], 600 of fuzz_c_api unless given. New
# inputs are kept in build/fuzz/corpus-TARGET. It stops at the first that crashes, which is then in
# build/fuzz/crashes.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-600}
target=${2:-fuzz_c_api}
corpus=build/fuzz/corpus-$target
clang=${FUZZ_CLANG:-clang-14}
command -v "$clang" >/dev/null || {
  echo "fuzzing needs $clang and its sanitizers (Debian: apt install clang-14 libclang-rt-14-dev)"
  exit 1
}
mkdir -p "$corpus" build/fuzz/crashes
CC=$clang CXX=${clang/clang/clang++} cmake -S . -B build/fuzz -G Ninja \
  -DHQQLORA_FUZZ=ON -DHQQLORA_SANITIZE=address,undefined,fuzzer-no-link -DHQQLORA_AVX512=OFF \
  -DHQQLORA_TORCH=OFF -DHQQLORA_CUDA=OFF -DHQQLORA_TESTS=OFF \
  -DCMAKE_BUILD_TYPE=None -DCMAKE_C_FLAGS=-O1 >build/fuzz/configure.log
cmake --build build/fuzz --target "$target"
export UBSAN_OPTIONS=print_stacktrace=1 HQQLORA_FUZZ_COUNTS=1
run() {
  "build/fuzz/tests/fuzz/$target" -timeout=60 -rss_limit_mb=2048 -max_len=64 \
    -artifact_prefix=build/fuzz/crashes/ "$@"
}
run -runs=0 tests/fuzz/corpus # first of all: what is kept, also under a later library
run -max_total_time="$seconds" -print_final_stats=1 "$corpus" tests/fuzz/corpus
