// The input of one row as digits of a byte, for products of bytes with two, three or four bits (digit_products.cu). An input is two
// digits, high and low, times what the largest of its block gives.

#define DIGITS 32639.f      // 127 * 256 + 127: the largest number of two digits
#define MAGIC 12582912.f    // 1.5 * 2^23: added to an integer below 2^22, it is the float whose last bits are that integer
#define MAGIC_BITS 0x4b400000

// A word of row r + 8 is not moved to where a byte's numbers begin: what its numbers are multiplied with.
template <int BITS> DEVICE constexpr float second_row() { return 1 << BITS; }

// c = from + a[16 x 32] b[32 x 8], bytes in (a without a sign), one warp
DEVICE void mma_bytes(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, const int (&from)[4]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]));
#else
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int d[2];
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1}, {%2}, {%3}, {%4,%5};"
        : "=r"(d[0]), "=r"(d[1]) : "r"(a[half]), "r"(b0), "r"(from[2 * half]), "r"(from[2 * half + 1]));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1}, {%2}, {%3}, {%4,%5};"
        : "=r"(c[2 * half]), "=r"(c[2 * half + 1]) : "r"(a[2 + half]), "r"(b1), "r"(d[0]), "r"(d[1]));
  }
#endif
}

// The sum of four bytes with a sign, and something more.
DEVICE int sum_bytes(u32 four, int more) { int r; asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(four), "r"(0x01010101), "r"(more)); return r; }

// Over the lanes that differ in the bits of `LANES`, of 31 bits.
template <int LANES> DEVICE u32 largest(u32 v) {
#if __CUDA_ARCH__ >= 800
  if (LANES == 31) {
    u32 r; asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v)); return r;
  }
#endif
#pragma unroll
  for (int at = 16; at; at >>= 1)
    if (LANES & at) v = max(v, __shfl_xor_sync(FULL, v, at));
  return v;
}
template <int LANES> DEVICE int added(int v) {
#if __CUDA_ARCH__ >= 800
  if (LANES == 31) {
    int r; asm volatile("redux.sync.add.s32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v)); return r;
  }
#endif
#pragma unroll
  for (int at = 16; at; at >>= 1)
    if (LANES & at) v += __shfl_xor_sync(FULL, v, at);
  return v;
}

// fp16 xs [chunks * CHUNK] -> digits [chunks][2][CHUNK], which may lie in the same place, and for each block of SPAN chunks, unit and
// digit what its sums need: of symmetric weights minus MAGIC minus the zero's part, for r and r + 8; of others the digits' sums,
// for r and r + 8; then the factors of both. The warps of the block share the work.
template <int BITS, bool SYM, int UNITS, int SPAN> DEVICE void make_digits(const u16* xs, u8* digits, float4* inputs, int chunks) {
  static_assert(SPAN == 1 || UNITS == 1, "a scale that lasts for two chunks does not change in one");
  constexpr int OVER = SPAN == 2 ? 16 : 0;  // the lane bit that says which of two chunks
  const int lane = threadIdx.x % 32, own = lane % 16;  // a lane takes four inputs of lane column own / 4 in step own % 4
#pragma unroll 2
  for (int two = threadIdx.x / 32; two < (chunks + 1) / 2; two += blockDim.x / 32) {
    const int chunk = two * 2 + lane / 16;
    const bool there = chunk < chunks;
    const uint2 x = there ? *(const uint2*)(xs + chunk * CHUNK + own * 4) : make_uint2(0, 0);
    const u32 a = x.x & 0x7fff7fff, b = x.y & 0x7fff7fff;
    const float top = to_float((u16)largest<15 + OVER>(max(max(a & 0xffff, a >> 16), max(b & 0xffff, b >> 16))));
    const float scale = top == 0.f ? 0.f : DIGITS / top;
    const u32 y0 = __float_as_int(fmaf(low_of(x.x), scale, MAGIC + 32896.f)), y1 = __float_as_int(fmaf(high_of(x.x), scale, MAGIC + 32896.f));
    const u32 y2 = __float_as_int(fmaf(low_of(x.y), scale, MAGIC + 32896.f)), y3 = __float_as_int(fmaf(high_of(x.y), scale, MAGIC + 32896.f));
    const u32 even = __byte_perm(y0, y2, 0x5140), odd = __byte_perm(y1, y3, 0x5140);  // as the weights lie in a word's bytes
    const u32 low = __byte_perm(even, odd, 0x5410) ^ 0x80808080u, high = __byte_perm(even, odd, 0x7632) ^ 0x80808080u;
    const int both = added<13 + (UNITS == 1 ? 2 : 0) + OVER>(sum_bytes(low, sum_bytes(high, 0) << 16));
    const int low_sum = (short)both, high_sum = (both - low_sum) >> 16;
    __syncwarp();
    if (there) {
      *(u32*)(digits + chunk * 2 * CHUNK + own * 4) = high;
      *(u32*)(digits + chunk * 2 * CHUNK + CHUNK + own * 4) = low;
    }
    if (there && own < 2 * UNITS && (SPAN == 1 || lane < 16)) {
      constexpr float EIGHT = second_row<BITS>(), ZERO = 1 << (BITS - 1);
      const float sum = lane % 2 ? low_sum : high_sum, factor = top * ((lane % 2 ? 1.f : 256.f) / DIGITS);
      inputs[(SPAN == 2 ? two : chunk) * UNITS * 2 + own] =
          make_float4(SYM ? -MAGIC - ZERO * sum : sum, SYM ? -MAGIC - ZERO * EIGHT * sum : EIGHT * sum, factor, factor / EIGHT);
    }
  }
}

DEVICE float larger(float a, float b) {  // NaN if one is
#if __CUDA_ARCH__ >= 800
  float r; asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r;
#else
  return a > b ? a : b != b ? b : a != a ? a : b;
#endif
}

// The same of inputs `at` to `at` + 7, from registers; NATURAL_ORDER: they are in their own order, not in fragment order. All lanes of a
// warp call it, `at` is 8 more from one to the next.
template <int BITS, bool SYM, int UNITS, int SPAN, bool NATURAL_ORDER = false>
DEVICE void run_digits(const float (&v)[8], int at, bool there, u8* digits, float4* inputs) {
  constexpr int LANES = 8 * SPAN;  // of a block
  const int lane = threadIdx.x % 32;
  float top = 0.f;
#pragma unroll
  for (int j = 0; j < 8; j++) top = larger(top, fabsf(v[j]));
#pragma unroll
  for (int i = LANES / 2; i; i >>= 1) top = larger(top, __shfl_xor_sync(FULL, top, i));
  const float scale = top < 1e-30f ? 0.f : DIGITS / top;  // which is finite
  u32 y[8], low[2], high[2];
#pragma unroll
  for (int j = 0; j < 8; j++) y[j] = __float_as_int(fmaf(v[j], scale, MAGIC + 32896.f));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 even = __byte_perm(y[4 * i], y[4 * i + 2], 0x5140), odd = __byte_perm(y[4 * i + 1], y[4 * i + 3], 0x5140);
    low[i] = __byte_perm(even, odd, 0x5410) ^ 0x80808080u;
    high[i] = __byte_perm(even, odd, 0x7632) ^ 0x80808080u;
  }
  int both = sum_bytes(low[0], sum_bytes(low[1], sum_bytes(high[0], sum_bytes(high[1], 0)) << 16));
#pragma unroll
  for (int i = LANES / 2; i; i >>= 1)
    if (UNITS == 1 || i != (NATURAL_ORDER ? 4 : 1)) both += __shfl_xor_sync(FULL, both, i);
  if (!there) return;
  u8* to = digits + at / CHUNK * 2 * CHUNK;
  if constexpr (NATURAL_ORDER) {  // run 4 s + c goes to 4 c + s
    to += at % 16 * 4 + at % CHUNK / 16 * 4;
    *(u32*)to = high[0];
    *(u32*)(to + 16) = high[1];
    *(u32*)(to + CHUNK) = low[0];
    *(u32*)(to + CHUNK + 16) = low[1];
  } else {
    *(uint2*)(to + at % CHUNK) = make_uint2(high[0], high[1]);
    *(uint2*)(to + CHUNK + at % CHUNK) = make_uint2(low[0], low[1]);
  }
  const int own = lane % LANES;
  if (own < 8 && (UNITS == 2 && NATURAL_ORDER ? own % 4 < 2 : own < 2 * UNITS)) {
    constexpr float EIGHT = second_row<BITS>(), ZERO = 1 << (BITS - 1);
    const int unit = UNITS == 1 ? 0 : NATURAL_ORDER ? own / 4 : own % 2, digit = UNITS == 1 || NATURAL_ORDER ? own % 2 : own / 2;
    const int low_sum = (short)both, high_sum = (both - low_sum) >> 16;
    const float sum = digit ? low_sum : high_sum, factor = top * ((digit ? 1.f : 256.f) / DIGITS);
    inputs[(at / CHUNK / SPAN * UNITS + unit) * 2 + digit] =
        make_float4(SYM ? -MAGIC - ZERO * sum : sum, SYM ? -MAGIC - ZERO * EIGHT * sum : EIGHT * sum, factor, factor / EIGHT);
  }
}

template <bool BF = false> DEVICE void eight_halves(const uint4& x, float (&v)[8]) {
  const u32* w = &x.x;
#pragma unroll
  for (int j = 0; j < 4; j++) { v[2 * j] = wide_number<BF>((u16)w[j]); v[2 * j + 1] = wide_number<BF>((u16)(w[j] >> 16)); }
}

// As InFragmentOrder.
template <int BITS, bool SYM, int UNITS, int SPAN, bool BF> struct InDigits {
  static constexpr bool DIVIDED = false;  // digits have the largest of their block
  u8* digits;
  float4* inputs;
  int padded;
  METHOD void put(const uint4& x, int at) const {
    float v[8];
    eight_halves<BF>(x, v);
    run_digits<BITS, SYM, UNITS, SPAN>(v, at, at < padded, digits, inputs);
  }
  METHOD void put_natural(const uint4& x, int at) const {
    float v[8];
    eight_halves<BF>(x, v);
    run_digits<BITS, SYM, UNITS, SPAN, true>(v, at, at < padded, digits, inputs);
  }
};

// As stage_input, in digits; what a norm divides by is left out (norm_scale). `meanwhile` is done when x is on its way.
template <int NORM, int BITS, bool SYM, int UNITS, int SPAN, class Meanwhile>
DEVICE void stage_digits(const u16* x, const NormWeight<NORM>& norm, u8* digits, float4* inputs, int padded, float* scratch, const Meanwhile& meanwhile) {
  const int tid = threadIdx.x, threads = blockDim.x, lane = tid % 32;
  float v[8];
  if constexpr (NORM == 0) {
    auto load = [&](int at) { return at < padded ? __ldcg((const uint4*)(x + at)) : make_uint4(0, 0, 0, 0); };
    const int stride = threads * 8;
    uint4 next[2] = {load(tid * 8), load(tid * 8 + stride)};
    meanwhile();
#pragma unroll 1
    for (int at = tid * 8; at - lane * 8 < padded; at += stride) {
      eight_halves(next[0], v);
      next[0] = next[1];
      next[1] = load(at + 2 * stride);
      run_digits<BITS, SYM, UNITS, SPAN>(v, at, at < padded, digits, inputs);
    }
  } else {
    uint4 mine[NORM];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < NORM; i++) {
      const int at = (i * threads + tid) * 8;
      mine[i] = at < padded ? __ldcg((const uint4*)(x + at)) : make_uint4(0, 0, 0, 0);
    }
    meanwhile();
#pragma unroll
    for (int i = 0; i < NORM; i++) {
      eight_halves(mine[i], v);
#pragma unroll
      for (int j = 0; j < 8; j++) sum += v[j] * v[j];
    }
    sum = warp_sum(sum);
    if (lane == 0) scratch[tid / 32] = sum;
#pragma unroll
    for (int i = 0; i < NORM; i++) {
      const int at = (i * threads + tid) * 8;
      if (at - lane * 8 >= padded) break;
      float w[8];
      eight_halves(mine[i], v);
      eight_halves(norm.run[i], w);
#pragma unroll
      for (int j = 0; j < 8; j++) v[j] = at < padded ? v[j] * w[j] : 0.f;
      run_digits<BITS, SYM, UNITS, SPAN>(v, at, at < padded, digits, inputs);
    }
  }
  __syncthreads();
}

// What the sums of a normed input of `k` numbers are multiplied with, from what stage_digits has left in `scratch`. A whole warp.
DEVICE float norm_scale(const float* scratch, int k, float eps) {
  const int lane = threadIdx.x % 32;
  return rsqrtf(warp_sum(lane < (int)blockDim.x / 32 ? scratch[lane] : 0.f) / k + eps);
}
