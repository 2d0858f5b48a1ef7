"""The model card: what it says of the weights, and of the run behind them."""

import json

import pytest
import timm
from safetensors import safe_open
from test_weights_push import checkpoint, results


@pytest.mark.slow
def test_what_the_file_and_the_card_say(hub, client, tmp_path):
    file, _ = checkpoint(tmp_path / 'run', model_kwargs=dict(carry='raw'), num_classes=7, lr=0.1, epochs=20)
    labels = tmp_path / 'labels.txt'
    labels.write_text('\n'.join('abcdefg'), encoding='utf-8')
    status, _, err = client.push(file, '--repo-id', 'org/net', '--labels', labels)
    assert status == 0, err
    files = hub.files('org/net')
    (tmp_path / 'model.safetensors').write_bytes(files['model.safetensors'])
    with safe_open(tmp_path / 'model.safetensors', framework='pt') as f:
        metadata = f.metadata()
    assert (
        metadata['format'] == 'pt' and metadata['model'] == 'regnet_convgru_20' and metadata['timm'] == timm.__version__
    )
    assert json.loads(metadata['model_args']) == dict(carry='raw')
    assert json.loads(files['config.json'])['label_names'] == list('abcdefg')
    readme = files['README.md'].decode()
    assert 'accuracy | not measured' in readme and 'model-index' not in readme
    assert 'lr 0.1' in readme and '20 epochs behind these weights' in readme
    # what was pushed can be pushed from again, and does not need its arguments told
    status, _, err = client.push(tmp_path / 'model.safetensors', '--repo-id', 'org/again')
    assert status == 0, err
    assert json.loads(hub.files('org/again')['config.json'])['model_args'] == dict(carry='raw')


@pytest.mark.slow
def test_the_figures_are_those_of_the_run(hub, client, tmp_path):
    table = results(tmp_path, {}, dict(run='resnet', model='cifar_resnet_20', top1='90.0'))
    file, _ = checkpoint(tmp_path / 'run')
    assert client.push(file, '--repo-id', 'org/net', '--results', table)[0] == 0
    readme = hub.files('org/net')['README.md'].decode()
    assert 'value: 90.5' in readme and '| `cifar_resnet_20` |' in readme and '+0.50' in readme
    assert 'train_recipes/cifar_paper.yaml --model regnet_convgru_20 --data-dir DIR --seed 42' in readme
    # the card is brought up to date, the weights stay
    table = results(tmp_path, dict(top1='90.7', best_top1='91.0'))
    assert client.push(file, '--repo-id', 'org/net', '--results', table)[0] == 0
    readme = hub.files('org/net')['README.md'].decode()
    assert 'value: 90.7' in readme and '91.0' not in readme and len(hub.commits('org/net')) == 3
    # and pushing the same again changes nothing
    assert client.push(file, '--repo-id', 'org/net', '--results', table)[0] == 0
    assert len(hub.commits('org/net')) == 3
