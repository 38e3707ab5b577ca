// Many rows of activations times a packed weight: Y = X W for 17 rows and more, of a prompt or of many sequences.
//
// As small_batch.cu, but the warps of a block share X: a chunk of NT * 8 rows comes into shared memory once for WN * MT
// tiles; these outputs of these rows are an item. WK groups of WN warps take a chunk each of the WK that are there at a
// time. The steps of all items are one row of work, cut into equal ranges, one for each block. So an item may be made by
// several blocks: each leaves its sums in `partial`, and the last one to arrive adds them, in the order of the blocks. A
// row's bits do not depend on who is last. With one item in the height, they do not depend on the other rows either.
//
// WARPGROUP (Hopper): four warps multiply together, with X straight from shared memory (warpgroup.cu).
//
// GroupedArguments: of a mixture's experts, each of which multiplies rows of its own. A table that a kernel has made
// (expert_prompts.cu) says which rows: of one expert, at most as many as an item has. A row's bits do not depend on who is last there
// either, but on its place in the table, which is the same for the same rows.

DEVICE constexpr bool is_grouped(const WideBatchArguments*) { return false; }
DEVICE constexpr bool is_grouped(const GroupedArguments*) { return true; }

template <int BITS, bool SYM, int UNITS, int MT, int NT, int WN, int WK, int STAGES, int EPILOGUE, bool WARPGROUP> struct WideBatchSizes {
  static constexpr int SCALE_BYTES = SYM ? 32 : 64, CHUNK_BYTES = BITS * 128, TILE_BYTES = CHUNK_BYTES + UNITS * SCALE_BYTES;
  static constexpr int TILES = WN * MT, ROWS = NT * 8, X_BYTES = ROWS * CHUNK * 2;
  static constexpr int ALIGNED = WARPGROUP ? 1024 : 16;  // where the pattern of swapped pieces begins anew
  static constexpr int PART = (X_BYTES + TILES * TILE_BYTES + ALIGNED - 1) / ALIGNED * ALIGNED, SLOT = WK * PART;
  static constexpr int AHEAD = STAGES - 1 - WARPGROUP;  // slots on their way: a warpgroup still reads the one before its own
  static constexpr int WORD_PIECES = CHUNK_BYTES / 16, SCALE_PIECES = UNITS * SCALE_BYTES / 16;
  static constexpr int SCALE_ROUNDS = (MT * SCALE_PIECES + 31) / 32, X_ROUNDS = (ROWS + WN * 4 - 1) / (WN * 4);  // copies of a lane
  static constexpr int OWN = MT / WK;  // tiles that a warp keeps when the sums of the WK groups are added
  static constexpr int OUTS = OWN * (EPILOGUE == SILU ? 8 : TILE), WIDTH = OUTS + 4;  // rows 4 apart from the next one's banks
  static constexpr int AT_ONCE = NT < 4 || MT > 2 ? 2 : 4;  // columns: so products that add to the same sums are apart
  static_assert(TILE == 16 && CHUNK == 64, "a tile is the matrix unit's 16 rows, a chunk four of its steps");
  static_assert(WARPGROUP || WN % 2 == 0 || X_ROUNDS == 1, "the rows that a lane copies are all odd, or all even");
  static_assert(MT % WK == 0, "every warp keeps as many tiles");
  static_assert(NT % AT_ONCE == 0, "columns are taken in whole bundles");
  static_assert(!WARPGROUP || (NT % 4 == 0 && WN % 4 == 0 && WK == 1), "a warpgroup is four warps; there are products of 32, 64, 96, 128 rows");
  static_assert(AHEAD >= 1 + WARPGROUP && WN * WK <= 32, "one slot is multiplied while another is on its way; a block has 32 warps");
  static_assert(PART % 16 == 0 && TILE_BYTES % 16 == 0, "copies of 16 bytes are aligned");
};

// Adds to memory, without waiting for what was there. One thread adds to an address, so the sum is the same every time.
DEVICE void add_to(float* at, float v) { asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at), "f"(v) : "memory"); }

// The sums of the WK groups, in their order -> z, the tiles that this warp keeps.
template <int MT, int NT, int WN, int WK> DEVICE void add_groups(const float (&y)[MT][NT][4], float (&z)[MT / WK][NT][4], float4* shared) {
  constexpr int OWN = MT / WK;
  const int lane = threadIdx.x % 32, wn = threadIdx.x / 32 % WN, part = threadIdx.x / 32 / WN;
#pragma unroll
  for (int k = 0; k < OWN; k++) {
    __syncthreads();
#pragma unroll
    for (int to = 0; to < WK; to++) {
      float4* at = shared + ((to * WK + part) * WN + wn) * NT * 32 + lane;
      if (to != part) {
#pragma unroll
        for (int t = 0; t < NT; t++) at[t * 32] = make_float4(y[to * OWN + k][t][0], y[to * OWN + k][t][1], y[to * OWN + k][t][2], y[to * OWN + k][t][3]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int to = 0; to < WK; to++) {
      if (to == part) {
#pragma unroll
        for (int t = 0; t < NT; t++) {
          z[k][t][0] = z[k][t][1] = z[k][t][2] = z[k][t][3] = 0.f;
#pragma unroll
          for (int from = 0; from < WK; from++) {
            const float* own = y[to * OWN + k][t];
            const float4 v = from == to ? make_float4(own[0], own[1], own[2], own[3]) : shared[((to * WK + from) * WN + wn) * NT * 32 + t * 32 + lane];
            z[k][t][0] += v.x; z[k][t][1] += v.y; z[k][t][2] += v.z; z[k][t][3] += v.w;
          }
        }
      }
    }
  }
  __syncthreads();
}

// Eight rows at a time through the warp's own shared memory, so that neighbours of a row are written together.
// `limit`: the first row behind them.
template <int NT, int OWN, int EPILOGUE, typename Sizes, class Given>
DEVICE void write_rows(const Given& p, float (&z)[OWN][NT][4], int tile, int first_row, int limit, float* mine) {
  constexpr bool GROUPED = is_grouped((const Given*)nullptr);
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int width = EPILOGUE == SILU ? p.n / 2 : p.n, from = tile * (EPILOGUE == SILU ? 8 : TILE);
  float low[OWN], high[OWN];
#pragma unroll
  for (int k = 0; k < OWN; k++) {
    low[k] = high[k] = 0.f;
    if constexpr (!GROUPED) {
      const bool biased = p.bias && tile + k < p.tiles;
      low[k] = biased ? to_float(p.bias[(tile + k) * TILE + r]) : 0.f;
      high[k] = biased ? to_float(p.bias[(tile + k) * TILE + r + 8]) : 0.f;
    }
  }
#pragma unroll
  for (int t = 0; t < NT; t++) {
    if (first_row + t * 8 >= limit) break;
    __syncwarp();
#pragma unroll
    for (int k = 0; k < OWN; k++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float v = z[k][t][e] + low[k], w = z[k][t][e + 2] + high[k];
        float* to = mine + (c * 2 + e) * Sizes::WIDTH + r;
        if constexpr (EPILOGUE == SILU) to[k * 8] = v / (1.f + __expf(-v)) * w;
        else { to[k * TILE] = v; to[k * TILE + 8] = w; }
      }
    }
    __syncwarp();
    if constexpr (EPILOGUE == RESIDUAL) {
#pragma unroll
      for (int i = lane; i < 8 * Sizes::OUTS; i += 32) {
        const int row = first_row + t * 8 + i / Sizes::OUTS, n = from + i % Sizes::OUTS;
        if (row < limit && n < width) add_to(p.residual + (size_t)row * width + n, mine[i / Sizes::OUTS * Sizes::WIDTH + i % Sizes::OUTS]);
      }
    } else if (width % 2 == 0) {
#pragma unroll
      for (int i = lane; i < 4 * Sizes::OUTS; i += 32) {
        const int row = first_row + t * 8 + i / (Sizes::OUTS / 2), j = i % (Sizes::OUTS / 2) * 2;
        const float2 v = *(const float2*)(mine + i / (Sizes::OUTS / 2) * Sizes::WIDTH + j);
        int at = from + j;
        if constexpr (GROUPED) at = p.turned ? at & ~63 | at % 16 / 4 * 16 | at % 64 / 16 * 4 | at % 4 : at;  // in fragment order
        if (row < limit && from + j < width) *(u32*)(p.out + (size_t)row * width + at) = to_half2(v.x, v.y);
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < 8 * Sizes::OUTS; i += 32) {
        const int row = first_row + t * 8 + i / Sizes::OUTS, n = from + i % Sizes::OUTS;
        if (row < limit && n < width) p.out[(size_t)row * width + n] = to_half(mine[i / Sizes::OUTS * Sizes::WIDTH + i % Sizes::OUTS]);
      }
    }
  }
}

template <int BITS, bool SYM, int UNITS, int MT, int NT, int WN, int WK, int STAGES, int EPILOGUE, bool WARPGROUP, class Given>
DEVICE void wide_batch(const Given& p) {
  typedef WideBatchSizes<BITS, SYM, UNITS, MT, NT, WN, WK, STAGES, EPILOGUE, WARPGROUP> Sizes;
  constexpr int OWN = Sizes::OWN, TILES = Sizes::TILES, AHEAD = Sizes::AHEAD;
  constexpr bool GROUPED = is_grouped((const Given*)nullptr);
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
  static_assert(!WARPGROUP, "warps multiply together on Hopper only");
#endif
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wn = warp % WN, part = warp / WN, r = lane / 4, c = lane % 4;
  u8* ring = (u8*)shared_words;
  if constexpr (WARPGROUP) ring += -(u32)__cvta_generic_to_shared(ring) % 1024;
  float* exchange = (float*)(ring + STAGES * Sizes::SLOT);
  __shared__ u32 arrived;
  u32 high;  // items in the height
  if constexpr (GROUPED) {
    allow_next_kernel_to_start();
    wait_for_previous_kernel();
    high = __ldcg(p.table);
  } else high = (p.rows + Sizes::ROWS - 1) / Sizes::ROWS;
  const u32 per = (p.chunks + WK - 1) / WK;  // steps of an item
  const u64 total = (u64)(p.tiles + TILES - 1) / TILES * high * per;
  const u32 blocks = GROUPED ? (u32)min((u64)gridDim.x, max(total / 2, 1ull)) : gridDim.x;  // each has work
  if (GROUPED && blockIdx.x >= blocks) return;
  const u32 begin = (u32)(total * blockIdx.x / blocks), end = (u32)(total * (blockIdx.x + 1) / blocks);
  auto block_of = [&](u32 at) { return (u32)(((u64)(at + 1) * blocks - 1) / total); };

  // What is copied next. Everything that a copy needs is kept from step to step, because the copies of a step are many. Beyond
  // the last tile and the last row, those two are copied again: what is made of them is not written.
  const u8 *word_at[MT], *scale_at[Sizes::SCALE_ROUNDS], *x_at;
  u32 row_at[Sizes::X_ROUNDS], next = begin, next_item, next_step;
  int next_slot = 0;
  auto begin_item = [&]() {
    const int tile = next_item / high * TILES + wn * MT, chunk = next_step * WK + part;
    const u8 *words = p.weights, *scales = (const u8*)p.scales;
    [[maybe_unused]] int4 own;  // expert, first row, rows
    if constexpr (GROUPED) {
      own = __ldcg((const int4*)p.table + 1 + next_item % high);
      words += own.x * p.weight_bytes; scales += own.x * p.scale_bytes;
    }
#pragma unroll
    for (int m = 0; m < MT; m++) word_at[m] = words + ((size_t)min(tile + m, p.tiles - 1) * p.chunks + chunk) * Sizes::CHUNK_BYTES + lane * 16;
#pragma unroll
    for (int i = 0; i < Sizes::SCALE_ROUNDS; i++) {
      const int m = (i * 32 + lane) / Sizes::SCALE_PIECES, at = (i * 32 + lane) % Sizes::SCALE_PIECES % (Sizes::SCALE_BYTES / 16);
      scale_at[i] = scales + (size_t)min(tile + m, p.tiles - 1) * p.groups * Sizes::SCALE_BYTES + at * 16;
    }
    x_at = (const u8*)p.x + chunk * 128 + lane % 8 * 16;
    if constexpr (GROUPED) {
#pragma unroll
      for (int i = 0; i < Sizes::X_ROUNDS; i++) {
        const int row = own.y + min((wn + i * WN) * 4 + lane / 8, own.z - 1);
        row_at[i] = (u32)(p.sources ? __ldcg(p.sources + row) : row) * p.chunks * 128;
      }
    } else {
      const int first_row = next_item % high * Sizes::ROWS;
      x_at += (size_t)first_row * p.chunks * 128;
#pragma unroll
      for (int i = 0; i < Sizes::X_ROUNDS; i++) row_at[i] = min((wn + i * WN) * 4 + lane / 8, p.rows - 1 - first_row) * p.chunks * 128;
    }
  };
  auto begin_at = [&](u32 at) {
    next = at; next_item = at / per; next_step = at % per;
    begin_item();
  };
  auto advance = [&]() {
    next++;
    next_slot = next_slot + 1 == STAGES ? 0 : next_slot + 1;
    if (++next_step == per) {
      next_step = 0; next_item++;
      if (next < end) begin_item();
    } else {
#pragma unroll
      for (int m = 0; m < MT; m++) word_at[m] += WK * Sizes::CHUNK_BYTES;
      x_at += WK * 128;
    }
  };
  auto here = [&]() { return next < end && (WK == 1 || next_step * WK + part < p.chunks); };
  auto copy_weights = [&]() {
    if (!here()) return;
    u8* to = ring + next_slot * Sizes::SLOT + part * Sizes::PART + Sizes::X_BYTES + wn * MT * Sizes::TILE_BYTES;
    u8* words = to + (WARPGROUP ? turned_piece<BITS>(lane) : lane) * 16;
    if (lane < Sizes::WORD_PIECES) {
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < Sizes::WORD_PIECES || i == 0; i += 32) copy_async<16>(word_at[m] + i * 16, words + m * Sizes::TILE_BYTES + i * 16);
    }
#pragma unroll
    for (int i = 0; i < Sizes::SCALE_ROUNDS; i++) {
      const int piece = i * 32 + lane, m = piece / Sizes::SCALE_PIECES, at = piece % Sizes::SCALE_PIECES;
      const u32 unit = (next_step * WK + part) * UNITS + at / (Sizes::SCALE_BYTES / 16);
      if (m < MT) copy_async<16>(scale_at[i] + (unit * p.unit_to_group >> 16) * Sizes::SCALE_BYTES, to + m * Sizes::TILE_BYTES + Sizes::CHUNK_BYTES + at * 16);
    }
  };
  auto copy_x = [&]() {  // a row's 8 pieces of 16 bytes are swapped, for the banks
    if (!here()) return;
    const int row = wn * 4 + lane / 8;
    u8* to = ring + next_slot * Sizes::SLOT + part * Sizes::PART + row * 128 + (lane % 8 ^ row & (WARPGROUP ? 7 : 1)) * 16;
#pragma unroll
    for (int i = 0; i < Sizes::X_ROUNDS; i++)
      if (Sizes::ROWS % (WN * 4) == 0 || row + i * WN * 4 < Sizes::ROWS) copy_async<16>(x_at + row_at[i], to + i * WN * 512);
  };

  begin_at(begin);
#pragma unroll 1
  for (int i = 0; i < AHEAD; i++) { copy_weights(); advance(); }
  if constexpr (!GROUPED) {
    allow_next_kernel_to_start();
    wait_for_previous_kernel();
  }
  begin_at(begin);
  next_slot = 0;
#pragma unroll 1
  for (int i = 0; i < AHEAD; i++) { copy_x(); commit_copies(); advance(); }
  int slot = 0;
  u32 a[2][MT][4];  // fragments of two of a chunk's four steps
  [[maybe_unused]] Scale<SYM> scale[MT][2];  // of a warpgroup's chunk
  auto fetch_next = [&]() {
    copy_weights();
    copy_x();
    commit_copies();
    advance();
  };
  auto weights_in = [&](int slot) { return ring + slot * Sizes::SLOT + part * Sizes::PART + Sizes::X_BYTES + wn * MT * Sizes::TILE_BYTES; };
  auto read_scales = [&](const u8* ws) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        scale[m][i] = read_scale<BITS, SYM>(ws + m * Sizes::TILE_BYTES + Sizes::CHUNK_BYTES + (c / 2 + i * 2) * UNITS / 4 * Sizes::SCALE_BYTES, lane);
  };
  auto unpack_turned = [&](const u8* ws, int s, u32 (&to)[MT][4]) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
      u32 v[2], third = 0;
      turned_words<BITS>(ws + m * Sizes::TILE_BYTES, r, c, s, v, third);
      turned_fragment<BITS, SYM>(v, third, c, scale[m], to[m]);
    }
  };
  if constexpr (WARPGROUP) {
    wait_for_copies<AHEAD - 1>();
    show_copies_to_warpgroups();
    __syncthreads();
    read_scales(weights_in(0));
    unpack_turned(weights_in(0), 0, a[0]);
  }

#pragma unroll 1
  for (u32 at = begin; at < end;) {
    const u32 item = at / per, first = at - item * per, last = min(per, first + end - at);
    at += last - first;
    float y[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int t = 0; t < NT; t++) y[m][t][0] = y[m][t][1] = y[m][t][2] = y[m][t][3] = 0.f;
#pragma unroll 1
    for (u32 step = first; step < last; step++) {
      const u8* xs = ring + slot * Sizes::SLOT + part * Sizes::PART;
      const u8* ws = weights_in(slot);
      slot = slot + 1 == STAGES ? 0 : slot + 1;
      if constexpr (WARPGROUP) {
        const u64 b = describe(xs);
#pragma unroll
        for (int s = 0; s < 4; s++) {
          warpgroup_begin();
#pragma unroll
          for (int m = 0; m < MT; m++) warpgroup_mma(y[m], a[s % 2][m], b + s * 2);  // 32 bytes of each row
          warpgroup_commit();
          if (s == 0) {  // while that goes on: the next slot has arrived, and nobody reads the one before this one
            wait_for_copies<AHEAD - 2>();
            show_copies_to_warpgroups();
            __syncthreads();
            fetch_next();
          }
          warpgroup_wait<1>();  // the product before, whose fragments are replaced now
          if (s == 3) read_scales(weights_in(slot));
          unpack_turned(s == 3 ? weights_in(slot) : ws, (s + 1) % 4, a[(s + 1) % 2]);
        }
      } else {
        wait_for_copies<AHEAD - 1>();
        __syncthreads();
        fetch_next();
        if (WK > 1 && step * WK + part >= p.chunks) continue;
        Words<BITS> words[MT];
#pragma unroll
        for (int m = 0; m < MT; m++) words[m] = read_words<BITS>(ws + m * Sizes::TILE_BYTES, lane);
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
          for (int i = 0; i < 2; i++)
#pragma unroll
            for (int m = 0; m < MT; m++) {
              const int s = half * 2 + i;
              const u8* scales = ws + m * Sizes::TILE_BYTES + Sizes::CHUNK_BYTES + s * UNITS / 4 * Sizes::SCALE_BYTES;
              scaled_fragment<BITS, SYM>(words[m], s, read_scale<BITS, SYM>(scales, lane), a[i][m]);
            }
#pragma unroll
          for (int t = 0; t < NT; t += Sizes::AT_ONCE) {
            uint4 b[Sizes::AT_ONCE];
#pragma unroll
            for (int i = 0; i < Sizes::AT_ONCE; i++) b[i] = *(const uint4*)(xs + ((t + i) * 8 + r) * 128 + (2 * c + half ^ r & 1) * 16);
#pragma unroll
            for (int s = 0; s < 2; s++)
#pragma unroll
              for (int i = 0; i < Sizes::AT_ONCE; i++)
#pragma unroll
                for (int m = 0; m < MT; m++) mma(y[m][t + i], a[s][m], s ? b[i].z : b[i].x, s ? b[i].w : b[i].y);
          }
        }
      }
    }
    if constexpr (WARPGROUP) {
      warpgroup_wait<0>();
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int t = 0; t < NT; t++)
#pragma unroll
          for (int e = 0; e < 4; e++) asm volatile("" : "+f"(y[m][t][e])::"memory");  // not read before the wait
    }

    float z[OWN][NT][4];
    if constexpr (WK > 1) add_groups<MT, NT, WN, WK>(y, z, (float4*)exchange);
    else {
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int t = 0; t < NT; t++)
#pragma unroll
          for (int e = 0; e < 4; e++) z[m][t][e] = y[m][t][e];
    }
    if (last - first < per) {  // other blocks have the rest
      const u32 before = block_of(item * per), parts = block_of(item * per + per - 1) - before + 1;
      // A block begins in the middle of one item at most, and ends before the end of one at most.
      auto sums = [&](u32 of) { return (float4*)p.partial + ((size_t)((before + of) * 2 + (of == 0)) * WN * WK + warp) * OWN * NT * 32 + lane; };
      float4* to = sums(blockIdx.x - before);
#pragma unroll
      for (int k = 0; k < OWN; k++)
#pragma unroll
        for (int t = 0; t < NT; t++) __stcg(to + (k * NT + t) * 32, make_float4(z[k][t][0], z[k][t][1], z[k][t][2], z[k][t][3]));
      __syncthreads();
      if (threadIdx.x == 0) arrived = count_arrival(p.done + item);
      __syncthreads();
      if (arrived + 1 < parts) continue;
      if (threadIdx.x == 0) p.done[item] = 0;  // for the next launch
      if (parts > 2) {
#pragma unroll
        for (int k = 0; k < OWN; k++)
#pragma unroll
          for (int t = 0; t < NT; t++) z[k][t][0] = z[k][t][1] = z[k][t][2] = z[k][t][3] = 0.f;
      }
#pragma unroll 1
      for (u32 of = 0; of < parts; of++) {
        if (parts == 2 && before + of == blockIdx.x) continue;  // a sum of two is the same in either order
        const float4* from = sums(of);
#pragma unroll
        for (int k = 0; k < OWN; k++)
#pragma unroll
          for (int t = 0; t < NT; t++) {
            const float4 v = __ldcg(from + (k * NT + t) * 32);
            z[k][t][0] += v.x; z[k][t][1] += v.y; z[k][t][2] += v.z; z[k][t][3] += v.w;
          }
      }
    }
    int first_row = item % high * Sizes::ROWS, limit;
    if constexpr (GROUPED) {
      const int4 own = __ldcg((const int4*)p.table + 1 + item % high);
      first_row = own.y; limit = own.y + own.z;
    } else limit = p.rows;
    write_rows<NT, OWN, EPILOGUE, Sizes>(p, z, item / high * TILES + wn * MT + part * OWN, first_row, limit, exchange + warp * 8 * Sizes::WIDTH);
  }
}
