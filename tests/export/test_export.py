"""Exported folders: what transformers loads equals the model of the search."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from archsearch.architecture import Architecture, load_architecture, make_architecture
from archsearch.config import ProxyConfig
from archsearch.errors import EnvironmentUnfit, StorageError, UsageError
from archsearch.evaluation import Evaluation, Outcome
from archsearch.export import export_candidate
from archsearch.export.configuration import HybridConfig
from archsearch.export.modeling import HybridCache, HybridForCausalLM
from archsearch.export.tokenizer import byte_tokenizer
from archsearch.model.hybrid import HybridLM
from archsearch.operators import OPERATORS
from archsearch.proxy.trainer import train_proxy
from archsearch.worker import save_weights

PROXY = ProxyConfig(tokens=512, batch=2, context=32, validation_tokens=128, validations=1, learning_rate=3e-3)
SMALL = {"head_dim": 16, "state": 16, "window": 8, "multiple_of": 8}


def every_kind(**fields: Any) -> Architecture:
    """One operator of each kind."""
    operators = [
        {"kind": kind, **{name: value for name, value in SMALL.items() if name in config.model_fields}}
        for kind, config in OPERATORS.items()
    ]
    return make_architecture(**{"hidden_size": 32, "vocab_size": 256, "operators": operators, **fields})


@pytest.fixture(scope="module", params=["tied", "untied"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HybridLM]:
    """A trained model and its export."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("export")
    architecture = every_kind(tie_embeddings=request.param == "tied", meta_tokens=2)
    result = train_proxy(architecture, PROXY, seed=1, device="cpu")
    save_weights(result.model, folder / "weights.safetensors")
    path = export_candidate(
        evaluation(architecture, result.loss), folder / "model", number=3, proxy=PROXY,
        weights=folder / "weights.safetensors", source="a run",
    )  # fmt: skip
    return path, result.model


def evaluation(architecture: Architecture, loss: float) -> Evaluation:
    objectives = {"loss": loss, "decode_latency": 0.1}
    return Evaluation(architecture=architecture, outcome=Outcome.OK, objectives=objectives, seed=1, device="a CPU")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))


def test_the_folder(exported: tuple[Path, HybridLM]) -> None:
    path, model = exported
    names = {entry.name for entry in path.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md", "evaluation.json"}
    assert not list(path.parent.glob(".model*"))
    saved = load_file(path / "model.safetensors")
    assert saved.keys() == {f"model.{name}" for name in model.state_dict()}
    config = json.loads((path / "config.json").read_text())
    assert [operator["kind"] for operator in config["operators"]] == list(OPERATORS)
    assert "layer_types" not in config
    card = (path / "README.md").read_text()
    assert model.architecture.notation in card
    assert "trial 3" in card
    assert f"{model.architecture.parameters:,}" in card
    assert load_architecture(path / "evaluation.json") == model.architecture


def test_logits_are_equal(exported: tuple[Path, HybridLM], tokens: torch.Tensor) -> None:
    path, model = exported
    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert isinstance(loaded, HybridForCausalLM)
    assert torch.equal(loaded(tokens).logits, model(tokens))
    assert torch.equal(loaded(tokens, logits_to_keep=2).logits, model(tokens)[:, -2:])
    assert loaded.num_parameters() == model.architecture.parameters


def test_labels_give_the_loss(exported: tuple[Path, HybridLM], tokens: torch.Tensor) -> None:
    path, model = exported
    loaded = AutoModelForCausalLM.from_pretrained(path)
    labels = tokens.clone()
    labels[:, 15:] = -100
    output = loaded(tokens, labels=labels, attention_mask=labels != -100)
    expected = F.cross_entropy(model(tokens)[:, :14].flatten(0, 1), tokens[:, 1:15].flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(weight.grad is not None for weight in loaded.parameters())


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 2, "do_sample": False}], ids=str
)
def test_generation_with_cache_equals_generation_without(
    exported: tuple[Path, HybridLM], tokens: torch.Tensor, options: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported[0])
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(tokens, max_new_tokens=24, use_cache=use_cache, **options))
    assert found[0].shape == (3, 44)
    assert torch.equal(*found)


def test_the_cache_by_hand(exported: tuple[Path, HybridLM], tokens: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported[0])
    cache = HybridCache(20)
    with torch.no_grad():
        expected = model(tokens).logits
        first = model(tokens[:, :10], past_key_values=cache).logits
        second = model(tokens[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(first[:, 0], expected[:, 9], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second[:, 0], expected[:, 19], atol=1e-4, rtol=1e-4)
    with pytest.raises(UsageError, match="is full"):
        model(tokens[:, :1], past_key_values=cache)
    with pytest.raises(UsageError, match="cache of 3"):
        model(tokens[:2, :1], past_key_values=cache)


def test_padding_is_refused(exported: tuple[Path, HybridLM], tokens: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported[0])
    left, right = torch.ones_like(tokens), torch.ones_like(tokens)
    left[0, :3], right[0, -3:] = 0, 0
    with pytest.raises(UsageError, match="left padding"):
        model(tokens, attention_mask=left)
    for mask in (left, right):
        with pytest.raises(UsageError, match="padding"):
            model.generate(tokens, attention_mask=mask, max_new_tokens=2)
    torch.testing.assert_close(model(tokens, attention_mask=right).logits, model(tokens).logits)
    with pytest.raises(UsageError, match="cache_implementation"):
        model.generate(tokens, max_new_tokens=2, cache_implementation="static")


def test_a_checkpoint_without_a_weight_is_refused(exported: tuple[Path, HybridLM], tmp_path: Path) -> None:
    state = load_file(exported[0] / "model.safetensors")
    state.pop("model.layers.0.op.q_proj.weight")
    config = AutoConfig.from_pretrained(exported[0])
    with pytest.raises(UsageError, match="lacks a weight"):
        HybridForCausalLM.from_pretrained(None, config=config, state_dict=state)


@pytest.mark.parametrize("exported", ["tied"], indirect=True)
def test_three_lines_write_text(exported: tuple[Path, HybridLM]) -> None:
    script = (
        "import archsearch\n"
        "from transformers import pipeline\n"
        f"print(pipeline('text-generation', {str(exported[0])!r})('import ', max_new_tokens=5)[0]['generated_text'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout.startswith(b"import ")


@pytest.mark.parametrize(
    "text", ["", "def f(x):\n\treturn  x\r\n", "naïve £ 𝄞 漢字", " <s> [/] </s> Ā Ġ", "".join(map(chr, range(256)))]
)
def test_a_token_is_a_byte(exported: tuple[Path, HybridLM], text: str) -> None:
    for tokenizer in (byte_tokenizer(), AutoTokenizer.from_pretrained(exported[0])):
        assert tokenizer(text)["input_ids"] == list(text.encode())
        assert tokenizer.decode(list(text.encode())) == text


def test_without_weights_the_proxy_is_trained_again(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    architecture = every_kind()
    result = train_proxy(architecture, PROXY, seed=1, device="cpu")
    told: list[str] = []
    options: dict[str, Any] = {"number": 0, "proxy": PROXY, "weights": tmp_path / "absent", "say": told.append}
    path = export_candidate(evaluation(architecture, result.loss), tmp_path / "again", **options)
    saved = load_file(path / "model.safetensors")
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(saved[f"model.{name}"], tensor)
    assert "training it again" in told[0]
    with pytest.raises(EnvironmentUnfit, match="instead of"):
        export_candidate(evaluation(architecture, result.loss + 0.1), tmp_path / "other", **options)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again"]


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    for content in (b"", b"pickle? no" * 10):
        weights.write_bytes(content)
        with pytest.raises(StorageError, match="damaged"):
            export_candidate(evaluation(every_kind(), 5.0), tmp_path / "x", number=0, proxy=PROXY, weights=weights)
    weights.write_bytes((b"\x08" + b"\0" * 7) + b"{}      ")
    with pytest.raises(StorageError, match="damaged"):
        export_candidate(evaluation(every_kind(), 5.0), tmp_path / "x", number=0, proxy=PROXY, weights=weights)
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.safetensors"]


def test_config_round_trip() -> None:
    architecture = every_kind(meta_tokens=4, tie_embeddings=False)
    config = HybridConfig.from_architecture(architecture)
    again = HybridConfig.from_dict(config.to_dict())
    assert again.architecture == architecture
    assert again.num_hidden_layers == len(OPERATORS)
    assert HybridConfig().operators is None
