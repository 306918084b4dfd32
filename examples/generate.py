"""Let an exported model write text: python examples/generate.py FOLDER [PROMPT]."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import archsearch  # noqa: F401  makes transformers know the model

folder, prompt = sys.argv[1], " ".join(sys.argv[2:]) or "import "
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = tokenizer(prompt, return_tensors="pt")
written = model.generate(**tokens, max_new_tokens=200, do_sample=True, temperature=0.7)
print(tokenizer.decode(written[0], skip_special_tokens=True).rstrip("\0"))
