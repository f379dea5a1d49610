# SPDX-License-Identifier: Apache-2.0
# ONNX Runtime's headers, for a custom-op library that links nothing of it. Looked for in OnnxRuntime_ROOT (an unpacked release
# archive), then on the system, then fetched from the machine's own package mirror into FA_HEADER_CACHE.
# Sets OnnxRuntime_FOUND, OnnxRuntime_INCLUDE_DIR, OnnxRuntime_VERSION (the C API's, e.g. 21) and OnnxRuntime::headers.
set(_ort_suffixes include include/onnxruntime include/onnxruntime/core/session onnxruntime)
find_path(OnnxRuntime_INCLUDE_DIR onnxruntime_cxx_api.h PATH_SUFFIXES ${_ort_suffixes})

set(FA_HEADER_CACHE ${CMAKE_SOURCE_DIR}/.cache/headers CACHE PATH "Where headers that had to be fetched are kept")
set(_ort_cache ${FA_HEADER_CACHE}/onnxruntime)
if(NOT OnnxRuntime_INCLUDE_DIR)
  if(NOT EXISTS ${_ort_cache}/usr/include/onnxruntime)
    message(STATUS "ONNX Runtime's headers are not on this machine: fetching libonnxruntime-dev from its package mirror")
    execute_process(COMMAND sh ${CMAKE_CURRENT_LIST_DIR}/fetch_debian_headers.sh libonnxruntime-dev ${_ort_cache}
                    OUTPUT_VARIABLE _ort_output ERROR_VARIABLE _ort_output OUTPUT_STRIP_TRAILING_WHITESPACE)
    message(STATUS "  ${_ort_output}")
  endif()
  find_path(OnnxRuntime_INCLUDE_DIR onnxruntime_cxx_api.h PATHS ${_ort_cache}/usr PATH_SUFFIXES ${_ort_suffixes} NO_DEFAULT_PATH)
endif()

if(OnnxRuntime_INCLUDE_DIR)
  file(STRINGS ${OnnxRuntime_INCLUDE_DIR}/onnxruntime_c_api.h _ort_version REGEX "^#define ORT_API_VERSION [0-9]+")
  string(REGEX REPLACE "[^0-9]" "" OnnxRuntime_VERSION "${_ort_version}")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  OnnxRuntime
  REQUIRED_VARS OnnxRuntime_INCLUDE_DIR
  VERSION_VAR OnnxRuntime_VERSION
  REASON_FAILURE_MESSAGE "unpack an official release archive of ONNX Runtime 1.18 or later and set OnnxRuntime_ROOT to its folder")
if(OnnxRuntime_FOUND AND NOT TARGET OnnxRuntime::headers)
  add_library(OnnxRuntime::headers INTERFACE IMPORTED)
  target_include_directories(OnnxRuntime::headers INTERFACE ${OnnxRuntime_INCLUDE_DIR})
endif()
mark_as_advanced(OnnxRuntime_INCLUDE_DIR)
