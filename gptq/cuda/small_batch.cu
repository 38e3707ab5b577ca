// A few rows of activations times a packed weight: Y = X W for 2 to 64 rows, a short prompt's or several conversations'.
//
// As gemv.cu, but every column of the matrix unit is a row of x: what is unpacked once is multiplied with NT * 8 of them.
// Weights are scaled before they are multiplied, so that one set of sums is enough for all groups. X is too large for
// the shared memory: its chunks travel beside those of the weights. KS warps share MT tiles, each a range of chunks,
// and their sums are added in a fixed order.

struct SmallBatchArguments {
  const u8* weights;     // as in gemv.cu
  const u32* scales;
  const u16* x;          // fp16 [rows][chunks * 64], engine order
  const u16* bias;       // fp16 [tiles * 16], or null
  u16* out;              // fp16 [rows][n] (PLAIN), [rows][n / 2] (SILU); not used by RESIDUAL
  float* residual;       // fp32 [rows][n], RESIDUAL only
  int n, tiles, chunks, groups;
  u32 unit_to_group;
  int rows;
};

template <int BITS, bool SYM, int UNITS, int MT, int NT, int KS, int STAGES, int EPILOGUE>
DEVICE void small_batch(const SmallBatchArguments& p) {
  constexpr int SCALE_BYTES = SYM ? 32 : 64, CHUNK_BYTES = BITS * 128, TILE_BYTES = CHUNK_BYTES + UNITS * SCALE_BYTES;
  constexpr int SLOT = MT * TILE_BYTES + NT * 1024, WIDTH = MT * 16 + 4;  // of a row of sums; 4 apart from the banks of the next
  constexpr int SCALE_PIECES = UNITS * SCALE_BYTES / 16;
  constexpr int OUTS = EPILOGUE == SILU ? MT * 8 : MT * 16, ROUNDS = (NT * 8 * OUTS + KS * 32 - 1) / (KS * 32);
  constexpr bool AHEAD = EPILOGUE == RESIDUAL && ROUNDS <= 4;  // more of them would be much code that runs once
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  u8* ring = (u8*)shared_words + part * STAGES * SLOT;        // of this warp
  float* sums = (float*)((u8*)shared_words + KS * STAGES * SLOT);  // [KS][NT * 8][WIDTH]
  const int per = (p.chunks + KS - 1) / KS, first = min(part * per, p.chunks), end = min(first + per, p.chunks);
  const int items = (p.tiles + MT - 1) / MT, padded = p.chunks * 64;

  int w_item = blockIdx.x, w_chunk = first, w_slot = 0, x_chunk = first, x_slot = 0;
  auto fetch_weights = [&]() {
    u8* to = ring + w_slot * SLOT;
    if (w_item < items && w_chunk < end) {
#pragma unroll
      for (int m = 0; m < MT; m++) {
        const int tile = w_item * MT + m;
        if (tile < p.tiles) copy_words<BITS>(p.weights + ((size_t)tile * p.chunks + w_chunk) * CHUNK_BYTES, to + m * TILE_BYTES, lane);
      }
#pragma unroll
      for (int i = lane; i < MT * SCALE_PIECES; i += 32) {
        const int m = i / SCALE_PIECES, at = i % SCALE_PIECES, tile = w_item * MT + m;
        const int unit = w_chunk * UNITS + at / (SCALE_BYTES / 16);
        const u8* scale = (const u8*)p.scales + ((size_t)tile * p.groups + (int)(unit * p.unit_to_group >> 16)) * SCALE_BYTES;
        if (tile < p.tiles) copy_async<16>(scale + at % (SCALE_BYTES / 16) * 16, to + m * TILE_BYTES + CHUNK_BYTES + at * 16);
      }
    }
    w_slot = w_slot + 1 == STAGES ? 0 : w_slot + 1;
    if (++w_chunk >= end) { w_chunk = first; w_item += gridDim.x; }
  };
  auto fetch_x = [&]() {  // a row's 8 pieces of 16 bytes; those of odd rows change permutation in pairs, for the banks
    u8* to = ring + x_slot * SLOT + MT * TILE_BYTES;
#pragma unroll
    for (int t = 0; t < NT * 2; t++) {
      const int row = t * 4 + lane / 8, piece = lane % 8;
      if (row < p.rows && x_chunk < end) copy_async<16>(p.x + (size_t)row * padded + x_chunk * 64 + piece * 8, to + row * 128 + (piece ^ row & 1) * 16);
    }
    commit_copies();
    x_slot = x_slot + 1 == STAGES ? 0 : x_slot + 1;
    if (++x_chunk >= end) x_chunk = first;
  };

#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) fetch_weights();
  let_the_next_kernel_start();
  wait_for_the_kernel_ahead();
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) fetch_x();

  int slot = 0;
#pragma unroll 1
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    float before[AHEAD ? ROUNDS : 1];  // what the sums are added to, on its way while they are made
    if constexpr (AHEAD) {
#pragma unroll
      for (int i = 0; i < ROUNDS; i++) {
        const int at = i * KS * 32 + threadIdx.x, row = at / OUTS, n = item * OUTS + at % OUTS;
        before[i] = row < p.rows && n < p.n ? __ldcg(p.residual + (size_t)row * p.n + n) : 0.f;
      }
    }
    float y[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int t = 0; t < NT; t++) y[m][t][0] = y[m][t][1] = y[m][t][2] = y[m][t][3] = 0.f;
#pragma unroll 1
    for (int chunk = first; chunk < end; chunk++) {
      wait_for_copies<STAGES - 2>();
      __syncwarp();  // other lanes copied scales and rows of x
      fetch_weights();
      fetch_x();
      const u8* here = ring + slot * SLOT;
      const u8* xs = here + MT * TILE_BYTES;
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      Words<BITS> words[MT];
#pragma unroll
      for (int m = 0; m < MT; m++) words[m] = read_words<BITS>(here + m * TILE_BYTES, lane);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint4 b[NT];
#pragma unroll
        for (int t = 0; t < NT; t++) b[t] = *(const uint4*)(xs + (t * 8 + r) * 128 + (2 * c + half ^ r & 1) * 16);
#pragma unroll
        for (int s = half * 2; s < half * 2 + 2; s++) {
#pragma unroll
          for (int m = 0; m < MT; m++) {
            const Scale<SYM> own = read_scale<BITS, SYM>(here + m * TILE_BYTES + CHUNK_BYTES + s * UNITS / 4 * SCALE_BYTES, lane);
            const u32 low = twice_low(own.s), high = twice_high(own.s);
            u32 a[4];
            fragment<BITS>(words[m], s, twice_low(own.z), twice_high(own.z), a);
            a[0] = mul2(a[0], low); a[1] = mul2(a[1], high); a[2] = mul2(a[2], low); a[3] = mul2(a[3], high);
#pragma unroll
            for (int t = 0; t < NT; t++) mma(y[m][t], a, s % 2 ? b[t].z : b[t].x, s % 2 ? b[t].w : b[t].y);
          }
        }
      }
    }
    float* mine = sums + part * NT * 8 * WIDTH;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int t = 0; t < NT; t++)
#pragma unroll
        for (int e = 0; e < 4; e++) mine[(t * 8 + c * 2 + e % 2) * WIDTH + m * 16 + r + e / 2 * 8] = y[m][t][e];
    __syncthreads();
    auto finish = [&](int i, float begun) {
      const int row = i / OUTS, j = i % OUTS, at = EPILOGUE == SILU ? j / 8 * 16 + j % 8 : j;
      const int n = item * MT * 16 + at;
      if (row >= p.rows || n >= p.n) return;
      float v = EPILOGUE == RESIDUAL && !AHEAD ? p.residual[(size_t)row * p.n + n] : begun, up = 0.f;
#pragma unroll
      for (int w = 0; w < KS; w++) {
        const float* from = sums + (w * NT * 8 + row) * WIDTH + at;
        v += from[0];
        if constexpr (EPILOGUE == SILU) up += from[8];
      }
      if (p.bias) {
        v += to_float(p.bias[n]);
        if constexpr (EPILOGUE == SILU) up += to_float(p.bias[n + 8]);
      }
      if constexpr (EPILOGUE == SILU) p.out[(size_t)row * (p.n / 2) + item * MT * 8 + j] = to_half(v / (1.f + __expf(-v)) * up);
      else if constexpr (EPILOGUE == RESIDUAL) p.residual[(size_t)row * p.n + n] = v;
      else p.out[(size_t)row * p.n + n] = to_half(v);
    };
    if constexpr (AHEAD) {
#pragma unroll
      for (int i = 0; i < ROUNDS; i++) finish(i * KS * 32 + threadIdx.x, before[i]);
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < p.rows * OUTS; i += KS * 32) finish(i, 0.f);
    }
    __syncthreads();
  }
}
