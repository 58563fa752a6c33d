"""A worker that is real but for its model: it sleeps through its steps and writes its prompt as the result.

It starts in a fraction of a second, so that it can be killed a hundred times. PRETENDED_RESERVE sets the room that
it leaves on the disk, in bytes.
"""

import hashlib
import os
import time
from typing import Any

from swiftwan.pipelines.result import StepEvent
from swiftwan.serve.jobs import folder
from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.worker import Watch, Worker, main

STEP_S = 0.01


class PretendingWorker(Worker):
    def device_facts(self) -> dict[str, Any]:
        return {
            "torch_device": "cpu",
            "name": "a pretended CPU",
            "total_bytes": 8 * 10**9,
            "free_bytes": 7 * 10**9,
            "capability": None,
            "cores": 1,
            "dtype": "float32",
            "dtype_reason": "it is a test",
        }

    def engine_for(self, model: str, plan: str | list[str]) -> Any:
        return None

    def make(self, job: Job, watch: Watch) -> tuple[dict[str, str], dict[str, Any]]:
        self.folder.check_room()
        steps = job.request["num_inference_steps"]
        for step in range(1, steps + 1):
            time.sleep(STEP_S)
            watch.on_step(StepEvent("denoise", step, steps, STEP_S * step))
        watch.begin("save")
        data = job.request["prompt"].encode() * 10_000
        picture = job.request["num_frames"] == 1
        name = self.folder.result(job, ".png" if picture else ".mp4")
        self.folder.write(name, (data[i : i + 4096] for i in range(0, len(data), 4096)))
        files = {"image" if picture else "video": name, "thumbnail": name, "spritesheet": name}
        return files, {"sha256": hashlib.sha256(data).hexdigest(), "seconds": {}}


if __name__ == "__main__":
    folder.RESERVE_BYTES = int(os.environ.get("PRETENDED_RESERVE", folder.RESERVE_BYTES))
    main(PretendingWorker)
