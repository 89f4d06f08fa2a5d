#!/usr/bin/env python3
"""Twenty training steps of laam beside PyTorch's, from the same weights on the same windows.

  follow.py target/release/laam --backend cuda                       # bfloat16
  follow.py target/release/laam --backend cpu --precision float32

laam writes tokenizer, token file and first weights of a small model of the original's kind (hidden 64, heads
of 2) and trains; transformers' LlamaForCausalLM loads that folder and takes the same steps, in f32 and, for
bfloat16, by autocast too. Loss and gradient norm of every step are compared, relative: in float32 laam may be
1e-4 away, in bfloat16 twice as far from PyTorch's f32 as PyTorch's own bfloat16 is, and 1e-3. One JSON
object; exit status 1 if a bound does not hold. Needs torch and transformers.
"""

import argparse
import json
import os
import pathlib
import struct
import subprocess
import sys
import tempfile

CONTEXT, BATCH, STEPS = 64, 4, 20
SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=32,
             num_key_value_heads=4, max_position_embeddings=CONTEXT)
SOURCES = pathlib.Path(__file__).resolve().parents[2] / "src"


def text(folder):
    """A corpus of one file: no document ends in the middle of a window."""
    sources = sorted(SOURCES.glob("llama/*.rs"))
    folder.mkdir()
    (folder / "all.c").write_text("".join(path.read_text() for path in sources))


def run(laam, *arguments, **flags):
    command = [laam, *map(str, arguments)]
    for name, value in flags.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")


def tokens(path):
    """The ids of a token file (src/tokens/file.rs)."""
    data = path.read_bytes()
    width, count = struct.unpack_from("<IQ", data, 12)
    return struct.unpack_from(f"<{count}{'H' if width == 2 else 'I'}", data, 160)


def pytorch(folder, ids, lines, dtype, device):
    """Losses and gradient norms of the steps, at the rates that laam logged."""
    import torch
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [dict(params=[p for name, p in named if "norm" not in name], weight_decay=0.1),
         dict(params=[p for name, p in named if "norm" in name], weight_decay=0.0)],
        betas=(0.9, 0.999), eps=1e-8)
    losses, norms = [], []
    for step, line in enumerate(lines):
        first = step * BATCH * CONTEXT
        row = torch.tensor(ids[first:first + BATCH * CONTEXT + 1], device=device)
        inputs, targets = row[:-1].view(BATCH, CONTEXT), row[1:]
        for group in optimizer.param_groups:
            group["lr"] = line["learning_rate"]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def apart(ours, theirs):
    """Largest relative difference; NaN counts as infinite."""
    return max(abs(a - b) / abs(b) if a == a else float("inf") for a, b in zip(ours, theirs))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("laam")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    import torch
    device = "cuda" if args.backend == "cuda" else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        text(folder / "text")
        source, tokenizer, first, second = (folder / name for name in ("text", "tokenizer", "first", "second"))
        run(args.laam, "train-tokenizer", source=source, vocab_size=512, output_path=tokenizer)
        common = dict(source=source, tokenizer_path=tokenizer, windows="stream", order="sequential",
                      batch_size=BATCH, lr_scheduler_type="cosine")
        # Weights as they are drawn: a step at rate 0 changes none.
        run(args.laam, "train", output_path=first, backend="cpu", max_steps=1, learning_rate=0, **common, **SHAPE)
        run(args.laam, "train", output_path=second, backend=args.backend, max_steps=STEPS, logging_steps=1,
            init_from=first, precision=args.precision, learning_rate=3e-3, warmup_steps=5, **common,
            max_position_embeddings=CONTEXT)
        lines = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == STEPS, f"{len(lines)} lines of metrics"
        ids = tokens(folder / "second.tokens")
        assert len(ids) > STEPS * BATCH * CONTEXT, f"{len(ids)} tokens are too few"
        exact = pytorch(first, ids, lines, "float32", device)
        mixed = pytorch(first, ids, lines, "bfloat16", device) if args.precision == "bfloat16" else None

    summary = dict(backend=args.backend, precision=args.precision, torch=torch.__version__, steps=STEPS,
                first_loss=exact[0][0], last_loss=exact[0][-1])
    held = True
    for at, what in enumerate(("loss", "grad_norm")):
        ours = apart([line[what] for line in lines], exact[at])
        theirs = apart(mixed[at], exact[at]) if mixed else None
        bound = 2 * theirs + 1e-3 if mixed else 1e-4
        held &= ours <= bound
        summary[what] = dict(laam=ours, pytorch=theirs, bound=bound)
    print(json.dumps(summary | dict(held=held)))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    # Nothing here may look for a model on the network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
