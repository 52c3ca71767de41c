"""Requests made up from the server's own description: none of them breaks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from servers import Served, served
from talkers import talks


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(talks, max_tokens=4, max_prompt_tokens=64, max_body_bytes=20_000) as one:
        yield one


def test_no_request_breaks_the_server(server: Served) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried = set()
    for result in schema.exclude(path_regex="/events").get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=12,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def answers(case: schemathesis.Case) -> None:
            response = case.call()
            assert response.status_code < 500, response.text
            tried.add((case.path, response.status_code))

        answers()
    writes = ("/v1/completions", "/generate")
    statuses = {status for path, status in tried if path in writes}
    assert statuses >= {200, 400}  # it was asked for what it can and for what it cannot do
