#!/usr/bin/env python3
"""Times PyTorch's operations at the shapes of laam's kernels: what they are measured against.

One JSON line a row: the operation, which of PyTorch's ways, the shape, the median of --samples timings in
microseconds with the tenth and ninetieth percentile, and the useful GB/s, TFLOP/s, pairs/s behind it. Useful means
what the operation has to do at least, at two bytes an activation; a way that does more is slower, not busier.

  kernels.py --device cuda                       # bfloat16, every row
  kernels.py --device cuda --only head --shape original
  kernels.py --laam target/release/laam          # laam's own kernels too, as `laam bench kernels` times them
  kernels.py --device cpu --dtype float32        # no GPU: shows that the rows run, and little else

On a GPU a row is captured into a CUDA graph of --repeats calls and the graph is replayed, so that launching costs
nothing; inputs of different calls are different memory, more than three times the second-level cache in all, unless
--warm. A row that cannot be captured is timed call by call and says so; a row that PyTorch refuses says why.
Ways: eager, compile (torch.compile), and for attention the backends flash, cudnn, efficient, math.
Needs torch (2.15 was used).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

#            rows      hidden intermediate heads kv_heads head_dim vocab  context layers
SHAPES = {
    "original": (64 * 512, 64, 256, 32, 4, 2, 32768, 512, 8),
    "original1": (512, 64, 256, 32, 4, 2, 32768, 512, 8),
    "32m": (16 * 512, 256, 1024, 16, 16, 16, 32768, 512, 8),
    "124m": (8 * 1024, 768, 2048, 12, 12, 64, 32768, 1024, 12),
    "1.3b": (4 * 2048, 2048, 5632, 16, 16, 128, 32768, 2048, 24),
}
TINY = (2 * 32, 64, 128, 4, 2, 16, 512, 32, 2)


class Row:
    """One thing to time. `make()` gives fresh inputs; `call(inputs)` does the work."""

    def __init__(self, name, way, shape, make, call, bytes=0, flops=0, pairs=0):
        self.name, self.way, self.shape, self.make, self.call = name, way, shape, make, call
        self.bytes, self.flops, self.pairs = bytes, flops, pairs


def rows(torch, shape, dtype, device, compiled):
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    tokens, hidden, inter, heads, kv_heads, head_dim, vocab, context, layers = shape
    windows = tokens // context

    def random(*size, grad=False):
        return torch.randn(*size, device=device, dtype=dtype).requires_grad_(grad)

    def ways(function):
        yield "eager", function
        if compiled:
            yield "compile", torch.compile(function, dynamic=False)

    def back(outputs, inputs, gradient):
        return torch.autograd.grad(outputs, inputs, gradient)

    # RMSNorm, the residual's addition before it.
    def norm(x, residual, weight):
        total = x + residual
        return F.rms_norm(total, (hidden,), weight, 1e-5), total

    name = f"{tokens} x {hidden}"
    plane = tokens * hidden
    for way, f in ways(norm):
        yield Row("rms_norm", way, name, lambda: (random(tokens, hidden), random(tokens, hidden), random(hidden)),
                  lambda i, f=f: f(*i), bytes=8 * plane + 4 * tokens)

        def make():
            inputs = (random(tokens, hidden, grad=True), random(tokens, hidden), random(hidden, grad=True))
            return inputs, random(tokens, hidden), random(tokens, hidden)

        def call(i, f=f):
            inputs, dy, dtotal = i
            return back(f(*inputs), (inputs[0], inputs[2]), (dy, dtotal))

        yield Row("rms_norm forward and backward", way, name, make, call, bytes=16 * plane + 8 * tokens)

    # SwiGLU over the joined rows of gate, then up.
    def swiglu(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    name, plane = f"{tokens} x {inter}", tokens * inter
    for way, f in ways(swiglu):
        yield Row("swiglu", way, name, lambda: random(tokens, 2 * inter), lambda i, f=f: f(i), bytes=6 * plane)
        yield Row("swiglu forward and backward", way, name,
                  lambda: (random(tokens, 2 * inter, grad=True), random(tokens, inter)),
                  lambda i, f=f: back(f(i[0]), i[0], i[1]), bytes=16 * plane)

    # Causal attention; key/value heads are shared without copies where the backend can.
    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)

    def qkv(grad):
        return tuple(random(windows, h, context, head_dim, grad=grad) for h in (heads, kv_heads, kv_heads))

    pairs = windows * heads * context * (context + 1) // 2
    name = f"{windows} x {context}, {heads}/{kv_heads} heads of {head_dim}"
    values = 2 * windows * context * head_dim * 2 * (heads + kv_heads)
    for way in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        backend = getattr(SDPBackend, way)
        short = way.split("_")[0].lower()

        def forward(i, backend=backend):
            with sdpa_kernel(backend):
                return attention(*i)

        yield Row("attention", short, name, lambda: qkv(False), forward, bytes=values, flops=4 * head_dim * pairs,
                  pairs=pairs)
        yield Row("attention forward and backward", short, name,
                  lambda: (qkv(True), random(windows, heads, context, head_dim)),
                  lambda i, forward=forward: back(forward(i[0]), i[0], i[1]), bytes=3 * values,
                  flops=14 * head_dim * pairs, pairs=2 * pairs)

    # The head and its loss, the mean over all rows.
    def head(x, w, targets):
        return F.cross_entropy(F.linear(x, w).float(), targets)

    def head_inputs(grad):
        return (random(tokens, hidden, grad=grad), random(vocab, hidden, grad=grad),
                torch.randint(vocab, (tokens,), device=device))

    name = f"{tokens} x {hidden} to {vocab}"
    once = 2 * tokens * hidden + 2 * vocab * hidden + 12 * tokens
    for way, f in ways(head):
        yield Row("fused_linear_cross_entropy", way, name, lambda: head_inputs(False), lambda i, f=f: f(*i), bytes=once,
                  flops=2 * tokens * vocab * hidden)
        yield Row("fused_linear_cross_entropy forward and backward", way, name, lambda: head_inputs(True),
                  lambda i, f=f: back(f(*i), i[:2], None),
                  bytes=once + 2 * tokens * hidden + 8 * vocab * hidden, flops=6 * tokens * vocab * hidden)

    # One fused AdamW step over all parameters of the model.
    block = hidden * (heads + 2 * kv_heads) * head_dim + heads * head_dim * hidden + 3 * hidden * inter + 2 * hidden
    sizes = [vocab * hidden] * 2 + [block] * layers

    def adamw_state():
        parameters = [torch.randn(size, device=device, requires_grad=True) for size in sizes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, fused=True,
                                      capturable=device == "cuda")
        # The first step makes the moments.
        optimizer.step()
        return optimizer

    yield Row("adamw", "fused", f"{sum(sizes)} parameters", adamw_state, lambda i: i.step(), bytes=28 * sum(sizes))


def input_bytes(torch, value):
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    if isinstance(value, torch.optim.Optimizer):
        return 4 * sum(input_bytes(torch, p) for group in value.param_groups for p in group["params"])
    return sum(input_bytes(torch, part) for part in value) if isinstance(value, (tuple, list)) else 0


def several(torch, row, args):
    """Inputs enough to leave the second-level cache cold, at most so many as are called in turn."""
    first = row.make()
    if args.device == "cpu" or args.warm:
        return [first]
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(args.repeats, 1 + 3 * cache // max(1, input_bytes(torch, first)))
    return [first] + [row.make() for _ in range(count - 1)]


def on_gpu(torch, row, args):
    """Microseconds a call, one number a sample, and whether a graph was replayed."""
    inputs = several(torch, row, args)
    calls = [inputs[i % len(inputs)] for i in range(args.repeats)]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            row.call(calls[0])
    torch.cuda.synchronize()

    def all_calls():
        for i in calls:
            row.call(i)

    graphed, run = True, None
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_calls()
        run = graph.replay
    except Exception:
        torch.cuda.synchronize()
        graphed, run = False, all_calls
    run()
    samples = []
    for _ in range(args.samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return samples, graphed


def on_cpu(torch, row, args):
    inputs = row.make()
    row.call(inputs)
    samples = []
    for _ in range(args.samples):
        begin = time.perf_counter()
        row.call(inputs)
        samples.append((time.perf_counter() - begin) * 1e6)
    return samples, False


def laam(args):
    """The rows of `laam bench kernels`, in the words of this script; whether it gave any."""
    command = [args.laam, "bench", "kernels", "--json", "--backend", args.device, "--precision", args.dtype]
    command += ["--only", args.only] if args.only else []
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)
    except json.JSONDecodeError:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        print(json.dumps(dict(program="laam", refused=last[:200], exit=done.returncode)), flush=True)
        return False
    for row in found["rows"]:
        line = dict(program="laam", device=found["device"], dtype=args.dtype, operation=row["operation"],
                    shape=row["shape"], warm=row["warm"], median_us=round(row["seconds"] * 1e6, 2),
                    p10_us=round(row["p10"] * 1e6, 2), p90_us=round(row["p90"] * 1e6, 2),
                    gb_per_second=round(row["gigabytes_per_second"], 3), tflop_per_second=round(row["teraflops"], 3))
        if row["pairs_per_second"]:
            line["pairs_per_second"] = round(row["pairs_per_second"], 3)
        print(json.dumps(line), flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], action="append", help="default: all but tiny")
    parser.add_argument("--only", default="", help="rows whose names contain this")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=10, help="calls per graph")
    parser.add_argument("--warm", action="store_true", help="the same inputs for every call")
    parser.add_argument("--laam", metavar="PROGRAM", help="also run this laam's kernels")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    args = parser.parse_args()
    try:
        import torch
    except ImportError:
        sys.exit("kernels.py: there is no torch here; pip install torch")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("kernels.py: PyTorch sees no CUDA GPU here, so there is nothing to compare kernels with; "
                 "--device cpu --shape tiny shows that the rows run")
    if args.device == "cpu":
        print("kernels.py: on the CPU, without graphs: these times say nothing of a GPU", file=sys.stderr)
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    failed = 0
    for shape in args.shape or SHAPES:
        sizes = TINY if shape == "tiny" else SHAPES[shape]
        for row in rows(torch, sizes, getattr(torch, args.dtype), args.device, not args.no_compile):
            if args.only not in row.name:
                continue
            line = dict(program="pytorch", torch=torch.__version__, device=device, dtype=args.dtype, preset=shape,
                        operation=row.name, implementation=row.way, shape=row.shape)
            try:
                samples, graphed = (on_gpu if args.device == "cuda" else on_cpu)(torch, row, args)
            except Exception as why:
                # What a backend of attention does not take, and what does not fit, is a result too.
                line["refused"] = str(why).strip().splitlines()[0][:200] if str(why).strip() else type(why).__name__
                failed += row.name.split()[0] != "attention"
                print(json.dumps(line), flush=True)
                continue
            finally:
                if args.device == "cuda":
                    torch.cuda.empty_cache()
            median = statistics.median(samples)
            cuts = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else [median] * 9
            line.update(graph=graphed, warm=args.warm, samples=len(samples), median_us=round(median, 2),
                        p10_us=round(cuts[0], 2), p90_us=round(cuts[8], 2))
            for key, amount, unit in (("gb_per_second", row.bytes, 1e3), ("tflop_per_second", row.flops, 1e6),
                                      ("pairs_per_second", row.pairs, 1e-6)):
                if amount:
                    line[key] = round(amount / median / unit, 3)
            print(json.dumps(line), flush=True)
    if args.laam:
        failed += not laam(args)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
