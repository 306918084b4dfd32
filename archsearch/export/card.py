"""The README of an exported folder."""

from __future__ import annotations

from string import Template
from typing import TYPE_CHECKING

from archsearch.config import ProxyConfig
from archsearch.evaluation import Evaluation, perplexity

if TYPE_CHECKING:
    from archsearch.proxy.tokenizer import TextTokenizer

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

$tokens Batches need prompts of equal length: padding would enter the recurrent states.
`evaluation.json` holds the whole record; `archsearch train` and `archsearch latency` read it.
""")


def model_card(
    evaluation: Evaluation,
    number: int,
    proxy: ProxyConfig,
    source: str = "",
    tokenizer: TextTokenizer | None = None,
) -> str:
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
        tokens=_tokens(tokenizer),
        notation=architecture.notation,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows),
    )


def _tokens(tokenizer: TextTokenizer | None) -> str:
    if tokenizer is None:
        return "It was trained on tokens whose tokenizer is not known: bring your own."
    if tokenizer.name == "bytes":
        return "A token is a byte."
    return f"Its tokenizer ({tokenizer.name}) has {tokenizer.vocab_size:,} tokens."


def _scores(evaluation: Evaluation, proxy: ProxyConfig) -> list[tuple[str, str]]:
    found = []
    loss = evaluation.objectives.get("loss")
    if loss is not None:
        bits = evaluation.metrics.get("bits_per_byte")
        worth = f"perplexity {round(perplexity(loss), 2):,.6g}"
        worth += f", {bits:.4f} bits a byte" if bits is not None else ""
        value = f"{loss:.4f} nats a token ({worth}) after {proxy.tokens:,} tokens"
        found += [("validation loss", value), ("trained on", f"`{proxy.data}`")]
    if (latency := evaluation.objectives.get("decode_latency")) is not None:
        measured = evaluation.metrics.get("latency", {})
        what = f" for {measured['tokens']:,} tokens at batch {measured['batch']}" if measured else ""
        if not measured and "latency_profile" in evaluation.metrics:
            what = f", {evaluation.paths['decode']}"
        found.append(("decode latency", f"{latency:.4g} s{what}"))
    return found
