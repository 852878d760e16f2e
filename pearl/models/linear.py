"""Linear layers for CPUs: several rows for the price of one, and the same bits.

With bfloat16 instructions that is oneDNN's product with a weight in its own layout (`BlockedLinear`). Without them
torch multiplies bfloat16 row by row (8 rows cost 8 times one row), and its float32 product of 2 or 3 rows costs as many
single ones and rounds differently. Verifying guesses then has no advantage. FBGEMM's product with a weight
packed in float16 accumulates in float32, reads the weight once for six rows, and sums each row in the same order
whatever the others hold (`batch_invariance` finds the row counts for which that is so, on the user's machine).

A weight that came from a bfloat16 or 4-bit checkpoint is *exactly* a float16 number times a power of two, unless some
entries are 2^29 times smaller than the largest; `shift_of` tells, and a layer that can't be stays as it is.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pearl.errors import UsageError
from pearl.models import timing

FIRST_ROWS = 32  # of a weight, kept readable where the layer's own layout is not
_PIECE = 1 << 18  # entries looked at together
_ROUTER = 1000  # outputs, at most, of a layer whose weight a router may read itself
_USUAL_ROWS = 8  # of a pass, for which a layout is chosen
_FEW_ROWS = 2  # FBGEMM's 8 bits are sooner with up to so many, whatever the processor
_CACHE, _ROUNDS = 12_000_000, 5  # numbers of four bytes that push others out of a cache; rounds that are timed


class PackedLinear(nn.Module):
    """y = x W^T + b with W packed in float16; x and y in the dtype of the layer that it replaces."""

    def __init__(self, weight: Tensor, bias: Tensor | None, shift: int):
        """weight: [out, in]; `shift`: W is stored as W * 2^shift, an exact change of exponent."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.empty = weight.new_empty(0)  # as what it takes is
        self._scale = 2.0**-shift
        scaled = weight.float()
        if shift:
            scaled = scaled * 2.0**shift  # a copy: float() of a float32 weight is the weight itself
        self._packed = torch.ops.quantized.linear_prepack_fp16(scaled, None)
        self.register_buffer("_bias", None if bias is None else bias.detach().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.sums(x).to(self.empty)

    def sums(self, x: Tensor) -> Tensor:
        """y before it is rounded to the layer's dtype, float32."""
        y = torch.ops.quantized.linear_dynamic_fp16(_rows(x), self._packed).view(*x.shape[:-1], self.out_features)
        if self._scale != 1:
            y = y.mul_(self._scale)
        if self._bias is not None:
            y = y.add_(self._bias)
        return y


class BlockedLinear(nn.Module):
    """y = x W^T + b in bfloat16, W in the layout in which oneDNN multiplies it; torch's own layer would bring it into
    that layout in every forward, which takes as long as the product of a few rows."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """weight: bfloat16 [out, in]"""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.first_rows = weight[:FIRST_ROWS].clone()
        self._blocked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _USUAL_ROWS)
        self.register_buffer("_bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._blocked, self._bias, "none", [], "")


class Int8Linear(nn.Module):
    """y = x W^T + b with W rounded to 8 bits a row and x to 8 bits: for drafters, whose errors cost guesses only. A
    forward reads half the bytes of `PackedLinear`.

    FBGEMM takes the largest entry of a forward for the scale of x. Some rows at once are multiplied by oneDNN where
    that is sooner, as it is with matrix units for 8 bits. There each row has its own scale. A second copy of W is kept
    for that."""

    _scales: Tensor
    _zeros: Tensor
    _bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """weight: [out, in]"""
        super().__init__()
        self._dtype = weight.dtype
        weight = weight.float()
        scales = (weight.abs().amax(1) / 127).clamp_(min=1e-12)
        self._packed = _packed_in_8_bits(weight, scales, bias)
        self._tiled: Tensor | None = None
        if _tiles_are_sooner():
            self._tiled = _tiled(weight, scales)
            self.register_buffer("_scales", scales, persistent=False)
            self.register_buffer("_zeros", torch.zeros(len(scales), dtype=torch.int32), persistent=False)
            self.register_buffer("_bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self._tiled is None or x.numel() <= _FEW_ROWS * x.shape[-1]:
            y = torch.ops.quantized.linear_dynamic(_rows(x), self._packed, not _sums_hold_8_bits())
            return y.view(*x.shape[:-1], y.shape[-1]).to(self._dtype)
        rows = x.reshape(-1, x.shape[-1]).float()
        largest = rows.abs().amax(1, keepdim=True)
        scale = (largest / 126).clamp_(min=1e-12).to(torch.bfloat16)  # 126, not 127, as it is rounded
        rounded = (rows / scale).round_().to(torch.int8)
        y = _of_tiles(rounded, self._tiled, self._scales, self._zeros, self._dtype).mul_(scale)
        if self._bias is not None:
            y = y.add_(self._bias)
        return y.view(*x.shape[:-1], y.shape[-1]).to(self._dtype)


def _packed_in_8_bits(weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> object:
    """As FBGEMM multiplies it.  weight: float32 [out, in]; scales: float32 [out]"""
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop this function one day, and says so to every user
        rounded = torch.quantize_per_channel(weight, scales.double(), zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(rounded, None if bias is None else bias.detach().float())


def _tiled(weight: Tensor, scales: Tensor) -> Tensor:
    """As oneDNN multiplies it."""
    return torch.ops.onednn.qlinear_prepack((weight / scales[:, None]).round().to(torch.int8), None)


def _of_tiles(x: Tensor, tiled: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T, [R, out], in bfloat16 where that is the `dtype`, else in float32.  x: int8 [R, in]"""
    out = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, tiled, scales, zeros, None, 1.0, 0, out, "none", [], "")


@functools.cache
def _sums_hold_8_bits() -> bool:
    """Whether FBGEMM's product is right with 8 bits of x. Without the instructions for it, pairs of products are added
    in 16 bits, which hold 7."""
    weight, x = torch.ones(32, 64), torch.ones(2, 64)
    found = torch.ops.quantized.linear_dynamic(x, _packed_in_8_bits(weight, weight.amax(1) / 127), False)
    return bool((found - 64).abs().max() < 0.5)


@functools.cache
def tiles_are_right() -> bool:
    """Whether oneDNN's product in 8 bits is there, and right."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    weight, scales = torch.ones(32, 64), torch.full((32,), 1 / 127)
    x, zeros = torch.full((2, 64), 127, dtype=torch.int8), torch.zeros(32, dtype=torch.int32)
    try:
        tiled = _tiled(weight, scales)
        found = [_of_tiles(x, tiled, scales, zeros, dtype).float() for dtype in (torch.float32, torch.bfloat16)]
    except RuntimeError:
        return False
    return all(bool((sums / 127 - 64).abs().max() < 0.5) for sums in found)


@functools.cache
def _tiles_are_sooner() -> bool:
    """Whether it also takes less time than FBGEMM's, for some rows and weights that are not in a cache, as in a
    model."""
    if not tiles_are_right():
        return False
    weight = torch.randn(8192, 512, generator=torch.Generator().manual_seed(1))  # more than a core's own cache
    scales, zeros = weight.abs().amax(1) / 127, torch.zeros(len(weight), dtype=torch.int32)
    tiled, packed = _tiled(weight, scales), _packed_in_8_bits(weight, scales)
    x, others = torch.randn(_USUAL_ROWS, 512), torch.ones(_CACHE)

    def seconds(multiply: Callable[[], object]) -> float:
        return min((others.sum(), timing.timed(multiply)[0])[1] for _ in range(_ROUNDS))

    by_onednn = seconds(lambda: _of_tiles((x * 30).round().to(torch.int8), tiled, scales, zeros, torch.bfloat16))
    return by_onednn < seconds(lambda: torch.ops.quantized.linear_dynamic(x, packed, False))


class RowwiseInt8Linear(nn.Module):
    """LLM.int8 (Dettmers et al. 2022), but each row has the result that it has alone.

    y = x W^T + b with W in 8 bits. Entries of x from `threshold` on are multiplied in full precision, the others of a
    row in 8 bits. bitsandbytes takes every column out of the 8 bits that is an outlier in *any* row of the forward, so
    a row's bits would depend on the rows beside it. Here each row has its own outliers. Products of 8-bit numbers are
    exact, and those of outliers are added column by column: where a row has none it adds zero. Which columns these are
    the host has to know, so every forward of the layer waits for the device, and can't be recorded as a graph.
    """

    weight: Tensor
    _scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, threshold: float):
        """weight: int8 [out, in]; scale: float32 [out], the largest entry of each of its rows."""
        super().__init__()
        self._threshold = threshold or math.inf
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("_scale", scale, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        large = rows.abs() >= self._threshold
        small = rows.masked_fill(large, 0)
        most = small.abs().amax(1).float().clamp_(min=1e-12)
        rounded = torch.round(small.float() * (127 / most[:, None])).to(torch.int8)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = torch.ops.bitsandbytes.int8_scaled_mm.default(
            rounded, self.weight, most, self._scale, bias=bias, dtype=x.dtype
        )
        if columns := large.any(0).nonzero()[:, 0].tolist():
            beside = torch.zeros_like(y, dtype=torch.float32)
            for column in columns:
                alone = torch.where(large[:, column], rows[:, column], 0).float()
                beside.addcmul_(alone[:, None], self.weight[:, column].float() * (self._scale / 127))
            y = (y.float() + beside).to(x.dtype)
        return y.view(*x.shape[:-1], -1)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """torch's own layer with that weight [out, in], which is not copied."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def _rows(x: Tensor) -> Tensor:
    """As these products take them: float32, and a single one as a matrix."""
    return x.float() if x.dim() > 1 else x.float()[None]


def chosen(kernel: str, dtype: torch.dtype) -> str:
    """What the layers of a model in that dtype become: stock, packed, blocked or int8, where `kernel` may be auto.
    Raises `UsageError`."""
    can_block = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if kernel == "blocked" and not can_block:
        raise UsageError(
            "The kernel blocked is for weights in bfloat16 on a processor with bfloat16 instructions, which this is "
            "not: leave it out."
        )
    if kernel != "auto":
        return kernel
    if can_block:
        return "blocked"
    return "packed" if "fbgemm" in torch.backends.quantized.supported_engines else "stock"


def shift_of(weight: Tensor) -> int | None:
    """The power of two that makes `weight` float16 numbers exactly, 0 if it can be; None if there is none."""
    if _exact(weight, 0):
        return 0
    largest = weight.abs().max().float().item()
    if not math.isfinite(largest):
        return None
    shift = 14 - math.floor(math.log2(largest))  # the largest entry just below float16's limit
    return shift if _exact(weight, shift) else None


def _exact(weight: Tensor, shift: int) -> bool:
    """Piece by piece, so that the copies stay in the processor's cache and the first inexact one ends it."""
    for piece in weight.split(max(1, _PIECE // weight.shape[1])):
        scaled = piece.float()
        if shift:
            scaled = scaled * 2.0**shift  # a copy: float() of a float32 weight is the weight itself
        if not torch.equal(scaled.half().float(), scaled):
            return False
    return True


def holds(weight: Tensor, kernel: str) -> bool:
    """Whether a layer of that kernel can hold a weight [out, in]."""
    if kernel == "packed":
        return shift_of(weight) is not None
    return kernel != "blocked" or weight.dtype == torch.bfloat16


def pack(model: nn.Module, kernel: str) -> int:
    """Replaces the model's linear layers in place, by packed ones where that is exact, by blocked ones where they are
    in bfloat16, or by int8 ones. Returns how many were left as they are."""
    left = 0
    # without the layers themselves, so that the memory of each is free as soon as it is replaced
    for parent in [module for module in model.modules() if type(module) not in (nn.Linear, Conv1D)]:
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear and type(layer) is not Conv1D:
                continue
            linear = cast(nn.Linear, layer)
            weight = linear.weight.detach().T if type(layer) is Conv1D else linear.weight.detach()
            if len(weight) <= _ROUTER and _reads_weight(type(parent).forward, name):
                continue
            if (made := _replaced(weight, linear.bias, kernel)) is None:
                left += 1
            else:
                setattr(parent, name, made)
    return left


@functools.cache
def _reads_weight(forward: Callable[..., object], name: str) -> bool:
    """Whether a module's forward looks at the weight of its layer `name`, as some routers of experts do: it must be
    torch's own then."""
    try:
        return f"self.{name}.weight" in inspect.getsource(forward)
    except (OSError, TypeError):
        return False


def _replaced(weight: Tensor, bias: Tensor | None, kernel: str) -> nn.Module | None:
    if kernel == "packed":
        shift = shift_of(weight)
        return None if shift is None else PackedLinear(weight, bias, shift)
    if kernel == "stock" or not holds(weight, kernel):
        return None
    return Int8Linear(weight, bias) if kernel == "int8" else BlockedLinear(weight, bias)
