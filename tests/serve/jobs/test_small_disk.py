"""A server on a real disk of 7 MB, a tmpfs in a mount namespace of its own, which ends with the process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENTER = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
MOUNT = ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs"]
RESERVE_BYTES = 2**19
PROMPT = "a red circle moves left ".ljust(150, "x")  # the pretended result is 10,000 times as long: 1.5 MB


def why_not(folder: Path) -> str:
    if shutil.which("unshare") is None:
        return "no unshare on this machine"
    tried = subprocess.run([*ENTER, *MOUNT, str(folder)], capture_output=True, text=True, check=False)
    return tried.stderr.strip() if tried.returncode else ""


def test_a_full_disk_fails_jobs_and_never_the_server(tmp_path: Path) -> None:
    if reason := why_not(tmp_path):
        pytest.skip(f"no small disk can be mounted here: {reason}")
    environment = os.environ | {
        "PRETENDED_RESERVE": str(RESERVE_BYTES),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)]),
    }
    mounting = f"{' '.join(MOUNT)} '{tmp_path}' && exec '{sys.executable}' '{__file__}' '{tmp_path}'"
    done = subprocess.run(
        [*ENTER, "sh", "-c", mounting], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "passed\n"


def live_on(root: Path) -> None:
    """Fill the disk by jobs, then by a stranger; free some of it; go on."""
    import conftest
    from swiftwan.pipelines.request import request_from_json
    from swiftwan.serve.jobs import folder
    from swiftwan.serve.jobs.folder import DiskFullError
    from swiftwan.serve.jobs.service import Service, ServiceSettings

    assert shutil.disk_usage(root).total == 7 * 2**20
    folder.RESERVE_BYTES = RESERVE_BYTES
    service = Service(ServiceSettings(root / "data", command=conftest.PRETENDING))
    service.start()
    conftest.until(lambda: service.readiness in ("READY", "BUSY"))
    request = conftest.REQUEST | {"prompt": PROMPT}
    jobs = [service.store.add(request, model="pocket", plan="auto")[0].id for _ in range(10)]
    conftest.until(lambda: all(service.store.get(job).ended for job in jobs))
    states = [service.store.get(job).state for job in jobs]
    full = [job for job in map(service.store.get, jobs) if job.state == "failed"]
    assert states.count("completed") == 4, (
        states
    )  # 6 MB of 7, and the database; the fifth finds the disk full in its middle
    assert {job.error_code for job in full} == {"disk_full"}
    assert all("disk is full" in str(job.error_message) and str(root) not in str(job.error_message) for job in full)
    assert not list(root.rglob("*.tmp"))
    whole = PROMPT.encode() * 10_000
    for job in map(service.store.get, jobs):
        assert job.state != "completed" or service.folder.path(job.files["video"]).read_bytes() == whole

    with (root / "stranger").open("wb", buffering=0) as stranger:
        try:
            while True:
                stranger.write(bytes(2**16))
        except OSError:
            pass
    with pytest.raises(DiskFullError, match="delete finished jobs"):
        service.submit(request_from_json(conftest.REQUEST))
    (root / "stranger").unlink()

    for job in jobs[:2]:
        service.delete(job)
    service.store.retry(full[0].id)
    conftest.until(lambda: service.store.get(full[0].id).state == "completed")
    assert service.supervisor.slots[0].restarts == 0
    service.drain()
    service.close()
    sys.stdout.write("passed\n")


if __name__ == "__main__":
    live_on(Path(sys.argv[1]))
