// wide_batch.cu for Hopper with a copying warp: it fetches what the others multiply, by a few instructions of the copy engine.
//
// In wide_batch.cu a third of all instructions copy, and a barrier holds all warps of a block together in every step. Here
// barriers in shared memory say which slots of the ring are full and which are free, so warpgroups drift apart: one unpacks
// while the other multiplies. Items and ranges are those of wide_batch.cu. Who has the first of an item's two parts adds the
// second, which is there by then; of more parts every block adds some of the columns. Blocks of a CLUSTER share the rows of x,
// of which each copies a part for all; next to each other they make an item of CLUSTER times as many tiles.

template <int BITS, bool SYM, int UNITS, int MT, int NT, int WN, int STAGES, int EPILOGUE> struct BulkBatchSizes {
  static constexpr int SCALE_BYTES = SYM ? 32 : 64, CHUNK_BYTES = BITS * 128, TILES = WN * MT, ROWS = NT * 8;
  static constexpr int X_BYTES = ROWS * CHUNK * 2, WORD_BYTES = TILES * CHUNK_BYTES, SCALES_BYTES = TILES * UNITS * SCALE_BYTES;
  static constexpr int FILLED = X_BYTES + WORD_BYTES + SCALES_BYTES, SLOT = (FILLED + 1023) / 1024 * 1024;
  static constexpr int OUTS = MT * (EPILOGUE == SILU ? 8 : TILE), WIDTH = OUTS + 4;
  static_assert(TILE == 16 && CHUNK == 64 && BITS >= 4, "a tile's chunk is whole lines of 128 bytes, 4 or 8");
  static_assert(NT % 4 == 0 && WN % 4 == 0, "a warpgroup is four warps; there are products of 32, 64, 96, 128, 256 rows");
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// As turned_words() of warpgroup.cu, in the order in which the copy engine swaps pieces: by the line of 128 bytes that they are in.
template <int BITS> DEVICE void boxed_words(const u8* words, int tile, int r, int c, int s, u32 (&v)[2]) {
  constexpr int PIECES = BITS * 8;  // of a tile's chunk
  auto piece = [&](int at) { return words + (tile * PIECES + (at ^ (tile * (PIECES / 8) + at / 8) % 8)) * 16; };
  const int lane = r * 4 + s;
  if constexpr (BITS == 4) {
    const u8* from = piece(lane) + c / 2 * 4;
    v[0] = *(const u32*)from >> (c % 2 * 8); v[1] = *(const u32*)(from + 8) >> (c % 2 * 8);
  } else {
    v[0] = *(const u32*)(piece(lane) + c * 4); v[1] = *(const u32*)(piece(lane + 32) + c * 4);
  }
}

template <int BITS, bool SYM, int UNITS, int MT, int NT, int WN, int STAGES, int EPILOGUE, int COPIERS, int CLUSTER>
DEVICE void bulk_batch(const BulkBatchArguments& p) {
  typedef BulkBatchSizes<BITS, SYM, UNITS, MT, NT, WN, STAGES, EPILOGUE> Sizes;
  constexpr int TILES = Sizes::TILES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, c = lane % 4;
  __shared__ u64 full[STAGES], empty[STAGES];
  u8* ring = (u8*)shared_words;
  ring += -shared_at(ring) % 1024;
  float* exchange = (float*)(ring + STAGES * Sizes::SLOT);
  const u32 high = (p.rows + Sizes::ROWS - 1) / Sizes::ROWS, per = p.chunks;  // items in the height; steps of one
  const u32 range = blockIdx.x / CLUSTER, ranges = gridDim.x / CLUSTER;  // of this block or cluster; of all
  const int rank = CLUSTER > 1 ? block_of_cluster() : 0;
  const u64 total = (u64)((p.tiles + TILES * CLUSTER - 1) / (TILES * CLUSTER)) * high * per;
  const u32 begin = (u32)(total * range / ranges), end = (u32)(total * (range + 1) / ranges);
  auto range_of = [&](u32 at) { return (u32)(((u64)(at + 1) * ranges - 1) / total); };
  auto tile_of = [&](u32 item) { return (int)((item / high * CLUSTER + rank) * TILES); };

  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < STAGES; i++) { slot_barrier(full + i, 1); slot_barrier(empty + i, WN * CLUSTER); }
    show_barriers();
    fetch_map(p.weight_map); fetch_map(p.scale_map); fetch_map(p.x_map);
  }
  if constexpr (CLUSTER > 1) barrier_of_cluster();
  else __syncthreads();

  if (warp >= WN) {  // the copying warp
    if constexpr (COPIERS == 4) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp > WN) return;
    auto copy_weights = [&](u32 at, int slot) {
      const u32 item = at / per, chunk = at - item * per;
      u8* to = ring + slot * Sizes::SLOT + Sizes::X_BYTES;
      expect_bytes(full + slot, Sizes::FILLED);
      copy_box(p.weight_map, 0, chunk * (Sizes::CHUNK_BYTES / 128), tile_of(item), to, full + slot);
#pragma unroll
      for (int u = 0; u < UNITS; u++)
        copy_box(p.scale_map, 0, (chunk * UNITS + u) * p.unit_to_group >> 16, tile_of(item), to + Sizes::WORD_BYTES + u * TILES * Sizes::SCALE_BYTES, full + slot);
    };
    auto copy_x = [&](u32 at, int slot) {
      const u32 item = at / per, chunk = at - item * per;
      const int row = item % high * Sizes::ROWS + rank * (Sizes::ROWS / CLUSTER);
      u8* to = ring + slot * Sizes::SLOT + rank * (Sizes::X_BYTES / CLUSTER);
      if constexpr (CLUSTER > 1) copy_box_to_all(p.x_map, chunk * CHUNK, row, to, full + slot, (1 << CLUSTER) - 1);
      else copy_box(p.x_map, chunk * CHUNK, row, to, full + slot);
    };
    if (lane == 0) {
      const u32 ahead = min((u32)STAGES, end - begin);
#pragma unroll 1
      for (u32 i = 0; i < ahead; i++) copy_weights(begin + i, i);
      allow_next_kernel_to_start();
      wait_for_previous_kernel();
#pragma unroll 1
      for (u32 i = 0; i < ahead; i++) copy_x(begin + i, i);
      int slot = 0;
      u32 parity = 0;
#pragma unroll 1
      for (u32 at = begin + ahead; at < end; at++) {
        wait_for_slot(empty + slot, parity);
        copy_weights(at, slot);
        copy_x(at, slot);
        if (++slot == STAGES) { slot = 0; parity ^= 1; }
      }
    }
    if constexpr (CLUSTER > 1) { __syncwarp(); barrier_of_cluster(); }
    return;
  }

  if constexpr (COPIERS == 4) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  int slot = 0;
  u32 parity = 0, left = end - begin;
  u32 a[4][MT][4];  // fragments of a chunk
  Scale<SYM> scale[MT][2];
  auto read_scales = [&](int slot) {
    const u8* from = ring + slot * Sizes::SLOT + Sizes::X_BYTES + Sizes::WORD_BYTES + warp * MT * Sizes::SCALE_BYTES;
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < 2; i++) scale[m][i] = read_scale<BITS, SYM>(from + ((c / 2 + i * 2) * UNITS / 4 * TILES + m) * Sizes::SCALE_BYTES, lane);
  };
  auto unpack = [&](int slot, int s, u32 (&to)[MT][4]) {
    const u8* words = ring + slot * Sizes::SLOT + Sizes::X_BYTES;
#pragma unroll
    for (int m = 0; m < MT; m++) {
      u32 v[2];
      boxed_words<BITS>(words, warp * MT + m, r, c, s, v);
      turned_fragment<BITS, SYM>(v, 0, c, scale[m], to[m]);
    }
  };
  wait_for_slot(full, 0);
  read_scales(0);
#pragma unroll
  for (int s = 0; s < 4; s++) unpack(0, s, a[s]);

#pragma unroll 1
  for (u32 at = begin; at < end;) {
    const u32 item = at / per, first = at - item * per, last = min(per, first + end - at);
    at += last - first;
    float y[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int t = 0; t < NT; t++) y[m][t][0] = y[m][t][1] = y[m][t][2] = y[m][t][3] = 0.f;
#pragma unroll 1
    for (u32 step = first; step < last; step++) {
      const u64 b = describe(ring + slot * Sizes::SLOT);
      const int next_slot = slot + 1 == STAGES ? 0 : slot + 1;
      left--;
      warpgroup_begin();  // all products of a chunk one behind the other: each pause between them would cost more than half of one
#pragma unroll
      for (int s = 0; s < 4; s++) {
#pragma unroll
        for (int m = 0; m < MT; m++) warpgroup_mma(y[m], a[s][m], b + s * 2);  // 32 bytes of each row
        warpgroup_commit();
      }
#pragma unroll
      for (int s = 0; s < 4; s++) {
        if (s == 0) warpgroup_wait<3>();  // those whose fragments are replaced now
        if (s == 1) warpgroup_wait<2>();
        if (s == 2) warpgroup_wait<1>();
        if (s == 3) {
          warpgroup_wait<0>();
          if (lane < CLUSTER) {
            if (CLUSTER == 1 || lane == rank) arrive(empty + slot);
            else arrive_at(empty + slot, lane);
          }
        }
        if (left) {
          if (s == 0) {
            if (next_slot == 0) parity ^= 1;
            wait_for_slot(full + next_slot, parity);
            read_scales(next_slot);
          }
          unpack(next_slot, s, a[s]);
        }
      }
      slot = next_slot;
    }
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int t = 0; t < NT; t++)
#pragma unroll
        for (int e = 0; e < 4; e++) asm volatile("" : "+f"(y[m][t][e])::"memory");  // not read before the wait

    bool whole = last - first == per;
    if (!whole) {  // other blocks have the rest
      const u32 before = range_of(item * per), parts = range_of(item * per + per - 1) - before + 1;
      u32* arrived = p.done + item * CLUSTER + rank;
      auto sums = [&](u32 of, bool begins) { return (float4*)p.partial + ((size_t)((of * CLUSTER + rank) * 2 + begins) * WN + warp) * MT * NT * 32 + lane; };
      whole = parts == 2 && first == 0;
      if (whole) {  // the second part is the first that its block made, so it is there
        if (threadIdx.x == 0) {
          while (arrivals(arrived) == 0) {}
          *arrived = 0;  // for the next launch
        }
        barrier_of_warps<WN>();
        const float4* from = sums(before + 1, false);
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int t = 0; t < NT; t++) {
            const float4 v = __ldcg(from + (m * NT + t) * 32);
            y[m][t][0] += v.x; y[m][t][1] += v.y; y[m][t][2] += v.z; y[m][t][3] += v.w;
          }
      } else {
        float4* to = sums(range, first == 0);
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int t = 0; t < NT; t++) __stcg(to + (m * NT + t) * 32, make_float4(y[m][t][0], y[m][t][1], y[m][t][2], y[m][t][3]));
        barrier_of_warps<WN>();
        if (threadIdx.x == 0) count_arrival(arrived);
      }
    }
    if (whole) write_rows<NT, MT, EPILOGUE, Sizes>(p, y, tile_of(item) + warp * MT, item % high * Sizes::ROWS, exchange + warp * 8 * Sizes::WIDTH);
  }

  // Of an item in more parts each block adds some of its columns, when all have left their sums. All blocks are there at once.
  constexpr int GROUP = NT < 4 ? NT : 4;
#pragma unroll 1
  for (int i = 0; i < 2; i++) {
    const u32 item = (i ? end - 1 : begin) / per, before = range_of(item * per), parts = range_of(item * per + per - 1) - before + 1;
    if (i && item == begin / per) break;
    if (parts <= 2) continue;
    if (threadIdx.x == 0) {
      while (arrivals(p.done + item * CLUSTER + rank) < parts) {}
      if (count_arrival(p.done + item * CLUSTER + rank) == parts * 2 - 1) p.done[item * CLUSTER + rank] = 0;  // for the next launch
    }
    barrier_of_warps<WN>();
    const int of = range - before, own_end = NT * (of + 1) / parts;
#pragma unroll 1
    for (int t = NT * of / parts; t < own_end; t += GROUP) {
      float z[MT][GROUP][4];
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int g = 0; g < GROUP; g++) z[m][g][0] = z[m][g][1] = z[m][g][2] = z[m][g][3] = 0.f;
#pragma unroll 2
      for (u32 of_part = 0; of_part < parts; of_part++) {
        const float4* from = (const float4*)p.partial + ((size_t)(((before + of_part) * CLUSTER + rank) * 2 + (of_part == 0)) * WN + warp) * MT * NT * 32 + t * 32 + lane;
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int g = 0; g < GROUP; g++) {
            if (t + g < own_end) {
              const float4 v = __ldcg(from + (m * NT + g) * 32);
              z[m][g][0] += v.x; z[m][g][1] += v.y; z[m][g][2] += v.z; z[m][g][3] += v.w;
            }
          }
      }
      write_rows<GROUP, MT, EPILOGUE, Sizes>(
          p, z, tile_of(item) + warp * MT, item % high * Sizes::ROWS + t * 8, exchange + warp * 8 * Sizes::WIDTH, own_end - t);
    }
  }
  if constexpr (CLUSTER > 1) barrier_of_cluster();  // nobody leaves while another may reach into its shared memory
}
#else
template <int BITS, bool SYM, int UNITS, int MT, int NT, int WN, int STAGES, int EPILOGUE, int COPIERS, int CLUSTER> DEVICE void bulk_batch(const BulkBatchArguments& p) {}
#endif
