"""What users may rely on: a change here is a change for them, so it must be meant and be in the changelog."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import BaseModel
from typer.main import get_command

import archsearch
from archsearch import errors
from archsearch.architecture import Architecture, reference_names
from archsearch.cli import app
from archsearch.config import RunConfig
from archsearch.evaluation import Evaluation, Outcome
from archsearch.operators import OPERATORS

COMMANDS = {
    "run": "--dry-run --evaluations --executor --json --out --replicates --seed --set --space --workers",
    "resume": "--json --replicates RUN",
    "inspect": "--csv --json --noise --trial --why RUN",
    "export": "--format --json --to --trial RUN",
    "train": "--device --json --seed --set --space ARCH",
    "latency": "--batch --context --device --dtype --exact --json --set --space --tokens ARCH",
    "profile": "--check --device --json --out --set --space",
    "data": "--json --set --space --tokenizer --vocab-size [SOURCE]",
    "validate": "--json FILE",
    "init": "--json FILE",
    "doctor": "--json --tune",
    "validate-proxy": "--architectures --correlation --json --long --out --seeds --set --short --space",
    "scaling": "--block --budgets --depths --json --latencies --metric --out --set --space --widths",
}
CONFIG = {
    "space": "hidden_size limits meta_tokens name options seeds stages tie_embeddings vocab_size",
    "space.stages": "blocks ffns layout mixers name pattern ratio",
    "space.limits": "decode_latency full_attention operators parameters recall state_bytes state_context",
    "search": "aging evaluations objectives sampler seed stop_after stop_epsilon stopping",
    "proxy": "batch beta1 beta2 clip context cooldown corpus_tokens cuda_graph data dtype final_rate kernels "
    "learning_rate recall rungs schedule split text_field token_dtype tokenizer tokens validation_tokens validations "
    "warmup weight_decay weight_normalization",
    "latency": "batch dtype others profile repeats source steps strata tokens",
    "search.stopping": "confidence minimum",
    "proxy.recall": "batch context learning_rate pairs seeds test_sequences tokens vocab_size",
    "execution": "address allow_insecure_ray deadline device executor failure_minimum failure_rate grace "
    "min_free_bytes worker_failures workers",
}
EXIT_CODES = {
    "ArchsearchError": 1,
    "UsageError": 2,
    "ConfigError": 3,
    "InvalidArchitecture": 3,
    "EnvironmentUnfit": 4,
    "SearchStopped": 5,
    "StorageError": 6,
    "RunInUse": 75,
}


def test_commands_and_flags() -> None:
    found = {}
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        words = [parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
                 for parameter in command.params]  # fmt: skip
        found[name] = " ".join(sorted(words, key=lambda word: (word[0] != "-", word)))
    assert found == COMMANDS


def test_python_names() -> None:
    assert sorted(archsearch.__all__) == [
        "Architecture", "Run", "RunConfig", "SearchSpace", "load_architecture", "load_config", "open_run", "run",
    ]  # fmt: skip
    for name in archsearch.__all__:
        assert getattr(archsearch, name).__name__ == name
    assert {name for name in vars(archsearch.Run) if not name.startswith("_")} == {
        "candidates", "config", "dataframe", "export", "front", "path", "replicate", "report", "results", "search",
    }  # fmt: skip


@pytest.mark.parametrize("path", CONFIG)
def test_config_keys(path: str) -> None:
    model: type[BaseModel] = RunConfig
    for part in path.split("."):
        kind = model.model_fields[part].annotation
        model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else get_args(kind)[0]
    assert " ".join(sorted(model.model_fields)) == CONFIG[path]


def test_records() -> None:
    assert set(Architecture.model_fields) == {
        "hidden_size", "meta_tokens", "norm_eps", "operators", "tie_embeddings", "vocab_size",
    }  # fmt: skip
    assert set(Evaluation.model_fields) == {
        "architecture", "attempts", "curve", "device", "error", "metrics", "objectives", "outcome", "paths", "rungs",
        "seconds", "seed", "verdict",
    }  # fmt: skip
    assert " ".join(Outcome) == (
        "OK STOPPED INFEASIBLE NAN OOM TIMEOUT CRASH NODE_LOST INVALID_MEASUREMENT CANCELLED"
    )  # fmt: skip


def test_names() -> None:
    assert {"a", "w", "m2", "d", "gd", "gl", "f"} <= OPERATORS.keys()
    assert {"nemotron-flash-1b", "nemotron-flash-3b", "qwen3-0.6b", "qwen3-1.7b"} <= set(reference_names())


def test_exit_codes() -> None:
    assert {name: getattr(errors, name).exit_code for name in EXIT_CODES} == EXIT_CODES
