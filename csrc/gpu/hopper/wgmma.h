// Hopper's warpgroup matrix instructions and what goes with them: bf16 operands, fp32 sums. For sm_90a alone.
//
// Tiles in shared memory are cut into stretches of 64 elements (128 bytes): [stretch][row][64], and within a stretch
// the 16-byte chunk c of row r lies at chunk c ^ (r % 8), the "128-byte swizzle". One tile serves as an operand either
// way round: rows against the elements (K = elements), or elements against the rows (K = rows).
#pragma once

#include <cstdint>

namespace fusedcomm::gpu::hopper {

constexpr int kWarpgroup = 128;
constexpr int kStretch = 64;        // elements
constexpr int kStretchBytes = 128;  // of a row
constexpr int kSwizzleRows = 8;
constexpr int kSwizzleBytes = kSwizzleRows * kStretchBytes;

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Where the 16-byte chunk `chunk` (of 8) of a row lies in its stretch.
__device__ inline uint32_t swizzled(uint32_t row, uint32_t chunk) {
  return row * kStretchBytes + ((chunk ^ (row % kSwizzleRows)) * 16);
}

// The address of a part of a tile, in units of 16 bytes. The compiler takes it for a new value each time: it would work
// out the descriptions of all parts of all tiles before a loop, and spill them.
__device__ inline uint32_t part_address(const void* p) {
  uint32_t units = shared_address(p) >> 4;
  asm volatile("" : "+r"(units));
  return units;
}

// Describes the part of a tile at this address, in units of 16 bytes, for an instruction. K runs along the elements of
// rows: `stride` is not used. K runs over rows: `stride` is the distance of stretches, in bytes.
__device__ inline uint64_t describe(uint32_t units, uint32_t stride = 16) {
  constexpr uint32_t kSwizzle128 = 1u << 30, kEightRows = kSwizzleBytes >> 4;
  const uint32_t low = units + (stride >> 4 << 16);  // a sum, so that it is one with that of where a part is
  return uint64_t(kSwizzle128 | kEightRows) << 32 | low;
}

// Registers written before are seen by the instructions that follow.
__device__ inline void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a batch of instructions.
__device__ inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all batches but the last kPending are done.
template <int kPending>
__device__ inline void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The registers are in the hands of the instructions in flight: nothing moves them from here to there.
template <int kCount>
__device__ inline void hold(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FUSEDCOMM_D8(d, i)                                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FUSEDCOMM_D16(d, i) FUSEDCOMM_D8(d, i), FUSEDCOMM_D8(d, i + 8)
#define FUSEDCOMM_D32(d, i) FUSEDCOMM_D16(d, i), FUSEDCOMM_D16(d, i + 16)
#define FUSEDCOMM_D128(d) FUSEDCOMM_D32(d, 0), FUSEDCOMM_D32(d, 32), FUSEDCOMM_D32(d, 64), FUSEDCOMM_D32(d, 96)

#define FUSEDCOMM_REGISTERS_8 "{%0, %1, %2, %3, %4, %5, %6, %7}"
#define FUSEDCOMM_REGISTERS_16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define FUSEDCOMM_REGISTERS_32                                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31}"
#define FUSEDCOMM_REGISTERS_128                                                                                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, "  \
  "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "  \
  "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "  \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

// d[64 x N] = or += a[64 x 16] b[N x 16]^T, both with K along their rows; N is 16, 32 or 64.
__device__ inline void multiply_rows(float (&d)[8], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %10, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 " FUSEDCOMM_REGISTERS_8 ", %8, %9, p, 1, 1, 0, 0;\n\t}"
      : FUSEDCOMM_D8(d, 0)
      : "l"(a), "l"(b), "r"(int(add)));
}
__device__ inline void multiply_rows(float (&d)[16], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %18, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " FUSEDCOMM_REGISTERS_16 ", %16, %17, p, 1, 1, 0, 0;\n\t}"
      : FUSEDCOMM_D16(d, 0)
      : "l"(a), "l"(b), "r"(int(add)));
}
__device__ inline void multiply_rows(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " FUSEDCOMM_REGISTERS_32 ", %32, %33, p, 1, 1, 0, 0;\n\t}"
      : FUSEDCOMM_D32(d, 0)
      : "l"(a), "l"(b), "r"(int(add)));
}

// d[64 x N] += a[16 x 64]^T b[N x 16]^T: a with K over its rows, b with K along its rows; N is 16 or 32.
__device__ inline void multiply_columns(float (&d)[8], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.eq.u32 p, 1, 1;\n\t"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 " FUSEDCOMM_REGISTERS_8 ", %8, %9, p, 1, 1, 1, 0;\n\t}"
      : FUSEDCOMM_D8(d, 0)
      : "l"(a), "l"(b));
}
__device__ inline void multiply_columns(float (&d)[16], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.eq.u32 p, 1, 1;\n\t"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " FUSEDCOMM_REGISTERS_16 ", %16, %17, p, 1, 1, 1, 0;\n\t}"
      : FUSEDCOMM_D16(d, 0)
      : "l"(a), "l"(b));
}

// d[64 x 256] += a[64 x 16] b[16 x 256]: a in shared memory with K along its rows, b with K over its rows.
__device__ inline void multiply_add(float (&d)[128], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.eq.u32 p, 1, 1;\n\t"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " FUSEDCOMM_REGISTERS_128
      ", %128, %129, p, 1, 1, 0, 1;\n\t}"
      : FUSEDCOMM_D128(d)
      : "l"(a), "l"(b));
}

// The same with a in registers: those of two neighbouring 8-column pieces of a product, rounded and packed in pairs.
__device__ inline void multiply_add(float (&d)[128], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.eq.u32 p, 1, 1;\n\t"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " FUSEDCOMM_REGISTERS_128
      ", {%128, %129, %130, %131}, %132, p, 1, 1, 1;\n\t}"
      : FUSEDCOMM_D128(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef FUSEDCOMM_D8
#undef FUSEDCOMM_D16
#undef FUSEDCOMM_D32
#undef FUSEDCOMM_D128
#undef FUSEDCOMM_REGISTERS_8
#undef FUSEDCOMM_REGISTERS_16
#undef FUSEDCOMM_REGISTERS_32
#undef FUSEDCOMM_REGISTERS_128

// Stores four 8 x 8 matrices of 16-bit values to shared memory, each turned over. Of matrix i a thread has two
// neighbours of row lane / 4, from column 2 (lane % 4) on; lane 8 i + c says where column c of it goes, in 16 bytes.
__device__ inline void store_transposed(void* where, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(where)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Ordinary stores to shared memory, this thread's and those it knows of by a barrier, are seen by the matrix
// instructions that follow here or behind a barrier.
__device__ inline void fence_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Takes registers from the pool of the block, or gives them back; a thread has kNow.
template <int kCount, int kNow>
__device__ inline void set_registers() {
  static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
  if constexpr (kCount > kNow) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
  }
}

// Barriers of a part of the block, by number (0 is that of __syncthreads).
template <int kNumber, int kThreads>
__device__ inline void arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}
template <int kNumber, int kThreads>
__device__ inline void meet() {
  asm volatile("bar.sync %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}

// A barrier in shared memory that `arrivals` threads complete, again and again.
struct Barrier {
  uint64_t word;

  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&word)), "r"(arrivals) : "memory");
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&word)) : "memory");
  }
  // Until the completion number n (from 0 on), where parity is n % 2, and n + 1 has not happened.
  __device__ void wait(uint32_t parity) {
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(done)
          : "r"(shared_address(&word)), "r"(parity)
          : "memory");
    }
  }
};

}  // namespace fusedcomm::gpu::hopper
