"""Make a data set ready for timm's train.py: image folders DIR/train/<class>/* and DIR/test/<class>/*.

    python prepare_data.py cifar10 --to DIR                                    # downloads, checks, writes PNG
    python prepare_data.py cifar100 --to DIR --from cifar-100-python.tar.gz    # an archive that is there already
    python prepare_data.py fashion_mnist --to DIR --from /usr/share/datasets/fashion-mnist  # Debian's package
    python prepare_data.py cifar10_jpeg75 --to DIR --from ARCHIVE --pad 4      # a lossy mirror of JPEG files

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
import os
import shutil
import sys
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.datasets.utils import download_url


class UsageError(Exception):
    """Bad input: printed as one line, exit status 2."""


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
SOURCES = {
    'cifar10': Source({CIFAR10.filename: CIFAR10.tgz_md5}, 50000, 10000, 10, 32, CIFAR_MEAN, CIFAR10),
    'cifar10_jpeg75': Source({'cifar10_jpeg.tar.xz': JPEG75_SUM}, 50000, 10000, 10, 32, CIFAR_MEAN),
    'cifar100': Source({CIFAR100.filename: CIFAR100.tgz_md5}, 50000, 10000, 100, 32, CIFAR_MEAN, CIFAR100),
    'fashion_mnist': Source(FASHION_SUMS, 60000, 10000, 10, 28, (73,), FashionMNIST),  # 255 * 0.2860
}


def download(reader: type, folder: Path) -> Path:
    """Let torchvision fetch what is not in `folder` yet; returns what `--from` would name."""
    if issubclass(reader, FashionMNIST):
        for name, md5 in reader.resources:
            download_url(reader.mirrors[0] + name, folder, name, md5)
        return folder
    download_url(reader.url, folder, reader.filename, reader.tgz_md5)
    return folder / reader.filename


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
            # stricter than the filter, which takes links that stay inside and makes a of /a, but knows Windows' names
            if path.is_absolute() or '..' in path.parts or not (member.isfile() or member.isdir()):
                raise UsageError(f'the archive holds {member.name!r}, which leaves it or is no plain file.')
            tarfile.data_filter(member, str(root))
            if member.isfile():
                yield path, tar.extractfile(member).read()


def png(image: Image.Image, mean: Tuple[int, ...], pad: int) -> bytes:
    """The image as PNG, with a border of `pad` pixels."""
    mode = 'RGB' if len(mean) == 3 else 'L'
    padded = Image.new(mode, (image.width + 2 * pad, image.height + 2 * pad), mean)
    padded.paste(image.convert(mode), (pad, pad))
    buffer = io.BytesIO()
    padded.save(buffer, 'png', compress_level=1)
    return buffer.getvalue()


def class_folders(classes: Sequence[str]) -> List[str]:
    """Folder names that sort, as train.py numbers its labels, in the order of `classes`: with numbers if need be."""
    names = [name.split('/')[0].lower().replace(' ', '_') for name in classes]
    width = len(str(len(names) - 1))
    return names if names == sorted(names) else [f'{i:0{width}d}_{name}' for i, name in enumerate(names)]


def write(path: Path, data: bytes):
    """Write a file, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def images(spec: Source, contents: Mapping[str, bytes], root: Path, pad: int) -> Iterator[Tuple[PurePosixPath, bytes]]:
    """Path below `root` and content of all image files."""
    if spec.reader is None:
        for path, data in members(*contents.values(), root):
            if pad and path.parts[0] == 'train':
                path, data = path.with_suffix('.png'), png(Image.open(io.BytesIO(data)), spec.mean, pad)
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


def check_counts(spec: Source, root: Path):
    """Raise UsageError unless both splits have as many images in as many equal classes as they must."""
    names = set()
    for split, total in (('train', spec.train), ('test', spec.test)):
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


def prepare(dataset: str, to: Path, source: Optional[Path], downloads: Optional[Path] = None, pad: int = 0) -> bool:
    """Make `to`, all of it or nothing: it is built beside and renamed.

    Returns:
        False if `to` was there already, complete and with the same settings; then nothing is touched.

    Raises:
        UsageError: The source is missing or not what it must be, `to` holds something else, or the disk is too full.
    """
    spec = SOURCES[dataset]
    settings = dict(dataset=dataset, pad=pad, train=spec.train, test=spec.test)
    if to.is_file() or (to.is_dir() and any(to.iterdir())):
        try:
            found = json.loads((to / 'prepared.json').read_text(encoding='utf-8'))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or {key: found.get(key) for key in settings} != settings:
            raise UsageError(f'{str(to)!r} exists and is not {dataset} with --pad {pad}; name another folder.')
        check_counts(spec, to)
        return False
    if source is None and spec.reader is None:
        raise UsageError(f'{dataset} has no download: name the archive with --from.')
    check_space(spec, to, pad)
    contents = read_source(spec.sums, source or download(spec.reader, downloads or to.parent / 'downloads'))
    partial = to.with_name(f'{to.name}.partial')
    if partial.exists():  # a killed run left it
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        for split, files in itertools.groupby(images(spec, contents, partial, pad), lambda item: item[0].parts[0]):
            print(f'writing {split}', flush=True)
            for path, data in files:
                write(partial / path, data)
        check_counts(spec, partial)
        sums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        (partial / 'prepared.json').write_text(json.dumps(dict(settings, sha256=sums), indent=2), encoding='utf-8')
        os.replace(partial, to)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return True


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f'{self.prog}: {message} (see {self.prog} --help)\n')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Prepare a data set; exit status 0, or 2 after one line on stderr that says what was wrong."""
    parser = _Parser(prog='prepare_data', description="Make a data set ready for timm's train.py.")
    parser.add_argument('dataset', choices=sorted(SOURCES))
    parser.add_argument('--to', required=True, type=Path, metavar='DIR', help='the folder to make')
    parser.add_argument('--from', dest='source', type=Path, metavar='PATH', help='archive, or folder of idx files')
    parser.add_argument('--download', type=Path, metavar='DIR', help='for downloads; default: downloads beside --to')
    parser.add_argument('--pad', type=int, default=0, metavar='N', help='border of the training images in pixels')
    args = parser.parse_args(argv)
    if args.pad < 0:
        parser.error(f'--pad must be 0 or more pixels, got {args.pad}')
    try:
        to = args.to.resolve()
        made = prepare(args.dataset, to, args.source, args.download, args.pad)
    except (UsageError, OSError, RuntimeError, tarfile.TarError) as e:
        print('prepare_data:', *(str(e).splitlines() or [type(e).__name__])[:1], file=sys.stderr)
        return 2
    spec = SOURCES[args.dataset]
    area = (spec.side / (spec.side + 2 * args.pad)) ** 2
    crop = f' --scale {area:.4g} {area:.4g} --ratio 1 1' if args.pad else ''
    counts = f'train {spec.train}, test {spec.test}, {spec.classes} classes'
    print(f'{"ready" if made else "already there"}: {to} ({counts}); --data-dir {to} --val-split test{crop}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
