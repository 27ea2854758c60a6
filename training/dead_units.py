"""Dead units: channels that are on nowhere, counted while a network learns."""

import torch
from torch import Tensor

from data import normalize
from network import StyleTransferNetwork, align, level_statistics
from utils import note

MANY = 0.1  # share of the decoder's units, above which their number is said


class DeadUnits:
    """Counts the units, output channels of a convolution behind its ReLU, that are on (above 0) at no position of any
    of some pictures. A few that only rare things switch on count, too."""

    PAIRS = 8  # of crops: they take less time than two training steps

    def __init__(self, content: Tensor, style: Tensor, warns: bool = True) -> None:
        """content, style: (n, 3, H, W), uint8. warns: whether many dead units of the decoder are said, once."""
        self.pairs, self.warns = (content, style), warns

    def count(self, network: StyleTransferNetwork) -> dict[str, int | list[int]]:
        """For metrics.jsonl: all dead units, and those of each layer, as in `find`."""
        dead = [int(is_dead.sum()) for is_dead in self.find(network)]
        units, of_decoder = sum(network.config.decoder_widths[:-1]), sum(dead[len(network.config.encoder_widths) :])
        if self.warns and of_decoder > MANY * units:
            self.warns = False
            note(f"{of_decoder} of the decoder's {units} units are on nowhere in {len(self.pairs[0])} pictures, and do "
                 "not learn any more; --warmup_iter, a lower rate or a lower --channel_loss_weight may keep them alive")
        return {"dead_units": sum(dead), "dead_units_by_layer": dead}

    @torch.no_grad()
    def find(self, network: StyleTransferNetwork) -> list[Tensor]:
        """Which units of each layer are dead, (C,), in forward order; not of the decoder's last, the picture."""
        weight, is_on = next(network.parameters()), []
        for pair in zip(*(pictures.split(1) for pictures in self.pairs)):
            features = network.encoder.features(normalize(torch.cat(pair).to(weight.device)).to(weight.dtype))
            content, style = zip(*(features[conv].split(1) for conv in network.config.level_convs))
            features += network.decoder.features(*align(content, *level_statistics(style)))[:-1]
            is_on.append([(feature > 0).any(dim=3).any(dim=2).any(dim=0) for feature in features])
        return [~torch.stack(layer).any(dim=0) for layer in zip(*is_on)]
