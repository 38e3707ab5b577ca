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
DEVICE void copy_box(const u64* map, int x, int y, void* to, u64* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(shared_at(to)), "l"(map), "r"(x), "r"(y), "r"(shared_at(barrier)) : "memory");
}
DEVICE void copy_box(const u64* map, int x, int y, int z, void* to, u64* barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
      ::"r"(shared_at(to)), "l"(map), "r"(x), "r"(y), "r"(z), "r"(shared_at(barrier)) : "memory");
}
// Into the same place of each block of the cluster whose bit is set; each block's own barrier counts the bytes.
DEVICE void copy_box_to_all(const u64* map, int x, int y, void* to, u64* barrier, u16 blocks) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
      ::"r"(shared_at(to)), "l"(map), "r"(x), "r"(y), "r"(shared_at(barrier)), "h"(blocks) : "memory");
}
DEVICE void copy_run(const void* from, int bytes, void* to, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(shared_at(to)), "l"(from), "r"(bytes), "r"(shared_at(barrier)) : "memory");
}
DEVICE void fetch_map(const u64* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
DEVICE int block_of_cluster() { u32 r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
DEVICE void arrive_at(u64* barrier, int block) {  // at the barrier of another block of the cluster
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }"
      ::"r"(shared_at(barrier)), "r"(block) : "memory");
}
DEVICE void barrier_of_cluster() { asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory"); }
// Of the first WARPS warps of a block; the others do not wait for them.
template <int WARPS> DEVICE void barrier_of_warps() { asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory"); }
#endif
