# SPDX-License-Identifier: Apache-2.0
# The CUDA part of fa_core. Kernel instances (element type × head_dim bucket × variant) are written into the build tree, several a
# source: the compiler needs as long for the headers as for a small instance.
set(fa_cuda_options $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xcompiler=-Wall>)

# An object library of CUDA sources compiled for `architectures`, whose objects become part of fa_core.
function(fa_cuda_library name)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/include ${CMAKE_CURRENT_BINARY_DIR}/generated)
  target_compile_options(${name} PRIVATE ${fa_cuda_options})
  target_link_libraries(${name} PRIVATE CUDA::cudart_static)
  target_sources(fa_core PRIVATE $<TARGET_OBJECTS:${name}>)
endfunction()

# One translation to PTX serves many architectures, which saves the compiler's longest step on each. The arguments behind the target
# are the compute capabilities for which it is translated, in rising order: each architecture takes the last one that isn't newer.
function(fa_compile_through target)
  set(options "")
  foreach(architecture ${FA_CUDA_ARCHITECTURES})
    if(NOT architecture MATCHES "^([0-9]+)a?(-real|-virtual)?$")
      message(FATAL_ERROR "FA_CUDA_ARCHITECTURES has '${architecture}', expected such as 80-real, 90a-real or 90-virtual")
    endif()
    set(capability ${CMAKE_MATCH_1})
    set(through ${ARGV1})
    foreach(translated ${ARGN})
      if(NOT translated GREATER capability)
        set(through ${translated})
      endif()
    endforeach()
    if(architecture MATCHES "-virtual$")
      list(APPEND codes_${through} compute_${through})
    else()
      list(APPEND codes_${through} sm_${capability})
    endif()
  endforeach()
  foreach(translated ${ARGN})
    if(codes_${translated})
      list(REMOVE_DUPLICATES codes_${translated})
      list(JOIN codes_${translated} "," codes)
      list(APPEND options "$<$<COMPILE_LANGUAGE:CUDA>:-gencode=arch=compute_${translated},code=[${codes}]>")
    endif()
  endforeach()
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES OFF)
  target_compile_options(${target} PRIVATE ${options})
endfunction()

# Writes a source that instantiates `declaration` (with @T@, @HEAD_DIM@, @VARIANT@) for all types, head_dims and variants, adds it to
# `target`, and adds a row FA_INSTANCE(T, dtype, head_dim, variant) for each to kernels/<kernel>/instances.def.
function(fa_instantiate_in_one target kernel header declaration types head_dims variants)
  set(T_f16 __half)
  set(T_bf16 __nv_bfloat16)
  set(T_f32 float)
  set(T_f8 Float8)
  set(dtype_f16 DType::kFloat16)
  set(dtype_bf16 DType::kBFloat16)
  set(dtype_f32 DType::kFloat32)
  set(dtype_f8 DType::kFloat8E4M3)
  set(dir ${CMAKE_CURRENT_BINARY_DIR}/generated/kernels/${kernel})
  get_property(rows GLOBAL PROPERTY FA_ROWS_${kernel})
  list(JOIN types "_" type_names)
  list(JOIN variants "_" variant_names)
  list(JOIN head_dims "_d" head_dim_names)
  set(instances "")
  foreach(HEAD_DIM ${head_dims})
    foreach(VARIANT ${variants})
      foreach(type ${types})
        set(T ${T_${type}})
        string(CONFIGURE "${declaration}" instance @ONLY)
        string(APPEND instances "template ${instance};\n")
        string(APPEND rows "FA_INSTANCE(${T}, ${dtype_${type}}, ${HEAD_DIM}, ${VARIANT})\n")
      endforeach()
    endforeach()
  endforeach()
  set(source ${dir}/${type_names}_d${head_dim_names}_${variant_names}.cu)
  file(CONFIGURE OUTPUT ${source} CONTENT "// Written by instantiate.cmake.\n#include \"${header}\"\n\nnamespace fa {\n${instances}}\n")
  target_sources(${target} PRIVATE ${source})
  set_property(GLOBAL PROPERTY FA_ROWS_${kernel} "${rows}")
  file(CONFIGURE OUTPUT ${dir}/instances.def CONTENT "// Written by instantiate.cmake: the instances of ${kernel}.\n${rows}")
endfunction()

# Likewise, with a source for each of `head_dims`: for instances that take the compiler long.
function(fa_instantiate target kernel header declaration types head_dims variants)
  foreach(head_dim ${head_dims})
    fa_instantiate_in_one(${target} ${kernel} ${header} "${declaration}" "${types}" ${head_dim} "${variants}")
  endforeach()
endfunction()

fa_cuda_library(fa_backward_rows kernels/backward_rows/backward_rows.cu)
fa_compile_through(fa_backward_rows 80)
fa_cuda_library(fa_cache_step kernels/cache_step/cache_step.cu kernels/cache_step/plain_step.cu
  kernels/cache_step/transform_rows.cu)
fa_cuda_library(fa_prefill_sm80 kernels/append_kv/append_kv.cu kernels/combine/combine.cu kernels/empty_rows/empty_rows.cu)
fa_compile_through(fa_prefill_sm80 80)
set(launch_tiles "cudaError_t prefill_sm80::launch_tiles<@T@, @HEAD_DIM@, prefill_sm80::Variant::@VARIANT@>(const AttentionParams&, const prefill_sm80::TileGrid&, unsigned, cudaStream_t)")
function(fa_instantiate_sm80 types head_dims variants)
  fa_instantiate(fa_prefill_sm80 prefill_sm80 kernels/prefill_sm80/launch.cuh "${launch_tiles}" "${types}" "${head_dims}" "${variants}")
endfunction()
fa_instantiate_sm80("f32" "256;128;64" "kModified;kTf32;kSplit")
fa_instantiate_sm80("f16;bf16" "256;128;64" "kPlain;kModified;kSplit")
fa_instantiate_sm80("f16;bf16" "192;96;32" "kPlain;kModified")
fa_instantiate_sm80("f16;bf16" "512" "kModified")

fa_cuda_library(fa_backward_sm80)
fa_compile_through(fa_backward_sm80 80 90)  # from 9.0 on one instruction adds four elements
set(launch_backward "cudaError_t backward_sm80::launch_tiles<@T@, @HEAD_DIM@, backward_sm80::Variant::@VARIANT@>(const AttentionParams&, const Gradients&, const backward_sm80::Grid&, unsigned, unsigned, cudaStream_t)")
fa_instantiate(fa_backward_sm80 backward_sm80 kernels/backward_sm80/launch.cuh "${launch_backward}" "f16;bf16" "256;128;64" "kModified;kPlain")
fa_instantiate(fa_backward_sm80 backward_sm80 kernels/backward_sm80/launch.cuh "${launch_backward}" "f16;bf16" "256;128" "kCompact")
fa_instantiate(fa_backward_sm80 backward_sm80 kernels/backward_sm80/launch.cuh "${launch_backward}" "f32" "128;64" "kModified;kPlain;kTf32")
fa_instantiate(fa_backward_sm80 backward_sm80 kernels/backward_sm80/launch.cuh "${launch_backward}" "f32" "256" "kModified")
set(launch_sums "cudaError_t backward_sm80::launch_sums<@T@, @HEAD_DIM@>(const AttentionParams&, const Gradients&, const backward_sm80::Grid&, const backward_sm80::ScoreSums&, unsigned, cudaStream_t)")
fa_instantiate_in_one(fa_backward_sm80 backward_sm80_sums kernels/backward_sm80/launch_sums.cuh "${launch_sums}" "f16;bf16" "256;128;64" "kAny")
fa_instantiate_in_one(fa_backward_sm80 backward_sm80_sums kernels/backward_sm80/launch_sums.cuh "${launch_sums}" "f32" "256;128;64" "kAny")

if("${CMAKE_CUDA_ARCHITECTURES}" MATCHES "90a")
  fa_cuda_library(fa_prefill_sm90 kernels/decode_sm90/merge_counters.cu kernels/prefill_sm90/tile_counter.cu)
  set_target_properties(fa_prefill_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
  set(launch_sm90 "Status prefill_sm90::launch_instance<@T@, @HEAD_DIM@, prefill_sm90::Variant::@VARIANT@>(const Plan&, const AttentionParams&, const ExecutionContext&)")
  function(fa_instantiate_sm90 head_dims variants)
    fa_instantiate(fa_prefill_sm90 prefill_sm90 kernels/prefill_sm90/launch.cuh "${launch_sm90}" "f16;bf16" "${head_dims}" "${variants}")
  endfunction()
  fa_instantiate_sm90("64;32" "kModified;kModifiedTall;kModifiedShort;kPlain;kTall;kShort")
  fa_instantiate_sm90("48" "kPlain;kTall;kShort")
  fa_instantiate_sm90("128" "kModified;kModifiedShort;kPlain;kMiddle;kBroad;kShort")
  fa_instantiate_sm90("256" "kModified;kPlain;kShort")
  fa_instantiate_sm90("96;80" "kModified;kPlain;kMiddle;kShort")
  fa_instantiate_sm90("192" "kModified;kPlain")
  string(REPLACE "prefill_sm90::" "prefill_sm90_wide::" launch_sm90_wide "${launch_sm90}")
  fa_instantiate(fa_prefill_sm90 prefill_sm90_wide kernels/prefill_sm90_wide/launch.cuh "${launch_sm90_wide}" "f16;bf16" "512" "kPlain;kModified")
  set(launch_sm90_f32 "Status prefill_sm90_f32::launch_instance<@HEAD_DIM@, Float32Precision::@VARIANT@>(const Plan&, const AttentionParams&, const ExecutionContext&)")
  fa_instantiate_in_one(fa_prefill_sm90 prefill_sm90_f32 kernels/prefill_sm90_f32/launch.cuh "${launch_sm90_f32}" "f32" "256;128;64" "kTf32;kTf32x3")
  set(launch_sm90_f8 "Status prefill_sm90_f8::launch_instance<@HEAD_DIM@, prefill_sm90_f8::Variant::@VARIANT@>(const Plan&, const AttentionParams&, const ExecutionContext&)")
  fa_instantiate(fa_prefill_sm90 prefill_sm90_f8 kernels/prefill_sm90_f8/launch.cuh "${launch_sm90_f8}" "f8" "256;128;64" "kPlain;kModified")
  string(REPLACE "prefill_sm90::" "decode_sm90::" launch_decode_sm90 "${launch_sm90}")
  string(REPLACE "AttentionParams" "StepParams" launch_decode_sm90 "${launch_decode_sm90}")
  fa_instantiate(fa_prefill_sm90 decode_sm90 kernels/decode_sm90/launch.cuh "${launch_decode_sm90}" "f16;bf16" "256;192;128;64" "kAsQuery")
  fa_instantiate(fa_prefill_sm90 decode_sm90 kernels/decode_sm90/launch.cuh "${launch_decode_sm90}" "f16;bf16" "256;128;64" "kInt8;kFloat8")
  set(launch_backward_sm90 "Status backward_sm90::launch_instance<@T@, @HEAD_DIM@, backward_sm90::Variant::@VARIANT@>(const BackwardPlan&, const AttentionParams&, const Gradients&, const ExecutionContext&)")
  fa_instantiate(fa_prefill_sm90 backward_sm90 kernels/backward_sm90/launch.cuh "${launch_backward_sm90}" "f16;bf16" "256" "kPlain")
  fa_instantiate(fa_prefill_sm90 backward_sm90 kernels/backward_sm90/launch.cuh "${launch_backward_sm90}" "f16;bf16" "64" "kPlain;kBias;kPacked")
  fa_instantiate(fa_prefill_sm90 backward_sm90 kernels/backward_sm90/launch.cuh "${launch_backward_sm90}" "f16;bf16" "128" "kPlain;kTall;kBias;kPacked")
  set(launch_bias_gradient "Status backward_sm90::launch_bias_gradient<@T@, @HEAD_DIM@>(const BackwardPlan&, const AttentionParams&, const Gradients&, const RowNumbers&, const ExecutionContext&)")
  fa_instantiate_in_one(fa_prefill_sm90 backward_sm90_bias kernels/backward_sm90/launch_bias.cuh "${launch_bias_gradient}" "f16;bf16" "128;64" "kAny")
  target_sources(fa_core PRIVATE
    kernels/backward_sm90/backward_sm90.cpp
    kernels/common/tensor_map.cpp
    kernels/decode_sm90/decode_sm90.cpp
    kernels/prefill_sm90/prefill_sm90.cpp
    kernels/prefill_sm90_f32/prefill_sm90_f32.cpp
    kernels/prefill_sm90_f8/prefill_sm90_f8.cpp
    kernels/prefill_sm90_wide/prefill_sm90_wide.cpp)
  target_compile_definitions(fa_core PRIVATE FA_WITH_SM90)
endif()

target_sources(fa_core PRIVATE
  kernels/backward_sm80/backward_sm80.cpp
  kernels/cache_step/cache_step.cpp
  kernels/cache_step/plain_step.cpp
  kernels/cache_step/transform_rows.cpp
  kernels/decode_splitkv/decode_splitkv.cpp
  kernels/common/kernel_attributes.cpp
  kernels/device.cpp
  kernels/prefill_sm80/instance.cpp
  kernels/prefill_sm80/prefill_sm80.cpp)
target_include_directories(fa_core PRIVATE ${CMAKE_CURRENT_BINARY_DIR}/generated)
target_compile_definitions(fa_core PUBLIC FA_WITH_CUDA)
target_link_libraries(fa_core PUBLIC CUDA::cudart_static)
set_target_properties(fa_core PROPERTIES CUDA_RUNTIME_LIBRARY Static)
