// The packed words of one lane for one chunk (64 inputs of the rows r = lane / 4 and r + 8) -> fp16 fragments.
//
// A word's small integers become fp16 by logic alone: q | 0x6400 is the number 1024 + q. Offset and zero are subtracted
// exactly, before anything is multiplied. A fused multiply-add scales integers at higher bits down (1024 + 4q,
// + 16q). The method is that of Kim et al., "Who says elephants can't run" (2022), section 3.

#define ONE_QUARTER 0x34003400u
#define ONE_16TH 0x2C002C00u
#define H2_768 0x62006200u
#define H2_960 0x63806380u
#define H2_1024 0x64006400u

template <int BITS> struct Words { u32 w[BITS]; };

// Three bits: a word of a step for each of steps 0, 1 and 2; a byte of it has an input's number of row r, that of row r + 8, and
// two bits of step 3: of words 0 and 1 the lower two of r and of r + 8, of word 2 the highest ones. Byte 8 * half + 16 * part has
// input 2 * half + part of the lane, as with two bits.

// The numbers of a chunk's register R = 4 * step + register of the fragment, low and high half.
DEVICE u32 three_bits(u32 w0, u32 w1, u32 w2, int R) {
  const int step = R / 4, row = R % 2, from = R % 4 / 2 * 8;
  if (step == 3) return ((row ? w1 : w0) >> (from + 6) & 0x00030003) | (w2 >> (from + 4 + row) & 0x00040004);
  return (step == 0 ? w0 : step == 1 ? w1 : w2) >> (from + 3 * row) & 0x00070007;
}

// Bytes of a chunk of one tile, all lanes together
template <int BITS> DEVICE int chunk_bytes() { return BITS * 128; }

template <int BITS> DEVICE Words<BITS> load_words(const u8* chunk, int lane) {
  Words<BITS> r;
  if constexpr (BITS == 2) {
    uint2 a = stream2(chunk + lane * 8);
    r.w[0] = a.x; r.w[1] = a.y;
  } else if constexpr (BITS == 3) {
    uint2 a = stream2(chunk + lane * 8);
    r.w[0] = a.x; r.w[1] = a.y; r.w[2] = stream1(chunk + 256 + lane * 4);
  } else {
#pragma unroll
    for (int part = 0; part < BITS / 4; part++) {
      uint4 a = stream4(chunk + part * 512 + lane * 16);
      r.w[part * 4] = a.x; r.w[part * 4 + 1] = a.y; r.w[part * 4 + 2] = a.z; r.w[part * 4 + 3] = a.w;
    }
  }
  return r;
}

// The same through shared memory: every lane copies and reads its own bytes.
template <int BITS> DEVICE void copy_words(const u8* chunk, u8* to, int lane) {
  if constexpr (BITS < 4) {
    copy_async<8>(chunk + lane * 8, to + lane * 8);
    if constexpr (BITS == 3) copy_async<4>(chunk + 256 + lane * 4, to + 256 + lane * 4);
  } else {
#pragma unroll
    for (int part = 0; part < BITS / 4; part++) copy_async<16>(chunk + part * 512 + lane * 16, to + part * 512 + lane * 16);
  }
}
template <int BITS> DEVICE Words<BITS> read_words(const u8* chunk, int lane) {
  Words<BITS> r;
  if constexpr (BITS < 4) {
    const uint2 a = *(const uint2*)(chunk + lane * 8);
    r.w[0] = a.x; r.w[1] = a.y;
    if constexpr (BITS == 3) r.w[2] = *(const u32*)(chunk + 256 + lane * 4);
  } else {
#pragma unroll
    for (int part = 0; part < BITS / 4; part++) {
      const uint4 a = *(const uint4*)(chunk + part * 512 + lane * 16);
      r.w[part * 4] = a.x; r.w[part * 4 + 1] = a.y; r.w[part * 4 + 2] = a.z; r.w[part * 4 + 3] = a.w;
    }
  }
  return r;
}

// Step s of 4. `z`, `z8`: 1024 + zero of row r and of row r + 8, twice each.
template <int BITS> DEVICE void fragment(const Words<BITS>& words, int s, u32 z, u32 z8, u32 (&a)[4]) {
  if constexpr (BITS == 4) {
    u32 v = words.w[s];
    u32 high = sub2(H2_960, z8);
    a[0] = sub2(and_or(v, 0x000f000f, H2_1024), z);
    a[1] = fma2(and_or(v, 0x00f000f0, H2_1024), ONE_16TH, high);
    v >>= 8;
    a[2] = sub2(and_or(v, 0x000f000f, H2_1024), z);
    a[3] = fma2(and_or(v, 0x00f000f0, H2_1024), ONE_16TH, high);
  } else if constexpr (BITS == 8) {
    u32 v = words.w[2 * s], w = words.w[2 * s + 1];
    a[0] = sub2(__byte_perm(v, 0x64646464, 0x4140), z);
    a[1] = sub2(__byte_perm(v, 0x64646464, 0x4342), z8);
    a[2] = sub2(__byte_perm(w, 0x64646464, 0x4140), z);
    a[3] = sub2(__byte_perm(w, 0x64646464, 0x4342), z8);
  } else if constexpr (BITS == 2) {
    const u32 v = words.w[s / 2] >> (s % 2 * 4), v8 = words.w[s / 2] >> (s % 2 * 4 + 8);
    a[0] = sub2(and_or(v, 0x00030003, H2_1024), z);
    a[1] = fma2(and_or(v, 0x000c000c, H2_1024), ONE_QUARTER, sub2(H2_768, z8));
    a[2] = sub2(and_or(v8, 0x00030003, H2_1024), z);
    a[3] = fma2(and_or(v8, 0x000c000c, H2_1024), ONE_QUARTER, sub2(H2_768, z8));
  } else {
#pragma unroll
    for (int p = 0; p < 4; p++) a[p] = sub2(three_bits(words.w[0], words.w[1], words.w[2], s * 4 + p) | H2_1024, p % 2 ? z8 : z);
  }
}

// Scales (and zeros) of rows r and r + 8 for one unit of inputs. Symmetric: fp16 pairs; else (scales, 1024 + zeros).
template <bool SYM> struct Scale { u32 s, z; };
template <int BITS, bool SYM> DEVICE Scale<SYM> load_scale(const u32* scales, int at) {
  Scale<SYM> r;
  if constexpr (SYM) {
    r.s = __ldg(scales + at);
    r.z = H2_1024 + (1u << (BITS - 1)) * 0x00010001u;
  } else {
    uint2 both = __ldg((const uint2*)scales + at);
    r.s = both.x; r.z = both.y;
  }
  return r;
}
template <int BITS, bool SYM> DEVICE Scale<SYM> read_scale(const u8* from, int lane) {
  Scale<SYM> r;
  if constexpr (SYM) {
    r.s = *(const u32*)(from + lane / 4 * 4);
    r.z = H2_1024 + (1u << (BITS - 1)) * 0x00010001u;
  } else {
    const uint2 both = *(const uint2*)(from + lane / 4 * 8);
    r.s = both.x; r.z = both.y;
  }
  return r;
}
DEVICE u32 twice_low(u32 h2) { return __byte_perm(h2, 0, 0x1010); }
DEVICE u32 twice_high(u32 h2) { return __byte_perm(h2, 0, 0x3232); }

// Step s of a chunk as the matrix unit takes it, times the scales of rows r and r + 8.
template <int BITS, bool SYM> DEVICE void scaled_fragment(const Words<BITS>& words, int s, const Scale<SYM>& scale, u32 (&a)[4]) {
  const u32 low = twice_low(scale.s), high = twice_high(scale.s);
  fragment<BITS>(words, s, twice_low(scale.z), twice_high(scale.z), a);
  a[0] = mul2(a[0], low); a[1] = mul2(a[1], high); a[2] = mul2(a[2], low); a[3] = mul2(a[3], high);
}
