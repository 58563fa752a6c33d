import json

import pytest
import torch
from torch import nn

from swiftwan.errors import OutputError
from swiftwan.train.loop import Run, Schedule, seed_of


def train(folder, *, until, steps=12):
    """A run whose every step draws its data from (seed, step), stopped and saved at ``until``."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 2))
    run = Run(folder, model, Schedule(steps, 1e-2, warmup=2), ema_decay=0.9)
    while run.step < until:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed_of(3, run.step)))
        run.update(model(x).square().mean())
    run.save()
    return run


def test_a_killed_run_goes_on_to_the_bit(tmp_path):
    whole = train(tmp_path / "whole", until=12)
    train(tmp_path / "parts", until=5)
    resumed = train(tmp_path / "parts", until=12)
    assert resumed.step == 12
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
        assert torch.equal(whole.average[name], resumed.average[name]), name


def test_a_failed_save_leaves_the_last_good_state(tmp_path, monkeypatch):
    run = train(tmp_path, until=4)
    before = run.state_path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swiftwan.weights.write.save_file", full)
    with pytest.raises(OutputError, match="state.safetensors cannot be written: No space left on device; free room"):
        run.save()
    assert run.state_path.read_bytes() == before


def test_delivered_weights_are_the_average(tmp_path):
    run = train(tmp_path, until=6)
    name, parameter = next(iter(run.parameters.items()))
    assert not torch.equal(parameter, run.average[name])
    run.deliver()
    assert torch.equal(parameter, run.average[name])


def test_the_schedule_rises_holds_and_falls_to_zero():
    schedule = Schedule(100, 1.0, warmup=10, hold_until=0.5)
    assert schedule.at(0) == pytest.approx(0.1)
    assert schedule.at(30) == schedule.at(49) == 1.0
    assert 0 < schedule.at(90) < 0.2
    assert schedule.at(100) == pytest.approx(0.0)


def test_the_log_is_one_json_object_a_line(tmp_path):
    run = train(tmp_path, until=2)
    run.log(loss=0.5)
    run.log(loss=0.25)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [0.5, 0.25]
    assert rows[0]["step"] == 2
