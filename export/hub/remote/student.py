"""The student in a model repository: a timm network, of which `config.json` says how it is read."""

from types import SimpleNamespace

import timm
from torch import Tensor, nn

from distill.features import Features
from distill.models.layout import Layout


class Student(nn.Module):
    """A timm network that gives `Features`."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.net = timm.create_model(config.architecture, num_classes=0, **config.model_args)
        self.layout = Layout(**config.layout)
        self.family, self.width = self.layout.family, self.layout.width
        self.stride, self.prefix = self.layout.stride, self.layout.prefix
        self.has_class_token = self.layout.has_class_token
        self.second_token = config.second_token

    def forward(self, images: Tensor) -> Features:
        """Encode normalised images [B, 3, H, W] whose sides are multiples of `stride`."""
        return self.read(self.net.forward_features(images), images)

    def read(self, output: Tensor, images: Tensor) -> Features:
        """The features in the network's own output for these images."""
        return self.layout.read(output, tuple(images.shape[-2:]), self.second_token)
