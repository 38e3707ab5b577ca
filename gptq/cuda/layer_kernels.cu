// Parts of transformers' own forward as single kernels: RMSNorm, rotation of heads, keeping keys and values, the sum of a token's
// experts, and attention of one token over a cache at a fixed address. Numbers are fp16 or bf16; the arithmetic is fp32.

struct Half {
  static METHOD float wide(u16 v) { return to_float(v); }
  static METHOD u16 narrow(float v) { return to_half(v); }
};
struct Bfloat {
  static METHOD float wide(u16 v) { return from_bfloat(v); }
  static METHOD u16 narrow(float v) { return to_bfloat(v); }
};

// RMSNorm of rows of `k` numbers, a multiple of 8 and at most 32 for each thread. A block takes a row.
template <class T> DEVICE void rms_norm(const RmsNormArguments& p) {
  float* scratch = (float*)shared_words;  // 33
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const u16* from = p.x + (size_t)blockIdx.x * p.k;
  u16* to = p.out + (size_t)blockIdx.x * p.k;
  uint4 mine[4];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 8;
    if (at >= p.k) continue;
    mine[i] = __ldcg((const uint4*)(from + at));
    const u16* m = (const u16*)&mine[i];
#pragma unroll
    for (int j = 0; j < 8; j++) sum += T::wide(m[j]) * T::wide(m[j]);
  }
  const float scale = rsqrtf(block_sum(sum, scratch) / p.k + p.eps);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = (i * blockDim.x + threadIdx.x) * 8;
    if (at >= p.k) continue;
    const uint4 weight = __ldg((const uint4*)(p.weight + at));
    const u16* w = (const u16*)&weight;
    u16* m = (u16*)&mine[i];
#pragma unroll
    for (int j = 0; j < 8; j++)
      m[j] = T::narrow(T::wide(m[j]) * scale * (T::wide(w[j]) + p.offset));
    *(uint4*)(to + at) = mine[i];
  }
}

// The heads of one token's query and key, turned by their angles. A block takes a head.
template <class T> DEVICE void rotate(const RotateArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int head = blockIdx.x, half = p.rotated / 2;
  const bool query = head < p.heads;
  const u16* from = query ? p.q + (size_t)head * p.q_stride : p.k + (size_t)(head - p.heads) * p.k_stride;
  u16* to = query ? p.q_out + (size_t)head * p.d : p.k_out + (size_t)(head - p.heads) * p.d;
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    const bool pairs = p.kind != 0;  // neighbours turn together
    const int a = pairs ? 2 * i : i, b = pairs ? 2 * i + 1 : i + half;
    const int angle = p.kind == 2 ? 2 * i : i, other = p.kind == 0 ? (i + half) % p.angles : p.kind == 2 ? 2 * i + 1 : i;
    const float x = T::wide(__ldcg(from + a)), y = T::wide(__ldcg(from + b));
    const float first = x * T::wide(__ldcg(p.cosines + angle)) - y * T::wide(__ldcg(p.sines + angle));
    const float second = y * T::wide(__ldcg(p.cosines + other)) + x * T::wide(__ldcg(p.sines + other));
    const bool apart = p.kind == 3;  // neighbours turn together and then lie apart
    to[apart ? i : a] = T::narrow(first);
    to[apart ? i + half : b] = T::narrow(second);
  }
  for (int i = p.rotated + threadIdx.x; i < p.d; i += blockDim.x) to[i] = __ldcg(from + i);
}

// The new token's keys and values into the cache. A block takes a head.
template <class T> DEVICE void keep(const KeepArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int head = blockIdx.x;
  const u64 count = __ldcg(p.count), at = (u64)head * p.capacity + (count < (u64)p.capacity ? count : p.capacity - 1);
  for (int i = threadIdx.x; i < p.d; i += blockDim.x) p.keys[at * p.d + i] = __ldcg(p.k + (size_t)head * p.k_stride + i);
  for (int i = threadIdx.x; i < p.dv; i += blockDim.x) p.values[at * p.dv + i] = __ldcg(p.v + (size_t)head * p.v_stride + i);
}

// What the chosen experts of each token give, times their weights.
template <class T> DEVICE void combine(const CombineArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int token = blockIdx.y;
  const float* y = p.y + (size_t)token * p.choices * p.n;
  for (int at = blockIdx.x * blockDim.x + threadIdx.x; at < p.n; at += gridDim.x * blockDim.x) {
    float sum = 0.f;
#pragma unroll 4
    for (int i = 0; i < p.choices; i++) {
      const int w = token * p.choices + i;
      sum += __ldcg(y + (size_t)i * p.n + at) * (p.wide ? __ldcg((const float*)p.weights + w) : T::wide(__ldcg((const u16*)p.weights + w)));
    }
    p.out[(size_t)token * p.n + at] = T::narrow(sum);
  }
}

// -- attention of one token ----------------------------------------------------------------------------------------------

#define LOG2E 1.4426950408889634f

// What to add to a token's score; -INFINITY hides it.
template <class T> DEVICE float masked(const DecodeArguments& p, int head, int token) {
  if (p.mask_kind == 0) return 0.f;
  const size_t at = (size_t)head * p.mask_stride + token;
  if (p.mask_kind == 1) return __ldcg((const u8*)p.mask + at) ? 0.f : -INFINITY;
  const float add = p.mask_kind == 2 ? T::wide(__ldcg((const u16*)p.mask + at)) : __ldcg((const float*)p.mask + at);
  return add <= -30000.f ? -INFINITY : add;
}

template <class T> DEVICE void eight(const u16* from, bool there, float (&to)[8]) {
  const uint4 v = there ? __ldcg((const uint4*)from) : make_uint4(0, 0, 0, 0);
  const u16* w = (const u16*)&v;
#pragma unroll
  for (int j = 0; j < 8; j++) to[j] = T::wide(w[j]);
}

// A block takes up to GROUP heads that share keys, and a part of the tokens. LANES lanes share a token, eight dimensions each.
// The last block of a head to finish adds the parts up.
template <class T, int LANES, int GROUP> DEVICE void decode(const DecodeArguments& p) {
  static_assert(LANES <= 32 && 32 % LANES == 0, "whole tokens for a warp");
  constexpr int TOKENS = 32 / LANES, SETS = 4 * TOKENS;  // of a warp at once; of a block
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sub = lane / LANES, dim = lane % LANES * 8;
  const int kv_head = blockIdx.x / p.group_blocks, first_head = kv_head * p.group + blockIdx.x % p.group_blocks * GROUP;
  const int heads = min(GROUP, (kv_head + 1) * p.group - first_head), splits = gridDim.y;
  float* found = (float*)shared_words;  // [SETS][GROUP][dv + 2]
  const int width = p.dv + 2;
  allow_next_kernel_to_start();
  wait_for_previous_kernel();

  const int total = (int)min(__ldcg(p.count) + 1, (u64)p.shown);
  const int each = (total + splits - 1) / splits, per = (each + SETS - 1) / SETS * SETS;
  const int first = min((int)blockIdx.y * per, total), end = min(first + per, total);
  float q[GROUP][8], sum[GROUP][8], high[GROUP], weight[GROUP];
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    eight<T>(p.q + (size_t)(first_head + g) * p.d + dim, g < heads && dim < p.d, q[g]);
    high[g] = -INFINITY;
    weight[g] = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) sum[g][j] = 0.f;
  }
  const u16* keys = p.keys + kv_head * p.key_stride + dim;
  const u16* values = p.values + kv_head * p.value_stride + dim;
  const bool same_mask = p.mask_stride == 0;
#pragma unroll 2
  for (int base = first + warp * TOKENS; base < end; base += SETS) {
    const int token = base + sub;
    float shared_add = token < end ? 0.f : -INFINITY;
    if (token < end && same_mask) shared_add = masked<T>(p, 0, token);
    const bool there = shared_add > -INFINITY;
    float k[8], v[8];
    eight<T>(keys + (size_t)token * p.d, there && dim < p.d, k);
    eight<T>(values + (size_t)token * p.dv, there && dim < p.dv, v);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float score = 0.f;
#pragma unroll
      for (int j = 0; j < 8; j++) score += q[g][j] * k[j];
#pragma unroll
      for (int at = LANES / 2; at; at >>= 1) score += __shfl_xor_sync(FULL, score, at);
      score *= p.scale;
      if (p.cap > 0.f) score = p.cap * tanhf(score / p.cap);
      const float add = same_mask || !there || g >= heads ? shared_add : masked<T>(p, first_head + g, token);
      score = (score + add) * LOG2E;
      const float now = fmaxf(high[g], score);
      if (now == -INFINITY) continue;
      const float before = exp2f(high[g] - now), own = exp2f(score - now);
      high[g] = now;
      weight[g] = weight[g] * before + own;
#pragma unroll
      for (int j = 0; j < 8; j++) sum[g][j] = sum[g][j] * before + own * v[j];
    }
  }
  float* mine = found + (warp * TOKENS + sub) * GROUP * width;
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    if (dim < p.dv)
#pragma unroll
      for (int j = 0; j < 8; j++) mine[g * width + dim + j] = sum[g][j];
    if (dim == 0) {
      mine[g * width + p.dv] = high[g];
      mine[g * width + p.dv + 1] = weight[g];
    }
  }
  __syncthreads();

  float* parts = p.partial + (size_t)first_head * splits * width;  // [heads][splits][width]
  for (int i = threadIdx.x; i < heads * p.dv; i += blockDim.x) {
    const int g = i / p.dv, at = i % p.dv;
    float top = -INFINITY, total_weight = 0.f, y = 0.f;
    for (int s = 0; s < SETS; s++) top = fmaxf(top, found[(s * GROUP + g) * width + p.dv]);
    if (top > -INFINITY)
      for (int s = 0; s < SETS; s++) {
        const float* from = found + (s * GROUP + g) * width;
        const float share = exp2f(from[p.dv] - top);
        total_weight += share * from[p.dv + 1];
        y += share * from[at];
      }
    float* to = parts + ((size_t)g * splits + blockIdx.y) * width;
    to[at] = y;
    if (at == 0) {
      to[p.dv] = top;
      to[p.dv + 1] = total_weight;
    }
  }
  __syncthreads();
  u32* flag = (u32*)found;
  if (threadIdx.x == 0) *flag = count_arrival(p.done + blockIdx.x);
  __syncthreads();
  if (*flag != (u32)splits - 1) return;
  if (threadIdx.x == 0) p.done[blockIdx.x] = 0;
  for (int i = threadIdx.x; i < heads * p.dv; i += blockDim.x) {
    const int g = i / p.dv, at = i % p.dv;
    const float* from = parts + (size_t)g * splits * width;
    const float sink = p.sinks ? T::wide(p.sinks[first_head + g]) * LOG2E : -INFINITY;
    float top = sink;
    for (int s = 0; s < splits; s++) top = fmaxf(top, __ldcg(from + (size_t)s * width + p.dv));
    float total_weight = p.sinks ? exp2f(sink - top) : 0.f, y = 0.f;
    if (top > -INFINITY)
#pragma unroll 4
      for (int s = 0; s < splits; s++) {
        const float share = exp2f(__ldcg(from + (size_t)s * width + p.dv) - top);
        total_weight += share * __ldcg(from + (size_t)s * width + p.dv + 1);
        y += share * __ldcg(from + (size_t)s * width + at);
      }
    p.out[(size_t)(first_head + g) * p.dv + at] = T::narrow(total_weight > 0.f ? y / total_weight : 0.f);
  }
}
