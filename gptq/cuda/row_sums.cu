// The sums of a tile for two to eight rows (octet.cu), and what becomes of them.

// The sums over a warp of ROWS numbers a lane: that of row i ends in the lanes i * 32 / ROWS and following.
template <int ROWS> DEVICE float warp_sums(float (&v)[ROWS]) {
  int bit = 16;
#pragma unroll
  for (int width = ROWS / 2; width; width /= 2, bit /= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < width; i++) {
      const float kept = upper ? v[i + width] : v[i], sent = upper ? v[i] : v[i + width];
      v[i] = kept + __shfl_xor_sync(FULL, sent, bit);
    }
  }
#pragma unroll
  for (int at = 16 / ROWS; at; at /= 2) v[0] += __shfl_xor_sync(FULL, v[0], at);
  return v[0];
}

// One warp adds the parts of a tile: lane l takes output l % 16 of the tile and PER rows from l / 16 * PER on. A part is
// stored in that order: [2][16][PER], a run that is read at once.

template <int ROWS> struct RowSums {
  static constexpr int PER = ROWS / 2, PART = TILE * ROWS;
  struct alignas(PER * 4) Run { float of[PER]; };

  static METHOD void store(float* part, int lane, const float (&y)[4]) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int row = lane % 4 * 2 + e % 2;
      if (row < ROWS) part[(row / PER * TILE + lane / 4 + e / 2 * 8) * PER + row % PER] = y[e];
    }
  }

  static METHOD void store_digits(float* part, int lane, const float (&y)[4]) {  // as multiply_row_digits leaves them
#pragma unroll
    for (int e = 0; e < (ROWS == 8 ? 4 : 2); e++) {
      const int row = lane % 4 + e / 2 * 4;
      if (row < ROWS) part[(row / PER * TILE + lane / 4 + e % 2 * 8) * PER + row % PER] = y[e];
    }
  }

  template <int KS> static METHOD void add(const float* parts, int lane, float (&y)[PER]) {
#pragma unroll
    for (int j = 0; j < PER; j++) y[j] = 0.f;
#pragma unroll
    for (int i = 0; i < KS; i++) {
      const Run run = *(const Run*)(parts + i * PART + lane * PER);
#pragma unroll
      for (int j = 0; j < PER; j++) y[j] += run.of[j];
    }
  }
};

// What a lane's sums are added to, and where its output lies in the next input.
template <int EPILOGUE, int PER> DEVICE void load_row_addends(const OctetArguments& p, int tile, int lane, float (&addend)[PER], int& position) {
  const int n = tile * TILE + lane % TILE, row = lane / TILE * PER;
  const float bias = p.bias ? to_float(p.bias[n]) : 0.f;
#pragma unroll
  for (int j = 0; j < PER; j++) addend[j] = bias;
  if constexpr (EPILOGUE == RESIDUAL) {
    if (n >= p.n) return;
    position = p.permutation[n];
#pragma unroll
    for (int j = 0; j < PER; j++)
      if (row + j < p.rows) addend[j] += __ldcg(p.residual + (size_t)(row + j) * p.n + n);
  }
}

template <int EPILOGUE, int PER> DEVICE void write_row_outputs(const OctetArguments& p, const float (&y)[PER], int position, int tile, int lane) {
  const int at = lane % TILE, n = tile * TILE + at;
#pragma unroll
  for (int j = 0; j < PER; j++) {
    const int row = lane / TILE * PER + j;
    u16* out = p.out + (size_t)row * p.out_stride;
    if constexpr (EPILOGUE == SILU) {
      const float up = __shfl_xor_sync(FULL, y[j], 8);
      if (at < 8 && row < p.rows) out[tile * 8 + at] = to_half(y[j] / (1.f + __expf(-y[j])) * up);
    } else if (n < p.n && row < p.rows) {
      if constexpr (EPILOGUE == RESIDUAL) {
        p.residual[(size_t)row * p.n + n] = y[j];
        out[position] = to_half(y[j]);
      } else out[n] = to_half(y[j]);
    }
  }
}
