#!/usr/bin/env python3
"""Compiles the Triton kernels of this file to the PTX fixtures beside it. No GPU is needed.

    python3 -m venv /tmp/triton && /tmp/triton/bin/pip install triton
    /tmp/triton/bin/python compile.py

Each fixture holds one kernel for compute capability 8.0, less the debug sections; a comment in
its first lines names the Triton version, the warps per block and the dynamic shared memory.
"""

import os
import pathlib
import re

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton  # noqa: E402
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(out + at, tl.load(x + at, mask) + tl.load(y + at, mask), mask)


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c [M, N] = a [M, K] b [K, N] of bf16, rounded to bf16."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        a_tile = tl.load(
            a + rows[:, None] * K + (k + inner)[None, :],
            (rows[:, None] < M) & ((k + inner)[None, :] < K),
            0.0,
        )
        b_tile = tl.load(
            b + (k + inner)[:, None] * N + columns[None, :],
            ((k + inner)[:, None] < K) & (columns[None, :] < N),
            0.0,
        )
        acc = tl.dot(a_tile, b_tile, acc)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], acc.to(tl.bfloat16), mask)


@triton.jit
def softmax(x, out, n, BLOCK: tl.constexpr):
    """Softmax of each row of n numbers."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * n + at, at < n, -float("inf"))
    weights = tl.exp(values - tl.max(values, 0))
    tl.store(out + row * n + at, weights / tl.sum(weights, 0), at < n)


@triton.jit
def layer_norm(x, weight, bias, out, n, epsilon, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < n
    values = tl.load(x + row * n + at, mask, 0.0)
    mean = tl.sum(values, 0) / n
    centred = tl.where(mask, values - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / n + epsilon)
    y = centred * scale * tl.load(weight + at, mask) + tl.load(bias + at, mask)
    tl.store(out + row * n + at, y, mask)


@triton.jit
def layer_norm_backward(x, weight, dy, dx, dweight, dbias, n, epsilon, BLOCK: tl.constexpr):
    """dx of each row; dweight and dbias are added to atomically."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < n
    values = tl.load(x + row * n + at, mask, 0.0)
    mean = tl.sum(values, 0) / n
    centred = tl.where(mask, values - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / n + epsilon)
    normal = centred * scale
    gradient = tl.load(dy + row * n + at, mask, 0.0)
    weighted = gradient * tl.load(weight + at, mask, 0.0)
    first = tl.sum(weighted * normal, 0) / n
    second = tl.sum(weighted, 0) / n
    tl.store(dx + row * n + at, (weighted - normal * first - second) * scale, mask)
    tl.atomic_add(dweight + at, gradient * normal, mask)
    tl.atomic_add(dbias + at, gradient, mask)


@triton.jit
def reduce(x, sums, most, place, n, BLOCK: tl.constexpr):
    """Sum, maximum and its first place, of each row of n numbers."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    values = tl.load(x + row * n + at, at < n, -float("inf"))
    tl.store(sums + row, tl.sum(tl.where(at < n, values, 0.0), 0))
    tl.store(most + row, tl.max(values, 0))
    tl.store(place + row, tl.argmax(values, 0))


@triton.jit
def histogram(x, counts, largest, n, BLOCK: tl.constexpr):
    """Counts of the values 0 to 15 of x, and its largest value, by atomics."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, at < n, 0)
    tl.atomic_add(counts + values, 1, at < n)
    tl.atomic_max(largest, tl.max(tl.where(at < n, values, 0), 0))


@triton.jit
def flash_forward(q, k, v, out, lse, T, scale, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Causal attention on [heads, T, D] of bf16; lse in base 2, scale times log2(e)."""
    head = tl.program_id(1) * T * D
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inner = tl.arange(0, D)
    q_tile = tl.load(q + head + rows[:, None] * D + inner[None, :], rows[:, None] < T, 0.0)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for start in range(0, tl.program_id(0) * BM + BM, BN):
        keys = start + tl.arange(0, BN)
        k_tile = tl.load(k + head + keys[None, :] * D + inner[:, None], keys[None, :] < T, 0.0)
        scores = tl.dot(q_tile, k_tile) * scale
        scores = tl.where(rows[:, None] >= keys[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        factor = tl.exp2(top - higher)
        total = total * factor + tl.sum(weights, 1)
        v_tile = tl.load(v + head + keys[:, None] * D + inner[None, :], keys[:, None] < T, 0.0)
        acc = tl.dot(weights.to(tl.bfloat16), v_tile, acc * factor[:, None])
        top = higher
    mask = rows[:, None] < T
    result = (acc / total[:, None]).to(tl.bfloat16)
    tl.store(out + head + rows[:, None] * D + inner[None, :], result, mask)
    tl.store(lse + tl.program_id(1) * T + rows, top + tl.log2(total), rows < T)


@triton.jit
def flash_backward(
    q, k, v, out, dout, lse, dq, dk, dv, T, scale, scale_log2,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """dk and dv of a block of keys; dq is added to atomically, in f32."""
    head = tl.program_id(1) * T * D
    keys = tl.program_id(0) * BN + tl.arange(0, BN)
    inner = tl.arange(0, D)
    key_mask = keys[:, None] < T
    k_tile = tl.load(k + head + keys[:, None] * D + inner[None, :], key_mask, 0.0)
    v_tile = tl.load(v + head + keys[:, None] * D + inner[None, :], key_mask, 0.0)
    dk_acc = tl.zeros((BN, D), tl.float32)
    dv_acc = tl.zeros((BN, D), tl.float32)
    for start in range(tl.program_id(0) * BN // BM * BM, T, BM):
        rows = start + tl.arange(0, BM)
        row_mask = rows[:, None] < T
        tile = head + rows[:, None] * D + inner[None, :]
        q_tile = tl.load(q + tile, row_mask, 0.0)
        do_tile = tl.load(dout + tile, row_mask, 0.0)
        o_tile = tl.load(out + tile, row_mask, 0.0)
        delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
        row_lse = tl.load(lse + tl.program_id(1) * T + rows, rows < T, 0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile)) * scale_log2
        weights = tl.exp2(scores - row_lse[:, None])
        weights = tl.where((rows[:, None] >= keys[None, :]) & row_mask, weights, 0.0)
        dv_acc = tl.dot(tl.trans(weights.to(tl.bfloat16)), do_tile, dv_acc)
        dp = tl.dot(do_tile, tl.trans(v_tile))
        ds = (weights * (dp - delta[:, None])).to(tl.bfloat16)
        dk_acc = tl.dot(tl.trans(ds), q_tile, dk_acc)
        tl.atomic_add(dq + tile, tl.dot(ds, k_tile) * scale, row_mask)
    place = head + keys[:, None] * D + inner[None, :]
    tl.store(dk + place, (dk_acc * scale).to(tl.bfloat16), key_mask)
    tl.store(dv + place, dv_acc.to(tl.bfloat16), key_mask)


F, B, I = "*fp32", "*bf16", "*i32"
TILE = {"D": 32, "BM": 32, "BN": 32}
# File, kernel, types, constants. Pointers are multiples of 16, as those of an allocator are; so
# are integers of the type "i32:16", which lets Triton copy asynchronously.
KERNELS = [
    ("add", add, [F, F, F, "i32"], {"BLOCK": 256}),
    ("matmul", matmul, [B, B, B, "i32", "i32", "i32"], {"BM": 32, "BN": 32, "BK": 32}),
    (
        "matmul_pipelined",
        matmul,
        [B, B, B, "i32", "i32:16", "i32:16"],
        {"BM": 32, "BN": 32, "BK": 32},
    ),
    ("softmax", softmax, [F, F, "i32"], {"BLOCK": 512}),
    ("layer_norm", layer_norm, [F, F, F, F, "i32", "fp32"], {"BLOCK": 512}),
    (
        "layer_norm_backward",
        layer_norm_backward,
        [F, F, F, F, F, F, "i32", "fp32"],
        {"BLOCK": 512},
    ),
    ("reduce", reduce, [F, F, F, I, "i32"], {"BLOCK": 512}),
    ("histogram", histogram, [I, I, I, "i32"], {"BLOCK": 128}),
    ("flash_forward", flash_forward, [B, B, B, B, F, "i32", "fp32"], TILE),
    (
        "flash_backward",
        flash_backward,
        [B, B, B, B, B, F, F, B, B, "i32", "fp32", "fp32"],
        TILE,
    ),
]
WARPS = 4


def main():
    folder = pathlib.Path(__file__).parent
    for file, kernel, types, constants in KERNELS:
        names = kernel.arg_names
        signature = {name: ty.split(":")[0] for name, ty in zip(names, types)}
        signature |= {name: "constexpr" for name in constants}
        places = {(names.index(name),): value for name, value in constants.items()}
        aligned = [at for at, ty in enumerate(types) if ty[0] == "*" or ty.endswith(":16")]
        attributes = {(at,): [["tt.divisibility", 16]] for at in aligned}
        source = ASTSource(kernel, signature, constexprs=places, attrs=attributes)
        options = {"num_warps": WARPS, "num_stages": 3}
        built = triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        ptx = re.sub(r"\n\t\.section\t\.debug.*", "\n", built.asm["ptx"], flags=re.S)
        ptx = re.sub(r'(\.file\t\d+) ".*/', r'\1 "', ptx)
        shared = built.metadata.shared
        head = f"// triton {triton.__version__}, {WARPS} warps, {shared} bytes of shared memory\n"
        (folder / f"{file}.ptx").write_text(head + ptx.strip() + "\n")


if __name__ == "__main__":
    main()
