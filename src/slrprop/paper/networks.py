"""The articles' networks (Garmendia-Orbegozo et al. 2023, Table 1 and section 4)."""

from torch import Tensor, nn


class LeNet5(nn.Module):
    """LeNet-5 for 1 x 32 x 32 images: two tanh convolutions, then dense 400-120-84-classes with ReLU."""

    def __init__(self, classes: int = 10) -> None:
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
        self.fc3 = nn.Linear(400, 120)
        self.fc4 = nn.Linear(120, 84)
        self.fc5 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.fc5(self.fc4(self.fc3(x).relu()).relu())


class RoomMLP(nn.Module):
    """Dense 16-4000-4000-4000-4 with ReLU."""

    def __init__(self, width: int = 4000) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, width)
        self.fc4 = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc4(self.fc3(self.fc2(self.fc1(x).relu()).relu()).relu())
