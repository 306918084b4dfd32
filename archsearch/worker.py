"""The worker's entry: one architecture in, one evaluation out. Here the search and the model rooms meet.

The driver imports this module too, so torch is loaded only when an evaluation begins.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archsearch.architecture import Architecture
from archsearch.config import RunConfig
from archsearch.errors import InvalidArchitecture, StorageError
from archsearch.evaluation import Evaluation, Outcome, perplexity
from archsearch.latency.profile_check import check_device
from archsearch.latency_profile import LatencyProfile, load_profile
from archsearch.record import Record, accounted
from archsearch.stopping import StoppingRule

if TYPE_CHECKING:
    import torch

    from archsearch.model.hybrid import HybridLM
    from archsearch.proxy.result import ProxyResult
    from archsearch.proxy.rungs import Judge

EPOCHS = 4
"""Up to here repeated text is about as good as new (Muennighoff et al. 2023, arXiv 2305.16264)."""
log = logging.getLogger(__name__)


def prepare_data(config: RunConfig) -> None:
    """Tokenise the corpus, or find it in the cache, before the first candidate asks for it.

    What is wrong with the data then stops the run at once, and workers need not wait for each other.
    A cluster's nodes have their own disks, so nothing is done for an address.

    Raises:
        ArchsearchError: as ``load_corpus`` does.
    """
    from archsearch.proxy.data import load_corpus

    if "loss" not in config.search.objectives or config.execution.address is not None:
        return
    corpus = load_corpus(config.proxy, config.space.vocab_size)
    epochs = config.proxy.tokens / len(corpus.train)
    if epochs > EPOCHS:
        text = "%s: proxy.tokens is %.1f epochs of its %s training tokens, and repeats above %d teach little"
        log.warning(text, corpus.name, epochs, f"{len(corpus.train):,}", EPOCHS)


class ProxyEvaluator:
    """Measures decode latency, refuses what is slower than the ceiling, then trains the proxy.

    Only what an objective or a limit asks for is run.

    Args:
        config: the whole run.
        weights: folder for the trained weights, ``{architecture.id}.safetensors``; none are kept when absent.
        checkpoints: folder from whose files a candidate goes on that was interrupted after a rung, likewise.

    A folder that this machine does not have, as on a cluster without a shared disk, is not written to; the
    evaluation says so in its ``paths``.
    """

    def __init__(self, config: RunConfig, weights: str | None = None, checkpoints: str | None = None) -> None:
        self.config, self.weights, self.checkpoints = config, weights, checkpoints
        self.profile = None if config.latency.profile is None else load_profile(config.latency.profile)

    def __call__(self, architecture: Architecture, *, seed: int, stopping: StoppingRule | None = None) -> Evaluation:
        """Evaluate once. Every failure comes back as an outcome with its cause in ``error``."""
        record = Record(architecture, seed)
        with accounted(record.seconds):
            try:
                self._evaluate(record, stopping)
            except Exception as error:
                record.fail(error)
            if record.outcome is not Outcome.CRASH:  # a broken CUDA context would refuse even this
                _release_memory()
        return record.evaluation()

    def _evaluate(self, record: Record, stopping: StoppingRule | None) -> None:
        with record.phase("import"):
            from archsearch.latency.device import device_name

            device = prepare_device(self.config.execution.device)
            record.device = device_name(device)
        objectives, limits = self.config.search.objectives, self.config.space.limits
        _static_costs(record, self.config)
        if "decode_latency" in objectives or limits.decode_latency is not None:
            _latency(record, self.config, device, self.profile)
        if "recall" in objectives or limits.recall is not None:
            _recall(record, self.config, device)
        if "loss" in objectives:
            self._train(record, device, stopping)
        record.objectives = {name: record.objectives[name] for name in objectives}

    def _train(self, record: Record, device: torch.device, stopping: StoppingRule | None) -> None:
        from archsearch.proxy.rungs import Judge, Stopped

        judge = Judge(self.config.proxy, record.objectives, stopping)
        result = _train(record, self.config, device, judge, _file(self.checkpoints, record, "checkpoint"))
        record.rungs, record.verdict = judge.reached(result.curve), judge.verdict
        if judge.verdict is not None:
            raise Stopped(judge.verdict)
        record.objectives["loss"] = result.loss
        path = _file(self.weights, record, "weights")
        if path is not None:
            with record.phase("save"):
                self._save(record, result.model, path)

    def _save(self, record: Record, model: HybridLM, path: Path) -> None:
        """Keep the weights and what tokenised their text; a full disk says nothing against the candidate."""
        from archsearch.proxy.data import load_corpus

        corpus = load_corpus(self.config.proxy, record.architecture.vocab_size)
        try:
            save_weights(model, path)
            if corpus.tokenizer is not None:
                corpus.tokenizer.save(path.parent)
        except StorageError as error:
            record.paths["weights"] = f"not kept: {error.cause}"


# Phases


def prepare_device(name: str) -> torch.device:
    """The device; a CPU worker computes on one core unless OMP_NUM_THREADS says more. Raises as ``resolve_device``."""
    import torch

    from archsearch.latency.device import resolve_device

    device = resolve_device(name)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return device


def _static_costs(record: Record, config: RunConfig) -> None:
    architecture = record.architecture
    state_bytes = architecture.state_bytes(config.space.limits.state_context)
    record.objectives |= {"parameters": float(architecture.parameters), "state_bytes": float(state_bytes)}
    record.metrics |= {
        "notation": architecture.notation,
        "parameters": architecture.parameters,
        "state_bytes": state_bytes,
        "train_flops": architecture.train_flops(config.proxy.context),
    }


def _latency(record: Record, config: RunConfig, device: torch.device, profile: LatencyProfile | None) -> None:
    """Decode latency, from a measurement or from the profile, and whether it is within the limit."""
    if profile is not None:
        import torch

        check_device(profile, record.device, torch.get_num_threads())
        record.metrics["latency_profile"] = {"id": profile.id, "seconds": profile.seconds(record.architecture)}
    if profile is not None and config.latency.source == "profile":
        record.objectives["decode_latency"] = profile.seconds(record.architecture)
        record.metrics["tpot_ms"] = profile.ms(record.architecture)
        record.paths["decode"] = f"not measured: {profile.name}"
    else:
        _measure(record, config, device)
    ceiling, seconds = config.space.limits.decode_latency, record.objectives["decode_latency"]
    if ceiling is not None and seconds > ceiling:
        cause = f"decode latency {seconds:.4g} s is above the limit {ceiling:.4g} s"
        raise InvalidArchitecture(cause, "widen space.limits.decode_latency")


def _measure(record: Record, config: RunConfig, device: torch.device) -> None:
    from archsearch.latency.decode import measure_decode

    with record.phase("latency"):
        latency = measure_decode(record.architecture, config.latency, device=device)
    record.seconds["latency"] -= latency.prepared + latency.waited
    record.seconds |= {"prepare": latency.prepared, "wait": latency.waited}
    record.paths["decode"] = latency.path
    record.objectives["decode_latency"] = latency.seconds
    record.metrics |= {"tpot_ms": latency.tpot_ms, "latency": latency.model_dump(mode="json", exclude={"device"})}


def _recall(record: Record, config: RunConfig, device: torch.device) -> None:
    from archsearch.latency.lock import sharing
    from archsearch.proxy.recall import measure_recall

    with record.phase("recall"), sharing(device):  # short enough for measurements to wait
        found = measure_recall(record.architecture, config.proxy, seed=record.seed, device=device)
    record.objectives["recall"] = found.error
    record.metrics["recall"] = found.summary()
    ceiling = config.space.limits.recall
    if ceiling is not None and found.error > ceiling:
        cause = f"recall error {found.error:.4g} is above the limit {ceiling:.4g}"
        raise InvalidArchitecture(cause, "widen space.limits.recall")


def _train(
    record: Record, config: RunConfig, device: torch.device, judge: Judge, checkpoint: Path | None
) -> ProxyResult:
    from archsearch.latency.lock import sharing
    from archsearch.proxy.checkpoint import UnfitCheckpoint
    from archsearch.proxy.data import load_corpus
    from archsearch.proxy.trainer import train_proxy

    options: dict[str, Any] = {"seed": record.seed, "device": device, "seconds": record.seconds}
    options |= {"rungs": judge.rungs, "keep_going": judge, "checkpoint": checkpoint}
    with sharing(device) as give_way:  # measurements in other processes pass when the training looks up
        options["on_progress"] = lambda tokens, loss: give_way()
        try:
            result = train_proxy(record.architecture, config.proxy, **options)
        except UnfitCheckpoint as error:
            assert checkpoint is not None
            record.metrics["checkpoint"] = f"not used: {error.cause}"
            checkpoint.unlink()
            result = train_proxy(record.architecture, config.proxy, **options)
    corpus = load_corpus(config.proxy, record.architecture.vocab_size)
    record.curve = result.curve
    record.paths |= result.paths
    record.metrics |= {
        "perplexity": perplexity(result.loss),
        "bits_per_byte": corpus.bits_per_byte(result.loss),
        "corpus": corpus.digest,
        "proxy_tokens": result.tokens,
        "tokens_per_second": result.tokens_per_second,
        "proxy_dtype": result.dtype,
    }
    if result.resumed:
        record.metrics["resumed_at"] = result.resumed
    return result


def _file(folder: str | None, record: Record, what: str) -> Path | None:
    """The candidate's file in a folder of the run; None where there is no such folder here."""
    if folder is None:
        return None
    if not Path(folder).is_dir():
        record.paths[what] = "not kept: the run folder is not on this machine"
        return None
    return Path(folder) / f"{record.architecture.id}.safetensors"


def save_weights(model: HybridLM, path: Path) -> None:
    """Write the parameters as safetensors, all or nothing; the architecture travels in the metadata."""
    from archsearch.proxy.checkpoint import write_tensors

    write_tensors(path, dict(model.state_dict()), {"architecture": json.dumps(model.architecture.to_dict())})


def _release_memory() -> None:
    """Give the memory of this candidate back, so that the next one finds as much as it did."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
