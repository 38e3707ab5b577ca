// The blocks of a cluster (Hopper): they meet, and read and write each other's shared memory.

DEVICE void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
DEVICE void begin_in_cluster() {  // arrives, with nothing for the others to read but barriers that were shown
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
DEVICE void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
DEVICE u32 shared_of(const void* at, int block) {  // the address of what another block of the cluster has at the same place
#if __CUDA_ARCH__ >= 900
  u32 there; asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"((u32)__cvta_generic_to_shared(at)), "r"(block)); return there;
#else
  return 0;
#endif
}
DEVICE void put_there(u32 at, float v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
#endif
}
// A number for another block, counted by a barrier (copy_engine.cu) of the block that gets it: who waits for that one waits for no
// block to arrive.
DEVICE void send(u32 at, u32 v, u32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(at), "r"(v), "r"(barrier) : "memory");
#endif
}
DEVICE void send(u32 at, float v, u32 barrier) { send(at, (u32)__float_as_int(v), barrier); }
DEVICE void send(u32 at, uint2 v, u32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%0], {%1,%2}, [%3];" ::"r"(at), "r"(v.x), "r"(v.y), "r"(barrier) : "memory");
#endif
}
DEVICE void send(u32 at, int2 v, u32 barrier) { send(at, make_uint2(v.x, v.y), barrier); }
DEVICE void send(u32 at, float2 v, u32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];" ::"r"(at), "f"(v.x), "f"(v.y), "r"(barrier) : "memory");
#endif
}
DEVICE void send(u32 at, float4 v, u32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];"
      ::"r"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier) : "memory");
#endif
}
DEVICE void wait_for_sent(u64* barrier) {
#if __CUDA_ARCH__ >= 900
  u32 there;
  do asm volatile("{ .reg .pred done; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], 0; selp.u32 %0, 1, 0, done; }"
      : "=r"(there) : "r"((u32)__cvta_generic_to_shared(barrier)) : "memory");
  while (!there);
#endif
}
// Adds the floats that lie at the same address of the shared memory of block `rank`: one, two or four.
template <int PER> DEVICE void add_of_block(const float* at, int rank, float (&y)[PER]) {
#if __CUDA_ARCH__ >= 900
  float v[4] = {};
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"((u32)__cvta_generic_to_shared(at)), "r"(rank));
  if constexpr (PER == 4)
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(there) : "memory");
  else if constexpr (PER == 2) asm volatile("ld.shared::cluster.v2.f32 {%0,%1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "r"(there) : "memory");
  else asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v[0]) : "r"(there) : "memory");
#pragma unroll
  for (int j = 0; j < PER; j++) y[j] += v[j];
#endif
}
