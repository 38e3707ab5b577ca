"""What each kernel is given: every argument structure, described once.

A description is written as the fields of a C structure. The C text that the kernel is compiled with and the bytes
that a launch passes both come from it, so they cannot disagree. The numbers that C and Python share are here too.
"""

import re
import struct
from collections.abc import Callable

from .. import sampler_structure

CONSTANTS = {
    "TILE": 16,  # outputs of a packed weight that stay together
    "CHUNK": 64,  # inputs of a packed weight that stay together
    "NORM_RUNS": 4,  # runs of 8 inputs that a thread norms, at most
    "ROUTE_RUNS": 2,  # runs of 8 inputs that a thread of a router's 256 norms, at most
    "OCTET_RUNS": 16,  # those of all rows of octet.cu together
    "PAGE_TOKENS": 64,  # tokens of a page of keys and values
    "ATTENTION_WARPS": 4,
    "ATTENTION_HEADS": 8,  # heads of a block: the columns of the matrix unit
    "DECODE_EARLY": 4,  # turns of decode whose keys and values are on their way or being multiplied
    "DELTA_THREADS": 256,  # of a block of delta_rule
    "SCAN_THREADS": 256,  # of a block of scan_token
    "RANKED": 256,  # experts of a token, at most, that are ranked all at once
    "ROUTE_HELD": 16,  # logits that a lane of route holds, at most; of more experts they lie in shared memory
    "NATURAL_RUNS": 4,  # runs of 4 inputs that a thread norms in the model's own order
    "ROPE_WARPS": 8,
    "ROPE_TOKENS": 4,  # of a block, where heads are turned whole
    "ONE_ROWS": 8,  # tokens of one sequence that are computed at once, at most
    "HOST_TOKENS": 64,  # tokens of a sequence that the host may still have to read
    "SAMPLE_THREADS": 1024,
}
TILE, CHUNK, PAGE_TOKENS, HOST_TOKENS = (CONSTANTS[name] for name in ("TILE", "CHUNK", "PAGE_TOKENS", "HOST_TOKENS"))
ATTENTION_WARPS, ATTENTION_HEADS = CONSTANTS["ATTENTION_WARPS"], CONSTANTS["ATTENTION_HEADS"]
ROPE_WARPS, ROPE_TOKENS = CONSTANTS["ROPE_WARPS"], CONSTANTS["ROPE_TOKENS"]
NORM_RUNS, OCTET_RUNS, SAMPLE_THREADS = (CONSTANTS[name] for name in ("NORM_RUNS", "OCTET_RUNS", "SAMPLE_THREADS"))
ROUTE_RUNS, RANKED = CONSTANTS["ROUTE_RUNS"], CONSTANTS["RANKED"]
ONE_ROWS = CONSTANTS["ONE_ROWS"]

_CODES = {"int": "i", "u32": "I", "float": "f", "u64": "Q"}  # of Python's struct; every pointer is "P"
_FIELD = re.compile(r"(?P<type>[\w ]+?\**) *(?P<name>\w+)(?:\[(?P<count>\d+)\])?$")


class Arguments:
    """One argument structure. `fields`: a line each, `type name` or `type name[count]`, and a comment after `//`."""

    def __init__(self, name: str, fields: str) -> None:
        self.name = name
        self.fields: list[str] = []
        codes: list[str] = []
        values: list[str] = []
        lines: list[str] = []
        self._offsets: dict[str, int] = {}
        for line in filter(None, (each.strip() for each in fields.splitlines())):
            declaration, _slashes, comment = (each.strip() for each in line.partition("//"))
            found = _FIELD.match(declaration)
            if found is None:
                raise ValueError(f"{name}: {line!r} is not `type name` or `type name[count]`")
            field, pointer = found["name"], found["type"].endswith("*")
            code, count = "P" if pointer else _CODES[found["type"]], int(found["count"] or 0)
            # a field begins after those before it, aligned as its own kind is
            self._offsets[field] = struct.calcsize("@" + "".join(codes) + "0" + code)
            codes.append(f"{count or ''}{code}")
            self.fields.append(field)
            value = f"({field}.data_ptr() if {field} is not None else 0)" if pointer else field
            if count:
                value = f"*(each.data_ptr() if each is not None else 0 for each in {field})" if pointer else f"*{field}"
            values.append(value)
            lines.append(f"  {declaration};" + (f"  // {comment}" if comment else ""))
        layout = struct.Struct("@" + "".join(codes))
        # The structure ends where its widest field may begin again.
        widest = "Q" if any(each.endswith(("P", "Q")) for each in codes) else "I"
        self.size_bytes = struct.calcsize("@" + "".join(codes) + "0" + widest)
        check = f'static_assert(sizeof({name}) == {self.size_bytes}, "the compiler lays {name} out as Python does");\n'
        self.c_text = f"struct {name} {{\n" + "\n".join(lines) + "\n};\n" + check
        # A function of the fields by keyword, made once as dataclasses make theirs: filling a ctypes structure takes
        # nearly twice as long, and a prompt launches hundreds of kernels.
        scope: dict[str, Callable[..., bytes]] = {"pack_into_bytes": layout.pack}
        exec(f"def pack(*, {', '.join(self.fields)}):\n    return pack_into_bytes({', '.join(values)})\n", scope)
        self.pack: Callable[..., bytes] = scope["pack"]
        """The fields by keyword, every one of them, tensors (or None) for pointers -> what a launch passes."""

    def offset(self, field: str) -> int:
        """Bytes from the start of the structure to a field."""
        return self._offsets[field]


REPACK = Arguments(
    "RepackArguments",
    """
    const u32* sources[3]  // qweight of up to three layers that share their input, [k * bits / 32][widths[i]]
    int widths[3]
    const int* columns     // [tiles * TILE]: source << 28 | column, or -1 for a row of padding
    const int* order       // [chunks * CHUNK]: the input at (chunk, step, lane column, j); -1 for padding
    u8* out                // [tiles][chunks][bits * 128]
    int tiles
    int chunks
    """,
)
UNPACK = Arguments(
    "UnpackArguments",
    """
    const u8* weights      // [tiles of the weight][chunks][bits * 128]
    const u32* scales      // [tiles of the weight][groups][8]: see load_scale
    u16* out               // fp16 [tiles * TILE][chunks * CHUNK], inputs in fragment order
    int first_tile
    int tiles
    int chunks
    int groups
    u32 unit_to_group      // the group of unit u is u * unit_to_group >> 16; 0 for one group
    """,
)
_GEMV = """
    const u8* weights      // [tiles][chunks][bits * 128]
    const u32* scales      // [tiles][groups][8]: see load_scale
    const u16* x           // fp16 [chunks * CHUNK] in fragment order (FRAGMENTS); fp16 or bf16 [k] in its own (NATURAL, ORDERED)
    const u16* norm        // weight of the RMSNorm before, NORM only: fp16 [chunks * CHUNK] in fragment order, or as x [k]
    const u16* addend      // as x, to which it is added before the norm, or null; NATURAL and ORDERED only, as the next six
    const u16* also        // as addend, to which it is added first, or null
    u16* sum               // [k]: x + addend
    const u16* inner       // [k]: weight of an RMSNorm of the addend, or null
    const u16* norm_bias   // [k]: added after the norm, or null
    float inner_eps
    float inner_offset     // added to the weight
    const u16* bias        // fp16 [tiles * TILE] in the order of the rows, or null
    const u16* order       // [chunks * CHUNK]: the input at each position, k for padding; ORDERED only
    void* out              // [n] or, gated, [n / 2]: fp16, fp32 (FLOAT) or bf16 (…BFLOAT); RESIDUAL in the next input's order
    float* residual        // fp32 [n], RESIDUAL only
    const int* permutation // [n]: the position of row n in the next input, RESIDUAL only
    int n
    int tiles
    int chunks
    int groups
    u32 unit_to_group      // the group of unit u is u * unit_to_group >> 16; 0 for one group
    int k                  // inputs without padding
    int activation         // of GATED and ACTIVE, see activations.py
    float eps
    float offset           // added to the norm's weight; NATURAL and ORDERED only
    int centred            // the norm is a LayerNorm; NATURAL and ORDERED only
    int first_batches      // of a warp's ring that are fetched before the previous kernel has ended; the others follow x
    """
GEMV = Arguments("GemvArguments", _GEMV)
ADAPTED_GEMV = Arguments(
    "AdaptedGemvArguments",
    _GEMV
    + """
    const void* adapter    // AdapterEntry of this product; the next product's follows
    void* t                // fp32 [ranks], the bits of MISSING before the step: see adapted_gemv.cu
    """,
)
_EXPERT_GEMV = """
    const u8* weights      // [experts][tiles][chunks][bits * 128]
    const u32* scales      // [experts][tiles][groups][8]
    const u64* chosen      // [choices]: the expert of each choice
    const u16* x           // [choices / share], a row as of GemvArguments
    const u16* order       // [experts or 1][chunks * CHUNK], ORDERED only
    void* out              // [choices], a row as of GemvArguments
    u64 weight_bytes       // from one expert's weights to the next one's
    u64 scale_bytes
    int order_length       // from one expert's order to the next one's; 0 if all have the same
    int share              // choices that take the same row of x
    int activation
    int experts
    int made               // choices that the kernel before makes, at least one; those behind them never change
    int n
    int tiles
    int chunks
    int groups
    u32 unit_to_group
    int k
    """
EXPERT_GEMV = Arguments("ExpertGemvArguments", _EXPERT_GEMV)
EXPERT_AHEAD = Arguments(
    "ExpertAheadArguments",
    _EXPERT_GEMV
    + """
    const u8* next         // the weights of the experts' next product, which are fetched into the L2, or null
    const u8* next_scales
    u64 next_bytes         // from one expert to the next one
    u64 next_scale_bytes
    const float* logits    // [routed]: what the router shows before it has written chosen, or null
    int routed             // experts that have a logit
    """,
)
EXPERT_SUM = Arguments(
    "ExpertSumArguments",
    """
    const u8* weights      // as of ExpertGemvArguments
    const u32* scales
    const u64* chosen      // [choices]
    const u16* x           // fp16 [choices][k]
    const u16* order       // [experts or 1][chunks * CHUNK]; null: inputs lie in their own order
    const void* choice_weights // [choices], fp32 or the type of out
    const float* bias      // [experts][n], or null
    u16* out               // fp16 or bf16 [n]
    u64 weight_bytes
    u64 scale_bytes
    int order_length
    int experts
    int n
    int tiles
    int chunks
    int groups
    u32 unit_to_group
    int k                  // a multiple of 4
    int wide               // choice_weights are fp32
    """,
)
OCTET = Arguments(
    "OctetArguments",
    """
    const u8* weights      // as of GemvArguments
    const u32* scales
    const u16* x           // fp16 [rows][chunks * CHUNK], fragment order
    const u16* norm        // fp16 [chunks * CHUNK], fragment order: weight of the RMSNorm before, NORM only
    const u16* bias        // fp16 [tiles * TILE], or null
    u16* out               // fp16 [rows][out_stride]: n outputs (PLAIN), n / 2 (SILU), RESIDUAL in the next input's order
    float* residual        // fp32 [rows][n], RESIDUAL only
    const int* permutation // [n]: the position of output n in the next input, RESIDUAL only
    int n
    int tiles
    int chunks
    int groups
    u32 unit_to_group
    int k                  // inputs without padding
    int rows
    int out_stride
    float eps
    int first_batches      // as of GemvArguments
    """,
)
SMALL_BATCH = Arguments(
    "SmallBatchArguments",
    """
    const u8* weights      // as of GemvArguments
    const u32* scales
    const u16* x           // fp16 [rows][chunks * CHUNK], fragment order
    const u16* bias        // fp16 [tiles * TILE], or null
    u16* out               // fp16 [rows][n] (PLAIN), [rows][n / 2] (SILU); not used by RESIDUAL
    float* residual        // fp32 [rows][n], RESIDUAL only
    const float* powers    // [rows]: what the sums are multiplied with before the bias, or null; BFLOAT only
    int n
    int tiles
    int chunks
    int groups
    u32 unit_to_group
    int rows
    """,
)
WIDE_BATCH = Arguments(
    "WideBatchArguments",
    """
    const u8* weights      // as of SmallBatchArguments
    const u32* scales
    const u16* x
    const u16* bias
    u16* out
    float* residual
    float* partial         // fp32 [2 * blocks][sums of an item]: of items that several blocks make
    u32* done              // [items], zero between launches
    int n
    int tiles
    int chunks
    int groups
    u32 unit_to_group
    int rows
    """,
)
HEAD = Arguments(
    "HeadArguments",
    """
    const u16* weights     // fp16 [n][k]
    const u16* x           // fp16 [rows][k], natural order
    const u16* norm        // fp16 [k]: weight of the last RMSNorm
    float* out             // fp32 [rows][n]
    int n
    int k
    float eps
    int rows               // of head_2_4 and those after it
    """,
)
EMBED = Arguments(
    "EmbedArguments",
    """
    const u16* table       // fp16 [rows of the embedding][k]
    const int* ids         // [rows]
    float* residual        // fp32 [rows][k]
    u16* out               // fp16 [rows][padded], fragment order of the first layer's input
    const int* permutation // [k]
    int k
    int padded
    """,
)
NORM = Arguments(
    "NormArguments",
    """
    float* residual        // fp32 [rows][k]
    const u16* addend      // fp16 [rows][k], or null: added to the residual first
    const u16* norm        // fp16 [padded], in the order of `order`
    u16* out               // fp16 [rows][padded]
    const int* order       // [padded]: the input at each position, -1 for padding; null for the model's own order
    int k
    int padded
    float eps
    """,
)
ORDER = Arguments(
    "OrderArguments",
    """
    const u16* x           // fp16 [rows][k]
    u16* out               // fp16 [rows][padded]
    const int* order       // [padded]: the input at each position, -1 for padding
    int rows
    int k
    int padded
    int together           // rows of a block
    """,
)
SILU = Arguments(
    "SiluArguments",
    """
    const u16* gate_up     // fp16 [rows][tiles * TILE]: 8 gates, their 8 ups, and so on
    u16* out               // fp16 [rows][padded]
    int inner              // outputs of the gate
    int padded
    """,
)
ATTENTION = Arguments(
    "AttentionArguments",
    """
    const u16* qkv         // fp16 [rows][(heads + 2 kv_heads) * D]
    const u64* pages       // [rows][max_pages]: addresses
    const int* positions   // [rows]: of the new token
    const float* cosines   // fp32 [context][rotary_half]
    const float* sines
    const u16* q_norm      // fp16 [D], or null
    const u16* k_norm
    u16* out               // fp16 [rows][padded], fragment order of the output layer
    const int* permutation // [heads * D]
    float* partial         // fp32 [rows][head blocks][splits][8][D + 4]: sums, the highest score, the sum of weights
    u32* done              // [rows][head blocks], zero between launches
    u64 layer_bytes        // from a page's start to this layer's keys
    int heads
    int kv_heads
    int max_pages
    int padded
    int window             // tokens that a position sees, itself included; 0 for all
    int rotary_half        // dimension i is rotated with dimension i + rotary_half
    int group_blocks       // blocks of up to 8 heads that share keys, for each kv head
    float eps
    float scale            // log2(e) / sqrt(D)
    int rows               // the last two for paged_attention.cu, whose grid is not (splits, head blocks, rows)
    int splits
    """,
)
ROPE = Arguments(
    "RopeArguments",
    """
    u16* qkv               // fp16 [tokens][(heads + 2 kv_heads) * D]; queries and keys are rotated in place
    const u64* pages       // [max_pages] of this sequence
    const float* cosines   // fp32 [context][rotary_half]
    const float* sines
    const u16* q_norm      // fp16 [D], or null
    const u16* k_norm
    u64 layer_bytes
    int heads
    int kv_heads
    int tokens
    int start              // position of the first token
    int rotary_half
    float eps
    """,
)
GATHER = Arguments(
    "GatherArguments",
    """
    const u64* pages       // [max_pages] of this sequence
    u16* keys              // fp16 [kv_heads][tokens][D]
    u16* values
    u64 layer_bytes
    int kv_heads
    int tokens
    """,
)
ROW_NORM = Arguments(
    "RowNormArguments",
    """
    const u16* x           // fp16 or bf16 [rows][k]
    const u16* addend      // [rows][k], or null
    u16* sum               // [rows][k]: x + addend, or null
    const u16* weight      // [k], or null for a sum alone
    const u16* bias        // [k], or null
    u16* out               // [rows][k]
    const u16* inner_weight // [k]: of the RMSNorm of what is added, or null
    const float* y         // [rows][choices][k]: what chosen experts give, the sum of which is added in the place of addend
    const void* choice_weights // [rows][choices], fp32 or the type of x
    const float* choice_bias // [experts][k], or null
    const u64* chosen      // [rows][choices]
    int choices            // 0: addend is added
    int experts
    int wide               // choice_weights are fp32
    int k
    int centred            // LayerNorm; else RMSNorm
    float eps
    float offset           // added to the weight
    float inner_eps
    float inner_offset
    """,
)
ROTATE = Arguments(
    "RotateArguments",
    """
    const u16* q           // fp16 or bf16, a head every q_stride numbers
    const u16* k
    const u16* cosines     // [angles]
    const u16* sines
    const u16* q_norm      // [d]: weight of an RMSNorm of each head before it turns, or null
    const u16* k_norm
    u16* q_out             // [heads][d]
    u16* k_out             // [kv_heads][d]
    int q_stride
    int k_stride
    int heads
    int d                  // dimensions of a head
    int rotated            // of them, the first
    int angles
    int kind               // which dimensions turn together, see fused_forward.py
    float eps
    float offset           // added to the weight of a norm
    """,
)
TURN_ROWS = Arguments(
    "TurnRowsArguments",
    """
    const u16* q           // a head's numbers side by side, in rows of `q_row` numbers, heads `q_head` numbers apart: all even
    const u16* k
    const u16* cosines     // [rows][angles], rows `cos_row` numbers apart
    const u16* sines
    u16* q_out             // [rows][heads][d]
    u16* k_out             // [rows][kv_heads][d]
    u64 q_row
    u64 q_head
    u64 k_row
    u64 k_head
    int cos_row
    int sin_row
    int heads
    int kv_heads
    int d                  // as of RotateArguments, as the next three
    int rotated            // a multiple of 4
    int angles
    int kind
    """,
)
LOOK_UP = Arguments(
    "LookUpArguments",
    """
    const u16* cosines     // [rows][width]
    const u16* sines
    const u64* position    // of the row
    u16* cosines_out       // [width]
    u16* sines_out
    int rows
    int width
    """,
)
GATE_ROW = Arguments(
    "GateRowArguments",
    """
    const u16* x           // fp16 or bf16 [n]
    const u16* gate        // a run of `width` numbers every `stride`
    u16* out               // [n]: x * sigmoid(gate)
    int n
    int width
    int stride
    """,
)
KEEP = Arguments(
    "KeepArguments",
    """
    const u16* k           // the new token's keys, a head every k_stride numbers, a row every k_row numbers
    const u16* v
    u16* keys              // [rows][heads][capacity][d]
    u16* values            // [rows][heads][capacity][dv]
    const u64* count       // [rows]: tokens that are kept already
    u64 k_row
    u64 v_row
    int k_stride
    int v_stride
    int d
    int dv
    int capacity
    """,
)
EXCHANGE = Arguments(
    "ExchangeArguments",
    """
    u16* x                 // fp16 or bf16 [4 * runs], or int64 [runs], this GPU's numbers; then what is shared
    u32* turns             // [blocks]: of the last launch of each block
    u32* flags             // of the host: whether to stop; whether a GPU did not come
    u64 boxes[8]           // by GPU, the address here of its mailbox: [2][ranks][capacity] runs of 16 bytes
    u64 limit_ns           // that another GPU may be late
    int rank
    int ranks
    int capacity           // runs of four numbers in a part of a mailbox
    int runs
    """,
)
DECODE = Arguments(
    "DecodeArguments",
    """
    const u16* q           // fp16 or bf16, a head every q_stride numbers
    u16* keys              // a head every key_stride numbers, a token every d
    u16* values
    const u16* new_key     // of the token itself, null if it is kept already
    const u16* new_value
    const void* mask       // [heads or 1][shown], or null
    const u16* sinks       // [heads], or null
    const u64* count       // tokens before this one, whose keys are kept too
    float* partial         // fp32 [heads][splits][dv + 4]: sums, the highest score, the sum of weights
    u32* done              // [blocks], zero between launches
    u16* out               // [heads][dv]
    u64 key_stride
    u64 value_stride
    u64 key_row            // from one conversation's keys to the next one's, of several; value_row and q_row alike
    u64 value_row
    u64 mask_row           // bytes
    int q_row
    int mask_kind          // 0: none, 1: a byte says which tokens are seen, 2: added, of the type of q, 3: added, fp32
    int mask_stride        // from one head's mask to the next one's
    int heads
    int group              // heads that share keys
    int group_blocks       // blocks for them
    int shown              // tokens of the mask
    int d
    int dv
    int q_stride
    int new_key_stride
    int new_value_stride
    float scale
    float cap              // of the scores; 0 for none
    const u16* cosines     // [angles]: of q and the new key the first `rotated` are turned before, halves together; or null
    const u16* sines
    const u16* q_norm      // [d]: weight of an RMSNorm of each head before it turns, or null
    const u16* k_norm
    int angles
    int rotated
    float norm_eps
    float norm_offset
    """,
)
PROMPT_ATTENTION = Arguments(
    "PromptAttentionArguments",
    """
    const u16* q           // a head's numbers side by side, in rows of `q_row` numbers, heads `q_head` numbers apart
    const u16* k
    const u16* v
    u16* out               // [rows][heads][D]
    const void* mask       // [rows][keys] for all heads or for each, or null
    int* irregular         // whether it is another mask than a causal one with this window, or null
    const u16* sinks       // [heads], or null
    u64 q_head
    u64 q_row
    u64 k_head
    u64 k_row
    u64 v_head
    u64 v_row
    u64 mask_head          // numbers of the mask between two heads
    u64 mask_row
    int mask_kind          // 1: bool, 2: the type of q, 3: fp32
    int heads
    int group              // heads of a kv head
    int rows
    int keys
    int first              // keys before the first row's own
    int window             // 0: none
    float scale
    float cap              // 0: none
    """,
)
LATENT = Arguments(
    "LatentArguments",
    """
    const u16* q           // fp16 or bf16 [heads][FIXED + TURNED], the last ones not turned yet
    const u16* kv          // [RANK + TURNED]: the latent vector before its norm, then what of the key is turned
    const u16* norm        // [RANK]
    const void* angles     // kind 0: fp32 [TURNED / 2][2], cosine and sine; else the cosines [TURNED / 2], of the type of q
    const u16* sines       // [TURNED / 2], or null
    const u16* matrices    // fp16 [heads][FIXED + VALUE][RANK]
    u16* keys              // [capacity][RANK]
    u16* turned_keys       // [capacity][TURNED]
    const u64* count       // tokens that are kept already
    u16* met               // [heads][RANK + TURNED]: queries that meet latent vectors, times `scale`
    float* partial         // fp32 [splits][heads][RANK]
    float* stats           // fp32 [splits][heads][2]: the highest score, the sum of weights
    u16* out               // [heads][VALUE]
    int heads
    int capacity
    int splits
    int kind               // what turns together: 0, 1: neighbours, 1: which then lie apart, 2: halves
    float eps
    float scale            // of the scores, times log2(e)
    """,
)
DELTA = Arguments(
    "DeltaArguments",
    """
    const u16* q           // fp16 or bf16 before the convolution: DK of a query every qk_stride numbers
    const u16* k
    const u16* v           // DV of each of the value heads that share a key, every v_stride
    const u16* z           // what opens their gates, every z_stride
    const u16* b           // a number of each of them, every ba_stride
    const u16* a
    const u16* taps        // [channels][WIDTH]: the convolution's weights; channels are queries, keys, values
    const u16* bias        // [channels], or null
    u16* kept              // [channels][WIDTH]: its last inputs
    float* state           // [heads][DK][DV]
    const float* decay     // [heads]: -exp(A_log)
    const float* dt_bias   // [heads]
    const u16* norm        // [DV]
    u16* given             // [heads][DV]: what the heads give before the norm; not of clusters
    u32* done              // [key_heads], zero between launches
    u16* out               // [heads][DV]
    int qk_stride
    int v_stride
    int z_stride
    int ba_stride
    int key_heads
    int group              // value heads that share a key
    int sigmoid            // the gate is sigmoid(z), not SiLU
    float eps
    float beta_scale
    """,
)
SCAN = Arguments(
    "ScanArguments",
    """
    const u16* x           // fp16 or bf16 [channels] before the convolution: inputs of the heads, b and c of each group
    const u16* dt          // [heads]
    const u16* taps        // [channels][WIDTH]: the convolution's weights
    const u16* bias        // [channels], or null
    u16* kept              // [channels][WIDTH]: its last inputs
    float* state           // [heads][dims][N]
    const float* decay     // [heads]: -exp(A_log)
    const float* dt_bias   // [heads]
    const float* through   // [heads]: how much of an input is added to what is read
    u32* done              // [groups], zero between launches
    u16* out               // [heads][dims]
    int groups
    int group              // heads of a group
    int parts              // blocks of a head
    float least            // a step is kept between these
    float most
    """,
)
GATED_NORM = Arguments(
    "GatedNormArguments",
    """
    const u16* x           // fp16 or bf16 [parts][width]
    const u16* gate        // as many
    const u16* weight      // as many, or null: no norm
    u16* out
    int width
    int norm_first         // the gate comes after the norm
    float eps
    """,
)
COMBINE = Arguments(
    "CombineArguments",
    """
    const float* y         // fp32 [tokens][choices][n]
    const void* weights    // [tokens][choices], fp32 or the type of out
    u16* out               // [tokens][n]
    const float* bias      // [experts][n], or null
    const u64* chosen      // [tokens][choices]
    int experts
    int choices
    int n
    int wide               // the weights are fp32
    """,
)
GROUP = Arguments(
    "GroupArguments",
    """
    const u64* chosen      // [total]: the expert of each choice
    int* table             // [1 + row blocks][4]: their number; then of each its expert, first row and rows
    int* sources           // [total]: the token of each row
    int* row_of            // [total]: the row of each choice
    u64* sorted            // [total]: the expert of each row
    int total
    int per                // choices of a token
    int experts
    int rows               // of a row block, at most
    """,
)
GROUPED = Arguments(
    "GroupedArguments",
    """
    const u8* weights      // of all experts, as of SmallBatchArguments
    const u32* scales
    const u16* x           // fp16 [rows][chunks * 64], in fragment order
    const int* table       // as of GroupArguments
    const int* sources     // the row of x for each row of the table, or null where it is the same
    u16* out               // fp16, for each row of the table
    float* partial         // as of WideBatchArguments
    u32* done
    u64 weight_bytes       // of an expert
    u64 scale_bytes
    int n
    int tiles              // of an expert
    int chunks
    int groups
    u32 unit_to_group
    int turned             // the outputs are written in fragment order, of an `n` that is a multiple of 64
    """,
)
ORDER_INPUTS = Arguments(
    "OrderInputsArguments",
    """
    const u16* x           // [rows][k], k a multiple of 8
    u16* out               // fp16 [rows][padded]
    const u16* order       // [padded], or [experts][padded]: the input at each position, k for padding
    const int* sources     // the row of x for each row of out, or null where it is the same
    const u64* sorted      // the expert of each row of out; null where all have one order
    float* powers          // [rows of out]: of two, by which the row is divided, or null
    int k
    int padded
    """,
)
GATE_ROWS = Arguments(
    "GateRowsArguments",
    """
    const u16* y           // fp16 [rows][width], gates and ups in turn, eight of each
    u16* out               // [rows][inner], `inner` a multiple of 8
    const float* powers    // [rows]: what y is multiplied with, or null
    const u16* bias        // fp16 [width], added after that, or null
    int inner
    int width
    int activation         // its number in activations.py
    """,
)
COMBINE_GROUPED = Arguments(
    "CombineGroupedArguments",
    """
    const u16* y           // fp16 [tokens * choices][n], n a multiple of 8
    const int* row_of      // [tokens][choices]: the row of y of each choice
    const void* weights    // [tokens][choices], fp32 or the type of out
    u16* out               // [tokens][n]
    const float* bias      // [experts][n], or null
    const u64* chosen      // [tokens][choices]
    int experts
    int choices
    int n
    int wide               // the weights are fp32
    """,
)
CLAMPED_GATE = Arguments(
    "ClampedGateArguments",
    """
    const u16* y           // fp16 [choices][n][2], gates and ups in turn
    const float* bias      // [experts][n][2], or null
    const u64* chosen      // [choices]
    u16* out               // fp16 [choices][n]
    int experts
    int n
    float alpha
    float limit
    """,
)
ROUTE = Arguments(
    "RouteArguments",
    """
    const void* weights    // [experts][k] of the type of x, or fp32 in the kernels that are called wide
    const u16* bias        // [experts], or null
    const u16* x           // fp16 or bf16 [k], or rows of it in the kernels that are called rows, which open nothing
    const void* open       // [k] of the type of weights: times x the opening of experts that every token takes, or null
    float* logits          // [rows][experts + 1], the last one of `open`, each with all bits set between launches
    void* all              // [rows][experts], the logits or the probabilities; fp32 if `wide`
    void* scores           // [rows][choices + opened], fp32 if `wide_scores`; the last ones sigmoid(open x)
    u64* chosen            // [rows][choices]
    int experts
    int choices
    int opened             // experts behind the chosen ones that `open` is for
    int k
    int wide               // the logits are not rounded
    int wide_scores
    int probabilities      // what `all` is
    int shared             // the chosen scores are divided by their sum
    float scale            // of the chosen scores
    const u16* addend      // [k], or null: x + addend is written to sum, its norm to normed; route_normed only, as what follows
    u16* sum
    const u16* norm        // [k]
    const u16* norm_bias   // [k], or null
    u16* normed
    int centred            // LayerNorm; else RMSNorm
    float eps
    float offset           // added to the norm's weight
    float* shown           // [experts]: the logits, for a kernel that does not wait for this one's end; SHOWN only
    """,
)
ADAPTER_IN = Arguments(
    "AdapterInArguments",
    """
    const u64* adapters    // [rows]: addresses of tables of AdapterEntry, 0 for none
    const u16* x           // fp16 [rows][padded], fragment order
    const u16* norm        // fp16 [padded]: weight of the RMSNorm before, or null
    float* t               // fp32 [rows][most]
    int entry              // of the table: layer * 4 + role
    int padded
    int k                  // inputs that the norm counts
    int most
    float eps
    """,
)
ADAPTER_OUT = Arguments(
    "AdapterOutArguments",
    """
    const u64* adapters
    const float* t
    u16* out               // fp16 [rows][n]; with a residual [rows][padded], or null
    float* residual        // fp32 [rows][n], or null
    const int* permutation // [n]: the position of output n in the next input
    int entry
    int n
    int padded
    int most
    """,
)
ADAPTER_SILU = Arguments(
    "AdapterSiluArguments",
    """
    const u64* adapters
    const float* t
    const u16* gate_up     // fp16 [rows][2 * padded]: 8 gates, their 8 ups, and so on
    u16* out               // fp16 [rows][padded]
    int entry
    int padded
    int most
    """,
)
ROUND = Arguments(
    "RoundArguments",
    """
    const float* rows      // [count][width]
    const float* factor    // [count][count], a row every row_stride numbers, a column every column_stride
    const float* scale     // [width], as zero and top
    const float* zero
    const float* top       // the highest number
    u8* q                  // [count][width]: the numbers
    float* errors          // [count][width]: of the rounded rows, divided by the factor's diagonal
    int count
    int width
    int row_stride
    int column_stride
    """,
)
SAMPLE_PARAMS = Arguments("SampleParams", sampler_structure.c_fields())  # of one row, in device memory
_SAMPLE = """
    const float* logits    // fp32 [rows][vocabulary], as the model gave them
    const SampleParams* params  // [rows]
    const float* bias      // fp32 [rows][vocabulary], read where `biased` is set
    const u32* masks       // [rows][(vocabulary + 31) / 32]: bits of the tokens that may be chosen, read where `masked` is set
    u16* seen              // [rows][vocabulary]: how often a token is in the penalties' range
    u16* answered          // [rows][vocabulary]: how often it is in the part of the answer within that range
    int* history           // [rows][context]: every token so far
    const int* answer_from // [rows]: position of the answer's first token
    float* work            // fp32 [rows][vocabulary]
    int* ids               // [rows]: the token just computed; replaced by the next one
    int* positions         // [rows]: its position; replaced by that of the next one; below 0 the row is idle
    volatile int* host_tokens  // [rows][HOST_TOKENS] in the host's memory: the token of position i at i % HOST_TOKENS
    int vocabulary
    int context
    """
SAMPLE = Arguments("SampleArguments", _SAMPLE)
GUESSED = Arguments(  # begins as SampleArguments do
    "GuessedArguments",
    _SAMPLE
    + """
    int guessed            // rows of the one sequence of row 0
    """,
)
EVERY = (
    REPACK, UNPACK, GEMV, EXPERT_GEMV, EXPERT_AHEAD, EXPERT_SUM, OCTET, SMALL_BATCH, WIDE_BATCH, HEAD, EMBED, NORM, ORDER, SILU,
    ATTENTION, ROPE, GATHER, SAMPLE_PARAMS, SAMPLE, GUESSED, ROW_NORM, ROTATE, LOOK_UP, GATE_ROW, KEEP, DECODE, PROMPT_ATTENTION,
    LATENT, TURN_ROWS, DELTA, SCAN, GATED_NORM, COMBINE, GROUP, GROUPED, ORDER_INPUTS, GATE_ROWS, COMBINE_GROUPED, CLAMPED_GATE,
    ROUTE, ADAPTER_IN, ADAPTER_OUT, ADAPTER_SILU, ADAPTED_GEMV, ROUND, EXCHANGE,
)  # fmt: skip


def c_text() -> str:
    """The shared numbers and every structure, as C."""
    defines = "".join(f"#define {name} {value}\n" for name, value in CONSTANTS.items())
    return defines + "\n" + "\n".join(each.c_text for each in EVERY) + "\n"
