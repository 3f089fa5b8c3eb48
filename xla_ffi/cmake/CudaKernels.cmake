# The module _cuda, where a CUDA compiler works; in any case QLORA_CUDA_BUILD, one line that says what was built.

set(QLORA_CUDA "AUTO" CACHE STRING "CUDA kernels: AUTO (if a compiler is found), OFF, PIP (by the pip wheels' compiler)")
set_property(CACHE QLORA_CUDA PROPERTY STRINGS AUTO OFF PIP)
# "90a", "100a": instructions of one architecture alone are used there. No PTX: what a newer compiler writes, an older
# driver cannot load.
set(QLORA_CUDA_DEFAULT_ARCHITECTURES 80-real 86-real 89-real 90a-real 100a-real 120-real)
set(QLORA_CUDA_ARCHITECTURES "" CACHE STRING
    "Architectures (default: those of ${QLORA_CUDA_DEFAULT_ARCHITECTURES} that the compiler knows)")

if(NOT QLORA_CUDA MATCHES "^(AUTO|OFF|PIP)$")
  message(FATAL_ERROR "QLORA_CUDA must be AUTO, OFF or PIP, got '${QLORA_CUDA}'")
endif()

set(NVCC_MISSING "QLORA_CUDA=OFF")
if(NOT QLORA_CUDA STREQUAL "OFF")
  set(NVCC_MISSING "")
  include(FindNvcc)
  find_nvcc()
endif()

if(NVCC_MISSING)
  set(QLORA_CUDA_BUILD "not built: ${NVCC_MISSING}")
  message(STATUS "CUDA kernels: ${QLORA_CUDA_BUILD}")
  if(QLORA_CUDA STREQUAL "PIP")
    message(FATAL_ERROR "QLORA_CUDA=PIP needs a CUDA compiler, but: ${NVCC_MISSING}")
  endif()
  return()
endif()

set(architectures "${QLORA_CUDA_ARCHITECTURES}")
if(NOT architectures)
  foreach(architecture IN LISTS QLORA_CUDA_DEFAULT_ARCHITECTURES)
    string(REPLACE "-real" "" code "sm_${architecture}")
    # Compilers before 13 list the architectures without their "a" variants.
    string(REGEX REPLACE "a$" "" family "${code}")
    if(code IN_LIST NVCC_CODES OR family IN_LIST NVCC_CODES)
      list(APPEND architectures ${architecture})
    endif()
  endforeach()
endif()
string(REPLACE "-real" "" architecture_names "${architectures}")
string(REPLACE ";" ", " architecture_names "${architecture_names}")
set(QLORA_CUDA_BUILD "built by nvcc ${NVCC_VERSION} for ${architecture_names}")
message(STATUS "CUDA kernels: ${QLORA_CUDA_BUILD} (${CMAKE_CUDA_COMPILER})")

set(CMAKE_CUDA_ARCHITECTURES "${architectures}")
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
# A compiler of kernels takes more memory than one of host code (Ninja alone knows pools).
set_property(GLOBAL PROPERTY JOB_POOLS nvcc=2)
pybind11_add_module(_cuda MODULE NO_EXTRAS
  bindings_cuda.cc operands.cc cuda/handlers.cc cuda/plan.cc cuda/targets.cc
  cuda/dequantize.cu cuda/device_launcher.cu cuda/product_bf16.cu cuda/product_f16.cu cuda/sum_splits.cu)
target_link_libraries(_cuda PRIVATE xla_ffi_headers)
target_compile_definitions(_cuda PRIVATE QLORA_JAX_CUDA_ARCHITECTURES="${architecture_names}")
# No fast-math: scales are decoded with two roundings (nf4.h).
target_compile_options(_cuda PRIVATE
  -O3
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra>)
set_target_properties(_cuda PROPERTIES
  CXX_VISIBILITY_PRESET hidden CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
  CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_SEPARABLE_COMPILATION OFF JOB_POOL_COMPILE nvcc)
install(TARGETS _cuda LIBRARY DESTINATION qlora_jax/_lib)
