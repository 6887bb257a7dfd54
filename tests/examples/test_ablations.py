"""The paper's tables: every row matches the printed figures, or says why not."""

import json

import pytest
from torch import nn

from tests.examples.running import load

ablations = load("ablations")
DAILY = {"7", "complexity"}
STAND_INS = {"7", "8"}


@pytest.mark.parametrize("table", [t if t in DAILY else pytest.param(t, marks=pytest.mark.slow) for t in ablations.ALL])
def test_every_row_matches_or_is_explained(table, tmp_path, capsys):
    path = tmp_path / "new" / "figures.json"
    assert ablations.main(["--tables", table, "--output", str(path)]) == 0
    (rows,) = json.loads(path.read_text()).values()
    printed = capsys.readouterr().out
    assert len(rows) == (20 if table == "complexity" else len(ablations.TABLES[table].rows))
    for row in rows:
        assert row["name"] in printed
        if table in STAND_INS:
            assert ablations.matches(row["multiply_adds"] / 1e9, row["paper"]["FLOPs (G)"])
            assert abs(row["parameters"] / 2.3e6 - 1) < 0.03
            assert row["matches"] or row["explanation"].startswith("parameters differ: ")
        else:
            assert row["matches"], row
    if table == "7":
        assert len({(row["parameters"], row["multiply_adds"]) for row in rows}) == 1


@pytest.mark.parametrize(
    ("table", "row", "mixers", "mlp"),
    [
        ("2", 0, "SSSS", "ConvFFN"),
        ("2", 5, "PPPM", "ConvGLU"),
        ("7", 1, "AAAM", "ConvGLUType1"),
        ("7", 2, "AAAM", "ConvGLUType2"),
        ("7", 3, "AAAM", "ConvGLUType3"),
        ("9", 2, "AMMM", "ConvGLU"),
        ("9", 4, "AAAA", "ConvGLU"),
    ],
)
def test_a_row_holds_the_blocks_that_it_names(table, row, mixers, mlp):
    """Counts alone would not tell a type of ConvGLU from another, nor where a mixer stands."""
    kinds = {
        "AggregatedAttention": "A",
        "LengthScaledCosineAttention": "M",
        "PixelFocusedAttention": "P",
        "SpatialReductionAttention": "S",
    }
    blocks = [stage.blocks[0] for stage in ablations.TABLES[table].rows[row].build().stages]
    assert "".join(kinds[type(block.mixer).__name__] for block in blocks) == mixers
    assert {type(block.mlp).__name__ for block in blocks} == {mlp}


@pytest.mark.parametrize(("table", "row", "name"), [("2", -1, "Micro"), ("6", -1, "Tiny")])
def test_the_roads_end_at_the_registered_variants(table, row, name):
    (variant,) = (r.build() for r in ablations.TABLES["variants"].rows if r.name == name)
    declared = ablations.TABLES[table].rows[row].build()
    assert {n: p.shape for n, p in declared.named_parameters()} == {n: p.shape for n, p in variant.named_parameters()}
    for ours, theirs in zip(declared.modules(), variant.modules(), strict=True):
        assert repr(ours) == repr(theirs)
        switches = ("pretrain_grid", "pool_ratio", "pool_grid", "window_size", "cosine", "length_scaled")
        assert [getattr(ours, s, None) for s in switches] == [getattr(theirs, s, None) for s in switches]


def test_the_small_model_is_the_registered_one():
    declared, registered = ablations.pico(), ablations.registered("transnext_pico")
    assert {n: p.shape for n, p in declared.named_parameters()} == {
        n: p.shape for n, p in registered.named_parameters()
    }


@pytest.mark.parametrize(
    ("value", "printed", "same"),
    [
        (28.259, "28.2", True),
        (28.259, "28.3", True),
        (12.809, "12.8", True),
        (28.259, "28.1", False),
        (2.65, "2.65", True),
    ],
)
def test_matching_rounds_or_cuts_off(value, printed, same):
    assert ablations.matches(value, printed) is same


def test_a_row_that_differs_is_told(monkeypatch, capsys):
    def build():
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 2, 5, device="meta"))

    rows = [
        ablations.Row("a linear layer", build, "1.0", "0.0", size=2),
        ablations.Row("another", build, "1.0", "0.0", size=2, explanation="it is small"),
    ]
    monkeypatch.setitem(ablations.TABLES, "9", ablations.Table("A table", rows))
    assert ablations.main(["--tables", "9"]) == "ablations.py: rows that differ from the paper: a linear layer"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1].strip() for line in lines[3:5]] == ["DIFFERS", "parameters differ: it is small"]
    assert lines[-1] == "2 rows: 0 match, 1 are explained"


def test_refuses_a_table(capsys):
    with pytest.raises(SystemExit):
        ablations.main(["--tables", "3"])
    assert "--tables: invalid choice: '3'" in capsys.readouterr().err
