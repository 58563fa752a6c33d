"""Two processes, and weights that rest elsewhere, train as one process with whole weights does."""

import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from swiftwan.engine import Engine
from swiftwan.train.lora import train
from swiftwan.train.settings import Settings

pytestmark = pytest.mark.slow

ARGUMENTS = ["--steps", "3", "--rank", "2", "--frames", "9", "--learning-rate", "1e-3", "--warmup", "1"]
SETTINGS = Settings(steps=3, rank=2, frames=9, learning_rate=1e-3, warmup=1)


@pytest.fixture(scope="module")
def alone(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    settings = replace(SETTINGS, accumulate=2)
    train(Engine.load("pocket", plan=[], device="cpu", dtype="fp32"), str(clips), out, settings)
    return load_file(out / "lora.safetensors")


def launched(count, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "swiftwan", "train", "lora", *map(str, arguments), *ARGUMENTS]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared |= {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(count)}
    running = [
        subprocess.Popen(
            [*command, "--device", "cpu", "--dtype", "fp32"], env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}
        )
        for i in range(count)
    ]
    assert [process.wait(timeout=200) for process in running] == [0] * count


@pytest.mark.parametrize(
    ("count", "arguments"),
    [
        (2, ["--weights", "whole"]),
        (2, ["--weights", "sharded", "--keep", "attention"]),
        (1, ["--weights", "offloaded", "--accumulate", "2"]),
    ],
    ids=["averaged", "sharded", "offloaded"],
)
def test_the_same_adapter_comes_out(clips, tmp_path, alone, count, arguments):
    launched(count, clips, "--out", tmp_path, *arguments)
    found = load_file(tmp_path / "lora.safetensors")
    assert found.keys() == alone.keys()
    for name in alone:
        torch.testing.assert_close(found[name], alone[name], rtol=2e-3, atol=2e-5, msg=name)
