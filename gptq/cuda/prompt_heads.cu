// A prompt's queries, keys and values between their product and attention, and its pages as plain tensors.

// The values of one kv head in one page, where tokens are neighbours. A block reads them token by token, and writes eight tokens at
// a time where it has the whole page.
template <int D, bool Q8> DEVICE void keep_values(const RopeArguments& p, int at_page, int kv) {
  typedef PageLayout<D, Q8> Layout;
  __shared__ __align__(4) u16 values[PAGE_TOKENS][D + 2];
  __shared__ float scales[PAGE_TOKENS];
  const int warp = threadIdx.x / 32, width = (p.heads + 2 * p.kv_heads) * D;
  const int first = max(at_page * PAGE_TOKENS, p.start), end = min((at_page + 1) * PAGE_TOKENS, p.start + p.tokens), count = end - first;
  u8* page = (u8*)(p.pages[at_page] + p.layer_bytes);
  const u16* from = p.qkv + (size_t)(first - p.start) * width + (p.heads + p.kv_heads + kv) * D;
#pragma unroll 4
  for (int at = threadIdx.x; at < count * (D / 2); at += blockDim.x)
    *(u32*)&values[at / (D / 2)][at % (D / 2) * 2] = *(const u32*)(from + (size_t)(at / (D / 2)) * width + at % (D / 2) * 2);
  __syncthreads();
  if constexpr (Q8) {
    for (int token = warp; token < count; token += ROPE_WARPS) {
      const u16 scale = to_half(scale_of<D>(values[token]));
      if (threadIdx.x % 32 == 0) ((u16*)(page + Layout::scales(p.kv_heads, kv, true)))[first % PAGE_TOKENS + token] = scale;
      scales[token] = to_float(scale);
    }
    __syncthreads();
  }
  if (!Q8 && count == PAGE_TOKENS) {
    for (int at = threadIdx.x; at < PAGE_TOKENS / 8 * D; at += blockDim.x) {
      const int token = at % (PAGE_TOKENS / 8) * 8, d = at / (PAGE_TOKENS / 8);
      u32 run[4];
#pragma unroll
      for (int i = 0; i < 4; i++) run[i] = pair(values[token + 2 * i][d], values[token + 2 * i + 1][d]);
      *(uint4*)(page + Layout::value(p.kv_heads, kv, d) + token * 2) = make_uint4(run[0], run[1], run[2], run[3]);
    }
    return;
  }
  for (int at = threadIdx.x; at < PAGE_TOKENS * D; at += blockDim.x) {
    const int token = at % PAGE_TOKENS, d = at / PAGE_TOKENS;
    if (token >= count) continue;
    u8* to = page + Layout::value(p.kv_heads, kv, d);
    if constexpr (Q8) to[first % PAGE_TOKENS + token] = byte_of(to_float(values[token][d]), scales[token]);
    else ((u16*)to)[first % PAGE_TOKENS + token] = values[token][d];
  }
}

// Eight numbers of a head that a lane holds, as floats and back.
DEVICE void widen(const uint4& from, float (&v)[8]) {
  const u32* pairs = &from.x;
#pragma unroll
  for (int i = 0; i < 4; i++) { v[2 * i] = low_of(pairs[i]); v[2 * i + 1] = high_of(pairs[i]); }
}
DEVICE uint4 narrow(const float (&v)[8]) {
  return make_uint4(to_half2(v[0], v[1]), to_half2(v[2], v[3]), to_half2(v[4], v[5]), to_half2(v[6], v[7]));
}

// Whether lanes take whole runs of a head, as `rope_runs` does: all of it is turned, and its lanes are a power of two.
template <int D> DEVICE bool in_runs(const RopeArguments& p) { return (D / 16 & (D / 16 - 1)) == 0 && p.rotary_half * 2 == D; }

// A few tokens of a block: a lane has eight numbers of a head and the eight that are turned with them.
template <int D, bool Q8> DEVICE void rope_runs(const RopeArguments& p) {
  typedef PageLayout<D, Q8> Layout;
  constexpr int LANES = D / 16, SHARE = 32 * ROPE_WARPS / ROPE_TOKENS, HEADS = SHARE / LANES;  // threads of a token; heads at a time
  static_assert(SHARE % 32 == 0, "a warp has one token");
  const int lane = threadIdx.x % LANES, own = threadIdx.x % SHARE / LANES, token = blockIdx.x * ROPE_TOKENS + threadIdx.x / SHARE;
  if (token >= p.tokens) return;
  const int position = p.start + token, all = p.heads + p.kv_heads;
  u16* qkv = p.qkv + (size_t)token * (p.heads + 2 * p.kv_heads) * D + lane * 8;
  u8* page = (u8*)(p.pages[position / PAGE_TOKENS] + p.layer_bytes);
  float cosine[8], sine[8];
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    *(float4*)(cosine + i) = __ldg((const float4*)(p.cosines + (size_t)position * (D / 2) + lane * 8 + i));
    *(float4*)(sine + i) = __ldg((const float4*)(p.sines + (size_t)position * (D / 2) + lane * 8 + i));
  }
#pragma unroll 2
  for (int first = 0; first < all; first += HEADS) {
    const int head = first + own;
    const bool there = head < all, key = head >= p.heads;
    u16* at = qkv + head * D;
    uint4 low = make_uint4(0, 0, 0, 0), high = low;
    if (there) { low = __ldcg((const uint4*)at); high = __ldcg((const uint4*)(at + D / 2)); }
    float a[8], b[8];
    widen(low, a);
    widen(high, b);
    if (p.q_norm || p.k_norm) {  // all lanes add up
      const u16* norm = key ? p.k_norm : p.q_norm;
      float sum = 0.f, weight_a[8], weight_b[8];
#pragma unroll
      for (int i = 0; i < 8; i++) sum += a[i] * a[i] + b[i] * b[i];
#pragma unroll
      for (int other = LANES / 2; other; other /= 2) sum += __shfl_xor_sync(FULL, sum, other);
      if (norm) {
        widen(__ldg((const uint4*)(norm + lane * 8)), weight_a);
        widen(__ldg((const uint4*)(norm + D / 2 + lane * 8)), weight_b);
        const float scale = rsqrtf(sum / D + p.eps);
#pragma unroll
        for (int i = 0; i < 8; i++) { a[i] = a[i] * scale * weight_a[i]; b[i] = b[i] * scale * weight_b[i]; }
        widen(narrow(a), a);
        widen(narrow(b), b);
      }
    }
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float turned = a[i] * cosine[i] - b[i] * sine[i];
      b[i] = b[i] * cosine[i] + a[i] * sine[i];
      a[i] = turned;
    }
    low = narrow(a);
    high = narrow(b);
    if (there) { *(uint4*)at = low; *(uint4*)(at + D / 2) = high; }
    if constexpr (Q8) {
      widen(low, a);
      widen(high, b);
#pragma unroll
      for (int i = 0; i < 8; i++) most = fmaxf(most, fmaxf(fabsf(a[i]), fabsf(b[i])));
#pragma unroll
      for (int other = LANES / 2; other; other /= 2) most = fmaxf(most, __shfl_xor_sync(FULL, most, other));
    }
    if (!there || !key) continue;
    const int kv = head - p.heads, place = position % PAGE_TOKENS;
    u8* to = page + Layout::key(kv, place) + lane * 8 * Layout::SIZE;
    if constexpr (Q8) {
      const u16 stored = to_half(most / 127.f);
      if (lane == 0) ((u16*)(page + Layout::scales(p.kv_heads, kv, false)))[place] = stored;
      const float scale = to_float(stored);
      u8 bytes[16];
#pragma unroll
      for (int i = 0; i < 8; i++) { bytes[i] = byte_of(a[i], scale); bytes[8 + i] = byte_of(b[i], scale); }
      auto four = [&](int i) { return (u32)bytes[i] | (u32)bytes[i + 1] << 8 | (u32)bytes[i + 2] << 16 | (u32)bytes[i + 3] << 24; };
      *(uint2*)to = make_uint2(four(0), four(4));
      *(uint2*)(to + D / 2) = make_uint2(four(8), four(12));
    } else {
      *(uint4*)to = low;
      *(uint4*)(to + D) = high;
    }
  }
}

// Many tokens of one sequence: norm, rotary embedding, keys and values into the pages. Blocks for tokens, a few of them each or
// one; after those, a block for the values of each page and kv head.
template <int D, bool Q8> DEVICE void rope_rows(const RopeArguments& p) {
  const bool runs = in_runs<D>(p);
  const int blocks = runs ? (p.tokens + ROPE_TOKENS - 1) / ROPE_TOKENS : p.tokens;
  if (blockIdx.x < blocks && runs) {
    if constexpr ((D / 16 & (D / 16 - 1)) == 0) rope_runs<D, Q8>(p);
    return;
  }
  if (blockIdx.x >= blocks) {
    const int at = blockIdx.x - blocks;
    keep_values<D, Q8>(p, p.start / PAGE_TOKENS + at / p.kv_heads, at % p.kv_heads);
    return;
  }
  __shared__ __align__(16) u16 rotated[ROPE_WARPS][D];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, position = p.start + blockIdx.x;
  u16* qkv = p.qkv + (size_t)blockIdx.x * (p.heads + 2 * p.kv_heads) * D;
  u8* page = (u8*)(p.pages[position / PAGE_TOKENS] + p.layer_bytes);
  const float *cosine = p.cosines + (size_t)position * p.rotary_half, *sine = p.sines + (size_t)position * p.rotary_half;
  const Angles<D> angles = load_angles<D>(cosine, sine, p.rotary_half);
  for (int head = warp; head < p.heads + p.kv_heads; head += ROPE_WARPS) {
    u16* at = qkv + head * D;
    const bool key = head >= p.heads;
    norm_and_rotate<D>(load_head<D>(at), key ? p.k_norm : p.q_norm, angles, p.rotary_half, p.eps, rotated[warp]);
    for (int d = lane * 2; d < D; d += 64) *(u32*)(at + d) = *(u32*)&rotated[warp][d];
    if (key) store_in_page<D, Q8>(rotated[warp], page, p.kv_heads, head - p.heads, position % PAGE_TOKENS, false);
    __syncwarp();
  }
}

// The pages of a sequence as two plain tensors, for the attention of a prompt's later pieces. A block for a page and kv head.
template <int D, bool Q8> DEVICE void gather_pages(const GatherArguments& p) {
  typedef PageLayout<D, Q8> Layout;
  __shared__ u16 transposed[D][PAGE_TOKENS + 2];
  const int kv = blockIdx.y, first = blockIdx.x * PAGE_TOKENS, count = min(PAGE_TOKENS, p.tokens - first);
  const u8* page = (const u8*)(p.pages[blockIdx.x] + p.layer_bytes);
  const u8 *keys = page + Layout::key(kv, 0), *values = page + Layout::value(p.kv_heads, kv, 0);
  const u16* scales = (const u16*)(page + Layout::scales(p.kv_heads, kv, false));  // those of the values follow
  auto number = [&](const u8* from, int at, int token) {
    if constexpr (Q8) return to_half(((int)from[at] - 128) * to_float(scales[token]));
    else return ((const u16*)from)[at];
  };
  u16* to = p.keys + ((size_t)kv * p.tokens + first) * D;
  for (int at = threadIdx.x; at < count * D; at += blockDim.x) to[at] = number(keys, at, at / D);
  for (int at = threadIdx.x; at < PAGE_TOKENS * D; at += blockDim.x)
    transposed[at / PAGE_TOKENS][at % PAGE_TOKENS] = number(values, at, PAGE_TOKENS + at % PAGE_TOKENS);
  __syncthreads();
  to = p.values + ((size_t)kv * p.tokens + first) * D;
  for (int at = threadIdx.x; at < count * D; at += blockDim.x) to[at] = transposed[at % D][at / D];
}
