"""Architectures as data, and the paper's own parameter counts (Nemotron-Flash, arXiv 2511.18890)."""

from __future__ import annotations

import json

import pytest

from archsearch.architecture import Architecture, load_architecture, make_architecture, reference_names
from archsearch.errors import ConfigError, InvalidArchitecture
from archsearch.operators import OPERATORS, RWKV7

STUDY = {"vocab_size": 32000, "tie_embeddings": False, "options": {"m2": {"state": 16}}}


@pytest.mark.parametrize(
    ("name", "millions"),
    [("nemotron-flash-1b", 965.4), ("nemotron-flash-3b", 2750.0), ("nemotron-flash-searched-latency", 837.3)],
)
def test_published_models_have_their_published_size(name: str, millions: float) -> None:
    assert load_architecture(name).parameters / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("fields", "millions"),
    [
        ({"hidden_size": 2048, "operators": "m2 f " * 12}, 888.8),
        ({"hidden_size": 1792, "operators": "w f " * 12}, 615.7),
        ({"hidden_size": 1536, "operators": "a f " * 12, "options": {"f": {"ratio": 4}}}, 551.3),
        ({"hidden_size": 1536, "operators": "a f " * 12}, 466.4),
        ({"hidden_size": 2048, "operators": "m2 f " * 12, "options": {"m2": {"state": 128}}}, 894.3),
    ],
)
def test_the_paper_baselines_have_their_published_size(fields: dict, millions: float) -> None:
    assert make_architecture(**{**STUDY, **fields}).parameters / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("nemotron-flash-1b", {"d": 16.84, "m2": 25.85, "a": 10.49, "f": 37.75}),
        ("nemotron-flash-3b", {"d": 37.86, "m2": 57.75, "a": 23.60, "f": 84.94}),
    ],
)
def test_layers_of_the_released_models_have_their_size(name: str, sizes: dict[str, float]) -> None:
    architecture = load_architecture(name)
    hidden = architecture.hidden_size
    for operator in architecture.operators:
        millions = (operator.parameters(hidden) + hidden) / 1e6
        assert millions == pytest.approx(sizes[operator.kind], abs=0.006)


def test_kv_cache_of_the_released_models() -> None:
    # 4,096 and 9,216 bytes a token in bf16: two and three full-attention layers.
    for name, row in (("nemotron-flash-1b", 4096), ("nemotron-flash-3b", 9216)):
        architecture = load_architecture(name)
        assert architecture.state_bytes(1001) - architecture.state_bytes(1000) == row


def test_every_reference_round_trips() -> None:
    assert len(reference_names()) == 8
    for name in reference_names():
        architecture = load_architecture(name)
        again = Architecture.model_validate(json.loads(json.dumps(architecture.to_dict())))
        assert again == architecture
        assert again.id == architecture.id
        assert len(architecture.id) == 12


def test_equal_networks_have_equal_ids_however_spelled() -> None:
    fields = {"hidden_size": 256, "vocab_size": 300}
    plain = make_architecture(**fields, operators="a d gd f")
    spelled = make_architecture(
        **fields,
        operators=[
            {"kind": "a", "heads": 2, "kv_heads": 2, "head_dim": 128},
            {"kind": "d", "heads": 2},
            {"kind": "gd", "heads": 2},
            "f",
        ],
    )
    assert spelled.id == plain.id
    assert make_architecture(**fields, operators="d a gd f").id != plain.id


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"operators": "a x"}, "unknown operator 'x'"),
        ({"operators": ""}, "at least 1 item"),
        ({"operators": "a", "options": {"a": {"head_dimm": 64}}}, "did you mean 'head_dim'"),
        ({"operators": "a", "options": {"z": {}}}, "unknown operator 'z'"),
        ({"operators": "a", "hidden_size": 200}, r"operator 0 \(a\): head_dim must divide"),
        ({"operators": "a", "options": {"a": {"kv_heads": 3}}}, "kv_heads must divide"),
        ({"operators": "m2", "options": {"m2": {"head_dim": 96}}}, "operator 0 .m2."),
        ({"operators": "gl", "hidden_size": 264}, "operator 0 .gl."),
        ({"operators": "f", "hidden_size": 16}, "below multiple_of"),
        ({"operators": "a", "hidden_size": -1}, "greater than or equal to 8"),
        ({"operators": "a", "hidden_size": float("nan")}, "hidden_size"),
        ({"operators": "a", "depth": 3}, "unknown key 'depth'"),
        ({"operators": 3}, "expected a list of operators"),
    ],
)
def test_impossible_architectures_are_refused_with_a_cause(fields: dict, cause: str) -> None:
    with pytest.raises(InvalidArchitecture, match=cause):
        make_architecture(**{"hidden_size": 256, "vocab_size": 300, **fields})


def test_unknown_reference_is_hinted() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'qwen3-0\.6b'"):
        load_architecture("qwen3-0.6")


def test_costs_behave() -> None:
    for kind, operator in OPERATORS.items():
        architecture = make_architecture(hidden_size=512, vocab_size=1000, operators=[{"kind": kind}])
        config = architecture.operators[0]
        assert config.kind == kind
        assert isinstance(config, operator)
        assert 0 < config.matmul_parameters(512) <= config.parameters(512)
        grows = config.state_bytes(512, 2000, 2) > config.state_bytes(512, 1000, 2)
        assert grows == (kind == "a")
        assert config.step_bytes(512, 1000, 2) >= config.state_bytes(512, 1000, 2)
        assert architecture.train_flops(512) > 6 * config.matmul_parameters(512)


def test_attention_sees_a_triangle_and_a_window() -> None:
    full, window = OPERATORS["a"](), OPERATORS["w"](window=4)
    assert full.mixing_flops(128, 3) == 4 * 128 * (1 + 2 + 3) / 3
    assert window.mixing_flops(128, 6) == 4 * 128 * (1 + 2 + 3 + 4 + 4 + 4) / 6


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        ({"kind": "kda", "head_dim": 48}, r"kda.*head_dim must divide hidden_size: 48 does not divide 64"),
        ({"kind": "kda", "head_dim": 512}, r"kda: head_dim: .*less than or equal to 256 \(found 512\)"),
        ({"kind": "kda", "head_dim": 16, "expand_v": 1.3}, r"kda.*expand_v: 16 x 1.3 is not a whole number"),
        ({"kind": "kda", "head_dim": 16, "gate_rank": 0}, r"kda: gate_rank: .*greater than or equal to 1"),
        ({"kind": "r7", "head_dim": 256}, r"r7: head_dim: .*less than or equal to 128 \(found 256\)"),
        ({"kind": "r7", "value_residual": True}, r"r7: value_residual: .*leave value_residual false$"),
        ({"kind": "m", "expand": 0.3}, r"m.*expand: 64 x 0.3 is not a whole number"),
        ({"kind": "m", "head_dim": 64}, r"m: unknown key 'head_dim'; known: .*dt_rank"),
        ({"kind": "hg", "expand_ratio": 64}, "hg: unknown key 'expand_ratio'; known: head_dim"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(operator, message):
    with pytest.raises(InvalidArchitecture, match=message):
        make_architecture(hidden_size=64, vocab_size=32, operators=[operator])


def test_the_published_ranks_are_the_default():
    ranks = RWKV7().ranks(2048)
    assert ranks == (128, 128, 224)
    same = make_architecture(hidden_size=2048, vocab_size=32, operators=[{"kind": "r7", "gate_rank": 224}])
    assert same.id == make_architecture(hidden_size=2048, vocab_size=32, operators="r7").id
