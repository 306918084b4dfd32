"""RunConfig: everything a run is told, read strictly from one YAML file and ``--set`` overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from archsearch.errors import ConfigError
from archsearch.files import Document, parse_yaml, read_yaml, validate, write_atomic
from archsearch.schema import Frozen, Quantity, did_you_mean
from archsearch.space import SearchSpace

DATA_SCHEMES = ("builtin", "files", "tokens", "hf")
TOKENIZERS = ("auto", "bytes", "bpe")
"""Names of tokenizers that are neither files nor pretrained."""
Objective = Literal["loss", "recall", "decode_latency", "parameters", "state_bytes"]


class AgingConfig(Frozen):
    """Ageing evolution (Real et al. 2019). ``mode: paper`` is Nemotron-Flash's Algorithm 1: the first block alone."""

    mode: Literal["default", "paper"] = "default"
    population_size: int = Field(20, ge=2, description="trials that count as alive, the last to be completed")
    tournament_size: int = Field(5, ge=1, description="members drawn for a tournament")
    max_tries: int = Field(2000, ge=1, description="draws that may fail to give a new, feasible architecture")

    front_parents: float = Field(0.5, ge=0, le=1, description="fraction of parents drawn from the Pareto front")
    design: bool = Field(True, description="spread the first population instead of drawing it at random")
    ordinal: bool = Field(True, description="genes that are ordered numbers move to a neighbour more often than far")
    adaptive: bool = Field(True, description="mutate genes more often that matter or have paid")
    surrogate: bool = Field(True, description="evaluate the offspring with the greatest expected gain in hypervolume")
    descriptors: bool = Field(True, description="surrogates know sizes and counts of an architecture beside its genes")
    unguided: float = Field(0.25, ge=0, le=1, description="fraction of offspring that no surrogate chooses, in the end")
    crossover: float = Field(0.4, ge=0, le=1, description="fraction of candidates with genes of a second parent")
    candidates: int = Field(256, ge=1, le=10_000, description="offspring drawn for each one evaluated")


class StoppingConfig(Frozen):
    """Early stopping at the rungs of ``proxy.rungs``; without rungs nothing is stopped."""

    minimum: int = Field(5, ge=4, description="candidates trained to the end before any is stopped")
    confidence: float = Field(0.8, gt=0.5, lt=1, description="that a stopped one would have ended dominated")


class SearchConfig(Frozen):
    """What proposes candidates, for how many evaluations, and what is minimised."""

    sampler: Literal["aging", "tpe", "nsga2", "gp", "random"] = "aging"
    evaluations: int = Field(200, ge=1, le=1_000_000)
    seed: int = Field(0, ge=0)
    objectives: tuple[Objective, ...] = Field(("loss", "decode_latency"), min_length=1, max_length=3)
    stop_after: int | None = Field(None, ge=1, description="stop after so many evaluations without a gain; off: null")
    stop_epsilon: float = Field(1e-3, ge=0, description="relative hypervolume gain that counts as one")
    aging: AgingConfig = AgingConfig()
    stopping: StoppingConfig = StoppingConfig()

    @field_validator("objectives")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError("an objective is repeated")
        return names


class RecallConfig(Frozen):
    """Multi-query associative recall (Arora et al. 2023, Zoology): generated, trained beside the proxy if asked for.

    Each sequence lists ``pairs`` keys with their values, then asks for all of them again, most of them soon.
    """

    context: int = Field(256, ge=8, description="tokens a sequence")
    pairs: tuple[int, ...] = Field((8, 32, 64), min_length=1, description="pairs a sequence; the error is their mean")
    vocab_size: int = Field(512, ge=8, description="half of them keys, half of them values")
    tokens: Quantity = Field(20_000_000, ge=1, description="training budget; training ends where all is recalled")
    batch: int = Field(64, ge=1, description="sequences a step")
    learning_rate: float = Field(1e-3, gt=0, le=10, description="at 3e-3 attention without QK norm learns nothing")
    seeds: int = Field(1, ge=1, le=100, description="trainings; the error is their mean")
    test_sequences: int = Field(256, ge=1, description="of each number of pairs")

    @model_validator(mode="after")
    def _fits(self) -> RecallConfig:
        most = max(self.pairs)
        if min(self.pairs) < 1 or len(set(self.pairs)) != len(self.pairs):
            raise ValueError("pairs must be positive and different")
        if self.context < 4 * most:
            raise ValueError(f"{most} pairs and their queries need a context of {4 * most}, found {self.context}")
        if self.vocab_size // 2 <= most:
            raise ValueError(f"{most} pairs need a vocab_size above {2 * most}, found {self.vocab_size}")
        return self


class ProxyConfig(Frozen):
    """The short training (Nemotron-Flash, App. C: AdamW, cosine, 5e-4)."""

    data: str = Field("builtin:python", min_length=1, description="or files:PATH (or a path), tokens:PATH, hf:NAME")
    tokenizer: str = Field(
        "auto",
        min_length=1,
        description="bytes, bpe (trained on the data), a tokenizer.json, or a pretrained name; auto: bytes for text",
    )
    text_field: str = Field("text", min_length=1, description="of JSON lines, Parquet and datasets")
    split: str = Field("train", min_length=1, description="of a Hugging Face dataset")
    token_dtype: Literal["auto", "uint16", "uint32"] = Field("auto", description="of headerless tokens: files")
    corpus_tokens: Quantity = Field(1_000_000_000, ge=1, description="most tokens that are taken of the data")
    tokens: Quantity = Field(20_000_000, ge=1, description="training budget; the last rung where there are rungs")
    rungs: tuple[Quantity, ...] = Field((), description="budgets at which hopeless candidates stop; off: []")
    batch: int = Field(16, ge=1, description="sequences a step")
    context: int = Field(1024, ge=8, description="tokens a sequence")
    learning_rate: float = Field(5e-4, gt=0, le=10)
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine", description="of the learning rate after the warm-up; wsd: constant, then a linear decay"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="fraction of the steps")
    cooldown: float = Field(0.2, gt=0, le=1, description="fraction of the steps that wsd decays over")
    final_rate: float = Field(0.1, ge=0, le=1, description="last learning rate over the peak")
    weight_decay: float = Field(0.1, ge=0)
    weight_normalization: bool = Field(
        False,
        description="unit rows and columns after each step; the paper adds weight_decay 0, rate 1e-3",
    )
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    validation_tokens: Quantity = Field(500_000, ge=1)
    validations: int = Field(5, ge=1, description="points of the loss curve")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="bfloat16 on a GPU, float32 on a CPU")
    kernels: Literal["auto", "torch", "fla"] = Field(
        "auto", description="flash-linear-attention's on a GPU, the plain-torch reference on a CPU"
    )
    recall: RecallConfig = RecallConfig()
    cuda_graph: bool = Field(True, description="replay the whole step as one CUDA graph on a GPU")

    @model_validator(mode="before")
    @classmethod
    def _end_at_last_rung(cls, data: Any) -> Any:
        if isinstance(data, dict) and "tokens" not in data and isinstance(rungs := data.get("rungs"), list) and rungs:
            return data | {"tokens": rungs[-1]}
        return data

    @model_validator(mode="after")
    def _check_rungs(self) -> ProxyConfig:
        if not self.rungs:
            return self
        step = self.batch * self.context
        steps = [-(-rung // step) for rung in self.rungs]
        if self.rungs[0] < 1 or len(self.rungs) < 2 or any(a >= b for a, b in pairwise(self.rungs)):
            raise ValueError("rungs must be two budgets or more, each larger than the one before")
        if any(a >= b for a, b in pairwise(steps)):
            raise ValueError(f"rungs closer together than one step, {step:,} tokens")
        if self.rungs[-1] != self.tokens:
            raise ValueError(f"rungs end at {self.rungs[-1]:,}, tokens is {self.tokens:,}: set tokens to the last rung")
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> ProxyConfig:
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise ValueError("warmup and cooldown together are more than the whole training; lower one")
        return self

    @field_validator("data")
    @classmethod
    def _known_scheme(cls, data: str) -> str:
        scheme = re.match(r"([a-z]+):", data)
        if scheme and scheme[1] not in DATA_SCHEMES and not Path(data).exists():
            raise ValueError(f"unknown data {data!r}; {did_you_mean(scheme[1], DATA_SCHEMES)}")
        if data in ("files:", "tokens:"):
            raise ValueError(f"{data!r} names nothing; give a file, a folder or a glob behind it")
        return data


class LatencyConfig(Frozen):
    """Decode latency: ``tokens`` generated at ``batch``, integrated over ``strata`` of positions."""

    tokens: Quantity = Field(8192, ge=1)
    batch: int = Field(1, ge=1)
    strata: int = Field(16, ge=1, le=512, description="positions at which the step time is taken")
    steps: int = Field(64, ge=1, description="steps timed at each position")
    repeats: int = Field(3, ge=1, description="passes over the strata")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    others: Literal["refuse", "note"] = Field(
        "refuse", description="signs of other programs on the GPU: invalid, or noted"
    )
    profile: str | None = Field(None, min_length=1, description="file of `archsearch profile`; off: null")
    source: Literal["measurement", "profile"] = Field(
        "measurement", description="of the decode latency that counts: measured, or what the profile predicts"
    )

    @model_validator(mode="after")
    def _source_exists(self) -> LatencyConfig:
        if self.source == "profile" and self.profile is None:
            raise ValueError("source: profile needs a profile, the file that `archsearch profile` wrote")
        return self

    @property
    def label(self) -> str:
        """Quantity and unit of a decode latency."""
        predicted = "predicted " if self.source == "profile" else ""
        return f"{predicted}time to decode {self.tokens:,} tokens at batch {self.batch} [s]"

    def dtype_on(self, kind: str) -> str:
        """The data type of weights and caches on a kind of device, ``cpu`` or ``cuda``."""
        if self.dtype == "auto":
            return "bfloat16" if kind == "cuda" else "float32"
        return self.dtype


class ExecutionConfig(Frozen):
    """Where evaluations run and what may go wrong before the search stops."""

    executor: Literal["ray", "inline"] = "ray"
    workers: int | Literal["auto"] = Field("auto", description="auto: one a GPU, or one a core without GPUs")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    address: str | None = Field(None, description="of a Ray cluster; a local Ray is started where absent")
    allow_insecure_ray: bool = False
    deadline: float = Field(3600.0, gt=0, description="seconds an evaluation may take")
    grace: float = Field(10.0, ge=0, description="seconds that a first interrupt waits for running evaluations")
    worker_failures: int = Field(3, ge=1, description="failures in a row that replace a worker")
    failure_rate: float = Field(0.5, gt=0, le=1, description="share of failures above which the search stops")
    failure_minimum: int = Field(5, ge=1, description="evaluations before failure_rate is looked at")
    min_free_bytes: Quantity = Field(64 * 2**20, ge=0, description="free disk below which the search stops")

    @field_validator("workers")
    @classmethod
    def _positive(cls, workers: int | str) -> int | str:
        if isinstance(workers, int) and workers < 1:
            raise ValueError("workers must be at least 1 or auto")
        return workers


class RunConfig(Frozen):
    """A whole run. The resolved copy in the run folder holds every value, defaults included."""

    space: SearchSpace
    search: SearchConfig = SearchConfig()
    proxy: ProxyConfig = ProxyConfig()
    latency: LatencyConfig = LatencyConfig()
    execution: ExecutionConfig = ExecutionConfig()

    @model_validator(mode="after")
    def _check_rungs_have_a_loss(self) -> RunConfig:
        if self.proxy.rungs and "loss" not in self.search.objectives:
            raise ValueError("proxy.rungs compare losses, and loss is no objective: set proxy.rungs to []")
        return self

    def save(self, path: Path) -> None:
        """Write the resolved config as YAML."""
        data = self.model_dump(mode="json")
        write_atomic(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, apply ``key.path=value`` overrides, check seeds and feasibility.

    Raises:
        ConfigError: with the file, line and key of the first problem.
    """
    document = read_yaml(Path(path))
    for override in overrides:
        document = _override(document, override)
    config = validate(RunConfig, document)
    config.space.check_feasible()
    # The run folder's copy may be read from elsewhere, and later: it names no file by a relative path.
    latency = config.latency
    if latency.profile is not None:
        profile = Path(latency.profile).expanduser().absolute()
        latency = latency.model_copy(update={"profile": str(profile)})
    parts = {"proxy": absolute(config.proxy), "space": config.space.with_seed_files_read(), "latency": latency}
    return config.model_copy(update=parts)


def split_data(data: str) -> tuple[str, str]:
    """Scheme and rest of ``proxy.data``; a bare path is ``files``."""
    scheme, colon, rest = data.partition(":")
    return (scheme, rest) if colon and scheme in DATA_SCHEMES else ("files", data)


def absolute(proxy: ProxyConfig) -> ProxyConfig:
    """Workers may start in another folder, so paths are made absolute where they are read."""
    data, tokenizer = proxy.data, Path(proxy.tokenizer).expanduser()
    scheme, rest = split_data(data)
    if scheme in ("files", "tokens") or (scheme == "hf" and rest.startswith((".", "~"))):
        data = data.removesuffix(rest) + str(Path(rest).expanduser().absolute())
    is_path = proxy.tokenizer not in TOKENIZERS and (tokenizer.suffix == ".json" or tokenizer.exists())
    name = str(tokenizer.absolute()) if is_path else proxy.tokenizer
    return proxy.model_copy(update={"data": data, "tokenizer": name})


def _override(document: Document, override: str) -> Document:
    """``document`` with one value replaced; ``override`` is ``key.path=YAML value``, numbers index lists."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} is not key.path=value", "write for example --set proxy.tokens=1M")
    value: Any = parse_yaml(text, f"--set {override}").value
    parts = [int(part) if part.isdigit() else part for part in key.split(".")]
    changed = _replaced(document.value, parts, value, override)
    return document._replace(value=changed, given=(*document.given, tuple(parts)))


def _replaced(tree: Any, parts: list[str | int], value: Any, override: str) -> Any:
    if not parts:
        return value
    head, *rest = parts
    if isinstance(tree, list) and isinstance(head, int) and head < len(tree):
        return [_replaced(item, rest, value, override) if i == head else item for i, item in enumerate(tree)]
    if (tree is None or isinstance(tree, dict)) and isinstance(head, str):
        return {**(tree or {}), head: _replaced((tree or {}).get(head), rest, value, override)}
    raise ConfigError(f"--set {override!r}: nothing at {head!r}", "name a key of the config")
