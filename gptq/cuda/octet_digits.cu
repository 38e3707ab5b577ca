// Two to eight rows as digits of a byte (digits.cu), times chunks of two, three or four bits. A row's high digits are a column of the
// matrix unit, its low ones the next, so a lane column has both sums of one row: exact, and put together as integers. Two rows leave
// room for a second block of chunks; eight are multiplied by two products.

// -- x of up to ROWS rows as digits in shared memory: [chunk][ROWS][2][CHUNK] -----------------------------------------------

// The runs of 256 inputs whose digits a block makes.
struct Runs {
  int first, count, inputs;  // inputs: of the block's whole share of x, whoever makes their digits
  METHOD int before(int run) const { return min(run * 256, inputs); }  // inputs in the runs before this one
  METHOD int own_inputs() const { return before(first + count) - before(first); }
};

// Blocks of a cluster (Hopper and newer) that need the same digits: each makes those of its runs and sends them to the others, where
// a barrier counts what has come.
template <int SHARERS> struct Sharers {
  u64* come;
  u32 away[SHARERS > 1 ? SHARERS - 1 : 1];  // from an address in shared memory to that of the same in the other blocks

  static METHOD Runs runs(int inputs) {
    const int all = (inputs + 255) / 256, per = (all + SHARERS - 1) / SHARERS, first = min((int)(SHARERS > 1 ? blockIdx.x % SHARERS : 0) * per, all);
    return {first, min(per, all - first), inputs};
  }
  // `bytes`: that the others send. The whole block; the others may be sent to after wait_for_cluster().
  METHOD void begin(int bytes) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      slot_barrier(come, 1);
      show_barriers();
      expect_bytes(come, bytes);
    }
    __syncwarp();
    begin_in_cluster();
#pragma unroll
    for (int i = 0; i < SHARERS - 1; i++) away[i] = shared_of(come, (blockIdx.x + 1 + i) % SHARERS) - shared_at(come);
#endif
  }
  template <class T> METHOD void put(T* at, T v) const {
    *at = v;
#if __CUDA_ARCH__ >= 900
#pragma unroll
    for (int i = 0; i < SHARERS - 1; i++) send(shared_at(at) + away[i], v, shared_at(come) + away[i]);
#endif
  }
};

// A warp takes runs of two rows, the warps in turn: what a lane copies, it makes digits of. The second row may be one that is not there.
template <int WARPS, class Take> DEVICE void each_run(const Runs& runs, int rows, const Take& take) {
  if (runs.count <= 0) return;  // a block of a cluster may have no inputs
  int run = threadIdx.x / 32, row = 0;
#pragma unroll 1
  for (;; run += WARPS) {
    for (; run >= runs.count; run -= runs.count) row += 2;
    if (row >= rows) break;
    take(runs.first + run, row, (runs.first + run) * 256 + threadIdx.x % 32 * 8);
  }
}

// A norm's weights on their way to `weights`.
template <int WARPS> DEVICE void copy_norm(const u16* norm, u16* weights, const Runs& runs, int rows) {
  each_run<WARPS>(runs, rows, [&](int, int, int at) {
    if (at < runs.inputs) copy_async<16>(norm + at, weights + at);
  });
}

// x on its way to where its digits will lie: they take as much room.
template <int ROWS, int WARPS> DEVICE void copy_rows_for_digits(const u16* x, int stride, u8* digits, const Runs& runs, int rows) {
  each_run<WARPS>(runs, rows, [&](int, int row, int at) {
    u8* to = digits + (at / CHUNK * ROWS + row) * 2 * CHUNK + at % CHUNK * 2;
    if (at < runs.inputs) copy_async<16>(x + (size_t)row * stride + at, to);
    if (at < runs.inputs && row + 1 < rows) copy_async<16>(x + (size_t)(row + 1) * stride + at, to + 2 * CHUNK);
  });
  commit_copies();
}

// Until what was copied has come, but for the last `later` commits, of which there are at most MOST.
template <int MOST> DEVICE void wait_for_all_but(int later) {
  if constexpr (MOST == 0) wait_for_copies<0>();
  else if (later >= MOST) wait_for_copies<MOST>();
  else wait_for_all_but<MOST - 1>(later);
}

// Of two numbers that which is further from 0, but for its sign; NaN if one is.
DEVICE float further(float a, float b) {
#if __CUDA_ARCH__ >= 860
  float r; asm("max.NaN.xorsign.abs.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r;
#else
  return larger(fabsf(a), fabsf(b));
#endif
}

// Eight inputs of each of two rows as digits: the high ones of the first to `to`, its low ones CHUNK bytes behind, then the second's. For
// each block of SPAN chunks and unit what its sums need: minus the digits' sum, times the zero of symmetric weights, and the factor. A
// whole warp, in the order of the inputs.
template <int BITS, bool SYM, int UNITS, int SPAN, int ROWS, class Others>
DEVICE void two_rows_digits(const float (&v)[2][8], bool there, u8* to, int2* inputs, const Others& others) {
  constexpr int LANES = 8 * SPAN;  // of a block
  float top[2];
  u32 high[2][2], low[2][2], sums[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    top[r] = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) top[r] = further(top[r], v[r][j]);
#pragma unroll
    for (int i = LANES / 2; i; i >>= 1) top[r] = further(top[r], __shfl_xor_sync(FULL, top[r], i));
    top[r] = fabsf(top[r]);
    const float scale = top[r] == 0.f ? 0.f : DIGITS / top[r];
    u32 y[8];
    sums[r] = 0u - 8u * (MAGIC_BITS + 32896u);
#pragma unroll
    for (int j = 0; j < 8; j++) sums[r] += y[j] = __float_as_int(fmaf(v[r][j], scale, MAGIC + 32896.f));
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 even = __byte_perm(y[4 * i], y[4 * i + 2], 0x5140), odd = __byte_perm(y[4 * i + 1], y[4 * i + 3], 0x5140);
      low[r][i] = __byte_perm(even, odd, 0x5410) ^ 0x80808080u;
      high[r][i] = __byte_perm(even, odd, 0x7632) ^ 0x80808080u;
    }
  }
  const bool second = threadIdx.x & LANES / 2;  // half of the lanes add up the second row
  u32 sum = (second ? sums[1] : sums[0]) + __shfl_xor_sync(FULL, second ? sums[0] : sums[1], LANES / 2);
#pragma unroll
  for (int i = LANES / 4; i; i >>= 1)
    if (UNITS == 1 || i != 1) sum += __shfl_xor_sync(FULL, sum, i);
  if (!there) return;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    others.put((uint2*)(to + r * 2 * CHUNK), make_uint2(high[r][0], high[r][1]));
    others.put((uint2*)(to + r * 2 * CHUNK + CHUNK), make_uint2(low[r][0], low[r][1]));
  }
  const int own = threadIdx.x % (LANES / 2);
  if (own < UNITS) {
    const int2 needed = make_int2((int)sum * (SYM ? -(1 << (BITS - 1)) : -1), __float_as_int((second ? top[1] : top[0]) * (1.f / DIGITS)));
    others.put(inputs + own * ROWS + second, needed);
  }
}

// What lies in `digits` as fp16, times a norm's weights if NORMED, into digits; what a norm divides by is left out (squares_of_row): sums of
// squares go to `squares` [runs][ROWS].
template <bool NORMED, int BITS, bool SYM, int UNITS, int SPAN, int ROWS, int WARPS, class Others>
DEVICE void rows_into_digits(const u16* weights, u8* digits, int2* inputs, const Runs& runs, int rows, float* squares, const Others& others) {
  each_run<WARPS>(runs, rows, [&](int run, int row, int at) {
    const int lane = threadIdx.x % 32;
    const bool there = at < runs.inputs;
    u8* chunk = digits + (at / CHUNK * ROWS + row) * 2 * CHUNK;
    float v[2][8], w[8], sums[2] = {0.f, 0.f};
    if (NORMED) eight_halves(there ? *(const uint4*)(weights + at) : make_uint4(0, 0, 0, 0), w);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      eight_halves(there ? *(const uint4*)(chunk + r * 2 * CHUNK + at % CHUNK * 2) : make_uint4(0, 0, 0, 0), v[r]);
#pragma unroll
      for (int j = 0; j < 8 && NORMED; j++) { sums[r] += v[r][j] * v[r][j]; v[r][j] *= w[j]; }
    }
    __syncwarp();  // the digits of a chunk lie where other lanes have read
    two_rows_digits<BITS, SYM, UNITS, SPAN, ROWS>(v, there, chunk + at % CHUNK, inputs + at / CHUNK / SPAN * UNITS * ROWS + row, others);
    if (NORMED) {
      const float sum = warp_sums<2>(sums);
      if (lane % 16 == 0) others.put(squares + run * ROWS + row + lane / 16, sum);
    }
  });
}

// What a block is sent if others make the digits of all but its runs, in bytes. Rows come in twos.
template <bool NORMED, int UNITS, int SPAN> DEVICE int sent_bytes(const Runs& runs, int rows) {
  const int inputs = runs.inputs - runs.own_inputs(), others = (runs.inputs + 255) / 256 - runs.count;
  return (rows + 1) / 2 * 2 * (inputs * 2 + inputs / (CHUNK * SPAN) * UNITS * (int)sizeof(int2) + (NORMED ? others * (int)sizeof(float) : 0));
}

// The sum of the squares of row lane % ROWS, in so many chunks. A whole warp.
template <int ROWS> DEVICE float squares_of_row(const float* squares, int chunks) {
  const int lane = threadIdx.x % 32;
  float total = 0.f;
  for (int i = lane / ROWS; i < (chunks + 3) / 4; i += 32 / ROWS) total += squares[i * ROWS + lane % ROWS];
#pragma unroll
  for (int at = ROWS; at < 32; at *= 2) total += __shfl_xor_sync(FULL, total, at);
  return total;
}

// -- a chunk of a tile -------------------------------------------------------------------------------------------------

// Where a lane reads the digits of its column and what its sums need. Lane column c has the sums of row c % ROWS, of two rows and two
// blocks those of block c / 2.
template <int ROWS, int SPAN, int GROUP> struct LaneOfRows {
  static METHOD int digits(int lane) {
    const int column = lane / 8, block = column / ROWS % GROUP;
    return ((block * SPAN * ROWS) + column % ROWS) * 2 * CHUNK + lane % 8 * 16;
  }
  static METHOD int row(int lane) { return lane % 4 % ROWS; }
  static METHOD int block(int lane) { return GROUP == 1 ? 0 : lane % 4 / ROWS; }
};

// Add the products of GROUP blocks of SPAN chunks to the sums of outputs r (y[0], y[2]) and r + 8 (y[1], y[3], times second_row) for the
// lane's row and, of eight, that of four rows on. digits, inputs: of the first block, the lane's.
template <int BITS, bool SYM, int UNITS, int SPAN, int ROWS, int GROUP>
DEVICE void multiply_row_digits(const u8* words, const u8* scales, const u8* digits, const int2* inputs, int lane, float (&y)[4]) {
  constexpr int HALVES = ROWS == 8 ? 2 : 1;
  const int none[4] = {0, 0, 0, 0};
  int c[GROUP][UNITS][HALVES][4];
#pragma unroll
  for (int i = 0; i < SPAN; i++) {
    uint4 b[HALVES];
#pragma unroll
    for (int h = 0; h < HALVES; h++) b[h] = *(const uint4*)(digits + (i * ROWS + h * 4) * 2 * CHUNK);
#pragma unroll
    for (int block = 0; block < GROUP; block++) {
      const Words<BITS> now = read_words<BITS>(words + (block * SPAN + i) * BITS * 128, lane);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 a[4];
        byte_fragment<BITS>(now.w, half, a);
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
          int (&sum)[4] = c[block][half * (UNITS - 1)][h];
          const u32 b0 = half ? b[h].z : b[h].x, b1 = half ? b[h].w : b[h].y;
          if (i == 0 && (UNITS == 2 || half == 0)) mma_bytes(sum, a, b0, b1, none);
          else mma_bytes(sum, a, b0, b1, sum);
        }
      }
    }
  }
  const int own = LaneOfRows<ROWS, SPAN, GROUP>::block(lane);
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const Scale<SYM> scale = read_scale<BITS, SYM>(scales + (own * UNITS + u) * (SYM ? 32 : 64), lane);
    const int zero = SYM ? 1 : scale.z & 0x3ff, zero8 = SYM ? 1 : scale.z >> 16 & 0x3ff;  // 1024 is not a part of it
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      const int2 x = inputs[u * ROWS + h * 4];
      int found[4];
#pragma unroll
      for (int i = 0; i < 4; i++) found[i] = GROUP == 2 && own ? c[GROUP - 1][u][h][i] : c[0][u][h][i];
      const int sum = found[0] * 256 + found[1] + zero * x.x, sum8 = found[2] * 256 + found[3] + (zero8 << BITS) * x.x;
      y[2 * h] += low_of(scale.s) * __int_as_float(x.y) * sum;
      y[2 * h + 1] += high_of(scale.s) * __int_as_float(x.y) * sum8;
    }
  }
}
