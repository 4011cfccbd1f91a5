"""Fixtures of the jobs' tests."""

import pytest

from tests.pipelines.population import Population


@pytest.fixture
def population(tmp_path):
    return Population(tmp_path)
