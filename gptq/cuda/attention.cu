// Attention of one new token per row over keys and values kept in pages, with rotary embedding and the keeping of the new ones.
//
// A page holds 64 tokens of every layer: keys [kv heads][64][D], values [kv heads][D][64] (transposed, so that both
// products read runs of 8 numbers), fp16 or, with Q8, a byte each and a scale for each token and head after all values.
// The pages of a sequence are a list of addresses, so a sequence grows without being moved. Its tokens are split over
// blocks and warps (Flash-Decoding, Dao et al. 2023). The block that ends last adds the partial sums in a fixed order.

// -- pages -------------------------------------------------------------------------------------------------------------

// 8 numbers of a page as they are stored, and as four pairs of fp16.
template <bool Q8> struct Stored { typedef uint4 Run; };
template <> struct Stored<true> { typedef uint2 Run; };
DEVICE uint4 halves_of(const uint4& v) { return v; }
DEVICE uint4 halves_of(const uint2& v) {  // a byte is 128 more than its number
  const u32 h1152 = 0x64806480;
  return make_uint4(sub2(__byte_perm(v.x, 0x64646464, 0x4140), h1152), sub2(__byte_perm(v.x, 0x64646464, 0x4342), h1152),
                    sub2(__byte_perm(v.y, 0x64646464, 0x4140), h1152), sub2(__byte_perm(v.y, 0x64646464, 0x4342), h1152));
}

// Offsets in a layer's part of a page, in bytes.
template <int D, bool Q8> struct PageLayout {
  static_assert(D % 32 == 0, "a lane reads 8 dimensions of each 32");
  static_assert(D <= ATTENTION_WARPS * 32, "a thread of the block copies one dimension of the new value");
  static_assert(PAGE_TOKENS == 64, "a page is two strips of 32 tokens");
  static constexpr int SIZE = Q8 ? 1 : 2;
  static METHOD size_t key(int kv, int token) { return ((size_t)kv * PAGE_TOKENS + token) * D * SIZE; }
  static METHOD size_t value(int kv_heads, int kv, int d) { return (((size_t)kv_heads + kv) * D + d) * PAGE_TOKENS * SIZE; }
  static METHOD size_t scales(int kv_heads, int kv, bool of_values) {
    return (size_t)2 * kv_heads * PAGE_TOKENS * D + (kv * 2 + of_values) * PAGE_TOKENS * 2;
  }
};

// The scale of D numbers: the largest is 127 times it. A lane holds those at lane, lane + 32 …
template <int D> DEVICE float scale_of(const u16* from) {
  float most = 0.f;
  for (int d = threadIdx.x % 32; d < D; d += 32) most = fmaxf(most, fabsf(to_float(from[d])));
#pragma unroll
  for (int at = 16; at; at >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, at));
  return most / 127.f;
}
DEVICE u8 byte_of(float f, float scale) { return (u8)(scale > 0.f ? __float2int_rn(f / scale) + 128 : 128); }

// One token's key, or its value, into its page. One warp.
template <int D, bool Q8> DEVICE void store_in_page(const u16* from, u8* page, int kv_heads, int kv, int token, bool is_value) {
  typedef PageLayout<D, Q8> Layout;
  const int lane = threadIdx.x % 32;
  float scale = 0.f;
  if constexpr (Q8) {
    scale = to_float(to_half(scale_of<D>(from)));
    if (lane == 0) ((u16*)(page + Layout::scales(kv_heads, kv, is_value)))[token] = to_half(scale);
  }
  for (int d = lane; d < D; d += 32) {
    u8* to = is_value ? page + Layout::value(kv_heads, kv, d) : page + Layout::key(kv, token);
    const int at = is_value ? token : d;
    if constexpr (Q8) to[at] = byte_of(to_float(from[d]), scale);
    else ((u16*)to)[at] = from[d];
  }
}

// -- heads: norm and rotary embedding ----------------------------------------------------------------------------------

// The angles that a lane needs: of dimensions lane, lane + 32 … below the rotated half.
template <int D> struct Angles { float cosine[(D / 2 + 31) / 32], sine[(D / 2 + 31) / 32]; };
template <int D> DEVICE Angles<D> load_angles(const float* cosine, const float* sine, int half) {
  Angles<D> r;
#pragma unroll
  for (int i = 0; i < (D / 2 + 31) / 32; i++) {
    const int at = i * 32 + threadIdx.x % 32;
    if (at < half) { r.cosine[i] = cosine[at]; r.sine[i] = sine[at]; }
  }
  return r;
}

// A head's query or key as it comes from the product. A lane holds the pairs lane, lane + 32 …
template <int D> struct HeadPairs { u32 pair[(D + 63) / 64]; };
template <int D> DEVICE HeadPairs<D> load_head(const u16* from) {
  HeadPairs<D> r;
#pragma unroll
  for (int i = 0; i < (D + 63) / 64; i++) {
    const int at = i * 32 + threadIdx.x % 32;
    r.pair[i] = at < D / 2 ? __ldcg((const u32*)from + at) : 0;
  }
  return r;
}

// The same with norm (or null) and rotary embedding applied. One warp.
template <int D> DEVICE void norm_and_rotate(const HeadPairs<D>& from, const u16* norm, const Angles<D>& angles, int half, float eps, u16* to) {
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

// -- which part of the work a block has --------------------------------------------------------------------------------

// Tokens are taken in strips of 32. Blocks without keys have nothing to do.
struct Slice {
  int position, from;  // tokens before the new one; the first of them that the window shows
  int begin, end;      // strips of this block
  int active;          // blocks that have any
  bool newest;         // this block adds the new token
};
DEVICE Slice slice_of(const AttentionArguments& p, int row, int split) {
  Slice s;
  s.position = p.positions[row];
  s.from = p.window > 0 ? max(0, s.position + 1 - p.window) : 0;
  const int first_strip = s.from / 32, strips = (s.position + 31) / 32 - first_strip;
  const int per_block = max((strips + (int)gridDim.x - 1) / (int)gridDim.x, ATTENTION_WARPS);
  s.active = max(1, (strips + per_block - 1) / per_block);
  s.begin = first_strip + split * per_block;
  s.end = min(s.begin + per_block, first_strip + strips);
  s.newest = split == s.active - 1;
  return s;
}

// -- the keys and values of one strip ----------------------------------------------------------------------------------

template <int D, bool Q8> struct Strip {
  typedef typename Stored<Q8>::Run Run;
  Run k[4][D / 32], v[D / 8];
  uint4 key_scales, value_scales;  // of 8 tokens

  // From a page's keys and values of one head in shared memory; `half`: its first or second 32 tokens.
  METHOD void load(const u8* keys, const u8* values, int half, int r, int c) {
    typedef PageLayout<D, Q8> Layout;
    keys += Layout::key(0, half * 32 + r / 2 * 8 + r % 2) + c * 8 * Layout::SIZE;
    values += (r * PAGE_TOKENS + half * 32 + c * 8) * Layout::SIZE;
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
      for (int i = 0; i < D / 32; i++) k[t][i] = *(const Run*)(keys + (t * 2 * D + i * 32) * Layout::SIZE);
#pragma unroll
    for (int t = 0; t < D / 8; t++) v[t] = *(const Run*)(values + t * 8 * PAGE_TOKENS * Layout::SIZE);
  }

  METHOD void load(const AttentionArguments& p, const u64* pages, int kv, int strip, int r, int c) {
    typedef PageLayout<D, Q8> Layout;
    const u8* page = (const u8*)(pages[strip / 2] + p.layer_bytes);
    const u8* keys = page + Layout::key(kv, strip % 2 * 32 + r / 2 * 8 + r % 2) + c * 8 * Layout::SIZE;  // of tile t: 2 t tokens on
    const u8* values = page + Layout::value(p.kv_heads, kv, r) + (strip % 2 * 32 + c * 8) * Layout::SIZE;
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
      for (int i = 0; i < D / 32; i++) k[t][i] = *(const Run*)(keys + (t * 2 * D + i * 32) * Layout::SIZE);
#pragma unroll
    for (int t = 0; t < D / 8; t++) v[t] = *(const Run*)(values + t * 8 * PAGE_TOKENS * Layout::SIZE);
    if constexpr (Q8) {
      const int token = strip % 2 * 32 + c * 8;
      key_scales = *(const uint4*)(page + Layout::scales(p.kv_heads, kv, false) + token * 2);
      value_scales = *(const uint4*)(page + Layout::scales(p.kv_heads, kv, true) + token * 2);
    }
  }
};

// Softmax and sums of a warp so far, relative to the highest score (online softmax).
template <int D> struct Running { float out[D / 8][2], top, sum; };
template <int D> DEVICE void begin_sums(Running<D>& running) {
  running.top = -1e30f; running.sum = 0.f;
#pragma unroll
  for (int t = 0; t < D / 8; t++) running.out[t][0] = running.out[t][1] = 0.f;
}

// Scores of a strip's tokens: query times key, tokens that the position does not see at -1e30.
template <int D, bool Q8> DEVICE void score_strip(const AttentionArguments& p, const Strip<D, Q8>& strip, const u32 (&queries)[D / 16][2],
                                                  const Slice& slice, int first_token, float (&score)[4][2]) {
#pragma unroll
  for (int t = 0; t < 4; t++) {
    float s[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
      const u32 a[4] = {queries[2 * i][0], 0, queries[2 * i][1], 0}, b[4] = {queries[2 * i + 1][0], 0, queries[2 * i + 1][1], 0};
      const uint4 key = halves_of(strip.k[t][i]);
      mma(s, a, key.x, key.y);
      mma(s, b, key.z, key.w);
    }
    if constexpr (Q8) {
      s[0] *= low_of((&strip.key_scales.x)[t]);
      s[1] *= high_of((&strip.key_scales.x)[t]);
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int token = first_token + t * 2 + e;
      score[t][e] = token < slice.position && token >= slice.from ? s[e] * p.scale : -1e30f;
    }
  }
}

// Fold a strip's scores and values into the running sums.
template <int D, bool Q8> DEVICE void add_strip(const Strip<D, Q8>& strip, const float (&score)[4][2], Running<D>& running) {
  float higher = running.top;
#pragma unroll
  for (int t = 0; t < 4; t++) higher = fmaxf(higher, fmaxf(score[t][0], score[t][1]));
  higher = fmaxf(higher, __shfl_xor_sync(FULL, higher, 1));
  higher = fmaxf(higher, __shfl_xor_sync(FULL, higher, 2));
  const float shrink = exp2f(running.top - higher);
  running.top = higher;
  running.sum *= shrink;
  u32 weights[4];
#pragma unroll
  for (int t = 0; t < 4; t++) {
    const float a = score[t][0] > -1e29f ? exp2f(score[t][0] - running.top) : 0.f, b = score[t][1] > -1e29f ? exp2f(score[t][1] - running.top) : 0.f;
    running.sum += a + b;
    if constexpr (Q8) weights[t] = to_half2(a * low_of((&strip.value_scales.x)[t]), b * high_of((&strip.value_scales.x)[t]));
    else weights[t] = to_half2(a, b);
  }
  const u32 low[4] = {weights[0], 0, weights[1], 0}, high[4] = {weights[2], 0, weights[3], 0};
#pragma unroll
  for (int t = 0; t < D / 8; t++) {  // past the end are finite numbers, because pages are zero at first
    float acc[4] = {running.out[t][0] * shrink, running.out[t][1] * shrink, 0.f, 0.f};
    const uint4 value = halves_of(strip.v[t]);
    mma(acc, low, value.x, value.y);
    mma(acc, high, value.z, value.w);
    running.out[t][0] = acc[0]; running.out[t][1] = acc[1];
  }
}

// -- what the warps of a block share -----------------------------------------------------------------------------------

template <int D> struct AttentionShared {
  __align__(16) u16 q[ATTENTION_HEADS][D];
  __align__(16) u16 new_key[D], new_value[D];
  float maxima[ATTENTION_WARPS + 1][ATTENTION_HEADS], sums[ATTENTION_WARPS + 1][ATTENTION_HEADS];  // of each warp, and of the new token
  __align__(16) float outs[ATTENTION_WARPS][ATTENTION_HEADS][D];
  u32 arrived;
};

// What a lane multiplies, of head r.
template <int D> DEVICE void load_queries(const AttentionShared<D>& shared, int r, int c, u32 (&queries)[D / 16][2]) {
#pragma unroll
  for (int i = 0; i < D / 32; i++) {
    const uint4 w = *(const uint4*)&shared.q[r][i * 32 + c * 8];
    queries[2 * i][0] = w.x; queries[2 * i][1] = w.y;
    queries[2 * i + 1][0] = w.z; queries[2 * i + 1][1] = w.w;
  }
}

// What a warp has found of its strips, for the block to add.
template <int D> DEVICE void leave_sums(AttentionShared<D>& shared, Running<D>& running, int warp, int r, int c) {
  running.sum += __shfl_xor_sync(FULL, running.sum, 1);
  running.sum += __shfl_xor_sync(FULL, running.sum, 2);
  if (c == 0) { shared.maxima[warp][r] = running.top; shared.sums[warp][r] = running.sum; }
#pragma unroll
  for (int t = 0; t < D / 8; t++) *(float2*)&shared.outs[warp][r][t * 8 + c * 2] = make_float2(running.out[t][0], running.out[t][1]);
}

// The new token's queries, and its key and value in the block that adds it. All are on their way before the first is used.
template <int D> DEVICE void stage_new_token(const AttentionArguments& p, AttentionShared<D>& shared, const u16* qkv, const Angles<D>& angles,
                                             int kv, int head0, int count, bool newest) {
  constexpr int WARPS = ATTENTION_WARPS;
  static_assert(ATTENTION_HEADS == 2 * WARPS, "a warp stages two queries");
  const int warp = threadIdx.x / 32;
  HeadPairs<D> queries[2], key;
#pragma unroll
  for (int i = 0; i < 2; i++)
    if (warp + i * WARPS < count) queries[i] = load_head<D>(qkv + (head0 + warp + i * WARPS) * D);
  if (newest) {
    if (warp == WARPS - 1) key = load_head<D>(qkv + (p.heads + kv) * D);
    if (threadIdx.x < D) shared.new_value[threadIdx.x] = __ldcg(qkv + (p.heads + p.kv_heads + kv) * D + threadIdx.x);
  }
#pragma unroll 1
  for (int i = 0; i < 3; i++) {
    const bool is_key = i == 2;
    if (is_key ? newest && warp == WARPS - 1 : warp + i * WARPS < count) {
      HeadPairs<D> from;
#pragma unroll
      for (int j = 0; j < (D + 63) / 64; j++) from.pair[j] = is_key ? key.pair[j] : i ? queries[1].pair[j] : queries[0].pair[j];
      norm_and_rotate<D>(from, is_key ? p.k_norm : p.q_norm, angles, p.rotary_half, p.eps, is_key ? shared.new_key : shared.q[warp + i * WARPS & 7]);
    }
  }
}

// The new token's scores, a warp for a head; its value counts as it is.
template <int D> DEVICE void score_new_token(const AttentionArguments& p, AttentionShared<D>& shared, int count, bool newest) {
  constexpr int WARPS = ATTENTION_WARPS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (newest) {
    for (int head = warp; head < count; head += WARPS) {
      float s = 0.f;
#pragma unroll
      for (int i = 0; i < D / 32; i++) s += to_float(shared.q[head][i * 32 + lane]) * to_float(shared.new_key[i * 32 + lane]);
      s = warp_sum(s) * p.scale;
      if (lane == 0) { shared.maxima[WARPS][head] = s; shared.sums[WARPS][head] = 1.f; }
    }
  } else if (threadIdx.x < ATTENTION_HEADS) {
    shared.maxima[WARPS][threadIdx.x] = -1e30f;
    shared.sums[WARPS][threadIdx.x] = 0.f;
  }
}

// -- adding the parts: of the warps, then of the blocks, relative to the highest score of each head --------------------
// Four dimensions a thread. A block's part of a head is D sums, the highest score and the sum of weights.

DEVICE float4 scaled(const float4& v, float f) { return make_float4(v.x * f, v.y * f, v.z * f, v.w * f); }
DEVICE void add_scaled(float4& to, const float4& v, float f) { to.x += v.x * f; to.y += v.y * f; to.z += v.z * f; to.w += v.w * f; }
DEVICE void store_output(u16* to, const int4& place, const float4& y) {
  to[place.x] = to_half(y.x); to[place.y] = to_half(y.y); to[place.z] = to_half(y.z); to[place.w] = to_half(y.w);
}

// The warps' parts: into the output if this block is the only one, else into `here`.
template <int D> DEVICE void add_warps(const AttentionShared<D>& shared, const int* permutation, u16* to, float* here, int count, bool newest, bool only, int threads) {
  constexpr int WARPS = ATTENTION_WARPS, PART = D + 4;
#pragma unroll 1
  for (int at = threadIdx.x * 4; at < count * D; at += threads * 4) {
    const int head = at / D, d = at % D;
    const int4 place = *(const int4*)(permutation + at);
    float highest = shared.maxima[WARPS][head];
#pragma unroll
    for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, shared.maxima[w][head]);
    const float newer = exp2f(shared.maxima[WARPS][head] - highest);
    float total = shared.sums[WARPS][head] * newer;
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
    if (newest) {
      const uint2 value = *(const uint2*)(shared.new_value + d);
      y = scaled(make_float4(low_of(value.x), high_of(value.x), low_of(value.y), high_of(value.y)), newer);
    }
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float f = exp2f(shared.maxima[w][head] - highest);
      total += shared.sums[w][head] * f;
      add_scaled(y, *(const float4*)&shared.outs[w][head][d], f);
    }
    if (only) store_output(to, place, scaled(y, 1.f / total));
    else {
      *(float4*)(here + head * PART + d) = y;
      if (d == 0) *(float2*)(here + head * PART + D) = make_float2(highest, total);
    }
  }
}

// The blocks' parts, by the block that arrived last; eight blocks' parts are on their way together.
template <int D> DEVICE void add_blocks(const float* partial, const int* permutation, u16* to, int count, int active, int threads) {
  constexpr int PART = D + 4;
#pragma unroll 1
  for (int at = threadIdx.x * 4; at < count * D; at += threads * 4) {
    const int head = at / D, d = at % D;
    const int4 place = *(const int4*)(permutation + at);
    float highest = -1e30f, total = 0.f;
    float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
    for (int first = 0; first < active; first += 8) {
      float4 part[8];
      float2 weight[8];  // the highest score, the sum of weights
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float* theirs = partial + ((first + i) * ATTENTION_HEADS + head) * PART;
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
    store_output(to, place, scaled(y, 1.f / total));
  }
}

// -- the kernel: grid (splits, head blocks, rows) ----------------------------------------------------------------------

template <int D, bool Q8> DEVICE void attention(const AttentionArguments& p) {
  constexpr int WARPS = ATTENTION_WARPS;
  __shared__ AttentionShared<D> shared;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  const int split = blockIdx.x, block = blockIdx.y, row = blockIdx.z;
  const int kv = block / p.group_blocks, group = p.heads / p.kv_heads;
  const int head0 = kv * group + block % p.group_blocks * ATTENTION_HEADS, count = min(ATTENTION_HEADS, kv * group + group - head0);
  allow_next_kernel_to_start();

  // The position, and what earlier tokens left in the pages, was written long before the previous kernel began.
  const Slice slice = slice_of(p, row, split);
  if (split >= slice.active || slice.position < 0) return;  // idle; the other blocks wait, which is enough for the next kernels
  const u64* pages = p.pages + (size_t)row * p.max_pages;
  const u16* qkv = p.qkv + (size_t)row * (p.heads + 2 * p.kv_heads) * D;
  const size_t angle = (size_t)slice.position * p.rotary_half;
  const Angles<D> angles = load_angles<D>(p.cosines + angle, p.sines + angle, p.rotary_half);
  const int* permutation = p.permutation + head0 * D;
  if (threadIdx.x * 32 < count * D) prefetch_to_l2(permutation + threadIdx.x * 32);

  u32 queries[D / 16][2];  // of heads r; rows 8 to 15 of the matrix are zero
  Running<D> running;
  begin_sums(running);

#pragma unroll 1
  for (int at = slice.begin + warp, first = 1; first || at < slice.end; at += WARPS, first = 0) {
    Strip<D, Q8> strip;
    if (at < slice.end) strip.load(p, pages, kv, at, r, c);  // the first ones while the previous kernel ends
    if (first) {
      for (int i = count * D + threadIdx.x; i < ATTENTION_HEADS * D; i += blockDim.x) shared.q[0][i] = 0;
      wait_for_previous_kernel();
      stage_new_token<D>(p, shared, qkv, angles, kv, head0, count, slice.newest);
      __syncthreads();
      load_queries(shared, r, c, queries);
      if (at >= slice.end) break;
    }
    float score[4][2];
    score_strip<D, Q8>(p, strip, queries, slice, at * 32 + c * 8, score);
    add_strip<D, Q8>(strip, score, running);
  }
  leave_sums(shared, running, warp, r, c);
  score_new_token<D>(p, shared, count, slice.newest);
  __syncthreads();

  float* partial = p.partial + ((size_t)(row * gridDim.y + block) * gridDim.x) * ATTENTION_HEADS * (D + 4);
  u16* to = p.out + (size_t)row * p.padded;
  add_warps<D>(shared, permutation, to, partial + (size_t)split * ATTENTION_HEADS * (D + 4), count, slice.newest, slice.active == 1, blockDim.x);
  auto keep_new_token = [&]() {  // every head block of these keys writes the same
    if (!slice.newest || warp >= 2) return;
    u8* page = (u8*)(pages[slice.position / PAGE_TOKENS] + p.layer_bytes);
    store_in_page<D, Q8>(warp ? shared.new_value : shared.new_key, page, p.kv_heads, kv, slice.position % PAGE_TOKENS, warp);
  };
  if (slice.active == 1) { keep_new_token(); return; }
  __syncthreads();
  if (threadIdx.x == 0) shared.arrived = count_arrival(p.done + row * gridDim.y + block);
  keep_new_token();
  __syncthreads();
  if (shared.arrived != slice.active - 1) return;
  add_blocks<D>(partial, permutation, to, count, slice.active, blockDim.x);
  if (threadIdx.x == 0) p.done[row * gridDim.y + block] = 0;
}
