"""The data sets' names, labels and statistics, and how the data set of a run is told."""

import dataclasses
import json

import pytest
from torchvision.datasets import FashionMNIST

from timm_regnet_rnn.datasets import DATASETS, class_folders, dataset_name, labels_of, labels_of_folders


@pytest.mark.parametrize('key', DATASETS)
def test_every_data_set_is_whole(key):
    dataset = DATASETS[key]
    channels = 1 if 'mnist' in key else 3
    assert len(dataset.mean) == len(dataset.std) == channels
    assert all(0 < value < 1 for value in (*dataset.mean, *dataset.std))
    assert len(dataset.labels) in (0, 10) and len({*dataset.labels}) == len(dataset.labels)
    assert labels_of(dataset.name) == dataset.labels


def test_names_are_one_data_sets_each():
    assert [*DATASETS] == ['cifar10', 'cifar10_jpeg75', 'cifar100', 'fashion_mnist', 'tiny_imagenet100_32']
    assert len({dataset.name for dataset in DATASETS.values()}) == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        DATASETS['cifar10'].name = 'mine'


def test_labels_are_torchvisions():
    """Of Fashion-MNIST too, but for the capitals; CIFAR-10's are those in its own files."""
    assert [name.lower() for name in FashionMNIST.classes] == [name.lower() for name in labels_of('Fashion-MNIST')]
    cifar10 = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
    assert [*labels_of('CIFAR-10')] == [*labels_of('CIFAR-10, JPEG q75 mirror')] == cifar10
    assert labels_of('CIFAR-100') == labels_of('mine') == labels_of('cifar10') == labels_of('') == ()


def test_folders_of_a_data_set_have_its_labels():
    """Prepared folders sort by number; the labels are the data set's own words. Other folders are their names."""
    for dataset in DATASETS.values():
        folders = class_folders(dataset.labels) if dataset.labels else ['a', 'b']
        assert folders == sorted(folders) and [*labels_of_folders(folders)] == [*(dataset.labels or folders)]
    assert class_folders(labels_of('Fashion-MNIST'))[::9] == ['0_t-shirt', '9_ankle_boot']
    assert labels_of_folders(['0_t-shirt', '1_trouser']) == ['0_t-shirt', '1_trouser'] and labels_of_folders([]) == []


@pytest.mark.parametrize(
    'dataset, noted, found',
    [
        ('torch/cifar10', None, ('cifar10', 'CIFAR-10')),
        ('torch/cifar10', 'fashion_mnist', ('cifar10', 'CIFAR-10')),  # what the recipe says is what is read
        ('hfds/org/name', None, ('name', 'name')),
        ('', 'cifar10_jpeg75', ('cifar10_jpeg75', 'CIFAR-10, JPEG q75 mirror')),
        (None, 'tiny_imagenet100_32', ('tiny_imagenet100_32', 'Tiny-ImageNet, first 100 classes, 32x32')),
        ('', 'other', ('other', 'other')),
        ('', None, ('flowers', 'flowers')),
        (None, None, ('flowers', 'flowers')),
    ],
)
def test_the_data_set_of_a_run(tmp_path, dataset, noted, found):
    folder = tmp_path / 'flowers'
    folder.mkdir()
    if noted:
        (folder / 'prepared.json').write_text(json.dumps(dict(dataset=noted)))
    for data_dir in (folder, str(folder), f'{folder}/', folder / '..' / 'flowers'):
        assert dataset_name(dict(dataset=dataset, data_dir=data_dir)) == found


def test_held_out_images_make_another_data_set(tmp_path):
    """Its rows stand in no table beside those of nets that saw every training image."""
    (tmp_path / 'prepared.json').write_text(json.dumps(dict(dataset='cifar10', held_out=5000)))
    key, name = dataset_name(dict(data_dir=tmp_path))
    assert (key, name) == ('cifar10-held5000', 'CIFAR-10, 5,000 training images held out')
    assert labels_of(name) == labels_of('CIFAR-10') != ()
    (tmp_path / 'prepared.json').write_text(json.dumps(dict(dataset='cifar10', held_out=0)))
    assert dataset_name(dict(data_dir=tmp_path)) == ('cifar10', 'CIFAR-10')


def test_the_folder_here_has_a_name_too(tmp_path, monkeypatch):
    (tmp_path / 'cats').mkdir()
    monkeypatch.chdir(tmp_path / 'cats')
    assert dataset_name(dict(data_dir='.')) == ('cats', 'cats')
    assert dataset_name(dict(data_dir=tmp_path / 'not' / 'there')) == ('there', 'there')
    assert dataset_name(dict(data_dir='a|b <c>`')) == ('a_b_c_', 'a_b_c_')  # no table is broken by it


@pytest.mark.parametrize(
    'text',
    [
        '',
        '{',
        '[]',
        '3',
        'null',
        '{}',
        '{"data": "cifar10"}',
        '["dataset"]',
        '\x00',
        '{"dataset": null}',
        '{"dataset": 3}',
        '{"dataset": "cifar10", "held_out": "5000"}',
        '{"dataset": "cifar10", "held_out": true}',
        '{"dataset": "cifar10", "held_out": -1}',
    ],
)
def test_a_damaged_note_is_said(tmp_path, text):
    (tmp_path / 'prepared.json').write_text(text)
    with pytest.raises(ValueError, match='is damaged: it does not say which data set this is.') as caught:
        dataset_name(dict(dataset='', data_dir=tmp_path))
    assert '\n' not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert dataset_name(dict(dataset='torch/cifar100', data_dir=tmp_path))[1] == 'CIFAR-100'  # and not asked needlessly


@pytest.mark.parametrize('settings', [dict(dataset=3, data_dir='a'), dict(dataset='a', data_dir=['a']), {}])
def test_settings_that_are_no_texts(settings):
    with pytest.raises(ValueError, match='dataset and data_dir must be texts'):
        dataset_name(settings)
