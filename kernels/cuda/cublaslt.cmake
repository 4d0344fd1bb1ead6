# The folder that holds cublasLt.h, "" if there is none: HQQLORA_CUBLASLT_INCLUDE; else the CUDA
# toolkit's (its include folders are the arguments); else that of PyPI's nvidia-cublas, which
# CUDA builds of torch bring.
set(HQQLORA_CUBLASLT_INCLUDE "" CACHE PATH "folder that holds cublasLt.h")
function(hqqlora_find_cublaslt result)
  set(${result} "${HQQLORA_CUBLASLT_INCLUDE}" PARENT_SCOPE)
  if(HQQLORA_CUBLASLT_INCLUDE)
    return()
  endif()
  find_package(Python COMPONENTS Interpreter QUIET)
  set(wheels "")
  if(Python_FOUND)
    execute_process(COMMAND "${Python_EXECUTABLE}" -c
      "import glob, sys; print(';'.join(g for p in sys.path for g in sorted(glob.glob(p + '/nvidia/*/include'), reverse=True)))"
      OUTPUT_VARIABLE wheels OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  find_path(found cublasLt.h NO_CACHE HINTS ${ARGN} ${wheels})
  if(found)
    set(${result} "${found}" PARENT_SCOPE)
  endif()
endfunction()
