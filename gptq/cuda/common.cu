// What every kernel uses. There are no headers, because NVRTC ships none. A pair of fp16 numbers is a 32-bit word (`half2`).
//
// Fragment order. A weight is cut into tiles of 16 rows (outputs) and chunks of 64 inputs. Within a chunk, input k has
// step s = k / 16, lane column c = k % 16 / 4 and j = k % 4. Its position is c * 16 + s * 4 + j: what one lane of a
// matrix product m16n8k16 reads for its four steps is then one run of 32 bytes.
//
// The argument structures and the numbers in capitals (TILE, CHUNK …) come from kernel_arguments.py.

typedef unsigned char u8;
typedef unsigned short u16;  // one fp16 number
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__  // of a structure
#define FULL 0xffffffffu
#define INFINITY __int_as_float(0x7f800000)

enum { PLAIN, FLOAT, SILU, RESIDUAL, BFLOAT, GATED, GATED_BFLOAT, ACTIVE, ACTIVE_BFLOAT };  // what becomes of a product's sums: see GemvArguments.out

DEVICE float to_float(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEVICE u16 to_half(float f) {  // beyond fp16's range: its largest number, not infinity
  f = fminf(fmaxf(f, -65504.f), 65504.f);
  u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h;
}
DEVICE float from_bfloat(u16 b) { return __int_as_float((u32)b << 16); }
DEVICE u16 to_bfloat(float f) {  // to the nearest, ties to even; NaN stays NaN
#if __CUDA_ARCH__ >= 800
  u16 h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h;
#else
  const u32 bits = __float_as_int(f);
  return f == f ? (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16) : (u16)0x7fc0;
#endif
}
DEVICE u32 pair(u16 low, u16 high) { return (u32)low | (u32)high << 16; }
DEVICE u32 to_half2(float low, float high) { return pair(to_half(low), to_half(high)); }
DEVICE float low_of(u32 h2) { return to_float((u16)h2); }
DEVICE float high_of(u32 h2) { return to_float((u16)(h2 >> 16)); }
DEVICE u32 sub2(u32 a, u32 b) { u32 r; asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 mul2(u32 a, u32 b) { u32 r; asm("mul.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 fma2(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
DEVICE u32 and_or(u32 a, u32 b, u32 c) { u32 r; asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }

// c[16 x 8] += a[16 x 16] b[16 x 8], fp16 in, fp32 out, one warp
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// Weights are read once, so they bypass the first cache.
DEVICE uint4 stream4(const void* p) {
  uint4 v; asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p)); return v;
}
DEVICE uint2 stream2(const void* p) {
  uint2 v; asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p)); return v;
}
DEVICE u32 stream1(const void* p) {
  u32 v; asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p)); return v;
}

DEVICE void prefetch_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// The same of a run of whole pieces of 16 bytes, by one thread. Before Hopper nothing is fetched.
DEVICE void prefetch_run(const void* p, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}
// Part `part` of `parts` of so many bytes.
DEVICE void prefetch_share(const u8* from, u64 bytes, int part, int parts) {
  const u64 each = (bytes / 16 + parts - 1) / parts * 16, begin = part * each;
  if (begin < bytes) prefetch_run(from + begin, (u32)min(each, bytes - begin));
}

// Adds one and returns the value before. A block that finds this one counted also sees what it wrote earlier. Both blocks
// need a barrier before and after.
DEVICE u32 count_arrival(u32* counter) {
  u32 before; asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory"); return before;
}

// From global to shared memory without a register in between. Before Ampere the copy is made at once.
template <int BYTES> DEVICE void copy_async(const void* from, void* to) {
#if __CUDA_ARCH__ >= 800
  const u32 at = (u32)__cvta_generic_to_shared(to);
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(BYTES) : "memory");
#else
  if constexpr (BYTES == 16) *(uint4*)to = stream4(from);
  else if constexpr (BYTES == 8) *(uint2*)to = stream2(from);
  else *(u32*)to = stream1(from);
#endif
}
DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING> DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// On Hopper and newer the previous kernel may still run when this one starts (programmatic dependent launch). Every
// kernel waits before it touches anything that another one writes. Weights may be read before that.
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void allow_next_kernel_to_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Between two looks at what another block writes.
DEVICE void pause() {
#if __CUDA_ARCH__ >= 700
  asm volatile("nanosleep.u32 20;");
#endif
}

DEVICE float warp_sum(float v) {
#pragma unroll
  for (int at = 16; at; at >>= 1) v += __shfl_xor_sync(FULL, v, at);
  return v;
}

extern __shared__ uint4 shared_words[];

// The sum over a block of up to 1024 threads, added in the same order every time. `scratch` holds 33 floats.
DEVICE float block_sum(float v, float* scratch) {
  const int warps = (blockDim.x + 31) / 32, lane = threadIdx.x % 32;
  v = warp_sum(v);
  if (lane == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = warp_sum(lane < warps ? scratch[lane] : 0.f);
  __syncthreads();
  return v;
}

// The bits of a float without its sign: of several the largest are those of the largest, and of a NaN before all others.
DEVICE u32 size_bits(float f) { return (u32)__float_as_int(f) & 0x7fffffffu; }

// The largest in a block; `scratch` holds a number for each warp.
DEVICE u32 block_max(u32 v, u32* scratch) {
  const int warps = (blockDim.x + 31) / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int at = 16; at; at >>= 1) v = max(v, __shfl_xor_sync(FULL, v, at));
  if (lane == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  v = lane < warps ? scratch[lane] : 0u;
#pragma unroll
  for (int at = 16; at; at >>= 1) v = max(v, __shfl_xor_sync(FULL, v, at));
  __syncthreads();
  return v;
}

// bf16 holds numbers that fp16 does not. A row is divided by this power of two of its largest (size_bits), after which that is below 64:
// its products have room up to 65,504, and what is small beside it keeps its bits. NaN if the largest is no number.
DEVICE float power_of_largest(u32 largest) {
  const int exponent = largest >> 23;
  return __int_as_float(exponent == 255 ? 0x7fc00000 : max(exponent - 5, 1) << 23);
}
DEVICE float inverse_power(float power) { return __int_as_float(0x7f000000 - __float_as_int(power)); }
