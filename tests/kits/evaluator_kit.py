"""What every evaluator must do. Subclass EvaluatorKit and give it the fixtures ``evaluator`` and ``architecture``."""

from __future__ import annotations

import math
import pickle

import pytest

from archsearch.architecture import Architecture
from archsearch.evaluation import Evaluation, Evaluator, Outcome


class EvaluatorKit:
    """Tests of the Evaluator protocol."""

    objectives: tuple[str, ...] = ("loss", "decode_latency")

    @pytest.fixture
    def evaluator(self) -> Evaluator:
        """The evaluator under test."""
        raise NotImplementedError

    @pytest.fixture
    def architecture(self) -> Architecture:
        """An architecture that it can evaluate."""
        raise NotImplementedError

    def test_an_evaluation_is_complete_and_finite(self, evaluator: Evaluator, architecture: Architecture) -> None:
        evaluation = evaluator(architecture, seed=3)
        assert evaluation.outcome is Outcome.OK
        assert evaluation.architecture == architecture
        assert evaluation.seed == 3
        assert set(self.objectives) <= set(evaluation.objectives)
        assert all(math.isfinite(value) for value in evaluation.objectives.values())

    def test_an_evaluation_survives_json(self, evaluator: Evaluator, architecture: Architecture) -> None:
        evaluation = evaluator(architecture, seed=3)
        assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation

    def test_it_travels_to_a_worker(self, evaluator: Evaluator, architecture: Architecture) -> None:
        assert pickle.loads(pickle.dumps(evaluator))(architecture, seed=3).ok
