"""The model card: model_card.md filled from results.csv, the manifest and the model itself."""

from pathlib import Path
from typing import Any, Dict, Optional

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import results
from ..complexity import complexity
from ..names import CIFAR_DEPTHS, parse_name
from .folder import Trained

HOME = Path(__file__).resolve().parent

# Data set -> its id on the Hub.
DATASETS = {
    'CIFAR-10': 'uoft-cs/cifar10',
    'CIFAR-10, JPEG q75 mirror': 'uoft-cs/cifar10',
    'CIFAR-100': 'uoft-cs/cifar100',
    'Fashion-MNIST': 'zalando-datasets/fashion_mnist',
    'ImageNet-1k': 'ILSVRC/imagenet-1k',
}
CELLS = dict(convrnn='ConvRNN', convgru='ConvGRU', convlstm='ConvLSTM')
SETTINGS = ('epochs', 'batch_size', 'opt', 'lr', 'weight_decay', 'sched', 'seed')


def describe(name: str) -> str:
    """A model's name in words."""
    parts = parse_name(name)
    kind, cell = 'an SE-ResNet' if parts.se else 'a ResNet', CELLS.get(parts.cell)
    size = ' for small images' if parts.depth in CIFAR_DEPTHS else ''
    if cell is None:
        return f'{kind}{size}, without a regulator: what its RegNet is measured against'
    return f'{kind}{size} whose blocks share a {cell} that runs along depth and remembers what the shortcut forgets'


def compare(run: Optional[results.Run], groups: Dict[Any, Any]) -> str:
    """The table of a run's model and its ResNet, trained alike."""
    resnet = run and results.resnet_of(run.label)
    rows = groups.get(run.group, {}) if run else {}
    if run is None or not resnet or not {resnet, run.label} <= rows.keys():
        return (
            'No ResNet was trained beside these very weights, so they are no evidence for or against the regulator. '
            'Runs side by side are in the README of timm_regnet_rnn.'
        )
    return results.table({run.group: {label: rows[label] for label in (resnet, run.label)}})


def make_card(
    trained: Trained,
    repo_id: str,
    run: Optional[results.Run] = None,
    entry: Optional[Dict[str, Any]] = None,
    measured: Optional[Dict[str, Any]] = None,
    groups: Optional[Dict[Any, Any]] = None,
    license: str = 'apache-2.0',
) -> ModelCard:
    """The card of a model.

    Args:
        trained: The model.
        repo_id: ORG/NAME.
        run: Its row of results.csv.
        entry: Its entry in the manifest.
        measured: What `evaluate` found.
        groups: All rows of results.csv, for the comparison.
    """
    name = trained.name.split('.')[0]
    counts = complexity(
        timm.create_model(name, device='meta', **sizes(trained)).eval(), trained.data_config['input_size']
    )
    facts = {**(entry or {}), **(run._asdict() if run else {})}
    dataset = facts.get('dataset') or trained.dataset
    epochs, recipe = facts.get('epochs') or trained.epochs, facts.get('recipe') and Path(facts['recipe']).stem
    metrics = dict(measured or (entry or {}).get('metrics') or {})
    where = f'on its {metrics["images"]:,} {metrics["split"]} images' if metrics else 'on its test split'
    if run and not measured:
        metrics.update(top1=run.top1, top5=run.top5)
    last = 'the last of ' if run or entry else ''  # of other checkpoints it is not known
    metrics = metrics and dict(
        metrics, where=f'{where}, after {last}{epochs or "an unknown number of"} epochs; one run'
    )
    command = training = ''
    if recipe:
        average = ', averaged weights (EMA)' if facts['weights'] == 'ema' else ''
        training = (
            f"With the recipe `{recipe}`, {epochs} epochs, seed {facts['seed']}{average}, by timm's own train.py."
        )
        started = name if entry else trained.name  # from a tag, where it was fine-tuned
        file = f'train_recipes/{recipe}.yaml' if recipe in results.EPOCHS else f'{recipe}.yaml'  # or somebody's own
        words = f'timm-regnet-rnn train {file} --model {started} --data-dir DIR'
        kwargs = f' --model-kwargs {run.model_kwargs}' if run and run.model_kwargs else ''
        command = f'{words} --seed {facts["seed"]}{kwargs} {facts.get("overrides") or ""}'.rstrip()
    elif trained.settings:
        said = ', '.join(f'{key} {trained.settings[key]}' for key in SETTINGS if trained.settings.get(key) is not None)
        training = f"By timm's own train.py: {said}; {epochs or 'an unknown number of'} epochs behind these weights."
    # only what the run proves: weights that timm fetched by name, not a file that took their place
    cfg: Any = timm.get_pretrained_cfg(trained.name)
    own = trained.settings.get('pretrained_path') or trained.settings.get('initial_checkpoint')
    base = cfg.hf_hub_id if trained.settings.get('pretrained') and not own else None
    limits = ['It classifies; it was not tested for anything else, nor for fairness or robustness.']
    if 'JPEG' in dataset:
        limits.append('Its data are a lossy JPEG mirror: compare its figures with those from the same files only.')
    if metrics:
        limits.append('One run with one seed; how far seeds differ was not measured.')
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=facts.get('license', license),
        datasets=[DATASETS[dataset]] if dataset in DATASETS else None,
        tags=['image-classification', 'timm', 'transformers', 'regnet', 'timm-regnet-rnn', 'arxiv:2101.00590'],
        base_model=base,
        metrics=['accuracy'] if metrics else None,
        model_name=repo_id.split('/')[-1],
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=DATASETS.get(dataset, 'imagefolder'),
                dataset_name=dataset or 'unnamed',
                dataset_split=metrics.get('split', 'test'),
                metric_type='accuracy',
                metric_name=f'{title} accuracy (%)',
                metric_value=metrics[key],
            )
            for key, title in (('top1', 'Top-1'), ('top5', 'Top-5'))
        ]
        if metrics
        else None,
    )
    config = trained.data_config
    return ModelCard.from_template(
        data,
        template_path=str(HOME / 'model_card.md'),
        title=repo_id.split('/')[-1],
        repo_id=repo_id,
        what=describe(name),
        call=', '.join([name, *(f'{key}={value!r}' for key, value in trained.args.items())]),
        params=counts['params'],
        macs=counts['macs'],
        input_size=config['input_size'],
        mean=config['mean'],
        std=config['std'],
        num_classes=trained.model.num_classes,
        labels=trained.labels if len(trained.labels) <= 20 else None,
        dataset=dataset,
        metrics=metrics,
        training=training or 'Not recorded in the checkpoint.',
        command=command,
        comparison=compare(run, groups or {}),
        limits=limits,
    )


def sizes(trained: Trained) -> Dict[str, Any]:
    """Arguments that build the model anew."""
    channels = trained.data_config['input_size'][0]
    return dict(trained.args, num_classes=trained.model.num_classes, in_chans=channels)
