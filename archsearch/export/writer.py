"""Writes one candidate to disk: a Hugging Face folder with weights, or the architecture as YAML or JSON."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from archsearch.config import ProxyConfig
from archsearch.errors import EnvironmentUnfit, StorageError, UsageError
from archsearch.evaluation import Evaluation
from archsearch.export.card import model_card
from archsearch.files import to_json, write_atomic

if TYPE_CHECKING:
    from archsearch.model.hybrid import HybridLM
    from archsearch.proxy.tokenizer import TextTokenizer

Format = Literal["hf", "yaml", "json"]
FORMATS: tuple[Format, ...] = ("hf", "yaml", "json")
LOSS_TOLERANCE = 0.02
"""Nats a token by which a repeated proxy training may differ: devices round differently."""
EXISTS = "choose a new path, or remove it first"


def export_candidate(
    evaluation: Evaluation,
    to: Path,
    *,
    number: int,
    proxy: ProxyConfig,
    weights: Path,
    format: Format = "hf",
    source: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> Path:
    """Export the candidate of an evaluation.

    Args:
        evaluation: its record.
        to: a folder for ``hf``, a file for ``yaml`` and ``json``; must not exist.
        number: its trial number.
        proxy: how it was trained, in case that must be repeated.
        weights: its safetensors file; where it is absent the proxy is trained again with the recorded seed.
        format: what to write.
        source: the run's name, for the model card.
        say: told what takes time.

    Returns:
        The absolute path that was written.

    Raises:
        UsageError: the target exists or a relative target leaves the current folder, or an unknown format.
        StorageError: the target cannot be written.
        EnvironmentUnfit: the repeated training gave another loss.
    """
    if format not in FORMATS:
        raise UsageError(f"no export format {format!r}", f"choose one of {', '.join(FORMATS)}")
    target = new_target(to)
    if format == "hf":
        _write_folder(evaluation, target, number, proxy, weights, source, say)
    elif format == "yaml":
        head = f"# trial {number}{' of ' + source if source else ''}: {evaluation.architecture.notation}\n"
        write_atomic(target, head + yaml.safe_dump(evaluation.architecture.to_dict(), sort_keys=False))
    else:
        write_atomic(target, to_json(evaluation.model_dump(mode="json")))
    return target


def new_target(to: Path) -> Path:
    """The absolute path of a target that may be written, with its parent folder made.

    Raises:
        UsageError: it exists, or a relative path leaves the current folder.
        StorageError: its parent folder cannot be made.
    """
    here = Path.cwd().resolve()
    try:
        parent = to.parent.resolve()
        if not to.is_absolute() and not parent.is_relative_to(here):
            raise UsageError(f"the target {to} leaves the current folder", "give an absolute path")
        target = parent / to.name
        if to.name in ("", "..") or os.path.lexists(target):
            raise UsageError(f"the target {to} exists", EXISTS)
        parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(f"cannot write {to}: {reason}", "choose another folder") from None
    return target


def _write_folder(
    evaluation: Evaluation,
    target: Path,
    number: int,
    proxy: ProxyConfig,
    weights: Path,
    source: str,
    say: Callable[[str], None],
) -> None:
    """Fill a hidden folder beside the target, then rename it: the target appears whole or not at all."""
    try:
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            tokenizer = _save_model(evaluation, draft, proxy, weights, say)
            (draft / "README.md").write_text(model_card(evaluation, number, proxy, source, tokenizer), encoding="utf-8")
            (draft / "evaluation.json").write_text(to_json(evaluation.model_dump(mode="json")), encoding="utf-8")
            for path in draft.iterdir():
                path.chmod(0o644)
            draft.chmod(0o755)
            draft.rename(target)
        except BaseException:
            shutil.rmtree(draft)
            raise
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}", "choose another folder") from None


def _save_model(
    evaluation: Evaluation, folder: Path, proxy: ProxyConfig, weights: Path, say: Callable[[str], None]
) -> TextTokenizer | None:
    """Write weights, configuration and tokenizer; gives the tokenizer."""
    # Loaded here: the other formats need neither torch nor transformers.
    from transformers import GenerationConfig
    from transformers.utils import logging

    from archsearch.export.configuration import HybridConfig
    from archsearch.export.modeling import HybridForCausalLM
    from archsearch.export.tokenizer import for_transformers, trained_with

    architecture = evaluation.architecture
    tokenizer = trained_with(proxy, architecture.vocab_size, weights.parent)
    model = HybridForCausalLM(HybridConfig.from_architecture(architecture, dtype="float32"))
    if weights.is_file():
        _load_weights(model.model, weights)
    else:
        model.model.load_state_dict(_train_again(evaluation, proxy, say).state_dict())
    if tokenizer is not None and tokenizer.end is not None:
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end)
        model.generation_config = GenerationConfig(**ends)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()
    if tokenizer is not None:
        for_transformers(tokenizer).save_pretrained(folder)
    return tokenizer


def _load_weights(model: HybridLM, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        remedy = "remove it; the export then trains the proxy again"
        raise StorageError(f"{path} is damaged: {reason}", remedy) from None


def _train_again(evaluation: Evaluation, proxy: ProxyConfig, say: Callable[[str], None]) -> HybridLM:
    from archsearch.latency.device import resolve_device
    from archsearch.latency.lock import sharing
    from archsearch.proxy.trainer import train_proxy

    say(f"no weights were kept for {evaluation.architecture.id}: training it again for {proxy.tokens:,} tokens")
    device = resolve_device()
    with sharing(device) as give_way:
        told = lambda tokens, loss: give_way()  # noqa: E731
        result = train_proxy(evaluation.architecture, proxy, seed=evaluation.seed, device=device, on_progress=told)
    recorded = evaluation.objectives.get("loss", result.loss)
    if abs(result.loss - recorded) > LOSS_TOLERANCE:
        cause = f"trained again, the loss is {result.loss:.4f} instead of {recorded:.4f}"
        raise EnvironmentUnfit(cause, "export on the machine and with the packages that searched")
    return result.model
