"""Model files as others save them: wrapped networks, bare state dicts."""

import pytest
import torch
from helpers import small_config, small_network, user_error

from weights import load_network, load_teacher, model_checkpoint

STATE = small_network().state_dict()


def prefixed(prefix: str, part: str = "") -> dict:
    """The state_dict with a prefix before the names of a part, or of all."""
    return {f"{part}{prefix}{name.removeprefix(part)}" if name.startswith(part) else name: tensor
            for name, tensor in STATE.items()}


WRAPPED = {
    "DataParallel": prefixed("module."),
    "compile in DataParallel": prefixed("module._orig_mod."),
    "decoder's layers only": prefixed("_orig_mod.", "decoder.layers."),
    "sharded": prefixed("_fsdp_wrapped_module."),
}


@pytest.mark.parametrize("kind", ["full checkpoint", "state_dict only", "bare"])
@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_networks_are_read(tmp_path, name, kind):
    state = WRAPPED[name]
    checkpoint = model_checkpoint(small_network(), iteration=7) | {"state_dict": state}
    torch.save({"full checkpoint": checkpoint, "state_dict only": {"state_dict": state}, "bare": state}[kind],
               tmp_path / "model.pth")
    for network, found in (load_network(tmp_path / "model.pth"), load_teacher(tmp_path / "model.pth", small_config())):
        assert network.config == small_config()
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, STATE[key])
        assert found.get("iteration") == (7 if kind == "full checkpoint" else None)


def test_what_torch_itself_writes_is_read(tmp_path):
    network = small_network()
    network.encoder = torch.nn.DataParallel(network.encoder)
    torch.save(torch.compile(torch.nn.DataParallel(network)).state_dict(), tmp_path / "model.pth")
    assert torch.equal(load_network(tmp_path / "model.pth")[0].decoder.layers[0][1].weight,
                       STATE["decoder.layers.0.1.weight"])


@pytest.mark.parametrize("content, named", [
    (STATE | prefixed("module."), "mixed"),  # every tensor twice: which is meant?
    ({"state_dict": prefixed("module.") | {"decoder.layers.0.1.bias": STATE["decoder.layers.0.1.bias"]}},
     "decoder.layers.0.1.bias"),
    (prefixed("module.net."), "net.encoder.layers.0."),
    (model_checkpoint(small_network()) | {"state_dict": prefixed("net.")}, "but net.encoder.layers.0."),
    *((content, "state_dict") for content in ({}, {"iteration": 3}, {"model": STATE}, {**STATE, "epoch": 3})),
])
def test_what_is_no_model_of_ours_is_refused(tmp_path, content, named):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    for flag in ("--load_path", "--teacher"):
        message = user_error(load_network, path, flag=flag)
        assert message.startswith(f"{flag} {path}") and named in message
