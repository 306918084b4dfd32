"""The README of an exported folder."""

from __future__ import annotations

import math
from string import Template

from archsearch.config import ProxyConfig
from archsearch.evaluation import Evaluation

_CARD = Template("""\
# $title

A hybrid language model found by archsearch$source, trial $number. It had only the short training that scores
candidates; train it further before you use it.

    $notation

| | |
| --- | --- |
$rows

```python
import archsearch  # makes transformers know the model
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH/TO/THIS/FOLDER")
tokenizer = AutoTokenizer.from_pretrained("PATH/TO/THIS/FOLDER")
prompt = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100, do_sample=True)[0]))
```

A token is a byte. Batches need prompts of equal length: padding would enter the recurrent states.
`evaluation.json` holds the whole record; `archsearch train` and `archsearch latency` read it.
""")


def model_card(evaluation: Evaluation, number: int, proxy: ProxyConfig, source: str = "") -> str:
    """Markdown: what the model is, how it scored, how to load it."""
    architecture = evaluation.architecture
    rows = [
        ("id", f"`{architecture.id}`"),
        ("operators", str(len(architecture.operators))),
        ("hidden size", f"{architecture.hidden_size:,}"),
        ("parameters", f"{architecture.parameters:,}"),
        *_scores(evaluation, proxy),
        ("evaluated on", evaluation.device or "not recorded"),
        ("seed", str(evaluation.seed)),
    ]
    return _CARD.substitute(
        title=f"archsearch-{architecture.id}",
        source=f" in the run `{source}`" if source else "",
        number=number,
        notation=architecture.notation,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows),
    )


def _scores(evaluation: Evaluation, proxy: ProxyConfig) -> list[tuple[str, str]]:
    found = []
    loss = evaluation.objectives.get("loss")
    if loss is not None:
        value = f"{loss:.4f} nats a token (perplexity {math.exp(loss):.2f}) after {proxy.tokens:,} tokens"
        found += [("validation loss", value), ("trained on", f"`{proxy.data}`")]
    if (latency := evaluation.objectives.get("decode_latency")) is not None:
        measured = evaluation.metrics.get("latency", {})
        what = f" for {measured['tokens']:,} tokens at batch {measured['batch']}" if measured else ""
        found.append(("decode latency", f"{latency:.4g} s{what}"))
    return found
