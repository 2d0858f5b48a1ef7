"""The Space, as a visitor meets it: the started app in a headless Chromium, without a network."""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from PIL import Image, ImageOps

gradio = pytest.importorskip('gradio', reason='the Space needs gradio')
playwright = pytest.importorskip('playwright.sync_api', reason='needs playwright to drive Chromium')
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')]

ROOT = Path(__file__).parent.parent
APP = ROOT / 'hub' / 'space' / 'app.py'
CAT = ROOT / 'docs' / 'chelsea.jpg'
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
]
BLOCKS = [f'layer{stage}.{block}' for stage in (1, 2, 3) for block in (0, 1, 2)]


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    """Where the app listens; it runs in a process of its own, with no weights in reach but those in the package."""
    scratch = tmp_path_factory.mktemp('space')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = dict(
        os.environ,
        GRADIO_SERVER_NAME='127.0.0.1',
        GRADIO_SERVER_PORT=str(port),
        GRADIO_ANALYTICS_ENABLED='False',
        GRADIO_TEMP_DIR=str(scratch / 'uploads'),
        HF_HOME=str(scratch / 'hub'),
        HF_HUB_OFFLINE='1',
        OMP_NUM_THREADS='1',
        PYTHONUNBUFFERED='1',  # its address is waited for
    )
    log = scratch / 'log'
    with log.open('w') as file:
        app = subprocess.Popen([sys.executable, str(APP)], cwd=scratch, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 90
        while 'Running on local URL' not in log.read_text():
            assert app.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f'http://127.0.0.1:{port}/'
    finally:
        app.terminate()
        app.wait(30)
    assert 'Traceback' not in log.read_text(), log.read_text()


@pytest.fixture(scope='module')
def browser():
    playwright.expect.set_options(timeout=120_000)
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(address, browser):
    """A function that opens the app at a width; afterwards nothing may have gone wrong in the browser."""
    pages, problems = [], []

    def answered(response):
        if response.status >= 400:
            problems.append(f'{response.status} {response.url}')

    def failed(request):
        # Gradio's event streams, which it ends itself
        if '/queue/data' not in request.url and '/upload_progress' not in request.url:
            problems.append(f'{request.failure} {request.url}')

    def requested(request):
        if not request.url.startswith((address, 'data:', 'blob:')):
            problems.append(f'asks another machine: {request.url}')

    def open_page(width=1200, height=900):
        page = browser.new_page(viewport=dict(width=width, height=height))
        page.set_default_timeout(120_000)
        pages.append(page)
        page.on('console', lambda message: problems.append(message.text) if message.type == 'error' else None)
        page.on('pageerror', lambda error: problems.append(str(error)))
        page.on('response', answered)
        page.on('requestfailed', failed)
        page.on('request', requested)
        page.goto(address)
        shows(page, 'cat')
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not problems


def shows(page, name):
    """Wait for a top class and for a map of every block, in the order of depth."""
    playwright.expect(page.get_by_test_id('label-output-value')).to_have_text(name)
    playwright.expect(page.locator('figure.map figcaption')).to_have_text(BLOCKS)


def upload(page, file):
    """Take the image away, see the results gone, and give the file to the page's own file input."""
    page.get_by_label('Remove Image').click()
    playwright.expect(page.locator('figure')).to_have_count(0)
    playwright.expect(page.get_by_test_id('label-output-value')).to_have_count(0)
    page.get_by_test_id('file-upload').set_input_files(file)


def says(page, line):
    """Wait for a line where the maps would be; nothing of an earlier image is left."""
    playwright.expect(page.locator('#maps [role=alert]')).to_have_text(line)
    playwright.expect(page.locator('.toast-body')).to_have_count(0)  # said once
    playwright.expect(page.locator('figure')).to_have_count(0)
    playwright.expect(page.get_by_test_id('label-output-value')).to_have_count(0)


def tile(page, file):
    """What the model saw of a file, as the page shows it."""
    upload(page, file)
    playwright.expect(page.locator('figure.map')).to_have_count(len(BLOCKS))
    return page.locator('figure.input img').get_attribute('src')


def test_a_visit(visit):
    page = visit()
    playwright.expect(page.get_by_text('top-1 85.26 %')).to_be_visible()
    assert page.get_by_role('link', name='RegNet').get_attribute('href') == 'https://arxiv.org/abs/2101.00590'
    sizes = page.locator('figure.map img').evaluate_all('maps => maps.map(m => [m.naturalWidth, m.naturalHeight])')
    assert sizes == [[32, 32]] * 3 + [[16, 16]] * 3 + [[8, 8]] * 3
    assert len(set(page.locator('figure.map img').evaluate_all('maps => maps.map(m => m.src)'))) == len(BLOCKS)
    assert page.locator('figure.map .bar i').all_inner_texts() == ['i', 'f', 'o', 'h'] * len(BLOCKS)
    if os.environ.get('SPACE_SCREENSHOT'):
        page.evaluate('document.fonts.ready')
        shot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        ImageOps.posterize(shot.convert('RGB'), 7).save(os.environ['SPACE_SCREENSHOT'], optimize=True)  # smaller

    upload(page, CAT)
    shows(page, 'cat')
    names = sorted(path.stem for path in (APP.parent / 'examples').iterdir())
    for i, name in enumerate(names):
        page.locator('.gallery-item').nth(i).click()
        shows(page, 'cat' if name == 'chelsea' else name)


def test_what_cannot_be_shown(visit, tmp_path):
    text = tmp_path / 'text.jpg'
    text.write_text('not an image')
    cut = tmp_path / 'cut.jpg'
    cut.write_bytes(CAT.read_bytes()[:9000])
    bomb = tmp_path / 'bomb.png'
    Image.new('1', (120_000, 10_000)).save(bomb)
    for file, words in (
        (text, 'This file is not an image that Pillow can read.'),
        (cut, re.compile('Cannot read this file: .*truncated')),
        (bomb, re.compile('Cannot read this file: .*200000000 pixels')),
    ):
        page = visit()  # a second upload can get lost while a slow machine still shows the first
        upload(page, file)
        says(page, words)

    page.locator('.gallery-item').first.click()
    shows(page, 'airplane')
    page.get_by_label('Model').click()
    page.get_by_label('Model').press('Control+a')
    page.get_by_label('Model').press_sequentially('convlstm_50')
    playwright.expect(page.get_by_role('option')).to_have_count(2)  # with SE, and without
    page.get_by_role('option', name='regnet_convlstm_50 · resnet50 a1 in1k', exact=True).click()
    says(page, re.compile('The weights of regnet_convlstm_50.resnet50_a1_in1k cannot be loaded: '))
    page.get_by_label('Model').click()
    page.get_by_role('option', name='regnet_convlstm_20 · cifar10 jpeg75, 85.3 %', exact=True).first.click()
    shows(page, 'airplane')


def test_odd_images(visit, tmp_path):
    """However a picture is stored, the model sees the same."""
    page = visit()
    cat = Image.open(CAT)
    grey = cat.convert('L')
    palette = cat.quantize(16)
    deep = Image.fromarray(np.asarray(grey).astype('uint16') * 257)
    assert deep.mode == 'I;16'
    cut_out = cat.convert('RGBA')
    cut_out.putalpha(grey.point(lambda v: 255 * (v > 99)))
    on_white = Image.composite(cat, Image.new('RGB', cat.size, 'white'), cut_out.getchannel('A'))
    turned = Image.Exif()
    turned[0x0112] = 6  # turn by a quarter to see it upright

    def seen(name, image, **kwargs):
        image.save(tmp_path / name, **kwargs)
        return tile(page, tmp_path / name)

    plain = seen('rgb.png', cat)
    assert seen('alpha.png', cat.convert('RGBA')) == plain
    assert seen('turned.png', cat.transpose(Image.Transpose.ROTATE_90), exif=turned) == plain
    assert seen('grey.png', grey) == seen('deep.png', deep) == seen('grey_rgb.png', grey.convert('RGB')) != plain
    assert seen('palette.png', palette) == seen('palette_rgb.png', palette.convert('RGB')) != plain
    assert seen('cut_out.png', cut_out) == seen('on_white.png', on_white) != plain
    seen('huge.jpg', cat.resize((7200, 4800)))
    shows(page, 'cat')


def test_phone(visit):
    page = visit(390, 844)
    assert page.evaluate('document.documentElement.scrollWidth') == 390
    right = page.locator('figure, figcaption, h1, h2, p, button').evaluate_all(
        'all => Math.max(...all.map(e => e.getBoundingClientRect().right))'
    )
    assert right <= 390
    below = page.locator('figure.map').first.bounding_box()['y']
    assert below < page.get_by_label('Model').bounding_box()['y']  # right under the picture
    assert below < 1.2 * 844


def test_help_and_flags():
    done = [
        subprocess.run([sys.executable, str(APP), *flags], capture_output=True, text=True, timeout=120)
        for flags in (['--help'], ['--modle', 'x'])
    ]
    assert done[0].returncode == 0 and 'usage: app.py' in done[0].stdout
    assert done[1].returncode == 2 and done[1].stderr.count('\n') == 1


def test_card():
    """What the Hub reads: the card fits the requirements, and they fit what is tested here."""
    card = SpaceCard.load(APP.parent / 'README.md').data
    needs = {r.name: r for r in map(Requirement, (APP.parent / 'requirements.txt').read_text().splitlines())}
    assert card.sdk == 'gradio' and (APP.parent / card.app_file) == APP and card.license == 'apache-2.0'
    assert needs['gradio'].specifier.contains(card.sdk_version)
    assert needs['gradio'].specifier.contains(gradio.__version__)
    assert len(card.short_description) <= 60  # the Hub's limit
