import torch
from torch.utils.flop_counter import FlopCounterMode

from swiftwan.models.config import POCKET
from swiftwan.models.dit import WanTransformer
from swiftwan.train.work import tflop


def test_the_work_of_a_step_is_that_of_its_products():
    config = POCKET.transformer
    with torch.device("meta"):
        model = WanTransformer(config)
        x, text = torch.empty(1, 600, config.dim), torch.empty(1, 512, config.text_dim)
        condition = model.condition(text, (1, 16, 6, 20, 20))
        time = torch.empty(1, 1, 6, config.dim)
        with FlopCounterMode(display=False) as counter:
            for block, memory in zip(model.blocks, condition.memories, strict=True):
                block(x, time, [600], memory, None, condition.rope)
    counted = {str(op): flop for op, flop in counter.get_flop_counts()["Global"].items()}
    linears, attention = tflop(config, 600)
    assert round(linears * 1e12) == 2 * counted["aten.addmm"]
    cross = 4 * 600 * 512 * config.dim * config.num_layers
    assert round(attention * 1e12 / 3.5) == sum(counted.values()) - counted["aten.addmm"] - cross
