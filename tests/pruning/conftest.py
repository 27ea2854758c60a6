"""What several test files of pruning use: a network with planted channels, measured once."""

from dataclasses import replace

import pytest
from helpers import small_network
from test_responses import make_folders, plant
from test_surgery import convs

from network import StyleTransferNetwork
from prune import PruneConfig
from pruning.responses import Responses, choose_pictures, measure_responses


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> tuple[StyleTransferNetwork, PruneConfig, Responses]:
    """A network with planted channels, measured in every layer on 3 photographs and 2 paintings."""
    network = small_network(width=8)
    names = convs(network)
    plant(network, {names[0]: [1], names[4]: [2, 3], names[8]: [5], names[9]: [0], names[15]: [7]}, -0.5)
    plant(network, {names[2]: [6], names[8]: [4], names[11]: [1], names[16]: [2]}, 0.75)
    config = replace(make_folders(tmp_path_factory.mktemp("pictures")), prune_layers="all")
    return network, config, measure_responses(network, config, choose_pictures(config))
