"""Fixtures that sweep the hosts. No test reaches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tests.hosts import HOSTS, Host


@pytest.fixture(params=HOSTS, ids=[host.name for host in HOSTS])
def host(request) -> Host:
    """Every supported host in turn."""
    return request.param


@pytest.fixture
def model(host) -> PreTrainedModel:
    """A fresh copy of the host's stock model."""
    return host.model()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[Host], Path]:
    """The folder with the saved stock checkpoint of a host; written once, to be read only."""
    return cache(lambda host: host.save(tmp_path_factory.mktemp(host.name)))
