// 3 to 64 rows of activations times a packed weight, on Hopper and newer: Y = X W, where the blocks of a cluster share their tiles.
//
// Each block of a cluster multiplies its part of the inputs, so that a block reads only this part of X: of 16 rows X otherwise
// weighs more than the weights, because every block reads all of it through the L2. A block's WN * KS warps take MT tiles each and
// a range of its chunks. Sums are added in a fixed order: of the KS warps of a tile, then of the blocks, through their shared memory.
//
// With NORM x is the residual as octet.cu leaves it. A block norms its part of the rows but for the factor that the whole row
// gives: a power of two instead, which it takes back from its sums. The blocks add up their squares with their sums.

#if __CUDA_ARCH__ >= 900
template <int BYTES> DEVICE void copy_to(const void* from, u32 shared) {
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(BYTES) : "memory");
}

template <int BITS, bool SYM, int UNITS, int MT, int NT, int WN, int KS, int STAGES, int EPILOGUE, int NORM, int CLUSTER> struct ClusterBatchSizes {
  static constexpr int SCALE_BYTES = SYM ? 32 : 64, CHUNK_BYTES = BITS * 128, TILE_BYTES = CHUNK_BYTES + UNITS * SCALE_BYTES;
  static constexpr int ROWS = NT * 8, TILES = WN * MT, WARPS = WN * KS, THREADS = WARPS * 32;
  static constexpr int X_BYTES = NORM ? 0 : ROWS * CHUNK * 2, SLOT = MT * TILE_BYTES + X_BYTES;  // with a norm, x stays elsewhere
  static constexpr int SCALE_PIECES = UNITS * SCALE_BYTES / 16, SCALE_ROUNDS = (MT * SCALE_PIECES + 31) / 32;
  static constexpr int WIDTH = TILE + 4, PART = ROWS * WIDTH;  // floats of a tile's sums; rows 4 apart from the banks of the next one
  static constexpr int RUNS = EPILOGUE == SILU ? 2 : 4;        // of four outputs, in a tile and row
  static constexpr int ALL = TILES * ROWS * RUNS, OWN = (ALL + CLUSTER - 1) / CLUSTER, ROUNDS = (OWN + THREADS - 1) / THREADS;
  static constexpr int RING_BYTES = WARPS * STAGES * SLOT, SUMS_BYTES = KS * TILES * PART * 4;
  static constexpr int FRONT = RING_BYTES > SUMS_BYTES ? RING_BYTES : SUMS_BYTES;  // sums lie where the ring was
  static constexpr int TURNS = (ROWS + WARPS - 1) / WARPS;                             // rows that a warp norms
  static constexpr int TOGETHER = NORM == 0 || NORM >= 16 ? 1 : 16 / NORM > TURNS ? TURNS : 16 / NORM;  // of them on their way together
  static_assert(TILE == 16 && CHUNK == 64, "a tile is the matrix unit's 16 rows, a chunk four of its steps");
  static_assert(STAGES >= 2 && WARPS <= 32, "one chunk is multiplied while another is on its way; a block has 32 warps");
  static_assert(SLOT % 16 == 0 && FRONT % 16 == 0, "copies of 16 bytes are aligned");
};

// As multiply_chunk_by_rows of octet.cu, for NT columns of eight rows.
template <int BITS, bool SYM, int UNITS, int NT>
DEVICE void multiply_chunk_by_columns(const u8* words, const u8* scales, const uint4 (&b)[NT][2], int lane, float (&y)[NT][4]) {
  const Words<BITS> now = read_words<BITS>(words, lane);
  Scale<SYM> scale[UNITS];
#pragma unroll
  for (int u = 0; u < UNITS; u++) scale[u] = read_scale<BITS, SYM>(scales + u * (SYM ? 32 : 64), lane);
  float c[NT][4];
#pragma unroll
  for (int s = 0; s < 4; s++) {
    const Scale<SYM>& own = scale[s * UNITS / 4];
    u32 a[4];
    fragment<BITS>(now, s, twice_low(own.z), twice_high(own.z), a);
#pragma unroll
    for (int t = 0; t < NT; t++) {
      const uint4& v = b[t][s / 2];
      if (s * UNITS % 4 == 0) c[t][0] = c[t][1] = c[t][2] = c[t][3] = 0.f;
      mma(c[t], a, s % 2 ? v.z : v.x, s % 2 ? v.w : v.y);
    }
    if ((s + 1) * UNITS % 4 == 0) {  // the scale changes here
      const float low = low_of(own.s), high = high_of(own.s);
#pragma unroll
      for (int t = 0; t < NT; t++) {
        y[t][0] += low * c[t][0]; y[t][1] += low * c[t][1];
        y[t][2] += high * c[t][2]; y[t][3] += high * c[t][3];
      }
    }
  }
}

// This block's part of the rows, a warp for a row: x times a power of two that its squares give, times the norm's weight. Leaves
// the sum of squares of each row, and what takes the power back.
template <int NORM, int ROWS, int WARPS, int TOGETHER>
DEVICE void norm_part(const u16* x, const NormWeight<NORM>& norm, u16* shared, int pitch, int padded, int count, int rows, float eps, float* squares, float* back) {
  constexpr int TURNS = (ROWS + WARPS - 1) / WARPS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int turn = 0; turn < TURNS; turn += TOGETHER) {
    uint4 mine[TOGETHER][NORM];
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
      const int row = (turn + j) * WARPS + warp;
#pragma unroll
      for (int i = 0; i < NORM; i++) {
        const int at = (i * 32 + lane) * 8;
        mine[j][i] = turn + j < TURNS && row < rows && at < count ? __ldcg((const uint4*)(x + (size_t)row * padded + at)) : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
      const int row = (turn + j) * WARPS + warp;
      if (turn + j >= TURNS || row >= rows) continue;
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < NORM; i++) {
        const u32* m = &mine[j][i].x;
#pragma unroll
        for (int k = 0; k < 4; k++) { const float a = low_of(m[k]), b = high_of(m[k]); sum += a * a + b * b; }
      }
      sum = warp_sum(sum);
      const int exponent = min(max((__float_as_int(rsqrtf(sum / max(count, 1) + eps)) >> 23) - 127, -14), 15);
      const u32 power = (u32)(exponent + 15) * 0x04000400u;  // twice, as fp16
      if (lane == 0) { squares[row] = sum; back[row] = __int_as_float((127 - exponent) << 23); }
#pragma unroll
      for (int i = 0; i < NORM; i++) {
        const int at = (i * 32 + lane) * 8;
        const uint4 m = mine[j][i], w = norm.run[i];
        if (at < count)
          *(uint4*)(shared + row * pitch + at) =
              make_uint4(mul2(mul2(m.x, power), w.x), mul2(mul2(m.y, power), w.y), mul2(mul2(m.z, power), w.z), mul2(mul2(m.w, power), w.w));
      }
    }
  }
}

template <int BITS, bool SYM, int UNITS, int MT, int NT, int WN, int KS, int STAGES, int EPILOGUE, int NORM, int CLUSTER>
DEVICE void cluster_batch(const OctetArguments& p) {
  typedef ClusterBatchSizes<BITS, SYM, UNITS, MT, NT, WN, KS, STAGES, EPILOGUE, NORM, CLUSTER> Sizes;
  constexpr int TILES = Sizes::TILES, ROWS = Sizes::ROWS, RUNS = Sizes::RUNS, THREADS = Sizes::THREADS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wn = warp % WN, part = warp / WN, r = lane / 4, c = lane % 4;
  const int rank = blockIdx.x % CLUSTER, share = (p.chunks + CLUSTER - 1) / CLUSTER, padded = p.chunks * CHUNK;
  const int from = min(rank * share, p.chunks), own = min(share, p.chunks - from), pitch = share * CHUNK + 8;
  const int per = (own + KS - 1) / KS, first = from + min(part * per, own), end = min(first + per, from + own);
  const int items = (p.tiles + TILES - 1) / TILES, clusters = gridDim.x / CLUSTER;
  u8* ring = (u8*)shared_words + warp * STAGES * Sizes::SLOT;
  float* sums = (float*)shared_words;                      // [KS][TILES][ROWS][WIDTH]
  u16* xs = (u16*)((u8*)shared_words + Sizes::FRONT);      // [ROWS][pitch], NORM only
  float* squares = (float*)(xs + (NORM ? ROWS * pitch : 0));  // [ROWS]
  float* back = squares + ROWS;                               // [ROWS]

  // What is copied next: weights of this item's chunks, and without a norm x beside them. What a copy needs is kept from step to
  // step. Beyond the last tile and the last row, those are copied again: what is made of them is not written.
  const u32 stride = p.chunks * Sizes::CHUNK_BYTES, ring_at = shared_at(ring), words_to = ring_at + lane * (BITS < 4 ? 8 : 16);
  const u32 x_to = ring_at + MT * Sizes::TILE_BYTES + lane / 8 * 128 + (lane % 8 ^ lane / 8 & 1) * 16;  // odd rows' pieces are swapped in pairs
  int left = 0, next = 0;  // tiles of this warp that there are; the chunk
  u32 slot_at = 0, row_at[NT * 2];
  const u8 *word_at, *scale_at[Sizes::SCALE_ROUNDS], *x_at;
#pragma unroll
  for (int t = 0; t < NT * 2; t++) row_at[t] = min(t * 4 + lane / 8, p.rows - 1) * padded * 2;
  auto begin_item = [&](int item) {
    const int tile = min(item * TILES + wn * MT, p.tiles - 1);
    left = p.tiles - tile;
    word_at = p.weights + (size_t)tile * stride + first * Sizes::CHUNK_BYTES + lane * (BITS < 4 ? 8 : 16);
    x_at = (const u8*)p.x + first * CHUNK * 2 + lane % 8 * 16;
#pragma unroll
    for (int i = 0; i < Sizes::SCALE_ROUNDS; i++) {
      const int m = min((i * 32 + lane) / Sizes::SCALE_PIECES, left - 1), at = (i * 32 + lane) % Sizes::SCALE_PIECES % (Sizes::SCALE_BYTES / 16);
      scale_at[i] = (const u8*)p.scales + (size_t)(tile + m) * p.groups * Sizes::SCALE_BYTES + at * 16;
    }
    next = first;
    slot_at = 0;
  };
  auto fetch_weights = [&]() {
    if (next >= end) return;
    const u8* at = word_at;
    const u32 to = words_to + slot_at;
#pragma unroll
    for (int m = 0; m < MT; m++, at += m < left ? stride : 0) {
      if constexpr (BITS < 4) {
        copy_to<8>(at, to + m * Sizes::TILE_BYTES);
        if constexpr (BITS == 3) copy_to<4>(at + 256 - lane * 4, to + m * Sizes::TILE_BYTES + 256 - lane * 4);
      } else {
#pragma unroll
        for (int i = 0; i < BITS / 4; i++) copy_to<16>(at + i * 512, to + m * Sizes::TILE_BYTES + i * 512);
      }
    }
#pragma unroll
    for (int i = 0; i < Sizes::SCALE_ROUNDS; i++) {
      const int piece = i * 32 + lane, m = piece / Sizes::SCALE_PIECES, at = piece % Sizes::SCALE_PIECES;
      const u32 unit = next * UNITS + at / (Sizes::SCALE_BYTES / 16);
      if (m < MT) copy_to<16>(scale_at[i] + (unit * p.unit_to_group >> 16) * Sizes::SCALE_BYTES, ring_at + slot_at + m * Sizes::TILE_BYTES + Sizes::CHUNK_BYTES + at * 16);
    }
  };
  auto fetch_x = [&]() {
    if constexpr (NORM == 0) {
      if (next < end) {
#pragma unroll
        for (int t = 0; t < NT * 2; t++) copy_to<16>(x_at + row_at[t], x_to + slot_at + t * 512);
      }
    }
  };
  auto advance = [&]() {
    next++;
    word_at += Sizes::CHUNK_BYTES;
    x_at += CHUNK * 2;
    slot_at = slot_at == (STAGES - 1) * Sizes::SLOT ? 0 : slot_at + Sizes::SLOT;
  };

  begin_item(blockIdx.x / CLUSTER);
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) {
    fetch_weights();
    if constexpr (NORM > 0) commit_copies();
    advance();
  }
  allow_next_kernel_to_start();
  NormWeight<NORM> norm;
  if constexpr (NORM > 0) {
#pragma unroll
    for (int i = 0; i < NORM; i++) {
      const int at = (i * 32 + lane) * 8;
      if (at < own * CHUNK) norm.run[i] = __ldg((const uint4*)(p.norm + from * CHUNK + at));
    }
  }
  wait_for_previous_kernel();
  if constexpr (NORM > 0) {
    norm_part<NORM, ROWS, Sizes::WARPS, Sizes::TOGETHER>(p.x + from * CHUNK, norm, xs, pitch, padded, own * CHUNK, p.rows, p.eps, squares, back);
    __syncthreads();
  } else {
    begin_item(blockIdx.x / CLUSTER);
#pragma unroll 1
    for (int i = 0; i < STAGES - 1; i++) { fetch_x(); commit_copies(); advance(); }
  }

#pragma unroll 1
  for (int item = blockIdx.x / CLUSTER; item < items; item += clusters) {
    // Outputs that this thread ends with: runs of four, RUNS of each tile and row.
    int run, at, row;
    auto find_run = [&](int round) {
      const int i = round * THREADS + threadIdx.x, unit = rank * Sizes::OWN + i;
      run = unit % RUNS; at = unit / RUNS % TILES; row = unit / (RUNS * TILES);
      return i < Sizes::OWN && unit < Sizes::ALL && row < p.rows && item * TILES + at < p.tiles;
    };
    float4 addend;
    int4 places;
    auto load_addend = [&]() {
      const int n = (item * TILES + at) * TILE + run * 4;
      addend = __ldcg((const float4*)(p.residual + (size_t)row * p.n + n));
      if (p.out) places = __ldg((const int4*)(p.permutation + n));
    };
    if (EPILOGUE == RESIDUAL && Sizes::ROUNDS == 1 && find_run(0)) load_addend();  // while the sums are made
    float y[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int t = 0; t < NT; t++) y[m][t][0] = y[m][t][1] = y[m][t][2] = y[m][t][3] = 0.f;
    int slot = 0;
#pragma unroll 1
    for (int chunk = first; chunk < end; chunk++) {
      wait_for_copies<STAGES - 2>();
      __syncwarp();  // other lanes copied scales and rows of x
      fetch_weights();
      fetch_x();
      commit_copies();
      advance();
      const u8* here = ring + slot * Sizes::SLOT;
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      uint4 b[NT][2];
#pragma unroll
      for (int t = 0; t < NT; t++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          if constexpr (NORM > 0) b[t][half] = *(const uint4*)(xs + (t * 8 + r) * pitch + (chunk - from) * CHUNK + c * 16 + half * 8);
          else b[t][half] = *(const uint4*)(here + MT * Sizes::TILE_BYTES + (t * 8 + r) * 128 + (2 * c + half ^ r & 1) * 16);
        }
#pragma unroll
      for (int m = 0; m < MT; m++) {
        const u8* words = here + m * Sizes::TILE_BYTES;
        multiply_chunk_by_columns<BITS, SYM, UNITS, NT>(words, words + Sizes::CHUNK_BYTES, b, lane, y[m]);
      }
    }
    __syncthreads();  // nobody reads the ring
    float* mine = sums + (part * TILES + wn * MT) * Sizes::PART;
#pragma unroll
    for (int t = 0; t < NT; t++) {
      const int row = t * 8 + c * 2;
      const float2 factor = NORM ? *(const float2*)(back + row) : make_float2(1.f, 1.f);
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          mine[m * Sizes::PART + (row + e % 2) * Sizes::WIDTH + r + e / 2 * 8] = NORM ? y[m][t][e] * (e % 2 ? factor.y : factor.x) : y[m][t][e];
    }
    if constexpr (KS > 1) {
      __syncthreads();
#pragma unroll 2
      for (int i = threadIdx.x; i < TILES * ROWS * 4; i += THREADS) {
        float4* at = (float4*)(sums + i / (ROWS * 4) * Sizes::PART + i / 4 % ROWS * Sizes::WIDTH + i % 4 * 4);
        float4 v = *at;
#pragma unroll
        for (int k = 1; k < KS; k++) {
          const float4 more = *(const float4*)((const float*)at + k * TILES * Sizes::PART);
          v.x += more.x; v.y += more.y; v.z += more.z; v.w += more.w;
        }
        *at = v;
      }
    }
    arrive_at_cluster();
    wait_for_cluster();
#pragma unroll 1
    for (int round = 0; round < Sizes::ROUNDS; round++) {
      if (!find_run(round)) continue;
      if (EPILOGUE == RESIDUAL && Sizes::ROUNDS > 1) load_addend();
      const float* from = sums + at * Sizes::PART + row * Sizes::WIDTH + run * 4;
      float v[4] = {0.f, 0.f, 0.f, 0.f}, up[4] = {0.f, 0.f, 0.f, 0.f}, total[1] = {0.f};
#pragma unroll
      for (int block = 0; block < CLUSTER; block++) {
        add_of_block<4>(from, block, v);
        if constexpr (EPILOGUE == SILU) add_of_block<4>(from + 8, block, up);
        if constexpr (NORM > 0) add_of_block<1>(squares + row, block, total);
      }
      const float scale = NORM ? rsqrtf(total[0] / p.k + p.eps) : 1.f;
      const int tile = item * TILES + at, n = tile * TILE + run * 4;
      uint2 bias = make_uint2(0, 0), up_bias = bias;
      if (p.bias) {
        bias = __ldg((const uint2*)(p.bias + n));
        if constexpr (EPILOGUE == SILU) up_bias = __ldg((const uint2*)(p.bias + n + 8));
      }
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const u32 *of = &bias.x, *of_up = &up_bias.x;
        v[e] = v[e] * scale + (e % 2 ? high_of(of[e / 2]) : low_of(of[e / 2]));
        if constexpr (EPILOGUE == SILU) v[e] = v[e] / (1.f + __expf(-v[e])) * (up[e] * scale + (e % 2 ? high_of(of_up[e / 2]) : low_of(of_up[e / 2])));
      }
      u16* out = p.out + (size_t)row * p.out_stride;
      if constexpr (EPILOGUE == RESIDUAL) {
        const float4 w = make_float4(addend.x + v[0], addend.y + v[1], addend.z + v[2], addend.w + v[3]);
        *(float4*)(p.residual + (size_t)row * p.n + n) = w;
        if (p.out) store_output(out, places, w);
      } else *(uint2*)(out + (EPILOGUE == SILU ? tile * 8 + run * 4 : n)) = make_uint2(to_half2(v[0], v[1]), to_half2(v[2], v[3]));
    }
    __syncwarp();
    begin_in_cluster();  // what this block has read in the others is in its outputs
    wait_for_cluster();  // the others have read what is in this one
    if (item + clusters < items) {
      begin_item(item + clusters);
#pragma unroll 1
      for (int i = 0; i < STAGES - 1; i++) { fetch_weights(); fetch_x(); commit_copies(); advance(); }
    }
  }
}
#else
template <int BITS, bool SYM, int UNITS, int MT, int NT, int WN, int KS, int STAGES, int EPILOGUE, int NORM, int CLUSTER>
DEVICE void cluster_batch(const OctetArguments& p) {}
#endif
