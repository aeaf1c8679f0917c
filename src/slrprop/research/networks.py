"""The articles' networks (Garmendia-Orbegozo et al. 2023, Table 1 and section 4; LeCun et al. 1998; He et al. 2016)."""

from functools import partial

import torch
from torch import Tensor, nn


class DenseHead(nn.Module):
    """Dense layers with ReLU between, under the names they have in a network."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.names = tuple(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names[:-1]:
            x = self.get_submodule(name)(x).relu()
        return self.get_submodule(self.names[-1])(x)


class Headed(nn.Module):
    """A network whose end, its ``head``, is looked at by itself: dense layers with ReLU between. ``front`` gives the first one's inputs."""

    dense: tuple[str, ...]

    def front(self, x: Tensor) -> Tensor:
        """The inputs of the first dense layer."""
        return x

    def head(self) -> nn.Module:
        """The dense layers, shared with this network."""
        return DenseHead({name: self.get_submodule(name) for name in self.dense})  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        for name in self.dense[:-1]:
            x = self.between(self.get_submodule(name)(x).relu())
        return self.get_submodule(self.dense[-1])(x)

    def between(self, x: Tensor) -> Tensor:
        """What is done to a dense layer's outputs while the network is trained."""
        return x


class LeNet5(Headed):
    """LeNet-5 for 1 x 32 x 32 images: two tanh convolutions, then dense 400-120-84-classes with ReLU."""

    dense = ("fc3", "fc4", "fc5")

    def __init__(self, classes: int = 10, widths: tuple[int, int] = (120, 84)) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        self.fc3 = nn.Linear(400, widths[0])
        self.fc4 = nn.Linear(*widths)
        self.fc5 = nn.Linear(widths[1], classes)

    def front(self, x: Tensor) -> Tensor:
        """The convolutions' features (p x 400)."""
        features: Tensor = self.features(x)
        return features


class RoomMLP(Headed):
    """Dense 16-4000-4000-4000-4 with ReLU."""

    dense = ("fc1", "fc2", "fc3", "fc4")

    def __init__(self, classes: int = 4, widths: tuple[int, int, int] = (4000, 4000, 4000)) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, widths[0])
        self.fc2 = nn.Linear(*widths[:2])
        self.fc3 = nn.Linear(*widths[1:])
        self.fc4 = nn.Linear(widths[2], classes)


class LeNet300(Headed):
    """LeNet-300-100 for images of 28 x 28 in a border of 2: dense 784-300-100-classes with ReLU."""

    dense = ("fc1", "fc2", "fc3")

    def __init__(self, classes: int = 10, widths: tuple[int, int] = (300, 100)) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, widths[0])
        self.fc2 = nn.Linear(*widths)
        self.fc3 = nn.Linear(widths[1], classes)

    def front(self, x: Tensor) -> Tensor:
        """The images' pixels without the border (p x 784)."""
        return x[..., 2:30, 2:30].flatten(1)


class Convolution(nn.Conv2d):
    """A 3 x 3 convolution with a border of 1 and no bias; images of up to 4 x 4 are trained as products of unfolded patches.

    On processors such a bfloat16 product and its gradients take half the time of a convolution's or less.
    """

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__(channels, wide, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if not self.training or x.device.type != "cpu" or height * width > 16:
            return super().forward(x)
        padded = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        patches = [padded[:, top : top + height, left : left + width] for top in range(3) for left in range(3)]
        product = nn.functional.linear(torch.cat(patches, -1), self.weight.permute(0, 2, 3, 1).flatten(1))
        return product.permute(0, 3, 1, 2)


class VGG16(Headed):
    """VGG16 for 3 x 32 x 32 images: 13 convolutions with batch norm, then dense 512-4096-4096-classes with ReLU.

    Dropout of a half before the two last dense layers while it is trained (Simonyan and Zisserman 2015, configuration D).
    """

    dense = ("fc6", "fc7", "fc8")
    stages = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))

    def __init__(self, classes: int = 10, widths: tuple[int, int] = (4096, 4096)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for wide, count in self.stages:
            for _ in range(count):
                layers += [Convolution(channels, wide), nn.BatchNorm2d(wide), nn.ReLU()]
                channels = wide
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.fc6 = nn.Linear(channels, widths[0])
        self.fc7 = nn.Linear(*widths)
        self.fc8 = nn.Linear(widths[1], classes)

    def front(self, x: Tensor) -> Tensor:
        """The convolutions' features (p x 512)."""
        features: Tensor = self.features(x)
        return features

    def between(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5) if self.training else x


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm, added to what goes in: through a 1 x 1 convolution where sizes change."""

    def __init__(self, channels: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wide, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        through = [nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)]
        self.downsample = nn.Sequential(*through) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(Headed):
    """A residual network for 3 x 32 x 32 images, looked at as a whole (He et al., CVPR 2016, section 4.2, with the projections of option B).

    Args:
        wide: channels of the first convolution.
        stages: channels and blocks of each stage; where channels change, the map's sides halve.
    """

    def __init__(self, wide: int, stages: tuple[tuple[int, int], ...], classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, wide, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.stages = tuple(f"layer{index}" for index, _ in enumerate(stages, 1))
        channels = wide
        for name, (wide, count) in zip(self.stages, stages, strict=True):
            first = Block(channels, wide, 1 if wide == channels else 2)
            self.add_module(name, nn.Sequential(first, *(Block(wide, wide, 1) for _ in range(count - 1))))
            channels = wide
        self.fc = nn.Linear(channels, classes)

    def head(self) -> nn.Module:
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for name in self.stages:
            x = self.get_submodule(name)(x)
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


ResNet20 = partial(ResNet, 16, ((16, 3), (32, 3), (64, 3)))
"""19 convolutions of 16, 32 and 64 channels, 1 x 1 ones around two blocks, dense 64-classes."""
ResNet8 = partial(ResNet, 64, ((128, 1), (256, 1), (512, 1)))
"""Seven convolutions of 64 to 512 channels, 1 x 1 ones around each block, dense 512-classes."""
