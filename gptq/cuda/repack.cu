// The file's words -> tiles and chunks, once, when a model is loaded; and back to dense weights.

template <int BITS> DEVICE u32 value_at(const u32* words, int width, int k, int column) {
  const int bit = k * BITS, word = bit / 32, shift = bit % 32;
  u32 v = words[(size_t)word * width + column] >> shift;
  if (BITS == 3 && shift > 29) v |= words[(size_t)(word + 1) * width + column] << (32 - shift);
  return v & ((1 << BITS) - 1);
}

// Put the value of step s, lane column element j and row half `high` where fragment() expects it (unpack.cu).
template <int BITS> DEVICE void place_value(u32 (&words)[BITS], u32 v, int s, int j, int high) {
  const int reg = j / 2 * 2 + high, half = j % 2;  // the register of the fragment, and which half of it
  if constexpr (BITS == 4) words[s] |= v << (4 * (reg + 4 * half));
  else if constexpr (BITS == 8) words[2 * s + reg / 2] |= v << (8 * (reg % 2 * 2 + half));
  else if constexpr (BITS == 2) words[s / 2] |= v << (s % 2 * 4 + reg % 2 * 2 + reg / 2 * 8 + 16 * half);
  else {
    const int from = reg / 2 * 8 + 16 * half;  // of the byte
    if (s < 3) words[s] |= v << (from + 3 * high);
    else {
      words[high] |= (v & 3) << (from + 6);
      words[2] |= (v >> 2) << (from + 6 + high);
    }
  }
}

template <int BITS> DEVICE void store_words(const u32 (&words)[BITS], u8* chunk, int lane) {
#pragma unroll
  for (int i = 0; i < BITS; i++) {
    if constexpr (BITS == 3) *(u32*)(i < 2 ? chunk + lane * 8 + i * 4 : chunk + 256 + lane * 4) = words[i];
    else if constexpr (BITS == 2) *(u32*)(chunk + lane * 8 + i * 4) = words[i];
    else *(u32*)(chunk + i / 4 * 512 + lane * 16 + i % 4 * 4) = words[i];
  }
}

// A thread gathers the words of one lane for one chunk of one tile.
template <int BITS> DEVICE void repack_tiles(const RepackArguments& p) {
  static_assert(BITS == 2 || BITS == 3 || BITS == 4 || BITS == 8, "words of other widths are packed in other ways");
  static_assert(TILE == 16 && CHUNK == 64, "a lane holds rows r and r + 8, and four steps of four inputs");
  const size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= (size_t)p.tiles * p.chunks * 32) return;
  const int lane = at % 32, chunk = at / 32 % p.chunks, tile = at / 32 / p.chunks;
  u32 words[BITS];
#pragma unroll
  for (int i = 0; i < BITS; i++) words[i] = 0;
#pragma unroll
  for (int high = 0; high < 2; high++) {
    const int from = p.columns[tile * TILE + high * 8 + lane / 4];
    if (from < 0) continue;
    const u32* source = p.sources[from >> 28];
    const int width = p.widths[from >> 28], column = from & 0x0fffffff;
#pragma unroll
    for (int s = 0; s < 4; s++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int k = p.order[chunk * CHUNK + s * 16 + lane % 4 * 4 + j];
        if (k >= 0) place_value<BITS>(words, value_at<BITS>(source, width, k, column), s, j, high);
      }
  }
  store_words<BITS>(words, p.out + ((size_t)tile * p.chunks + chunk) * (BITS * 128), lane);
}

// 16 numbers of each of two neighbouring lanes, in a row; the odd lane has those behind.
DEVICE void put_pairs(u16* to, bool odd, const u32 (&v)[8]) {
  u32 other[4];
#pragma unroll
  for (int i = 0; i < 4; i++) other[i] = __shfl_xor_sync(FULL, odd ? v[i] : v[4 + i], 1);
  *(uint4*)to = odd ? make_uint4(other[0], other[1], other[2], other[3]) : make_uint4(v[0], v[1], v[2], v[3]);
  *(uint4*)(to + 16) = odd ? make_uint4(v[4], v[5], v[6], v[7]) : make_uint4(other[0], other[1], other[2], other[3]);
}

// Packed -> dense, for products of many rows. A warp takes a chunk of a tile.
template <int BITS, bool SYM, int UNITS> DEVICE void unpack_tiles(const UnpackArguments& p) {
  const int lane = threadIdx.x % 32;
  const int at = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (at >= p.tiles * p.chunks) return;
  const int tile = at / p.chunks, chunk = at % p.chunks;
  const size_t stored = (size_t)(p.first_tile + tile) * p.chunks + chunk;
  const Words<BITS> words = load_words<BITS>(p.weights + stored * chunk_bytes<BITS>(), lane);
  u32 row[8], row8[8];  // of rows r and r + 8
#pragma unroll
  for (int s = 0; s < 4; s++) {
    const int unit = chunk * UNITS + s * UNITS / 4;
    const Scale<SYM> scale =
        load_scale<BITS, SYM>(p.scales, ((p.first_tile + tile) * p.groups + (int)(unit * p.unit_to_group >> 16)) * 8 + lane / 4);
    u32 a[4];
    scaled_fragment<BITS, SYM>(words, s, scale, a);
    row[s * 2] = a[0]; row[s * 2 + 1] = a[2];
    row8[s * 2] = a[1]; row8[s * 2 + 1] = a[3];
  }
  // Two lanes have 64 bytes in a row. They exchange half of them, so that each store of both fills whole sectors of 32 bytes.
  const bool odd = lane % 2;
  u16* to = p.out + ((size_t)tile * TILE + lane / 4) * p.chunks * CHUNK + chunk * CHUNK + lane % 4 / 2 * 32 + odd * 8;
  put_pairs(to, odd, row);
  put_pairs(to + (size_t)8 * p.chunks * CHUNK, odd, row8);
}
