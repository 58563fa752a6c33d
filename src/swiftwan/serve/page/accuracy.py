"""How good a finished video is, and how far from the plain run of the same request: measured on its file, on the CPU,
in a process of its own, so that neither the server nor the worker waits for it.

H.264 lies between the frames and the file; ``swiftwan bench`` measures before it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from swiftwan.serve.jobs.folder import Folder
from swiftwan.serve.jobs.job import Job

_SECONDS = 900
_MOST_PIXELS = 40_000_000
"""33 frames of 1280x720 and a few: what SSIM reads in half a minute of one core."""

_log = logging.getLogger(__name__)


class Accuracy:
    """Values of finished jobs, measured once, one job after the other."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._busy = threading.Lock()

    def look(self, job: Job, reference: Job | None) -> dict[str, Any] | None:
        """Values by metric, a number or ``{"missing": reason}``; None while they are measured, which this starts.

        Args:
            job: completed, with a video or picture.
            reference: likewise, of the same size; None for no comparison.
        """
        key = (job.id, reference.id if reference else "")
        if key not in self._known and self._busy.acquire(blocking=False):
            threading.Thread(target=self._measure, args=(key, job, reference), daemon=True).start()
        return self._known.get(key)

    def _measure(self, key: tuple[str, str], job: Job, reference: Job | None) -> None:
        try:
            told = {"prompt": job.request["prompt"], "file": self._file(job)}
            told["reference"] = self._file(reference) if reference else None
            done = subprocess.run(
                [sys.executable, "-m", __name__],
                input=json.dumps(told),
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            )
            self._known[key] = json.loads(done.stdout)
        except (subprocess.SubprocessError, ValueError, OSError) as error:
            _log.error("accuracy of job %s: %s", job.id, type(error).__name__)
            self._known[key] = {}
        finally:
            self._busy.release()

    def _file(self, job: Job) -> str:
        return str(self.folder.path(job.files.get("video") or job.files["image"]))


def main() -> None:
    """Read what to measure as JSON from stdin; write the values as JSON to stdout."""
    import torch

    from swiftwan.measure.missing import Missing, to_json
    from swiftwan.measure.quality import METRICS, Material
    from swiftwan.media import read_frames

    if hasattr(os, "nice"):
        os.nice(10)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no value
    told = json.load(sys.stdin)
    frames = read_frames(Path(told["file"]))
    every = 1 + frames[..., 0].numel() // _MOST_PIXELS
    reference = read_frames(Path(told["reference"]))[::every] if told["reference"] else Missing("no other run")
    material = Material(frames[::every], told["prompt"], reference, torch.device("cpu"))
    if not _has_clip():  # asked first, since importing what would load it takes longer than all other metrics
        material.__dict__["clip"] = Missing("no CLIP on this machine; 'swiftwan bench' brings one")
    json.dump({name: to_json(measure(material)) for name, (_, measure) in METRICS.items()}, out)
    out.flush()


def _has_clip() -> bool:
    from huggingface_hub import try_to_load_from_cache

    from swiftwan.measure.clip_score import MODEL, PLACE

    return bool(os.environ.get(PLACE)) or isinstance(try_to_load_from_cache(MODEL, "config.json"), str)


if __name__ == "__main__":
    main()
