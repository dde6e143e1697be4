"""Tables whose later groups make a block of rows only: every way a lookup can run, and models."""

import pytest
import torch
from torch import Tensor, nn

from kronbert import KroneckerEmbedding, KroneckerLMHead, ShapeError, functional, reference
from kronbert.shapes import parse_groups

ROWS, WIDTH = 23, 12
TABLES = {
    "two blocks": "2:23x1*1x12 + 3:5x1*1x12@4 + 1:9x1*1x12@14",
    "blocks that overlap, and a whole group": "23x4*1x3 + 3:7x2*1x6@2 + 2:23x1*1x12 + 4:6x3*1x4@5",
    "a block from row 0 and one to the last": "1:23x1*1x12 + 2:8x1*1x12 + 5:3x6*1x2@20",
    "shared rows in a block": "2:23x1*1x12 + 2:3x4*4x3@6",
}
SHARED = "2:8x4*3x3 + 2:2x3*3x4@5 + 3:1x2*7x6@17"  # 24 x 12, b_out > 1 everywhere
IDS = torch.tensor([[0, 22, 4, 8, 9], [14, 13, 13, 3, 20]])
Terms = tuple[list[Tensor], list[Tensor], tuple[int, ...]]


@pytest.fixture(params=["chosen rows", "all rows"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How eager lookups and logits on a CPU add a block; the second is everybody else's way."""
    if request.param == "chosen rows":  # as in float32; these tests compare in float64
        monkeypatch.setitem(functional.cpu.DTYPES, torch.float64, "float32")
    else:
        monkeypatch.setattr(functional.cpu, "takes", lambda *args: False)
    return request.param


def matrices(spec: str, dtype: torch.dtype = torch.float64) -> Terms:
    """a (a_out, rank, a_in) as tables hold them, b, starts."""
    groups = parse_groups(spec)
    a = [torch.randn(s.a_out, s.rank, s.a_in, dtype=torch.float64).to(dtype) for s in groups]
    b = [torch.randn(s.rank, s.b_out, s.b_in, dtype=torch.float64).to(dtype) for s in groups]
    for one in (*a, *b):
        one.requires_grad_()
    return a, b, tuple(shape.start for shape in groups)


def defined(terms: Terms) -> Tensor:
    a, b, starts = terms
    return reference.kron_weight([one.transpose(0, 1) for one in a], b, starts)


def gradients(y: Tensor, terms: Terms) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), [*terms[0], *terms[1]]
    )


def test_the_definition_is_a_sum_over_rows():
    a, b, starts = matrices(TABLES["two blocks"])
    table = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    for one_a, one_b, start in zip(a, b, starts, strict=True):
        for row in range(one_a.shape[0]):
            table[start + row] += one_a[row, :, 0].detach() @ one_b[:, 0].detach()
    torch.testing.assert_close(defined((a, b, starts)).detach(), table)


@pytest.mark.parametrize("spec", [*TABLES.values(), SHARED], ids=[*TABLES, "shared rows"])
def test_lookups_and_their_gradients(spec, way):
    terms = a, b, starts = matrices(spec)
    torch.testing.assert_close(functional.rebuild_table(*terms), defined(terms))
    for ids in (IDS, IDS.int(), IDS.T, IDS[:1, :1], torch.tensor(22), IDS[:0], torch.tensor([3])):
        found = functional.kron_embedding(ids, a, b, starts=starts)
        expected = defined(terms)[ids.long()]
        torch.testing.assert_close(found, expected)
        for ours, theirs in zip(gradients(found, terms), gradients(expected, terms), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("spec", [*TABLES.values(), SHARED], ids=[*TABLES, "shared rows"])
def test_logits_and_their_gradients(spec, way):
    terms = a, b, starts = matrices(spec)
    bias = torch.randn(len(defined(terms)), dtype=torch.float64)
    for h in (torch.randn(2, 3, WIDTH), torch.randn(WIDTH), torch.randn(0, WIDTH)):
        found = functional.kron_logits(h.double(), a, b, bias, starts=starts)
        expected = reference.kron_logits(
            h.double(), [one.transpose(0, 1) for one in a], b, bias, starts
        )
        torch.testing.assert_close(found, expected)
        for ours, theirs in zip(gradients(found, terms), gradients(expected, terms), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("spec", ["2:7x1*1x6 + 2:3x2*1x3@2", "6x2*1x3 + 2x3*2x2@1"])
def test_first_and_second_derivatives(spec, way):
    a, b, starts = matrices(spec)
    ids, h = torch.tensor([0, 3, 3, 5]), torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    for call in (
        lambda h, *ab: functional.kron_embedding(ids, ab[:2], ab[2:], starts=starts) * h[0],
        lambda h, *ab: functional.kron_logits(h, ab[:2], ab[2:], starts=starts),
    ):
        assert torch.autograd.gradcheck(call, (h, *a, *b))
        assert torch.autograd.gradgradcheck(call, (h, *a, *b))


class Both(nn.Module):
    """A lookup and the logits of its rows."""

    def __init__(self, spec: str):
        super().__init__()
        self.table = KroneckerEmbedding(ROWS, WIDTH, parse_groups(spec))
        self.head = KroneckerLMHead(self.table, nn.Parameter(torch.randn(ROWS)))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def traced(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, (IDS,), check_trace=False)


def exported(model: nn.Module) -> nn.Module:
    rows = torch.export.Dim("rows", min=1, max=64)
    return torch.export.export(model, (IDS,), dynamic_shapes=({0: rows},)).module()


@pytest.mark.parametrize(
    "make",
    [lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"), exported, traced],
    ids=["compiled", "exported", "traced"],
)
@pytest.mark.parametrize("spec", TABLES.values(), ids=TABLES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_without_eager(spec, make):
    torch.compiler.reset()
    model = Both(spec)
    other = make(model)
    ids = torch.cat([IDS, IDS.flip(1), IDS + (IDS < 22)])
    expected = model(ids)
    wanted = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    found = other(ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().mean(), list(model.parameters())), wanted, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", TABLES.values(), ids=TABLES)
def test_transformations(spec):
    terms = a, b, starts = matrices(spec)
    steps = [torch.randn_like(one) for one in (*a, *b)]

    def rows(*ab: Tensor) -> Tensor:
        return functional.kron_embedding(IDS, ab[: len(a)], ab[len(a) :], starts=starts)

    def define(*ab: Tensor) -> Tensor:
        return defined((list(ab[: len(a)]), list(ab[len(a) :]), starts))[IDS]

    given = tuple(one.detach() for one in (*a, *b))
    for ours, theirs in zip(
        torch.func.jvp(rows, given, tuple(steps)),
        torch.func.jvp(define, given, tuple(steps)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    many = torch.vmap(lambda ids: functional.kron_embedding(ids, a, b, starts=starts))(IDS)
    torch.testing.assert_close(many, defined(terms)[IDS])
    # Blocks of several models beside one first group.
    last = torch.stack([given[len(a) - 1], steps[len(a) - 1]])
    one_model = lambda x: rows(*given[: len(a) - 1], x, *given[len(a) :])  # noqa: E731
    torch.testing.assert_close(
        torch.vmap(one_model)(last), torch.stack([one_model(x) for x in last])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", TABLES.values(), ids=TABLES)
def test_rounding_and_autocast(spec, dtype):
    wide = matrices(spec, torch.float32)
    a, b = ([one.detach().to(dtype) for one in part] for part in wide[:2])
    starts, h = wide[2], torch.randn(7, WIDTH).to(dtype)
    exact, eager = (
        reference.kron_weight(
            [one.to(kind).transpose(0, 1) for one in a], [one.to(kind) for one in b], starts
        )
        for kind in (torch.float64, dtype)
    )
    for found, plain, right in (
        (functional.kron_embedding(IDS, a, b, starts=starts), eager[IDS], exact[IDS]),
        (functional.kron_logits(h, a, b, starts=starts), h @ eager.mT, h.double() @ exact.mT),
    ):
        assert found.dtype == dtype
        off, allowed = ((y.double() - right).square().mean().sqrt() for y in (found, plain))
        assert off <= 2 * allowed, f"{dtype}: off by {off:.1e}, eager by {allowed:.1e}"
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            found = functional.kron_embedding(IDS, wide[0], wide[1], starts=starts)
            logits = functional.kron_logits(h.float(), wide[0], wide[1], starts=starts)
        # as autocast does with nn.Embedding and nn.Linear
        assert torch.equal(found, functional.kron_embedding(IDS, *wide[:2], starts=starts))
        assert torch.equal(logits, functional.kron_logits(h, a, b, starts=starts))
        assert all(g.dtype == torch.float32 for g in gradients(found.float(), wide))


@pytest.mark.parametrize("padding_idx", [3, 8, -4])
def test_the_padding_entry_inside_and_outside_a_block(padding_idx, way):
    """As `nn.Embedding`: the same rows, and gradients as if the padding were not there."""
    terms = a, b, starts = matrices(TABLES["two blocks"])
    ids = torch.tensor([3, 8, 19, 8, 4, 14, 3, 0])
    found = functional.kron_embedding(ids, a, b, padding_idx, starts=starts)
    assert torch.equal(found, functional.kron_embedding(ids, a, b, starts=starts))
    kept = ids[ids != padding_idx % ROWS]
    slope = torch.randn(8, WIDTH, dtype=torch.float64)
    wanted = (defined(terms)[kept] * slope[ids != padding_idx % ROWS]).sum()
    ours = torch.autograd.grad((found * slope).sum(), [*a, *b])
    for one, other in zip(ours, torch.autograd.grad(wanted, [*a, *b]), strict=True):
        torch.testing.assert_close(one, other)
    assert not ours[0][padding_idx].any()
    layer = KroneckerEmbedding(ROWS, WIDTH, parse_groups(TABLES["two blocks"]), padding_idx)
    assert not layer(torch.tensor([padding_idx % ROWS])).any()
    assert (layer.a_1.any(2).any(1)).sum() == (4 if padding_idx == 8 else 5)


@pytest.mark.parametrize("wrong", [ROWS, -1, -ROWS])
def test_ids_outside_the_table(wrong, way):
    a, b, starts = matrices(TABLES["a block from row 0 and one to the last"])
    with pytest.raises(IndexError):
        functional.kron_embedding(torch.tensor([0, wrong]), a, b, starts=starts)


@pytest.mark.parametrize("starts", [(0, 4), (1, 4, 13), (0, -1, 14), (0, 19, 14), (0, 4, 15)])
def test_starts_that_do_not_fit(starts):
    a, b, _ = matrices(TABLES["two blocks"])
    for call in (functional.kron_embedding, functional.kron_logits):
        with pytest.raises(ShapeError, match=r"groups of \[23, 5, 9\] rows from .* one start per"):
            call(
                IDS if call is functional.kron_embedding else torch.randn(WIDTH),
                a,
                b,
                starts=starts,
            )
    with pytest.raises(ShapeError, match="23x12 and 5x12 and 9x12: expected one size"):
        functional.kron_embedding(IDS, a, b)
    with pytest.raises(ShapeError, match="expected one size"):
        functional.kron_embedding(IDS, a, [*b[:2], b[2][..., 1:]], starts=(0, 4, 14))
