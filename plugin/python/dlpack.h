// SPDX-License-Identifier: Apache-2.0
// The part of the DLPack ABI that arrays.cpp reads (unversioned capsules, which every producer offers), and the C exchange API
// of exchange.cpp. Layout and numbers are those of the DLPack specification 0.8, those of float8 types of 1.1, those of the
// exchange API of 1.3.
#pragma once

#include <cstdint>

namespace fa::plugin::dlpack {

enum DeviceCode : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6, kFloat8E4M3 = 10 };

struct Device {
  int32_t device_type;
  int32_t device_id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: row-major
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor* self);
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct DLManagedTensorVersioned {
  Version version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned* self);
  uint64_t flags;
  DLTensor dl_tensor;
};

/// What a type of arrays has as `__dlpack_c_exchange_api__`. Functions return 0, or -1 with an exception set in Python
/// (`allocate`: with its kind and message told to `set_error`). Those that read an object want the interpreter's lock.
struct ExchangeApi {
  Version version;
  const ExchangeApi* older;
  int (*allocate)(DLTensor* prototype, DLManagedTensorVersioned** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, DLManagedTensorVersioned** out);
  int (*object_from_managed)(DLManagedTensorVersioned* tensor, void** object);
  int (*tensor_from_object)(void* object, DLTensor* out);  // the object keeps what `out` points at
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace fa::plugin::dlpack
