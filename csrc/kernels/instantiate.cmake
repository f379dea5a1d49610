# SPDX-License-Identifier: Apache-2.0
# The CUDA part of fa_core. Kernel instances (element type × head_dim bucket × variant) are written into the build tree, those that
# differ in their type in one source: reading the headers takes the compiler a third of its time.
find_package(CUDAToolkit REQUIRED)
set(fa_cuda_options $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xcompiler=-Wall>)

# An object library of CUDA sources compiled for `architectures`, whose objects become part of fa_core.
function(fa_cuda_library name)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/include ${CMAKE_CURRENT_BINARY_DIR}/generated)
  target_compile_options(${name} PRIVATE ${fa_cuda_options})
  target_link_libraries(${name} PRIVATE CUDA::cudart_static)
  target_sources(fa_core PRIVATE $<TARGET_OBJECTS:${name}>)
endfunction()

# The sm_80 kernels use nothing newer: one translation to PTX serves all architectures, which saves the compiler's longest step on each.
function(fa_compile_through_sm_80 target)
  set(codes "")
  foreach(architecture ${FA_CUDA_ARCHITECTURES})
    if(architecture MATCHES "^([0-9]+)a?-virtual$")
      list(APPEND codes compute_80)
    elseif(architecture MATCHES "^([0-9]+)a?(-real)?$")
      list(APPEND codes sm_${CMAKE_MATCH_1})
    else()
      message(FATAL_ERROR "FA_CUDA_ARCHITECTURES has '${architecture}', expected such as 80-real, 90a-real or 90-virtual")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES codes)
  list(JOIN codes "," codes)
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES OFF)
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-gencode=arch=compute_80,code=[${codes}]>")
endfunction()

# Writes a source that instantiates `declaration` (with @T@, @HEAD_DIM@, @VARIANT@) for each combination, adds it to `target`, and adds a
# row FA_INSTANCE(T, dtype, head_dim, variant) to kernels/<kernel>/instances.def.
function(fa_instantiate target kernel header declaration types head_dims variants)
  set(T_f16 __half)
  set(T_bf16 __nv_bfloat16)
  set(T_f32 float)
  set(dtype_f16 DType::kFloat16)
  set(dtype_bf16 DType::kBFloat16)
  set(dtype_f32 DType::kFloat32)
  set(dir ${CMAKE_CURRENT_BINARY_DIR}/generated/kernels/${kernel})
  get_property(rows GLOBAL PROPERTY FA_ROWS_${kernel})
  string(REPLACE ";" "_" source_types "${types}")
  foreach(HEAD_DIM ${head_dims})
    foreach(VARIANT ${variants})
      set(instances "")
      foreach(type ${types})
        set(T ${T_${type}})
        string(CONFIGURE "${declaration}" instance @ONLY)
        string(APPEND instances "template ${instance};\n")
        string(APPEND rows "FA_INSTANCE(${T}, ${dtype_${type}}, ${HEAD_DIM}, ${VARIANT})\n")
      endforeach()
      set(source ${dir}/d${HEAD_DIM}_${VARIANT}_${source_types}.cu)
      file(CONFIGURE OUTPUT ${source} CONTENT "// Written by instantiate.cmake.\n#include \"${header}\"\n\nnamespace fa {\n${instances}}\n")
      target_sources(${target} PRIVATE ${source})
    endforeach()
  endforeach()
  set_property(GLOBAL PROPERTY FA_ROWS_${kernel} "${rows}")
  file(CONFIGURE OUTPUT ${dir}/instances.def CONTENT "// Written by instantiate.cmake: the instances of ${kernel}.\n${rows}")
endfunction()

fa_cuda_library(fa_prefill_sm80 kernels/append_kv/append_kv.cu kernels/combine/combine.cu)
fa_compile_through_sm_80(fa_prefill_sm80)
set(launch_tiles "cudaError_t launch_tiles<@T@, @HEAD_DIM@, Variant::@VARIANT@>(const AttentionParams&, const TileGrid&, unsigned, cudaStream_t)")
set(launch_tiles_header kernels/prefill_sm80/launch.cuh)
fa_instantiate(fa_prefill_sm80 prefill_sm80 ${launch_tiles_header} "${launch_tiles}" "f16;bf16" "32;64;96;128;192;256" "kPlain;kModified")
fa_instantiate(fa_prefill_sm80 prefill_sm80 ${launch_tiles_header} "${launch_tiles}" "f32" "64;128;256" "kModified")
fa_instantiate(fa_prefill_sm80 prefill_sm80 ${launch_tiles_header} "${launch_tiles}" "f32" "64;128;256" "kSplit")
fa_instantiate(fa_prefill_sm80 prefill_sm80 ${launch_tiles_header} "${launch_tiles}" "f16;bf16" "64;128;256" "kSplit")

if("${CMAKE_CUDA_ARCHITECTURES}" MATCHES "90a")
  fa_cuda_library(fa_prefill_sm90 kernels/prefill_sm90/tile_counter.cu)
  set_target_properties(fa_prefill_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
  set(launch_sm90 "Status prefill_sm90::launch_instance<@T@, @HEAD_DIM@, prefill_sm90::Variant::@VARIANT@>(const AttentionParams&, const ExecutionContext&)")
  fa_instantiate(fa_prefill_sm90 prefill_sm90 kernels/prefill_sm90/launch.cuh "${launch_sm90}"
    "f16;bf16" "32;48;64;80;96;128;192;256" "kPlain;kModified")
  fa_instantiate(fa_prefill_sm90 prefill_sm90 kernels/prefill_sm90/launch.cuh "${launch_sm90}" "f16;bf16" "32;48;64;128;256" "kShort")
  fa_instantiate(fa_prefill_sm90 prefill_sm90 kernels/prefill_sm90/launch.cuh "${launch_sm90}" "f16;bf16" "32;48;64" "kTall;kModifiedTall")
  fa_instantiate(fa_prefill_sm90 prefill_sm90 kernels/prefill_sm90/launch.cuh "${launch_sm90}" "f16;bf16" "128" "kMiddle")
  target_sources(fa_core PRIVATE kernels/common/tensor_map.cpp kernels/prefill_sm90/prefill_sm90.cpp)
  target_compile_definitions(fa_core PRIVATE FA_WITH_SM90)
endif()


target_sources(fa_core PRIVATE
  kernels/decode_splitkv/decode_splitkv.cpp
  kernels/device.cpp
  kernels/prefill_sm80/instance.cpp
  kernels/prefill_sm80/prefill_sm80.cpp)
target_include_directories(fa_core PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/generated)
target_compile_definitions(fa_core PRIVATE FA_WITH_CUDA)
target_link_libraries(fa_core PUBLIC CUDA::cudart_static)
set_target_properties(fa_core PROPERTIES CUDA_RUNTIME_LIBRARY Static)
