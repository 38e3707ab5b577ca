// The copy engine of Hopper and newer GPUs, which fills shared memory by itself, and the barriers that say when slots of a ring
// are full or free.

#if __CUDA_ARCH__ >= 900
DEVICE u32 shared_at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void slot_barrier(u64* barrier, int arrivals) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_at(barrier)), "r"(arrivals) : "memory"); }
DEVICE void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void arrive(u64* barrier) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_at(barrier)) : "memory"); }
DEVICE void expect_bytes(u64* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_at(barrier)), "r"(bytes) : "memory");
}
DEVICE bool slot_is_ready(u64* barrier, u32 parity) {  // waits for a while
  u32 ready;
  asm volatile("{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
      : "=r"(ready) : "r"(shared_at(barrier)), "r"(parity) : "memory");
  return ready;
}
DEVICE void wait_for_slot(u64* barrier, u32 parity) {
  while (!slot_is_ready(barrier, parity)) {}
}
DEVICE void copy_run(const void* from, int bytes, void* to, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(shared_at(to)), "l"(from), "r"(bytes), "r"(shared_at(barrier)) : "memory");
}
// Of the first WARPS warps of a block; the others do not wait for them.
template <int WARPS> DEVICE void barrier_of_warps() { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); }
#endif
