"""Reads what laam writes, by docs/formats.md alone: read_formats.py TOKEN_FILE RUN STEP

Prints one JSON object. Exits with an error if a file is not as the document says.
"""

import hashlib
import json
import pathlib
import struct
import sys


def token_file(data):
    magic, version, width, tokens, documents, path_bytes, vocab, zero = struct.unpack_from("<8sIIQQQII", data)
    assert (magic, version, zero) == (b"LAAMTOKS", 1, 0) and width == (2 if vocab <= 65536 else 4)
    tokenizer, manifest, body = data[48:80].hex(), data[80:112].hex(), data[112:144]
    assert struct.unpack_from("<Q", data, 144)[0] == len(data)
    assert hashlib.sha256(data[:152]).digest()[:8] == data[152:160] and hashlib.sha256(data[160:]).digest() == body
    ids = struct.unpack_from(f"<{tokens}{'H' if width == 2 else 'I'}", data, 160)
    table = -(-(160 + tokens * width) // 8) * 8
    assert not any(data[160 + tokens * width : table]) and all(id < vocab for id in ids)
    rows = [struct.unpack_from("<QQQ", data, table + 24 * i) for i in range(documents)]
    paths = data[table + 24 * documents :]
    assert len(paths) == path_bytes
    firsts, path_starts = [row[0] for row in rows] + [tokens], [0] + [row[2] for row in rows]
    listed = [
        {"path": paths[path_starts[i] : path_starts[i + 1]].decode(), "ids": ids[firsts[i] : firsts[i + 1]]}
        | {"header": rows[i][1] - firsts[i]}
        for i in range(documents)
    ]
    return {"vocab": vocab, "tokenizer_sha256": tokenizer, "manifest_sha256": manifest, "documents": listed}


def safetensors(data):
    """Shapes and float32 values of the tensors, and the metadata."""
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    tensors = {}
    for name, tensor in header.items():
        begin, end = (8 + size + offset for offset in tensor["data_offsets"])
        assert tensor["dtype"] == "F32"
        tensors[name] = (tensor["shape"], struct.unpack_from(f"<{(end - begin) // 4}f", data, begin))
    return tensors, metadata


def check(place, value):
    """The object has the fields of the first table after a place in the document, of which some are optional."""
    table = document.split(place, 1)[1].split("\n| field", 1)[1].split("\n\n", 1)[0]
    known, optional = set(), set()
    for row in table.splitlines()[2:]:
        names, content = row.strip("| ").split(" | ", 1)
        (optional if content.startswith("optional") else known).update(names.replace("`", "").split(", "))
    assert known <= set(value) <= known | optional, (place, sorted(set(value) - known - optional), sorted(known - set(value)))


tokens, run, step = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
document = (pathlib.Path(__file__).parents[2] / "docs/formats.md").read_text()
state_tensors, metadata = safetensors((run / f"checkpoint-{step}/training_state.safetensors").read_bytes())
weights, _ = safetensors((run / f"checkpoint-{step}/model.safetensors").read_bytes())
arenas = {f"{arena}/{name}" for arena in ("master", "first_moment", "second_moment") for name in weights}
assert arenas == set(state_tensors) and list(metadata) == ["state"]
assert all(state_tensors[f"master/{name}"] == weights[name] for name in weights)
state = json.loads(metadata["state"])
check("\n## Training state", state)
metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
for line in metrics:
    check("\n## `metrics.jsonl`", line)
provenance = json.loads((run / "provenance.json").read_text())
check("\n## `provenance.json`", provenance)
check("\n`corpus`:", provenance["corpus"])
for value in [state, provenance, *metrics]:
    assert (list(value)[0], value["schema_version"]) == ("schema_version", 2)
assert provenance["weights_sha256"] == hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
assert state["tokens_sha256"] == hashlib.sha256(tokens.read_bytes()).hexdigest()
print(json.dumps({"tokens": token_file(tokens.read_bytes()), "state": state, "metrics": metrics, "provenance": provenance}))
