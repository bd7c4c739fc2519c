"""One set of workers, and one gateway before them, for all tests of the package that break nothing."""

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from tests.client.gateway.stand import Running, Stand, gateway


@pytest.fixture(scope="session")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    with Stand(tmp_path_factory.mktemp("stand")) as one:
        yield one


@pytest.fixture(scope="session")
def running(stand: Stand) -> Iterator[Running]:
    with gateway(stand.folder, "--connect", stand.target, "--policy", str(stand.policy)) as one:
        yield one


@pytest.fixture
def openai(running: Running) -> Iterator[Any]:
    """The unmodified client. Its types know no plain dictionaries, so it is Any."""
    with OpenAI(base_url=running.base, api_key="none", max_retries=0) as client:
        yield client
