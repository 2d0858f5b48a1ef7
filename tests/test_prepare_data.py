"""train_recipes/prepare_data.py, on miniature sources in the formats of the real ones."""

import dataclasses
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import pickle
import random
import runpy
import struct
import sys
import tarfile
import threading
import zipfile
from pathlib import Path, PurePosixPath

import hypothesis
import numpy as np
import pytest
import timm
from fuzz_mutants import chunk
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_dataset, create_transform
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

SCRIPT = Path(__file__).parents[1] / 'train_recipes' / 'prepare_data.py'
_spec = importlib.util.spec_from_file_location('prepare_data', SCRIPT)
prepare_data = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(prepare_data)

CIFAR10_NAMES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
CIFAR100_TEXT = (  # the labels of the real data set, in their order
    'apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle '
    'caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant '
    'flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man '
    'maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree '
    'plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper '
    'snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train '
    'trout tulip turtle wardrobe whale willow_tree wolf woman worm'
)
CIFAR100_NAMES = CIFAR100_TEXT.split()
FASHION_NAMES = [
    '0_t-shirt',
    '1_trouser',
    '2_pullover',
    '3_dress',
    '4_coat',
    '5_sandal',
    '6_shirt',
    '7_sneaker',
    '8_bag',
]
FASHION_NAMES += ['9_ankle_boot']
KINDS = ('cifar10', 'cifar10_jpeg75', 'cifar100', 'fashion_mnist')


@dataclasses.dataclass
class Mini:
    kind: str
    source: Path
    names: list
    images: dict  # split -> list of (label, pixels)

    def run(self, to, *args):
        return prepare_data.main([self.kind, '--to', str(to), '--from', str(self.source), *args])

    def expect(self, monkeypatch, **changes):
        new = dataclasses.replace(prepare_data.SOURCES[self.kind], **changes)
        monkeypatch.setitem(prepare_data.SOURCES, self.kind, new)


def md5(data):
    return hashlib.md5(data).hexdigest()


def tar_bytes(members, mode):
    """An archive of (name or TarInfo, content)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for info, data in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def jpeg_bytes(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, 'jpeg', quality=75)
    return buffer.getvalue()


def draw(classes, side, channels):
    """Two training images and one test image per class, in mixed order."""
    rng = np.random.default_rng(0)
    shape = (side, side, channels)[: 3 if channels > 1 else 2]
    labels = {'train': rng.permutation(np.repeat(np.arange(classes), 2)), 'test': rng.permutation(classes)}
    return {s: [(int(y), rng.integers(0, 256, shape, dtype=np.uint8)) for y in ys] for s, ys in labels.items()}


def cifar_members(images, key, names, names_key, files):
    for split, file in zip(('train', 'test'), files):
        labels, pixels = zip(*images[split])
        rows = np.stack(pixels).transpose(0, 3, 1, 2).reshape(len(labels), -1)
        yield file, pickle.dumps({'data': rows, key: list(labels)})
    yield files[2], pickle.dumps({names_key: names})


def make(kind, folder, monkeypatch):
    """Write the miniature source below `folder` and let the script's table expect it."""
    names = {'cifar100': CIFAR100_NAMES, 'fashion_mnist': FASHION_NAMES}.get(kind, CIFAR10_NAMES)
    grey = kind == 'fashion_mnist'
    images = draw(len(names), 28 if grey else 32, 1 if grey else 3)
    changes = {}
    if grey:
        source, sums = folder / 'idx', {}
        source.mkdir()
        for split, prefix in (('train', 'train'), ('test', 't10k')):
            labels, pixels = zip(*images[split])
            n = len(labels)
            for name, data in (
                (f'{prefix}-images-idx3-ubyte.gz', struct.pack('>4i', 2051, n, 28, 28) + np.stack(pixels).tobytes()),
                (f'{prefix}-labels-idx1-ubyte.gz', struct.pack('>2i', 2049, n) + bytes(labels)),
            ):
                (source / name).write_bytes(gzip.compress(data))
                sums[name] = hashlib.sha256(data).hexdigest()
    elif kind == 'cifar10_jpeg75':
        source = folder / 'mirror.tar.xz'
        members = [
            (f'{split}/{names[label]}/{i:04d}.jpg', jpeg_bytes(pixels))
            for split in images
            for i, (label, pixels) in enumerate(images[split])
        ]
        source.write_bytes(tar_bytes(members, 'w:xz'))
        sums = {'mirror.tar.xz': hashlib.sha256(source.read_bytes()).hexdigest()}
    else:
        base = CIFAR100 if kind == 'cifar100' else CIFAR10
        fine = kind == 'cifar100'
        files = ('train', 'test', 'meta') if fine else ('data_batch_1', 'test_batch', 'batches.meta')
        members = dict(cifar_members(images, 'fine_labels' if fine else 'labels', names, base.meta['key'], files))
        source = folder / base.filename
        source.write_bytes(tar_bytes([(f'{base.base_folder}/{k}', v) for k, v in members.items()], 'w:gz'))
        sums = {base.filename: md5(source.read_bytes())}

        class Reader(base):
            tgz_md5 = sums[base.filename]
            train_list = [[files[0], md5(members[files[0]])]]
            test_list = [[files[1], md5(members[files[1]])]]
            meta = dict(base.meta, md5=md5(members[files[2]]))

        changes['reader'] = Reader
    mini = Mini(kind, source, names, images)
    mini.expect(monkeypatch, sums=sums, train=len(images['train']), test=len(images['test']), **changes)
    return mini


@pytest.fixture
def place(tmp_path):
    """The folder in which a test lets the script make its DIR; what is around it must not change."""
    (tmp_path / 'around' / 'place').mkdir(parents=True)
    return tmp_path / 'around' / 'place'


@pytest.fixture(params=KINDS)
def mini(request, tmp_path, monkeypatch):
    return make(request.param, tmp_path, monkeypatch)


@pytest.fixture
def jpeg(tmp_path, monkeypatch):
    return make('cifar10_jpeg75', tmp_path, monkeypatch)


def snapshot(folder):
    """Bytes and modification times of all there is below a folder."""
    return {
        p: (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in (folder, *sorted(folder.rglob('*')))
    }


def refused(capsys, status, *words):
    """The script said why in one line."""
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith('prepare_data: ') and captured.err.count('\n') == 1, captured.err
    assert all(word in captured.err for word in words), captured.err


def by_content(folder, names):
    """(label, pixels) of a split, found by folder."""
    files = sorted(folder.rglob('*.*'), key=lambda p: p.name)
    return [(names.index(p.parent.name), np.asarray(Image.open(p))) for p in files]


def assert_same(found, want):
    assert [label for label, _ in found] == [label for label, _ in want]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, want))


def stored(mini, split):
    """The images of a source as they come out of it, JPEG's losses included."""
    if mini.kind != 'cifar10_jpeg75':
        return mini.images[split]
    return [(y, np.asarray(Image.open(io.BytesIO(jpeg_bytes(pixels))))) for y, pixels in mini.images[split]]


def test_round_trip(mini, place, capsys):
    assert mini.run(place / 'data') == 0
    n = len(mini.names)
    assert f'ready: {place / "data"} (train {2 * n}, test {n}, {n} classes)' in capsys.readouterr().out
    for split in ('train', 'test'):
        assert sorted(p.name for p in (place / 'data' / split).iterdir()) == mini.names
        assert_same(by_content(place / 'data' / split, mini.names), stored(mini, split))
        reader = create_dataset('', root=str(place / 'data'), split=split).reader  # as train.py makes it
        assert reader.class_to_idx == {name: i for i, name in enumerate(mini.names)}
    suffixes = {p.suffix for p in (place / 'data').rglob('*.*')} - {'.json'}
    assert suffixes == {'.jpg' if mini.kind == 'cifar10_jpeg75' else '.png'}
    assert [p.name for p in place.iterdir()] == ['data']


def test_jpeg_files_are_not_encoded_again(jpeg, place):
    assert jpeg.run(place / 'data') == 0
    written = sorted(p.read_bytes() for p in (place / 'data').rglob('*.jpg'))
    assert written == sorted(jpeg_bytes(pixels) for split in jpeg.images.values() for _, pixels in split)


def test_pad(mini, place):
    assert mini.run(place / 'data', '--pad', '4') == 0
    colour = 73 if mini.kind == 'fashion_mnist' else (125, 123, 114)
    found = by_content(place / 'data' / 'train', mini.names)
    assert_same([(label, pixels[4:-4, 4:-4]) for label, pixels in found], stored(mini, 'train'))
    for _, pixels in found:
        border = np.ones(pixels.shape[:2], dtype=bool)
        border[4:-4, 4:-4] = False
        assert (pixels[border] == colour).all()
    assert {p.suffix for p in (place / 'data' / 'train').rglob('*.*')} == {'.png'}
    assert_same(by_content(place / 'data' / 'test', mini.names), stored(mini, 'test'))


def test_border_is_the_mean_of_the_models():
    mean = timm.create_model('cifar_resnet_20').default_cfg['mean']
    for kind in ('cifar10', 'cifar10_jpeg75', 'cifar100'):
        assert prepare_data.SOURCES[kind].mean == tuple(round(255 * m) for m in mean)


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic', 'random'])
@pytest.mark.parametrize('kind,side', [('cifar10_jpeg75', 32), ('fashion_mnist', 28)])
def test_random_resized_crop_of_padded_images_is_pad_and_crop(
    kind, side, interpolation, tmp_path, monkeypatch, place, capsys
):
    make(kind, tmp_path, monkeypatch).run(place / 'data', '--pad', '4')
    words = capsys.readouterr().out.split()
    scale = tuple(map(float, words[words.index('--scale') + 1 :][:2]))  # what the script tells to use
    ratio = tuple(map(float, words[words.index('--ratio') + 1 :][:2]))
    assert ratio == (1, 1) and (side != 32 or scale == (0.64, 0.64))
    transform = create_transform(
        (3, side, side),
        is_training=True,
        use_prefetcher=True,  # as train.py does: bytes, not yet normalised
        scale=scale,
        ratio=ratio,
        hflip=0,
        color_jitter=None,
        interpolation=interpolation,
    )
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (side + 8, side + 8, 3), dtype=np.uint8)  # resampling would change noise
    pixels[..., 0], pixels[..., 1] = np.mgrid[: side + 8, : side + 8]  # rows and columns count themselves
    image, seen = Image.fromarray(pixels), set()
    random.seed(0)
    for _ in range(1500):
        crop = np.moveaxis(np.asarray(transform(image)), 0, -1)
        i, j = map(int, crop[0, 0, :2])
        assert np.array_equal(crop, pixels[i : i + side, j : j + side])
        seen.add((i, j))
    assert seen == {(i, j) for i in range(9) for j in range(9)}


@pytest.mark.parametrize('pad', ['0', '4'])
def test_second_run_changes_nothing(mini, place, pad, capsys):
    assert mini.run(place / 'data', '--pad', pad) == 0
    before = snapshot(place)
    assert mini.run(place / 'data', '--pad', pad) == 0
    assert prepare_data.main([mini.kind, '--to', str(place / 'data'), '--pad', pad]) == 0  # needs no source
    assert capsys.readouterr().out.count('already there: ') == 2
    assert snapshot(place) == before


def test_empty_folder_is_taken(jpeg, place):
    (place / 'data').mkdir()
    assert jpeg.run(place / 'data') == 0
    assert json.loads((place / 'data' / 'prepared.json').read_text())['train'] == 20


def test_other_folder_is_left_alone(jpeg, place, capsys):
    def others():
        (place / 'file').write_text('mine')
        (place / 'mine' / 'train').mkdir(parents=True)
        (place / 'broken').mkdir()
        (place / 'broken' / 'prepared.json').write_text('[]')
        for name in ('other_pad', 'incomplete', 'no_class'):
            assert jpeg.run(place / name, '--pad', str(int(name == 'other_pad'))) == 0
        next((place / 'incomplete' / 'train').rglob('*.jpg')).unlink()
        for path in (place / 'no_class' / 'test' / 'dog').iterdir():
            path.unlink()
        (place / 'no_class' / 'test' / 'dog').rmdir()
        return sorted(place.iterdir())

    paths = others()
    before = snapshot(place)
    capsys.readouterr()
    for path in paths:
        refused(capsys, jpeg.run(path), str(path))
    assert snapshot(place) == before


def test_other_data_set_is_left_alone(tmp_path, monkeypatch, place, capsys):
    cifar10 = make('cifar10', tmp_path, monkeypatch)
    assert cifar10.run(place / 'data') == 0
    before = snapshot(place)
    capsys.readouterr()
    refused(capsys, make('cifar10_jpeg75', tmp_path, monkeypatch).run(place / 'data'), 'is not cifar10_jpeg75')
    assert snapshot(place) == before


def sources(mini):
    return sorted(mini.source.iterdir()) if mini.source.is_dir() else [mini.source]


@pytest.mark.parametrize(
    'spoil',
    [
        pytest.param(lambda path, data: path.unlink(), id='missing'),
        pytest.param(lambda path, data: path.write_bytes(b''), id='empty'),
        pytest.param(lambda path, data: path.write_bytes(data[: len(data) // 2]), id='truncated'),
        pytest.param(lambda path, data: path.write_bytes(b'no archive'), id='no-archive'),
        pytest.param(lambda path, data: path.write_bytes(gzip.compress(data)), id='another'),
        pytest.param(
            lambda path, data: path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]), id='one-bit'
        ),
    ],
)
def test_bad_source(mini, place, spoil, capsys):
    for path in sources(mini):
        good = path.read_bytes()
        spoil(path, good)
        before = snapshot(place)
        refused(capsys, mini.run(place / 'data'), str(path))
        assert snapshot(place) == before
        path.write_bytes(good)
    assert mini.run(place / 'data') == 0  # the sources were what was wrong


def test_source_of_the_other_kind(mini, tmp_path, place, capsys):
    (tmp_path / 'wrong').mkdir()
    mini.source = sources(mini)[0] if mini.source.is_dir() else tmp_path / 'wrong'
    refused(capsys, mini.run(place / 'data'), 'no file')
    assert list(place.iterdir()) == []


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


BAD_MEMBERS = {
    'no-name': ['.'],
    'parent': ['../x.jpg'],
    'grandparent': ['../../x.jpg'],
    'inner-parent': ['train/../../x.jpg'],
    'absolute': ['{around}/x.jpg'],
    'double-slash': ['/{around}/x.jpg'],
    'symlink': [link('train/cat/link', '{around}'), 'train/cat/link/x.jpg'],
    'relative-symlink': [link('train/cat/link', '../../../..'), 'train/cat/link/x.jpg'],
    'symlink-inside': [link('train/cat/x.jpg', '0000.jpg')],
    'hardlink': [link('train/cat/x.jpg', '{around}/secret', tarfile.LNKTYPE)],
    'device': [link('train/cat/x.jpg', '', tarfile.CHRTYPE)],
    'fifo': [link('train/cat/x.jpg', '', tarfile.FIFOTYPE)],
}


@pytest.mark.parametrize('bad', BAD_MEMBERS)
@pytest.mark.parametrize('kind,pad', [('cifar10', '0'), ('cifar10_jpeg75', '0'), ('cifar10_jpeg75', '4')])
def test_archive_member_that_leaves(kind, bad, pad, tmp_path, monkeypatch, place, capsys):
    mini = make(kind, tmp_path, monkeypatch)
    around = place.parent
    (around / 'secret').write_text('mine')
    with tarfile.open(mini.source) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    for info in BAD_MEMBERS[bad]:
        if isinstance(info, str):
            members.append((info.format(around=around), b'' if kind == 'cifar10' else members[0][1]))
        else:
            members.append((link(info.name, info.linkname.format(around=around), info.type), b''))
    named = members[-len(BAD_MEMBERS[bad])][0]
    data = tar_bytes(members, 'w:xz')
    mini.source.write_bytes(data)
    mini.expect(monkeypatch, sums={mini.source.name: md5(data)})
    before = snapshot(around)
    refused(capsys, mini.run(place / 'data', '--pad', pad), getattr(named, 'name', named))
    after = snapshot(around)
    assert after.keys() == before.keys()
    assert all(after[path][1] == content for path, (_, content) in before.items())


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(
    st.one_of(
        st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), min_size=1, max_size=40),
        st.lists(st.sampled_from(['..', '.', '', 'train', 'cat', '~', 'C:', '\\', '...']), min_size=1).map('/'.join),
    ),
    st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]),
    st.sampled_from(['', '.', '..', '/', 'train']),
)
def test_any_member_stays_below_the_root(name, kind, target):
    root = Path('/no/such/root')
    archive = tar_bytes([(link(name, target, kind), b'')], 'w')
    try:
        found = list(prepare_data.members(archive, root))
    except (prepare_data.UsageError, tarfile.TarError):
        outside = name.startswith('/') or '..' in name.split('/') or not PurePosixPath(name).parts
        assert outside or kind not in (tarfile.REGTYPE, tarfile.DIRTYPE)  # nothing harmless is refused
    else:
        for path, _ in found:
            resolved = (root / path).resolve()
            assert kind == tarfile.REGTYPE and resolved.is_relative_to(root) and '..' not in resolved.parts


def test_pickle_with_a_wrong_sum_is_not_loaded(tmp_path, monkeypatch, place, capsys):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'loaded',)

    mini = make('cifar10', tmp_path, monkeypatch)
    with tarfile.open(mini.source) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    for spoilt in range(3):
        changed = [(name, pickle.dumps(Bomb()) if i == spoilt else data) for i, (name, data) in enumerate(members)]
        data = tar_bytes(changed, 'w:gz')
        mini.source.write_bytes(data)
        mini.expect(monkeypatch, sums={CIFAR10.filename: md5(data)})
        refused(capsys, mini.run(place / 'data'), 'corrupted')
        assert not (tmp_path / 'loaded').exists() and list(place.iterdir()) == []


def test_no_archive_behind_a_right_sum(jpeg, monkeypatch, place, capsys):
    jpeg.source.write_bytes(b'no archive')
    jpeg.expect(monkeypatch, sums={'mirror.tar.xz': md5(b'no archive')})
    refused(capsys, jpeg.run(place / 'data'))
    assert list(place.iterdir()) == []


@pytest.mark.parametrize('wrong', [{'train': 10}, {'test': 20}, {'classes': 5}])
def test_wrong_counts_leave_nothing(wrong, jpeg, monkeypatch, place, capsys):
    jpeg.expect(monkeypatch, **wrong)
    refused(capsys, jpeg.run(place / 'data'), 'expected')
    assert list(place.iterdir()) == []


def test_unequal_classes_leave_nothing(jpeg, monkeypatch, place, capsys):
    image = jpeg_bytes(jpeg.images['train'][0][1])
    members = [(f'{split}/{name}/0.jpg', image) for split in ('train', 'test') for name in jpeg.names]
    members += [(f'train/{name}/{i}.jpg', image) for name, i in [*((n, 1) for n in jpeg.names[2:]), ('dog', 2)]]
    data = tar_bytes([*members, ('train/cat/2.jpg', image)], 'w')
    jpeg.source.write_bytes(data)
    jpeg.expect(monkeypatch, sums={'mirror.tar.xz': md5(data)})
    refused(capsys, jpeg.run(place / 'data'), '20 images in 10 classes')
    assert list(place.iterdir()) == []


def test_interrupted_run_leaves_nothing(mini, monkeypatch, place):
    real, calls = prepare_data.write, []

    def write(path, data):
        calls.append(path)
        if len(calls) == 15:
            raise KeyboardInterrupt
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, 'write', write)
        assert mini.run(place / 'data') == 130
    assert calls[5].exists() is False and list(place.iterdir()) == []
    assert mini.run(place / 'data') == 0


def test_killed_run_is_started_anew(mini, place):
    for name in ('train/cat/left.png', 'unpacked/left', 'left'):
        prepare_data.write(place / 'data.partial' / name, b'left')
    assert mini.run(place / 'data') == 0
    assert [p.name for p in place.iterdir()] == ['data'] and not list((place / 'data').rglob('left*'))
    assert sorted(p.name for p in (place / 'data').iterdir()) == ['prepared.json', 'test', 'train']


def test_full_disk(mini, monkeypatch, place, capsys):
    usage = prepare_data.shutil.disk_usage(place)
    monkeypatch.setattr(prepare_data.shutil, 'disk_usage', lambda path: usage._replace(free=100_000))
    refused(capsys, mini.run(place / 'deep' / 'data'), 'MB')
    assert list(place.iterdir()) == []


@pytest.fixture
def server(tmp_path):
    """An address where the files in tmp_path / 'public' can be had."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / 'public')

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, kwargs=dict(poll_interval=0.01)).start()
        yield f'http://127.0.0.1:{httpd.server_address[1]}/'
        httpd.shutdown()


@pytest.mark.parametrize('kind', ['cifar10', 'cifar100', 'fashion_mnist'])
def test_download(kind, server, tmp_path, monkeypatch, place, capsys):
    mini = make(kind, tmp_path, monkeypatch)
    files = {path.name: path.read_bytes() for path in sources(mini)}
    mini.expect(
        monkeypatch,
        reader=type(
            'Reader',
            (prepare_data.SOURCES[kind].reader,),
            dict(url=f'{server}{mini.source.name}', mirrors=[server], resources=[(k, md5(v)) for k, v in files.items()])
            if kind == 'fashion_mnist'
            else dict(url=f'{server}{mini.source.name}'),
        ),
    )
    first = ['--to', str(place / 'data')]
    assert prepare_data.main([kind, *first]) == 2  # the server has nothing yet
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f'prepare_data: cannot fetch {server}') and '404' in error and '--from' in error
    assert not (place / 'data').exists()
    for name, data in files.items():
        prepare_data.write(tmp_path / 'public' / name, data)
    assert prepare_data.main([kind, *first]) == 0
    assert {p.name: p.read_bytes() for p in (place / 'downloads').iterdir()} == files
    for split in ('train', 'test'):
        assert_same(by_content(place / 'data' / split, mini.names), mini.images[split])
    for name in files:
        (tmp_path / 'public' / name).unlink()  # what the first run has fetched must do
    second = ['--to', str(tmp_path / 'padded'), '--pad', '1', '--download', str(place / 'downloads')]
    assert prepare_data.main([kind, *second]) == 0


def test_nothing_to_download(place, capsys):
    refused(capsys, prepare_data.main(['cifar10_jpeg75', '--to', str(place / 'data')]), '--from')
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    'args,word',
    [
        (['mnist', '--to', 'x'], "'mnist'"),
        (['cifar10', '--to', 'x', '--pad', '-1'], '-1'),
        (['cifar10', '--to', 'x', '--pad', '1.5'], '1.5'),
        (['cifar10'], '--to'),
    ],
)
def test_wrong_arguments(args, word, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(args)
    refused(capsys, stop.value.code, word)
    assert list(place.iterdir()) == []


def test_as_a_program(place, monkeypatch, capsys):
    missing = str(place / 'none.tar.gz')
    monkeypatch.setattr(sys, 'argv', [str(SCRIPT), 'cifar10', '--to', str(place / 'data'), '--from', missing])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name='__main__')
    refused(capsys, stop.value.code, f'no file {missing!r}.')


def test_table_matches_torchvision():
    assert prepare_data.SOURCES['fashion_mnist'].sums.keys() == {name for name, _ in FashionMNIST.resources}
    assert prepare_data.class_folders(FashionMNIST.classes) == FASHION_NAMES
    assert prepare_data.class_folders(CIFAR100_NAMES) == CIFAR100_NAMES and len(CIFAR100_NAMES) == 100
    many = [f'c{i}' for i in range(11)][::-1]
    assert sorted(prepare_data.class_folders(many)) == prepare_data.class_folders(many)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Four classes of the official layout, three training images and one validation image each, as a folder."""
    rng, root = np.random.default_rng(0), tmp_path / 'tiny-imagenet-200'
    wnids, lines = ['n04', 'n02', 'n03', 'n01'], []
    (root / 'val' / 'images').mkdir(parents=True)
    for k, wnid in enumerate(wnids):
        (root / 'train' / wnid / 'images').mkdir(parents=True)
        for i in range(3):
            image = jpeg_bytes(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
            (root / 'train' / wnid / 'images' / f'{wnid}_{i}.JPEG').write_bytes(image)
        name = f'val_{k}.JPEG'
        (root / 'val' / 'images' / name).write_bytes(jpeg_bytes(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)))
        lines.append(f'{name}\t{wnid}\t0\t0\t9\t9\n')
    (root / 'val' / 'val_annotations.txt').write_text(''.join(lines))
    (root / 'wnids.txt').write_text('\n'.join(wnids))
    (root / 'words.txt').write_text(''.join(f'{wnid}\tword {wnid}, another\n' for wnid in [*wnids, 'n09']))
    layout = prepare_data.TinyImageNet(root)
    list(layout.images())
    sums = {'tiny-imagenet-200': layout.digest.hexdigest()}
    changes = dict(sums=sums, train=12, test=4, classes=4)
    monkeypatch.setitem(
        prepare_data.SOURCES, 'tiny-imagenet', dataclasses.replace(prepare_data.SOURCES['tiny-imagenet'], **changes)
    )
    return root


def prepare_tiny(source, to, *args):
    return prepare_data.main(['tiny-imagenet', '--to', str(to), '--from', str(source), *map(str, args)])


def test_tiny_imagenet_at_its_size_keeps_the_files(tiny, tmp_path):
    """From a folder, the folder above it, and an archive; the same files."""
    archive = tmp_path / 'tiny.zip'
    with zipfile.ZipFile(archive, 'w') as z:
        for file in sorted(tiny.rglob('*')):
            z.write(file, file.relative_to(tmp_path))
    for i, source in enumerate((tiny, tmp_path, archive)):
        assert prepare_tiny(source, tmp_path / f'out{i}') == 0
    outs = [tmp_path / f'out{i}' for i in range(3)]
    made = [{p.relative_to(out): p.read_bytes() for p in out.rglob('*') if p.is_file()} for out in outs]
    assert made[0] == made[1] == made[2]
    one = tmp_path / 'out0' / 'train' / 'n02' / 'n02_1.JPEG'
    assert one.read_bytes() == (tiny / 'train' / 'n02' / 'images' / 'n02_1.JPEG').read_bytes()
    about = json.loads((tmp_path / 'out0' / 'prepared.json').read_text())
    assert about['dataset'] == 'tiny_imagenet4_64' and about['class_names'][0] == 'word n01'
    assert (tmp_path / 'out0' / 'test' / 'n04' / 'val_0.JPEG').is_file()


def test_tiny_imagenet_is_averaged_by_area(tiny, tmp_path):
    """Each pixel is the mean of the 2x2 it covers, of the first classes by their ids, stored without loss."""
    assert prepare_tiny(tiny, tmp_path / 'out', '--size', 32, '--classes', 2) == 0
    assert sorted(p.name for p in (tmp_path / 'out' / 'train').iterdir()) == ['n01', 'n02']
    with Image.open(tiny / 'train' / 'n01' / 'images' / 'n01_0.JPEG') as image:
        pixels = np.asarray(image, dtype=float).reshape(32, 2, 32, 2, 3).mean((1, 3))
    with Image.open(tmp_path / 'out' / 'train' / 'n01' / 'n01_0.png') as image:
        assert abs(np.asarray(image) - pixels).max() <= 1  # Pillow rounds rows and columns apart
    assert json.loads((tmp_path / 'out' / 'prepared.json').read_text())['dataset'] == 'tiny_imagenet2_32'


def test_held_out_images_are_the_last_of_each_class(tiny, tmp_path, capsys):
    assert prepare_tiny(tiny, tmp_path / 'out', '--held-out', 4) == 0
    assert '--val-split val' in capsys.readouterr().out
    for wnid in ('n01', 'n02', 'n03', 'n04'):
        names = [sorted(p.name for p in (tmp_path / 'out' / split / wnid).iterdir()) for split in ('train', 'val')]
        assert names == [[f'{wnid}_0.JPEG', f'{wnid}_1.JPEG'], [f'{wnid}_2.JPEG']]
    assert prepare_tiny(tiny, tmp_path / 'out', '--held-out', 4) == 0
    assert 'already there' in capsys.readouterr().out


@pytest.mark.parametrize(
    'spoil, args, words',
    [
        (lambda root: (root / 'words.txt').unlink(), (), 'not the layout'),
        (lambda root: (root / 'words.txt').write_text('n01\tx\n'), (), 'not the layout'),
        (lambda root: (root / 'val' / 'images' / 'val_0.JPEG').unlink(), (), 'have the sum'),
        (lambda root: (root / 'train' / 'n01' / 'images' / 'n01_0.JPEG').write_bytes(b'x'), (), 'have the sum'),
        (lambda root: (root / 'train' / 'n01' / 'images' / 'n01_0.JPEG').write_bytes(b'x'), ('--size', 32), 'identify'),
        (lambda root: None, ('--held-out', 3), '--held-out must be a multiple of 4'),
        (lambda root: None, ('--held-out', 12), '--held-out must be a multiple of 4'),
    ],
)
def test_bad_tiny_imagenet(spoil, args, words, tiny, tmp_path, capsys):
    spoil(tiny)
    assert prepare_tiny(tiny, tmp_path / 'out', *args) == 2
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1 and not list(tmp_path.glob('out*'))


def test_sizes_are_for_tiny_imagenet(tmp_path, capsys):
    for args in (['cifar10', '--size', '16'], ['tiny-imagenet', '--size', '65'], ['tiny-imagenet', '--classes', '0']):
        with pytest.raises(SystemExit) as e:
            prepare_data.main([*args, '--to', str(tmp_path / 'out')])
        assert e.value.code == 2 and capsys.readouterr().err.count('\n') == 1


BOMB = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 40_000, 40_000, 8, 2, 0, 0, 0))


@pytest.mark.parametrize('content', [b'', b'GIF89a', BOMB, jpeg_bytes(np.zeros((32, 32, 3), np.uint8))[:200]])
def test_a_picture_that_cannot_be_read_is_one_line(content, tiny, tmp_path, capsys):
    (tiny / 'train' / 'n02' / 'images' / 'n02_1.JPEG').write_bytes(content)
    refused(capsys, prepare_tiny(tiny, tmp_path / 'out', '--size', 32), 'cannot read the image', 'n02_1.JPEG')
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'out.partial').exists()


@pytest.mark.parametrize('pad', ['0', '4'])
def test_a_stream_that_ends_early_is_one_line(jpeg, pad, monkeypatch, place, capsys):
    """Though its sum be right."""
    jpeg.source.write_bytes(jpeg.source.read_bytes()[:-2000])
    jpeg.expect(monkeypatch, sums={jpeg.source.name: md5(jpeg.source.read_bytes())})
    refused(capsys, jpeg.run(place / 'data', '--pad', pad), 'end')
    assert list(place.iterdir()) == []
