// The three kernels of latent_attention.cu as one, a cluster of eight blocks for each head, for a short conversation: a block makes an
// eighth of the query, takes an eighth of the tokens, and makes an eighth of the value. All products are the matrix unit's: the query is
// every column of its second operand, the weights of the tokens a row of its first. What a block leaves for the others it writes into
// their shared memory.

#define LATENT_BLOCKS 8
#define LATENT_TILE 72  // tokens of a block at a time, 16 for a warp at once

DEVICE u32 as_halves(Half, u32 v) { return v; }
DEVICE u32 as_halves(Bfloat, u32 v) { return halves_of(v); }

// Four 8 x 8 matrices of 16-bit numbers. Each lane names a row: of matrix lane / 8.
DEVICE void load_matrices(const u16* row, u32 (&to)[4]) {
  const u32 at = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}

// Where dimension i of the query lies, so that a lane's numbers for two steps of the matrix unit are one run of 16 bytes.
DEVICE int query_place(int i) { return i / 32 * 32 + i % 8 / 2 * 8 + i % 32 / 8 * 2 + i % 2; }

#if __CUDA_ARCH__ >= 900
template <class T, int RANK, int FIXED, int TURNED, int VALUE> DEVICE void whole_latent(const LatentArguments& p) {
  constexpr int D = RANK + TURNED, STRIDE = D + 8, SLICE = RANK / LATENT_BLOCKS, WIDE = SLICE + 8, STEPS = FIXED / 16;
  constexpr int OUTPUTS = VALUE / LATENT_BLOCKS, ROWS = (OUTPUTS + 15) / 16, PAIRS = (RANK / 16 + 7) / 8;
  constexpr int RUNS = (SLICE + 31) / 32, NEW = (RANK + 255) / 256, PARTS = 4 * LATENT_BLOCKS * RANK, MATRIX = 2 * FIXED * WIDE;
  constexpr int TOGETHER = 256 / (D / 8);  // tokens that are fetched at once
  constexpr int SCORES = (LATENT_TILE + 15) / 16 * 16, TURNS = (D / 32 + 1) / 2;  // a warp multiplies half of the dimensions of 16 tokens
  static_assert(SLICE % 8 == 0 && SLICE <= 64 && OUTPUTS <= 32 && FIXED % 16 == 0 && D % 16 == 0, "whole steps of the matrix unit");
  static_assert(TOGETHER > 0 && TURNED <= 256, "a thread fetches eight numbers of a token, and turns two");
  static_assert(LATENT_TILE % 8 == 0 && LATENT_TILE > 64 && LATENT_TILE <= 80, "as lanes share them");
  u16* tile = (u16*)shared_words;                           // [LATENT_TILE][STRIDE]
  u16* fresh = tile + LATENT_TILE * STRIDE;                 // [STRIDE]: the new token
  u16* query = fresh + STRIDE;                              // [STRIDE + 24], times `scale`: see query_place
  float* parts = (float*)(query + STRIDE + 24);             // [LATENT_BLOCKS][RANK]: the sums of each block's tokens
  u16* matrix = (u16*)parts;                                // [FIXED][WIDE], until the query is made
  float* stats = (float*)((u8*)parts + (PARTS > MATRIX ? PARTS : MATRIX));  // [LATENT_BLOCKS][2]: the highest score, the sum of weights
  float* own_part = stats + 2 * LATENT_BLOCKS;              // [RANK]: what this block sends to the others
  float* values = own_part + RANK;                          // [8][32]: of each warp
  u16* latent = (u16*)(values + 8 * 32);                    // fp16 [RANK]
  float* scores = (float*)(latent + RANK);                  // [2][SCORES]: of half of the dimensions each
  float* scratch = scores + 2 * SCORES;                     // 8
  u64* barriers = (u64*)(scratch + 8);                      // of the query, and of the sums
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4, head = blockIdx.y, block = blockIdx.x;
  if (threadIdx.x == 0) {
    slot_barrier(barriers, 1);
    slot_barrier(barriers + 1, 1);
    show_barriers();
    expect_bytes(barriers, 2 * RANK);
    expect_bytes(barriers + 1, LATENT_BLOCKS * (4 * RANK + 8));
  }
  __syncwarp();
  begin_in_cluster();
  allow_next_kernel_to_start();
  const u16* weights = p.matrices + (size_t)head * (FIXED + VALUE) * RANK;
  // How many there are is counted at a step's end, by a kernel that nothing overlaps: earlier tokens are there before this one waits.
  const int before = (int)min(__ldcg(p.count), (u64)p.capacity - 1), total = before + 1, each = (total + LATENT_BLOCKS - 1) / LATENT_BLOCKS;
#pragma unroll 1
  for (int i = threadIdx.x; i < FIXED * (SLICE / 8); i += 256) {
    const int row = i / (SLICE / 8), at = i % (SLICE / 8) * 8;
    copy_async<16>(weights + (size_t)row * RANK + block * SLICE + at, matrix + row * WIDE + at);
  }
  commit_copies();
  uint4 v[ROWS][2][RUNS];  // rows g and g + 8 of each 16 outputs; a warp takes an eighth of the latent vector, a lane eight numbers in turn
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int i = 0; i < RUNS; i++) {
        const int row = r * 16 + n * 8 + g, at = i * 32 + c * 8;
        const bool there = row < OUTPUTS && at < SLICE;
        v[r][n][i] = there ? stream4(weights + (size_t)(FIXED + block * OUTPUTS + row) * RANK + warp * SLICE + at) : make_uint4(0, 0, 0, 0);
      }
  const int first = min(block * each, total), end = min(first + each, total);
  auto fetch = [&](int base) {  // and zeros behind the end, for whole steps of 16 tokens
    const int there = min(LATENT_TILE, end - base), known = min(there, before - base), whole = min((there + 15) / 16 * 16, LATENT_TILE);
    const int at = threadIdx.x % (D / 8) * 8;
#pragma unroll 1
    for (int own = threadIdx.x < TOGETHER * (D / 8) ? threadIdx.x / (D / 8) : whole; own < whole; own += TOGETHER) {
      u16* place = tile + own * STRIDE + at;
      if (own < known) copy_async<16>(kept_at<RANK, TURNED>(p, base + own, at), place);
      else if (own >= there) *(uint4*)place = make_uint4(0, 0, 0, 0);
    }
    commit_copies();
  };
  fetch(first);
  const bool keeps = first <= before && before < end;  // the new token
  float norm[NEW], held[NEW], squares = 0.f;
#pragma unroll
  for (int i = 0; i < NEW; i++) norm[i] = keeps && i * 256 + threadIdx.x < RANK ? T::wide(__ldg(p.norm + i * 256 + threadIdx.x)) : 0.f;
  u16* row = before < first + LATENT_TILE ? tile + (before - first) * STRIDE : fresh;
  auto keep = [&](int i, float y) {
    row[i] = T::narrow(y);
    if (head == 0) *kept_at<RANK, TURNED>(p, before, i) = T::narrow(y);
  };
  wait_for_copies<1>();
  __syncthreads();
  wait_for_previous_kernel();
  const u16* q = p.q + (size_t)head * (FIXED + TURNED);
  uint2 x[STEPS];
#pragma unroll
  for (int i = 0; i < STEPS; i++) x[i] = __ldcg((const uint2*)(q + i * 16 + c * 4));
  if (keeps) {
#pragma unroll
    for (int i = 0; i < NEW; i++) {
      const int j = i * 256 + threadIdx.x;
      held[i] = j < RANK ? T::wide(__ldcg(p.kv + j)) : 0.f;
      squares += held[i] * held[i];
    }
  }
  float made[2][4] = {};
  if (warp < SLICE / 8) {
#pragma unroll
    for (int i = 0; i < STEPS; i += 2) {  // a lane takes four rows in turn of each 16: any order is right that both operands have
      const int row = min((i + lane / 16) * 16 + lane % 8 / 2 * 4 + lane / 8 % 2 * 2 + lane % 2, FIXED - 1);
      u32 b[4];
      load_transposed(matrix + row * WIDE + warp * 8, b);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        if (i + n >= STEPS) continue;
        const u32 low = as_halves(T(), x[i + n].x), high = as_halves(T(), x[i + n].y), a[4] = {low, 0, high, 0};
        mma(made[n], a, b[2 * n], b[2 * n + 1]);
      }
    }
  }
  wait_for_cluster();  // every block has begun
  if (warp < SLICE / 8) {
    const u32 two = pair(T::narrow((made[0][0] + made[1][0]) * p.scale), T::narrow((made[0][1] + made[1][1]) * p.scale));
    send(shared_of(query + query_place(block * SLICE + warp * 8 + c * 2), g), two, shared_of(barriers, g));
  }
  const bool of_query = threadIdx.x < TURNED / 2;  // as many threads turn the new token
  if (of_query || (threadIdx.x < TURNED && keeps)) {
    const Turned turned = turned_pair<T, TURNED>(p, threadIdx.x % (TURNED / 2));
    turn_pair<T>(turned, of_query ? q + FIXED : p.kv + RANK, [&](int i, float y) {
      if (of_query) query[query_place(RANK + i)] = T::narrow(y * p.scale);
      else keep(RANK + i, y);
    });
  }
  if (keeps) {
    squares = warp_sum(squares);
    if (lane == 0) scratch[warp] = squares;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += scratch[i];
    const float scale = rsqrtf(sum / RANK + p.eps);
#pragma unroll
    for (int i = 0; i < NEW; i++)
      if (i * 256 + threadIdx.x < RANK) keep(i * 256 + threadIdx.x, held[i] * scale * norm[i]);
  }
  wait_for_copies<0>();
  __syncthreads();
  wait_for_sent(barriers);

  float sums[PAIRS][2][4] = {}, high = -INFINITY, weight = 0.f;
  for (int base = first; base < end; base += LATENT_TILE) {
    const int count = min(LATENT_TILE, end - base);
    if (base > first) {
      __syncthreads();
      fetch(base);
      wait_for_copies<0>();
      __syncthreads();
      if (keeps && before >= base && before < base + count) {
        for (int at = threadIdx.x * 8; at < D; at += 2048) *(uint4*)(tile + (before - base) * STRIDE + at) = *(const uint4*)(fresh + at);
        __syncthreads();
      }
    }
#pragma unroll 1
    for (int task = warp; task < (count + 15) / 16 * 2; task += 8) {  // rows behind the tile's last are of no token
      float found[2][4] = {};
      const int half = task % 2, group = task / 2;
      const u16* k = tile + (group * 16 + lane % 16) * STRIDE + lane / 16 * 8;
#pragma unroll 3
      for (int i = half * TURNS * 32; i < (half ? D : TURNS * 32); i += 32) {
        const uint4 own = *(const uint4*)(query + i + c * 8);
        u32 a[4], b[4];
        load_matrices(k + i, a);
        multiply(T(), found[0], a, own.x, own.y);
        if (D % 32 == 0 || i + 16 < D) {
          load_matrices(k + i + 16, b);
          multiply(T(), found[1], b, own.z, own.w);
        }
      }
      if (c == 0) {
        float* to = scores + half * SCORES + group * 16 + g;
        to[0] = found[0][0] + found[1][0];
        to[8] = found[0][2] + found[1][2];
      }
    }
    __syncthreads();
    auto score = [&](int token) { return token < count ? scores[token] + scores[SCORES + token] : -INFINITY; };
    const float a = score(lane * 2), b = score(lane * 2 + 1), d = lane < 4 ? score(64 + lane * 2) : -INFINITY, e = lane < 4 ? score(65 + lane * 2) : -INFINITY;
    float top = fmaxf(fmaxf(high, fmaxf(a, b)), fmaxf(d, e));
#pragma unroll
    for (int at = 16; at; at >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, at));
    const float keep = exp2f(high - top), of_a = exp2f(a - top), of_b = exp2f(b - top), of_d = exp2f(d - top), of_e = exp2f(e - top);
    high = top;
    weight = weight * keep + of_a + of_b + (of_d + of_e);  // this lane's part
    const u32 two = pair(T::narrow(of_a), T::narrow(of_b)), last = pair(T::narrow(of_d), T::narrow(of_e));  // last: behind 64
    if (base > first) {
#pragma unroll
      for (int i = 0; i < PAIRS; i++)
#pragma unroll
        for (int n = 0; n < 2; n++) { sums[i][n][0] *= keep; sums[i][n][1] *= keep; }
    }
#pragma unroll 1
    for (int step = 0; step * 16 < count; step++) {
      const u32 from = step < 4 ? two : last;
      const u32 a[4] = {__shfl_sync(FULL, from, step % 4 * 8 + c), 0, __shfl_sync(FULL, from, step % 4 * 8 + 4 + c), 0};
      int at = step * 16 + lane % 16;
      if (at >= LATENT_TILE) at -= 8;  // whose weight is zero
      const u16* y = tile + at * STRIDE + warp * 16 + lane / 16 * 8;
#pragma unroll
      for (int i = 0; i < PAIRS; i++) {
        if (RANK < 128 && warp * 16 >= RANK) continue;
        u32 b[4];
        load_transposed(y + i * 128, b);
        multiply(T(), sums[i][0], a, b[0], b[1]);
        multiply(T(), sums[i][1], a, b[2], b[3]);
      }
    }
  }
  if (g == 0) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const int at = (i * 8 + warp) * 16 + n * 8 + c * 2;
        if (at < RANK) *(float2*)(own_part + at) = make_float2(sums[i][n][0], sums[i][n][1]);
      }
  }
  weight = warp_sum(weight);
  __syncthreads();
  const u32 there = shared_of(barriers + 1, warp);  // a warp sends all to one block
#pragma unroll 1
  for (int at = lane * 4; at < RANK; at += 128) send(shared_of(parts + block * RANK + at, warp), *(const float4*)(own_part + at), there);
  if (lane == 0) send(shared_of(stats + block * 2, warp), make_float2(high, weight), there);
  wait_for_sent(barriers + 1);

  const float2 found = *(const float2*)(stats + lane % LATENT_BLOCKS * 2);
  float top = found.x;
#pragma unroll
  for (int at = LATENT_BLOCKS / 2; at; at >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, at));
  const float scaled = exp2f(found.x - top);
  float all = scaled * found.y;
#pragma unroll
  for (int at = LATENT_BLOCKS / 2; at; at >>= 1) all += __shfl_xor_sync(FULL, all, at);
  float2 sum = make_float2(0.f, 0.f);
  const int own = warp * SLICE + lane * 2 % SLICE;
#pragma unroll 4
  for (int i = 0; i < LATENT_BLOCKS; i++) {
    const float share = __shfl_sync(FULL, scaled, i);
    const float2 theirs = *(const float2*)(parts + i * RANK + own);
    sum.x += share * theirs.x;
    sum.y += share * theirs.y;
  }
  *(u32*)(latent + own) = to_half2(sum.x / all, sum.y / all);
  __syncwarp();
  float value[ROWS][4] = {};
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const uint4 y = i * 32 + c * 8 < SLICE ? *(const uint4*)(latent + warp * SLICE + i * 32 + c * 8) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const uint4 low = v[r][0][i], more = v[r][1][i];
      const u32 first_step[4] = {low.x, more.x, low.y, more.y}, second_step[4] = {low.z, more.z, low.w, more.w};
      mma(value[r], first_step, y.x, y.y);
      mma(value[r], second_step, y.z, y.w);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (c == 0) {
      values[warp * 32 + r * 16 + g] = value[r][0];
      values[warp * 32 + r * 16 + g + 8] = value[r][2];
    }
  }
  __syncthreads();
  if (threadIdx.x < OUTPUTS) {
    float y = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) y += values[i * 32 + threadIdx.x];
    p.out[(size_t)head * VALUE + block * OUTPUTS + threadIdx.x] = T::narrow(y);
  }
}
#endif
