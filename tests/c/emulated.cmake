# libhqqlora_cuda_emulated: the CUDA library with its kernels compiled as plain C++ and run on the
# CPU (see ../cuda_on_cpu). No CUDA toolkit is needed; device pointers are the CPU's own. In a
# sanitized build it is sanitized too.
#
# libhqqlora_cuda_emulated_race: the same, with the race checker.
find_package(Threads REQUIRED)
file(READ "${PROJECT_SOURCE_DIR}/c_api/hqqlora_cuda.map" map)
string(REPLACE "local: *;" "hqqlora_emulated_*;\n  local: *;" map "${map}")
file(CONFIGURE OUTPUT emulated.map CONTENT "${map}" @ONLY)

function(emulated_library target check)
  add_cuda_on_cpu_library(${target}_kernels SOURCES ${HQQLORA_CUDA_KERNEL_SOURCES_FULL}
    ${HQQLORA_CUDA_WIDE_SOURCES_FULL}
    CHECK ${check})
  hqqlora_library(${target} ${CMAKE_CURRENT_BINARY_DIR}/emulated.map
    ${PROJECT_SOURCE_DIR}/kernels/status.c
    ${HQQLORA_CUDA_HOST_SOURCES_FULL}
    ${CUDA_ON_CPU_DIR}/gemm_on_cpu.c)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/kernels/cuda)
  # weights of any size are cut into blocks, so that small tests see several
  target_compile_definitions(${target} PRIVATE HQQ_CUDA_WHOLE_BYTES_MOST=0
    HQQ_CUDA_HAS_WIDE=1)
  target_link_libraries(${target} PRIVATE ${target}_kernels Threads::Threads)
  set_target_properties(${target} PROPERTIES LINKER_LANGUAGE CXX)
endfunction()

if(HQQLORA_SANITIZE)
  emulated_library(hqqlora_cuda_emulated sanitize)
else()
  emulated_library(hqqlora_cuda_emulated none)
  emulated_library(hqqlora_cuda_emulated_race race)
endif()
