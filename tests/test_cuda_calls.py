"""What the CUDA half may ask of CUDA and of torch, read from its source. A CUDA graph captures
its calls, and nothing in a training step waits: so no call that synchronises, that takes or
frees memory (torch's allocator does), or that copies to the host."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
C_SUFFIXES = {".c", ".h", ".cu", ".cuh", ".cpp"}

# Each is captured into a graph, or asks about a device or a kernel.
CUDA_CALLS = {
    "cudaDeviceGetAttribute",
    "cudaFuncGetAttributes",
    "cudaFuncSetAttribute",
    "cudaGetDevice",
    "cudaGetErrorString",
    "cudaLaunchKernelEx",
    "cudaMemsetAsync",
}
# cublasLtMatmul is captured; the others work on the host, but for Create (see hqqlora.h).
CUBLASLT_CALLS = {
    "Create",
    "GetStatusString",
    "Matmul",
    "MatmulAlgoGetHeuristic",
    "MatmulDescCreate",
    "MatmulDescDestroy",
    "MatmulDescSetAttribute",
    "MatmulPreferenceCreate",
    "MatmulPreferenceDestroy",
    "MatmulPreferenceSetAttribute",
    "MatrixLayoutCreate",
    "MatrixLayoutDestroy",
}
# Of the stable ABI; those that read a tensor's value on the host are `quantize`'s alone.
READING_A_VALUE = {"aoti_torch_item_bool", "aoti_torch_item_float64", "aoti_torch_item_int64"}
TORCH_CALLS = READING_A_VALUE | {
    "aoti_torch_copy_",
    "aoti_torch_device_type_cpu",
    "aoti_torch_device_type_cuda",
    "aoti_torch_device_type_meta",
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_dtype_float16",
    "aoti_torch_dtype_float32",
    "aoti_torch_dtype_int32",
    "aoti_torch_dtype_uint8",
    "aoti_torch_empty_strided",
    "aoti_torch_get_current_cuda_stream",
    "aoti_torch_get_device_index",
    "aoti_torch_get_device_type",
}
TORCH_OPS = {"aten::any", "aten::isfinite", "aten::isnan", "aten::logical_not", "aten::nonzero"}
TORCH_OPS |= {"aten::sqrt"}


def sources(*folders):
    """Path to text without comments."""
    found = {
        path: re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(encoding="utf-8"), flags=re.S)
        for folder in folders
        for path in sorted((ROOT / folder).iterdir())
        if path.suffix in C_SUFFIXES
    }
    assert found
    return found


def named(pattern, files):
    return {name for text in files.values() for name in re.findall(pattern, text)}


@pytest.fixture(scope="module")
def library():
    return sources("kernels", "kernels/cuda", "c_api")


@pytest.fixture(scope="module")
def shim():
    return {
        path: text
        for path, text in sources("ops").items()
        if path.name != "torch_context_cpu.cpp"  # which no CUDA tensor meets
    }


def test_the_librarys_calls_into_cuda(library):
    functions = named(r"\b(cuda[A-Z]\w*)\s*\(", library)
    assert functions == CUDA_CALLS
    assert not named(r"\b(cu[A-Z][a-z]\w*)\s*\(", library)  # the driver's
    assert not named(r"<<<", library)


def test_the_librarys_calls_into_cublaslt(library):
    (header,) = (text for path, text in library.items() if path.name == "cublaslt.h")
    assert set(re.findall(r"\bX\((\w+)\)", header)) == CUBLASLT_CALLS
    assert not named(r"\b(cublas(?!lt)\w*)\s*\(", library)


def test_the_host_code_of_cuda_allocates_nothing(library):
    host = {path: text for path, text in library.items() if path.parent.name != "kernels"}
    assert not named(r"\b(malloc|calloc|realloc|aligned_alloc|free|new|delete)\s*\(", host)


def test_the_shims_calls_into_torch(shim):
    assert named(r"\b(aoti_torch_\w+)\s*\(", shim) == TORCH_CALLS
    assert named(r'"(aten::\w+)"', shim) == TORCH_OPS


def test_only_quantize_looks_at_values(shim):
    reading = {
        path.name
        for path, text in shim.items()
        if READING_A_VALUE & set(re.findall(r"\w+", text))
    }
    assert reading == {"finite.cpp"}
    callers = {path.name for path, text in shim.items() if "check_finite(" in text}
    assert callers == {"finite.cpp", "finite.h", "quantize.cpp"}
    # and nobody dereferences a tensor's data pointer where it is asked for
    assert not named(r"\*\s*\w+(?:->|\.)(?:const_|mutable_)data_ptr", shim)
