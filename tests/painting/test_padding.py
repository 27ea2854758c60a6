"""How the encoder and the loss network pad: zeros, as published, or by reflection."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CPU,
    make_trainer,
    picture_network,
    random_batch,
    read_pixels,
    small_network,
    user_error,
    words,
    write_model,
    write_noise,
)
from torch.testing import assert_close

from data import normalize, prepare_picture
from main import main
from network import LossNetwork, NetworkConfig, StyleTransferNetwork, adain, channel_statistics
from train import TrainConfig, build_trainer, train
from weights import load_network, model_checkpoint

PADDINGS = ("zeros", "reflect")
ENCODER_POOLINGS = (4, 9, 18)  # indices in torchvision's vgg19.features
ENCODER_CONVS = (0, 2, 5, 7, 10, 12, 14, 16, 19)
DECODER_CONVS = ((1, False), (5, True), (8, False), (11, False), (14, False), (18, True), (21, False), (25, True),
                 (28, False))  # by index, and whether an upsampling stands before


def padded(feature: torch.Tensor, padding: str) -> torch.Tensor:
    """One pixel on every side."""
    return F.pad(feature, (1, 1, 1, 1), mode="constant" if padding == "zeros" else padding)


def encode(state: dict, image: torch.Tensor, padding: str) -> torch.Tensor:
    """The VGG19 encoder, written out."""
    for index in range(ENCODER_CONVS[-1] + 1):
        if index in ENCODER_POOLINGS:
            image = F.max_pool2d(image, 2)
        elif index in ENCODER_CONVS:
            weight, bias = state[f"encoder.layers.0.{index}.weight"], state[f"encoder.layers.0.{index}.bias"]
            image = F.conv2d(padded(image, padding), weight, bias).relu()
    return image


def paint(state: dict, content: torch.Tensor, style: torch.Tensor, padding: str) -> torch.Tensor:
    """The network of the original implementation, written out; pictures and output ImageNet-normalised."""
    content, style = encode(state, content, padding), encode(state, style, padding)
    means, stds = ([each.mean((2, 3), keepdim=True) for each in (content, style)],
                   [each.std((2, 3), keepdim=True) for each in (content, style)])
    feature = (content - means[0]) / (stds[0] + 1e-5) * stds[1] + means[1]
    for index, is_upsampled in DECODER_CONVS:
        if is_upsampled:
            feature = feature.repeat_interleave(2, 2).repeat_interleave(2, 3)
        weight, bias = state[f"decoder.layers.0.{index}.weight"], state[f"decoder.layers.0.{index}.bias"]
        feature = F.conv2d(padded(feature, "reflect"), weight, bias)
        if index != DECODER_CONVS[-1][0]:
            feature = feature.relu()
    return feature


# ----------------------------------------------------------------------------------------------- the encoder


@pytest.mark.parametrize("padding", PADDINGS)
@torch.inference_mode()
def test_encoder_is_the_one_written_out(padding):
    network = small_network()
    network.use(padding=padding)
    image = normalize(random_batch(40)[0])
    actual, desired = network.encoder(image), encode(network.state_dict(), image, padding)
    assert_close(actual, desired, rtol=1e-4, atol=1e-5)
    network.use(padding=PADDINGS[1 - PADDINGS.index(padding)])
    assert not torch.allclose(network.encoder(image), desired, atol=1e-2)


@pytest.mark.parametrize("padding", PADDINGS)
@torch.inference_mode()
def test_network_built_with_a_padding_is_one_told_to_use_it(padding):
    told = small_network()
    told.use(padding=padding)
    built = StyleTransferNetwork(told.config)
    built.load_state_dict(told.state_dict())
    content, style = map(normalize, random_batch(24))
    assert told.config.padding == padding
    assert torch.equal(built(content, style), told(content, style))


@torch.inference_mode()
def test_plain_picture_has_plain_features_with_reflection_alone():
    """All that an encoder sees along the border of one colour comes from its padding: painted, it is a frame."""
    network, image = small_network(), torch.full((1, 3, 48, 48), 0.5)
    framed = network.encoder(image).std((2, 3))
    network.use(padding="reflect")
    plain = network.encoder(image).std((2, 3))
    assert framed.max() > 1e-2 and plain.max() < 1e-5
    assert network(image, normalize(random_batch(32)[0][:1])).std((2, 3)).max() < 1e-3


@pytest.mark.parametrize("backbone", ["vgg19", "vgg16"])
@torch.inference_mode()
def test_loss_network_pads_as_told(backbone):
    """Its first tap by hand, and plain features of a plain picture at every tap."""
    image = torch.full((1, 3, 32, 32), 0.5)
    spreads = {}
    for padding in PADDINGS:
        torch.manual_seed(0)
        network = LossNetwork(backbone, padding)
        feature = normalize(random_batch(24)[0])
        first = network.layers[0]
        desired = F.conv2d(padded(feature, padding), first.weight, first.bias).relu()
        assert_close(network.layers[:2](feature), desired)
        spreads[padding] = [tap.std((2, 3)).max() for tap in network(image)]
    assert LossNetwork(backbone).padding == "zeros"
    assert max(spreads["reflect"]) < 1e-5 < 1e-3 < min(spreads["zeros"])


# -------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_goes_through_a_file(tmp_path, padding):
    network = small_network()
    network.use(padding=padding)
    actual, _ = load_network(write_model(tmp_path / "model.pth", network))
    assert actual.config == network.config and actual.config.padding == padding
    content, style = map(normalize, random_batch(24))
    with torch.inference_mode():
        assert torch.equal(actual(content, style), network(content, style))


def test_older_files_pad_with_zeros(tmp_path):
    checkpoint = model_checkpoint(small_network())
    assert checkpoint["config"].pop("padding") == "zeros"
    torch.save(checkpoint, tmp_path / "older.pth")
    torch.save({"state_dict": checkpoint["state_dict"]}, tmp_path / "original.pth")
    for name in ("older", "original"):
        assert load_network(tmp_path / f"{name}.pth")[0].config == small_network().config


def test_other_paddings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="padding 'circular' is none of zeros, reflect"):
        NetworkConfig("vgg19", "max", (6,) * 9, (*(6,) * 8, 3), padding="circular")
    checkpoint = model_checkpoint(small_network())
    checkpoint["config"]["padding"] = "circular"
    torch.save(checkpoint, tmp_path / "model.pth")
    assert "padding 'circular'" in user_error(load_network, tmp_path / "model.pth")


def test_file_of_the_original_implementation_paints_its_pixels_by_the_command_line(tmp_path):
    """At the defaults: zero padding, no margin, full strength; against the network written out."""
    state = picture_network().state_dict()
    torch.save({"state_dict": state}, tmp_path / "original.pth")
    paths = {kind: write_noise(tmp_path / f"{kind}.png", (40, 56), number) for number, kind in
             enumerate(("content", "style"))}
    out = tmp_path / "out.png"
    assert main(["--mode", "test", "--gpu_no", "-1", *words(paths | {"load_path": tmp_path / "original.pth",
                                                                     "save_path": out})]) == 0
    content, style = (normalize(prepare_picture(path, None, None)) for path in paths.values())
    actual = read_pixels(out)
    for padding in PADDINGS:
        desired = paint(state, content, style, padding)[0]
        mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        desired = ((desired * std + mean).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        difference = np.abs(actual - desired)
        if padding == "zeros":
            assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # where a value lies between two levels
            assert 0.2 < ((desired > 0) & (desired < 255)).mean()  # or clipping would hide what differs
        else:
            assert difference.max() > 5


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("padding", PADDINGS)
def test_step_measures_with_a_loss_network_that_pads_as_the_network(padding):
    network = small_network()
    network.use(padding=padding)
    trainer = make_trainer(network, style_loss_weight=0.0, channel_loss_weight=0.0, xor_loss_weight=0.0,
                           uncorrelation_loss_weight=0.0)
    assert trainer.losses.loss_network.padding == padding
    content, style = map(normalize, random_batch(32))
    terms, _ = trainer.losses(content, style, all_terms=False)
    vgg = trainer.losses.loss_network.layers.state_dict(prefix="encoder.layers.0.")
    with torch.no_grad():
        feature = adain(encode(network.state_dict(), content, padding),
                        *channel_statistics(encode(network.state_dict(), style, padding)))
        output = network.decoder(feature)
        desired = F.mse_loss(encode(vgg, output, padding), encode(vgg, content, padding))
        other = PADDINGS[1 - PADDINGS.index(padding)]
        wrong = F.mse_loss(encode(vgg, output, other), encode(vgg, content, other))
    assert_close(terms["content"], desired, rtol=1e-4, atol=0)
    assert abs(wrong / desired - 1) > 1e-3


@pytest.mark.parametrize("padding", [None, *PADDINGS])
def test_training_pads_as_its_file_or_the_flag_says(small, tmp_path, padding):
    network = small_network(width=8)
    network.use(padding="reflect")
    start = str(write_model(tmp_path / "reflect.pth", network))
    given = small | {"load_path": start, "save_path": str(tmp_path / "run"), "max_iter": 1, "padding": padding}
    trainer = build_trainer(TrainConfig(**given), CPU, None)
    desired = padding or "reflect"
    assert trainer.network.config.padding == trainer.losses.loss_network.padding == desired


def test_padding_of_a_run_stays(small, tmp_path):
    given = small | {"save_path": str(tmp_path / "run"), "max_iter": 1}
    assert main(["--mode", "train", *words(given | {"padding": "reflect"})]) == 0
    assert train({"save_path": given["save_path"], "resume": True, "max_iter": 2}) == 0
    assert load_network(tmp_path / "run")[0].config.padding == "reflect"
    message = user_error(train, {"save_path": given["save_path"], "resume": True, "max_iter": 3, "padding": "zeros"})
    assert "--padding" in message
