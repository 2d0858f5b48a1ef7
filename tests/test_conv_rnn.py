import pytest
import torch
import transcription
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_regnet_rnn.conv_rnn import CELLS, ConvGRU, ConvLSTM

KINDS = list(CELLS)


def make(kind, width=3):
    cell = CELLS[kind](width, dtype=torch.float64)
    torch.nn.init.normal_(cell.bias)
    return cell


def tensors(*shape, n=3):
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(n)]


@pytest.mark.parametrize('kind', KINDS)
@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 2), width=st.integers(1, 4), height=st.integers(1, 6), length=st.integers(1, 6))
def test_cell_equals_transcription(kind, batch, width, height, length):
    cell = make(kind, width)
    x, h, c = tensors(batch, width, height, length)
    weights = transcription.gate_weights(cell)
    for ours, theirs in zip(cell(x, h, c), transcription.CELLS[kind](x, h, c, weights)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    zero = torch.zeros_like(x)
    ours, theirs = cell(x)[0], transcription.CELLS[kind](x, zero, zero, weights)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize('kind', KINDS)
def test_cell_gradients_equal_transcription(kind):
    cell = make(kind)
    inputs = [t.requires_grad_() for t in tensors(2, 3, 5, 4)]
    leaves = [*inputs, *cell.parameters()]
    seed = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    ours = cell(*inputs)
    theirs = transcription.CELLS[kind](*inputs, transcription.gate_weights(cell))
    for a, b in zip(*(torch.autograd.grad([(o * seed).sum() for o in out], leaves) for out in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize('kind', KINDS)
def test_gradcheck(kind):
    cell = make(kind, 2)
    x, h, c = (t.requires_grad_() for t in tensors(1, 2, 3, 3))
    names, values = zip(*cell.named_parameters())

    def run(x, h, c, *values):
        return torch.func.functional_call(cell, dict(zip(names, values)), (x, h, c))

    assert torch.autograd.gradcheck(run, (x, h, c, *values))


def one_by_one(cell, rnn, order):
    """Copy a cell whose maps are 1x1 into torch's fully connected cell: only the kernels' middle taps matter."""
    with torch.no_grad():
        middle = cell.dw[:, :, 1, 1]
        index = [cell.gates.index(g) for g in order]
        for tap, weight in ((0, rnn.weight_ih), (1, rnn.weight_hh)):
            weight.copy_(torch.cat([torch.diag(cell.pw[k, :, tap] * middle[k]) for k in index]))
        rnn.bias_ih.copy_(torch.cat([cell.bias[k] for k in index]))
        rnn.bias_hh.zero_()


def test_lstm_is_torch_lstm_on_single_pixels():
    cell, rnn = make('convlstm'), torch.nn.LSTMCell(3, 3, dtype=torch.float64)
    one_by_one(cell, rnn, 'ifgo')
    x, h, c = tensors(4, 3, 1, 1)
    for ours, theirs in zip(cell(x, h, c), rnn(x.flatten(1), (h.flatten(1), c.flatten(1)))):
        torch.testing.assert_close(ours.flatten(1), theirs, rtol=0, atol=1e-12)


def test_rnn_is_torch_rnn_on_single_pixels():
    cell, rnn = make('convrnn'), torch.nn.RNNCell(3, 3, dtype=torch.float64)
    one_by_one(cell, rnn, 'h')
    x, h, _ = tensors(4, 3, 1, 1)
    torch.testing.assert_close(cell(x, h)[0].flatten(1), rnn(x.flatten(1), h.flatten(1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize('kind', KINDS)
def test_parameters(kind):
    cell = CELLS[kind](16)
    assert sum(p.numel() for p in cell.parameters()) == 12 * 16 * len(cell.gates)
    assert len(cell.gates) == dict(convrnn=1, convgru=3, convlstm=4)[kind]


def test_forget_gate_starts_open():
    cell = ConvLSTM(4)
    assert cell.bias.tolist() == [[0.0] * 4, [1.0] * 4, [0.0] * 4, [0.0] * 4]
    assert torch.count_nonzero(ConvGRU(4).bias) == 0


@pytest.mark.parametrize('kind', KINDS)
def test_reparameterize_keeps_the_function(kind):
    cell = make(kind)
    x, h, c = tensors(2, 3, 5, 5)
    before = cell(x, h, c)
    cell.reparameterize()
    cell.reparameterize()  # a second time changes nothing
    assert sorted(name for name, _ in cell.named_parameters()) == ['bias', 'weight']
    assert cell.weight.shape == (3 * len(cell.gates), 2, 3, 3)
    for a, b in zip(before, cell(x, h, c)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gate_is_one_grouped_convolution_over_interleaved_channels():
    cell = make('convrnn')
    cell.reparameterize()
    x, h, _ = tensors(2, 3, 4, 5)
    interleaved = torch.stack((x, h), dim=2).flatten(1, 2)
    out = torch.nn.functional.conv2d(interleaved, cell.weight, cell.bias[0], padding=1, groups=3).tanh()
    torch.testing.assert_close(cell(x, h)[0], out, rtol=0, atol=1e-12)


def test_width_below_one():
    with pytest.raises(ValueError, match='width must be at least 1, got 0'):
        CELLS['convlstm'](0)
