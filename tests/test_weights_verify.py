import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save
from timm.models import is_model_pretrained
from timm.utils import reparameterize_model

from timm_regnet_rnn.cli import main
from timm_regnet_rnn.weights import verify
from timm_regnet_rnn.weights.manifest import RELEASED, embedded_file, hub_id

HUB = Path(__file__).parent.parent / 'hub'
CAT = HUB.parent / 'docs' / 'chelsea.jpg'
EMBEDDED = [name for name in RELEASED if embedded_file(name)]


@pytest.mark.parametrize('name', RELEASED)
def test_the_manifest_is_true(name):
    """Size, hashes, and logits on stored images; and that the check would notice."""
    done = subprocess.run([sys.executable, HUB / 'verify.py', name], capture_output=True, text=True)
    assert done.returncode == 0 and f'{name}: {RELEASED[name]["size"]} bytes' in done.stdout, done.stderr


@pytest.mark.parametrize('name', RELEASED)
def test_pretrained_cfg_says_what_was_measured(name):
    cfg, entry = timm.get_pretrained_cfg(name), RELEASED[name]
    metrics = entry['metrics']
    assert name in timm.list_pretrained() and is_model_pretrained(name)
    assert f'top-1 {metrics["top1"]:.2f} %' in cfg.description and entry['dataset'] in cfg.description
    assert cfg.hf_hub_id == hub_id(name) and '{' not in cfg.hf_hub_id
    assert 5 / cfg.num_classes < metrics['top1'] / 100 < metrics['top5'] / 100 <= 1
    assert len(cfg.label_names) == cfg.num_classes


@pytest.mark.parametrize('name', EMBEDDED)
def test_loads_without_network_and_adapts(name):
    model = timm.create_model(name, pretrained=True).eval()
    x = torch.randn(2, *model.pretrained_cfg['input_size'])
    with torch.no_grad():
        torch.testing.assert_close(reparameterize_model(model)(x), model(x), rtol=1e-4, atol=1e-4)
        adapted = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1)
        assert adapted(x[:, :1]).shape == (2, 3)
    features = timm.create_model(name, pretrained=True, features_only=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(features(x)[-1], model.forward_features(x))


def test_the_readmes_first_command(capsys):
    assert main(['predict', str(CAT)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(CAT) and len(lines) == 6
    assert lines[1].endswith('%  cat')


def test_validate_py_reads_the_embedded_weights(tmp_path):
    """A stand-in for timm's validate.py, which is not in its package: same calls, same data pipeline."""
    from PIL import Image

    for label in ('cat', 'dog'):
        (tmp_path / 'test' / label).mkdir(parents=True)
    Image.open(CAT).save(tmp_path / 'test' / 'cat' / '0.png')
    script = tmp_path / 'script.py'
    script.write_text(
        'import sys, timm\n'
        'from timm.data import create_dataset, create_loader, resolve_data_config\n'
        "model = timm.create_model('regnet_convlstm_20', pretrained=True).eval()\n"
        'config = resolve_data_config({}, model=model)\n'
        "data = create_dataset('', sys.argv[1], split='test')\n"
        "loader = create_loader(data, config['input_size'], 1, use_prefetcher=False, num_workers=0,\n"
        "                       persistent_workers=False, mean=config['mean'], std=config['std'],\n"
        "                       crop_pct=config['crop_pct'])\n"
        'print(model.pretrained_cfg["label_names"][model(next(iter(loader))[0]).argmax().item()])\n'
    )
    done = subprocess.run(
        [sys.executable, '-m', 'timm_regnet_rnn', 'run', script, tmp_path], capture_output=True, text=True
    )
    assert done.stdout.strip() == 'cat', done.stderr


@pytest.mark.parametrize('content', [b'', b'\x07\0\0\0\0\0\0\0{"logit', save(dict(images=torch.zeros(1)))])
def test_damaged_stored_logits_are_one_line(content, tmp_path, monkeypatch, capsys):
    (tmp_path / 'checks').mkdir()
    (tmp_path / 'checks' / f'{EMBEDDED[0]}.safetensors').write_bytes(content)
    monkeypatch.setattr(verify, 'HOME', tmp_path)
    assert verify.main(EMBEDDED[:1]) == 2
    err = capsys.readouterr().err
    assert 'the stored images and logits in' in err and 'are damaged' in err and err.count('\n') == 1


def image_folder(root, key, classes=10):
    """Images of one colour, one a class, as prepare_data.py leaves them, with its note if there is a key."""
    for i in range(classes):
        (root / 'test' / f'{i:03d}').mkdir(parents=True)
        Image.new('RGB', (32, 32), (i, 2 * i, 0)).save(root / 'test' / f'{i:03d}' / 'a.png')
    if key:
        (root / 'prepared.json').write_text(json.dumps(dict(dataset=key)))
    return str(root)


def test_an_accuracy_is_measured_on_its_own_data_set(tmp_path, monkeypatch, capsys):
    cifar, fashion = 'regnet_convlstm_20.cifar10_jpeg75', 'cifar_resnet_20.fashion_mnist'
    monkeypatch.setattr(verify, 'RELEASED', {name: RELEASED[name] for name in (cifar, fashion)})
    noted, unnoted = image_folder(tmp_path / 'a', 'fashion_mnist'), image_folder(tmp_path / 'photos', '')
    assert verify.folder_of(fashion, [unnoted, noted]) == noted and verify.folder_of(cifar, [noted]) is None
    assert verify.folder_of(cifar, [noted, unnoted]) == unnoted
    assert verify.folder_of(cifar, [image_folder(tmp_path / 'five', '', 5)]) is None
    assert verify.main(['--all', '--data-dir', noted]) == 2
    done = capsys.readouterr()
    assert (
        "accuracy not measured, no --data-dir has 'CIFAR-10, JPEG q75 mirror'" in done.out and fashion not in done.out
    )
    assert f'{fashion}: top1 is ' in done.err and done.err.count('\n') == 1
    assert verify.main([cifar, '--data-dir', noted]) == 2
    assert f"{cifar}: no --data-dir has 'CIFAR-10, JPEG q75 mirror', which its" in capsys.readouterr().err
    assert verify.main([cifar, '--data-dir', str(tmp_path / 'nowhere')]) == 2
    assert capsys.readouterr().err.count('\n') == 1
