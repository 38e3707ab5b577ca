// Rows of a prompt between the products of transformers' own forward. Numbers are fp16 or bf16, what products take and give fp16.

// Rows as fp16 in the order of a weight: of every expert, or of each row's own. With `powers` each is divided by a power of two, which
// is left there. A block takes a row, eight inputs a thread.
template <class T> DEVICE void order_inputs(const OrderInputsArguments& p) {
  u16* row = (u16*)shared_words;
  u32* scratch = (u32*)(row + (p.k + 8) / 8 * 8);  // [32]
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const size_t source = p.sources ? __ldcg(p.sources + blockIdx.x) : blockIdx.x;
  const u16* order = p.order + (p.sorted ? __ldcg(p.sorted + blockIdx.x) * p.padded : 0);
  u32 largest = 0;
  for (int at = threadIdx.x * 8; at < p.k; at += blockDim.x * 8) {
    const uint4 v = __ldcg((const uint4*)(p.x + source * p.k + at));
    const u16* from = (const u16*)&v;
    *(uint4*)(row + at) = v;
#pragma unroll
    for (int j = 0; j < 8; j++) largest = max(largest, size_bits(T::wide(from[j])));
  }
  if (threadIdx.x == 0) row[p.k] = 0;  // what padding names
  float inverse = 1.f;
  if (p.powers) {
    const float power = power_of_largest(block_max(largest, scratch));
    if (threadIdx.x == 0) p.powers[blockIdx.x] = power;
    inverse = inverse_power(power);
  } else __syncthreads();
  for (int at = threadIdx.x * 8; at < p.padded; at += blockDim.x * 8) {
    const uint4 places = __ldg((const uint4*)(order + at));
    const u16* from = (const u16*)&places;
    uint4 v;
    u16* to = (u16*)&v;
#pragma unroll
    for (int j = 0; j < 8; j++) to[j] = to_half(T::wide(row[from[j]]) * inverse);
    *(uint4*)(p.out + (size_t)blockIdx.x * p.padded + at) = v;
  }
}

// activation(gate) * up, of gates and ups in turn, eight of each, each times the row's power of two and then with its bias, where there
// are any. A block takes a row, or a part of it; a thread eight outputs.
template <class T> DEVICE void gate_rows(const GateRowsArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (at >= p.inner) return;
  const uint4* from = (const uint4*)(p.y + (size_t)blockIdx.x * p.width + at * 2);
  const uint4 gates = __ldcg(from), ups = __ldcg(from + 1);
  const u16 *gate = (const u16*)&gates, *up = (const u16*)&ups;
  const float power = p.powers ? __ldcg(p.powers + blockIdx.x) : 1.f;
  const uint4* biases = (const uint4*)(p.bias + at * 2);
  const uint4 none = make_uint4(0, 0, 0, 0), gate_biases = p.bias ? __ldg(biases) : none, up_biases = p.bias ? __ldg(biases + 1) : none;
  const u16 *gate_bias = (const u16*)&gate_biases, *up_bias = (const u16*)&up_biases;
  uint4 v;
  u16* to = (u16*)&v;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float g = to_float(gate[j]) * power + to_float(gate_bias[j]), u = to_float(up[j]) * power + to_float(up_bias[j]);
    to[j] = T::narrow(activated(g, p.activation) * u);
  }
  *(uint4*)(p.out + (size_t)blockIdx.x * p.inner + at) = v;
}

// The heads of query and key of every token, turned by the token's angles as `rotate` turns them. A block takes a token; a thread
// two pairs of numbers of some heads, whose angles are the same.
template <class T> DEVICE void turn_rows(const TurnRowsArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int half = p.rotated / 2, across = half / 2, i = threadIdx.x % across * 2, first = threadIdx.x / across;
  const int together = max(1, (int)blockDim.x / across), heads = p.heads + p.kv_heads;
  const size_t row = blockIdx.x;
  auto numbers = [&](int head) {
    return head < p.heads ? p.q + row * p.q_row + head * p.q_head : p.k + row * p.k_row + (head - p.heads) * p.k_head;
  };
  auto target = [&](int head) { return head < p.heads ? p.q_out + (row * p.heads + head) * p.d : p.k_out + (row * p.kv_heads + head - p.heads) * p.d; };
  float cosines[2][2], sines[2][2];  // of each pair, for its two numbers
#pragma unroll
  for (int of = 0; of < 2; of++) {
    const int at = i + of, angle = p.kind == 2 ? 2 * at : at, other = p.kind == 0 ? (at + half) % p.angles : p.kind == 2 ? 2 * at + 1 : at;
    const u16 *cos = p.cosines + row * p.cos_row, *sin = p.sines + row * p.sin_row;
    cosines[of][0] = T::wide(__ldcg(cos + angle)); cosines[of][1] = T::wide(__ldcg(cos + other));
    sines[of][0] = T::wide(__ldcg(sin + angle)); sines[of][1] = T::wide(__ldcg(sin + other));
  }
  const bool pairs = p.kind != 0, apart = p.kind == 3;
  const int low = pairs ? 2 * i : i, high = pairs ? low + 2 : i + half;
#pragma unroll 4
  for (int head = first; head < heads && first < together; head += together) {
    const u16* from = numbers(head);
    const u32 v = __ldcg((const u32*)(from + low)), w = __ldcg((const u32*)(from + high));
    const u32 a = pairs ? v & 0xffff | w << 16 : v, b = pairs ? v >> 16 | w & 0xffff0000 : w;  // the first numbers of both pairs, the second
    float x[2], y[2];
#pragma unroll
    for (int of = 0; of < 2; of++) {
      const float m = T::wide((u16)(a >> of * 16)), n = T::wide((u16)(b >> of * 16));
      x[of] = m * cosines[of][0] - n * sines[of][0];
      y[of] = n * cosines[of][1] + m * sines[of][1];
    }
    u16* to = target(head);
    const bool mixed = pairs && !apart;
    *(u32*)(to + (mixed ? low : i)) = pair(T::narrow(x[0]), T::narrow(mixed ? y[0] : x[1]));
    *(u32*)(to + (mixed ? low + 2 : i + half)) = pair(T::narrow(mixed ? x[1] : y[0]), T::narrow(y[1]));
  }
  const int rest = (p.d - p.rotated) / 2;
  for (int j = threadIdx.x; j < rest * heads; j += blockDim.x) {
    const int head = j / rest, at = p.rotated + j % rest * 2;
    *(u32*)(target(head) + at) = __ldcg((const u32*)(numbers(head) + at));
  }
}
