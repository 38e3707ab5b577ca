// Chunks of two, three or four bits times the digits of one row (digits.cu), by the matrix unit's products of bytes. Four weights of a
// word are taken by one `and`, where they lie in its bytes. The high digits are a column of the matrix unit, the low ones another, so
// their sums are exact and cost nothing more. Zeros are subtracted with the sum of a block's digits, once for each scale.

// Four weights of each of r and r + 8 in two steps: those of steps 2 * half and 2 * half + 1.
template <int BITS> DEVICE void byte_fragment(const u32* w, int half, u32 (&a)[4]) {
  if constexpr (BITS == 2) {
    const u32 v = w[half], v4 = v >> 4;
    a[0] = v & 0x03030303; a[1] = v & 0x0c0c0c0c; a[2] = v4 & 0x03030303; a[3] = v4 & 0x0c0c0c0c;
  } else if constexpr (BITS == 4) {
    a[0] = w[2 * half] & 0x0f0f0f0f; a[1] = w[2 * half] & 0xf0f0f0f0;
    a[2] = w[2 * half + 1] & 0x0f0f0f0f; a[3] = w[2 * half + 1] & 0xf0f0f0f0;
  } else if (half == 0) {
    a[0] = w[0] & 0x07070707; a[1] = w[0] & 0x38383838; a[2] = w[1] & 0x07070707; a[3] = w[1] & 0x38383838;
  } else {
    a[0] = w[2] & 0x07070707; a[1] = w[2] & 0x38383838;
    a[2] = and_or(w[0] >> 6, 0x03030303, w[2] >> 4 & 0x04040404);
    a[3] = and_or(w[1] >> 3, 0x18181818, w[2] >> 2 & 0x20202020);
  }
}

// Add the products of SPAN chunks to the sums of rows r and r + 8: lane column 0 has those of the high digits, 1 of the low ones.
// b: the digits of the lane's column. x: what make_digits wrote for the lane's digit, every second of `inputs`.
template <int BITS, bool SYM, int UNITS, int SPAN>
DEVICE void multiply_digits(const u8* words, const u8* scales, const float4* x, const uint4 (&b)[SPAN], const int (&magic)[4], int lane, float& row, float& row8) {
  int c[UNITS][4];
#pragma unroll
  for (int i = 0; i < SPAN; i++) {
    const Words<BITS> now = read_words<BITS>(words + i * BITS * 128, lane);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 a[4];
      byte_fragment<BITS>(now.w, half, a);
      int (&sum)[4] = c[half * (UNITS - 1)];
      const u32 b0 = half ? b[i].z : b[i].x, b1 = half ? b[i].w : b[i].y;
      if (i == 0 && (UNITS == 2 || half == 0)) mma_bytes(sum, a, b0, b1, magic);
      else mma_bytes(sum, a, b0, b1, sum);
    }
  }
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const Scale<SYM> scale = read_scale<BITS, SYM>(scales + u * (SYM ? 32 : 64), lane);
    const float4 own = x[2 * u];
    const float zero = SYM ? own.x : fmaf(1024.f - low_of(scale.z), own.x, -MAGIC);
    const float zero8 = SYM ? own.y : fmaf(1024.f - high_of(scale.z), own.y, -MAGIC);
    row += low_of(scale.s) * ((__int_as_float(c[u][0]) + zero) * own.z);
    row8 += high_of(scale.s) * ((__int_as_float(c[u][2]) + zero8) * own.w);
  }
}

// The same of GROUP blocks of SPAN chunks at once. Each block has columns of the matrix unit of its own, so a lane reads the digits
// of one block for all: every product is with those of all blocks, and lane column c keeps what belongs to block c % GROUP, its high
// digits and its low ones. `digits`: what the lane reads of the first chunk of its block; `x`: what make_digits wrote for block c % GROUP.
template <int BITS, bool SYM, int SPAN, int GROUP>
DEVICE void multiply_group(const u8* words, const u8* scales, const u8* digits, const float4* x, const int (&magic)[4], int lane, float& row, float& row8) {
  int c[GROUP][4];
#pragma unroll
  for (int i = 0; i < SPAN; i++) {
    const uint4 b = *(const uint4*)(digits + i * 2 * CHUNK);
#pragma unroll
    for (int block = 0; block < GROUP; block++) {
      const Words<BITS> now = read_words<BITS>(words + (block * SPAN + i) * BITS * 128, lane);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 a[4];
        byte_fragment<BITS>(now.w, half, a);
        if (i == 0 && half == 0) mma_bytes(c[block], a, b.x, b.y, magic);
        else mma_bytes(c[block], a, half ? b.z : b.x, half ? b.w : b.y, c[block]);
      }
    }
  }
  const int own = lane % GROUP;
  float y[4];  // of row r and then of r + 8, high and low digits
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int found = c[0][i];
#pragma unroll
    for (int block = 1; block < GROUP; block++) found = own == block ? c[block][i] : found;
    y[i] = __int_as_float(found);
  }
  const Scale<SYM> scale = read_scale<BITS, SYM>(scales + own * (SYM ? 32 : 64), lane);
  const float2 high = *(const float2*)x;
  const float4 low = x[1];
  const float zero = 1024.f - low_of(scale.z), zero8 = 1024.f - high_of(scale.z);
  y[0] += SYM ? high.x : fmaf(zero, high.x, -MAGIC);
  y[1] += SYM ? low.x : fmaf(zero, low.x, -MAGIC);
  y[2] += SYM ? high.y : fmaf(zero8, high.y, -MAGIC);
  y[3] += SYM ? low.y : fmaf(zero8, low.y, -MAGIC);
  row += low_of(scale.s) * (fmaf(y[0], 256.f, y[1]) * low.z);
  row8 += high_of(scale.s) * (fmaf(y[2], 256.f, y[3]) * low.w);
}

// The sum of a row over the lane columns that have a part of it: of GROUP blocks, or, of one, of its high and its low digits.
template <int GROUP> DEVICE float sum_of_columns(float row) {
  if (GROUP == 4) row += __shfl_xor_sync(FULL, row, 2);
  return row + __shfl_xor_sync(FULL, row, 1);
}
