// Two to eight rows of activations times a packed weight: the columns of the matrix unit that gemv.cu leaves empty are rows.
//
// As gemv.cu: a team of KS warps shares a tile, and its sums are added in a fixed order, the same for every row. x of all rows is
// staged in shared memory, normed if NORM; SPAN: as digits (octet_digits.cu), 0: as fp16. FOLLOW: of a warp's weights some follow x.
// Where x does not fit, CLUSTER blocks (Hopper and newer) share their tiles: each stages and multiplies its part of the inputs, and
// reads the other parts' sums from their shared memory at the end. Or SHARERS blocks with tiles of their own make x's digits together.

// -- x of up to ROWS rows in shared memory -----------------------------------------------------------------------------
// Rows are `pitch` numbers apart: 16 bytes more than they hold, so that the lanes of a quarter warp read different banks.

template <int ROWS> DEVICE void copy_rows(const u16* x, int stride, u16* shared, int pitch, int count, int rows) {
#pragma unroll(8 / ROWS)
  for (int at = threadIdx.x * 8; at < count; at += blockDim.x * 8) {
    uint4 v[ROWS];  // all on their way before the first is stored
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      if (r < rows) v[r] = __ldcg((const uint4*)(x + (size_t)r * stride + at));
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      if (r < rows) *(uint4*)(shared + r * pitch + at) = v[r];
  }
}

// The same by copies that need no registers.
template <int ROWS> DEVICE void copy_rows_ahead(const u16* x, int stride, u16* shared, int pitch, int count, int rows) {
#pragma unroll 1
  for (int at = threadIdx.x * 8; at < count; at += blockDim.x * 8)
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      if (r < rows) copy_async<16>(x + (size_t)r * stride + at, shared + r * pitch + at);
  commit_copies();
}

// RMSNorm of each row but for a factor between 1 and 2, which the sums are multiplied with: a power of two scales x exactly, so
// a number is rounded once. A thread takes NORM pieces of every row: NORM * WARPS * 256 >= padded. `scratch`: [32][ROWS] floats,
// and [8] after them for the factors. `meanwhile` is done when x is on its way.
template <int NORM, int ROWS, int WARPS, class Meanwhile>
DEVICE void norm_rows_of_input(const u16* x, const NormWeight<NORM>& norm, u16* shared, int pitch, int padded, int rows, int k, float eps, float* scratch,
                               const Meanwhile& meanwhile) {
  static_assert(NORM * ROWS <= OCTET_RUNS, "a thread keeps its pieces of all rows in registers");
  const int lane = threadIdx.x % 32;
  uint4 mine[NORM][ROWS];
#pragma unroll
  for (int i = 0; i < NORM; i++) {
    const int at = (i * WARPS * 32 + threadIdx.x) * 8;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
      mine[i][r] = at < padded && r < rows ? __ldcg((const uint4*)(x + (size_t)r * padded + at)) : make_uint4(0, 0, 0, 0);
  }
  meanwhile();
  float sums[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    sums[r] = 0.f;
#pragma unroll
    for (int i = 0; i < NORM; i++) {
      const u32* m = &mine[i][r].x;
#pragma unroll
      for (int j = 0; j < 4; j++) { const float a = low_of(m[j]), b = high_of(m[j]); sums[r] += a * a + b * b; }
    }
  }
  const float sum = warp_sums<ROWS>(sums);
  if (lane % (32 / ROWS) == 0) scratch[threadIdx.x / 32 * ROWS + lane / (32 / ROWS)] = sum;
  __syncthreads();
  float total = 0.f;  // of row lane % ROWS
  for (int w = lane / ROWS; w < WARPS; w += 32 / ROWS) total += scratch[w * ROWS + lane % ROWS];
#pragma unroll
  for (int at = ROWS; at < 32; at *= 2) total += __shfl_xor_sync(FULL, total, at);
  const float scale = rsqrtf(total / k + eps);
  const int exponent = min(max((__float_as_int(scale) >> 23) - 127, -14), 15);
  if (threadIdx.x < ROWS) scratch[32 * ROWS + threadIdx.x] = scale * __int_as_float((127 - exponent) << 23);
  const u32 power = (u32)(exponent + 15) * 0x04000400u;  // twice, as fp16
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const u32 own = __shfl_sync(FULL, power, r);
#pragma unroll
    for (int i = 0; i < NORM; i++) {
      const int at = (i * WARPS * 32 + threadIdx.x) * 8;
      const uint4 m = mine[i][r], w = norm.run[i];
      if (at < padded && r < rows)
        *(uint4*)(shared + r * pitch + at) =
            make_uint4(mul2(mul2(m.x, own), w.x), mul2(mul2(m.y, own), w.y), mul2(mul2(m.z, own), w.z), mul2(mul2(m.w, own), w.w));
    }
  }
}

// -- a chunk of a tile -------------------------------------------------------------------------------------------------

// As multiply_chunk of gemv.cu, with the sums of outputs r (y[0], y[1]) and r + 8 (y[2], y[3]) for two rows of x.
template <int BITS, bool SYM, int UNITS> DEVICE void multiply_chunk_by_rows(const u8* words, const u8* scales, const uint4 (&b)[2], int lane, float (&y)[4]) {
  const u32 *bs = &b[0].x, *bt = &b[1].x;
  const Words<BITS> now = read_words<BITS>(words, lane);
  Scale<SYM> scale[UNITS];
#pragma unroll
  for (int u = 0; u < UNITS; u++) scale[u] = read_scale<BITS, SYM>(scales + u * (SYM ? 32 : 64), lane);
  float c[4];
#pragma unroll
  for (int s = 0; s < 4; s++) {
    const Scale<SYM>& own = scale[s * UNITS / 4];
    if (s * UNITS % 4 == 0) c[0] = c[1] = c[2] = c[3] = 0.f;
    u32 a[4];
    fragment<BITS>(now, s, twice_low(own.z), twice_high(own.z), a);
    mma(c, a, s < 2 ? bs[2 * s] : bt[2 * s - 4], s < 2 ? bs[2 * s + 1] : bt[2 * s - 3]);
    if ((s + 1) * UNITS % 4 == 0) {  // the scale changes here
      const float low = low_of(own.s), high = high_of(own.s);
      y[0] += low * c[0]; y[1] += low * c[1];
      y[2] += high * c[2]; y[3] += high * c[3];
    }
  }
}

// -- the kernel --------------------------------------------------------------------------------------------------------

template <int BITS, bool SYM, int UNITS, int ROWS, int KS, int BATCH, int STAGES, int TEAMS, int EPILOGUE, int NORM, bool EVEN, int CLUSTER, int SPAN, bool FOLLOW,
          int SHARERS>
DEVICE void octet(const OctetArguments& p) {
  static_assert(ROWS == 2 || ROWS == 4 || ROWS == 8, "two rows a lane, eight columns");
  static_assert(EPILOGUE == PLAIN || EPILOGUE == SILU || EPILOGUE == RESIDUAL, "see OctetArguments.out");
  static_assert(CLUSTER == 1 || NORM == 0 || SPAN > 0, "fp16 is normed before it is multiplied, so a norm needs the whole input");
  constexpr bool DIGITS_OF_X = SPAN > 0;
  constexpr int LASTING = SPAN == 2 ? 2 : 1, GROUP = DIGITS_OF_X && ROWS == 2 && UNITS == 1 && EVEN && BATCH % (2 * LASTING) == 0 ? 2 : 1;
  static_assert(!DIGITS_OF_X || FOLLOW, "digits are made of what was copied");
  static_assert(SHARERS == 1 || (DIGITS_OF_X && CLUSTER == 1), "digits of the whole input are shared");
  static_assert(!DIGITS_OF_X || (BITS <= 4 && UNITS < 4), "digits are bytes, and a product of bytes takes two steps");
  typedef WeightRing<BITS, SYM, UNITS, BATCH, STAGES, EVEN, OctetArguments, LASTING, DIGITS_OF_X> Ring;
  typedef LaneOfRows<ROWS, LASTING, GROUP> Lane;
  typedef RowSums<ROWS> Sums;
  constexpr int PER = Sums::PER, WARPS = KS * TEAMS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = warp / KS, part = warp % KS;
  const int rank = blockIdx.x % CLUSTER, share = (p.chunks + CLUSTER * LASTING - 1) / (CLUSTER * LASTING) * LASTING;
  const int from = min(rank * share, p.chunks), own = min(share, p.chunks - from), pitch = share * CHUNK + (DIGITS_OF_X ? 0 : 8);
  u16* xs = (u16*)((u8*)shared_words + WARPS * STAGES * Ring::SLOT);  // [ROWS][pitch]; of digits [share][ROWS][2][CHUNK]
  int2* inputs = (int2*)(xs + ROWS * pitch);                          // of digits: [share / LASTING][UNITS][ROWS]
  u16* weights = (u16*)(inputs + (DIGITS_OF_X ? share / LASTING * UNITS * ROWS : 0));  // of digits: the norm's
  const int runs = DIGITS_OF_X && NORM ? max(32, (share + 3) / 4) : 32;
  float* scratch = (float*)(weights + (DIGITS_OF_X && NORM ? share * CHUNK : 0));  // [runs][ROWS], and the rows' factors
  float* factors = scratch + runs * ROWS;                             // [8]
  float* sums = factors + 8 + team * 2 * KS * Sums::PART;             // [2][KS][PART] of this team
  float* whole = factors + 8 + TEAMS * 2 * KS * Sums::PART;           // [turns * TEAMS][PART], CLUSTER only; of SHARERS a barrier
  const int per = (own + KS * LASTING - 1) / (KS * LASTING) * LASTING, first = from + min(part * per, own), end = min(first + per, from + own);
  const int stride = gridDim.x / CLUSTER * TEAMS, block_tile = blockIdx.x / CLUSTER * TEAMS, first_tile = block_tile + team;
  Ring ring = {p, (u8*)shared_words + warp * STAGES * Ring::SLOT, lane, first, end, stride, first_tile, first, 0};

  Sharers<SHARERS> sharers = {(u64*)whole};
  const Runs runs_of_x = Sharers<SHARERS>::runs(own * CHUNK);
  if constexpr (SHARERS > 1) sharers.begin(sent_bytes<(NORM > 0), UNITS, LASTING>(runs_of_x, p.rows));
  if constexpr (DIGITS_OF_X && NORM) copy_norm<WARPS>(p.norm + from * CHUNK, weights, runs_of_x, p.rows);
  const int before = FOLLOW ? min(p.first_batches, STAGES - 1) : STAGES - 1;  // what comes before x is what x waits for
#pragma unroll 1
  for (int i = 0; i < before; i++) ring.fetch();
  allow_next_kernel_to_start();
  const NormWeight<DIGITS_OF_X ? 0 : NORM> norm = load_norm_weight<DIGITS_OF_X ? 0 : NORM>(p.norm, p.chunks * CHUNK);
  wait_for_previous_kernel();
  auto fetch_others = [&]() {
    if constexpr (FOLLOW) {
#pragma unroll 1
      for (int i = before; i < STAGES - 1; i++) ring.fetch();
    }
  };
  if constexpr (!DIGITS_OF_X && NORM > 0) {
    norm_rows_of_input<NORM, ROWS, WARPS>(p.x, norm, xs, pitch, p.chunks * CHUNK, p.rows, p.k, p.eps, scratch, fetch_others);
  } else if constexpr (!FOLLOW) {
    copy_rows<ROWS>(p.x + from * CHUNK, p.chunks * CHUNK, xs, pitch, own * CHUNK, p.rows);
  } else {
    if constexpr (DIGITS_OF_X) copy_rows_for_digits<ROWS, WARPS>(p.x + from * CHUNK, p.chunks * CHUNK, (u8*)xs, runs_of_x, p.rows);
    else copy_rows_ahead<ROWS>(p.x + from * CHUNK, p.chunks * CHUNK, xs, pitch, own * CHUNK, p.rows);
    fetch_others();
    wait_for_all_but<STAGES - 1>(STAGES - 1 - before);
    if constexpr (SHARERS > 1) wait_for_cluster();  // every block of it has begun
    if constexpr (DIGITS_OF_X)
      rows_into_digits<(NORM > 0), BITS, SYM, UNITS, LASTING, ROWS, WARPS>(weights, (u8*)xs, inputs, runs_of_x, p.rows, scratch, sharers);
  }
  __syncthreads();
  if constexpr (SHARERS > 1) wait_for_sent(sharers.come);

  // x as the matrix unit takes it: lane l holds row l / 4. Lanes of rows that this variant has not stay zero.
  uint4 columns[2][2] = {{{0, 0, 0, 0}, {0, 0, 0, 0}}, {{0, 0, 0, 0}, {0, 0, 0, 0}}};
  const u16* column = xs + lane / 4 % ROWS * pitch + lane % 4 * 16 - from * CHUNK;
  const u8* digits = (const u8*)xs - from * ROWS * 2 * CHUNK + Lane::digits(lane);
  const int2* needed = inputs + (Lane::block(lane) * UNITS * ROWS + Lane::row(lane)) - from / LASTING * UNITS * ROWS;
  float norms[2] = {1.f, 1.f};  // of digits: what the sums of the lane's rows are multiplied with
  int slot = 0, adder = 0, turn = 0;  // the part that adds the sums of the tile: the warps take turns
  for (int tile = first_tile; tile < p.tiles; tile += stride, turn++) {
    float y[4] = {0.f, 0.f, 0.f, 0.f}, addend[PER];
    int position = 0;
    if (CLUSTER == 1 && part == adder) load_row_addends<EPILOGUE, PER>(p, tile, lane, addend, position);
    for (int chunk = first; chunk < end; chunk += BATCH) {
      wait_for_copies<STAGES - 2>();
      __syncwarp();  // other lanes copied the scales
      ring.fetch();
      const u8* words = ring.ring + slot * Ring::SLOT;
      const u8* scales = words + BATCH * Ring::CHUNK_BYTES;
      slot = slot + 1 == STAGES ? 0 : slot + 1;
#pragma unroll
      for (int i = 0; i < BATCH; i += DIGITS_OF_X ? GROUP * LASTING : 1) {
        if (EVEN || chunk + i < end) {
          if constexpr (DIGITS_OF_X) {
            multiply_row_digits<BITS, SYM, UNITS, LASTING, ROWS, GROUP>(words + i * Ring::CHUNK_BYTES, scales + i / LASTING * UNITS * Ring::SCALE_BYTES,
                digits + (chunk + i) * ROWS * 2 * CHUNK, needed + ((u32)chunk / LASTING + i / LASTING) * UNITS * ROWS, lane, y);
          } else {
            uint4 (&b)[2] = columns[i % 2];
            if (ROWS == 8 || lane < ROWS * 4) {
              const uint4* at = (const uint4*)(column + (chunk + i) * CHUNK);
              b[0] = at[0]; b[1] = at[1];
            }
            multiply_chunk_by_rows<BITS, SYM, UNITS>(words + i * Ring::CHUNK_BYTES, scales + i * UNITS * Ring::SCALE_BYTES, b, lane, y);
          }
        }
      }
    }
    if constexpr (DIGITS_OF_X) {
      if (NORM > 0 && CLUSTER == 1 && turn == 0) {
        const float scale = rsqrtf(squares_of_row<ROWS>(scratch, own) / p.k + p.eps);
#pragma unroll
        for (int h = 0; h < 2; h++) norms[h] = ROWS == 8 ? __shfl_sync(FULL, scale, lane % 4 + 4 * h) : scale;
      }
#pragma unroll
      for (int e = 0; e < (ROWS == 8 ? 4 : 2); e++) {
        y[e] *= e % 2 ? norms[e / 2] / second_row<BITS>() : norms[e / 2];
        if (GROUP == 2) y[e] += __shfl_xor_sync(FULL, y[e], 2);
      }
    }
    float* mine = sums + (turn & 1) * KS * Sums::PART;
    if constexpr (DIGITS_OF_X) Sums::store_digits(mine + part * Sums::PART, lane, y);
    else Sums::store(mine + part * Sums::PART, lane, y);
    if (KS == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "r"(KS * 32) : "memory");
    if (part == adder) {
      float total[PER];
      Sums::template add<KS>(mine, lane, total);
#pragma unroll
      for (int j = 0; j < PER; j++) {
        if constexpr (CLUSTER > 1) whole[(turn * TEAMS + team) * Sums::PART + lane * PER + j] = total[j];
        else total[j] = NORM && !DIGITS_OF_X ? addend[j] + total[j] * factors[lane / TILE * PER + j] : addend[j] + total[j];
      }
      if constexpr (CLUSTER == 1) write_row_outputs<EPILOGUE, PER>(p, total, position, tile, lane);
    }
    adder = adder + 1 == KS ? 0 : adder + 1;
  }
  if constexpr (CLUSTER > 1) {  // the blocks take turns with the tiles, and the warps of a block with its own
    if (NORM > 0 && warp == 0) {
      const float squares = squares_of_row<ROWS>(scratch, own);
      if (lane < ROWS) factors[lane] = squares;
    }
    arrive_at_cluster();
    bool waited = false;
    float scale[PER];
#pragma unroll 1
    for (int each = warp * CLUSTER + rank;; each += WARPS * CLUSTER) {
      const int tile = block_tile + each / TEAMS * stride + each % TEAMS;
      const bool any = tile < p.tiles;
      float total[PER], of_blocks[PER];
      int position = 0;
      if (any) load_row_addends<EPILOGUE, PER>(p, tile, lane, total, position);
      if (!waited) {
        wait_for_cluster();
#pragma unroll
        for (int j = 0; j < PER; j++) scale[j] = 0.f;
#pragma unroll
        for (int i = 0; i < CLUSTER && NORM > 0; i++) add_of_block<PER>(factors + lane / TILE * PER, i, scale);
#pragma unroll
        for (int j = 0; j < PER; j++) scale[j] = NORM ? rsqrtf(scale[j] / p.k + p.eps) : 1.f;
      }
      waited = true;
      if (block_tile + each / TEAMS * stride >= p.tiles) break;
      if (!any) continue;
#pragma unroll
      for (int j = 0; j < PER; j++) of_blocks[j] = 0.f;
#pragma unroll
      for (int i = 0; i < CLUSTER; i++) add_of_block<PER>(whole + each * Sums::PART + lane * PER, i, NORM ? of_blocks : total);
#pragma unroll
      for (int j = 0; j < PER && NORM > 0; j++) total[j] += of_blocks[j] * scale[j];
      write_row_outputs<EPILOGUE, PER>(p, total, position, tile, lane);
    }
    arrive_at_cluster();
    wait_for_cluster();  // the other blocks have read what is in this one
  }
}
