"""Every example in every docstring runs."""

import doctest
import importlib
import pkgutil

import pytest

import sao_prune

MODULES = sorted(m.name for m in pkgutil.walk_packages(sao_prune.__path__, "sao_prune."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    if name.startswith("sao_prune.integrations."):
        pytest.importorskip(name.rpartition(".")[2])
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
