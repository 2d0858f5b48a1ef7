"""Mutants of files, drawn from a seed: bytes, texts, JSON, safetensors, checkpoints, archives, images, whole files."""

import copy
import io
import json
import os
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from argparse import Namespace

import torch
from PIL import Image

HUGE = 10**400
# in place of a value
NASTY = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**9, 10**18, HUGE, 0.0, 0.5, 1e-320, 1e308),
    *(
        float('nan'),
        float('inf'),
        -float('inf'),
        '',
        ' ',
        'a',
        '../x',
        '../../outside/x',
        '/etc/passwd',
        '~',
        '.',
        '..',
    ),
    *(
        'nan',
        'None',
        '1e999',
        '0x10',
        'NaN',
        'x\0y',
        'ü',
        '\u202eabc',
        '\x1b[31mred',
        'a\nb',
        '\ud800',
        'x' * 5000,
        '%s%n',
    ),
    *('hf-hub:a/b', 'https://example.org/x', 'local-dir:/etc', '{0.__class__}', '`id`', '$(id)', '|', ',', '"', "'"),
    *([], {}, [None], [[]], [1, 2, 3], [3, 32, 32], [3, 4096, 4096], [-1, 0, 1], ['a'], {'a': 1}, {'a': {'a': {}}}),
    *([1] * 3000, ['x'] * 3, [[[[[[[[1]]]]]]]], {str(i): i for i in range(300)}, [0.5, 0.5, 0.5], [1e9, 1e9, 1e9]),
]
YAML_BOMB = 'a: &a [x,x,x,x,x,x,x,x,x]\n' + ''.join(
    f'{n}: &{n} [{",".join([f"*{p}"] * 9)}]\n' for p, n in zip('abcdefghi', 'bcdefghij')
)
SNIPPETS = [
    *('!!python/object/apply:os.system ["touch ran"]', '!!python/name:os.system', '!!binary "aGk="', '!!set {a, b}'),
    *(
        '&a [*a]',
        '<<: *x',
        '<<: {a: 1}',
        '? [a, b]\n: c',
        '---\na: 1\n---\nb: 2',
        '%YAML 9.9',
        '\t- a',
        '2024-13-45',
        '1:2:3',
    ),
    *(
        '[' * 5000,
        '{' * 5000,
        '[' * 5000 + ']' * 5000,
        '{"a":' * 3000 + '1' + '}' * 3000,
        '"' * 3,
        '\0',
        '\ufeff',
        '=1+1',
    ),
    *(
        'null',
        'true',
        '~',
        '.nan',
        '.inf',
        '1e999',
        '-',
        '::',
        '#',
        '|',
        '>',
        '@',
        '%',
        '`',
        '9' * 5000,
        '0o17',
        '1_000',
    ),
]


def of_bytes(draw, data):
    """Bytes with something changed, and what."""
    data = bytearray(data)
    kind = draw.choice(
        ['flip', 'flip', 'flip', 'truncate', 'truncate', 'delete', 'insert', 'repeat', 'fill', 'append', 'empty']
    )
    at = draw.randrange(len(data) + 1)
    size = min(len(data) - at, draw.choice([1, 2, 8, 64, 1000]))
    if kind == 'flip' and data:
        for _ in range(draw.choice([1, 1, 2, 8, 50])):
            where = draw.randrange(min(len(data), draw.choice([32, 512, len(data)])))
            data[where] ^= 1 << draw.randrange(8)
    elif kind == 'truncate':
        del data[at:]
    elif kind == 'delete':
        del data[at : at + size]
    elif kind == 'insert':
        data[at:at] = draw.randbytes(draw.choice([1, 8, 100]))
    elif kind == 'repeat':
        data[at:at] = data[at : at + size] * draw.choice([1, 2, 50])
    elif kind == 'fill':
        data[at : at + size] = bytes([draw.choice([0, 255, 127, 10, 44])]) * size
    elif kind == 'append':
        data += draw.choice([b'\0', b'\n', b'\xff' * 9, b'PK\5\6' + bytes(18), bytes(data[:2000])])
    else:
        kind, data = 'empty', bytearray()
    return bytes(data), kind


def of_text(draw, data):
    """A text with a word, a line or its encoding changed."""
    text = data.decode('utf-8')
    kind = draw.choice(
        ['word', 'word', 'number', 'number', 'line', 'twice', 'swap', 'snippet', 'encoding', 'bytes', 'cut']
    )
    lines = text.split('\n')
    at = draw.randrange(len(lines))
    if kind == 'bytes':
        return of_bytes(draw, data)
    if kind == 'cut':
        return data[: draw.randrange(len(data))], 'truncate'
    if kind in ('word', 'number'):
        found = list(re.finditer(r'[-+.\w]+' if kind == 'word' else r'\d[\d.]*', text)) or [re.match('', text)]
        word = draw.choice(found)
        new = draw.choice([v for v in NASTY if isinstance(v, (str, int, float))])
        new = new if isinstance(new, str) else '1' + '0' * 400 if new == HUGE else repr(new)
        text = text[: word.start()] + new + text[word.end() :]
    elif kind == 'line':
        del lines[at]
        text = '\n'.join(lines)
    elif kind == 'twice':
        lines.insert(draw.randrange(len(lines)), lines[at])
        text = '\n'.join(lines)
    elif kind == 'swap':
        other = draw.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
        text = '\n'.join(lines)
    elif kind == 'snippet':
        new = draw.choice([*SNIPPETS, YAML_BOMB])
        text = draw.choice(
            [new, f'{text}\n{new}\n', text.replace(': ', f': {new}', 1), '\n'.join([*lines[:at], new, *lines[at:]])]
        )
    else:
        code = draw.choice(['utf-16', 'latin-1', 'utf-8-sig', 'cr', 'crlf', 'utf-32'])
        text = text.replace('\n', '\r' if code == 'cr' else '\r\n') if code.startswith('cr') else text
        return text.encode('utf-8' if code.startswith('cr') else code, errors='replace'), 'encoding'
    return text.encode('utf-8', errors='surrogatepass'), kind


def places(value, path=()):
    """The paths of all values inside one."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def of_values(draw, value):
    """A JSON-like value with one inside it replaced, removed, added or moved."""
    value = copy.deepcopy(value)
    path = draw.choice([p for p in places(value) if p] or [()])
    if not path:
        return draw.choice(NASTY), 'value'
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    kind = draw.choice(['value', 'value', 'value', 'remove', 'add', 'nest', 'rename'])
    if kind == 'remove':
        del inner[path[-1]]
    elif kind == 'add' and isinstance(inner, dict):
        inner[
            draw.choice(['x', 'file', 'url', 'custom_load', 'state_dict', 'source', '__class__', '', '../x', 'ü'])
        ] = draw.choice(NASTY)
    elif kind == 'rename' and isinstance(inner, dict):
        inner[draw.choice(['x', str(path[-1]) + ' ', str(path[-1]).upper(), ''])] = inner.pop(path[-1])
    elif kind == 'nest':
        inner[path[-1]] = [inner[path[-1]]]
    else:
        inner[path[-1]] = draw.choice(NASTY)
    return value, kind


def of_json(draw, data):
    """A JSON file with values changed, or a key twice, or its text."""
    kind = draw.choice(['values', 'values', 'text', 'twice'])
    if kind == 'text':
        return of_text(draw, data)
    value = json.loads(data)
    value, what = of_values(draw, value)
    text = re.sub(r'\b10{400}\b', '1' + '0' * 400, json.dumps(value))
    if kind == 'twice' and isinstance(value, dict) and value:
        key = draw.choice(list(value))
        text = f'{text[:-1]}, {json.dumps(key)}: {json.dumps(draw.choice(NASTY))}}}'
        what = 'twice'
    return text.encode('utf-8', errors='surrogatepass'), what


def of_safetensors(draw, data):
    """A safetensors file with its header, its length or its bytes changed."""
    kind = draw.choice(['header', 'header', 'length', 'metadata', 'bytes', 'numbers', 'poison'])
    size = struct.unpack('<Q', data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if kind == 'bytes':
        return of_bytes(draw, data)
    if kind == 'length':
        return struct.pack(
            '<Q', draw.choice([0, 1, 7, size - 1, size + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1])
        ) + data[8:], kind
    names = [name for name in header if name != '__metadata__']
    if kind == 'poison':  # numbers that are none, in one tensor
        begin, end = header[draw.choice(names)]['data_offsets']
        bad = struct.pack('<f', draw.choice([float('nan'), float('inf'), 1e38])) * ((end - begin) // 4)
        return data[: 8 + size] + body[:begin] + bad + body[end:], kind
    if kind == 'numbers':
        begin, end = header[draw.choice(names)]['data_offsets']
        at = 8 + size + draw.randrange(begin, max(begin + 1, end))
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :], kind
    if kind == 'metadata':
        header['__metadata__'], _ = of_values(draw, header.get('__metadata__') or {'model': 'x'})
    else:
        name = draw.choice(names)
        what = draw.choice(['dtype', 'shape', 'offset', 'swap', 'drop', 'rename', 'value', 'share'])
        entry = header[name]
        if what == 'dtype':
            entry['dtype'] = draw.choice(['F16', 'I32', 'F64', 'BOOL', 'F8_E4M3', 'X', '', None, 'U8', 'BF16'])
        elif what == 'shape':
            entry['shape'] = draw.choice(
                [[], [-1], [2**40], [2**63, 2**63], entry['shape'][::-1], [*entry['shape'], 1], None, 'x', [0]]
            )
        elif what == 'offset':
            entry['data_offsets'] = draw.choice(
                [[0, 0], [1, 0], [0, len(body) + 1], [-1, 4], [0, 2**64], [2**63, 2**63], 'x', [0]]
            )
        elif what == 'share':
            entry.update(header[draw.choice(names)])
        elif what == 'swap':
            other = draw.choice(names)
            header[name], header[other] = header[other], header[name]
        elif what == 'drop':
            del header[name]
        elif what == 'rename':
            header[draw.choice(['../x', '', 'fc.weight', 'x' * 9999, 'a\0b', name.upper()])] = header.pop(name)
        else:
            header[name], _ = of_values(draw, entry)
        kind = f'header {what}'
    text = json.dumps(header).encode('utf-8', errors='surrogatepass')
    return struct.pack('<Q', len(text)) + text + body, kind


def of_checkpoint(draw, data):
    """A checkpoint of train.py with its bytes, its values or its arguments changed."""
    kind = draw.choice(['bytes', 'bytes', 'numbers', 'values', 'args', 'weights'])
    if kind == 'bytes':
        return of_bytes(draw, data)
    if kind == 'numbers':  # a bit of a tensor, whose sum stands beside it
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            part = draw.choice([p for p in parts.infolist() if '/data/' in p.filename and p.file_size])
        name, extra = struct.unpack('<HH', data[part.header_offset + 26 : part.header_offset + 30])
        at = part.header_offset + 30 + name + extra + draw.randrange(part.file_size)
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :], kind
    state = torch.load(io.BytesIO(data), weights_only=False)
    if kind == 'args':
        values, _ = of_values(draw, vars(state['args']))
        state['args'] = Namespace(**{str(k): v for k, v in values.items()}) if isinstance(values, dict) else values
    elif kind == 'values':
        tensors = {key: state.pop(key) for key in ('state_dict', 'optimizer', 'args')}
        state, _ = of_values(draw, state)
        if isinstance(state, dict):
            state = {**tensors, **state}
            if draw.random() < 0.3:
                state[draw.choice(list(tensors))] = draw.choice(NASTY)
    else:
        name = draw.choice(list(state['state_dict']))
        tensor = state['state_dict'][name]
        what = draw.choice(['drop', 'shape', 'rename', 'type', 'value', 'strided'])
        if what == 'drop':
            del state['state_dict'][name]
        elif what == 'shape':
            state['state_dict'][name] = tensor.reshape(-1)[:1]
        elif what == 'rename':
            state['state_dict'][draw.choice(['module.x', '', 'fc.weight'])] = state['state_dict'].pop(name)
        elif what == 'type':
            state['state_dict'][name] = tensor.to(draw.choice([torch.float64, torch.int8, torch.bool, torch.complex64]))
        elif what == 'strided':
            state['state_dict'][name] = torch.zeros(1).expand(2**20, 2**20)
        else:
            state['state_dict'][name] = draw.choice(NASTY)
        kind = f'weights {what}'
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue(), kind


def of_tar(draw, data):
    """A tar archive with a member renamed, turned into a link or a device, or its bytes changed."""
    if draw.random() < 0.4:
        return of_bytes(draw, data)
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode='w:xz') as new:
        members = old.getmembers()
        chosen = draw.randrange(len(members))
        what = draw.choice(['name', 'link', 'symlink', 'device', 'size', 'twice', 'image', 'drop'])
        for i, member in enumerate(members):
            content = old.extractfile(member).read()
            if i == chosen:
                if what == 'name':
                    member.name = draw.choice(
                        [
                            '../x',
                            '/etc/x',
                            'train/../../x',
                            'a',
                            'train/x',
                            'C:\\x',
                            'x\ny/z',
                            'train/c/../c/1.jpg',
                            '.',
                        ]
                    )
                elif what in ('link', 'symlink'):
                    member.type = tarfile.LNKTYPE if what == 'link' else tarfile.SYMTYPE
                    member.linkname, content = '../../outside/x', b''
                elif what == 'device':
                    member.type, content = tarfile.CHRTYPE, b''
                elif what == 'image':
                    content = draw.choice([b'', content[:50], bomb(draw)])
                elif what == 'drop':
                    continue
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
            if i == chosen and what == 'twice':
                new.addfile(member, io.BytesIO(content))
    return out.getvalue(), f'member {what}'


def of_zip(draw, data):
    """A zip archive with a member changed, renamed or missing, or its bytes changed."""
    if draw.random() < 0.4:
        return of_bytes(draw, data)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, 'w') as new:
        names = old.namelist()
        chosen = draw.choice([*names, *[n for n in names if n.endswith('.txt')] * 3])
        what = draw.choice(['name', 'drop', 'content', 'text', 'image'])
        for name in names:
            content = old.read(name)
            if name == chosen:
                if what == 'drop':
                    continue
                if what == 'name':
                    name = draw.choice(
                        [
                            '../x',
                            '/etc/x',
                            'x/wnids.txt',
                            name + '/x',
                            name.upper(),
                            'tiny/train/n00000001/images/../../../../x.JPEG',
                        ]
                    )
                elif what == 'image':
                    content = bomb(draw)
                else:
                    content, _ = (of_text if name.endswith('.txt') else of_bytes)(draw, content)
            new.writestr(name, content)
    return out.getvalue(), f'member {what}'


def chunk(kind, data):
    """One chunk of a PNG."""
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def bomb(draw):
    """An image of few bytes and many pixels."""
    side = draw.choice([5000, 12000, 40000, 2**31 - 1])
    mode = draw.choice([0, 2, 6])
    rows = zlib.compress(bytes(min(side * 4 + 1, 200_000)) * min(side, 500), 9)
    head = struct.pack('>IIBBBBB', side, side, draw.choice([1, 8, 16]) if mode == 0 else 8, mode, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')


def of_image(draw, data):
    """An image with its bytes changed, or a bomb."""
    if draw.random() < 0.08:
        return bomb(draw), 'bomb'
    return of_bytes(draw, data)


def images():
    """Images of every format and mode by file name."""
    base = Image.radial_gradient('L').resize((40, 32))
    rgb = Image.merge('RGB', [base, base.rotate(90).resize((40, 32)), base.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])
    made = {}
    for name, image, options in (
        ('rgb.png', rgb, {}),
        ('grey16.png', base.convert('I;16'), {}),
        ('alpha.png', rgb.convert('RGBA'), {}),
        ('palette.png', rgb.quantize(16), dict(transparency=3)),
        ('one.png', base.convert('1'), {}),
        ('rgb.jpg', rgb, dict(exif=b'Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0')),
        ('progressive.jpg', rgb, dict(progressive=True)),
        ('cmyk.jpg', rgb.convert('CMYK'), {}),
        ('film.gif', rgb.quantize(8), dict(save_all=True, append_images=[base.convert('P')] * 3)),
        ('film.webp', rgb, dict(save_all=True, append_images=[rgb.rotate(90)])),
        ('float.tiff', base.convert('F'), {}),
        ('lzw.tiff', rgb, dict(compression='tiff_lzw')),
        *(
            (f'x.{end}', rgb, {})
            for end in ('bmp', 'ppm', 'tga', 'pcx', 'sgi', 'ico', 'jp2', 'dds', 'im', 'icns', 'tif', 'mpo')
        ),
    ):
        out = io.BytesIO()
        form = {'jpg': 'jpeg', 'tif': 'tiff', 'jp2': 'jpeg2000'}.get(name.rpartition('.')[2], name.rpartition('.')[2])
        try:
            image.save(out, form, **options)
        except (KeyError, OSError, ValueError):  # this Pillow writes no such files
            continue
        made[name] = out.getvalue()
    return made


MUTANTS = dict(bytes=of_bytes, text=of_text, json=of_json, safetensors=of_safetensors, checkpoint=of_checkpoint)
MUTANTS.update(tar=of_tar, zip=of_zip, image=of_image)
WHOLE = ('folder', 'missing', 'loop', 'pipe', 'zero', 'elsewhere', 'empty')


def replace(draw, file, kind):
    """Change a file of a kind, or put something else in its place; what was done, in a word or two."""
    if draw.random() < 0.06:
        what = draw.choice(WHOLE)
        file.unlink()
        if what == 'folder':
            file.mkdir()
        elif what == 'loop':
            file.symlink_to(file.name)
        elif what == 'pipe':
            os.mkfifo(file)
        elif what == 'zero':
            file.symlink_to('/dev/zero')
        elif what == 'elsewhere':
            file.symlink_to('/etc/passwd')
        elif what == 'empty':
            file.touch()
        return f'file: {what}'
    data, what = MUTANTS[kind](draw, file.read_bytes())
    file.write_bytes(data)
    return f'{kind}: {what}'


def fresh(source, target):
    """A copy of a folder."""
    shutil.copytree(source, target)
