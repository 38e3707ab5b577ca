// A chunk of two or three bits times one row. The bits of a number, where they lie in the lower ten bits of 16, are a subnormal fp16
// number: q * 2^-24, times a power of two that says where they lie. The matrix unit multiplies those exactly, so an `and` is all
// that a pair of weights takes. Their zeros are subtracted with the sum of the inputs, once for each scale.

#define UNIT_SCALE 16777216.f  // 2^24

// The sums of the inputs that share a scale, of some chunks, times a factor: to[chunk * UNITS + unit]. A lane takes a run of eight
// inputs: two steps of a lane column.
template <int UNITS> DEVICE void sum_inputs(const u16* xs, float* to, int first, int end, int lane, float factor) {
  const u32 eight = 0xffu << (lane & 24);
  for (int run = first * 8 + lane; run < end * 8; run += 32) {
    const uint4 v = ((const uint4*)xs)[run];
    float sum = (low_of(v.x) + high_of(v.x)) + (low_of(v.y) + high_of(v.y)) + ((low_of(v.z) + high_of(v.z)) + (low_of(v.w) + high_of(v.w)));
    sum += __shfl_xor_sync(eight, sum, 2);
    sum += __shfl_xor_sync(eight, sum, 4);
    if (UNITS == 1) sum += __shfl_xor_sync(eight, sum, 1);
    if (lane % 8 < UNITS) to[run / 8 * UNITS + lane % 8] = sum * factor;
  }
}

// As multiply_chunk, with row and row8 in units of 2^24. x: the sums of the chunk's inputs, of symmetric
// weights times minus their zero.
template <int BITS, bool SYM, int UNITS> DEVICE void multiply_subnormal(const u8* words, const u8* scales, const float* x, const uint4 (&b)[2], int lane, float& row, float& row8) {
  static_assert(UNITS == 1 || UNITS == 2, "two steps share a scale");
  const Words<BITS> now = read_words<BITS>(words, lane);
  const u32* w = now.w;
  Scale<SYM> scale[UNITS];
  float low[UNITS], high[UNITS];  // what the zeros take
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    scale[u] = read_scale<BITS, SYM>(scales + u * (SYM ? 32 : 64), lane);
    low[u] = SYM ? x[u] : x[u] * (1024.f - low_of(scale[u].z));
    high[u] = SYM ? x[u] : x[u] * (1024.f - high_of(scale[u].z));
  }
  float c[4][4] = {};
  if constexpr (BITS == 2) {
#pragma unroll
    for (int h = 0; h < 2; h++) {  // two steps
      const u32 *bs = &b[h].x, v = w[h], v8 = v >> 8;
      float (&c1)[4] = c[2 * (h * UNITS / 2)], (&c16)[4] = c[2 * (h * UNITS / 2) + 1];
      const u32 a[4] = {v & 0x00030003, v & 0x000c000c, v8 & 0x00030003, v8 & 0x000c000c};
      const u32 a16[4] = {v & 0x00300030, v & 0x00c000c0, v8 & 0x00300030, v8 & 0x00c000c0};
      mma(c1, a, bs[0], bs[1]);
      mma(c16, a16, bs[2], bs[3]);
    }
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      row += low_of(scale[u].s) * (low[u] + c[2 * u][0] + c[2 * u + 1][0] * 0.0625f);
      row8 += high_of(scale[u].s) * (high[u] + c[2 * u][2] * 0.25f + c[2 * u + 1][2] * 0.015625f);
    }
  } else {
    const u32 v0 = w[0] >> 9, v1 = w[1] >> 9, v2 = w[2] >> 9;
    const u32 left = (v0 & 0x00400040) | (w[1] >> 8 & 0x00800080) | (w[2] >> 7 & 0x01000100);
    const u32 a[4][4] = {{w[0] & 0x00070007, w[2] & 0x00070007, w[1] & 0x00070007, v0 & 0x00070007},
                         {v1 & 0x00070007, w[0] & 0x00380038, v2 & 0x00070007, w[1] & 0x00380038},
                         {w[2] & 0x00380038, v1 & 0x00380038, v0 & 0x00380038, v2 & 0x00380038},
                         {w[0] & 0x01c001c0, w[2] & 0x01c001c0, w[1] & 0x01c001c0, left}};
#pragma unroll
    for (int s = 0; s < 4; s++) mma(c[s], a[s], (&b[s / 2].x)[s % 2 * 2], (&b[s / 2].x)[s % 2 * 2 + 1]);
    const float first = low[0] + c[0][0] + c[1][0], first8 = high[0] + c[0][2] + c[1][2] * 0.125f;
    float second = c[2][0] * 0.125f + c[3][0] * 0.015625f, second8 = c[2][2] * 0.125f + c[3][2] * 0.015625f;
    if (UNITS == 2) { second += low[UNITS - 1]; second8 += high[UNITS - 1]; }
    if constexpr (UNITS == 1) {
      row += low_of(scale[0].s) * (first + second);
      row8 += high_of(scale[0].s) * (first8 + second8);
    } else {
      row += low_of(scale[0].s) * first + low_of(scale[1].s) * second;
      row8 += high_of(scale[0].s) * first8 + high_of(scale[1].s) * second8;
    }
  }
}
