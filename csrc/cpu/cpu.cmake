# SPDX-License-Identifier: Apache-2.0
# The CPU kernels: two sources compiled once for each instruction set; attention_cpu.cpp chooses at run time.
# The baseline comes first, so that the linker takes its copy of anything that the others might emit too.
target_sources(fa_core PRIVATE cpu/attention_cpu.cpp cpu/backward_cpu.cpp append_kv.cpp)

function(fa_cpu_kernel isa)
  foreach(kernel tile backward)
    set(source ${CMAKE_CURRENT_BINARY_DIR}/cpu_${kernel}_${isa}.cpp)
    file(CONFIGURE OUTPUT ${source} CONTENT "#include \"cpu/${kernel}_kernel.cpp\"\n" @ONLY)
    target_sources(fa_core PRIVATE ${source})
    # NOTE: GCC 12 calls its own _mm512_undefined_ps() maybe uninitialized. No vector type is in an interface (-Wno-psabi).
    set_source_files_properties(${source} PROPERTIES COMPILE_DEFINITIONS FA_ISA=${isa}
      COMPILE_OPTIONS "-O3;-ffp-contract=fast;-fno-math-errno;-Wno-psabi;-Wno-maybe-uninitialized;${ARGN}")
  endforeach()
endfunction()

fa_cpu_kernel(baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  fa_cpu_kernel(avx2 -mavx2 -mfma -mf16c)
  fa_cpu_kernel(avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)
  target_compile_definitions(fa_core PRIVATE FA_CPU_X86=1)
endif()
