"""Dead units: networks in which chosen units are dead."""

import torch
from helpers import convs, plant, random_picture, small_network

from training.dead_units import DeadUnits


def kill(network, chosen: dict[int, list[int]]) -> None:
    """Units by the number of their conv."""
    plant(network, {convs(network)[conv]: dict.fromkeys(units, 0.0) for conv, units in chosen.items()})


def pairs(count: int = 3) -> DeadUnits:
    return DeadUnits(random_picture(0, (32, 32), count), random_picture(1, (32, 32), count))


def test_chosen_units_are_dead_and_no_others():
    network = small_network(width=12)
    before = [dead.tolist() for dead in pairs().find(network)]
    chosen = {0: [3], 8: [0, 5], 9: [1, 2, 7], 16: [11]}
    kill(network, chosen)
    after = pairs().find(network)
    assert len(after) == 17 and all(len(dead) == 12 for dead in after)
    for layer, dead in enumerate(after):
        assert dead[chosen.get(layer, [])].all()
    # Those behind the first see other features, in which more may die.
    assert [unit for unit in range(12) if after[0][unit] != before[0][unit]] == chosen[0]


def test_a_unit_that_one_position_of_one_picture_switches_on_is_not_dead():
    """The first unit of the encoder takes red at one pixel; all else is black, which is below zero."""
    network = small_network()
    kill(network, {0: [0, 1]})
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
    kill(network, dict.fromkeys(range(9, 13), range(8)))
    row = counter.count(network)
    assert sum(row["dead_units_by_layer"][9:]) >= 32
    counter.count(network)
    assert capsys.readouterr().err.count("of the decoder's 96 units are on nowhere in 3 pictures") == 1
