// Attention of one token over keys and values at a fixed address, as a cache of transformers keeps them.

#define LOG2E 1.4426950408889634f

// What to add to a token's score; -INFINITY hides it.
template <class T> DEVICE float masked(const DecodeArguments& p, int head, int token) {
  if (p.mask_kind == 0) return 0.f;
  const size_t at = (size_t)head * p.mask_stride + token;
  if (p.mask_kind == 1) return __ldcg((const u8*)p.mask + at) ? 0.f : -INFINITY;
  const float add = p.mask_kind == 2 ? T::wide(__ldcg((const u16*)p.mask + at)) : __ldcg((const float*)p.mask + at);
  return add <= -30000.f ? -INFINITY : add;
}

template <class T> DEVICE void widen(const uint4& v, float (&to)[8]) {
  const u16* w = (const u16*)&v;
#pragma unroll
  for (int j = 0; j < 8; j++) to[j] = T::wide(w[j]);
}
template <class T> DEVICE void eight(const u16* from, bool there, float (&to)[8]) {
  widen<T>(there ? __ldcg((const uint4*)from) : make_uint4(0, 0, 0, 0), to);
}

// A head's numbers from `dim` on, normed if there is a norm, and the first `rotated` turned by their angles. LANES lanes hold a head;
// all lanes call.
template <class T, int LANES> DEVICE void turned(const DecodeArguments& p, const u16* norm, int dim, float (&x)[8]) {
  const bool there = dim < p.d, turns = dim < p.rotated;
  float cosines[8], sines[8];
  const int angle = dim < p.angles ? dim : dim - p.angles;
  eight<T>(p.cosines + angle, turns, cosines);
  eight<T>(p.sines + angle, turns, sines);
  if (norm) {
    float weight[8], sum = 0.f;
    eight<T>(norm + dim, there, weight);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += x[j] * x[j];
#pragma unroll
    for (int at = LANES / 2; at; at >>= 1) sum += __shfl_xor_sync(FULL, sum, at);
    const float scale = rsqrtf(sum / p.d + p.norm_eps);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = T::wide(T::narrow(x[j] * scale * (weight[j] + p.norm_offset)));
  }
  const bool low = dim < p.rotated / 2;
  const int other = threadIdx.x % 32 + (low ? p.rotated / 16 : -(p.rotated / 16));
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float across = __shfl_sync(FULL, x[j], other & 31);
    if (turns) x[j] = T::wide(T::narrow(x[j] * cosines[j] + (low ? -across : across) * sines[j]));
  }
}

// The shares of parts in their sum: found [parts][stride], of each the highest score and the sum of weights. Writes the share of
// each to shares [32], zeros behind them, and returns the whole weight, `sink` (a score without a value) included. All lanes of a warp call it.
DEVICE float shares_of(const float* found, int parts, int stride, float sink, float* shares) {
  const int lane = threadIdx.x % 32;
  const float high = lane < parts ? found[lane * stride] : -INFINITY;
  float top = fmaxf(high, sink);
#pragma unroll
  for (int at = 16; at; at >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, at));
  const float share = high > -INFINITY ? exp2f(high - top) : 0.f;
  shares[lane] = share;
  return warp_sum(lane < parts ? share * found[lane * stride + 1] : 0.f) + (sink > -INFINITY ? exp2f(sink - top) : 0.f);
}

// A block takes up to GROUP heads that share keys, and a part of the tokens. LANES lanes share a token, eight dimensions each.
// The last block of a head to finish adds the parts up. There are at most 32 parts.
template <class T, int LANES, int GROUP> DEVICE void decode(const DecodeArguments& p) {
  static_assert(LANES <= 32 && 32 % LANES == 0, "whole tokens for a warp");
  constexpr int TOKENS = 32 / LANES, SETS = 4 * TOKENS;  // of a warp at once; of a block
  static_assert(SETS <= 32, "a lane for each part of a block");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, sub = lane / LANES, dim = lane % LANES * 8;
  const int kv_head = blockIdx.x / p.group_blocks, first_head = kv_head * p.group + blockIdx.x % p.group_blocks * GROUP;
  const int heads = min(GROUP, (kv_head + 1) * p.group - first_head), splits = gridDim.y, width = p.dv + 4;
  float* sums = (float*)shared_words;              // [SETS][GROUP][dv]
  float* stats = sums + SETS * GROUP * p.dv;       // [GROUP][SETS or splits][2]
  float* shares = stats + GROUP * 64;              // [GROUP][32]
  float* whole = shares + GROUP * 32;              // [GROUP]
  u32* flag = (u32*)(whole + GROUP);
  float* heads_in = (float*)(((u64)(flag + 1) + 15) / 16 * 16);  // [GROUP + 1][LANES * 8]: the query and the new key, turned
  uint4* own_value = (uint4*)(heads_in + (GROUP + 1) * LANES * 8) + lane % LANES;  // [LANES]: the new value
  uint4* early = own_value - lane % LANES + LANES + threadIdx.x;  // [DECODE_EARLY][2][128]: a lane's keys and values
  float* adds = (float*)(early - threadIdx.x + DECODE_EARLY * 256) + threadIdx.x;  // [GROUP][128]: what a mask of each head adds
  allow_next_kernel_to_start();
  // The tokens before this one, and their number, were written before this forward's first kernel: they need not be waited for. This
  // one's may have been kept by the kernel in front.
  if (!p.new_key) wait_for_previous_kernel();
  const int before = (int)min(__ldcg(p.count), (u64)p.shown - 1), total = before + 1;
  const int each = (total + splits - 1) / splits, per = (each + SETS - 1) / SETS * SETS;
  const int first = min((int)blockIdx.y * per, total), end = min(first + per, total);
  u16* keys = p.keys + kv_head * p.key_stride + dim;
  u16* values = p.values + kv_head * p.value_stride + dim;
  auto fetch = [&](int i) {  // of turn i
    const int token = first + warp * TOKENS + sub + i * SETS;
    uint4* to = early + i % DECODE_EARLY * 256;
    if (token < end && dim < p.d) copy_async<16>(keys + (size_t)token * p.d, to);
    if (token < end && dim < p.dv) copy_async<16>(values + (size_t)token * p.dv, to + 128);
    commit_copies();
  };
#pragma unroll 1
  for (int i = 0; i < DECODE_EARLY - 1; i++) fetch(i);
  wait_for_previous_kernel();

  float q[GROUP][8], sum[GROUP][8], high[GROUP], weight[GROUP];
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    high[g] = -INFINITY;
    weight[g] = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) sum[g][j] = 0.f;
  }
  const bool same_mask = p.mask_stride == 0;
  auto add_of = [&](int token) { return same_mask && token < end ? masked<T>(p, 0, token) : 0.f; };
  float next_add = add_of(first + warp * TOKENS + sub), later_add = add_of(first + warp * TOKENS + sub + SETS);
  const bool keeps = p.new_key && before >= first && before < end && blockIdx.x % p.group_blocks == 0;
#pragma unroll 1
  for (int item = warp; item <= GROUP; item += 4) {  // a warp turns a head, or the new key
    const bool query = item < GROUP, there = (query ? item < heads : p.new_key != nullptr) && dim < p.d;
    const u16* from = query ? p.q + (size_t)(first_head + item) * p.q_stride : p.new_key + (size_t)kv_head * p.new_key_stride;
    float x[8];
    eight<T>(from + dim, there, x);
    uint4 value = make_uint4(0, 0, 0, 0);
    if (!query && p.new_key && dim < p.dv) value = __ldcg((const uint4*)(p.new_value + (size_t)kv_head * p.new_value_stride + dim));
    if (p.cosines) turned<T, LANES>(p, query ? p.q_norm : p.k_norm, dim, x);
    if (sub) continue;
    if (!query) *own_value = value;
    float4* to = (float4*)(heads_in + item * LANES * 8 + dim);
    to[0] = make_float4(x[0], x[1], x[2], x[3]);
    to[1] = make_float4(x[4], x[5], x[6], x[7]);
    if (query || !keeps) continue;
    const uint4 kept = {pair(T::narrow(x[0]), T::narrow(x[1])), pair(T::narrow(x[2]), T::narrow(x[3])),
                        pair(T::narrow(x[4]), T::narrow(x[5])), pair(T::narrow(x[6]), T::narrow(x[7]))};
    if (dim < p.d) *(uint4*)(keys + (size_t)before * p.d) = kept;
    if (dim < p.dv) *(uint4*)(values + (size_t)before * p.dv) = value;
  }
  __syncthreads();
#pragma unroll
  for (int g = 0; g < GROUP; g++)
#pragma unroll
    for (int j = 0; j < 8; j++) q[g][j] = heads_in[g * LANES * 8 + dim + j];
#pragma unroll(GROUP < 4 ? 2 : 1)
  for (int base = first + warp * TOKENS, i = 0; base < end; base += SETS, i++) {
    const int token = base + sub;
    const bool there = token < end, own = p.new_key && token == before;
    wait_for_copies<DECODE_EARLY - 2>();
    const uint4* copied = early + i % DECODE_EARLY * 256;
    const uint4 none = make_uint4(0, 0, 0, 0), key = there && !own && dim < p.d ? copied[0] : none;
    const uint4 value = there && dim < p.dv ? own ? *own_value : copied[128] : none;
    fetch(i + DECODE_EARLY - 1);
    float k[8], v[8];
    widen<T>(key, k);
    if (own) {
#pragma unroll
      for (int j = 0; j < 8; j++) k[j] = heads_in[GROUP * LANES * 8 + dim + j];
    }
    widen<T>(value, v);
    const float shared_add = there ? next_add : -INFINITY;
    next_add = later_add;
    later_add = add_of(token + 2 * SETS);
#pragma unroll 1
    for (int g = 0; g < heads && !same_mask; g++) adds[g * 128] = there ? masked<T>(p, first_head + g, token) : -INFINITY;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float score = 0.f;
#pragma unroll
      for (int j = 0; j < 8; j++) score += q[g][j] * k[j];
#pragma unroll
      for (int at = LANES / 2; at; at >>= 1) score += __shfl_xor_sync(FULL, score, at);
      score *= p.scale;
      if (p.cap > 0.f) score = p.cap * tanhf(score / p.cap);
      const float add = same_mask || g >= heads ? shared_add : adds[g * 128];
      score = (score + add) * LOG2E;
      const float now = fmaxf(high[g], score);
      const float keep = now > -INFINITY ? exp2f(high[g] - now) : 1.f, mine = now > -INFINITY ? exp2f(score - now) : 0.f;
      high[g] = now;
      weight[g] = weight[g] * keep + mine;
#pragma unroll
      for (int j = 0; j < 8; j++) sum[g][j] = sum[g][j] * keep + mine * v[j];
    }
  }
  const int set = warp * TOKENS + sub;
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    if (dim < p.dv) {
      float4* to = (float4*)(sums + (set * GROUP + g) * p.dv + dim);
      to[0] = make_float4(sum[g][0], sum[g][1], sum[g][2], sum[g][3]);
      to[1] = make_float4(sum[g][4], sum[g][5], sum[g][6], sum[g][7]);
    }
    if (dim == 0) {
      stats[(g * SETS + set) * 2] = high[g];
      stats[(g * SETS + set) * 2 + 1] = weight[g];
    }
  }
  __syncthreads();

  float* parts = p.partial + (size_t)first_head * splits * width;  // [heads][splits][width]
  for (int g = warp; g < heads; g += 4) {
    const float own = shares_of(stats + g * SETS * 2, SETS, 2, -INFINITY, shares + g * 32);
    float top = lane < SETS ? stats[(g * SETS + lane) * 2] : -INFINITY;
#pragma unroll
    for (int at = 16; at; at >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, at));
    if (lane == 0) *(float2*)(parts + ((size_t)g * splits + blockIdx.y) * width + p.dv) = make_float2(top, own);
  }
  __syncthreads();
  const int runs = p.dv / 4;  // of four dimensions
  for (int i = threadIdx.x; i < heads * runs; i += blockDim.x) {
    const int g = i / runs, at = i % runs * 4;
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int s = 0; s < SETS; s++) {
      const float share = shares[g * 32 + s];
      const float4 v = *(const float4*)(sums + (s * GROUP + g) * p.dv + at);
      y.x += share * v.x; y.y += share * v.y; y.z += share * v.z; y.w += share * v.w;
    }
    *(float4*)(parts + ((size_t)g * splits + blockIdx.y) * width + at) = y;
  }
  __syncthreads();
  if (threadIdx.x == 0) *flag = count_arrival(p.done + blockIdx.x);
  __syncthreads();
  if (*flag != (u32)splits - 1) return;
  if (threadIdx.x == 0) p.done[blockIdx.x] = 0;
  constexpr int AHEAD = 16;  // parts whose sums travel together; the first of them while it is not known yet what they weigh
  float4 part[AHEAD];
  auto load = [&](int i, int from) {
    const float* at = parts + ((size_t)(i / runs) * splits + from) * width + i % runs * 4;
#pragma unroll
    for (int s = 0; s < AHEAD; s++)
      part[s] = from + s < splits && i < heads * runs ? __ldcg((const float4*)(at + (size_t)s * width)) : make_float4(0.f, 0.f, 0.f, 0.f);
  };
  load(threadIdx.x, 0);
  for (int i = threadIdx.x; i < heads * splits; i += blockDim.x)
    *(float2*)(stats + (i / splits * 32 + i % splits) * 2) = __ldcg((const float2*)(parts + (size_t)i * width + p.dv));
  __syncthreads();
  for (int g = warp; g < heads; g += 4) {
    const float sink = p.sinks ? T::wide(p.sinks[first_head + g]) * LOG2E : -INFINITY;
    const float own = shares_of(stats + g * 64, splits, 2, sink, shares + g * 32);
    if (lane == 0) whole[g] = own;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < heads * runs; i += blockDim.x) {
    const int g = i / runs, at = i % runs * 4;
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int from = 0; from < splits; from += AHEAD) {
      if (from || i != threadIdx.x) load(i, from);
#pragma unroll
      for (int s = 0; s < AHEAD; s++) {
        const float share = shares[g * 32 + from + s];
        y.x += share * part[s].x; y.y += share * part[s].y; y.z += share * part[s].z; y.w += share * part[s].w;
      }
    }
    const float scale = whole[g] > 0.f ? 1.f / whole[g] : 0.f;
    const uint2 out = {pair(T::narrow(y.x * scale), T::narrow(y.y * scale)), pair(T::narrow(y.z * scale), T::narrow(y.w * scale))};
    *(uint2*)(p.out + (size_t)(first_head + g) * p.dv + at) = out;
  }
}

// The same of a token of each of several conversations, each with its own count; a row of blocks for each. `new_key` is null.
template <class T, int LANES, int GROUP> DEVICE void decode_rows(const DecodeArguments& given) {
  DecodeArguments p = given;
  const int row = blockIdx.z;
  p.q += (size_t)row * p.q_row;
  p.keys += row * p.key_row;
  p.values += row * p.value_row;
  p.count += row;
  p.out += (size_t)row * p.heads * p.dv;
  p.partial += (size_t)row * p.heads * gridDim.y * (p.dv + 4);
  p.done += row * gridDim.x;
  if (p.mask_kind) p.mask = (const u8*)p.mask + row * p.mask_row;
  decode<T, LANES, GROUP>(p);
}
