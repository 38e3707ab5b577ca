// The three kernels of latent_attention.cu as one, a cluster of eight blocks for each head, for a short conversation: a block makes an
// eighth of the query, takes an eighth of the tokens, and makes an eighth of the value.

#define LATENT_BLOCKS 8
#define LATENT_TILE 64  // tokens of a block at a time

template <class T, int RANK, int FIXED, int TURNED, int VALUE> DEVICE void whole_latent(const LatentArguments& p) {
  constexpr int D = RANK + TURNED, STRIDE = D + 8, SLICE = RANK / LATENT_BLOCKS, COLUMNS = SLICE / 8, PARTS = 256 / COLUMNS;
  constexpr int RUNS = (FIXED + PARTS - 1) / PARTS, OUTPUTS = VALUE / LATENT_BLOCKS, ROWS = (OUTPUTS + 7) / 8;
  constexpr int PIECES = (RANK / 8 + 31) / 32, ALL_PIECES = (D / 8 + 31) / 32;
  static_assert(COLUMNS >= 1 && (COLUMNS & (COLUMNS - 1)) == 0 && RANK <= 512, "lanes that share columns are a power of two apart");
  u16* tile = (u16*)shared_words;                       // [LATENT_TILE][STRIDE]
  u16* fresh = tile + LATENT_TILE * STRIDE;             // [STRIDE]: the new token
  float* query = (float*)(fresh + STRIDE);              // [D]
  float* part = query + D;                              // [RANK]: the sum of this block's tokens
  float* latent = part + RANK;                          // [RANK]
  float* sums = latent + RANK;                          // [8][SLICE]
  float* weights = sums + 8 * SLICE;                    // [8][LATENT_TILE]
  float* scores = weights + 8 * LATENT_TILE;            // [LATENT_TILE]
  float* stats = scores + LATENT_TILE;                  // the highest score, the sum of weights
  float* scratch = stats + 2;                           // 33
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y, block = blockIdx.x;
  arrive_at_cluster();
  allow_next_kernel_to_start();
  const u16* matrix = p.matrices + (size_t)head * (FIXED + VALUE) * RANK;
  const int column = block * SLICE + threadIdx.x % COLUMNS * 8, own_part = threadIdx.x / COLUMNS;
  uint4 w[RUNS], v[ROWS][PIECES];
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int row = own_part + i * PARTS;
    w[i] = row < FIXED ? stream4(matrix + (size_t)row * RANK + column) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int row = warp + r * 8, at = (i * 32 + lane) * 8;
      const bool there = row < OUTPUTS && at < RANK;
      v[r][i] = there ? stream4(matrix + (size_t)(FIXED + block * OUTPUTS + row) * RANK + at) : make_uint4(0, 0, 0, 0);
    }
  // How many there are is counted at a step's end, by a kernel that nothing overlaps: earlier tokens are there before this one waits.
  const int before = (int)min(__ldcg(p.count), (u64)p.capacity - 1), total = before + 1, each = (total + LATENT_BLOCKS - 1) / LATENT_BLOCKS;
  const int first = min(block * each, total), end = min(first + each, total);
  auto fetch = [&](int base) {
    const int most = min(LATENT_TILE, min(end, before) - base);
    for (int i = threadIdx.x; i < most * (D / 8); i += 256) {
      const int own = i / (D / 8), at = i % (D / 8) * 8;
      copy_async<16>(kept_at<RANK, TURNED>(p, base + own, at), tile + own * STRIDE + at);
    }
    commit_copies();
  };
  fetch(first);
  wait_for_previous_kernel();

  const u16* q = p.q + (size_t)head * (FIXED + TURNED);
  float x[RUNS], sum[8] = {};
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int row = own_part + i * PARTS;
    x[i] = row < FIXED ? T::wide(__ldcg(q + row)) : 0.f;
  }
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const u16* h = (const u16*)&w[i];
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] += x[i] * to_float(h[j]);
  }
#pragma unroll
  for (int j = 0; j < 8; j++) {
#pragma unroll
    for (int at = 16; at >= COLUMNS; at >>= 1) sum[j] += __shfl_xor_sync(FULL, sum[j], at);
    if (lane < COLUMNS) sums[warp * SLICE + lane * 8 + j] = sum[j];
  }
  turn_last<T, TURNED>(p, q + FIXED, [&](int i, float y) { query[RANK + i] = y * p.scale; });
  __syncthreads();
  wait_for_cluster();  // every block has begun
  if (threadIdx.x < SLICE) {
    float y = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) y += sums[i * SLICE + threadIdx.x];
#pragma unroll
    for (int to = 0; to < LATENT_BLOCKS; to++) put_there(shared_of(query + block * SLICE + threadIdx.x, to), y * p.scale);
  }
  __syncwarp();
  arrive_at_cluster();
  const bool keeps = first <= before && before < end;
  if (keeps)
    new_latent<T, RANK, TURNED, 256>(p, scratch, [&](int i, u16 y) {
      fresh[i] = y;
      if (head == 0) *kept_at<RANK, TURNED>(p, before, i) = y;
    });
  wait_for_cluster();

  float own[ALL_PIECES][8], high = -INFINITY, weight = 0.f, low_sum = 0.f, high_sum = 0.f;
#pragma unroll
  for (int i = 0; i < ALL_PIECES; i++) {
    const int at = (i * 32 + lane) * 8;
#pragma unroll
    for (int j = 0; j < 8; j++) own[i][j] = at < D ? query[at + j] : 0.f;
  }
  for (int base = first; base < end; base += LATENT_TILE) {
    const int count = min(LATENT_TILE, end - base);
    if (base > first) fetch(base);
    wait_for_copies<0>();
    __syncthreads();
    if (keeps && before < base + count && before >= base) {
      for (int at = threadIdx.x * 8; at < D; at += 2048) *(uint4*)(tile + (before - base) * STRIDE + at) = *(const uint4*)(fresh + at);
      __syncthreads();
    }
#pragma unroll 2
    for (int t = warp; t < count; t += 8) {
      float score = 0.f;
#pragma unroll
      for (int i = 0; i < ALL_PIECES; i++) {
        const int at = (i * 32 + lane) * 8;
        if (at < D) {
          const uint4 k = *(const uint4*)(tile + t * STRIDE + at);
          const u16* h = (const u16*)&k;
#pragma unroll
          for (int j = 0; j < 8; j++) score += own[i][j] * T::wide(h[j]);
        }
      }
      score = warp_sum(score);
      if (lane == 0) scores[t] = score;
    }
    __syncthreads();
    const float low = lane < count ? scores[lane] : -INFINITY, more = lane + 32 < count ? scores[lane + 32] : -INFINITY;
    float top = fmaxf(high, fmaxf(low, more));
#pragma unroll
    for (int at = 16; at; at >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, at));
    const float keep = exp2f(high - top), one = exp2f(low - top), other = exp2f(more - top);
    high = top;
    weight = weight * keep + warp_sum(one + other);
    float* mine = weights + warp * LATENT_TILE;
    mine[lane] = one;
    mine[lane + 32] = other;
    __syncwarp();
    if (threadIdx.x < RANK / 2) {
      low_sum *= keep;
      high_sum *= keep;
#pragma unroll 8
      for (int t = 0; t < count; t++) {
        const u32 both = *(const u32*)(tile + t * STRIDE + threadIdx.x * 2);
        low_sum += mine[t] * T::wide((u16)both);
        high_sum += mine[t] * T::wide((u16)(both >> 16));
      }
    }
    __syncthreads();
  }
  if (threadIdx.x < RANK / 2) *(float2*)(part + threadIdx.x * 2) = make_float2(low_sum, high_sum);
  if (threadIdx.x == 0) *(float2*)stats = make_float2(high, weight);
  arrive_at_cluster();
  wait_for_cluster();

  const float2 found = get_there(shared_of(stats, lane % LATENT_BLOCKS));
  float top = found.x;
#pragma unroll
  for (int at = LATENT_BLOCKS / 2; at; at >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, at));
  const float scaled = exp2f(found.x - top);
  float whole = scaled * found.y;
#pragma unroll
  for (int at = LATENT_BLOCKS / 2; at; at >>= 1) whole += __shfl_xor_sync(FULL, whole, at);
  float2 y = make_float2(0.f, 0.f);
#pragma unroll
  for (int from = 0; from < LATENT_BLOCKS; from++) {
    const float share = __shfl_sync(FULL, scaled, from) / whole;
    if (threadIdx.x < RANK / 2) {
      const float2 theirs = get_there(shared_of(part + threadIdx.x * 2, from));
      y.x += share * theirs.x;
      y.y += share * theirs.y;
    }
  }
  arrive_at_cluster();
  if (threadIdx.x < RANK / 2) *(float2*)(latent + threadIdx.x * 2) = y;
  __syncthreads();
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    float value = 0.f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int at = (i * 32 + lane) * 8;
      const u16* h = (const u16*)&v[r][i];
      if (at < RANK) {
#pragma unroll
        for (int j = 0; j < 8; j++) value += to_float(h[j]) * latent[at + j];
      }
    }
    value = warp_sum(value);
    const int row = warp + r * 8;
    if (lane == 0 && row < OUTPUTS) p.out[(size_t)head * VALUE + block * OUTPUTS + row] = T::narrow(value);
  }
  wait_for_cluster();  // the other blocks have read what is in this one
}
