// A block of up to ROWS rows of a weight, rounded one after the other (gptq_solver.py); a thread keeps one column of the block.
// Divisions are exact ones: what is compiled here otherwise divides faster and less well.

extern "C" __global__ void __launch_bounds__(THREADS) round_block(const RoundArguments p) {
  __shared__ float factor[ROWS][ROWS];
  for (int at = threadIdx.x; at < ROWS * ROWS; at += THREADS) {
    const int i = at / ROWS, j = at % ROWS;
    factor[i][j] = i < p.count && j < p.count ? p.factor[(size_t)i * p.row_stride + (size_t)j * p.column_stride] : 0;
  }
  __syncthreads();
  const int column = blockIdx.x * THREADS + threadIdx.x;
  if (column >= p.width) return;
  const float scale = p.scale[column], zero = p.zero[column], top = p.top[column];
  float row[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; i++) row[i] = i < p.count ? p.rows[(size_t)i * p.width + column] : 0;
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    if (i >= p.count) break;
    const float number = fminf(fmaxf(rintf(__fadd_rn(__fdiv_rn(row[i], scale), zero)), 0), top);
    const float error = __fdiv_rn(__fsub_rn(row[i], __fmul_rn(__fsub_rn(number, zero), scale)), factor[i][i]);
    p.q[(size_t)i * p.width + column] = (u8)number;
    p.errors[(size_t)i * p.width + column] = error;
#pragma unroll
    for (int j = i + 1; j < ROWS; j++) row[j] = fmaf(-factor[i][j], error, row[j]);
  }
}
