#!/usr/bin/env bash
# Builds the fuzz target and runs it: run.sh [SECONDS], 600 unless given. New inputs are kept in
# build/fuzz/corpus. It stops at the first that crashes, which is then in build/fuzz/crashes.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-600}
clang=${FUZZ_CLANG:-clang-14}
command -v "$clang" >/dev/null || {
  echo "fuzzing needs $clang and its sanitizers (Debian: apt install clang-14 libclang-rt-14-dev)"
  exit 1
}
mkdir -p build/fuzz/corpus build/fuzz/crashes
CC=$clang CXX=${clang/clang/clang++} cmake -S . -B build/fuzz -G Ninja \
  -DHQQLORA_FUZZ=ON -DHQQLORA_SANITIZE=address,undefined,fuzzer-no-link -DHQQLORA_AVX512=OFF \
  -DHQQLORA_TORCH=OFF -DHQQLORA_CUDA=OFF -DHQQLORA_TESTS=OFF \
  -DCMAKE_BUILD_TYPE=None -DCMAKE_C_FLAGS=-O1 >build/fuzz/configure.log
cmake --build build/fuzz --target fuzz_c_api
export UBSAN_OPTIONS=print_stacktrace=1 HQQLORA_FUZZ_COUNTS=1
run() {
  build/fuzz/tests/fuzz/fuzz_c_api -timeout=20 -rss_limit_mb=2048 -max_len=64 \
    -artifact_prefix=build/fuzz/crashes/ "$@"
}
run -runs=0 tests/fuzz/corpus # first of all: what is kept, also under a later library
run -max_total_time="$seconds" -print_final_stats=1 build/fuzz/corpus tests/fuzz/corpus
