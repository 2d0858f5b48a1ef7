"""Beyond classification: a RegNet and its ResNet segment handwritten digits in clutter, at equal budget.

    pip install '.[examples]' && python examples/segmentation.py

Scenes are made on the spot from the 1,797 digits that scikit-learn ships: two digits among quarters of others. A pixel
is background, ink of a quarter, or ink of a whole digit, which only its surroundings tell. Test scenes are made of
digits that no training scene has. Two ways into a dense task, both with weights that start at random:

    features  timm's `features_only`: a 1x1 convolution per stage, enlarged and added, on the nets for small images
    unet      segmentation_models_pytorch's Unet with a `tu-` encoder, on ResNet-18's shape a quarter as wide

The nets of a pair see the same scenes in the same order for the same number of updates.
"""

import argparse
import statistics
import time
from typing import Dict, Iterator, Tuple

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_regnet_rnn  # noqa: F401  registers the models

CLASSES = 3  # background, clutter, digit
PAIRS = dict(features=('regnet_convlstm_20', 'cifar_resnet_20'), unet=('regnet_convlstm_18', 'resnet18'))
SIDES = dict(features=32, unet=64)  # of a scene; an encoder of ResNet-18's shape divides it by 32


def load_digits() -> Tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits (N, 8, 8) from 0 to 1: three quarters to train on, and the rest."""
    from sklearn.datasets import load_digits as load

    images = np.random.default_rng(0).permutation(load().images).astype(np.float32) / 16
    cut = len(images) * 3 // 4
    return images[:cut], images[cut:]


def put(scene, target, ink, scale, corner, label, rng) -> None:
    """Draw ink of a random strength into a scene, and its label into the target."""
    ink = np.kron(ink, np.ones((scale, scale), np.float32))
    place = tuple(slice(start, start + len(ink)) for start in corner)
    scene[place] = np.where(ink > 0.2, ink * rng.uniform(0.5, 1), scene[place])
    target[place][ink > 0.2] = label


def scenes(digits: np.ndarray, side: int, count: int, rng: np.random.Generator) -> Tuple[torch.Tensor, torch.Tensor]:
    """Scenes (count, 3, side, side) and the class of each pixel (count, side, side)."""
    scale = side // 16  # a digit is half as wide as its scene
    x = np.zeros((count, side, side), np.float32)
    y = np.zeros((count, side, side), np.int64)
    for scene, target in zip(x, y):
        for _ in range(12):
            top, left = 4 * rng.integers(2, size=2)
            piece = digits[rng.integers(len(digits))][top : top + 4, left : left + 4]
            put(scene, target, piece, scale, rng.integers(side - 4 * scale, size=2), 1, rng)
        for half in range(2):
            corner = rng.integers(side // 2), half * side // 2
            put(scene, target, digits[rng.integers(len(digits))], scale, corner, 2, rng)
        scene += rng.normal(0, 0.1, scene.shape)
    return torch.from_numpy(x)[:, None].expand(-1, 3, -1, -1), torch.from_numpy(y)


class Segmenter(nn.Module):
    """A backbone's features of every stage, one 1x1 convolution each, enlarged to the image and added."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = timm.create_model(name, features_only=True)
        self.heads = nn.ModuleList(nn.Conv2d(c, CLASSES, 1) for c in self.backbone.feature_info.channels())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, 3, H, W) of images (B, 3, H, W)."""
        maps = (head(f) for head, f in zip(self.heads, self.backbone(x)))
        return torch.stack([F.interpolate(m, x.shape[-2:], mode='bilinear') for m in maps]).sum(0)


def build(way: str, name: str) -> nn.Module:
    """A net for scenes, by one of the two ways."""
    if way == 'features':
        return Segmenter(name)
    import segmentation_models_pytorch as smp

    narrow = dict(channels=(16, 32, 64, 128), decoder_channels=(64, 32, 32, 16, 16))
    return smp.Unet(f'tu-{name}', encoder_weights=None, classes=CLASSES, **narrow)


def batches(digits: np.ndarray, side: int, updates: int, seed: int) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """As many batches of 16 new scenes, the same for the same seed."""
    rng = np.random.default_rng(seed)
    for _ in range(updates):
        yield scenes(digits, side, 16, rng)


def train(model: nn.Module, digits: np.ndarray, side: int, updates: int, seed: int) -> None:
    """AdamW, one cycle to 3e-3, on scenes that are new each time."""
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=updates + 1)
    for x, y in batches(digits, side, updates, seed):
        loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def mean_iou(model: nn.Module, digits: np.ndarray, side: int, count: int = 256) -> float:
    """Intersection over union in percent, the mean over the classes, on scenes of digits not seen."""
    model.eval()
    pairs = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    for x, y in batches(digits, side, count // 16, seed=10**6):
        found = model(x).argmax(1)
        pairs += torch.bincount((CLASSES * y + found).flatten(), minlength=CLASSES**2).view(CLASSES, CLASSES)
    both = pairs.diagonal()
    return 100 * (both / (pairs.sum(0) + pairs.sum(1) - both)).mean().item()


def main() -> None:
    """Train both nets of each pair for every seed and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--way', choices=(*PAIRS, 'both'), default='both', help='default: %(default)s')
    parser.add_argument('--updates', type=int, default=120, help='of 16 scenes each; default: %(default)s')
    parser.add_argument('--seeds', type=int, default=3, help='default: %(default)s')
    args = parser.parse_args()
    known, unseen = load_digits()
    for way in PAIRS if args.way == 'both' else (args.way,):
        found: Dict[str, list] = {name: [] for name in PAIRS[way]}
        for seed in range(args.seeds):
            for name in PAIRS[way]:
                torch.manual_seed(seed)
                model, start = build(way, name), time.perf_counter()
                train(model, known, SIDES[way], args.updates, seed)
                found[name].append(mean_iou(model, unseen, SIDES[way]))
                size = sum(p.numel() for p in model.parameters())
                took = time.perf_counter() - start
                iou = f'{found[name][-1]:.2f} % mean IoU'
                print(f'{way} {name} seed {seed}: {iou}, {size:,} parameters, {took:.0f} s', flush=True)
        gains = [ours - theirs for ours, theirs in zip(*found.values())]
        spread = f' ± {statistics.stdev(gains):.2f}' if len(gains) > 1 else ''
        print(f'{way}: {" - ".join(found)} = {statistics.mean(gains):+.2f}{spread} points of mean IoU')


if __name__ == '__main__':
    main()
