"""Continues a prompt with llama.cpp, always by the most probable token: FILE.gguf PROMPT TOKENS. Prints JSON."""

import json
import sys

import numpy as np
from llama_cpp import Llama

path, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = Llama(model_path=path, n_ctx=0, verbose=False)
prompt_ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
model.eval(prompt_ids)
ids = []
for _ in range(count):
    ids.append(int(np.argmax(model._ctx.get_logits_ith(-1)[: model.n_vocab()])))
    model.eval(ids[-1:])
print(json.dumps({"prompt_ids": prompt_ids, "ids": ids}))
