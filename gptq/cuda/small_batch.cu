// A few rows of activations times a packed weight: Y = X W for 2 to 96 rows, of a short prompt or of several sequences.
//
// As gemv.cu, but every column of the matrix unit is a row of x: what is unpacked once is multiplied with NT * 8 of them.
// Weights are scaled before they are multiplied, so one set of sums is enough for all groups. X is too large for shared
// memory: its chunks travel beside those of the weights. KS warps share an item of MT tiles, each takes a range of chunks,
// and their sums are added in a fixed order.

template <int BITS, bool SYM, int UNITS, int MT, int NT, int KS, int STAGES, int EPILOGUE> struct SmallBatchSizes {
  static constexpr int SCALE_BYTES = SYM ? 32 : 64, CHUNK_BYTES = BITS * 128, TILE_BYTES = CHUNK_BYTES + UNITS * SCALE_BYTES;
  static constexpr int X_BYTES = NT * 8 * CHUNK * 2, SLOT = MT * TILE_BYTES + X_BYTES;
  static constexpr int WIDTH = MT * TILE + 4;  // of a row of sums, 4 apart from the banks of the next one
  static constexpr int SCALE_PIECES = UNITS * SCALE_BYTES / 16;
  static constexpr int OUTS = EPILOGUE == SILU ? MT * 8 : MT * TILE;  // outputs of an item
  static constexpr int ROUNDS = (NT * 8 * OUTS + KS * 32 - 1) / (KS * 32);
  static constexpr bool AHEAD = EPILOGUE == RESIDUAL && ROUNDS <= 4;  // more rounds would be much code that runs once
  static_assert(TILE == 16 && CHUNK == 64, "a tile is the matrix unit's 16 rows, a chunk four of its steps");
  static_assert(BITS == 2 || BITS == 3 || BITS == 4 || BITS == 8, "fragment() unpacks these");
  static_assert(UNITS == 1 || UNITS == 2 || UNITS == 4, "a chunk has four steps, and a scale lasts for whole steps");
  static_assert(STAGES >= 2, "one chunk is multiplied while another is on its way");
  static_assert(KS >= 1 && KS <= 32, "a block has at most 32 warps");
  static_assert(SLOT % 16 == 0 && TILE_BYTES % 16 == 0, "copies of 16 bytes are aligned");
};

template <int MT, int NT, typename Sizes> DEVICE void store_sums(const float (&y)[MT][NT][4], float* mine, int lane) {
  const int r = lane / 4, c = lane % 4;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
      for (int e = 0; e < 4; e++) mine[(t * 8 + c * 2 + e % 2) * Sizes::WIDTH + m * TILE + r + e / 2 * 8] = y[m][t][e];
}

// Output i of an item: the parts of all warps, what they are added to, and the epilogue.
template <int MT, int NT, int KS, int EPILOGUE, typename Sizes>
DEVICE void write_output(const SmallBatchArguments& p, const float* sums, int item, int i, float addend) {
  const int row = i / Sizes::OUTS, j = i % Sizes::OUTS, at = EPILOGUE == SILU ? j / 8 * TILE + j % 8 : j;
  const int n = item * MT * TILE + at;
  if (row >= p.rows || n >= p.n) return;
  float v = EPILOGUE == RESIDUAL && !Sizes::AHEAD ? p.residual[(size_t)row * p.n + n] : addend, up = 0.f;
#pragma unroll
  for (int w = 0; w < KS; w++) {
    const float* from = sums + (w * NT * 8 + row) * Sizes::WIDTH + at;
    v += from[0];
    if constexpr (EPILOGUE == SILU) up += from[8];
  }
  if (EPILOGUE == BFLOAT && p.powers) v *= p.powers[row];
  if (p.bias) {
    v += to_float(p.bias[n]);
    if constexpr (EPILOGUE == SILU) up += to_float(p.bias[n + 8]);
  }
  if constexpr (EPILOGUE == SILU) p.out[(size_t)row * (p.n / 2) + item * MT * 8 + j] = to_half(v / (1.f + __expf(-v)) * up);
  else if constexpr (EPILOGUE == RESIDUAL) p.residual[(size_t)row * p.n + n] = v;
  else p.out[(size_t)row * p.n + n] = EPILOGUE == BFLOAT ? to_bfloat(v) : to_half(v);
}

template <int BITS, bool SYM, int UNITS, int MT, int NT, int KS, int STAGES, int EPILOGUE>
DEVICE void small_batch(const SmallBatchArguments& p) {
  typedef SmallBatchSizes<BITS, SYM, UNITS, MT, NT, KS, STAGES, EPILOGUE> Sizes;
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  float* sums = (float*)((u8*)shared_words + KS * STAGES * Sizes::SLOT);  // [KS][NT * 8][WIDTH]
  const int per = (p.chunks + KS - 1) / KS, first = min(part * per, p.chunks), end = min(first + per, p.chunks);
  const int items = (p.tiles + MT - 1) / MT, padded = p.chunks * CHUNK;
  u8* ring = (u8*)shared_words + part * STAGES * Sizes::SLOT;  // of this warp: its chunks of the weights, and of x beside them

  int w_item = blockIdx.x, w_chunk = first, w_slot = 0, x_chunk = first, x_slot = 0;
  auto fetch_weights = [&]() {
    u8* to = ring + w_slot * Sizes::SLOT;
    if (w_item < items && w_chunk < end) {
#pragma unroll
      for (int m = 0; m < MT; m++) {
        const int tile = w_item * MT + m;
        if (tile < p.tiles) copy_words<BITS>(p.weights + ((size_t)tile * p.chunks + w_chunk) * Sizes::CHUNK_BYTES, to + m * Sizes::TILE_BYTES, lane);
      }
#pragma unroll
      for (int i = lane; i < MT * Sizes::SCALE_PIECES; i += 32) {
        const int m = i / Sizes::SCALE_PIECES, at = i % Sizes::SCALE_PIECES, tile = w_item * MT + m;
        const int unit = w_chunk * UNITS + at / (Sizes::SCALE_BYTES / 16);
        const u8* scale = (const u8*)p.scales + ((size_t)tile * p.groups + (int)(unit * p.unit_to_group >> 16)) * Sizes::SCALE_BYTES;
        if (tile < p.tiles) copy_async<16>(scale + at % (Sizes::SCALE_BYTES / 16) * 16, to + m * Sizes::TILE_BYTES + Sizes::CHUNK_BYTES + at * 16);
      }
    }
    w_slot = w_slot + 1 == STAGES ? 0 : w_slot + 1;
    if (++w_chunk >= end) { w_chunk = first; w_item += gridDim.x; }
  };
  auto fetch_x = [&]() {  // a row's 8 pieces of 16 bytes; those of odd rows are swapped in pairs, for the banks
    u8* to = ring + x_slot * Sizes::SLOT + MT * Sizes::TILE_BYTES;
#pragma unroll
    for (int t = 0; t < NT * 2; t++) {
      const int row = t * 4 + lane / 8, piece = lane % 8;
      if (row < p.rows && x_chunk < end) copy_async<16>(p.x + (size_t)row * padded + x_chunk * CHUNK + piece * 8, to + row * 128 + (piece ^ row & 1) * 16);
    }
    commit_copies();
    x_slot = x_slot + 1 == STAGES ? 0 : x_slot + 1;
    if (++x_chunk >= end) x_chunk = first;
  };

#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) fetch_weights();
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) fetch_x();

  int slot = 0;
#pragma unroll 1
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    float addends[Sizes::AHEAD ? Sizes::ROUNDS : 1];  // loaded while the sums are made
    if constexpr (Sizes::AHEAD) {
#pragma unroll
      for (int i = 0; i < Sizes::ROUNDS; i++) {
        const int at = i * KS * 32 + threadIdx.x, row = at / Sizes::OUTS, n = item * Sizes::OUTS + at % Sizes::OUTS;
        addends[i] = row < p.rows && n < p.n ? __ldcg(p.residual + (size_t)row * p.n + n) : 0.f;
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
      const u8* here = ring + slot * Sizes::SLOT;
      const u8* xs = here + MT * Sizes::TILE_BYTES;
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      Words<BITS> words[MT];
#pragma unroll
      for (int m = 0; m < MT; m++) words[m] = read_words<BITS>(here + m * Sizes::TILE_BYTES, lane);
#pragma unroll
      for (int half = 0; half < 2; half++) {  // two steps of the four
        uint4 b[NT];
#pragma unroll
        for (int t = 0; t < NT; t++) b[t] = *(const uint4*)(xs + (t * 8 + r) * 128 + (2 * c + half ^ r & 1) * 16);
#pragma unroll
        for (int s = half * 2; s < half * 2 + 2; s++) {
#pragma unroll
          for (int m = 0; m < MT; m++) {
            const u8* scales = here + m * Sizes::TILE_BYTES + Sizes::CHUNK_BYTES + s * UNITS / 4 * Sizes::SCALE_BYTES;
            u32 a[4];
            scaled_fragment<BITS, SYM>(words[m], s, read_scale<BITS, SYM>(scales, lane), a);
#pragma unroll
            for (int t = 0; t < NT; t++) mma(y[m][t], a, s % 2 ? b[t].z : b[t].x, s % 2 ? b[t].w : b[t].y);
          }
        }
      }
    }
    store_sums<MT, NT, Sizes>(y, sums + part * NT * 8 * Sizes::WIDTH, lane);
    __syncthreads();
    if constexpr (Sizes::AHEAD) {
#pragma unroll
      for (int i = 0; i < Sizes::ROUNDS; i++) write_output<MT, NT, KS, EPILOGUE, Sizes>(p, sums, item, i * KS * 32 + threadIdx.x, addends[i]);
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < p.rows * Sizes::OUTS; i += KS * 32) write_output<MT, NT, KS, EPILOGUE, Sizes>(p, sums, item, i, 0.f);
    }
    __syncthreads();
  }
}
