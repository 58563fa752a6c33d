"""Calls made from the OpenAPI description by schemathesis, right ones and wrong ones: none makes an error of ours.

A worker process that only pretends does the jobs, so that whole lives of jobs are among the calls.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is in swiftwan[dev]")
pytestmark = pytest.mark.filterwarnings("ignore")  # of schemathesis and its parser

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance  # noqa: E402

from swiftwan.serve.http.app import make_app  # noqa: E402
from swiftwan.serve.jobs.service import Service, ServiceSettings  # noqa: E402

HOST = {"Host": "127.0.0.1"}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, pretending: tuple[str, ...], until: Any) -> Iterator[FastAPI]:
    folder = tmp_path_factory.mktemp("data")
    service = Service(ServiceSettings(folder, command=pretending, queue_limit=50, grace_s=5.0, keep_s=3600.0))
    service.start()
    until(lambda: service.readiness in ("READY", "BUSY"))
    yield make_app(service, key=None)
    service.drain()
    service.close()


@pytest.fixture(scope="module")
def operations(app: FastAPI) -> dict[tuple[str, str], Any]:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HOST)
    return {(one.ok().method.upper(), one.ok().path): one.ok() for one in schema.get_all_operations()}


def known_ids(app: FastAPI) -> list[str]:
    service: Service = app.state.service
    return [job.id for job in service.store.page(limit=20)[0]]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize("examples", [pytest.param(12, id="12"), pytest.param(500, id="500", marks=pytest.mark.long)])
def test_no_call_that_the_description_allows_or_forbids_makes_an_error_of_ours(
    app: FastAPI, operations: dict[tuple[str, str], Any], mode: str, examples: int
) -> None:
    assert len(operations) > 18
    called = 0
    for operation in operations.values():
        if mode == "NEGATIVE" and not (operation.body or operation.query):
            continue  # there is nothing to get wrong: any word may be an id
        strategy = operation.as_strategy(generation_mode=GenerationMode[mode])

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy, place=st.integers(0, 30), quick=st.booleans())
        def call(case: Any, place: int, quick: bool) -> None:
            nonlocal called
            ids = known_ids(app)
            if "{job_id}" in case.path and place < len(ids):
                case.path_parameters = {"job_id": ids[place]}
            if quick and isinstance(case.body, dict):  # most bodies ask for what no server has: let some of them run
                case.body = {"prompt": "a red circle", "num_inference_steps": 1, "size": "64x64"}
            case.call_and_validate(
                headers=HOST, checks=[not_a_server_error, status_code_conformance, content_type_conformance]
            )
            called += 1

        call()
    assert called > 60


def test_the_description_names_every_field_of_every_task(operations: dict[tuple[str, str], Any]) -> None:
    from dataclasses import fields

    from swiftwan.pipelines.request import TASKS

    body = operations["POST", "/v1/videos"].definition.raw["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) >= {field.name for task in TASKS.values() for field in fields(task)}
    assert body["properties"]["width"] == {"type": "integer"}
    assert body["properties"]["guidance_scale"] == {"type": "number"}
