// The input of a product of one row, on its way into shared memory.

enum { FRAGMENTS, NATURAL, NATURAL_BFLOAT, ORDERED, ORDERED_BFLOAT };  // how x lies in memory: see GemvArguments.x

// -- the input, normed if NORM ----------------------------------------------------------------------------------------
// NORM is the number of runs of 8 inputs that a thread norms; 0 for no norm.

template <int NORM> struct NormWeight { uint4 run[NORM]; };
template <> struct NormWeight<0> {};

template <int NORM> DEVICE NormWeight<NORM> load_norm_weight(const u16* norm, int padded) {
  NormWeight<NORM> r;
  if constexpr (NORM > 0) {
#pragma unroll
    for (int i = 0; i < NORM; i++) {
      const int at = (i * blockDim.x + threadIdx.x) * 8;
      if (at < padded) r.run[i] = __ldg((const uint4*)(norm + at));
    }
  }
  return r;
}

DEVICE void copy_input(const u16* x, u16* shared, int padded) {
#pragma unroll 4
  for (int at = threadIdx.x * 8; at < padded; at += blockDim.x * 8) *(uint4*)(shared + at) = __ldcg((const uint4*)(x + at));
}

// RMSNorm of `k` inputs. The block must have enough threads: NORM * 8 * threads >= padded.
template <int NORM> DEVICE void norm_input(const u16* x, const NormWeight<NORM>& norm, u16* shared, int padded, int k, float eps, float* scratch) {
  static_assert(NORM <= NORM_RUNS, "the host plans with at most NORM_RUNS runs a thread");
  const int threads = blockDim.x, tid = threadIdx.x;
  uint4 mine[NORM];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < NORM; i++) {
    const int at = (i * threads + tid) * 8;
    mine[i] = at < padded ? __ldcg((const uint4*)(x + at)) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < NORM; i++) {
    const u32* m = &mine[i].x;
#pragma unroll
    for (int j = 0; j < 4; j++) { float a = low_of(m[j]), b = high_of(m[j]); sum += a * a + b * b; }
  }
  sum = warp_sum(sum);
  if (tid % 32 == 0) scratch[tid / 32] = sum;
  __syncthreads();
  sum = 0.f;
  for (int i = 0; i < threads / 32; i++) sum += scratch[i];
  const float scale = rsqrtf(sum / k + eps);
#pragma unroll
  for (int i = 0; i < NORM; i++) {
    const int at = (i * threads + tid) * 8;
    if (at < padded) {
      u32* m = &mine[i].x;
      const u32* w = &norm.run[i].x;
#pragma unroll
      for (int j = 0; j < 4; j++)
        m[j] = to_half2(low_of(m[j]) * scale * low_of(w[j]), high_of(m[j]) * scale * high_of(w[j]));
      *(uint4*)(shared + at) = mine[i];
    }
  }
}

// x into shared memory; `scratch` holds 32 floats.
template <int NORM> DEVICE void stage_input(const u16* x, const NormWeight<NORM>& norm, u16* shared, int padded, int k, float eps, float* scratch) {
  if constexpr (NORM == 0) copy_input(x, shared, padded);
  else norm_input<NORM>(x, norm, shared, padded, k, eps, scratch);
  __syncthreads();
}

template <bool BF> DEVICE float wide_number(u16 v) { return BF ? from_bfloat(v) : to_float(v); }
template <bool BF> DEVICE u16 narrow_number(float v) { return BF ? to_bfloat(v) : to_half(v); }

// Four inputs of a row in its natural order; zeros from `k` on, a multiple of 4.
DEVICE uint2 four_inputs(const u16* x, int at, int k) { return at < k ? __ldcg((const uint2*)(x + at)) : make_uint2(0, 0); }

// Where eight inputs go, from `at` on: as fp16, divided by `power` if they are bf16. All lanes of a warp call it, `at` is 8 more from one
// to the next, and may be behind the end.
template <bool BF> struct InFragmentOrder {
  static constexpr bool DIVIDED = BF;  // it needs the row's largest number first
  u16* shared;
  int padded;
  float power = 1.f;
  METHOD uint4 halves(const uint4& x) const {
    if (!BF) return x;
    const float inverse = inverse_power(power);
    uint4 y;
    const u32* from = &x.x;
    u32* to = &y.x;
#pragma unroll
    for (int j = 0; j < 4; j++) to[j] = to_half2(from_bfloat((u16)from[j]) * inverse, from_bfloat((u16)(from[j] >> 16)) * inverse);
    return y;
  }
  METHOD void put(const uint4& x, int at) const {  // which are in fragment order
    if (at < padded) *(uint4*)(shared + at) = halves(x);
  }
  METHOD void put_natural(const uint4& x, int at) const {  // run 4 s + c of a chunk goes to 4 c + s
    if (at >= padded) return;
    const int run = at / 4;
    const uint4 y = halves(x);
    *(uint2*)(shared + (run / 16 * 16 + run % 4 * 4 + run / 4 % 4) * 4) = make_uint2(y.x, y.y);
    *(uint2*)(shared + (run / 16 * 16 + (run + 1) % 4 * 4 + run / 4 % 4) * 4) = make_uint2(y.z, y.w);
  }
};

template <bool BF> DEVICE u32 largest_of_four(const uint2& four, u32 most) {
  const u16* v = (const u16*)&four;
#pragma unroll
  for (int j = 0; j < 4; j++) most = max(most, size_bits(wide_number<BF>(v[j])));
  return most;
}

// A row in its natural order into fragment order; `raw` [padded + 8] and `order` [padded] as below.
template <class Place> DEVICE void order_row(const u16* order, const u16* raw, int padded, const Place& place) {
#pragma unroll 2
  for (int at = threadIdx.x * 8; at - threadIdx.x % 32 * 8 < padded; at += blockDim.x * 8) {
    uint4 from = make_uint4(0, 0, 0, 0), to = from;
    if (at < padded) from = __ldg((const uint4*)(order + at));
    const u32* f = &from.x;
    u32* t = &to.x;
#pragma unroll
    for (int j = 0; j < 4; j++) t[j] = pair(raw[f[j] & 0xffffu], raw[f[j] >> 16]);
    place.put(to, at);
  }
}

// x in its natural order into shared memory in fragment order. Without act-order runs of four inputs stay together; with it
// the row passes through `raw` [padded + 8] in shared memory, and `order` [padded] says which input each position takes.
// `scratch` holds a float for each warp.
template <bool BF, bool ORDER, class Place>
DEVICE void stage_natural(const u16* x, const u16* order, u16* raw, int padded, int k, float* scratch, Place& place) {
  u32 largest = 0;
  if constexpr (!ORDER) {
    if constexpr (Place::DIVIDED) {
#pragma unroll 2
      for (int at = threadIdx.x * 4; at < k; at += blockDim.x * 4) {
        const uint2 four = four_inputs(x, at, k);
        largest = largest_of_four<BF>(four, largest);
      }
      place.power = power_of_largest(block_max(largest, (u32*)scratch));
    }
#pragma unroll 2
    for (int at = threadIdx.x * 8; at - threadIdx.x % 32 * 8 < padded; at += blockDim.x * 8) {
      const uint2 low = four_inputs(x, at, k), high = four_inputs(x, at + 4, k);
      place.put_natural(make_uint4(low.x, low.y, high.x, high.y), at);
    }
  } else {
#pragma unroll 4
    for (int at = threadIdx.x * 4; at < padded + 8; at += blockDim.x * 4) {
      const uint2 four = four_inputs(x, at, k);
      *(uint2*)(raw + at) = four;
      if constexpr (Place::DIVIDED) largest = largest_of_four<BF>(four, largest);
    }
    if constexpr (Place::DIVIDED) place.power = power_of_largest(block_max(largest, (u32*)scratch));
    else __syncthreads();
    order_row(order, raw, padded, place);
  }
  __syncthreads();
}

// As stage_natural, of norm(x), or norm(x + addend), or norm(x + RMSNorm(addend)), each number rounded as kernels of their own
// would. The first block writes the sum. `scratch` holds 33 floats; the block has enough threads, as for norm_input.
template <int NORM, bool BF, bool ORDER, class Arguments, class Place>
DEVICE void stage_normed(const Arguments& p, const NormWeight<NORM>& norm, const NormWeight<NORM>& inner, u16* raw, float* scratch, Place& place) {
  static_assert(NORM <= NORM_RUNS, "the host plans with at most NORM_RUNS runs a thread");
  const int padded = p.chunks * CHUNK;
  uint4 held[NORM], more[NORM], also[NORM];
#pragma unroll
  for (int i = 0; i < NORM; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 8;
    held[i] = at < p.k ? __ldcg((const uint4*)(p.x + at)) : make_uint4(0, 0, 0, 0);
    more[i] = p.addend && at < p.k ? __ldcg((const uint4*)(p.addend + at)) : make_uint4(0, 0, 0, 0);
    also[i] = p.also && at < p.k ? __ldcg((const uint4*)(p.also + at)) : make_uint4(0, 0, 0, 0);
  }
  if (p.addend) {
    float scale = 1.f;
    if (p.also) {
#pragma unroll
      for (int i = 0; i < NORM; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
          u16& own = ((u16*)&more[i])[j];
          own = narrow_number<BF>(wide_number<BF>(own) + wide_number<BF>(((const u16*)&also[i])[j]));
        }
    }
    if (p.inner) {
      float squares = 0.f;
#pragma unroll
      for (int i = 0; i < NORM; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) { const float v = wide_number<BF>(((const u16*)&more[i])[j]); squares += v * v; }
      scale = rsqrtf(block_sum(squares, scratch) / p.k + p.inner_eps);
    }
#pragma unroll
    for (int i = 0; i < NORM; i++) {
      const int at = (i * blockDim.x + threadIdx.x) * 8;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        float v = wide_number<BF>(((const u16*)&more[i])[j]);
        if (p.inner) v = wide_number<BF>(narrow_number<BF>(v * scale * (wide_number<BF>(((const u16*)&inner.run[i])[j]) + p.inner_offset)));
        u16& own = ((u16*)&held[i])[j];
        own = at < p.k ? narrow_number<BF>(wide_number<BF>(own) + v) : 0;
      }
      if (blockIdx.x == 0 && at < p.k) *(uint4*)(p.sum + at) = held[i];
    }
  }
  float mean = 0.f, squares = 0.f;
  if (p.centred) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < NORM; i++)
#pragma unroll
      for (int j = 0; j < 8; j++) sum += wide_number<BF>(((const u16*)&held[i])[j]);
    mean = block_sum(sum, scratch) / p.k;
  }
#pragma unroll
  for (int i = 0; i < NORM; i++) {
    const bool there = (i * blockDim.x + threadIdx.x) * 8 < p.k;
#pragma unroll
    for (int j = 0; j < 8; j++) { const float v = wide_number<BF>(((const u16*)&held[i])[j]) - mean; squares += there ? v * v : 0.f; }
  }
  const float scale = rsqrtf(block_sum(squares, scratch) / p.k + p.eps);
  u32 largest = 0;
#pragma unroll
  for (int i = 0; i < NORM; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 8;
    const uint4 bias = p.norm_bias && at < p.k ? __ldg((const uint4*)(p.norm_bias + at)) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      u16& own = ((u16*)&held[i])[j];
      const float w = wide_number<BF>(((const u16*)&norm.run[i])[j]) + p.offset, b = wide_number<BF>(((const u16*)&bias)[j]);
      own = at < p.k ? narrow_number<BF>((wide_number<BF>(own) - mean) * scale * w + b) : 0;
      if (Place::DIVIDED) largest = max(largest, size_bits(wide_number<BF>(own)));
    }
    if constexpr (ORDER) {
      if (at < padded + 8) *(uint4*)(raw + at) = held[i];
    }
  }
  if constexpr (Place::DIVIDED) place.power = power_of_largest(block_max(largest, (u32*)scratch));
  if constexpr (!ORDER) {
#pragma unroll
    for (int i = 0; i < NORM; i++) {
      const int at = (i * blockDim.x + threadIdx.x) * 8;
      if (at - threadIdx.x % 32 * 8 < padded) place.put_natural(held[i], at);
    }
  }
  __syncthreads();
  if constexpr (ORDER) {
    order_row(p.order, raw, padded, place);
    __syncthreads();
  }
}
