#!/usr/bin/env python3
"""Times one training step of a Llama in PyTorch and transformers: what laam is measured against.

A step is forward, loss over every position, backward, clipping to 1.0 and AdamW(0.9, 0.999, 1e-8,
decay 0.1), on random tokens. One JSON line a measurement: the median over --steps timed steps
after --warmup untimed ones. Each measurement runs in a process of its own, so that peak memory is its
own and one that fails (out of memory) does not take the others along.

  step.py --preset original --batch 1,8,64 --dtype float32,bfloat16 --threads 2
  step.py --preset 124m --batch 16 --device cuda --dtype bfloat16 --how eager,compile,overhead,graph
  step.py --batch 8 --laam target/release/laam --rounds 3   # laam and PyTorch in turns, and the ratio
  step.py --batch 1,8 --dtype float32,bfloat16 --laam target/release/laam   # also against the better of the two

--how: eager; compile (torch.compile); overhead (its mode reduce-overhead: CUDA graphs of its own); graph
(the whole eager step, optimizer included, as one CUDA graph, its steps timed without waiting between:
the strongest fair peer). laam is compared with the fastest of them.

bfloat16 is autocast over float32 weights. With --laam, `laam bench step` runs the same preset, batch,
threads and step count between PyTorch's turns, so that a machine that slows down slows both; the last
line compares the medians of the turns. Needs torch and transformers (2.15 and 5.23 were used).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

#              hidden intermediate layers heads kv_heads vocab  context
PRESETS = {
    "original": (64, 256, 8, 32, 4, 32768, 512),
    "32m": (256, 1024, 8, 16, 16, 32768, 512),
    "124m": (768, 2048, 12, 12, 12, 32768, 1024),
    "350m": (1024, 2816, 24, 16, 16, 32768, 1024),
    "linux-5m": (288, 944, 3, 9, 9, 4096, 512),
    "0.5b": (896, 4864, 24, 14, 2, 151936, 1024),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, 1024),
    "1.3b": (2048, 5632, 24, 16, 16, 32768, 2048),
    "7b": (4096, 11008, 32, 32, 32, 32000, 4096),
}


TIED = {"linux-5m", "0.5b", "1.5b"}  # one matrix for embedding and LM head


def measure(args):
    """One measurement, in this process."""
    import torch
    import transformers

    if args.threads:
        torch.set_num_threads(args.threads)
    hidden, intermediate, layers, heads, kv_heads, vocab, context = PRESETS[args.preset]
    context = args.context or context
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab,
        max_position_embeddings=context, tie_word_embeddings=args.preset in TIED, bos_token_id=0, eos_token_id=1,
        pad_token_id=4, attn_implementation="sdpa")).to(args.device)
    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    on_gpu = args.device == "cuda"
    optimizer = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=0.1), dict(params=norms, weight_decay=0.0)],
        lr=1e-3, betas=(0.9, 0.999), eps=1e-8, fused=on_gpu, capturable=args.how == "graph")
    batch = int(args.batch)
    batches = [torch.randint(5, vocab, (batch, context)).to(args.device) for _ in range(4)]
    modes = {"compile": "default", "overhead": "reduce-overhead"}
    forward = torch.compile(model, mode=modes[args.how]) if args.how in modes else model
    # What autocast keeps from step to step must not be captured.
    autocast = torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16",
                              cache_enabled=args.how != "graph")
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def step(ids):
        with autocast:
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # A graph's gradients stay where they are.
        optimizer.zero_grad(set_to_none=args.how != "graph")
        return loss

    seconds, losses = [], []
    if args.how == "graph":
        seconds, losses = whole_graph(torch, step, batches, args)
    else:
        for at in range(args.warmup + args.steps):
            synchronize()
            start = time.perf_counter()
            # Reading the loss waits for the device, as logging it would.
            losses.append(step(batches[at % len(batches)]).item())
            synchronize()
            if at >= args.warmup:
                seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(dict(
        program="pytorch", torch=torch.__version__, transformers=transformers.__version__,
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        threads=None if on_gpu else torch.get_num_threads(), preset=args.preset, precision=args.dtype,
        how=args.how, batch=batch, context=context, parameters=sum(p.numel() for p in model.parameters()),
        step_seconds=round(median, 6), tokens_per_second=round(batch * context / median, 1),
        fastest=round(min(seconds), 6), slowest=round(max(seconds), 6), peak_bytes=peak,
        losses=[round(losses[0], 4), round(losses[-1], 4)])))


def whole_graph(torch, step, batches, args):
    """Seconds per step of some rows of replays, and the first and last loss."""
    ids = batches[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            first = step(ids).item()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(ids)
    seconds = []
    for row in range(1 + args.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for at in range(args.steps):
            ids.copy_(batches[at % len(batches)])
            graph.replay()
        torch.cuda.synchronize()
        if row > 0:
            seconds.append((time.perf_counter() - start) / args.steps)
    return seconds, [first, loss.item()]


def run(command):
    """Runs one measurement and returns its JSON, or what went wrong."""
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        if done.returncode == 0:
            return json.loads(done.stdout)
    except json.JSONDecodeError:
        pass
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    return dict(error=last[:300], exit=done.returncode)


def pytorch(args, batch, dtype, how):
    command = [sys.executable, __file__, "--measure", "--preset", args.preset, "--batch", str(batch),
               "--dtype", dtype, "--how", how, "--device", args.device, "--steps", str(args.steps),
               "--warmup", str(args.warmup)]
    command += ["--threads", str(args.threads)] if args.threads else []
    command += ["--context", str(args.context)] if args.context else []
    return run(command)


def laam(args, batch, dtype):
    backend = "cuda" if args.device == "cuda" else "cpu"
    command = [args.laam, "bench", "step", "--json", "--preset", args.preset, "--batch", str(batch),
               "--backend", backend, "--steps", str(args.steps), "--warmup", str(args.warmup),
               "--precision", dtype]
    command += ["--threads", str(args.threads)] if args.threads else []
    command += ["--context", str(args.context)] if args.context else []
    return dict(dict(program="laam"), **run(command))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="original")
    parser.add_argument("--batch", default="8", help="windows per step, several with commas")
    parser.add_argument("--context", type=int, help="tokens per window (default: the preset's)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, or both with a comma")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--how", default="eager", help="eager, compile, overhead, graph; several with commas")
    parser.add_argument("--laam", metavar="PROGRAM", help="also run this laam, in turns")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each program")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args)
    hows = args.how.split(",")
    if unknown := set(hows) - {"eager", "compile", "overhead", "graph"}:
        parser.error(f"--how knows no {', '.join(unknown)}")
    if "graph" in hows and args.device != "cuda":
        parser.error("--how graph needs --device cuda")
    failed = False
    for batch in (int(batch) for batch in args.batch.split(",")):
        speeds = {"pytorch": {}, "laam": {}}
        for dtype in args.dtype.split(","):
            failed |= compare(args, batch, dtype, hows, speeds)
        if len(speeds["laam"]) > 1:
            best = max(speeds["pytorch"].values())
            print(json.dumps(dict(
                preset=args.preset, batch=batch, pytorch_at_its_best=round(best, 1),
                times_as_fast={dtype: round(speed / best, 3) for dtype, speed in speeds["laam"].items()})),
                flush=True)
    sys.exit(1 if failed else 0)


def compare(args, batch, dtype, hows, speeds):
    """Measures each program in turns, notes its speed, and tells whether one failed."""
    turns = {name: [] for name in hows + ["laam"]}
    failed = False
    for _ in range(args.rounds):
        for name in hows + (["laam"] if args.laam else []):
            result = laam(args, batch, dtype) if name == "laam" else pytorch(args, batch, dtype, name)
            line = dict(preset=args.preset, batch=batch, precision=dtype)
            line |= dict(program="laam") if name == "laam" else dict(program="pytorch", how=name)
            print(json.dumps(line | result), flush=True)
            if "error" in result:
                failed = True
            else:
                turns[name].append(result)
    medians = {name: {key: statistics.median(turn[key] for turn in results)
                      for key in ("tokens_per_second", "peak_bytes")}
               for name, results in turns.items() if results}
    ours = medians.pop("laam", None)
    if ours and medians:
        fastest = max(medians, key=lambda how: medians[how]["tokens_per_second"])
        theirs = medians[fastest]
        speeds["laam"][dtype] = ours["tokens_per_second"]
        speeds["pytorch"][dtype] = theirs["tokens_per_second"]
        summary = dict(preset=args.preset, batch=batch, precision=dtype, rounds=args.rounds,
                    tokens_per_second={name: round(median["tokens_per_second"], 1)
                                       for name, median in (medians | {"laam": ours}).items()},
                    fastest_peer=fastest,
                    times_as_fast=round(ours["tokens_per_second"] / theirs["tokens_per_second"], 3))
        # On a GPU, laam counts the memory of its process here, PyTorch that of the GPU.
        if args.device == "cpu":
            summary["share_of_memory"] = round(ours["peak_bytes"] / theirs["peak_bytes"], 4)
        print(json.dumps(summary), flush=True)
    return failed


if __name__ == "__main__":
    # Nothing here may look for a model on the network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
