"""Figures are drawn and written; the numbers behind them are the thesis's where those are determined."""

import pytest
import torch
from typer.testing import CliRunner

from sao_prune import figures
from sao_prune.analysis import ks_test, plot
from sao_prune.cli import app


def test_table_4_1_without_activation_is_exact():
    values = figures.layer_values(0)
    pvalues = {name: ks_test(values["linear"]["dense"], v).pvalue for name, v in values["linear"].items()}
    assert pvalues["SAO"] == 1
    for name in ("RG", "LMP", "LRP"):
        assert pvalues[name] == pytest.approx(4.23e-153, rel=1e-2)
    for act in figures.ACTIVATIONS:
        assert ks_test(values[act]["dense"], values[act]["SAO"]).pvalue > 0.05
        assert ks_test(values[act]["dense"], values[act]["LMP"]).pvalue < 1e-20


def test_storage_curves_cross_the_dense_matrix_where_the_thesis_says():
    curves = figures.storage_curves([0.4, 0.5])
    csr, block = curves.values()
    assert csr[0] < 1 < csr[1]
    assert block[1] == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_kind_of_figure_is_written(tmp_path, theme):
    ones = torch.eye(8, dtype=torch.bool)
    drawn = {
        "gap": plot.gap_against_sparsity({"distinct": {"SAO": {8: [1.0, 2.0]}}}, [0.5, 0.75], theme=theme),
        "eigen": plot.eigenvalue_spectra({"8 x 8": torch.linspace(-1, 1, 16)}, theme=theme),
        "reach": plot.reachability_matrices({"SAO": {"N = 1": ones, "N = 2": ~ones}}, theme=theme),
        "values": plot.singular_value_histograms({"tanh": {"dense": torch.rand(9), "SAO": torch.rand(9)}}, theme=theme),
        "bars": plot.accuracy_bars({"N = 8": {"SAO": 97.1, "LMP": 11.3}}, theme=theme),
        "storage": plot.storage_against_density([0.1, 0.5], {"CSR": [0.2, 1.0]}, theme=theme),
    }
    for name, figure in drawn.items():
        path = plot.save(figure, tmp_path / f"{name}.png")
        assert path.read_bytes().startswith(b"\x89PNG")
        labelled = [axes for axes in figure.axes if axes.get_xlabel() or axes.get_ylabel() or axes.get_title()]
        assert labelled == figure.axes
    with pytest.raises(ValueError, match="'light' or 'dark'"):
        plot.accuracy_bars({"a": {"b": 1.0}}, theme="sepia")


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf", ".jpg", ""])
def test_the_ending_tells_the_format(tmp_path, ending):
    path = plot.save(plot.accuracy_bars({"a": {"b": 1.0}}), tmp_path / "new" / f"bars{ending}")
    begins = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".jpg": b"\xff\xd8"}
    assert path.read_bytes().startswith(begins[path.suffix])
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_figure_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "bars.what"
    path.write_text("before")
    with pytest.raises(ValueError, match="what"):
        plot.save(plot.accuracy_bars({"a": {"b": 1.0}}), path)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["before"]


@pytest.mark.slow
def test_the_command_writes_everything(tmp_path):
    assert CliRunner().invoke(app, ["figures", "--out", str(tmp_path)]).exit_code == 0
    assert len(list(tmp_path.glob("*-light.png"))) == len(list(tmp_path.glob("*-dark.png"))) == 7
    assert {p.name for p in tmp_path.glob("*.csv")} == {"gap.csv", "table-4-1.csv"}
