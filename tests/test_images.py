"""One reader for every image: what Pillow would turn, clip or fail on in its own way."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from timm_regnet_rnn.errors import UsageError
from timm_regnet_rnn.images import image_paths, read_image

CAT = Path(__file__).parent.parent / 'docs' / 'chelsea.jpg'


@pytest.fixture
def cat():
    return Image.open(CAT).resize((48, 32))


def pixels(file, mode='RGB'):
    return np.asarray(read_image(file, mode))


@pytest.mark.parametrize('orientation', range(2, 9))
@pytest.mark.parametrize('suffix', ['png', 'webp', 'tiff'])
def test_upright(cat, tmp_path, orientation, suffix):
    """Whoever holds the camera otherwise sees the same."""
    inverse = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    exif = Image.Exif()
    exif[0x0112] = inverse
    cat.info['exif'] = exif.tobytes()
    cat.getexif()[0x0112] = inverse
    stored = ImageOps.exif_transpose(cat)  # turned so that `orientation` turns it back
    exif[0x0112] = orientation
    stored.save(tmp_path / f'a.{suffix}', exif=exif, **({'lossless': True} if suffix == 'webp' else {}))
    assert np.array_equal(pixels(tmp_path / f'a.{suffix}'), np.asarray(cat))


@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_grey_of_every_depth_is_the_same(cat, tmp_path, mode):
    grey = np.asarray(cat.convert('L'))
    stored = {
        'eight.png': Image.fromarray(grey),
        'sixteen.png': Image.fromarray(grey.astype('uint16') * 257),
        'sixteen.tiff': Image.fromarray(grey.astype('uint16') * 257),
        'thirty_two.tiff': Image.fromarray(grey.astype('int32')),
        'float.tiff': Image.fromarray(grey.astype('float32')),
        'unit.tiff': Image.fromarray((grey / np.float32(255) + np.float32(1e-6)).clip(max=1)),
    }
    for name, image in stored.items():
        image.save(tmp_path / name)
        assert np.array_equal(pixels(tmp_path / name, mode), pixels(tmp_path / 'eight.png', mode)), name
    Image.fromarray(np.full((4, 4), np.nan, 'float32')).save(tmp_path / 'nan.tiff')
    Image.fromarray(np.full((4, 4), 1e6, 'float32')).save(tmp_path / 'huge.tiff')
    for name in ('nan.tiff', 'huge.tiff'):
        with pytest.raises(UsageError, match='grey is read from 0 to 255 or 65535'):
            read_image(tmp_path / name)


def test_transparent_is_white(cat, tmp_path):
    clear = cat.convert('RGBA')
    clear.putalpha(0)
    for name, image in {'rgba.png': clear, 'la.png': clear.convert('LA'), 'p.gif': clear}.items():
        image.save(tmp_path / name)
        assert (pixels(tmp_path / name) == 255).all(), name


def test_a_folder_has_every_format(cat, tmp_path):
    names = [f'a.{suffix}' for suffix in ('bmp', 'gif', 'jpg', 'png', 'ppm', 'tiff', 'webp')]
    for name in [*names, 'B.JPEG']:
        cat.save(tmp_path / name, format='JPEG' if name == 'B.JPEG' else None)
    for name in ('notes.txt', 'data.h5', 'figure.eps', 'film.mpg'):
        (tmp_path / name).write_text('none')
    assert [path.name for path in image_paths([tmp_path])] == ['B.JPEG', *names]
    assert all(read_image(path).size == cat.size for path in image_paths([tmp_path]))


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(width, height, body):
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + body


BROKEN = {
    'text.png': b'not an image',
    'empty.jpg': b'',
    'cut.jpg': CAT.read_bytes()[:20_000],
    'chunk.png': png(8, 8, b'\0\0\0\x04!!!!abcd' + b'\0' * 40),  # SyntaxError in Pillow
    'crc.png': png(8, 8, chunk(b'IDAT', b'x')[:-1] + b'\0'),
    'deflate.png': png(8, 8, chunk(b'IDAT', b'no zlib') + chunk(b'IEND', b'')),
    'pixels.qoi': b'qoif' + struct.pack('>IIBB', 64, 64, 3, 0),  # IndexError
    'frames.icns': b'icns' + struct.pack('>I', 24) + b'ic07' + struct.pack('>I', 16) + b'\0' * 8,
    'bomb.png': png(50_000, 50_000, chunk(b'IDAT', b'')),
    'nothing.png': png(0, 0, b''),
}


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_file_is_one_line(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(BROKEN[name])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(UsageError) as caught:
            read_image(file)
    assert str(caught.value).count('\n') == 0 and name in str(caught.value)


def test_a_large_picture_is_read_without_a_warning(tmp_path):
    Image.new('1', (13_000, 13_000)).save(tmp_path / 'large.png')  # 169 megapixels
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert read_image(tmp_path / 'large.png', 'L').size == (13_000, 13_000)
