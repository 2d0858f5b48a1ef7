"""The data of a run, seen as train.py will see them."""

import os
import shutil
import struct
from pathlib import Path

import pytest
from fuzz_mutants import chunk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cli import call, refused
from timm.data import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder

from timm_regnet_rnn.training.data import Data, check_data, hold_out, read_classes, split_folder


@pytest.mark.slow
def test_empty_folders_are_no_classes(capsys, recorded, argv, data):
    (data / 'train' / '.ipynb_checkpoints').mkdir()
    assert call(capsys, *argv, '--dry-run')[0] == 0


# by the functions themselves


def draw(file, size=(8, 8)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size).save(file)


@pytest.mark.parametrize(
    'there, split, taken',
    [
        ('train', 'train', 'train'),
        ('training', 'train', 'training'),
        ('train', 'training', 'train'),
        ('val', 'validation', 'val'),
        ('eval', 'val', 'eval'),
        ('evaluation', 'valid', 'evaluation'),
        ('test', 'test[:10]', 'test'),
        ('mine', 'mine', 'mine'),
    ],
)
def test_the_folder_of_a_split_is_timms(tmp_path, there, split, taken):
    draw(tmp_path / there / 'a' / '0.png')
    draw(tmp_path / 'other' / 'b' / '0.png')
    assert split_folder(dict(data_dir=tmp_path), split) == tmp_path / taken
    assert split_folder(dict(data_dir=str(tmp_path)), split) == tmp_path / taken
    data = create_dataset('', str(tmp_path), split=split)
    assert [Path(data.reader.filename(0, absolute=True))] == [tmp_path / taken / 'a' / '0.png']


@pytest.mark.parametrize('split', ['train', 'validation', 'test', 'nosuch'])
def test_a_split_that_is_not_there(tmp_path, split):
    (tmp_path / 'holdout').mkdir()
    (tmp_path / split).write_text('no folder')
    with pytest.raises(ValueError, match=f'no folder {split!r} in'):
        split_folder(dict(data_dir=tmp_path), split)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(['cat', 'dog', 'a b', '10', '9', 'B', 'ä', 'n02']),
        st.lists(st.sampled_from(['0.png', '1.jpg', '2.PNG', '3.txt', '4.jpeg']), unique=True),
    )
)
def test_classes_are_timms(tmp_path_factory, classes):
    """Names, their order and the number of images, as timm's own reader has them; other files are none."""
    root = tmp_path_factory.mktemp('data')
    for name, files in classes.items():
        (root / name).mkdir()
        for file in files:
            (root / name / file).write_bytes(b'')
    images = {name: [f for f in files if not f.endswith('.txt')] for name, files in classes.items()}
    if not any(images.values()):
        with pytest.raises(ValueError, match='no image in'):
            read_classes(root)
        return
    counts, first = read_classes(root)
    reader = ReaderImageFolder(str(root))
    assert [*counts] == sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    assert counts == {name: len(files) for name, files in images.items() if files}
    assert {name: file.parent for name, file in first.items()} == {name: root / name for name in counts}
    assert all(file.is_file() and file.suffix != '.txt' for file in first.values())


def test_images_in_the_wrong_place(tmp_path):
    draw(tmp_path / 'cat' / '0.png')
    draw(tmp_path / 'cat' / 'indoor' / '1.png')
    with pytest.raises(ValueError, match="of class 'cat': timm would take 'indoor' for its class"):
        read_classes(tmp_path)
    shutil.rmtree(tmp_path / 'cat' / 'indoor')
    assert read_classes(tmp_path) == (dict(cat=1), dict(cat=tmp_path / 'cat' / '0.png'))
    draw(tmp_path / '2.png')
    with pytest.raises(ValueError, match='lies beside the class folders'):
        read_classes(tmp_path)


def told(root, **changes):
    """train.py's options, as far as the data depend on them."""
    settings = dict(dataset='', data_dir=root, dataset_download=False, train_split='train', val_split='test')
    return {**settings, 'num_classes': None, 'scale': [0.08, 1.0], 'ratio': [1.0, 1.0], 'input_size': None, **changes}


def test_what_training_will_read(data):
    assert check_data(told(data)) == Data(8, ('cat', 'dog'))
    assert check_data(told(data, num_classes=2)) == Data(8, ('cat', 'dog'))
    exact = dict(scale=[0.64, 0.64], input_size=[3, 32, 32])
    assert check_data(told(data, **exact)).images == 8  # 32 of 40
    assert check_data(told(data, scale=[0.64, 0.64])).images == 8
    for changes, words in (
        (dict(num_classes=3), 'the data have 2 classes, the recipe 3; give --num-classes 2'),
        (
            dict(train_split='test', **exact),
            'out of training images of 40x40; these are 32x32. `prepare_data.py --pad 4`',
        ),
        (
            dict(scale=[0.25, 0.25], input_size=[3, 32, 32]),
            'images of 64x64; these are 40x40. `prepare_data.py --pad 16`',
        ),
        (dict(data_dir=data / 'none'), 'no data folder'),
        (dict(dataset='torch/cifar10'), 'no torch/cifar10 in'),
        (dict(dataset='torch/nosuch'), "timm knows no data set 'torch/nosuch'"),
    ):
        with pytest.raises(ValueError) as caught:
            check_data(told(data, **changes))
        assert words in str(caught.value) and '\n' not in str(caught.value), caught.value


def test_data_that_cannot_be_known_before(tmp_path):
    assert check_data(told(tmp_path, dataset='hfds/org/name')) == Data(0, ())
    assert check_data(told(tmp_path / 'none', dataset='torch/cifar10', dataset_download=True)) == Data()


@pytest.mark.parametrize('what', ['pipe', 'link', 'bomb', 'large', 'cut', 'text'])
def test_a_first_image_that_cannot_be_read(what, tmp_path, data, recwarn):
    """Neither waited for nor read without end; one line."""
    file = data / 'train' / 'cat' / '0.png'
    good = file.read_bytes()
    file.unlink()
    if what == 'pipe':
        os.mkfifo(file)
    elif what == 'link':
        file.symlink_to('/dev/zero')
    else:
        head = dict(bomb=2**31 - 1, large=12_000).get(what)
        body = (
            b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', head, head, 8, 2, 0, 0, 0))
            if head
            else good[:40]
        )
        file.write_bytes(b'text' if what == 'text' else body)
    wanted = dict(dataset='', data_dir=str(data), train_split='train', val_split='test', num_classes=2)
    wanted.update(dataset_download=False, scale=[1, 1], ratio=[1, 1], input_size=[3, 32, 32])
    with pytest.raises(ValueError, match='cannot read .*0.png'):
        check_data(wanted)
    assert not recwarn.list


@pytest.fixture
def photos(tmp_path):
    """A folder of three classes without splits, of 10, 3 and 2 images, each image another one."""
    for name, count in (('cat', 10), ('dog', 3), ('ä b', 2)):
        for i in range(count):
            draw(tmp_path / 'photos' / name / f'{i}.png', size=(8 + i, 8))
    (tmp_path / 'photos' / 'notes').mkdir()
    (tmp_path / 'photos' / 'cat' / 'notes.txt').write_text('no image')
    return tmp_path / 'photos'


def files(root):
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob('*') if file.is_file()}


def test_split(capsys, photos, tmp_path):
    """Every image is in one of the two, of each class a share and at least one; the same each time."""
    before = files(photos)
    status, out, _ = call(capsys, 'split', photos, '--to', tmp_path / 'new' / 'data')
    assert status == 0 and out == f'{tmp_path}/new/data: 3 classes, 11 images in train/, 4 in val/\n'
    train, val = files(tmp_path / 'new' / 'data' / 'train'), files(tmp_path / 'new' / 'data' / 'val')
    assert len(train) == 11 and len(val) == 4 and not train.keys() & val.keys()
    assert {**train, **val} == {name: data for name, data in before.items() if not name.endswith('.txt')}
    assert files(photos) == before and list((tmp_path / 'new').iterdir()) == [tmp_path / 'new' / 'data']
    assert hold_out(photos, tmp_path / 'again') == {'cat': (8, 2), 'dog': (2, 1), 'ä b': (1, 1)}
    assert files(tmp_path / 'again' / 'val') == val
    assert hold_out(photos, tmp_path / 'most', 0.99) == {'cat': (1, 9), 'dog': (1, 2), 'ä b': (1, 1)}
    settings = told(tmp_path / 'again', val_split='val')
    assert check_data(settings) == Data(11, ('cat', 'dog', 'ä b'))


def test_split_copies_where_there_are_no_links(photos, tmp_path, monkeypatch):
    monkeypatch.setattr('os.link', lambda *_: (_ for _ in ()).throw(OSError('no links here')))
    hold_out(photos, tmp_path / 'data')
    assert len(files(tmp_path / 'data')) == 15


@pytest.mark.parametrize(
    'change, words, message',
    [
        (lambda p: None, ['--held-out', '1'], 'must be between 0 and 1, got 1.0'),
        (lambda p: None, ['--held-out', 'nan'], 'must be between 0 and 1, got nan'),
        (lambda p: (p.parent / 'data').mkdir(), [], "data' exists; give --to another one"),
        (lambda p: None, ['--to', 'photos/data'], "'photos/data' would lie in 'photos', among its classes"),
        (lambda p: shutil.rmtree(p), [], "no folder 'photos'"),
        (lambda p: (p / 'val').mkdir(), [], "'photos' holds splits, not classes: val;"),
        (lambda p: [shutil.rmtree(p / name) for name in ('dog', 'ä b')], [], "of two classes or more, got 'cat'"),
        (lambda p: (p / 'dog' / '0.png').rename(p / '0.png'), [], 'lies beside the class folders'),
        (lambda p: draw(p / 'dog' / 'old' / '9.png'), [], "timm would take 'old' for its class"),
        (lambda p: (p / 'dog' / '9.png').symlink_to('/dev/zero'), [], "dog/9.png' is no regular file"),
        (lambda p: (p / 'ä b' / '0.png').unlink(), [], "class 'ä b' has one image"),
    ],
)
def test_split_refuses(capsys, photos, tmp_path, monkeypatch, change, words, message):
    monkeypatch.chdir(tmp_path)
    change(photos)
    before = sorted(tmp_path.rglob('*'))
    assert message in refused(capsys, 'split', 'photos', '--to', 'data', *words)
    assert sorted(tmp_path.rglob('*')) == before


def test_a_folder_without_splits_is_told_of_split(photos):
    told_of = told(photos, val_split='validation')
    with pytest.raises(ValueError, match=f"no folder 'train' .* `timm-regnet-rnn split {photos} --to NEW` makes both"):
        check_data(told_of)
    photos.rename(photos.parent / 'train')
    with pytest.raises(ValueError, match=f"no folder 'validation' .* split {photos.parent}/train --to NEW` makes both"):
        check_data({**told_of, 'data_dir': photos.parent})
    with pytest.raises(ValueError, match=r"no folder 'test' .* with a folder per class in it\.$"):  # which it makes not
        check_data({**told_of, 'data_dir': photos.parent, 'val_split': 'test'})
