"""Small networks of many kinds, and their ONNX files by both torch exporters."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from slrprop.export import _quiet, session


class LeNet5(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)
        )
        self.head = nn.Sequential(
            nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10), nn.Softmax(-1)
        )

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


class ConvNet(nn.Module):
    """Convolutions, batch norm, and a dense head with batch norm and dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(3))
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(72, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 6)
        )
        self.head[2].running_mean.uniform_(-1, 1)
        self.head[2].running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(self.body(x))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x, mask=None):
        batch, tokens, width = x.shape
        h = self.norm1(x)
        q, k, v = (
            layer(h).reshape(batch, tokens, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / (width / self.heads) ** 0.5
        if mask is not None:
            scores = scores + (1 - mask[:, None, None].to(x)) * -1e4
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 24, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 24))
        self.place = nn.Parameter(torch.randn(1, 17, 24))
        self.block = Block(24, 3)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.place
        return self.head(self.block(x)[:, 0])


class LSTMClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 20, batch_first=True)
        self.head = nn.Sequential(nn.Linear(20, 18), nn.Tanh(), nn.Linear(18, 4))

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Encoder(nn.Module):
    """BERT-like: tokens and a mask in, logits and the hidden state out."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 24), nn.Embedding(9, 24)
        self.blocks = nn.ModuleList([Block(24, 4), Block(24, 4)])
        self.pooler, self.classifier = nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.classifier(torch.tanh(self.pooler(x[:, 0]))), x


def mlp():
    return nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 32), nn.GELU(), nn.Linear(32, 20), nn.Sigmoid(), nn.Linear(20, 7))  # fmt: skip


def tokens(samples):
    mask = torch.ones(samples, 9, dtype=torch.long)
    mask[::2, 6:] = 0
    return torch.randint(0, 50, (samples, 9)), mask


# name: (module, inputs for a number of samples, classes)
KINDS = {
    "mlp": (mlp, lambda p: (torch.randn(p, 30),), 7),
    "lenet5": (LeNet5, lambda p: (torch.rand(p, 1, 32, 32),), 10),
    "convnet": (ConvNet, lambda p: (torch.randn(p, 3, 8, 8),), 6),
    "vit": (ViT, lambda p: (torch.randn(p, 1, 16, 16),), 5),
    "lstm": (LSTMClassifier, lambda p: (torch.randn(p, 7, 6),), 4),
    "encoder": (Encoder, tokens, 3),
}


def made(kind):
    """A seeded network in evaluation mode, 14 samples of its inputs, and labels."""
    build, inputs, classes = KINDS[kind]
    torch.manual_seed(7)
    return build().eval(), inputs(14), torch.randint(0, classes, (14,))


def export(model, inputs, path, dynamo, batch=None):
    """Write the model with inputs ``in0``, ``in1``; ``batch`` fixes the batch size."""
    names = [f"in{i}" for i in range(len(inputs))]
    inputs = tuple(value[: batch or 3] for value in inputs)
    with _quiet():
        if dynamo:
            axes = None if batch else tuple({0: torch.export.Dim("batch")} for _ in inputs)
            torch.onnx.export(
                model, inputs, str(path), dynamo=True, dynamic_shapes=axes, external_data=False, input_names=names, verbose=False
            )  # fmt: skip
        else:
            axes = None if batch else {name: {0: "batch"} for name in names}
            torch.onnx.export(
                model, inputs, str(path), dynamo=False, dynamic_axes=axes, opset_version=17, input_names=names
            )
    return path


def run(path, data):
    """The outputs of a file in ONNX Runtime."""
    runtime = session(path, 1)
    feed = {slot.name: np.asarray(data[slot.name]) for slot in runtime.get_inputs()}
    return runtime.run(None, feed)
