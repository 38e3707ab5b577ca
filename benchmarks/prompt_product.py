"""A product of a prompt whose weights stay integers, beside cuBLAS: `python benchmarks/prompt_product.py` (nvcc, Hopper).

y [tokens, features] = x w^T, the weights as the operand of 256 columns. `scale`: they are integers in fp16, and the sums are
multiplied with the ratio of two groups' scales where a group ends, so that they are always in units of the present one; `silu`: the
same, rows of w are gates and ups, eight of each in turn, and silu(gate) * up is written; `plain` and `fused`: without scales. Compiled, not run. The number behind the name: 0 no order of the two warpgroups, 2 one group each in turn, 3 the
next may begin once half of the other's group is multiplied; behind `_` how many blocks share what they read of x.
"""
# mypy: ignore-errors
# ruff: noqa

import ctypes
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch

registers, sums = ", ".join(f"%{i}" for i in range(128)), ", ".join(f'"+f"(d[{i}])' for i in range(128))
WGMMA = f"""__device__ __forceinline__ void wgmma(float (&d)[128], u64 a, u64 b) {{
  asm volatile("{{ wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {{{registers}}}, %128, %129, 1, 1, 1, 0, 0; }}"
    : {sums} : "l"(a), "l"(b));
}}"""
SOURCE = r'''
#include <cuda.h>
#include <cuda_fp16.h>
typedef unsigned int u32; typedef unsigned long long u64;
constexpr int BM = 128, BN = 256, BK = 64, STAGES = 4, A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE = A_BYTES + B_BYTES, TABLE = 1024;
__device__ __forceinline__ u32 addr(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void bar_init(u32 b, u32 n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(n)); }
__device__ __forceinline__ void bar_expect(u32 b, u32 n) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(n) : "memory"); }
__device__ __forceinline__ void bar_wait(u32 b, u32 parity) {
  asm volatile("{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again; }" ::"r"(b), "r"(parity) : "memory");
}
__device__ __forceinline__ void bar_arrive(u32 b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
__device__ __forceinline__ void bar_arrive_at(u32 b, u32 cta) {
  asm volatile("{ .reg .b32 r; mapa.shared::cluster.u32 r, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [r]; }" ::"r"(b), "r"(cta) : "memory");
}
template <int CL> __device__ __forceinline__ void load(u32 to, const CUtensorMap* map, u32 bar, int x, int y) {
  if (CL == 1) asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map), "r"(bar), "r"(x), "r"(y) : "memory");
  else asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(bar), "r"(x), "r"(y), "h"((unsigned short)3) : "memory");
}
__device__ __forceinline__ u64 describe(u32 a) { return (u64)(a >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62; }
WGMMA

// y [tokens, features] = x w^T; tiles of 128 tokens and 256 features. TABLE_: the weights are integers, and where a group of 128 inputs
// ends the sums of each feature are multiplied with a number of `ratios`: scale / next scale, at last the scale.
template <bool TABLE_, bool SILU, int CL, int ORDER>
__device__ __forceinline__ void product(const CUtensorMap& xmap, const CUtensorMap& wmap, const float* ratios, half* out, int M, int N, int K) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const u32 base = addr(smem), tables = base + STAGES * STAGE, full = tables + 2 * TABLE, empty = full + STAGES * 8;
  unsigned char* const results = smem + STAGES * STAGE + 3 * 1024;
  const int wg = threadIdx.x / 128, tid = threadIdx.x % 128, lane = threadIdx.x % 32, warp = tid / 32;
  u32 rank = 0;
  if (CL == 2) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) { bar_init(full + i * 8, 1); bar_init(empty + i * 8, 8 * CL); }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (CL == 2) { asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory"); }
  else __syncthreads();
  const int rows = M / BM / CL, tiles = rows * (N / BN), steps = K / BK, groups = steps / 2;
  const int first = blockIdx.x / CL, stride = gridDim.x / CL;
  int stage = 0; u32 phase = 0;
  if (wg == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      for (int tile = first; tile < tiles; tile += stride) {
        const int m = (tile % rows * CL + rank) * BM, n = tile / rows * BN;
        for (int k = 0; k < steps; k++) {
          bar_wait(empty + stage * 8, phase ^ 1);
          const u32 at = base + stage * STAGE, bar = full + stage * 8;
          bar_expect(bar, STAGE + (TABLE_ && k % 2 ? TABLE : 0));
          load<1>(at, &xmap, bar, k * BK, m);
          if (CL == 1) load<1>(at + A_BYTES, &wmap, bar, k * BK, n);
          else load<2>(at + A_BYTES + rank * (B_BYTES / 2), &wmap, bar, k * BK, n + rank * (BN / 2));
          if (TABLE_ && k % 2) asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(tables + stage / 2 * TABLE), "l"(ratios + ((size_t)(n / BN) * groups + k / 2) * 256), "r"(TABLE), "r"(bar) : "memory");
          if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int own = wg - 1;
    float d[128];
#define TURN(id) do { if (own == (id) - 1) asm volatile("bar.sync 1, 256;" ::: "memory"); else asm volatile("bar.sync 2, 256;" ::: "memory"); } while (0)
#define NEXT do { if (own == 0) asm volatile("bar.arrive 2, 256;" ::: "memory"); else asm volatile("bar.arrive 1, 256;" ::: "memory"); } while (0)
#define RELEASE(at) do { if (lane < CL) { if (CL == 1) bar_arrive(empty + (at) * 8); else bar_arrive_at(empty + (at) * 8, lane); } } while (0)
    if (ORDER && own == 1) asm volatile("bar.arrive 1, 256;" ::: "memory");
    for (int tile = first; tile < tiles; tile += stride) {
#pragma unroll
      for (int i = 0; i < 128; i++) d[i] = 0.f;
      for (int g = 0; g < groups; g++) {
        const int begun = stage;
        if (ORDER) TURN(1);
#pragma unroll
        for (int half_ = 0; half_ < 2; half_++) {
          bar_wait(full + stage * 8, phase);
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
          const u64 a = describe(base + stage * STAGE + own * (A_BYTES / 2)), b = describe(base + stage * STAGE + A_BYTES);
#pragma unroll
          for (int k = 0; k < 4; k++) wgmma(d, a + k * 2, b + k * 2);
          asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
          if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
        if (ORDER == 2) NEXT;
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (ORDER == 3) NEXT;
        RELEASE(begun);
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (TABLE_) {
          const float4* from = (const float4*)(smem + STAGES * STAGE + begun / 2 * TABLE) + lane % 4;
#pragma unroll
          for (int c = 0; c < 16; c++) {
            const float4 r = from[c * 4];
            d[c * 8] *= r.x; d[c * 8 + 1] *= r.y; d[c * 8 + 2] *= r.x; d[c * 8 + 3] *= r.y;
            d[c * 8 + 4] *= r.z; d[c * 8 + 5] *= r.w; d[c * 8 + 6] *= r.z; d[c * 8 + 7] *= r.w;
          }
        }
        RELEASE(begun + 1);
      }
      unsigned char* const mine = results + own * 16384;
      const u32 to = addr(mine) + (warp * 16 + lane % 16) * 256;  // [64 tokens][128 features]
      const int m0 = (tile % rows * CL + rank) * BM + own * 64, n0 = tile / rows * BN, width = SILU ? N / 2 : N;
#define MATRICES(at, v) asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory")
#pragma unroll
      for (int part = 0; part < (SILU ? 1 : 2); part++) {
#pragma unroll
        for (int c = 0; c < 16; c += 2) {
          u32 v[4];
#pragma unroll
          for (int j = 0; j < 4; j++) {  // rows 0 to 7 and 8 to 15 of a piece, then of the next
            float y[2];
#pragma unroll
            for (int t = 0; t < 2; t++) {
              if (SILU) {
                const int at = (c + j / 2) * 8 + j % 2 * 2 + t;
                const float gate = d[at];
                y[t] = __fdividef(gate, 1.f + __expf(-gate)) * d[at + 4];
              } else y[t] = d[(part * 16 + c + j / 2) * 4 + j % 2 * 2 + t];
            }
            const __half2 both = __floats2half2_rn(y[0], y[1]);
            v[j] = *(const u32*)&both;
          }
          MATRICES(to + (((c + lane / 16) ^ (lane & 7)) * 16), v);
        }
        asm volatile("bar.sync %0, 128;" ::"r"(3 + own) : "memory");
        half* const to_ = out + (size_t)m0 * width + (SILU ? n0 / 2 : n0 + part * 128);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int at = i * 128 + tid, token = at / 16, piece = at % 16;
          *(uint4*)(to_ + (size_t)token * width + piece * 8) = *(const uint4*)(mine + token * 256 + ((piece ^ (token & 7)) * 16));
        }
        asm volatile("bar.sync %0, 128;" ::"r"(3 + own) : "memory");
      }
    }
    if (ORDER && own == 0) asm volatile("bar.sync 1, 256;" ::: "memory");
  }
  if (CL == 2) { asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory"); }
}
#define KERNEL(name, ...) extern "C" __global__ void __launch_bounds__(384, 1) name(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w, const float* r, half* out, int M, int N, int K) { product<__VA_ARGS__>(x, w, r, out, M, N, K); }
'''
KINDS = {"plain": ("false", "false"), "scale": ("true", "false"), "silu": ("true", "true"), "fused": ("false", "true")}
SOURCE = SOURCE.replace("WGMMA", WGMMA) + "".join(
    f"KERNEL({name}{order}_{blocks}, {scale}, {silu}, {blocks}, {order})\n"
    for name, (scale, silu) in KINDS.items() for order in (0, 2, 3) for blocks in (1, 2)
)
cu = ctypes.CDLL("libcuda.so.1")
torch.zeros(1, device="cuda")
def ck(r, what=""):
    if r: raise SystemExit(f"cuda error {r} {what}")
folder = Path(tempfile.mkdtemp())
(folder / "product.cu").write_text(SOURCE)
target = "-gencode=arch=compute_90a,code=sm_90a"
subprocess.run(["nvcc", "-O3", "-std=c++17", target, "-cubin", "-o", folder / "product.cubin", folder / "product.cu"], check=True)
mod = ctypes.c_void_p(); ck(cu.cuModuleLoad(ctypes.byref(mod), str(folder / "product.cubin").encode()), "load")
SM = 4 * 49152 + 3 * 1024 + 32768
def fn(name):
    f = ctypes.c_void_p(); ck(cu.cuModuleGetFunction(ctypes.byref(f), mod, name.encode()), name)
    ck(cu.cuFuncSetAttribute(f, 8, SM), "smem"); return f
class Attr(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("val", ctypes.c_uint * 16)]
class Config(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint) for n in ("gx", "gy", "gz", "bx", "by", "bz", "smem")] + [("stream", ctypes.c_void_p), ("attrs", ctypes.POINTER(Attr)), ("n", ctypes.c_uint)]
keep = []
def tmap(t, box_rows):
    buf = ctypes.create_string_buffer(256); a = (ctypes.addressof(buf) + 63) // 64 * 64; keep.append((buf, t))
    dims = (ctypes.c_uint64 * 2)(t.shape[1], t.shape[0]); strides = (ctypes.c_uint64 * 1)(t.shape[1] * 2)
    box = (ctypes.c_uint32 * 2)(64, box_rows); es = (ctypes.c_uint32 * 2)(1, 1)
    ck(cu.cuTensorMapEncodeTiled(ctypes.c_void_p(a), 6, 2, ctypes.c_void_p(t.data_ptr()), dims, strides, box, es, 0, 3, 3, 0), "map")
    return a
def launcher(name, W, X, ratios, out):
    f, cl = fn(name), int(name[-1]); N, K = W.shape; M = X.shape[0]
    xm, wm = tmap(X, 128), tmap(W, 256 // cl)
    vals = [ctypes.c_void_p(ratios.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int(M), ctypes.c_int(N), ctypes.c_int(K)]
    ptrs = (ctypes.c_void_p * 7)(xm, wm, *[ctypes.addressof(v) for v in vals])
    at = (Attr * 1)(); at[0].id = 4; at[0].val[0] = cl; at[0].val[1] = 1; at[0].val[2] = 1
    c = Config(132, 1, 1, 384, 1, 1, SM, None, at, 1 if cl > 1 else 0); keep.append((vals, ptrs, at, c))
    def run():
        c.stream = torch.cuda.current_stream().cuda_stream
        ck(cu.cuLaunchKernelEx(ctypes.byref(c), f, ptrs, None), "launch")
    return run
def power():
    try: return subprocess.run(["nvidia-smi", "--query-gpu=power.draw,clocks.sm", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=5).stdout.strip().replace("\n", " | ")
    except Exception as e: return str(e)
def rate(run, flops, seconds):
    g = torch.cuda.CUDAGraph(); run(); torch.cuda.synchronize()
    with torch.cuda.graph(g):
        for _ in range(20): run()
    def go(sec):
        n = 0; t = time.perf_counter()
        while time.perf_counter() - t < sec: g.replay(); torch.cuda.synchronize(); n += 20
        return n, time.perf_counter() - t
    go(0.35); a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    said = []; th = threading.Thread(target=lambda: said.append(power())); th.start()
    n, t = go(seconds); th.join()
    return flops * n / t / 1e12, said[0]
N = 3840
shapes = {"gate/up": (28672, 4096), "down": (4096, 14336), "qkv": (6144, 4096), "o": (4096, 4096)}
for label, (M, K) in shapes.items():
    torch.manual_seed(0)
    q = (torch.randint(0, 16, (M, K), device="cuda") - 8).half()
    s = (torch.rand(K // 128, M, device="cuda") * 0.01 + 0.002).half()
    Wd = (q.view(M, K // 128, 128) * s.T[:, :, None]).view(M, K).contiguous()
    X = torch.randn(N, K, device="cuda").half()
    out = torch.empty(N, M, dtype=torch.half, device="cuda")
    want = X[:256].float() @ Wd.float().T
    runs = {"cublas scaled": lambda: torch.mm(X, Wd.T, out=out), "cublas ints": lambda: torch.mm(X, q.T, out=out)}
    ratios = s.float()
    ratios[:-1] = s[:-1].float() / s[1:].float()  # of a group and the next; of the last its scale
    ratios = ratios.view(K // 128, M // 256, 16, 2, 4, 2).permute(1, 0, 2, 4, 3, 5).contiguous()  # in the order of a thread's sums
    names = {"gate/up": "plain0_2 fused0_2 scale2_2 silu0_2 silu2_2 silu3_2 silu2_1", "down": "plain0_2 scale0_2 scale2_2 scale3_2", "qkv": "scale2_2", "o": "scale2_2"}[label].split()
    half_out = torch.empty(N, M // 2, dtype=torch.half, device="cuda") if label == "gate/up" else None
    for n in names: runs[n] = launcher(n, Wd if n.startswith(("plain", "fused")) else q, X, ratios, half_out if n.startswith(("silu", "fused")) else out)
    runs["ints plain0_2"] = launcher("plain0_2", q, X, ratios, out)
    for name, run in runs.items():
        if "ints" in name: continue
        out.zero_(); run(); torch.cuda.synchronize()
        if name.startswith(("silu", "fused")):
            w = want.view(256, M // 16, 2, 8); w = torch.nn.functional.silu(w[:, :, 0]) * w[:, :, 1]; w = w.reshape(256, -1); got = half_out[:256].float()
        else: w, got = want, out[:256].float()
        print(label, name, "error", float((got - w).norm() / w.norm()), flush=True)
    for turn in range(2):
        for name, run in (runs.items() if turn == 0 else list(runs.items())[:3]):
            r, p = rate(run, 2 * M * K * N, 0.5)
            print(f"{label} {name:14} {r:6.0f} TFLOPS  {2*M*K*N/r/1e6:7.1f} us   {p}", flush=True)
