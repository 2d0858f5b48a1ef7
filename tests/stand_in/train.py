"""Stands in for timm's train.py, which is not in timm's package: its options as recorded, its checkpoints, its summary.

One update an epoch on the first images of the training split, in random order and with noise, through timm's own data
set, saver and resume functions; a data set that wants to know which epoch begins is told, as train.py tells it.
KILL_AFTER=N in the environment kills the process, without a chance to clean up, once N epochs are saved; PAUSE=S makes
every epoch S seconds longer.
"""

import argparse
import importlib
import json
import os
import signal
import time
from pathlib import Path

import torch
import yaml
from timm import utils
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.models import create_model, resume_checkpoint

OPTIONS = Path(__file__).parents[2] / 'train_recipes' / 'options.json'
config_parser = parser = argparse.ArgumentParser(add_help=False)
parser.add_argument('-c', '--config')
parser = argparse.ArgumentParser()
for name, option in json.loads(OPTIONS.read_text(encoding='utf-8'))['options'].items():
    more = {k: v for k, v in option.items() if k in ('default', 'nargs', 'choices')}
    if option['type'] == 'bool':
        more['action'] = 'store_true'
    elif option['type'] == 'kwargs':
        more['action'] = utils.ParseKwargs
    else:
        more['type'] = dict(int=int, float=float).get(option['type'], str)
    parser.add_argument(*(option['flags'] or [name]), **({'dest': name} if option['flags'] else {}), **more)


def main():
    config, rest = config_parser.parse_known_args()
    parser.set_defaults(**yaml.safe_load(Path(config.config).read_text(encoding='utf-8')))
    args = parser.parse_args(rest)
    for module in args.device_modules:
        importlib.import_module(module)
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    model = create_model(args.model, num_classes=args.num_classes, **args.model_kwargs).to(device)
    size = resolve_data_config(vars(args), model=model)['input_size']
    transform = create_transform(size, is_training=True, scale=args.scale, ratio=args.ratio)
    images = create_dataset(args.dataset, root=args.data_dir, split=args.train_split)
    images.transform = transform
    batch = [images[i] for i in range(0, len(images), max(1, len(images) // args.batch_size))]
    x, y = torch.stack([image for image, _ in batch]).to(device), torch.tensor([label for _, label in batch])
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    start = (resume_checkpoint(model, args.resume, optimizer) if args.resume else None) or 0
    trained = torch.nn.parallel.DistributedDataParallel(model, [device]) if args.distributed else model
    print(f'rank {args.rank} of {args.world_size} starts at epoch {start}', flush=True)
    folder = utils.get_outdir(args.output, args.experiment)
    saver = utils.CheckpointSaver(model, optimizer, args, checkpoint_dir=folder, max_history=args.checkpoint_hist)
    if utils.is_primary(args):
        Path(folder, 'args.yaml').write_text(yaml.safe_dump(vars(args)), encoding='utf-8')
    for epoch in range(start, args.epochs):
        time.sleep(float(os.environ.get('PAUSE', 0)))
        if hasattr(images, 'set_epoch'):
            images.set_epoch(epoch)
        order = torch.randperm(len(x))
        print(f'epoch {epoch} reads {order.tolist()}', flush=True)
        loss = torch.nn.functional.cross_entropy(trained(x[order] + torch.randn_like(x) / 9), y[order].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if utils.is_primary(args):
            speed = f'Time: 0.100s, {len(x)}.00/s  (0.100s, {100 + epoch}.00/s)'
            print(f'Train: {epoch} [   0/1 (100%)]  Loss: {loss:.3g}  {speed}  LR: {args.lr}', flush=True)
            metrics = dict(loss=2.0, top1=50.0 + 10 * (epoch == 1) + epoch, top5=99.0)
            summary = Path(folder, 'summary.csv')
            utils.update_summary(epoch, dict(loss=loss.item()), metrics, summary, args.lr, epoch == start)
            saver.save_checkpoint(epoch, metric=metrics['top1'])
            if os.environ.get('KILL_AFTER') == str(epoch + 1):
                os.kill(os.getpid(), signal.SIGKILL)
    if args.distributed:
        torch.distributed.destroy_process_group()
        os._exit(0)


if __name__ == '__main__':
    main()
