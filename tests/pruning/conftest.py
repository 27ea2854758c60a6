"""What several test files of pruning use: a network with planted channels, measured once."""

from dataclasses import replace

import pytest
from helpers import convs, plant, small_network
from test_responses import make_folders
from test_surgery import CONSTANT, OFF

from network import StyleTransferNetwork
from prune import PruneConfig
from pruning.responses import Responses, choose_pictures, measure_responses


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> tuple[StyleTransferNetwork, PruneConfig, Responses]:
    """A network with planted channels, measured in every layer on 3 photographs and 2 paintings."""
    network = small_network(width=8)
    for places, value in ((OFF, 0.0), (CONSTANT, 0.75)):
        plant(network, {convs(network)[place]: dict.fromkeys(channels, value) for place, channels in places.items()})
    config = replace(make_folders(tmp_path_factory.mktemp("pictures")), prune_layers="all")
    return network, config, measure_responses(network, config, *choose_pictures(config))
