// SPDX-License-Identifier: Apache-2.0
// Shared-memory barriers (mbarrier): between warps from sm_80 on, and on Hopper and later between the copy engine, its producer
// and its consumers. A barrier is in phase 0 at first; a waiter names the parity of the phase whose end it waits for.
#pragma once

#include <cstdint>

namespace fa {

/// The 32-bit shared-window address that PTX wants.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(num_arrivals) : "memory");
}

/// Makes initialised barriers visible to the copy engine (and to the other blocks of a cluster); a block barrier must follow.
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/// Arrives at the barrier that block `rank` of the cluster has at this place. Orders nothing that the caller wrote: a release
/// that reaches the cluster would wait for all of the thread's memory accesses, about a microsecond.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 theirs;\n"
      "mapa.shared::cluster.u32 theirs, %0, %1;\n"
      "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [theirs];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

/// Arrives, and makes the phase wait for `bytes` more from the copy engine.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FA_MBARRIER_IS_COMPLETE "mbarrier.test_wait"
#else
#define FA_MBARRIER_IS_COMPLETE "mbarrier.try_wait"  // lets other warps go on meanwhile
#endif

/// Blocks until the phase of this parity has ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n" FA_MBARRIER_IS_COMPLETE
      ".parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

#undef FA_MBARRIER_IS_COMPLETE

/// A barrier in shared memory whose phase ends with the kArrivals-th arrival, and not before the announced bytes are there.
template <int kArrivals>
struct Mbarrier {
  uint64_t word;

  __device__ __forceinline__ void init() { mbarrier_init(&word, kArrivals); }
  __device__ __forceinline__ void arrive() { mbarrier_arrive(&word); }
  __device__ __forceinline__ void arrive_at(int rank) { mbarrier_arrive_at(&word, rank); }
  __device__ __forceinline__ void arrive_expect(uint32_t bytes) { mbarrier_arrive_expect(&word, bytes); }
  __device__ __forceinline__ void wait(uint32_t parity) { mbarrier_wait(&word, parity); }
};

/// The barriers of a ring of buffers: filled, and given back.
template <int kStages, int kFillers, int kReaders>
__device__ __forceinline__ void init_ring(Mbarrier<kFillers> (&full)[kStages], Mbarrier<kReaders> (&empty)[kStages]) {
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    full[i].init();
    empty[i].init();
  }
}

/// A position in a ring of kStages buffers. Consumers wait for full[stage] with phase, the producer for empty[stage] with phase
/// ^ 1.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace fa
