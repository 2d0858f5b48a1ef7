"""A recipe is read and checked before a run starts, against what train.py itself takes."""

from pathlib import Path

import pytest
import yaml
from conftest import OPTIONS, RECIPES
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_regnet_rnn.training.recipe import check_recipe, find_recipe, load_recipe, train_options


@pytest.mark.parametrize(
    'text, words',
    [
        ('weight_deacy: 0.1', ['weight_deacy: ', 'no such option', "'weight_decay'"]),
        ('weight-decay: 0.1', ["'weight_decay'"]),
        ('zzz: 1', ['no such option', '--help']),
        ('true: 1', ['True: ', 'no such option']),
        ('weight_decay: 5e-4', ['weight_decay: ', "'5e-4' is text", 'write 0.0005 ']),
        ('lr: 1e-06', ['write 1.0e-06 ']),
        ("lr: '0.1'", ["'0.1' is text", 'write 0.1 ']),
        ('lr: fast', ["'fast' is text", 'a finite number']),
        ('lr: .inf', ['inf', 'a finite number']),
        ('lr: true', ['True is true or false', 'a finite number']),
        ('lr:', ['lr: it has no value', 'a finite number']),
        ('lr: [0.1]', ['is a list', 'one value']),
        ('epochs: 20.0', ['write 20.']),
        ("epochs: '20'", ['write 20 ']),
        ('epochs: 20.5', ['20.5', 'a whole number']),
        ('epochs: many', ['a whole number']),
        ('epochs: true', ['a whole number']),
        ('model_ema: 1', ['1 is a whole number', 'true or false']),
        ("model_ema: 'true'", ['is text', 'true or false']),
        ('aa: off', ['False is true or false', 'quotes']),
        ('aa: 2024-01-31', ['does not fit', 'text']),
        ('aa: 9', ['9 is a whole number', 'text']),
        ('train_size_schedule: slow', ["'slow' is text", 'constant, progressive']),
        ('input_size: 32', ['input_size: ', 'list of 3 whole numbers']),
        ('input_size: [32, 32]', ['[32, 32] holds 2', 'list of 3 whole numbers']),
        ('input_size: [3, 32, 32.0]', ['write 32.']),
        ('scale: [0.5]', ['list of 2 numbers']),
        ('scale: [5e-1, 1.0]', ["'5e-1' is text", 'write 0.5 ']),
        ('decay_milestones: 100', ['list of one or more whole numbers']),
        ('decay_milestones: []', ['list of one or more whole numbers']),
        ('device_modules: timm_regnet_rnn', ['list of one or more texts']),
        ('model_kwargs: carry=raw', ['is text', 'mapping']),
        ('model_kwargs: {1: raw}', ['is a mapping', 'names']),
    ],
)
def test_bad_values_are_named(text, words):
    (problem,) = check_recipe(yaml.safe_load(text), OPTIONS)
    assert '\n' not in problem and all(word in problem for word in words), problem


def test_good_values_pass():
    text = """
        lr: 1
        weight_decay: 5.0e-4
        amp: yes
        epochs: 1_000
        mean: [0]
        opt_betas: [0.9, 0.99]
        torchcompile: inductor
        train_size_schedule: progressive
        model_kwargs: {carry: raw, regulated_stages: [1, 2]}
    """
    assert check_recipe(yaml.safe_load(text), OPTIONS) == []
    assert check_recipe(dict(lr=10**400), OPTIONS) == []  # absurd, but no crash: train.py's to refuse
    assert len(check_recipe(dict(lr='fast', epochs=0.5, sed=1), OPTIONS)) == 3


@pytest.mark.parametrize(
    'text, words',
    [
        (b'', 'not a mapping'),
        (b'- lr\n', 'not a mapping'),
        (b'lr: 0.1\nepochs: [1\nmin_lr: 0\n', 'line 3 is not YAML'),
        (b'lr: 0.1\n---\nlr: 0.2\n', 'is not YAML'),
        (b'lr: 0.1\nepochs: 3\nlr: 0.2\n', "gives 'lr' in line 1 and again in 3"),
        (b'model_kwargs:\n  a: 1\n  a: 2\n', "gives 'a' in line 2 and again in 3"),
        (b'lr: !!python/object/apply:os.getcwd []\n', 'is not YAML'),
        (b'aa: 2024-13-45\n', 'is not YAML'),
        (b'{[]: 1}\n', 'is not YAML'),
        (b'aa: \x00\n', 'is not YAML'),
        (b'aa: \xff\n', 'UTF-8'),
        (b'[' * 20_000, 'is not YAML'),
    ],
)
def test_unreadable_recipes(tmp_path, text, words):
    path = tmp_path / 'recipe.yaml'
    path.write_bytes(text)
    with pytest.raises(ValueError) as e:
        load_recipe(path)
    assert words in str(e.value) and 'recipe.yaml' in str(e.value) and '\n' not in str(e.value)


def test_missing_recipes(tmp_path):
    with pytest.raises(ValueError, match='no recipe'):
        load_recipe(tmp_path / 'none.yaml')
    with pytest.raises(ValueError, match='cannot read recipe'):
        load_recipe(tmp_path)


def test_options_come_from_the_parser(checkout):
    assert train_options(checkout / 'train.py') == dict(
        data=dict(type='str', flags=[], default=None, nargs='?'),
        batch_size=dict(type='int', flags=['--batch-size', '-b'], default=128),
        scale=dict(type='float', flags=['--scale'], default=None, nargs='+'),
        input_size=dict(type='int', flags=['--input-size'], default=None, nargs=3),
        amp=dict(type='bool', flags=['--amp'], default=False),
        mode=dict(type='str', flags=['--mode'], default=None, choices=['a', 'b']),
        model_kwargs=dict(type='kwargs', flags=['--model-kwargs'], default=None, nargs='*'),
    )


@pytest.mark.parametrize('source, words', [('x = 1', 'no argparse parser'), ('import no_such_module', 'No module')])
def test_a_script_that_is_not_train_py(checkout, source, words):
    (checkout / 'train.py').write_text(source)
    with pytest.raises(ValueError, match=words) as e:
        train_options(checkout / 'train.py')
    assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='no file'):
        train_options(checkout / 'none.py')


@pytest.mark.parametrize('name', ['cifar_paper', 'cifar_paper.yaml', 'imagenet_a2'])
def test_a_recipe_by_its_name(name, tmp_path, monkeypatch):
    """Ours, unless a file of that name is at hand; any other name is left as it is, for whoever reads it."""
    monkeypatch.chdir(tmp_path)
    ours = RECIPES / f'{name.removesuffix(".yaml")}.yaml'
    assert Path(find_recipe(name)).samefile(ours)
    (tmp_path / name).touch()
    assert find_recipe(name) == name
    for other in ('nosuch', 'mine.yaml', str(ours), 'a/cifar_paper.yaml'):
        assert find_recipe(other) == other


def test_a_misspelt_recipe_has_a_hint():
    with pytest.raises(ValueError, match="no recipe 'cifar_papr.yaml'. Did you mean 'cifar_paper'?"):
        load_recipe('cifar_papr.yaml')


VALUES = dict(
    int=st.integers(-(10**9), 10**9),
    float=st.one_of(st.integers(-99, 99), st.floats(allow_nan=False, allow_infinity=False)),
    bool=st.booleans(),
    str=st.text(max_size=9),
    kwargs=st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5)), max_size=2),
)
NAMES = sorted(name for name, option in OPTIONS.items() if 'choices' not in option)


def right(name):
    """Any value of the kind that an option takes."""
    option = OPTIONS[name]
    value, nargs = VALUES[option['type']], option.get('nargs')
    if nargs in (None, '?') or option['type'] == 'kwargs':
        return value
    low, high = (2, 2) if name in ('scale', 'ratio', 'cutmix_minmax') else {'+': (1, 3), '*': (0, 3)}.get(nargs, (3, 3))
    return st.lists(value, min_size=low, max_size=high)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_value_of_the_right_kind_passes(data):
    """Also when it is written as YAML and read again."""
    names = data.draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1, max_size=3))
    config = {name: data.draw(right(name)) for name in names}
    assert check_recipe(config, OPTIONS) == []
    assert check_recipe(yaml.safe_load(yaml.safe_dump(config)), OPTIONS) == []


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=80)),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    ),
)
def test_any_other_value_is_one_line_that_names_its_key(name, value):
    problems = check_recipe({name: value}, OPTIONS)
    assert len(problems) <= 1
    for problem in problems:
        assert problem.startswith(f'{name}: ') and len(problem.splitlines()) == 1 and len(problem) < 300


@given(st.one_of(st.integers(-(10**6), 10**6), st.floats(-1e6, 1e6)))
def test_the_number_that_is_advised_is_right(number):
    """What it says to write instead of a text is the number, as YAML reads it."""
    (problem,) = check_recipe(dict(lr=repr(number)), OPTIONS)
    assert yaml.safe_load(problem.split('; write ')[1].split(' (')[0]) == number
    assert check_recipe(dict(lr=number), OPTIONS) == []


def test_a_device_is_not_read_without_end():
    with pytest.raises(ValueError, match="cannot read recipe '/dev/zero': it is no regular file"):
        load_recipe('/dev/zero')
