"""Make a data set ready for timm's train.py: image folders DIR/train/<class>/* and DIR/test/<class>/*.

    python prepare_data.py cifar10 --to DIR                                    # downloads, checks, writes PNG
    python prepare_data.py cifar100 --to DIR --from cifar-100-python.tar.gz    # an archive that is there already
    python prepare_data.py fashion_mnist --to DIR --from /usr/share/datasets/fashion-mnist  # Debian's package
    python prepare_data.py cifar10_jpeg75 --to DIR --from ARCHIVE --pad 4      # a lossy mirror of JPEG files
    python prepare_data.py tiny-imagenet --to DIR --from tiny-imagenet-200.zip --size 32 --classes 100  # or a folder

`--size N` averages the images down to NxN pixels by area and stores them as PNG, `--classes N` takes the first N by
WordNet id. `--held-out N` moves the last N training images, as many of each class, into val/: to choose a recipe on.

`--pad N` stores the training images as PNG with a border of N pixels in the mean colour. train.py has no padded random
crop, but its random resized crop draws a ratio of areas and an aspect: `--scale 0.64 0.64 --ratio 1 1`, that is
(32 / 40) ** 2, always cuts 32x32 pixels at one of 81 places out of a 40x40 image and pastes them without resampling.
That is "pad 4, crop 32" as in He et al., arXiv 1512.03385, section 4.2, and the border is zero, within half a grey
level, once the mean is subtracted. Test images stay as they are.
"""

import argparse
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import shutil
import sys
import tarfile
import warnings
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from huggingface_hub.utils import tqdm
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.datasets.utils import download_url

from timm_regnet_rnn.datasets import class_folders
from timm_regnet_rnn.errors import EXPECTED, Parser, UsageError, one_line, run_command


@dataclass(frozen=True)
class Source:
    """What a data set must be: nothing is written before the sums are right, nothing is kept with other counts."""

    sums: Mapping[str, str]  # file -> md5 or sha256; of a gzipped idx file, the sum of what it holds
    train: int
    test: int
    classes: int
    side: int
    mean: Tuple[int, ...]  # 0..255, one per channel, as the models' configurations subtract it
    reader: Optional[type] = None  # torchvision's class; none for an archive of image folders


CIFAR_MEAN = (125, 123, 114)  # 255 * (0.4914, 0.4822, 0.4465)
JPEG75_SUM = '18ee257832403cf6f3f79ff7db1e971124c3f510d031eb5c9213eee4dab66e51'
FASHION_SUMS = {  # torchvision's md5s are those of the .gz files, whose headers differ in Debian's package
    'train-images-idx3-ubyte.gz': 'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
    'train-labels-idx1-ubyte.gz': 'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
    't10k-images-idx3-ubyte.gz': '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
    't10k-labels-idx1-ubyte.gz': '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
}
TINY_MEAN = (123, 115, 102)  # of the 100,000 training images
# of (split/class/name, sha256) of all images in that order, whether they lie in the archive or in a folder
TINY_SUM = '0b018163055536a00eba7e150af6c22f409d1634ed60117a8b363d72f5cbb049'
SOURCES = {
    'cifar10': Source({CIFAR10.filename: CIFAR10.tgz_md5}, 50000, 10000, 10, 32, CIFAR_MEAN, CIFAR10),
    'cifar10_jpeg75': Source({'cifar10_jpeg.tar.xz': JPEG75_SUM}, 50000, 10000, 10, 32, CIFAR_MEAN),
    'cifar100': Source({CIFAR100.filename: CIFAR100.tgz_md5}, 50000, 10000, 100, 32, CIFAR_MEAN, CIFAR100),
    'tiny-imagenet': Source({'tiny-imagenet-200': TINY_SUM}, 100000, 10000, 200, 64, TINY_MEAN),
    'fashion_mnist': Source(FASHION_SUMS, 60000, 10000, 10, 28, (73,), FashionMNIST),  # 255 * 0.2860
}


def download(reader: type, folder: Path) -> Path:
    """Let torchvision fetch what is not in `folder` yet; returns what `--from` would name."""
    if issubclass(reader, FashionMNIST):
        files = [(reader.mirrors[0] + name, name, md5) for name, md5 in reader.resources]
    else:
        files = [(reader.url, reader.filename, reader.tgz_md5)]
    for url, name, md5 in files:
        try:
            download_url(url, folder, name, md5)
        except (OSError, RuntimeError) as e:
            what = f'the folder of the {len(files)} files' if len(files) > 1 else 'the file'
            raise UsageError(f'cannot fetch {url} ({e}); fetch it elsewhere, and give {what} by --from.') from None
    return folder if len(files) > 1 else folder / files[0][1]


def read_source(sums: Mapping[str, str], source: Path) -> Dict[str, bytes]:
    """The files of `source`, once all sums are right; what is unpacked later are these bytes, not the disk's."""
    contents = {}
    for name, want in sums.items():
        path, idx = (source / name, True) if len(sums) > 1 else (source, False)
        if not path.is_file():
            raise UsageError(f'no file {str(path)!r}.')
        algorithm = 'md5' if len(want) == 32 else 'sha256'
        try:
            contents[name] = gzip.decompress(path.read_bytes()) if idx else path.read_bytes()
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise UsageError(f'cannot unpack {str(path)!r}: {e}') from None
        got = hashlib.new(algorithm, contents[name]).hexdigest()
        if got != want:
            raise UsageError(f'{str(path)!r} has {algorithm} {got}, expected {want}: truncated, or another file.')
    return contents


def members(archive: bytes, root: Path) -> Iterator[Tuple[PurePosixPath, bytes]]:
    """Path and content of the files in a tar archive; raises at links, devices and what would leave `root`."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            # stricter than tarfile's filter, which takes links that stay inside and makes a of /a, and which Python has
            # since 3.10.12 and 3.11.4 only; where it is Windows' the name is read as Windows reads it
            plain = member.isdir() or (member.isfile() and path.parts)
            inside = (root / member.name).resolve().is_relative_to(root.resolve())
            if path.is_absolute() or '..' in path.parts or not plain or not inside:
                raise UsageError(f'the archive holds {member.name!r}, which leaves it or is no plain file.')
            if member.isfile():
                yield path, tar.extractfile(member).read()


def decoded(data: bytes, path: PurePosixPath) -> Image.Image:
    """The image in a file of a source.

    Raises:
        UsageError: It is none, or broken.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # a large picture is read, and a too large one is an error
            image = Image.open(io.BytesIO(data))
            image.load()
    except Exception as e:  # Pillow's decoders raise SyntaxError, IndexError, struct.error and more on broken files
        raise UsageError(f'cannot read the image {str(path)!r} ({one_line(e)}).') from None
    return image


def png(image: Image.Image, mean: Tuple[int, ...], pad: int) -> bytes:
    """The image as PNG, with a border of `pad` pixels."""
    mode = 'RGB' if len(mean) == 3 else 'L'
    padded = Image.new(mode, (image.width + 2 * pad, image.height + 2 * pad), mean)
    padded.paste(image.convert(mode), (pad, pad))
    buffer = io.BytesIO()
    padded.save(buffer, 'png', compress_level=1)
    return buffer.getvalue()


def write(path: Path, data: bytes):
    """Write a file, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def images(spec: Source, contents: Mapping[str, bytes], root: Path, pad: int) -> Iterator[Tuple[PurePosixPath, bytes]]:
    """Path below `root` and content of all image files."""
    if spec.reader is None:
        for path, data in members(*contents.values(), root):
            if pad and path.parts[0] == 'train':
                path, data = path.with_suffix('.png'), png(decoded(data, path), spec.mean, pad)
            yield path, data
        return
    unpacked = root / 'unpacked'
    for name, data in contents.items():
        idx = PurePosixPath(spec.reader.__name__, 'raw', name[: -len('.gz')])
        for path, file in [(idx, data)] if len(contents) > 1 else members(data, unpacked):
            write(unpacked / path, file)
    for split, border in (('train', pad), ('test', 0)):
        # CIFAR's files are pickles: torchvision loads them only if their md5s are right too
        data = spec.reader(unpacked, train=split == 'train', download=False)
        folders = class_folders(data.classes)
        for i, (image, label) in enumerate(data):
            yield PurePosixPath(split, folders[label], f'{i:05d}.png'), png(image, spec.mean, border)
    shutil.rmtree(unpacked)


class TinyImageNet:
    """The official layout in an archive or a folder: wnids.txt, words.txt, train/ID/images/*, val/images/* and a list.

    Attributes:
        classes: WordNet ids, in order.
        names: The first word of each class in WordNet.
        digest: A sum over the images read so far.
    """

    def __init__(self, source: Path) -> None:
        """
        Raises:
            UsageError: The source is neither, or lacks one of the lists.
        """
        self.digest = hashlib.sha256()
        if source.is_dir():
            self.root = source if (source / 'wnids.txt').is_file() else source / 'tiny-imagenet-200'
            self.read = self.read_file
            self.files = lambda folder: sorted(os.listdir(self.root / folder))
        elif source.is_file() and zipfile.is_zipfile(source):
            archive = zipfile.ZipFile(source)
            top = next((n[: -len('wnids.txt')] for n in archive.namelist() if n.endswith('wnids.txt')), '')
            held: Dict[str, List[str]] = {}
            for name in sorted(archive.namelist()):
                folder, _, file = name[len(top) :].rpartition('/')
                if file:
                    held.setdefault(folder, []).append(file)
            self.read = lambda name: archive.read(top + name)
            self.files = lambda folder: held.get(folder, [])
        else:
            raise UsageError(f'{str(source)!r} is neither tiny-imagenet-200.zip nor its folder.')
        try:
            self.classes = sorted(self.read('wnids.txt').decode().split())
            words = dict(line.split('\t') for line in self.read('words.txt').decode().splitlines())
            self.names = [words[wnid].split(',')[0] for wnid in self.classes]
            lines = self.read('val/val_annotations.txt').decode().splitlines()
            self.labels = {name: wnid for name, wnid, *_ in (line.split('\t') for line in lines)}
        except (OSError, KeyError, ValueError) as e:
            raise UsageError(f'{str(source)!r} is not the layout of tiny-imagenet-200 ({e}).') from None

    def read_file(self, name: str) -> bytes:
        """The content of a file of the folder."""
        if (self.root / name).exists() and not (self.root / name).is_file():
            raise OSError(f'{name!r} is no regular file')
        return (self.root / name).read_bytes()

    def images(self) -> Iterator[Tuple[PurePosixPath, bytes]]:
        """Path and content of every image, the official validation images as test/."""
        places = [
            (f'train/{c}/images/{name}', 'train', c) for c in self.classes for name in self.files(f'train/{c}/images')
        ]
        places += [(f'val/images/{name}', 'test', self.labels.get(name, '')) for name in self.files('val/images')]
        for place, split, wnid in places:
            path, data = PurePosixPath(split, wnid, PurePosixPath(place).name), self.read(place)
            self.digest.update(f'{path}\0'.encode() + hashlib.sha256(data).digest())
            yield path, data


def area_averaged(image: Image.Image, side: int) -> Image.Image:
    """An image of side x side pixels, each the mean of those it covers."""
    return image.convert('RGB').resize((side, side), Image.Resampling.BOX)


def tiny_images(
    tiny: TinyImageNet, spec: Source, pad: int, size: Optional[int], sums: Mapping[str, str]
) -> Iterator[Tuple[PurePosixPath, bytes]]:
    """Path and content of the files to write; at the end the sum of all images is checked, also those left out."""
    taken = set(tiny.classes[: spec.classes])
    for path, data in tiny.images():
        if path.parts[1] in taken:
            border = pad if path.parts[0] == 'train' else 0
            if size or border:
                image = decoded(data, path)
                image = area_averaged(image, size) if size else image
                path, data = path.with_suffix('.png'), png(image, spec.mean, border)
            yield path, data
    for name, want in sums.items():
        if tiny.digest.hexdigest() != want:
            raise UsageError(f'the images of {name} have the sum {tiny.digest.hexdigest()}, expected {want}.')


def hold_out(root: Path, count: int, classes: int) -> None:
    """Move the last training images of each class, by name, into val/; `count` of all classes together."""
    for folder in sorted((root / 'train').iterdir()):
        (root / 'val' / folder.name).mkdir(parents=True)
        for name in sorted(os.listdir(folder))[-(count // classes) :]:
            os.rename(folder / name, root / 'val' / folder.name / name)


def check_counts(spec: Source, root: Path, held_out: int = 0):
    """Raise UsageError unless the splits have as many images in as many equal classes as they must."""
    names: set = set()
    held = [('val', held_out)] if held_out else []
    for split, total in (('train', spec.train - held_out), ('test', spec.test), *held):
        counts = {folder.name: len(os.listdir(folder)) for folder in (root / split).iterdir()}
        names |= set(counts)
        if not len(counts) == len(names) == spec.classes or set(counts.values()) != {total // spec.classes}:
            found = f'{sum(counts.values())} images in {len(counts)} classes'
            raise UsageError(f'{str(root / split)!r} has {found}, expected {total} in {spec.classes} equal ones.')


def check_space(spec: Source, to: Path, pad: int):
    """Raise UsageError if the disk of `to` cannot take images that do not compress, and the unpacked source."""
    channels, need = len(spec.mean), (spec.train + spec.test) * spec.side**2 * len(spec.mean)
    for side, total in ((spec.side + 2 * pad, spec.train), (spec.side, spec.test)):
        need += total * -(-(side * (side * channels + 1) + 128) // 4096) * 4096  # files take whole blocks
    free = shutil.disk_usage(next(folder for folder in to.parents if folder.exists())).free
    if free < need:
        raise UsageError(f'{str(to)!r} needs about {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free there.')


def prepare(
    dataset: str,
    to: Path,
    source: Optional[Path],
    downloads: Optional[Path] = None,
    pad: int = 0,
    size: Optional[int] = None,
    classes: Optional[int] = None,
    held_out: int = 0,
) -> bool:
    """Make `to`, all of it or nothing: it is built beside and renamed.

    Returns:
        False if `to` was there already, complete and with the same settings; then nothing is touched.

    Raises:
        UsageError: The source is missing or not what it must be, `to` holds something else, or the disk is too full.
    """
    spec, tiny, key = SOURCES[dataset], dataset == 'tiny-imagenet', dataset
    if tiny:
        count = classes or spec.classes
        per_class = spec.train // spec.classes, spec.test // spec.classes
        spec = replace(
            spec, train=per_class[0] * count, test=per_class[1] * count, classes=count, side=size or spec.side
        )
        key = f'tiny_imagenet{count}_{spec.side}'
    if held_out % spec.classes or held_out >= spec.train:
        raise UsageError(f'--held-out must be a multiple of {spec.classes} classes below {spec.train}, got {held_out}.')
    settings: Dict[str, object] = dict(dataset=key, pad=pad, train=spec.train - held_out, test=spec.test)
    if held_out:
        settings['held_out'] = held_out
    if to.is_file() or (to.is_dir() and any(to.iterdir())):
        note = to / 'prepared.json'
        try:
            found = json.loads(note.read_text(encoding='utf-8')) if note.is_file() else None
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or {key: found.get(key) for key in settings} != settings:
            raise UsageError(f'{str(to)!r} exists and is not {dataset} with --pad {pad}; name another folder.')
        check_counts(spec, to, held_out)
        return False
    if source is None and spec.reader is None:
        raise UsageError(f'{dataset} has no download: name the archive with --from.')
    check_space(spec, to, pad)
    if tiny:
        layout = TinyImageNet(source)
    else:
        contents = read_source(spec.sums, source or download(spec.reader, downloads or to.parent / 'downloads'))
    partial = to.with_name(f'{to.name}.partial')
    if partial.exists():  # a killed run left it
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        found = tiny_images(layout, spec, pad, size, spec.sums) if tiny else images(spec, contents, partial, pad)
        for split, files in itertools.groupby(found, lambda item: item[0].parts[0]):
            print(f'writing {split}', flush=True)
            for path, data in tqdm(files, unit='image', disable=not sys.stderr.isatty()):
                write(partial / path, data)
        if held_out:
            hold_out(partial, held_out, spec.classes)
        check_counts(spec, partial, held_out)
        if tiny:
            about = dict(sha256=dict(spec.sums), class_names=layout.names[: spec.classes])
        else:
            about = dict(sha256={name: hashlib.sha256(data).hexdigest() for name, data in contents.items()})
        (partial / 'prepared.json').write_text(json.dumps(dict(settings, **about), indent=2), encoding='utf-8')
        os.replace(partial, to)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return True


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Prepare a data set; exit status 0, or 2 after one line on stderr that says what was wrong."""
    parser = Parser(prog='prepare_data', description="Make a data set ready for timm's train.py.")
    parser.add_argument('dataset', choices=sorted(SOURCES))
    parser.add_argument('--to', required=True, type=Path, metavar='DIR', help='the folder to make')
    parser.add_argument('--from', dest='source', type=Path, metavar='PATH', help='archive, or folder of idx files')
    parser.add_argument('--download', type=Path, metavar='DIR', help='for downloads; default: downloads beside --to')
    parser.add_argument('--pad', type=int, default=0, metavar='N', help='border of the training images in pixels')
    parser.add_argument('--size', type=int, metavar='N', help='tiny-imagenet: average the images down to NxN')
    parser.add_argument('--classes', type=int, metavar='N', help='tiny-imagenet: the first N by WordNet id')
    parser.add_argument('--held-out', type=int, default=0, metavar='N', help='move the last N training images to val/')
    args = parser.parse_args(argv)
    spec = SOURCES[args.dataset]
    if args.pad < 0 or args.held_out < 0:
        parser.error(f'--pad and --held-out must be 0 or more, got {args.pad} and {args.held_out}')
    if args.dataset != 'tiny-imagenet' and (args.size or args.classes):
        parser.error(f'--size and --classes are for tiny-imagenet, not for {args.dataset}')
    for name, value, most in (('--size', args.size, spec.side), ('--classes', args.classes, spec.classes)):
        if value is not None and not 1 <= value <= most:
            parser.error(f'{name} must be 1 to {most}, got {value}')
    broken = tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError
    return run_command('prepare_data', lambda: run(args), expected=(*EXPECTED, *broken))


def run(args: argparse.Namespace) -> int:
    """Prepare what the command line says, and print the folder with the options that fit it; returns 0."""
    to, spec = args.to.resolve(), SOURCES[args.dataset]
    made = prepare(args.dataset, to, args.source, args.download, args.pad, args.size, args.classes, args.held_out)
    classes, side = args.classes or spec.classes, args.size or spec.side
    train, test = (total // spec.classes * classes for total in (spec.train, spec.test))
    area = (side / (side + 2 * args.pad)) ** 2
    crop = f' --scale {area:.4g} {area:.4g} --ratio 1 1' if args.pad else ''
    counts = f'train {train - args.held_out}, test {test}, {classes} classes'
    split = 'val' if args.held_out else 'test'
    print(f'{"ready" if made else "already there"}: {to} ({counts}); --data-dir {to} --val-split {split}{crop}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
