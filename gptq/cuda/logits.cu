// Logits of experts as numbers that have an order, and from one block to others.

// A number whose bits are ordered as floats are; never 0 but for NaN.
DEVICE u32 ordered_bits(float v) {
  const u32 bits = __float_as_int(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE float logit_of(u32 ordered) { return __int_as_float(ordered & 0x80000000u ? ordered ^ 0x80000000u : ~ordered); }

DEVICE u32 warp_max(u32 v) {
#if __CUDA_ARCH__ >= 800
  u32 r; asm("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v)); return r;
#else
#pragma unroll
  for (int at = 16; at; at >>= 1) v = max(v, __shfl_xor_sync(FULL, v, at));
  return v;
#endif
}

#define NO_LOGIT 0xffffffffu  // no number that a block writes

DEVICE void write_logit(float* to, float v) {
  const u32 bits = v == v ? __float_as_int(v) : 0x7ffffffeu;
  asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(to), "r"(bits) : "memory");
}
DEVICE u32 read_logit(const float* from) {
  u32 bits; asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(bits) : "l"(from) : "memory"); return bits;
}
// Waits until another block has written it, and takes it away.
DEVICE float take_logit(float* from) {
  u32 bits;
  do bits = read_logit(from); while (bits == NO_LOGIT);
  asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(from), "r"(NO_LOGIT) : "memory");
  return __int_as_float(bits);
}
