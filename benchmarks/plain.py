"""The training step as one would first write it: the baseline of `train_step.py`, and the reference of the tests.

Independent of the trainer: torchvision's VGG, a decoder of plain layers, the losses by their formulas, a
pass for every picture batch, float32 in torch's default memory format, `.item()` on every loss, Adam.
"""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import torch
import torchvision.models
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
TAPS = (1, 6, 11, 20)  # relu1_1, relu2_1, relu3_1, relu4_1 of VGG19


def vgg19_features() -> nn.Sequential:
    """VGG19 up to relu4_1, weights unset."""
    return torchvision.models.vgg19(weights=None, init_weights=False).features[:21]


def plain_decoder() -> nn.Sequential:
    """VGG19's mirror image from relu4_1, layer by layer, weights unset."""

    def conv(width_in: int, width: int) -> list[nn.Module]:
        return [nn.ReflectionPad2d(1), nn.Conv2d(width_in, width, 3), nn.ReLU()]

    up = [nn.Upsample(scale_factor=2, mode="nearest")]
    layers = [*conv(512, 256), *up, *conv(256, 256), *conv(256, 256), *conv(256, 256), *conv(256, 128), *up,
              *conv(128, 128), *conv(128, 64), *up, *conv(64, 64), *conv(64, 3)]
    return nn.Sequential(*layers[:-1])


class PlainTrainer:
    """Networks, Adam and a step, for VGG19 with max pooling and the `meanstd` style loss."""

    def __init__(
        self, state_dict: dict, vgg: dict, weights: dict[str, float], learning_rates: dict[str, float],
        l0_eps: float, device: torch.device, dtype: torch.dtype = torch.float32,
    ) -> None:
        """state_dict: of a full StyleTransferNetwork; vgg: from `weights.load_vgg`; weights and
        learning_rates: of the TrainConfig; dtype: of all that is computed."""
        self.encoder, self.decoder, self.vgg = vgg19_features(), plain_decoder(), vgg19_features()
        self.vgg.load_state_dict(vgg)
        self.vgg.to(device, dtype).requires_grad_(False)
        groups = []
        for part, module in (("encoder", self.encoder), ("decoder", self.decoder)):
            prefix, rate = f"{part}.layers.0.", learning_rates[part]
            module.load_state_dict({key.removeprefix(prefix): value.clone() for key, value in state_dict.items()
                                    if key.startswith(prefix)})
            module.to(device, dtype).requires_grad_(rate > 0)
            if rate > 0:
                groups.append({"params": list(module.parameters()), "lr": rate})
        self.optimizer = torch.optim.Adam(groups)
        self.weights, self.l0_eps, self.dtype = weights, l0_eps, dtype
        self.mean, self.std = MEAN.to(device), STD.to(device)

    def step(self, content: Tensor, style: Tensor) -> dict[str, float]:
        """content, style: (B, 3, H, W), uint8. Returns the losses whose weight is not 0."""
        content, style = (((image.float() / 255.0 - self.mean) / self.std).to(self.dtype) for image in (content, style))
        content_feature = self.encoder(content)
        style_feature = self.encoder(style)
        output = self.decoder(adain(content_feature, style_feature))
        output_taps, content_taps, style_taps = self.taps(output), self.taps(content), self.taps(style)
        norms = torch.cat([content_feature, style_feature]).flatten(2).norm(dim=2)

        losses = {"content": ((output_taps[-1] - content_taps[-1]) ** 2).mean()}
        if self.weights["style"]:
            losses["style"] = sum(statistics_distance(a, b) for a, b in zip(output_taps, style_taps)) / 4 / 4
        if self.weights["uncorrelation"]:
            losses["uncorrelation"] = 0.5 * (correlation(content_feature) + correlation(style_feature))
        if self.weights["channel"]:
            losses["channel"] = (1 - self.l0_eps / (norms + self.l0_eps)).mean()
        if self.weights["xor"]:
            off = self.l0_eps / (norms + self.l0_eps)
            pairs = list(combinations(off, 2))
            losses["xor"] = sum((a - b).abs().sum() for a, b in pairs) / (norms.shape[1] * len(pairs))
        total = sum(self.weights[name] * loss for name, loss in losses.items())

        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        values = {name: loss.item() for name, loss in losses.items()}
        return values | {"total": total.item(), "nonzero_channels": (norms > 0).sum(dim=1).float().mean().item()}

    def taps(self, image: Tensor) -> list[Tensor]:
        features = []
        for index, layer in enumerate(self.vgg):
            image = layer(image)
            if index in TAPS:
                features.append(image)
        return features


def adain(content: Tensor, style: Tensor) -> Tensor:
    content_mean, style_mean = (feature.mean(dim=(2, 3), keepdim=True) for feature in (content, style))
    content_std, style_std = (feature.std(dim=(2, 3), keepdim=True) for feature in (content, style))
    return (content - content_mean) / (content_std + 1e-5) * style_std + style_mean


def statistics_distance(feature: Tensor, target: Tensor) -> Tensor:
    mean = ((feature.mean(dim=(2, 3)) - target.mean(dim=(2, 3))) ** 2).mean()
    return mean + ((feature.std(dim=(2, 3)) - target.std(dim=(2, 3))) ** 2).mean()


def correlation(feature: Tensor) -> Tensor:
    """Mean absolute off-diagonal correlation of the channels, summed over the batch."""
    channels = feature.shape[1]
    off_diagonal = 1 - torch.eye(channels, device=feature.device, dtype=feature.dtype)
    total = 0.0
    for flat in feature.flatten(2):  # (C, H*W)
        centred = flat - flat.mean(dim=1, keepdim=True)
        norm = centred.norm(dim=1)
        rho = (centred @ centred.T) / (norm[:, None] * norm[None, :] + 1e-5)
        total = total + (rho.abs() * off_diagonal).sum() / (channels * (channels - 1))
    return total


def plain_loader(paths: list[Path], imsize: int, cropsize: int, batch_size: int) -> Iterator[Tensor]:
    """Endless batches, (B, 3, cropsize, cropsize), uint8, in a random order. Every picture is decoded and resized
    whole, in this process."""
    transform = transforms.Compose([transforms.Resize(imsize), transforms.RandomCrop(cropsize),
                                    transforms.PILToTensor()])
    while True:
        chosen = torch.randint(len(paths), (batch_size,)).tolist()
        yield torch.stack([transform(Image.open(paths[index]).convert("RGB")) for index in chosen])
