import json
import shutil
import time

import pytest
import torch

from swiftwan.errors import Cancelled, WeightsError
from swiftwan.weights.build import build
from swiftwan.weights.layout import Folder

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def endless(rests_on, is_wanted):
    while is_wanted():
        time.sleep(0.001)
    raise Cancelled("told")


def test_the_text_encoder_loads_when_it_is_asked_for(peer):
    parts = build(Folder(peer.folder, "peer"), **CPU)
    assert not parts.text.is_loaded
    assert dict(parts.text.encoder.named_parameters())["encoder.final_layer_norm.weight"].shape == (32,)


def test_a_failed_load_ends_the_text_encoders_beside_it(peer, tmp_path):
    folder = shutil.copytree(peer.folder, tmp_path / "model")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    begun = []

    def begin(text):
        text._load = endless
        text.expect([""])
        begun.append(text)

    with pytest.raises(WeightsError, match="do not belong together"):
        build(Folder(folder, "peer"), **CPU, first=begin)
    with pytest.raises(Cancelled, match="told"):
        _ = begun[0].encoder


def test_a_cancelled_wait_ends_the_text_encoders_load_and_the_next_one_is_whole(peer, monkeypatch):
    text = build(Folder(peer.folder, "peer"), **CPU).text
    whole, text._load = text._load, endless
    text.expect([""])
    loading = text._loading

    def interrupted(future):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(loading), "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _ = text.encoder
    with pytest.raises(Cancelled, match="told"):
        loading.result()
    text._load = whole
    text.expect([""])
    assert sum(1 for _ in text.encoder.parameters()) > 0
