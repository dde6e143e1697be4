"""Every form of a product on a CPU against the definition: values, gradients, chunks, rounding."""

import sys

import pytest
import torch

from kronbert import forms, native, reference
from kronbert.forms import DENSE, FORMS, GATHERED, LOW_RANK, Form, forms_of
from kronbert.shapes import KroneckerShape

# All sides different where they can be; stumps of every kind; ranks 1 to 4.
SPECS = [
    "5x4*2x7",
    "3:5x4*2x7",
    "2:2x3*11x6",
    "4:16x9*3x2",
    "2:6x5*1x4",  # b_out = 1
    "6x1*3x4",  # a_in = 1
    "3:6x1*3x4",
    "1x5*4x3",
    "2:7x4*2x1",
    "1x1*5x6",
    "5x6*1x1",
]
LOW_RANKS = ["15x1*1x14", "4:15x1*1x14"]
CASES = [
    pytest.param(KroneckerShape.parse(spec), form, id=f"{spec} {form}")
    for spec in [*SPECS, *LOW_RANKS]
    for form in forms_of(KroneckerShape.parse(spec))
]
EXACT = {"rtol": 0, "atol": 1e-12}


def terms(shape):
    a = torch.randn(shape.rank, shape.a_out, shape.a_in, dtype=torch.float64)
    b = torch.randn(shape.rank, shape.b_out, shape.b_in, dtype=torch.float64)
    return a, b, torch.randn(shape.out_features, dtype=torch.float64)


def rows(shape, n):
    return torch.randn(n, shape.in_features, dtype=torch.float64)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 3 rows, whatever the form: 17 rows end in a partial one."""
    monkeypatch.setattr(forms, "CHUNK_BYTES", 1)
    monkeypatch.setattr(forms, "FEWEST_ROWS", 3)


@pytest.mark.parametrize("n", [0, 1, 17])
@pytest.mark.parametrize(("shape", "form"), CASES)
def test_run_is_the_definition(shape, form, n):
    a, b, bias = terms(shape)
    x = rows(shape, n)
    expected = reference.kron_linear(x, a, b)
    matrices = forms.prepare(form, a, b)
    torch.testing.assert_close(forms.run(form, shape, x, matrices), expected, **EXACT)
    torch.testing.assert_close(forms.run(form, shape, x, matrices, bias), expected + bias, **EXACT)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("shape", "form"), CASES)
def test_run_writes_into_out(shape, form, biased):
    a, b, bias = terms(shape)
    x = rows(shape, 5)
    expected = reference.kron_linear(x, a, b, bias if biased else None)
    around = torch.full((9, shape.out_features), 7.0, dtype=torch.float64)
    matrices = forms.prepare(form, a, b)
    got = forms.run(form, shape, x, matrices, bias if biased else None, out=around[2:7])
    assert got.data_ptr() == around[2:7].data_ptr()
    torch.testing.assert_close(around[2:7], expected, **EXACT)
    assert (around[:2] == 7).all()
    assert (around[7:] == 7).all()


@pytest.mark.parametrize("n", [0, 3, 17])
@pytest.mark.parametrize(("shape", "form"), CASES)
def test_chunks_are_the_whole(shape, form, n, small_chunks, monkeypatch):
    a, b, bias = terms(shape)
    x = rows(shape, n)
    matrices = forms.prepare(form, a, b)
    seen = []

    def counted(form, shape, x, *rest, **more):
        seen.append(x.shape[0])
        return run(form, shape, x, *rest, **more)

    run = forms.run
    monkeypatch.setattr(forms, "run", counted)
    for given in (bias, None):
        expected = reference.kron_linear(x, a, b, given)
        got = forms.run_in_chunks(form, shape, x, matrices, given)
        torch.testing.assert_close(got, expected, **EXACT)
    chunked = n == 17 and ("turn" in form or "mix" in form)
    assert seen == 2 * ([3, 3, 3, 3, 3, 2] if chunked else [n])


@pytest.mark.parametrize(("shape", "form"), CASES)
def test_inputs_are_not_written(shape, form, small_chunks):
    a, b, bias = terms(shape)
    x = rows(shape, 7)
    matrices = forms.prepare(form, a, b)
    before = [t.clone() for t in (x, a, b, bias, *matrices)]
    forms.run(form, shape, x, matrices, bias)
    forms.run_in_chunks(form, shape, x, matrices, bias)
    for tensor, kept in zip((x, a, b, bias, *matrices), before, strict=True):
        assert torch.equal(tensor, kept)


@pytest.mark.parametrize(("shape", "form"), CASES)
def test_gradients_are_the_definitions(shape, form):
    operands = [rows(shape, 4), *terms(shape)]
    weigh = torch.randn(4, shape.out_features, dtype=torch.float64)
    for t in operands:
        t.requires_grad_()
    x, a, b, bias = operands
    y = forms.run(form, shape, x, forms.prepare(form, a, b), bias)
    got = torch.autograd.grad((y * weigh).sum(), operands)
    expected = torch.autograd.grad((reference.kron_linear(x, a, b, bias) * weigh).sum(), operands)
    for name, one, other in zip(("x", "a", "b", "bias"), got, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def rms(error):
    return error.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["24x8*3x10", "4:24x8*3x10", "2:3x10*24x8", "4:96x1*1x80"])
def test_rounding_is_eagers(spec, dtype):
    shape = KroneckerShape.parse(spec)
    a, b, bias = (t.to(dtype) for t in terms(shape))
    x = rows(shape, 64).to(dtype)
    exact = reference.kron_linear(x.double(), a.double(), b.double(), bias.double())
    eager = rms(reference.kron_linear(x, a, b, bias) - exact)
    assert eager > 0
    for form in forms_of(shape):
        got = forms.run_in_chunks(form, shape, x, forms.prepare(form, a, b), bias)
        assert got.dtype == dtype
        error = rms(got - exact)
        assert error <= 2 * eager, f"{form}: off by {error:.2e}, eager by {eager:.2e}"


@pytest.mark.parametrize("n", [1, 4, 5, 70])
@pytest.mark.parametrize("spec", ["48x36*2x3", "2:3x2*40x64", "4:33x35*5x2", "40:96x1*1x80"])
def test_packed_matrices_round_no_worse(spec, n, small_chunks):
    shape = KroneckerShape.parse(spec)
    a, b, bias = (t.bfloat16() for t in terms(shape))
    x = rows(shape, n).bfloat16()
    exact = reference.kron_linear(x.double(), a.double(), b.double(), bias.double())
    eager = rms(reference.kron_linear(x, a, b, bias) - exact)
    packed = 0
    for form in forms_of(shape):
        plain = forms.prepare(form, a, b)
        matrices = forms.ready(form, shape, plain, n)
        packed += sum(matrix.is_mkldnn for matrix in matrices)
        for given in (bias, None):
            expected = exact if given is not None else exact - bias.double()
            for run in (forms.run, forms.run_in_chunks):
                error = rms(run(form, shape, x, matrices, given) - expected)
                assert error <= 2 * eager, f"{form}: off by {error:.2e}, eager by {eager:.2e}"
        out = torch.empty(n, shape.out_features, dtype=torch.bfloat16)
        assert forms.run(form, shape, x, matrices, bias, out=out).data_ptr() == out.data_ptr()
        assert rms(out - exact) <= 2 * eager
    assert bool(packed) == forms._packs()


# Sides that the kernels take: a tiny b, both b's sides tiny, slices of 16 and more.
KERNEL_SPECS = ["32x16*2x4", "3:16x32*16x8", "2:32x48*3x2", "3:5x4*16x32", "2:4x3*32x48"]
needs_kernels = pytest.mark.skipif(
    native.library() is None, reason="no row kernels here: off Linux, no C compiler, or turned off"
)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, 5, 40])
@pytest.mark.parametrize("spec", KERNEL_SPECS)
def test_kernels_round_no_worse(spec, n, dtype, small_chunks, monkeypatch):
    shape = KroneckerShape.parse(spec)
    a, b, bias = (t.to(dtype) for t in terms(shape))
    x = rows(shape, 8 * n).to(dtype)  # n at a time: the error of a few numbers is chance
    exact = reference.kron_linear(x.double(), a.double(), b.double(), bias.double())
    eager = rms(reference.kron_linear(x, a, b, bias) - exact)
    seen, call = [], native._call
    monkeypatch.setattr(native, "_call", lambda *args: (seen.append(args[0]), call(*args)))
    for form in forms_of(shape, kernels=True):
        seen.clear()
        matrices = forms.ready(form, shape, forms.prepare(form, a, b), n, kernels=True)
        before = [t.clone() for t in (x, bias)]
        for given in (bias, None):
            expected = exact if given is not None else exact - bias.double()
            for run in (forms.run, forms.run_in_chunks):
                parts = [run(form, shape, p, matrices, given, kernels=True) for p in x.split(n)]
                got = torch.cat(parts)
                assert got.dtype == dtype
                error = rms(got - expected)
                assert error <= 2 * eager, f"{form}: off by {error:.2e}, eager by {eager:.2e}"
        around = torch.full((8 * n + 2, shape.out_features), 7.0, dtype=dtype)
        for part, out in zip(x.split(n), around[1:-1].split(n), strict=True):
            got = forms.run(form, shape, part, matrices, bias, out=out, kernels=True)
            assert got.data_ptr() == out.data_ptr()
        assert rms(around[1:-1] - exact) <= 2 * eager
        assert (around[0] == 7).all()
        assert (around[-1] == 7).all()
        assert all(torch.equal(t, old) for t, old in zip((x, bias), before, strict=True))
        expected_calls = set()
        if form in GATHERED:
            expected_calls |= {f"kronbert_{stage}" for stage in form[1:] if stage != "fold"}
        elif "mix" in form and forms.kernels_mix(form, shape):
            expected_calls = {"kronbert_mix"}
        assert set(seen) == expected_calls, form


def test_which_mixes_the_kernels_take():
    b_first, a_first = Form("b", "rows", "mix"), Form("a", "mix", "rows")
    shape = KroneckerShape(5, 4, 16, 40, 4)
    assert forms.kernels_mix(b_first, shape)
    assert not forms.kernels_mix(a_first, shape)  # slices 40 wide
    assert not forms.kernels_mix(b_first, KroneckerShape(5, 4, 16, 40, 5))  # 20 slices
    assert forms.kernels_mix(a_first, KroneckerShape(5, 16, 3, 48, 9))
    assert not forms.kernels_mix(a_first, KroneckerShape(5, 17, 3, 48))


def test_which_forms_gather():
    def gathered(*sides):
        return forms_of(KroneckerShape(*sides), kernels=True)[len(FORMS) :]

    assert gathered(16, 32, 2, 8) == GATHERED
    assert gathered(15, 32, 2, 8) == GATHERED[1:]
    assert gathered(16, 32, 3, 8) == GATHERED[1:]
    assert gathered(16, 30, 2, 8) == ()
    assert gathered(16, 32, 2, 6) == ()
    assert gathered(16, 32, 2, 32) == ()
    assert not set(GATHERED) & set(forms_of(KroneckerShape(16, 32, 2, 8)))
    assert forms_of(KroneckerShape(16, 1, 1, 16, 4), kernels=True) == (DENSE, LOW_RANK)


def test_what_is_packed():
    large = torch.randn(40, 64)
    assert forms.packed(large, 5) is large
    assert forms.packed(large.half(), 5).layout == torch.strided
    narrow = torch.randn(16, 64).bfloat16()
    assert forms.packed(narrow, 5) is narrow
    if not forms._packs():
        pytest.skip("oneDNN multiplies no bfloat16 on this processor")
    for strided in (large.bfloat16(), torch.randn(64, 40).bfloat16().T):
        packed = forms.packed(strided, 5)
        assert packed.is_mkldnn
        x = torch.randn(5, 64).bfloat16()
        torch.testing.assert_close(
            forms.plain_product(x, packed), torch.nn.functional.linear(x, strided)
        )


@pytest.mark.parametrize("spec", [*SPECS, *LOW_RANKS])
def test_weight_is_the_definition(spec):
    a, b, _ = terms(KroneckerShape.parse(spec))
    torch.testing.assert_close(forms.weight(a, b), reference.kron_weight(a, b), **EXACT)
    # Strides of parameters that were transposed or sliced.
    a = a.transpose(1, 2).contiguous().transpose(1, 2)
    b = b.repeat_interleave(2, 2)[:, :, ::2]
    torch.testing.assert_close(forms.weight(a, b), reference.kron_weight(a, b), **EXACT)


def test_forms_of():
    assert forms_of(KroneckerShape(5, 4, 2, 7)) == FORMS
    assert forms_of(KroneckerShape(15, 1, 1, 14, 4)) == (DENSE, LOW_RANK)
    assert forms_of(KroneckerShape(15, 1, 2, 14)) == FORMS  # a_in = 1 alone is no low rank
    assert forms_of(KroneckerShape(15, 2, 1, 14)) == FORMS
    assert len(set(FORMS)) == len(FORMS)


def test_names():
    assert str(DENSE) == "dense"
    assert str(LOW_RANK) == "b:rows+rows"
    assert str(Form("a", "turn", "fold")) == "a:turn+fold"
    assert len({str(form) for form in (*FORMS, LOW_RANK)}) == len(FORMS) + 1


def test_chunks_hold_as_many_bytes_as_they_may(monkeypatch):
    monkeypatch.setattr(forms, "CHUNK_BYTES", 12000)
    monkeypatch.setattr(forms, "FEWEST_ROWS", 2)
    shape = KroneckerShape(3, 5, 2, 7, 4)  # 6 x 35; between the stages 4*5*2 or 4*3*7
    assert forms.chunk_rows(Form("b", "rows", "mix"), shape, 4) == 12000 // (40 * 4)
    assert forms.chunk_rows(Form("a", "turn", "rows"), shape, 4) == 12000 // (84 * 4)
    assert forms.chunk_rows(Form("a", "turn", "rows"), shape, 2) == 12000 // (84 * 2)
    wide_in = KroneckerShape(3, 5, 2, 7)
    assert forms.chunk_rows(Form("b", "rows", "mix"), wide_in, 4) == 12000 // (35 * 4)
    for form in (DENSE, LOW_RANK, Form("b", "rows", "fold"), Form("a", "fold", "rows")):
        assert forms.chunk_rows(form, shape, 4) == sys.maxsize
    monkeypatch.setattr(forms, "CHUNK_BYTES", 100)
    assert forms.chunk_rows(Form("b", "rows", "mix"), shape, 4) == 2
