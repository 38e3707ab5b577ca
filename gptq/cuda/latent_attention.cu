// Attention of one token to latent vectors (MLA) at fixed addresses, as a cache of transformers keeps them: three kernels.
// A head's key and value are products of the latent vector. Instead of them, the query is multiplied by the transposed matrix of the
// keys and meets the latent vector itself; attention sums latent vectors, and that sum is multiplied by the matrix of the values.
// So a token costs one vector for all heads. A row of the matrix is an output, [FIXED of the key + VALUE of the value] for each head.

#define LATENT_TOKENS 16  // that a block takes at a time

// Four 8 x 8 matrices of 16-bit numbers, transposed. Each lane names a row: of matrix lane / 8.
DEVICE void load_transposed(const u16* row, u32 (&to)[4]) {
  const u32 at = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}

// Two of the last dimensions of a head, which turn together: where they come from and go to, and their angle.
struct Turned { int a, b, to_a, to_b; float2 angle; };

template <class T, int TURNED> DEVICE Turned turned_pair(const LatentArguments& p, int i) {
  const bool apart = p.kind == 2;  // dimension i turns with i + TURNED / 2; else neighbours turn together
  Turned r = {apart ? i : 2 * i, apart ? i + TURNED / 2 : 2 * i + 1, p.kind == 0 ? 2 * i : i, p.kind == 0 ? 2 * i + 1 : i + TURNED / 2};
  if (p.kind == 0) r.angle = __ldcg((const float2*)p.angles + i);
  else r.angle = make_float2(T::wide(__ldcg((const u16*)p.angles + i)), T::wide(__ldcg(p.sines + i)));
  return r;
}

// `put` takes the number of each of the two and its value.
template <class T, class Put> DEVICE void turn_pair(const Turned& turned, const u16* from, Put put) {
  const float a = T::wide(__ldcg(from + turned.a)), b = T::wide(__ldcg(from + turned.b));
  put(turned.to_a, a * turned.angle.x - b * turned.angle.y);
  put(turned.to_b, b * turned.angle.x + a * turned.angle.y);
}

// All of them.
template <class T, int TURNED, class Put> DEVICE void turn_last(const LatentArguments& p, const u16* from, Put put) {
  for (int i = threadIdx.x; i < TURNED / 2; i += blockDim.x) turn_pair<T>(turned_pair<T, TURNED>(p, i), from, put);
}

// What is kept of the new token: `put` takes the number of each dimension and its value, those of the normed latent vector first.
template <class T, int RANK, int TURNED, int THREADS, class Put> DEVICE void new_latent(const LatentArguments& p, float* scratch, Put put) {
  constexpr int RUNS = (RANK + THREADS - 1) / THREADS;
  float held[RUNS], sum = 0.f;
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int j = i * THREADS + threadIdx.x;
    held[i] = j < RANK ? T::wide(__ldcg(p.kv + j)) : 0.f;
    sum += held[i] * held[i];
  }
  turn_last<T, TURNED>(p, p.kv + RANK, [&](int i, float v) { put(RANK + i, T::narrow(v)); });
  const float scale = rsqrtf(block_sum(sum, scratch) / RANK + p.eps);
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const int j = i * THREADS + threadIdx.x;
    if (j < RANK) put(j, T::narrow(held[i] * scale * T::wide(__ldg(p.norm + j))));
  }
}

// Where dimension i of a token is kept.
template <int RANK, int TURNED> DEVICE u16* kept_at(const LatentArguments& p, size_t token, int i) {
  return i < RANK ? p.keys + token * RANK + i : p.turned_keys + token * TURNED + i - RANK;
}

// A block of 128 threads makes 64 numbers of what a head's query meets latent vectors with; those of the last row keep the token.
template <class T, int RANK, int FIXED, int TURNED, int VALUE> DEVICE void meet_latent(const LatentArguments& p) {
  static_assert(RANK % 64 == 0 && FIXED % 16 == 0 && TURNED % 16 == 0, "whole steps of the matrix unit");
  constexpr int RUNS = FIXED / 16;
  float* sums = (float*)shared_words;  // [4][64]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y;
  const int column = blockIdx.x * 64 + threadIdx.x % 8 * 8, part = threadIdx.x / 8;  // of the fixed dimensions every 16th
  allow_next_kernel_to_start();
  if (head == p.heads) {
    if (blockIdx.x) return;
    wait_for_previous_kernel();
    const size_t at = min(__ldcg(p.count), (u64)p.capacity - 1);
    new_latent<T, RANK, TURNED, 128>(p, (float*)shared_words, [&](int i, u16 v) { *kept_at<RANK, TURNED>(p, at, i) = v; });
    return;
  }
  const u16* matrix = p.matrices + ((size_t)head * (FIXED + VALUE) + part) * RANK + column;
  uint4 w[RUNS];
#pragma unroll
  for (int i = 0; i < RUNS; i++) w[i] = stream4(matrix + (size_t)i * 16 * RANK);
  wait_for_previous_kernel();
  const u16* query = p.q + (size_t)head * (FIXED + TURNED);
  float x[RUNS], sum[8] = {};
#pragma unroll
  for (int i = 0; i < RUNS; i++) x[i] = T::wide(__ldcg(query + part + i * 16));
#pragma unroll
  for (int i = 0; i < RUNS; i++) {
    const u16* h = (const u16*)&w[i];
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] += x[i] * to_float(h[j]);
  }
#pragma unroll
  for (int j = 0; j < 8; j++) {
    sum[j] += __shfl_xor_sync(FULL, sum[j], 8);
    sum[j] += __shfl_xor_sync(FULL, sum[j], 16);
    if (lane < 8) sums[warp * 64 + lane * 8 + j] = sum[j];
  }
  u16* met = p.met + (size_t)head * (RANK + TURNED);
  if (blockIdx.x == 0) turn_last<T, TURNED>(p, query + FIXED, [&](int i, float v) { met[RANK + i] = T::narrow(v * p.scale); });
  __syncthreads();
  if (threadIdx.x < 64) {
    const float y = sums[threadIdx.x] + sums[64 + threadIdx.x] + sums[128 + threadIdx.x] + sums[192 + threadIdx.x];
    met[blockIdx.x * 64 + threadIdx.x] = T::narrow(y * p.scale);
  }
}

// The 16 tokens of a tile into shared memory, each [RANK + TURNED]: those below `known`; zeros from `total` on.
template <int RANK, int TURNED> DEVICE void fetch_latents(const LatentArguments& p, int tile, int known, int total, u16* to) {
  constexpr int D = RANK + TURNED, STRIDE = D + 8, PIECES = D / 8;
  for (int i = threadIdx.x; i < LATENT_TOKENS * PIECES; i += 128) {
    const int own = i / PIECES, at = i % PIECES * 8;
    const size_t token = tile * LATENT_TOKENS + own;
    u16* place = to + own * STRIDE + at;
    if (token < known) copy_async<16>(kept_at<RANK, TURNED>(p, token, at), place);
    else if (token >= total) *(uint4*)place = make_uint4(0, 0, 0, 0);
  }
}

// A block takes 16 heads and a part of the tokens: every tile of 16 tokens is met by all of them. Four warps.
template <class T, int RANK, int FIXED, int TURNED, int VALUE> DEVICE void attend_latent(const LatentArguments& p) {
  constexpr int D = RANK + TURNED, STRIDE = D + 8, STEPS = D / 16, TILES = RANK / 32, SCORES = LATENT_TOKENS + 2;
  u16* queries = (u16*)shared_words;                              // [16][STRIDE]
  u16* latents = queries + 16 * STRIDE;                           // [2][LATENT_TOKENS][STRIDE]
  float* scores = (float*)(latents + 2 * LATENT_TOKENS * STRIDE); // [4][16][SCORES]
  u16* shares = (u16*)(scores + 4 * 16 * SCORES);                 // [16][LATENT_TOKENS + 8]
  float* keeps = (float*)(shares + 16 * (LATENT_TOKENS + 8));     // [16]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4 * 2;
  const int first_head = blockIdx.y * 16, split = blockIdx.x, row = threadIdx.x / 8, column = threadIdx.x % 8 * 2;
  allow_next_kernel_to_start();
  // How many there are is counted at a step's end, by a kernel that nothing overlaps: earlier tokens are there before this one waits.
  const int total = (int)min(__ldcg(p.count), (u64)p.capacity - 1) + 1, tiles = (total + LATENT_TOKENS - 1) / LATENT_TOKENS;
  const int each = (tiles + gridDim.x - 1) / (int)gridDim.x, first = min(split * each, tiles), end = min(first + each, tiles);
  float* stats = p.stats + ((size_t)split * p.heads + first_head + row) * 2;
  if (first < end) fetch_latents<RANK, TURNED>(p, first, total - 1, total, latents);
  wait_for_previous_kernel();
  if (first >= end) {
    if (column == 0 && first_head + row < p.heads) *(float2*)stats = make_float2(-INFINITY, 0.f);
    return;
  }
  for (int i = threadIdx.x; i < 16 * (D / 8); i += 128) {
    const int own = i / (D / 8), at = i % (D / 8) * 8;
    u16* place = queries + own * STRIDE + at;
    if (first_head + own < p.heads) copy_async<16>(p.met + (size_t)(first_head + own) * D + at, place);
    else *(uint4*)place = make_uint4(0, 0, 0, 0);
  }
  if (first == (total - 1) / LATENT_TOKENS) {  // the new token
    const size_t token = total - 1;
    u16* place = latents + token % LATENT_TOKENS * STRIDE;
    for (int at = threadIdx.x * 8; at < D; at += 1024)
      copy_async<16>(kept_at<RANK, TURNED>(p, token, at), place + at);
  }
  commit_copies();

  float sums[TILES][4], high = -INFINITY, weight = 0.f;
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) sums[i][j] = 0.f;
  for (int tile = first; tile < end; tile++) {
    const u16* now = latents + (tile - first) % 2 * LATENT_TOKENS * STRIDE;
    if (tile + 1 < end) fetch_latents<RANK, TURNED>(p, tile + 1, total, total, latents + (tile + 1 - first) % 2 * LATENT_TOKENS * STRIDE);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    float found[2][4] = {};
#pragma unroll 3
    for (int step = warp; step < STEPS; step += 4) {
      const u16* q = queries + step * 16 + c;
      const u32 a[4] = {*(const u32*)(q + g * STRIDE), *(const u32*)(q + (g + 8) * STRIDE), *(const u32*)(q + g * STRIDE + 8),
                        *(const u32*)(q + (g + 8) * STRIDE + 8)};
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const u16* k = now + (n * 8 + g) * STRIDE + step * 16 + c;
        multiply(T(), found[n], a, *(const u32*)k, *(const u32*)(k + 8));
      }
    }
#pragma unroll
    for (int n = 0; n < 2; n++) {
      float* to = scores + (warp * 16 + g) * SCORES + n * 8 + c;
      *(float2*)to = make_float2(found[n][0], found[n][1]);
      *(float2*)(to + 8 * SCORES) = make_float2(found[n][2], found[n][3]);
    }
    __syncthreads();
    {  // eight lanes hold a head's scores, two each
      float2 own = make_float2(0.f, 0.f);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 part = *(const float2*)(scores + (i * 16 + row) * SCORES + column);
        own.x += part.x;
        own.y += part.y;
      }
      const int token = tile * LATENT_TOKENS + column;
      if (token >= total) own.x = -INFINITY;
      if (token + 1 >= total) own.y = -INFINITY;
      float top = fmaxf(high, fmaxf(own.x, own.y));
#pragma unroll
      for (int at = 4; at; at >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, at));
      const float keep = exp2f(high - top);  // the first token of a tile is there, so top is a number
      own = make_float2(exp2f(own.x - top), exp2f(own.y - top));
      float sum = own.x + own.y;
#pragma unroll
      for (int at = 4; at; at >>= 1) sum += __shfl_xor_sync(FULL, sum, at);
      high = top;
      weight = weight * keep + sum;
      *(u32*)(shares + row * (LATENT_TOKENS + 8) + column) = pair(T::narrow(own.x), T::narrow(own.y));
      if (column == 0) keeps[row] = keep;
    }
    __syncthreads();
    const float low_keep = keeps[g], high_keep = keeps[g + 8];
    const u16* s = shares + c;
    constexpr int WIDE = LATENT_TOKENS + 8;
    const u32 a[4] = {*(const u32*)(s + g * WIDE), *(const u32*)(s + (g + 8) * WIDE), *(const u32*)(s + g * WIDE + 8),
                      *(const u32*)(s + (g + 8) * WIDE + 8)};
    const u16* v = now + (lane / 8 % 2 * 8 + lane % 8) * STRIDE + warp * (RANK / 4) + lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < TILES; i += 2) {
      u32 b[4];
      load_transposed(v + i * 8, b);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        sums[i + n][0] *= low_keep; sums[i + n][1] *= low_keep;
        sums[i + n][2] *= high_keep; sums[i + n][3] *= high_keep;
        multiply(T(), sums[i + n], a, b[2 * n], b[2 * n + 1]);
      }
    }
    __syncthreads();  // before the next tile comes into this place
  }
  if (column == 0 && first_head + row < p.heads) *(float2*)stats = make_float2(high, weight);
  float* partial = p.partial + ((size_t)split * p.heads + first_head) * RANK + warp * (RANK / 4) + c;
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    if (first_head + g < p.heads) *(float2*)(partial + g * RANK + i * 8) = make_float2(sums[i][0], sums[i][1]);
    if (first_head + g + 8 < p.heads) *(float2*)(partial + (g + 8) * RANK + i * 8) = make_float2(sums[i][2], sums[i][3]);
  }
}

// A block of 128 threads adds a head's parts up and makes 16 numbers of its value. There are at most 64 parts.
template <class T, int RANK, int FIXED, int TURNED, int VALUE> DEVICE void read_latent(const LatentArguments& p) {
  static_assert(VALUE % 16 == 0, "a warp takes four outputs");
  constexpr int PIECES = (RANK / 8 + 31) / 32;
  float* latent = (float*)shared_words;  // [RANK]
  float* shares = latent + RANK;         // [64]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.y, first = blockIdx.x * 16 + warp * 4;
  allow_next_kernel_to_start();
  const u16* matrix = p.matrices + ((size_t)head * (FIXED + VALUE) + FIXED + first) * RANK;
  uint4 w[4][PIECES];
#pragma unroll
  for (int r = 0; r < 4; r++)
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int at = (i * 32 + lane) * 8;
      w[r][i] = at < RANK ? stream4(matrix + (size_t)r * RANK + at) : make_uint4(0, 0, 0, 0);
    }
  wait_for_previous_kernel();
  float2 low = make_float2(-INFINITY, 0.f), more = low;
  if (lane < p.splits) low = __ldcg((const float2*)p.stats + (size_t)lane * p.heads + head);
  if (lane + 32 < p.splits) more = __ldcg((const float2*)p.stats + (size_t)(lane + 32) * p.heads + head);
  float top = fmaxf(low.x, more.x);
#pragma unroll
  for (int at = 16; at; at >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, at));
  const float one = exp2f(low.x - top), other = exp2f(more.x - top);
  const float scale = 1.f / warp_sum(one * low.y + other * more.y);
  if (warp == 0) {
    shares[lane] = low.y > 0.f ? one * scale : 0.f;
    shares[lane + 32] = more.y > 0.f ? other * scale : 0.f;
  }
  __syncthreads();
  for (int at = threadIdx.x * 4; at < RANK; at += 512) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    const float* from = p.partial + (size_t)head * RANK + at;
#pragma unroll 16
    for (int s = 0; s < p.splits; s++) {
      const float share = shares[s];
      if (share > 0.f) {  // what a part without tokens left is no number
        const float4 v = __ldcg((const float4*)(from + (size_t)s * p.heads * RANK));
        sum.x += share * v.x; sum.y += share * v.y; sum.z += share * v.z; sum.w += share * v.w;
      }
    }
    *(float4*)(latent + at) = sum;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 4; r++) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
      const int at = (i * 32 + lane) * 8;
      if (at >= RANK) continue;
      const u16* h = (const u16*)&w[r][i];
      const float4 x = *(const float4*)(latent + at), y = *(const float4*)(latent + at + 4);
      sum += to_float(h[0]) * x.x + to_float(h[1]) * x.y + to_float(h[2]) * x.z + to_float(h[3]) * x.w;
      sum += to_float(h[4]) * y.x + to_float(h[5]) * y.y + to_float(h[6]) * y.z + to_float(h[7]) * y.w;
    }
    sum = warp_sum(sum);
    if (lane == 0) p.out[(size_t)head * VALUE + first + r] = T::narrow(sum);
  }
}
