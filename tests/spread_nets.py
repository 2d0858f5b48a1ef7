"""CIFAR ResNets as others write them, for tests of what a warm start can read."""

import torch
from conftest import randomize
from torch import nn
from torch.nn import functional as F


class PadShortcut(nn.Module):
    """Type A of He et al.: every other pixel, and zeros for the new channels, half of them before."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.width // 4, self.width // 4))


class Block(nn.Module):
    def __init__(self, inside, width, stride, shortcut):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        down = [nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width)]
        side = PadShortcut(width) if shortcut == 'A' else nn.Sequential(*down)
        self.downsample = side if stride > 1 else nn.Sequential()

    def forward(self, x):
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.downsample(x))


class SpreadNet(nn.Module):
    """Depth 6n + 2; with shortcuts of type A the head is `linear`, with convolutions it is `fc`."""

    def __init__(self, depth, classes=10, shortcut='A'):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, width in enumerate((16, 32, 64), 1):
            blocks = [Block(max(16, width // 2), width, 2 if stage > 1 else 1, shortcut)]
            blocks += [Block(width, width, 1, shortcut) for _ in range((depth - 2) // 6 - 1)]
            setattr(self, f'layer{stage}', nn.Sequential(*blocks))
        self.head = 'linear' if shortcut == 'A' else 'fc'
        setattr(self, self.head, nn.Linear(64, classes))
        randomize(self).eval()

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return getattr(self, self.head)(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
