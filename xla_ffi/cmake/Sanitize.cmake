# Builds for .ci/sanitize: a wrong access or undefined behaviour ends the process, and handlers see their buffers in
# memory that ends where they do (tests/sanitize/guarded.h). GCC's runtime libraries have to be preloaded into Python.
function(sanitize target)
  target_compile_options(${target} PRIVATE
    -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1
    -UNDEBUG -D_GLIBCXX_ASSERTIONS)
  target_link_options(${target} PRIVATE -fsanitize=address,undefined)
  target_compile_definitions(${target} PRIVATE QLORA_JAX_SANITIZE)
  target_include_directories(${target} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/../tests/sanitize")
endfunction()

pybind11_add_module(_faults MODULE NO_EXTRAS "${CMAKE_CURRENT_SOURCE_DIR}/../tests/sanitize/faults.cc")
target_include_directories(_faults PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}")
target_link_libraries(_faults PRIVATE xla_ffi_headers)
target_compile_options(_faults PRIVATE -Wall -Wextra)
foreach(target _cpu _plan _faults)
  sanitize(${target})
endforeach()
install(TARGETS _faults LIBRARY DESTINATION qlora_jax/_lib)
