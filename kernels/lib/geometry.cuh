// Geometry of the kernels: what the host has to know to launch them. build.rs makes these constants those
// of `laam::kernels::geometry`, with their comments.
#pragma once

// Threads per warp.
constexpr int WARP_SIZE = 32;
// Most warps per block.
constexpr int MAX_WARPS = 32;
// Threads per block, at most, of the kernels that go through elements, rows or columns.
constexpr int BLOCK_THREADS = 256;
// Rows of a matrix fragment on tensor cores.
constexpr int MMA_ROWS = 16;

// Largest head_dim of attention_generic.cu and attention_decode.cu.
constexpr int MAX_HEAD_DIM = 256;
// attention_decode.cu: threads per block.
constexpr int DECODE_THREADS = 128;
// attention_generic.cu: warps per block.
constexpr int GENERIC_WARPS = 4;
// attention_generic.cu: stationary rows per warp. A tile has WARP_SIZE streamed rows.
constexpr int GENERIC_ROWS = 4;
// attention_smallhead.cu and attention_smallhead_tf32.cu: warps per block of the forward and dq passes.
constexpr int SMALLHEAD_WARPS = 4;
// Most warps per block of their dk and dv passes: with one row per lane or one block of rows per warp,
// and with several.
constexpr int SMALLHEAD_DKDV_WARPS[2] = {8, 4};
// flash_attention.cu: tiles of the forward, dq, and dk and dv passes, for head_dim up to 32, 64 and 128:
// warps per block, blocks of MMA_ROWS rows per warp, streamed rows per tile, minimum resident blocks per
// SM (`__launch_bounds__`), and 1 if a warp keeps its stationary rows in registers. A second block of
// rows per warp halves the shared-memory traffic of a matmul and costs registers. The fastest of those
// timed on an H200.
constexpr int FLASH_TILES[3][3][5] = {
    {{4, 1, 64, 4, 1}, {4, 2, 64, 2, 0}, {4, 2, 32, 2, 0}},
    {{4, 1, 64, 4, 0}, {4, 2, 32, 2, 1}, {4, 1, 32, 2, 1}},
    {{4, 1, 64, 3, 1}, {4, 1, 64, 2, 1}, {4, 1, 48, 2, 0}}};

// embedding.cu: values of a digit of the sort, and threads per block.
constexpr int EMBEDDING_RADIX = 512;
// embedding.cu: bits of a digit.
constexpr int EMBEDDING_DIGIT_BITS = 9;
// embedding.cu: rows that a block sorts.
constexpr int EMBEDDING_TILE = 1024;
// embedding.cu: sorted rows per partial sum.
constexpr int EMBEDDING_CHUNK = 64;

// fused_linear_cross_entropy.cu: largest hidden size.
constexpr int LCE_MAX_HIDDEN = 256;
// fused_linear_cross_entropy.cu: stationary rows per block.
constexpr int LCE_BLOCK_ROWS = 128;
// fused_linear_cross_entropy.cu: streamed rows per tile.
constexpr int LCE_TILE_ROWS = 64;
// fused_linear_cross_entropy.cu, by the width to which hidden is padded, 32, 64, 128 and 256: blocks of
// MMA_ROWS rows per warp, streamed rows at a time, minimum resident blocks per SM. Two blocks of rows
// halve the shared-memory traffic. Registers bound all three: rows / 16 * 3/4 (width + streamed rows) of
// at most 255 per thread hold fragments.
constexpr int LCE_TILES[4][3] = {{2, 32, 4}, {2, 32, 3}, {2, 16, 2}, {1, 16, 1}};

// matmul.cu on tensor cores: rows and columns of a block's tile.
constexpr int MATMUL_TILE[2] = {128, 64};
// matmul.cu on tensor cores: threads per block.
constexpr int MATMUL_THREADS = 128;
// matmul.cu on the CUDA cores: rows and columns of a block's tile.
constexpr int MATMUL_SIMT_TILE = 64;
// matmul.cu on the CUDA cores: threads per block.
constexpr int MATMUL_SIMT_THREADS = 256;

// rms_norm.cu: strips of a sum of partial sums, each of a row of threads.
constexpr int RMS_NORM_STRIPS = 32;
// sum_pieces.cu: most levels of a tree of pieces.
constexpr int SUM_PIECES_LEVELS = 8;

// Bytes of `StepParams` in adamw.cu.
constexpr int ADAMW_PARAMS_BYTES = 24;
// Bytes of `StepParams` in muon.cu.
constexpr int MUON_PARAMS_BYTES = 16;
// Bytes of `StepRecord` in step_queue.cu.
constexpr int STEP_RECORD_BYTES = 32;
// Bytes of `StepResult` in step_queue.cu.
constexpr int STEP_RESULT_BYTES = 16;
