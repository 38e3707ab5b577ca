// Four warps of Hopper that multiply together: their matrix product, and the fragments that it takes.
//
// One operand is in registers, as of mma(). The other is read from shared memory, and its 16 inputs lie in a row there. In
// fragment order those are the inputs of lane column c in all four steps: k = 16 s + 4 c + j at s * 4 + j. So step c of a
// warpgroup multiplies what lane column c holds elsewhere, and the weights are read with steps and columns swapped.

// d[64 x N] += a[64 x 16] b[16 x N]: 16 rows of each of four warps. It goes on until `warpgroup_wait`. `b` describes shared
// memory: N rows of 128 bytes, their pieces of 16 bytes swapped by the row.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SUMS(t) "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])
DEVICE void warpgroup_mma(float (&d)[4][4], const u32 (&a)[4], u64 b) {
  asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,"
      "%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, add, 1, 1, 0; }"
      : SUMS(0), SUMS(1), SUMS(2), SUMS(3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void warpgroup_mma(float (&d)[8][4], const u32 (&a)[4], u64 b) {
  asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,"
      "%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, add, 1, 1, 0; }"
      : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5), SUMS(6), SUMS(7)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void warpgroup_mma(float (&d)[12][4], const u32 (&a)[4], u64 b) {
  asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,"
      "%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,"
      "%41,%42,%43,%44,%45,%46,%47}, {%48,%49,%50,%51}, %52, add, 1, 1, 0; }"
      : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5), SUMS(6), SUMS(7), SUMS(8), SUMS(9), SUMS(10), SUMS(11)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void warpgroup_mma(float (&d)[16][4], const u32 (&a)[4], u64 b) {
  asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,"
      "%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,"
      "%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, add, 1, 1, 0; }"
      : SUMS(0), SUMS(1), SUMS(2), SUMS(3), SUMS(4), SUMS(5), SUMS(6), SUMS(7), SUMS(8), SUMS(9), SUMS(10), SUMS(11),
        SUMS(12), SUMS(13), SUMS(14), SUMS(15)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef SUMS
DEVICE void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }  // after registers that it reads were written
DEVICE void warpgroup_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void warpgroup_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
DEVICE void show_copies_to_warpgroups() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else  // never used, but named
template <int NT> DEVICE void warpgroup_mma(float (&d)[NT][4], const u32 (&a)[4], u64 b) {}
DEVICE void warpgroup_begin() {}
DEVICE void warpgroup_commit() {}
template <int PENDING> DEVICE void warpgroup_wait() {}
DEVICE void show_copies_to_warpgroups() {}
#endif

DEVICE u64 describe(const u8* xs) {
  return (u64)((u32)__cvta_generic_to_shared(xs) >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// Where piece `at` of 16 bytes of a tile's chunk is kept in shared memory, so that lanes of eight rows find eight banks.
template <int BITS> DEVICE int turned_piece(int at) { return BITS < 4 ? at : at ^ (at >> 3 & 3); }

// The words that lane (r, c) needs for a warpgroup's step s, of lane column s: inputs j, j + 1 of two steps, c / 2 and c / 2 + 2.
template <int BITS> DEVICE void turned_words(const u8* chunk, int r, int c, int s, u32 (&v)[2], u32& third) {
  const int lane = r * 4 + s;
  if constexpr (BITS < 4) {
    const uint2 both = *(const uint2*)(chunk + lane * 8);
    if constexpr (BITS == 2) {
      v[0] = both.x >> (c / 2 * 4 + c % 2 * 8); v[1] = both.y >> (c / 2 * 4 + c % 2 * 8);
    } else {
      v[0] = both.x; v[1] = both.y;
      third = *(const u32*)(chunk + 256 + lane * 4);
    }
  } else {
    const u8* from = chunk + turned_piece<BITS>(lane) * 16;
    if constexpr (BITS == 4) {
      v[0] = *(const u32*)(from + c / 2 * 4) >> (c % 2 * 8); v[1] = *(const u32*)(from + c / 2 * 4 + 8) >> (c % 2 * 8);
    } else {
      v[0] = *(const u32*)(from + c * 4); v[1] = *(const u32*)(from + c * 4 + 512);
    }
  }
}

// As scaled_fragment(), of those words. Each of the two steps has its own scale.
template <int BITS, bool SYM> DEVICE void turned_fragment(const u32 (&v)[2], u32 third, int c, const Scale<SYM> (&scales)[2], u32 (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 z = twice_low(scales[i].z), z8 = twice_high(scales[i].z);
    u32 &low = a[i * 2], &high = a[i * 2 + 1];  // rows r and r + 8
    if constexpr (BITS == 4) {
      low = sub2(and_or(v[i], 0x000f000f, H2_1024), z);
      high = fma2(and_or(v[i], 0x00f000f0, H2_1024), ONE_16TH, sub2(H2_960, z8));
    } else if constexpr (BITS == 8) {
      low = sub2(__byte_perm(v[i], 0x64646464, 0x4140), z);
      high = sub2(__byte_perm(v[i], 0x64646464, 0x4342), z8);
    } else if constexpr (BITS == 2) {
      low = sub2(and_or(v[i], 0x00030003, H2_1024), z);
      high = fma2(and_or(v[i], 0x000c000c, H2_1024), ONE_QUARTER, sub2(H2_768, z8));
    } else {
      const int first = (c / 2 + 2 * i) * 4 + c % 2 * 2;  // register of the step
      low = sub2(three_bits(v[0], v[1], third, first) | H2_1024, z);
      high = sub2(three_bits(v[0], v[1], third, first + 1) | H2_1024, z8);
    }
    low = mul2(low, twice_low(scales[i].s)); high = mul2(high, twice_high(scales[i].s));
  }
}
