"""Importing swiftwan does nothing that the importer could notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "diffusers", "transformers", "huggingface_hub", "av", "PIL", "safetensors")

# Runs in a fresh interpreter; what it finds comes back as one line of JSON in a file, so that
# stdout and stderr stay free for whatever the import itself would write.
PROBE = """
import json, logging, os, signal, sys, threading, warnings
environment, path, hooks = dict(os.environ), list(sys.path), (sys.excepthook, sys.displayhook)
handlers, filters = list(logging.root.handlers), list(warnings.filters)
signals = {s: signal.getsignal(s) for s in signal.valid_signals()}
logging.root.setLevel(logging.DEBUG)
import MODULE
facts = {
    "loaded": sorted({name.partition(".")[0] for name in sys.modules}),
    "environment": dict(os.environ) == environment,
    "path": sys.path == path,
    "hooks": (sys.excepthook, sys.displayhook) == hooks,
    "handlers": logging.root.handlers == handlers,
    "filters": list(warnings.filters) == filters,
    "signals": {s: signal.getsignal(s) for s in signal.valid_signals()} == signals,
    "threads": threading.active_count() == 1,
}
with open(sys.argv[1], "w") as told:
    json.dump(facts, told)
"""


@pytest.mark.parametrize("module", ["swiftwan", "swiftwan.cli"])
def test_importing_loads_nothing_heavy_and_changes_nothing(tmp_path: Path, module: str) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    told = tmp_path / "facts.json"
    search = [entry for entry in sys.path if entry]
    environment = os.environ | {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HOME": str(home / "huggingface"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(search),
    }
    run = subprocess.run(
        [sys.executable, "-W", "default", "-c", PROBE.replace("MODULE", module), str(told)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert run.stderr == "", "importing warned or logged"
    facts = json.loads(told.read_text())
    assert not set(facts.pop("loaded")) & set(HEAVY)
    assert all(facts.values()), f"importing changed: {[name for name, same in facts.items() if not same]}"
    assert not list(work.iterdir()), "importing made files in the working directory"
    assert not list(home.iterdir()), "importing made files in the home directory"
