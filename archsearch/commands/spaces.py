"""Looks at a config without running it: validate, dry run, and the file that ``init`` writes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from archsearch.architecture import Architecture, read_architecture
from archsearch.commands.console import print_json
from archsearch.config import RunConfig, load_config
from archsearch.errors import InvalidArchitecture, UsageError
from archsearch.files import read_yaml, write_atomic

SAMPLES = 5
TRIES = 2000
TRAINING_BYTES = 16
"""Bytes a parameter while training: weight, gradient and two moments of AdamW, in fp32."""

TEMPLATE = """\
# A search space for archsearch. Try it with:
#   archsearch run --space {name} --dry-run
space:
  name: my-space
  hidden_size: [64, 96, 128]      # one value, a list of choices, or {{min: 64, max: 128, step: 32}}
  vocab_size: 256                 # enough for bytes; 32768 or so for proxy.tokenizer bpe
  stages:                         # an architecture is its stages, one after the other
    - name: early
      # kinds joined by +: a attention, w window, d DeltaNet, gd gated, kda Kimi Delta Attention, gl GLA, r7 RWKV-7,
      # hg HGRN2, m2 Mamba-2, m Mamba
      mixers: [a, d, gd+a, m2+a]
      ratio: ["1:1", "2:1"]       # how often the first kind stands in a block, to the second
      ffns: [0, 1]                # FFNs behind each mixer
      blocks: {{min: 1, max: 2}}    # how often the block is repeated
    - name: late
      mixers: [a, w, m2]
      ffns: 1
      blocks: {{min: 1, max: 2}}
  options:                        # of each kind; a list is a choice
    a: {{head_dim: 32, kv_heads: [1, 2]}}
    w: {{head_dim: 32, window: [32, 128]}}
    d: {{head_dim: 32}}
    gd: {{head_dim: 32}}
    m2: {{head_dim: 32, state: [16, 32]}}
    f: {{ratio: [2, 3]}}
  limits:                         # what every architecture must keep
    operators: {{max: 12}}
    parameters: {{max: 1.5M}}
  seeds:                          # architectures that the search starts from
    - {{hidden_size: 96, operators: a f a f, options: {{a: {{head_dim: 32, kv_heads: 1}}, f: {{ratio: 2}}}}}}
search:
  evaluations: 24
  objectives: [loss, decode_latency]
proxy:                            # the short training that scores a candidate
  data: builtin:python            # or files:PATH, tokens:PATH, hf:OWNER/NAME
  tokenizer: bytes                # or bpe, a tokenizer.json, a pretrained name
  tokens: 200K
  batch: 8
  context: 256
  learning_rate: 3e-3
  validation_tokens: 30K
latency:
  tokens: 256                     # the time to decode this many tokens is what is minimised
  strata: 4
  steps: 16
execution:
  executor: ray                   # or inline: one process, for debugging
  deadline: 120                   # seconds for one candidate
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run of ``config`` would do. Times in seconds, sizes in bytes, both of the median sample."""

    config: RunConfig
    samples: list[Architecture]
    tries: int
    training_bytes: int
    decode_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        space = self.config.space
        return {
            **describe_space(self.config),
            "genes": {name: list(values) for name, values in space.genes.items()},
            "samples": [describe_architecture(architecture) for architecture in self.samples],
            "feasible": len(self.samples) / self.tries,
            "training_bytes": self.training_bytes,
            "decode_bytes": self.decode_bytes,
            "seconds_a_candidate": self.seconds,
        }


def make_plan(config: RunConfig) -> Plan:
    """Draw candidates and estimate what evaluating them takes, with a matrix product timed on this machine."""
    samples, tries = _draw(config)
    length = config.proxy.context
    flops = statistics.median(a.train_flops(length) for a in samples) * config.proxy.tokens
    return Plan(
        config=config,
        samples=samples,
        tries=tries,
        training_bytes=int(statistics.median(a.parameters for a in samples) * TRAINING_BYTES),
        decode_bytes=int(
            statistics.median(
                a.weight_bytes() + a.state_bytes(config.latency.tokens, batch=config.latency.batch) for a in samples
            )
        ),
        seconds=flops / matmul_speed(),
    )


def _draw(config: RunConfig) -> tuple[list[Architecture], int]:
    """Some different feasible architectures, and the number of draws that it took."""
    rng = np.random.default_rng(config.search.seed)
    found: dict[str, Architecture] = {}
    tries = 0
    while tries < TRIES and len(found) < SAMPLES:
        tries += 1
        try:
            architecture = config.space.build(config.space.sample(rng))
        except InvalidArchitecture:
            continue
        found[architecture.id] = architecture
    for genome in config.space.seed_genomes if not found else ():
        architecture = config.space.build(genome)
        found[architecture.id] = architecture
    return list(found.values()), tries


def matmul_speed() -> float:
    """FLOP/s of a large matrix product on the device that a search here would use."""
    import torch

    cuda = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a = torch.ones(size, size, device="cuda" if cuda else "cpu", dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def describe_space(config: RunConfig) -> dict[str, Any]:
    """The facts about a space that ``validate`` prints."""
    space = config.space
    return {
        "name": space.name,
        "fingerprint": space.fingerprint,
        "genomes": space.size,
        "stages": [stage.name for stage in space.stages],
        "seeds": len(space.seeds),
        "sampler": config.search.sampler,
        "evaluations": config.search.evaluations,
        "objectives": list(config.search.objectives),
    }


def describe_architecture(architecture: Architecture) -> dict[str, Any]:
    """The facts about an architecture that tables show."""
    return {
        "id": architecture.id,
        "notation": architecture.notation,
        "hidden_size": architecture.hidden_size,
        "parameters": architecture.parameters,
    }


def validate_file(path: Path) -> dict[str, Any]:
    """Check a config or an architecture file; say what it is.

    Raises:
        ConfigError: the first problem in it.
    """
    document = read_yaml(path)
    if (
        isinstance(document.value, dict)
        and "space" not in document.value
        and {"operators", "architecture"} & {*document.value}
    ):
        return {"kind": "architecture", **describe_architecture(read_architecture(document))}
    config = load_config(path)
    return {"kind": "config", **describe_space(config), "genes": len(config.space.genes)}


def validation_line(facts: dict[str, Any]) -> str:
    """What ``validate_file`` found, as text."""
    if facts["kind"] == "architecture":
        return f"ok: architecture {facts['id']} with {facts['parameters']:,} parameters: {facts['notation']}"
    objectives = " and ".join(facts["objectives"])
    return (
        f"ok: space {facts['name']} ({facts['fingerprint']}): {facts['genomes']:,} genomes of {facts['genes']} genes, "
        f"{facts['seeds']} seeds; {facts['evaluations']:,} evaluations of {objectives} by {facts['sampler']}"
    )


def write_template(path: Path) -> None:
    """Write a commented space file.

    Raises:
        UsageError: something is there already.
        StorageError: it cannot be written.
    """
    if os.path.lexists(path):
        raise UsageError(f"{path} exists", "choose another name, or remove it first")
    write_atomic(path, TEMPLATE.format(name=path))


def show_plan(config: RunConfig, *, json: bool) -> int:
    """Print what a run would do; nothing is written."""
    plan = make_plan(config)
    print_json("run", {"dry_run": True, **plan.to_dict()}) if json else print(*plan_lines(plan), sep="\n")
    return 0


def plan_lines(plan: Plan) -> Iterator[str]:
    """The dry run as text."""
    config, space = plan.config, plan.config.space
    yield f"space {space.name}: {space.size:,} genomes of {len(space.genes)} genes, {len(space.seeds)} seeds"
    for name, values in space.genes.items():
        yield f"  {name}: {', '.join(str(value) for value in values)}"
    yield ""
    yield f"{len(plan.samples)} different feasible candidates in {plan.tries} draws:"
    for architecture in plan.samples:
        parameters = f"{architecture.parameters / 1e6:,.2f}M"
        yield f"  {parameters:>9}  {architecture.hidden_size:>5} wide  {architecture.notation}"
    yield ""
    total = plan.seconds * config.search.evaluations
    yield f"memory to train one: {mebibytes(plan.training_bytes)} for weights and optimizer, activations on top"
    yield f"memory to decode: {mebibytes(plan.decode_bytes)} for weights and state in bf16"
    yield (
        f"time: at least {duration(plan.seconds)} of training a candidate, {duration(total)} for "
        f"{config.search.evaluations:,} one after the other"
    )


def mebibytes(size: float) -> str:
    """A size for people."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds for people, such as ``1h 02m``, ``3m 20s`` or ``7s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 60}m {whole % 60:02d}s" if whole >= 60 else f"{whole}s"
