"""Dead units: networks in which chosen units are dead."""

import torch
from helpers import random_picture, small_network

from training.dead_units import DeadUnits


def kill(network, part: str, layer: int, units: list[int]) -> None:
    """No bias, and no filter: the ReLU behind passes nothing on, whatever the picture."""
    convs = [each for each in getattr(network, part).layers[0] if isinstance(each, torch.nn.Conv2d)]
    with torch.no_grad():
        convs[layer].weight[units] = 0.0
        convs[layer].bias[units] = -1.0


def pairs(count: int = 3) -> DeadUnits:
    return DeadUnits(random_picture(0, (32, 32), count), random_picture(1, (32, 32), count))


def test_chosen_units_are_dead_and_no_others():
    network = small_network(width=12)
    before = [dead.tolist() for dead in pairs().find(network)]
    chosen = {("encoder", 0): [3], ("encoder", 8): [0, 5], ("decoder", 0): [1, 2, 7], ("decoder", 7): [11]}
    for (part, layer), units in chosen.items():
        kill(network, part, layer, units)
    after = pairs().find(network)
    assert len(after) == 17 and all(len(dead) == 12 for dead in after)
    for layer, dead in enumerate(after):
        units = chosen.get(("encoder", layer) if layer < 9 else ("decoder", layer - 9), [])
        assert dead[units].all()
        if layer == 0:  # those behind see other features, in which more may die
            assert [unit for unit in range(12) if dead[unit] != before[0][unit]] == units


def test_a_unit_that_one_position_of_one_picture_switches_on_is_not_dead():
    """The first unit of the encoder takes red at one pixel; all else is black, for which its bias is too low."""
    network = small_network()
    kill(network, "encoder", 0, [0, 1])
    conv = network.encoder.layers[0][0]
    with torch.no_grad():
        conv.weight[0, 0, 1, 1] = 1.0
    content, style = torch.zeros(2, 4, 3, 32, 32, dtype=torch.uint8)
    assert DeadUnits(content, style).find(network)[0][:2].tolist() == [True, True]
    content[2, 0, 17, 30] = 255
    assert DeadUnits(content, style).find(network)[0][:2].tolist() == [False, True]


def test_many_dead_units_of_the_decoder_are_said_once(capsys):
    network, counter = small_network(width=12), pairs()
    alive = counter.count(network)
    assert alive["dead_units"] == sum(alive["dead_units_by_layer"]) and not capsys.readouterr().err
    for layer in range(4):
        kill(network, "decoder", layer, list(range(8)))
    row = counter.count(network)
    assert sum(row["dead_units_by_layer"][9:]) >= 32
    counter.count(network)
    assert capsys.readouterr().err.count("of the decoder's 96 units are on nowhere in 3 pictures") == 1
