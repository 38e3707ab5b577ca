// Rows of a prompt between the products of transformers' own forward. Numbers are fp16 or bf16, what products take and give fp16.

// Rows as fp16 in the order of a weight: of every expert, or of each row's own. A block takes a row, eight inputs a thread.
template <class T> DEVICE void order_inputs(const OrderInputsArguments& p) {
  u16* row = (u16*)shared_words;
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const size_t source = p.sources ? __ldcg(p.sources + blockIdx.x) : blockIdx.x;
  const u16* order = p.order + (p.sorted ? __ldcg(p.sorted + blockIdx.x) * p.padded : 0);
  for (int at = threadIdx.x * 8; at < p.k; at += blockDim.x * 8) {
    const uint4 v = __ldcg((const uint4*)(p.x + source * p.k + at));
    const u16* from = (const u16*)&v;
#pragma unroll
    for (int j = 0; j < 8; j++) row[at + j] = to_half(T::wide(from[j]));
  }
  if (threadIdx.x == 0) row[p.k] = 0;  // what padding names
  __syncthreads();
  for (int at = threadIdx.x * 8; at < p.padded; at += blockDim.x * 8) {
    const uint4 places = __ldg((const uint4*)(order + at));
    const u16* from = (const u16*)&places;
    uint4 v;
    u16* to = (u16*)&v;
#pragma unroll
    for (int j = 0; j < 8; j++) to[j] = row[from[j]];
    *(uint4*)(p.out + (size_t)blockIdx.x * p.padded + at) = v;
  }
}

// activation(gate) * up, of gates and ups in turn, eight of each. A block takes a row, or a part of it; a thread eight outputs.
template <class T> DEVICE void gate_rows(const GateRowsArguments& p) {
  allow_next_kernel_to_start();
  wait_for_previous_kernel();
  const int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (at >= p.inner) return;
  const uint4* from = (const uint4*)(p.y + (size_t)blockIdx.x * p.width + at * 2);
  const uint4 gates = __ldcg(from), ups = __ldcg(from + 1);
  const u16 *gate = (const u16*)&gates, *up = (const u16*)&ups;
  uint4 v;
  u16* to = (u16*)&v;
#pragma unroll
  for (int j = 0; j < 8; j++) to[j] = T::narrow(activated(to_float(gate[j]), p.activation) * to_float(up[j]));
  *(uint4*)(p.out + (size_t)blockIdx.x * p.inner + at) = v;
}
