"""The paper's Fig. 1 on released weights: the trained classifier after earlier blocks, and what successive blocks add.

    python train_recipes/early_exit.py --data-dir DIR NAME.TAG ...    # a folder of classes per split; --split test

For each of the last three blocks of the net's last stage (Fig. 1(b)): average pooling and the trained classifier behind
that block, nothing trained again, top-1 in percent. Between blocks of one stage (Fig. 1(a)): the cosine similarity of
their residual branches' outputs, what each adds to its shortcut, as a mean over images and pairs; the more alike, the
less a block finds that the one before it had not. The rows go to early_exit.csv; results.py makes a table and a plot.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any, Dict, List

import timm
import torch
from timm.data import create_dataset, create_transform, resolve_data_config

import timm_regnet_rnn  # noqa: F401  registers the models
from timm_regnet_rnn.errors import Parser, UsageError, run_command
from timm_regnet_rnn.images import image_mode
from timm_regnet_rnn.results import EARLY_EXIT

HOME = Path(__file__).resolve().parent


def residual(block: torch.nn.Module) -> torch.nn.Module:
    """The module whose output is the block's residual branch, which the shortcut joins."""
    if getattr(block, 'se', None) is not None:
        return block.se
    return block.bn3 if hasattr(block, 'bn3') else block.bn2


@torch.no_grad()
def early_exit(model: torch.nn.Module, batches: Any) -> Dict[str, Any]:
    """Accuracy behind the last blocks, and likeness of successive residual branches.

    Args:
        model: A ResNet or RegNet with its classifier, in eval mode.
        batches: Pairs of images (B, C, H, W) and labels (B,).

    Returns:
        `top1`, a list of percentages, one for each of the last (at most three) blocks of the last stage; `cosine`, a
        mean from -1 to 1; `images`, how many were seen.
    """
    stages = [[*stage] for name, stage in model.named_children() if name.startswith('layer') and len(stage)]
    last = stages[-1][-3:]
    features: Dict[torch.nn.Module, torch.Tensor] = {}
    branches: Dict[torch.nn.Module, torch.Tensor] = {}
    # a net adds the shortcut in place, so what a branch gave has to be copied
    hooks = [b.register_forward_hook(lambda block, _, out: features.update({block: out})) for b in last]
    for block in (block for stage in stages for block in stage):
        keep = lambda _, __, out, block=block: branches.update({block: out.flatten(1).clone()})  # noqa: E731
        hooks.append(residual(block).register_forward_hook(keep))
    right, cosine, images = torch.zeros(len(last), dtype=torch.long), 0.0, 0
    try:
        for x, target in batches:
            model(x)
            exits = torch.stack([model.forward_head(features[block]).argmax(1) for block in last])
            right += (exits == target).sum(1)
            pairs = [
                torch.cosine_similarity(branches[a], branches[b]).mean()
                for stage in stages
                for a, b in zip(stage, stage[1:])
                if branches[a].shape == branches[b].shape
            ]
            cosine += torch.stack(pairs).mean().item() * len(x)
            images += len(x)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(top1=[100 * n.item() / images for n in right], cosine=cosine / images, images=images)


def measure(name: str, data_dir: str, split: str) -> Dict[str, Any]:
    """A row of early_exit.csv."""
    if not (Path(data_dir) / split).is_dir():
        raise UsageError(
            f'no folder {split!r} in {data_dir!r}; --data-dir holds a folder per split, with one per class.'
        )
    model = timm.create_model(name, pretrained=True).eval()
    config = resolve_data_config(model=model, use_test_size=True)
    mode = image_mode(config['input_size'][0])
    dataset = create_dataset('', root=data_dir, split=split, input_img_mode=mode, transform=create_transform(**config))
    if len(dataset.reader.class_to_idx) != model.num_classes:
        found = len(dataset.reader.class_to_idx)
        raise UsageError(f'{name} has {model.num_classes} classes, {data_dir!r} {found}: another data set.')
    found = early_exit(model, torch.utils.data.DataLoader(dataset, batch_size=100))
    tops = [f'{value:.2f}' for value in found['top1']]
    return dict(zip(EARLY_EXIT, [name, found['images'], *([''] * (3 - len(tops))), *tops, f'{found["cosine"]:.4f}']))


def main(argv: Any = None, file: Path = HOME / 'early_exit.csv') -> int:
    """Exit status: 0, 2 after one line for what is wrong."""
    parser = Parser(prog='early_exit.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='+', metavar='NAME.TAG', help='released weights')
    parser.add_argument('--data-dir', required=True, metavar='DIR')
    parser.add_argument('--split', default='test', help='default: test')

    def run() -> int:
        args = parser.parse_args(argv)
        rows: List[Dict[str, Any]] = []
        if file.is_file():
            with open(file, newline='', encoding='utf-8') as old:
                rows = [row for row in csv.DictReader(old) if row['weights'] not in args.names]
        rows += [measure(name, args.data_dir, args.split) for name in args.names]
        scratch = file.with_suffix('.tmp')
        with open(scratch, 'w', newline='', encoding='utf-8') as new:
            writer = csv.DictWriter(new, EARLY_EXIT, lineterminator='\n')
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: row['weights']))
        scratch.replace(file)
        return 0

    return run_command(parser.prog, run)


if __name__ == '__main__':
    sys.exit(main())
