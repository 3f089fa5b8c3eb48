# Looks for a CUDA compiler that works here.
#
# Reads QLORA_CUDA: in AUTO the first of CMAKE_CUDA_COMPILER, $CUDACXX, $CUDA_HOME, $CUDA_PATH, PATH and the build
# environment's pip wheels (site-packages/nvidia/cu13); in PIP the wheels alone. Sets CMAKE_CUDA_COMPILER and
# CMAKE_CUDA_FLAGS, NVCC_CODES (the architectures that it compiles for, as "sm_80;sm_86") and NVCC_VERSION, or
# NVCC_MISSING to the reason. CMake's own CUDAToolkit is not asked: it wants libraries that the wheels lack.

function(find_nvcc_in_wheels result)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "
import importlib.util, pathlib
spec = importlib.util.find_spec('nvidia')
for folder in spec.submodule_search_locations if spec else []:
    nvcc = pathlib.Path(folder, 'cu13', 'bin', 'nvcc')
    if nvcc.exists():
        print(nvcc)
        break
" OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

function(find_nvcc)
  set(nvcc "")
  if(QLORA_CUDA STREQUAL "PIP")
    set(places "the build environment's wheels (site-packages/nvidia/cu13)")
    find_nvcc_in_wheels(nvcc)
  else()
    set(places "CMAKE_CUDA_COMPILER, CUDACXX, CUDA_HOME, CUDA_PATH, PATH, site-packages/nvidia/cu13")
    if(CMAKE_CUDA_COMPILER)
      set(nvcc "${CMAKE_CUDA_COMPILER}")
    elseif(DEFINED ENV{CUDACXX})
      set(nvcc "$ENV{CUDACXX}")
    else()
      find_program(nvcc_program nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin NO_DEFAULT_PATH NO_CACHE)
      if(NOT nvcc_program)
        find_program(nvcc_program nvcc PATHS ENV PATH NO_DEFAULT_PATH NO_CACHE)
      endif()
      if(nvcc_program)
        set(nvcc "${nvcc_program}")
      else()
        find_nvcc_in_wheels(nvcc)
      endif()
    endif()
  endif()
  if(NOT nvcc)
    set(NVCC_MISSING "no nvcc in ${places}" PARENT_SCOPE)
    return()
  endif()

  # The wheels keep libraries in lib, where their own nvcc does not look.
  set(flags "$ENV{CUDAFLAGS} ${CMAKE_CUDA_FLAGS}")
  get_filename_component(root "${nvcc}" REALPATH)
  get_filename_component(root "${root}" DIRECTORY)
  get_filename_component(root "${root}" DIRECTORY)
  if(EXISTS "${root}/lib/libcudart_static.a" AND NOT EXISTS "${root}/lib64")
    string(APPEND flags " -L${root}/lib")
  endif()
  string(STRIP "${flags}" flags)

  # One small program says whether headers, libraries and the host compiler fit.
  set(probe "${CMAKE_BINARY_DIR}/probe_nvcc")
  file(WRITE "${probe}.cu"
       "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <string>\n__global__ void Probe() {}\n"
       "std::string Launch() { Probe<<<1, 1>>>(); return cudaGetErrorName(cudaGetLastError()); }\n")
  set(host_compiler "${CMAKE_CXX_COMPILER}")
  if(CMAKE_CUDA_HOST_COMPILER)
    set(host_compiler "${CMAKE_CUDA_HOST_COMPILER}")
  elseif(DEFINED ENV{CUDAHOSTCXX})
    set(host_compiler "$ENV{CUDAHOSTCXX}")
  endif()
  separate_arguments(flag_list UNIX_COMMAND "${flags}")
  execute_process(
    COMMAND "${nvcc}" -std=c++17 -arch=sm_80 -ccbin "${host_compiler}" ${flag_list} -Xcompiler -fPIC -shared
            "${probe}.cu" -o "${probe}.so"
    RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(failed)
    string(REGEX MATCH "[^\n]*(error|unsupported|No such file|cannot find)[^\n]*" line "${output}")
    if(NOT line)
      string(STRIP "${output} (exit ${failed})" line)
    endif()
    string(REGEX REPLACE "[\";\\\n]" " " line "${line}")  # it becomes a string of C++
    set(NVCC_MISSING "${nvcc} does not compile a small program: ${line}" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${nvcc}" --list-gpu-code OUTPUT_VARIABLE codes OUTPUT_STRIP_TRAILING_WHITESPACE
                  COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE "\n" ";" codes "${codes}")
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE version COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX REPLACE ".* V([0-9.]+).*" "\\1" version "${version}")
  set(CMAKE_CUDA_COMPILER "${nvcc}" CACHE FILEPATH "CUDA compiler" FORCE)
  set(CMAKE_CUDA_HOST_COMPILER "${host_compiler}" CACHE FILEPATH "Host compiler of CUDA code" FORCE)
  set(CMAKE_CUDA_FLAGS "${flags}" CACHE STRING "Flags of the CUDA compiler" FORCE)
  set(NVCC_CODES "${codes}" PARENT_SCOPE)
  set(NVCC_VERSION "${version}" PARENT_SCOPE)
endfunction()
