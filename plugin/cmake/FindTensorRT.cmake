# SPDX-License-Identifier: Apache-2.0
# TensorRT's headers, as the target TensorRT::headers. Looks in TensorRT_ROOT, then in the system, then fetches those of 10.14
# (Apache-2.0, from a pip package) into FA_HEADER_CACHE. The library itself is never needed: the plugin does not link it.
set(FA_HEADER_CACHE ${CMAKE_SOURCE_DIR}/.cache/headers CACHE PATH "Where headers that had to be fetched are kept")

find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h HINTS ${TensorRT_ROOT} $ENV{TensorRT_ROOT}
  PATH_SUFFIXES include ${CMAKE_LIBRARY_ARCHITECTURE} include/${CMAKE_LIBRARY_ARCHITECTURE})
if(NOT TensorRT_INCLUDE_DIR)
  find_package(Python3 COMPONENTS Interpreter QUIET)
  if(Python3_EXECUTABLE)
    message(STATUS "TensorRT: no headers in TensorRT_ROOT or the system; fetching them into ${FA_HEADER_CACHE}/tensorrt")
    execute_process(COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/fetch_tensorrt_headers.py ${FA_HEADER_CACHE}/tensorrt
      RESULT_VARIABLE _fetch_result)
    if(_fetch_result EQUAL 0)
      find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h PATHS ${FA_HEADER_CACHE}/tensorrt NO_DEFAULT_PATH)
    endif()
  endif()
endif()

if(TensorRT_INCLUDE_DIR AND EXISTS ${TensorRT_INCLUDE_DIR}/NvInferVersion.h)
  file(STRINGS ${TensorRT_INCLUDE_DIR}/NvInferVersion.h _version_lines REGEX "define (NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH)[A-Z_]* [0-9]+")
  foreach(_part MAJOR MINOR PATCH)
    string(REGEX MATCH "_${_part}[A-Z_]* ([0-9]+)" _ "${_version_lines}")
    list(APPEND _version_parts ${CMAKE_MATCH_1})
  endforeach()
  string(REPLACE ";" "." TensorRT_VERSION "${_version_parts}")
  unset(_version_parts)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT REQUIRED_VARS TensorRT_INCLUDE_DIR VERSION_VAR TensorRT_VERSION
  REASON_FAILURE_MESSAGE "Set TensorRT_ROOT to an SDK of TensorRT 10 or 11, or configure with -DFA_TRT=OFF.")
mark_as_advanced(TensorRT_INCLUDE_DIR)
if(TensorRT_FOUND AND NOT TARGET TensorRT::headers)
  add_library(TensorRT::headers INTERFACE IMPORTED)
  set_target_properties(TensorRT::headers PROPERTIES INTERFACE_INCLUDE_DIRECTORIES ${TensorRT_INCLUDE_DIR})
endif()
