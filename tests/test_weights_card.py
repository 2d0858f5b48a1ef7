"""The model card: what it says of the weights, and of the run behind them."""

import json
from argparse import Namespace

import pytest
import timm
import torch
from safetensors import safe_open
from test_weights_push import ROW, checkpoint, results
from timm.data import resolve_data_config

from timm_regnet_rnn.results import parse
from timm_regnet_rnn.weights.card import compare, describe, make_card, sizes
from timm_regnet_rnn.weights.folder import Trained, rebuild


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


# by the functions themselves


@pytest.mark.parametrize(
    'name, words',
    [
        ('regnet_convlstm_50', 'a ResNet whose blocks share a ConvLSTM that runs along depth'),
        ('seregnet_convgru_20.tag', 'an SE-ResNet for small images whose blocks share a ConvGRU that'),
        ('regnet_convrnn_110', 'a ResNet for small images whose blocks share a ConvRNN that'),
        ('cifar_resnet_20', 'a ResNet for small images, without a regulator: what its RegNet is measured against'),
        ('cifar_seresnet_56', 'an SE-ResNet for small images, without a regulator: what'),
    ],
)
def test_a_model_in_words(name, words):
    assert describe(name).startswith(words) and '\n' not in describe(name)


def run_of(**changes):
    return parse({**ROW, **changes})


def groups_of(*runs):
    groups = {}
    for run in runs:
        groups.setdefault(run.group, {}).setdefault(run.label, []).append(run)
    return groups


def test_a_model_beside_its_resnet():
    regnet, resnet = run_of(), run_of(run='resnet', model='cifar_resnet_20', top1='90.0')
    table = compare(regnet, groups_of(regnet, resnet))
    rows = [line for line in table.splitlines() if line.startswith('| `')]
    assert [row.split('`')[1] for row in rows] == ['cifar_resnet_20', 'regnet_convgru_20'] and '+0.50' in rows[1]
    none = 'No ResNet was trained beside these very weights'
    assert compare(None, {}).startswith(none) and compare(regnet, groups_of(regnet)).startswith(none)
    for other in (dict(epochs='19', best_epoch='19'), dict(dataset='CIFAR-100'), dict(processes='2')):  # another table
        lone = run_of(run='resnet', model='cifar_resnet_20', **other)
        assert compare(regnet, groups_of(regnet, lone)).startswith(none)
    assert compare(resnet, groups_of(regnet, resnet)).startswith(none)  # a ResNet itself
    tagged = run_of(model='regnet_convlstm_18.resnet18_a1_in1k')
    assert compare(tagged, groups_of(tagged)).startswith(none)


def trained(name='regnet_convgru_20', settings=None, **args):
    """A model as `rebuild` would give it."""
    model = timm.create_model(name, **args).eval()
    data_config = dict(resolve_data_config(model=model), mean=(0.5, 0.25, 0.125))
    args = {key: value for key, value in args.items() if key != 'num_classes'}
    return Trained(model, name, args, settings or {}, data_config=data_config, labels=[*'abcd'])


def test_arguments_that_build_it_anew():
    net = trained(num_classes=4, regulated_stages=(2,))
    assert sizes(net) == dict(regulated_stages=(2,), num_classes=4, in_chans=3)
    twin = timm.create_model(net.name, **sizes(net))
    assert twin.state_dict().keys() == net.model.state_dict().keys()


def test_a_card_of_what_is_not_known():
    card = make_card(trained(num_classes=4, carry='raw'), 'org/net')
    text, data = card.text, card.data.to_dict()
    assert "`regnet_convgru_20, carry='raw'`" in text and '| classes | 4: a, b, c, d |' in text
    assert f'| parameters | {(310_106 - 6 * 65) / 1e6:.3f} M |' in text  # six outputs fewer than CIFAR-10's
    assert '| image size, mean, std | 32x32, 0.5 0.25 0.125, ' in text
    assert '| data set | not recorded |' in text and '| accuracy | not measured |' in text
    assert 'Not recorded in the checkpoint.' in text and '```sh' not in text and 'One run with one seed' not in text
    assert not {'datasets', 'metrics', 'base_model', 'model-index'} & data.keys() and data['license'] == 'apache-2.0'
    assert 'timm' in data['tags'] and text.startswith('\n# net\n') and "'hf-hub:org/net'" in text


def test_a_card_of_a_run():
    """What was measured here wins over the table; the JPEG mirror is said to be lossy."""
    net = trained(settings=dict(data_dir='/data', dataset='', lr=0.1))
    run = run_of(dataset='CIFAR-10, JPEG q75 mirror', weights='ema', overrides='--lr 0.2')
    card = make_card(net, 'org/net', run, groups=groups_of(run))
    assert '| top-1, top-5 | 90.50 %, 99.50 % on its test split, after the last of 20 epochs; one run |' in card.text
    assert 'With the recipe `cifar_paper`, 20 epochs, seed 42, averaged weights (EMA)' in card.text
    command = 'timm-regnet-rnn train train_recipes/cifar_paper.yaml --model regnet_convgru_20 --data-dir DIR --seed 42'
    assert f'\n{command} --lr 0.2\n' in card.text
    assert 'lossy JPEG mirror' in card.text and card.data.to_dict()['datasets'] == ['uoft-cs/cifar10']
    assert [(r.metric_name, r.metric_value) for r in card.data.eval_results] == [
        ('Top-1 accuracy (%)', 90.5),
        ('Top-5 accuracy (%)', 99.5),
    ]
    measured = dict(top1=25.0, top5=75.0, images=12_000, split='validation')
    card = make_card(net, 'org/net', run, measured=measured, groups=groups_of(run))
    assert '25.00 %, 75.00 % on its 12,000 validation images, after the last of 20 epochs; one run' in card.text
    assert {r.dataset_split for r in card.data.eval_results} == {'validation'}


@pytest.mark.parametrize(
    'settings, base',
    [
        (dict(pretrained=True), 'timm/resnet18.a1_in1k'),
        (dict(pretrained=False), None),
        (dict(pretrained=True, pretrained_path='mine.pth'), None),
        (dict(pretrained=True, initial_checkpoint='mine.pth'), None),
        ({}, None),
    ],
)
def test_what_it_was_trained_from_is_said_only_where_it_is_proved(settings, base):
    net = trained('regnet_convlstm_18.resnet18_a1_in1k', settings, num_classes=4)
    assert make_card(net, 'org/net').data.to_dict().get('base_model') == base


def test_a_fine_tuned_checkpoint_says_what_it_started_from(tmp_path):
    args = Namespace(model='regnet_convlstm_18.resnet18_a1_in1k', model_kwargs={}, pretrained=True, seed=0)
    net = timm.create_model('regnet_convlstm_18', num_classes=3)
    torch.save(dict(state_dict=net.state_dict(), args=args, epoch=1, optimizer={}), tmp_path / 'last.pth.tar')
    assert make_card(rebuild(tmp_path), 'org/net').data.to_dict()['base_model'] == 'timm/resnet18.a1_in1k'


def test_a_recipe_of_somebodys_own_is_not_called_ours():
    net = trained(settings=dict(data_dir='/data', dataset=''))
    assert 'timm-regnet-rnn train mine.yaml --model' in make_card(net, 'org/net', run_of(recipe='mine')).text
