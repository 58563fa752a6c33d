import os

from swiftwan.ops.products import SETTINGS, without_workspace


def test_products_take_no_workspace_unless_the_user_said_how_much(monkeypatch):
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is as it was behind the test
        monkeypatch.delenv(name)
    without_workspace()
    assert {name: os.environ[name] for name in SETTINGS} == SETTINGS

    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "4096")
    monkeypatch.delenv("TORCH_CUBLASLT_UNIFIED_WORKSPACE")
    without_workspace()
    assert os.environ["CUBLASLT_WORKSPACE_SIZE"] == "4096"
    assert "TORCH_CUBLASLT_UNIFIED_WORKSPACE" not in os.environ
