// Attention of one new token per row over keys and values kept in pages, with rotary and the writing of the new ones.
//
// A page holds 64 tokens of every layer: keys [kv heads][64][D], values [kv heads][D][64] (turned, so that both
// products read runs of 8 numbers), fp16 or, with Q8, a byte each and a scale for each token and head behind all values.
// A row's pages are a list of addresses: growing a conversation moves nothing. The
// tokens are split over blocks and warps (Flash-Decoding, Dao et al. 2023); partial sums are added in a fixed order
// by the block that ends last.

#define PAGE 64
#define MOST_SPLITS 32
#define ATTENTION_WARPS 4

struct AttentionArguments {
  const u16* qkv;          // fp16 [rows][(heads + 2 kv_heads) * D]
  const u64* pages;        // [rows][max_pages]: addresses
  const int* positions;    // [rows]: of the new token
  const float *cosines, *sines;  // fp32 [context][rotary / 2]
  const u16 *q_norm, *k_norm;    // fp16 [D] or null
  u16* out;                // fp16 [rows][padded], engine order of the output layer
  const int* permutation;       // [heads * D]
  float* partial;          // fp32 [rows][blocks of heads][splits][8][D + 4]: sums, the highest score, the sum of weights
  u32* done;               // [rows][blocks of heads], zero between launches
  u64 layer_bytes;         // from a page's start to this layer's keys
  int heads, kv_heads, max_pages, padded, window, rotary_half;
  int head_blocks;         // blocks of up to 8 heads that share keys, per kv head
  float eps, scale;        // scale: log2(e) / sqrt(D)
};

// 8 numbers of a page as they are stored, and as four pairs of fp16.
template <bool Q8> struct Stored { typedef uint4 Run; };
template <> struct Stored<true> { typedef uint2 Run; };
DEVICE uint4 halves_of(const uint4& v) { return v; }
DEVICE uint4 halves_of(const uint2& v) {  // a byte is 128 more than its number
  const u32 h1152 = 0x64806480;
  return make_uint4(sub2(__byte_perm(v.x, 0x64646464, 0x4140), h1152), sub2(__byte_perm(v.x, 0x64646464, 0x4342), h1152),
                    sub2(__byte_perm(v.y, 0x64646464, 0x4140), h1152), sub2(__byte_perm(v.y, 0x64646464, 0x4342), h1152));
}

// Where things stand in a layer's part of a page, in bytes.
template <int D, bool Q8> struct Place {
  static constexpr int SIZE = Q8 ? 1 : 2;
  static __device__ __forceinline__ size_t key(int kv, int token) { return ((size_t)kv * PAGE + token) * D * SIZE; }
  static __device__ __forceinline__ size_t value(int kv_heads, int kv, int d) { return (((size_t)kv_heads + kv) * D + d) * PAGE * SIZE; }
  static __device__ __forceinline__ size_t scales(int kv_heads, int kv, bool of_values) {
    return (size_t)2 * kv_heads * PAGE * D + (kv * 2 + of_values) * PAGE * 2;
  }
};

// The scale of D numbers, of which a lane holds those at lane, lane + 32 …: their largest is 127 of it.
template <int D> DEVICE float scale_of(const u16* from) {
  float most = 0.f;
  for (int d = threadIdx.x % 32; d < D; d += 32) most = fmaxf(most, fabsf(to_float(from[d])));
#pragma unroll
  for (int at = 16; at; at >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, at));
  return most / 127.f;
}
DEVICE u8 byte_of(float f, float scale) { return (u8)(scale > 0.f ? __float2int_rn(f / scale) + 128 : 128); }

// One token's key, or its value, into its page. One warp.
template <int D, bool Q8> DEVICE void keep(const u16* from, u8* page, int kv_heads, int kv, int token, bool is_value) {
  const int lane = threadIdx.x % 32;
  float scale = 0.f;
  if constexpr (Q8) {
    scale = to_float(to_half(scale_of<D>(from)));
    if (lane == 0) ((u16*)(page + Place<D, Q8>::scales(kv_heads, kv, is_value)))[token] = to_half(scale);
  }
  for (int d = lane; d < D; d += 32) {
    u8* to = is_value ? page + Place<D, Q8>::value(kv_heads, kv, d) : page + Place<D, Q8>::key(kv, token);
    const int at = is_value ? token : d;
    if constexpr (Q8) to[at] = byte_of(to_float(from[d]), scale);
    else ((u16*)to)[at] = from[d];
  }
}

// The angles that a lane needs: of dimensions lane, lane + 32 … below the turned half.
template <int D> struct Angles { float cosine[(D / 2 + 31) / 32], sine[(D / 2 + 31) / 32]; };
template <int D> DEVICE Angles<D> angles_of(const float* cosine, const float* sine, int half) {
  Angles<D> r;
#pragma unroll
  for (int i = 0; i < (D / 2 + 31) / 32; i++) {
    const int at = i * 32 + threadIdx.x % 32;
    if (at < half) { r.cosine[i] = cosine[at]; r.sine[i] = sine[at]; }
  }
  return r;
}

// A head's new query or key as it comes from the product; a lane holds the pairs lane, lane + 32 …
template <int D> struct Fresh { u32 pair[(D + 63) / 64]; };
template <int D> DEVICE Fresh<D> fresh(const u16* from) {
  Fresh<D> r;
#pragma unroll
  for (int i = 0; i < (D + 63) / 64; i++) {
    const int at = i * 32 + threadIdx.x % 32;
    r.pair[i] = at < D / 2 ? __ldcg((const u32*)from + at) : 0;
  }
  return r;
}

// The same, normed and turned. One warp.
template <int D> DEVICE void turn(const Fresh<D>& from, const u16* norm, const Angles<D>& angles, int half, float eps, u16* to) {
  const int lane = threadIdx.x % 32;
  float scale = 0.f;
  if (norm) {
#pragma unroll
    for (int i = 0; i < (D + 63) / 64; i++) {
      const float a = low_of(from.pair[i]), b = high_of(from.pair[i]);
      scale += a * a + b * b;
    }
    scale = rsqrtf(warp_sum(scale) / D + eps);
  }
#pragma unroll
  for (int i = 0; i < (D + 63) / 64; i++) {
    const int at = i * 32 + lane;
    u32 both = from.pair[i];
    if (at >= D / 2) continue;
    if (norm) {
      const u32 weight = ((const u32*)norm)[at];
      both = to_half2(low_of(both) * scale * low_of(weight), high_of(both) * scale * high_of(weight));
    }
    ((u32*)to)[at] = both;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < (D / 2 + 31) / 32; i++) {
    const int at = i * 32 + lane;
    if (at < half) {
      const float a = to_float(to[at]), b = to_float(to[at + half]);
      to[at] = to_half(a * angles.cosine[i] - b * angles.sine[i]);
      to[at + half] = to_half(b * angles.cosine[i] + a * angles.sine[i]);
    }
  }
  __syncwarp();
}

DEVICE float4 scaled(const float4& v, float f) { return make_float4(v.x * f, v.y * f, v.z * f, v.w * f); }
DEVICE void add_scaled(float4& to, const float4& v, float f) { to.x += v.x * f; to.y += v.y * f; to.z += v.z * f; to.w += v.w * f; }

template <int D, bool Q8> DEVICE void attention(const AttentionArguments& p) {
  constexpr int WARPS = ATTENTION_WARPS, STEPS = D / 16, PARTS = D / 32, TILES = D / 8;
  static_assert(D % 32 == 0, "a lane reads 8 dimensions of each 32");
  __shared__ __align__(16) u16 q[8][D];
  __shared__ __align__(16) u16 new_key[D], new_value[D];
  __shared__ float maxima[WARPS + 1][8], sums[WARPS + 1][8];  // of each warp, and of the new token
  __shared__ __align__(16) float outs[WARPS][8][D];
  __shared__ u32 arrived;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const int split = blockIdx.x, block = blockIdx.y, row = blockIdx.z;
  const int kv = block / p.head_blocks, group = p.heads / p.kv_heads;
  const int head0 = kv * group + block % p.head_blocks * 8, count = min(8, kv * group + group - head0);
  let_the_next_kernel_start();

  // Where the new token stands, and what earlier ones left, was written long before the kernel ahead began.
  const int position = p.positions[row];  // tokens before the new one
  const int from = p.window > 0 ? max(0, position + 1 - p.window) : 0;
  const int first_strip = from / 32, strips = (position + 31) / 32 - first_strip;
  const int per_block = max((strips + (int)gridDim.x - 1) / (int)gridDim.x, WARPS);
  const int active = max(1, (strips + per_block - 1) / per_block);
  if (split >= active) return;  // the others wait, which is enough for the kernels behind
  const int begin = first_strip + split * per_block, end = min(begin + per_block, first_strip + strips);
  const bool newest = split == active - 1;  // this block adds the new token
  const u64* pages = p.pages + (size_t)row * p.max_pages;
  const u16* qkv = p.qkv + (size_t)row * (p.heads + 2 * p.kv_heads) * D;
  const Angles<D> angles = angles_of<D>(p.cosines + (size_t)position * p.rotary_half, p.sines + (size_t)position * p.rotary_half, p.rotary_half);
  const int* permutation = p.permutation + head0 * D;
  if (threadIdx.x * 32 < count * D) ask_for(permutation + threadIdx.x * 32);
  typedef Place<D, Q8> At;
  typedef typename Stored<Q8>::Run Run;

  u32 queries[STEPS][2];  // of heads r; rows 8 to 15 of the matrix are zero
  float out[TILES][2], top = -1e30f, sum = 0.f;
#pragma unroll
  for (int t = 0; t < TILES; t++) out[t][0] = out[t][1] = 0.f;

#pragma unroll 1
  for (int strip = begin + warp, first = 1; first || strip < end; strip += WARPS, first = 0) {
    Run k[4][PARTS], v[TILES];
    uint4 key_scales, value_scales;  // of 8 tokens
    if (strip < end) {  // the first ones are asked for while the kernel ahead ends
      const u8* page = (const u8*)(pages[strip / 2] + p.layer_bytes);
      const u8* keys = page + At::key(kv, strip % 2 * 32 + r / 2 * 8 + r % 2) + c * 8 * At::SIZE;  // of tile t: 2 t tokens further
      const u8* values = page + At::value(p.kv_heads, kv, r) + (strip % 2 * 32 + c * 8) * At::SIZE;
#pragma unroll
      for (int t = 0; t < 4; t++)
#pragma unroll
        for (int i = 0; i < PARTS; i++) k[t][i] = *(const Run*)(keys + (t * 2 * D + i * 32) * At::SIZE);
#pragma unroll
      for (int t = 0; t < TILES; t++) v[t] = *(const Run*)(values + t * 8 * PAGE * At::SIZE);
      if constexpr (Q8) {
        const int token = strip % 2 * 32 + c * 8;
        key_scales = *(const uint4*)(page + At::scales(p.kv_heads, kv, false) + token * 2);
        value_scales = *(const uint4*)(page + At::scales(p.kv_heads, kv, true) + token * 2);
      }
    }
    if (first) {
      for (int at = count * D + threadIdx.x; at < 8 * D; at += blockDim.x) q[0][at] = 0;
      wait_for_the_kernel_ahead();
      // all of them are on their way before the first is used
      Fresh<D> ours[2], key;
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (warp + i * WARPS < count) ours[i] = fresh<D>(qkv + (head0 + warp + i * WARPS) * D);
      if (newest) {
        if (warp == WARPS - 1) key = fresh<D>(qkv + (p.heads + kv) * D);
        if (threadIdx.x < D) new_value[threadIdx.x] = __ldcg(qkv + (p.heads + p.kv_heads + kv) * D + threadIdx.x);
      }
#pragma unroll 1
      for (int i = 0; i < 3; i++) {
        const bool is_key = i == 2;
        if (is_key ? newest && warp == WARPS - 1 : warp + i * WARPS < count) {
          Fresh<D> from;
#pragma unroll
          for (int j = 0; j < (D + 63) / 64; j++) from.pair[j] = is_key ? key.pair[j] : i ? ours[1].pair[j] : ours[0].pair[j];
          turn<D>(from, is_key ? p.k_norm : p.q_norm, angles, p.rotary_half, p.eps, is_key ? new_key : q[warp + i * WARPS & 7]);
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < PARTS; i++) {
        const uint4 w = *(const uint4*)&q[r][i * 32 + c * 8];
        queries[2 * i][0] = w.x; queries[2 * i][1] = w.y;
        queries[2 * i + 1][0] = w.z; queries[2 * i + 1][1] = w.w;
      }
      if (strip >= end) break;
    }
    float score[4][2];
#pragma unroll
    for (int t = 0; t < 4; t++) {
      float s[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int i = 0; i < PARTS; i++) {
        const u32 a[4] = {queries[2 * i][0], 0, queries[2 * i][1], 0}, b[4] = {queries[2 * i + 1][0], 0, queries[2 * i + 1][1], 0};
        const uint4 key = halves_of(k[t][i]);
        mma(s, a, key.x, key.y);
        mma(s, b, key.z, key.w);
      }
      if constexpr (Q8) {
        s[0] *= low_of((&key_scales.x)[t]);
        s[1] *= high_of((&key_scales.x)[t]);
      }
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int token = strip * 32 + c * 8 + t * 2 + e;
        score[t][e] = token < position && token >= from ? s[e] * p.scale : -1e30f;
      }
    }
    float higher = top;
#pragma unroll
    for (int t = 0; t < 4; t++) higher = fmaxf(higher, fmaxf(score[t][0], score[t][1]));
    higher = fmaxf(higher, __shfl_xor_sync(FULL, higher, 1));
    higher = fmaxf(higher, __shfl_xor_sync(FULL, higher, 2));
    const float shrink = exp2f(top - higher);
    top = higher;
    sum *= shrink;
    u32 weights[4];
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const float a = score[t][0] > -1e29f ? exp2f(score[t][0] - top) : 0.f, b = score[t][1] > -1e29f ? exp2f(score[t][1] - top) : 0.f;
      sum += a + b;
      if constexpr (Q8) weights[t] = to_half2(a * low_of((&value_scales.x)[t]), b * high_of((&value_scales.x)[t]));
      else weights[t] = to_half2(a, b);
    }
    const u32 low[4] = {weights[0], 0, weights[1], 0}, high[4] = {weights[2], 0, weights[3], 0};
#pragma unroll
    for (int t = 0; t < TILES; t++) {  // past the end stand finite numbers: pages are zero at first
      float acc[4] = {out[t][0] * shrink, out[t][1] * shrink, 0.f, 0.f};
      const uint4 value = halves_of(v[t]);
      mma(acc, low, value.x, value.y);
      mma(acc, high, value.z, value.w);
      out[t][0] = acc[0]; out[t][1] = acc[1];
    }
  }
  sum += __shfl_xor_sync(FULL, sum, 1);
  sum += __shfl_xor_sync(FULL, sum, 2);
  if (c == 0) { maxima[warp][r] = top; sums[warp][r] = sum; }
#pragma unroll
  for (int t = 0; t < TILES; t++) *(float2*)&outs[warp][r][t * 8 + c * 2] = make_float2(out[t][0], out[t][1]);

  // The new token: its score by a warp a head, its value as it is; both are kept in the page (every head block of
  // these keys writes the same).
  if (newest) {
    for (int head = warp; head < count; head += WARPS) {
      float s = 0.f;
#pragma unroll
      for (int i = 0; i < PARTS; i++) s += to_float(q[head][i * 32 + lane]) * to_float(new_key[i * 32 + lane]);
      s = warp_sum(s) * p.scale;
      if (lane == 0) { maxima[WARPS][head] = s; sums[WARPS][head] = 1.f; }
    }
  } else if (threadIdx.x < 8) {
    maxima[WARPS][threadIdx.x] = -1e30f;
    sums[WARPS][threadIdx.x] = 0.f;
  }
  __syncthreads();

  // The warps' parts, then the blocks': relative to the highest score of each head. Four dimensions a thread.
  constexpr int PART = D + 4;
  float* partial = p.partial + ((size_t)(row * gridDim.y + block) * gridDim.x) * 8 * PART;
  float* here = partial + (size_t)split * 8 * PART;
  u16* to = p.out + (size_t)row * p.padded;
#pragma unroll 1
  for (int at = threadIdx.x * 4; at < count * D; at += blockDim.x * 4) {
    const int head = at / D, d = at % D;
    const int4 place = *(const int4*)(permutation + at);
    float highest = maxima[WARPS][head];
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, maxima[w][head]);
    const float newer = exp2f(maxima[WARPS][head] - highest);
    float total = sums[WARPS][head] * newer;
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
    if (newest) {
      const uint2 value = *(const uint2*)(new_value + d);
      y = scaled(make_float4(low_of(value.x), high_of(value.x), low_of(value.y), high_of(value.y)), newer);
    }
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float f = exp2f(maxima[w][head] - highest);
      total += sums[w][head] * f;
      add_scaled(y, *(const float4*)&outs[w][head][d], f);
    }
    if (active == 1) {
      y = scaled(y, 1.f / total);
      to[place.x] = to_half(y.x); to[place.y] = to_half(y.y); to[place.z] = to_half(y.z); to[place.w] = to_half(y.w);
    } else {
      *(float4*)(here + head * PART + d) = y;
      if (d == 0) *(float2*)(here + head * PART + D) = make_float2(highest, total);
    }
  }
  auto keep_the_new_token = [&]() {
    if (!newest || warp >= 2) return;
    u8* page = (u8*)(pages[position / PAGE] + p.layer_bytes);
    keep<D, Q8>(warp ? new_value : new_key, page, p.kv_heads, kv, position % PAGE, warp);
  };
  if (active == 1) { keep_the_new_token(); return; }
  __syncthreads();
  if (threadIdx.x == 0) arrived = add_in_order(p.done + row * gridDim.y + block);
  keep_the_new_token();
  __syncthreads();
  if (arrived != active - 1) return;
#pragma unroll 1
  for (int at = threadIdx.x * 4; at < count * D; at += blockDim.x * 4) {
    const int head = at / D, d = at % D;
    const int4 place = *(const int4*)(permutation + at);
    float highest = -1e30f, total = 0.f;
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int first = 0; first < active; first += 8) {  // eight blocks' at a time, on their way together
      float4 part[8];
      float2 weight[8];  // the highest score, the sum of weights
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float* theirs = partial + ((first + i) * 8 + head) * PART;
        part[i] = first + i < active ? __ldcg((const float4*)(theirs + d)) : make_float4(0.f, 0.f, 0.f, 0.f);
        weight[i] = first + i < active ? __ldcg((const float2*)(theirs + D)) : make_float2(-1e30f, 0.f);
      }
      float higher = highest;
#pragma unroll
      for (int i = 0; i < 8; i++) higher = fmaxf(higher, weight[i].x);
      const float shrink = exp2f(highest - higher);
      highest = higher;
      total *= shrink;
      y = scaled(y, shrink);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float f = exp2f(weight[i].x - highest);
        total += weight[i].y * f;
        add_scaled(y, part[i], f);
      }
    }
    y = scaled(y, 1.f / total);
    to[place.x] = to_half(y.x); to[place.y] = to_half(y.y); to[place.z] = to_half(y.z); to[place.w] = to_half(y.w);
  }
  if (threadIdx.x == 0) p.done[row * gridDim.y + block] = 0;
}

struct RopeArguments {
  u16* qkv;             // fp16 [tokens][(heads + 2 kv_heads) * D], queries and keys are turned in place
  const u64* pages;     // [max_pages] of this row
  const float *cosines, *sines;
  const u16 *q_norm, *k_norm;
  u64 layer_bytes;
  int heads, kv_heads, start, rotary_half;
  float eps;
};

// Many tokens of one row that begin at position `start`: a block a token.
template <int D, bool Q8> DEVICE void rope_rows(const RopeArguments& p) {
  __shared__ __align__(16) u16 turned[8][D];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, position = p.start + blockIdx.x;
  u16* qkv = p.qkv + (size_t)blockIdx.x * (p.heads + 2 * p.kv_heads) * D;
  u8* page = (u8*)(p.pages[position / PAGE] + p.layer_bytes);
  const float *cosine = p.cosines + (size_t)position * p.rotary_half, *sine = p.sines + (size_t)position * p.rotary_half;
  const Angles<D> angles = angles_of<D>(cosine, sine, p.rotary_half);
  for (int head = warp; head < p.heads + 2 * p.kv_heads; head += blockDim.x / 32) {
    u16* at = qkv + head * D;
    if (head < p.heads + p.kv_heads) {
      const bool key = head >= p.heads;
      turn<D>(fresh<D>(at), key ? p.k_norm : p.q_norm, angles, p.rotary_half, p.eps, turned[warp]);
      for (int d = lane; d < D; d += 32) at[d] = turned[warp][d];
      if (key) keep<D, Q8>(turned[warp], page, p.kv_heads, head - p.heads, position % PAGE, false);
      __syncwarp();
    } else {
      keep<D, Q8>(at, page, p.kv_heads, head - p.heads - p.kv_heads, position % PAGE, true);
    }
  }
}

struct GatherArguments {
  const u64* pages;
  u16 *keys, *values;  // fp16 [kv_heads][tokens][D]
  u64 layer_bytes;
  int kv_heads, tokens;
};

// A row's pages as two plain tensors, for the attention of a prompt's later chunks. A block a page and kv head.
template <int D, bool Q8> DEVICE void gather_pages(const GatherArguments& p) {
  typedef Place<D, Q8> At;
  __shared__ u16 turned[D][PAGE + 2];
  const int kv = blockIdx.y, first = blockIdx.x * PAGE, count = min(PAGE, p.tokens - first);
  const u8* page = (const u8*)(p.pages[blockIdx.x] + p.layer_bytes);
  const u8 *keys = page + At::key(kv, 0), *values = page + At::value(p.kv_heads, kv, 0);
  const u16* scales = (const u16*)(page + At::scales(p.kv_heads, kv, false));  // those of the values stand behind
  auto number = [&](const u8* from, int at, int token) {
    if constexpr (Q8) return to_half(((int)from[at] - 128) * to_float(scales[token]));
    else return ((const u16*)from)[at];
  };
  u16* to = p.keys + ((size_t)kv * p.tokens + first) * D;
  for (int at = threadIdx.x; at < count * D; at += blockDim.x) to[at] = number(keys, at, at / D);
  for (int at = threadIdx.x; at < PAGE * D; at += blockDim.x) turned[at / PAGE][at % PAGE] = number(values, at, PAGE + at % PAGE);
  __syncthreads();
  to = p.values + ((size_t)kv * p.tokens + first) * D;
  for (int at = threadIdx.x; at < count * D; at += blockDim.x) to[at] = turned[at % D][at / D];
}
