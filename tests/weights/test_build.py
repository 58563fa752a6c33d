import json
import shutil

import pytest
import torch

from swiftwan.errors import Cancelled, WeightsError
from swiftwan.weights.build import build
from swiftwan.weights.layout import Folder

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def test_the_text_encoder_loads_when_it_is_asked_for(peer):
    parts = build(Folder(peer.folder, "peer"), **CPU)
    assert not parts.text.is_loaded
    assert dict(parts.text.encoder.named_parameters())["encoder.final_layer_norm.weight"].shape == (32,)


def test_a_failed_load_ends_the_text_encoders_beside_it(peer, tmp_path):
    folder = shutil.copytree(peer.folder, tmp_path / "model")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    begun = []
    with pytest.raises(WeightsError, match="do not belong together"):
        build(Folder(folder, "peer"), **CPU, first=begun.append)
    with pytest.raises(Cancelled, match="text_encoder is not wanted any more"):
        _ = begun[0].encoder
