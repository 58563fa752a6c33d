"""``swiftwan doctor``."""

import json
from collections.abc import Callable

import pytest

from swiftwan.cli.models import ModelState

Call = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(("state", "code"), [("embedded", 0), ("missing: reinstall swiftwan", 1)])
def test_doctor_says_whether_generate_can_run(
    monkeypatch: pytest.MonkeyPatch, call: Call, state: str, code: int
) -> None:
    monkeypatch.setattr("swiftwan.cli.models.model_states", lambda: [ModelState("pocket", None, state, None)])
    told = call("doctor", "--json")
    findings = {finding["name"]: finding["state"] for finding in json.loads(told[1])["findings"]}
    assert told[0] == code
    assert json.loads(told[1])["ready"] is (code == 0)
    assert set(findings) == {"versions", "torch", "gpu", "cpu", "memory", "disk", "video", "pocket", "models"}
    assert findings["torch"] == findings["video"] == "ok"
    assert call("doctor")[0] == code


def test_doctor_survives_what_is_broken(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    def broken() -> str:
        raise OSError("libcuda.so.1: cannot open\nshared object file")

    monkeypatch.setattr("swiftwan.device.cuda_problem", broken)
    code, out, _ = call("doctor", "--json")
    assert code == 1
    gpu = next(finding for finding in json.loads(out)["findings"] if finding["name"] == "gpu")
    assert gpu["state"] == "fail"
    assert gpu["told"] == "OSError: libcuda.so.1: cannot open shared object file"
