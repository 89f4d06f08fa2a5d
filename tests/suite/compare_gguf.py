"""Compares GGUF files with the model folder they were exported from, by the `gguf` package's reader and
quantization: compare_gguf.py FOLDER FILE..., the first file in f32. Names, order of rows and metadata are those of
llama.cpp's convert_hf_to_gguf.py."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def safetensors(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for name, info in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = info["data_offsets"]
        raw = data[8 + length + begin : 8 + length + end]
        if info["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[info["dtype"]]).astype(np.float32)
        yield name, values.reshape(info["shape"])


def expected(folder, config):
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name, values in safetensors(folder / "model.safetensors"):
        stem = name.removesuffix(".weight")
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if stem.endswith(part):
                halves = values.reshape(count, 2, values.shape[0] // count // 2, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        if stem in TOP:
            yield TOP[stem] + ".weight", values
        else:
            _, _, layer, part = stem.split(".", 3)
            yield f"blk.{layer}.{NAMES[part]}.weight", values


def fields(reader):
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def main():
    folder, files = Path(sys.argv[1]), sys.argv[2:]
    config = json.loads((folder / "config.json").read_text())
    tensors = dict(expected(folder, config))
    compared = 0
    for at, file in enumerate(files):
        reader = GGUFReader(file)
        found = {tensor.name: tensor for tensor in reader.tensors}
        extra = set(found) - set(tensors)
        assert extra <= {"rope_freqs.weight"} and set(tensors) <= set(found), (extra, set(tensors) - set(found))
        for name, values in tensors.items():
            tensor = found[name]
            assert list(tensor.shape) == list(reversed(values.shape)), (name, tensor.shape)
            if tensor.tensor_type == GGMLQuantizationType.F32:
                assert np.array_equal(tensor.data.view(np.uint32).ravel(), values.view(np.uint32).ravel()), name
            else:
                wanted = quantize(values, tensor.tensor_type)
                assert np.array_equal(tensor.data.view(np.uint8).ravel(), wanted.view(np.uint8).ravel()), name
                dequantize(tensor.data, tensor.tensor_type)
            compared += 1
        if at == 0:
            print(json.dumps(fields(reader)))
        types = sorted({tensor.tensor_type.name for tensor in reader.tensors})
        print(json.dumps({"file": Path(file).name, "types": types}))
    print(json.dumps({"compared": compared}))


main()
