"""A packed layer is the layer that it replaces, to the last rounding; where it can't be, it is not packed."""

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pearl.checkpoints import quantized
from pearl.errors import UsageError
from pearl.models import linear
from pearl.models.linear import BlockedLinear, Int8Linear, PackedLinear, chosen, pack, shift_of

needs_fbgemm = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="a torch without fbgemm"
)
needs_blocks = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="a processor without bfloat16 products"
)
needs_tiles = pytest.mark.skipif(
    not linear.tiles_are_right(), reason="a torch or a processor without oneDNN's product in 8 bits"
)
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # the relative error of one rounding


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def assert_same_product(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Within what a sum of float32 products may err, and one rounding to the layer's own type."""
    wanted = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        wanted, size = wanted + bias.double(), size + bias.double().abs()
    allowed = x.shape[-1] * 2.0**-24 * size + HALF_STEP[got.dtype] * 1.01 * wanted.abs()
    assert ((got.double() - wanted).abs() <= allowed).all()


@needs_fbgemm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 65])
def test_a_packed_layer_is_its_linear_layer(dtype, bias, rows):
    layer = nn.Linear(100, 70, bias=bias).bfloat16().to(dtype)
    packed = PackedLinear(layer.weight.detach(), layer.bias, shift_of(layer.weight.detach()))
    x = torch.randn(2, rows, 100).to(dtype)
    y = packed(x)
    assert y.dtype == dtype and y.shape == (2, rows, 70)
    assert_same_product(y, x, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


@needs_fbgemm
@pytest.mark.parametrize("scale", [2.0**-90, 1e-6, 1e4, 2.0**90])
def test_weights_far_from_one_lose_nothing(scale):
    weight = (torch.randn(48, 64) * scale).bfloat16()
    shift = shift_of(weight)
    assert shift is not None
    packed, x = PackedLinear(weight, None, shift), torch.randn(5, 64).bfloat16()
    assert_same_product(packed(x), x, weight, None)


@needs_fbgemm
def test_every_weight_is_kept_exactly_also_the_smallest_of_float16():
    steps = 2.0**-24 * torch.arange(1.0, 65.0)  # denormal in float16
    weight = torch.stack([steps, steps.flip(0), -steps, torch.linspace(-1, 1, 64).bfloat16().float()])
    assert shift_of(weight) == 0
    assert torch.equal(PackedLinear(weight, None, 0)(torch.eye(64)), weight.T)


def spread(low: float) -> torch.Tensor:
    """Weights of both signs from `low` to 1, as many of each size."""
    sizes = 10 ** (torch.rand(64, 64) * torch.tensor(low).log10())
    return sizes * torch.randn(64, 64).sign()


def test_a_shift_is_exact_or_there_is_none():
    for weight in (spread(1e-6).bfloat16(), spread(1e-9).bfloat16(), spread(1e-3).half(), torch.zeros(3, 3)):
        shift = shift_of(weight)
        scaled = weight.float() * 2.0**shift
        assert torch.equal(scaled.half().float(), scaled)
        assert torch.equal(scaled * 2.0**-shift, weight.float())
    assert shift_of(spread(1e-3).half()) == 0
    assert shift_of(torch.full((2, 2), 3.0).bfloat16()) == 0
    assert shift_of(torch.tensor([[2.0**40]])) == 14 - 40
    assert shift_of(torch.randn(64, 64)) is None
    assert shift_of(torch.tensor([[1.0, 2.0**-38]])) == 14  # the smallest that float16 has, then
    assert shift_of(torch.tensor([[1.0, 2.0**-39]])) is None


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fits = nn.Linear(16, 24).bfloat16().float()
        self.does_not = nn.Linear(16, 24)
        self.turned = Conv1D(24, 16).bfloat16().float()  # (out, in), and its weight is [in, out]
        self.inner = nn.Sequential(nn.ReLU(), nn.Linear(16, 24, bias=False).bfloat16().float())
        self.not_linear = nn.Embedding(10, 16)


@needs_fbgemm
def test_packing_changes_the_layers_that_fit_and_no_other():
    torch.manual_seed(0)
    parent, x = Parent(), torch.randn(3, 16)
    inexact, embedding = parent.does_not, parent.not_linear
    with torch.no_grad():
        before = [parent.fits(x), parent.turned(x), parent.inner(x)]
        assert pack(parent, "packed") == 1
        after = [parent.fits(x), parent.turned(x), parent.inner(x)]
    for layer in (parent.fits, parent.turned, parent.inner[1]):
        assert isinstance(layer, PackedLinear)
    assert parent.does_not is inexact and parent.not_linear is embedding
    torch.testing.assert_close(after, before)
    assert pack(parent, "packed") == 1  # packed layers stay


@needs_fbgemm
@pytest.mark.parametrize("name", ["llama", "llama-mha", "gpt2", "phi3"])
def test_a_packed_model_says_what_the_model_says(name):
    models = [tiny.random_model(tiny.CONFIGS[name]()).bfloat16().float() for _ in range(2)]
    assert pack(models[0], "packed") == 0
    assert not any(type(module) in (nn.Linear, Conv1D) for module in models[0].modules())
    text = torch.randint(tiny.VOCABULARY, (30,)).tolist()
    packed, plain = (tiny.verifier(model).read(text, 30) for model in models)
    torch.testing.assert_close(packed, plain, atol=1e-3, rtol=0)
    assert torch.equal(packed.argmax(-1), plain.argmax(-1))


@needs_blocks
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 65])
def test_a_blocked_layer_is_its_linear_layer(bias, rows):
    layer = nn.Linear(100, 70, bias=bias).bfloat16()
    x = torch.randn(2, rows, 100).bfloat16()
    y = BlockedLinear(layer.weight.detach(), layer.bias)(x)
    assert y.dtype == torch.bfloat16 and y.shape == (2, rows, 70)
    assert_same_product(y, x, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda weight: PackedLinear(weight, None, 0), id="packed", marks=needs_fbgemm),
        pytest.param(lambda weight: BlockedLinear(weight, None), id="blocked", marks=needs_blocks),
        pytest.param(lambda weight: Int8Linear(weight, None), id="int8", marks=needs_fbgemm),
    ],
)
def test_a_layer_takes_rows_in_any_shape(make):
    layer, x = make(torch.randn(24, 16).bfloat16()), torch.randn(2, 3, 16).bfloat16()
    y = layer(x)
    assert y.shape == (2, 3, 24) and layer(x[:0]).shape == (0, 3, 24)
    assert layer(x[0, 0]).shape == (24,)
    torch.testing.assert_close(layer(x[0, 0]), y[0, 0], atol=0.3, rtol=0)  # int8 rounds by the largest of a forward


@needs_fbgemm
@pytest.mark.parametrize("tiles", [False, pytest.param(True, marks=needs_tiles)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_8_bits_differ_by_rounding_only(monkeypatch, tiles: bool, dtype: torch.dtype, bias: bool):
    """By both libraries, whichever this processor has the instructions for."""
    monkeypatch.setattr(linear, "_tiles_are_sooner", lambda: tiles)
    layer = nn.Linear(96, 70, bias=bias).to(dtype)
    with torch.no_grad():
        layer.weight[5] = 0.0
    rounded = Int8Linear(layer.weight.detach(), layer.bias)
    assert (rounded._tiled is not None) == tiles
    for rows in (1, 2, 3, 9):
        x = torch.randn(rows, 96).to(dtype)
        x[0] = 0.0
        y, expected = rounded(x), layer(x).detach()
        assert y.dtype == dtype and y.shape == (rows, 70)
        assert (y - expected).float().abs().max() < 0.03, "steps of 1/127, in both"


@needs_fbgemm
@needs_tiles
def test_with_tiles_a_row_has_what_it_has_beside_others(monkeypatch):
    monkeypatch.setattr(linear, "_tiles_are_sooner", lambda: True)
    layer, x = Int8Linear(torch.randn(70, 96).bfloat16(), None), torch.randn(6, 96).bfloat16()
    assert torch.equal(layer(x)[:4], layer(torch.cat([x[:4], 1000 * x[4:]]))[:4])


@needs_blocks
class Router(nn.Module):
    """As that of LongCat-Flash."""

    def __init__(self, outputs: int = 5):
        super().__init__()
        self.classifier, self.other = nn.Linear(8, outputs, bias=False), nn.Linear(8, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.classifier.weight)


@needs_fbgemm
def test_a_layer_whose_weight_a_router_reads_itself_stays_torchs_own():
    router = Router().bfloat16()
    with torch.no_grad():
        x = torch.randn(2, 8).bfloat16()
        wanted = router(x)
        pack(router, "packed")
        assert type(router.classifier) is nn.Linear and type(router.other) is PackedLinear
        assert torch.equal(router(x), wanted)


def test_blocks_are_for_layers_in_bfloat16():
    parent = nn.ModuleDict({"fits": nn.Linear(16, 24).bfloat16(), "does_not": nn.Linear(16, 24)})
    assert pack(parent, "blocked") == 1
    assert isinstance(parent["fits"], BlockedLinear) and type(parent["does_not"]) is nn.Linear


def test_who_asks_for_a_kernel_gets_it(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    for kernel in ("stock", "packed", "blocked", "int8"):
        assert chosen(kernel, torch.bfloat16) == kernel
    parent = Parent()
    assert pack(parent, "stock") == 4 and type(parent.fits) is nn.Linear


def test_blocks_that_there_can_not_be_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="blocked is for weights in bfloat16"):
        chosen("blocked", torch.float32)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(UsageError, match="which this is not: leave it out"):
        chosen("blocked", torch.bfloat16)


def test_a_cpu_with_bfloat16_products_multiplies_by_blocks_what_is_in_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert chosen("auto", torch.bfloat16) == "blocked"
    assert chosen("auto", torch.float32) != "blocked"


@needs_fbgemm
def test_a_cpu_without_them_packs(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert chosen("auto", torch.bfloat16) == chosen("auto", torch.float32) == "packed"


def eight_bit_layers(outliers: int) -> tuple[torch.Tensor, nn.Module, torch.Tensor]:
    """What bitsandbytes says of each row alone, our layer, and rows [6, 128], half of them with `outliers`."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    theirs = bitsandbytes.nn.Linear8bitLt(128, 96, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict({"weight": torch.randn(96, 128) / 11, "bias": torch.randn(96)})
    parent = nn.Sequential(theirs.to("cpu")).eval()
    rows = torch.randn(6, 128).clamp(-3, 3).half().float()  # bitsandbytes rounds to float16 first
    for row in range(3):
        rows[row, torch.randperm(128)[:outliers]] = 40.0
    with torch.inference_mode():
        wanted = torch.stack([parent(row[None])[0] for row in rows])
    assert quantized.make_rows_independent(parent) == 1
    return wanted, parent[0], rows


@pytest.mark.parametrize("outliers", [0, 1, 5])
@pytest.mark.filterwarnings("ignore")
def test_a_row_of_an_8_bit_layer_has_the_result_that_it_has_alone(outliers):
    wanted, ours, rows = eight_bit_layers(outliers)
    together = ours(rows[None])[0]
    assert torch.equal(together, torch.cat([ours(row[None]) for row in rows]))
    assert torch.equal(together[2:4], ours(rows[2:4]))
    torch.testing.assert_close(together, wanted, atol=2e-3, rtol=2e-3)  # what bitsandbytes says of it alone
