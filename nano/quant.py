"""Frozen matrices in 4 or 8 bits a weight, in plain torch and in the bytes of bitsandbytes.

    method = quant.of(cfg)                             # from the keys of a stage
    opened = weights.open(dir, method=method)          # the linear layers of the blocks
    quant.restore(opened.model, torch.bfloat16)        # plain linear layers again

nf4, fp4   A block of 64 neighbours in the flattened matrix shares a scale, the largest magnitude in
           it. A weight is one of 16 values times that scale. With `double` the scales are stored in
           8 bits, in blocks of 256 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).
int8       A row shares a scale. Activations are not quantised, unlike in bitsandbytes' LLM.int8().
mxfp4      What gpt-oss has its experts in. They are kept so where the other layers are quantised.

Embedding, output matrix, routers, norms and biases stay as they are.
"""

import functools
import json
import math
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Required, TypedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

import lora
from model import Stack, autocasted
from nano import files
from nano.config import PositiveInt, UserError
from nano.files import check_json

BLOCK = 64  # weights that share a scale
NESTED = 256  # scales that share a scale of their own
PIECE = 1 << 16  # weights that are in fp32 at a time while a matrix is quantised

# Quantiles of the normal distribution, appendix E of QLoRA
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635)
NF4 += (-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725)
NF4 += (0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941)
NF4 += (0.7229568362236023, 1.0)
# a sign, two bits of exponent, one bit of mantissa
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 += tuple(-x for x in FP4)
# a sign, two bits of exponent, one bit of mantissa, in another order (Rouhani et al. 2023,
# arXiv:2310.10537); 32 numbers in a row share a power of two
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 += tuple(-x for x in E2M1)
MXFP4_BLOCK = 32


@dataclass(frozen=True)
class Method:
    """The keys quant=, double_quant= and quant_kernel= of a script."""

    kind: str = "none"  # none, nf4, fp4 or int8
    double: bool = True
    kernel: str = "auto"  # auto, torch or bitsandbytes


NONE = Method()


def note_training(adapter, kind):
    """Prints a note where the run of an adapter had its base quantised otherwise than `kind`. The
    adapter's own files do not say so, but config.cfg beside its directory does."""
    path = Path(adapter).parent / "config.cfg"
    if not (Path(adapter) / "adapter_config.json").is_file() or not path.is_file():
        return
    keys = dict(line.split("=", 1) for line in files.read_text(path).splitlines() if "=" in line)
    trained = keys.get("quant", "none")
    if trained != kind:
        print(f"note: {adapter} was trained with quant={trained}, not {kind}", file=sys.stderr)


def of(cfg):
    """The Method that a script's Config asks for. UserError for a package that is not there."""
    if cfg.quant_kernel == "bitsandbytes" and not find_spec("bitsandbytes"):
        raise UserError(
            "quant_kernel=bitsandbytes needs the package of that name, which is not installed: "
            "`pip install bitsandbytes`, or leave it out"
        )
    return Method(cfg.quant, cfg.double_quant, cfg.quant_kernel)


# ---------------------------------------------------------------------- codes


@functools.cache
def codebook(kind):
    """The values of the codes 0, 1, ... of nf4 or fp4, or of 8-bit scales ("scale"): fp32, up to 1.
    Those of mxfp4, and its powers of two ("power"), are not scaled to 1.

    An 8-bit scale has a sign, a power of ten and a fraction, which gets the more bits the larger
    the power (Dettmers 2021, arXiv:2110.02861)."""
    if kind == "mxfp4":
        return torch.tensor(E2M1, device="cpu")
    if kind == "power":
        return torch.tensor([2.0 ** (code - 127) for code in range(256)], device="cpu")
    if kind != "scale":
        values = torch.tensor(dict(nf4=NF4, fp4=FP4)[kind], device="cpu")
        return values / values.max()
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, device="cpu")
        magnitudes = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += magnitudes.tolist() + (-magnitudes).tolist()
    return torch.tensor(sorted(values), device="cpu")


def in_blocks(x, size):
    """x (n,) -> (blocks, size), with zeros behind the end."""
    return (F.pad(x, (0, -len(x) % size)) if len(x) % size else x).view(-1, size)


def encode(x, kind, size):
    """Numbers (n,) in blocks of `size` -> their codes, padded to whole blocks, and the largest
    magnitude of each block."""
    blocks = in_blocks(x.float(), size)
    largest = blocks.abs().amax(1)
    scaled = blocks * (1 / largest.clamp(min=1e-38))[:, None]
    values, codes = codebook(kind).to(x.device).sort(stable=True)
    middles = (values[:-1] + values[1:]) / 2
    nearest = torch.bucketize(scaled.clamp(-1, 1).flatten(), middles, out_int32=True)
    return codes.to(torch.uint8)[nearest], largest


@dataclass
class Packed:
    """A quantised matrix as bitsandbytes stores it. `tensors` holds

    weight          nf4, fp4, mxfp4: two codes a byte, (bytes, 1) uint8; int8: (out, in)
    absmax          the scale of each block, fp32 or, with double quantisation, uint8; int8: of
                    rows; mxfp4: the exponent plus 127, uint8
    nested_absmax   with double quantisation: the fp32 scale of each block of scales
    offset          with double quantisation: what was subtracted from the scales, (1,) fp32

    In a stack of experts each tensor stacks those of the matrices.
    """

    kind: str
    shape: tuple  # (out, in), or (E, out, in) of a stack
    tensors: dict

    @classmethod
    def stack(cls, matrices, experts):
        """The Packed of the matrices of all experts, one or several for each, whose outputs follow
        one another. ValueError where they are not quantised alike."""
        kinds = {(m.kind, m.shape, *m.tensors) for m in matrices}
        if len(kinds) > 1:
            raise ValueError("its experts are quantised in different ways")
        names = matrices[0].tensors
        tensors = {name: torch.stack([m.tensors[name] for m in matrices]) for name in names}
        out, ins = matrices[0].shape
        shape = experts, out * len(matrices) // experts, ins
        return cls(matrices[0].kind, shape, tensors)

    def dense(self, dtype):
        """The matrix (out, in)."""
        return QuantLinear(self).dense(dtype)

    def to(self, device):
        return replace(self, tensors={name: t.to(device) for name, t in self.tensors.items()})

    def split(self, layout, shapes, cfg):
        """What `layout`.split does with the tensor of a file -> [Packed], exactly. bitsandbytes
        keeps (out, in) also where the family's files hold the transpose. UserError where rows share
        a block."""
        if len(shapes) == 1:
            return [self]
        out, ins = self.shape
        if self.kind != "int8" and ins % BLOCK:
            raise UserError(
                f"a quantised matrix that fuses layers of {ins} inputs cannot be split, because "
                f"{ins} is no multiple of the {BLOCK} weights of a block: give the original weights"
            )
        counts = [count for count, _ in shapes]
        weight = self.tensors["weight"].view(out, -1)
        absmax = QuantLinear(self).scales().view(out, -1)
        parts = [layout.split_rows(t, counts, cfg) for t in (weight, absmax)]
        packed = []
        for shape, weight, absmax in zip(shapes, *parts, strict=True):
            weight = weight if self.kind == "int8" else weight.reshape(-1, 1)
            tensors = dict(weight=weight.contiguous(), absmax=absmax.flatten())
            packed.append(Packed(self.kind, tuple(shape), tensors))
        return packed


def forms(kind, shape, double):
    """{name: (dtype, shape)} of the tensors of a Packed."""
    if kind == "int8":
        return dict(weight=(torch.int8, shape), absmax=(torch.float32, shape[:1]))
    blocks = -(-math.prod(shape) // BLOCK)
    weight = dict(weight=(torch.uint8, (-(-math.prod(shape) // 2), 1)))
    if not double:
        return weight | dict(absmax=(torch.float32, (blocks,)))
    nested = dict(
        nested_absmax=(torch.float32, (-(-blocks // NESTED),)), offset=(torch.float32, (1,))
    )
    return weight | dict(absmax=(torch.uint8, (blocks,))) | nested


def quantize(matrix, method):
    """Floats (out, in) -> Packed.

    The mean of the scales is taken in fp64, because in fp32 it would depend on the number of
    threads. It differs from bitsandbytes' by a unit in the last place at most."""
    shape = tuple(matrix.shape)
    # What stays is allocated before what comes and goes, so that no gaps stay in the heap.
    tensors = {
        name: torch.empty(size, dtype=dtype, device=matrix.device)
        for name, (dtype, size) in forms(method.kind, shape, False).items()
    }
    weight, absmax = tensors.values()
    if method.kind == "int8":
        rows = max(1, PIECE // shape[1])
        for i in range(0, shape[0], rows):
            part = slice(i, i + rows)
            weight[part], absmax[part] = _int8(matrix[part].float())
        return Packed("int8", shape, tensors)
    numbers = matrix.reshape(-1)
    for i in range(0, len(numbers), PIECE):
        codes, largest = encode(numbers[i : i + PIECE], method.kind, BLOCK)
        absmax[i // BLOCK : (i + PIECE) // BLOCK] = largest
        part = weight[i // 2 : (i + PIECE) // 2, 0]
        part.copy_((codes[::2] << 4 | codes[1::2])[: len(part)])
    if method.double:
        offset = absmax.double().mean().float()
        codes, largest = encode(absmax - offset, "scale", NESTED)
        tensors["absmax"] = codes[: len(absmax)].clone()
        tensors |= dict(nested_absmax=largest, offset=offset[None])
    return Packed(method.kind, shape, tensors)


def _int8(rows):
    absmax = rows.abs().amax(1)
    factor = torch.where(absmax > 0, 127 / absmax, 0.0)
    return (rows * factor[:, None]).round().to(torch.int8), absmax


def dequantize(how, dtype, weight, absmax, nested_absmax, offset, pairs, scale_values):
    """The matrix of a Packed in `dtype`, computed in fp32 and rounded once.

    how: (kind, shape, kernel). pairs (256, 2): the numbers of each byte, None for int8.
    scale_values: the codebook of scales, None for int8."""
    kind, shape, kernel = how
    if kind == "int8":
        return (weight * absmax[:, None]).mul_(7.874015718698502e-3).to(dtype)  # 1 / 127
    absmax = scales(absmax, nested_absmax, offset, scale_values)
    if kernel == "bitsandbytes":
        return torch.ops.bitsandbytes.dequantize_4bit(weight, absmax, BLOCK, kind, shape, dtype)
    codes = weight.flatten().int()
    if torch.compiler.is_compiling() or weight.device.type == "xla":
        numbers = pairs[codes].flatten()
    else:  # two floats move as one number, which takes a third of the time
        numbers = pairs.view(torch.int64).flatten().index_select(0, codes).view(torch.float32)
    del codes  # not needed while the matrix is there twice
    size = MXFP4_BLOCK if kind == "mxfp4" else BLOCK
    numbers = in_blocks(numbers, size).mul_(absmax[:, None]).to(dtype)
    return numbers.flatten()[: math.prod(shape)].view(shape)


def scales(absmax, nested_absmax, offset, scale_values):
    """The fp32 scales of blocks or rows."""
    if absmax.dtype != torch.uint8:
        return absmax
    values = scale_values[absmax.int()]
    if nested_absmax is None:
        return values
    large = nested_absmax.repeat_interleave(NESTED)[: len(absmax)]
    return values * large + offset


@functools.cache
def kernel_for(kernel, device_type):
    """What dequantises on a device, "torch" or "bitsandbytes". The package is imported.

    auto: torch on a CPU, where it is faster (bench/README.md), and bitsandbytes on CUDA, whose
    kernel writes the matrix alone and no numbers in between."""
    if kernel == "auto":
        there = device_type == "cuda" and find_spec("bitsandbytes")
        kernel = "bitsandbytes" if there else "torch"
    if kernel == "bitsandbytes":
        import bitsandbytes  # noqa: F401  registers its operators
    return kernel


# ---------------------------------------------------------------------- the layer


class Product(torch.autograd.Function):
    """x (..., in) times the transpose of a quantised matrix, plus a frozen bias. The matrix exists
    while it is multiplied and no longer: the backward pass dequantises it again."""

    @staticmethod
    def forward(ctx, x, bias, how, *stored):
        ctx.how = how
        ctx.save_for_backward(*stored)
        return F.linear(x, dequantize(how, x.dtype, *stored), bias)

    @staticmethod
    def backward(ctx, grad):
        stored = ctx.saved_tensors
        return grad @ dequantize(ctx.how, grad.dtype, *stored), None, None, *[None for _ in stored]


class QuantLinear(nn.Module):
    """A frozen linear layer whose matrix (out, in) is a Packed.

    The tensors are parameters and not buffers, because FSDP shards parameters alone, and DDP sends
    buffers at each step."""

    NAMES = ("weight", "absmax", "nested_absmax", "offset")

    def __init__(self, packed, bias=None, kernel="torch"):
        super().__init__()
        self.shape = packed.shape
        self.out_features, self.in_features = packed.shape[-2:]
        self.kind = packed.kind
        self.kernel = kernel
        for name in self.NAMES:
            t = packed.tensors.get(name)
            self.register_parameter(name, None if t is None else nn.Parameter(t, False))
        self.register_parameter("bias", bias)
        self.tables = [None, None]
        if packed.kind != "int8":
            values = codebook(packed.kind)
            pairs = torch.cartesian_prod(values, values)
            self.tables = [pairs, codebook("scale")]
            if packed.kind == "mxfp4":  # the first of two numbers is in the low half of the byte
                self.tables = [pairs.flip(1).contiguous(), codebook("power")]

    def packed(self):
        """The matrix as it is stored."""
        stored = {name: getattr(self, name) for name in self.NAMES}
        stored = {name: p for name, p in stored.items() if p is not None}
        return Packed(self.kind, self.shape, stored)

    def mapped(self, function):
        """The same layer with the function of each of its tensors, and without hooks."""
        packed = self.packed()
        tensors = {name: function(t) for name, t in packed.tensors.items()}
        bias = None if self.bias is None else nn.Parameter(function(self.bias), False)
        return type(self)(replace(packed, tensors=tensors), bias, self.kernel)

    def operands(self):
        """The arguments of dequantize, but for the dtype."""
        device = self.weight.device
        if self.kind != "int8" and self.tables[0].device != device:
            self.tables = [table.to(device) for table in self.tables]
        how = self.kind, self.shape, "bitsandbytes" if self.fused() else "torch"
        return how, *(getattr(self, name) for name in self.NAMES), *self.tables

    def fused(self):
        """Whether one kernel writes the matrix, without numbers in between."""
        if self.kind not in ("nf4", "fp4"):
            return False
        return kernel_for(self.kernel, self.weight.device.type) == "bitsandbytes"

    @property
    def largest(self):
        """How many weights are dense at a time."""
        return math.prod(self.shape)

    def scales(self):
        """The fp32 scales of blocks or rows."""
        _, _, absmax, nested_absmax, offset, _, scale_values = self.operands()
        return scales(absmax, nested_absmax, offset, scale_values)

    def dense(self, dtype=torch.float32):
        """The matrix (out, in)."""
        how, *stored = self.operands()
        return dequantize(how, dtype, *stored)

    def forward(self, x):
        x = autocasted(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return Product.apply(x, bias, *self.operands())


def expert_matrix(how, e, dtype, weight, absmax, nested_absmax, offset, *tables):
    """The matrix (out, in) of one expert of a stack."""
    kind, (experts, out, ins), kernel = how
    count = len(weight) // experts
    how = kind, (out // count, ins), kernel
    stored = weight, absmax, nested_absmax, offset
    parts = []
    for i in range(e * count, (e + 1) * count):
        part = [None if t is None else t[i] for t in stored]
        parts.append(dequantize(how, dtype, *part, *tables))
    return parts[0] if count == 1 else torch.cat(parts)


class QuantStack(QuantLinear):
    """The frozen linear layers of E experts, see model.Stack. One of them is dense at a time."""

    product = staticmethod(Stack.product)
    biased = Stack.biased
    empty = Stack.empty

    def __init__(self, packed, bias=None, kernel="torch"):
        super().__init__(packed, bias, kernel)
        self.experts = packed.shape[0]

    @property
    def largest(self):
        return self.in_features * self.out_features

    def dense(self, dtype=torch.float32):
        """The matrices (E, out, in)."""
        out = torch.empty(self.shape, dtype=dtype, device=self.weight.device)
        how, *stored = self.operands()
        for e, matrix in enumerate(out):
            matrix.copy_(expert_matrix(how, e, dtype, *stored))
        return out

    def forward(self, x, ends):
        how, *stored = self.operands()
        matrix = functools.partial(expert_matrix, how)
        y = Stack.looped(autocasted(x), ends, self.shape, matrix, *stored)
        return self.biased(y, ends)


# ---------------------------------------------------------------------- models


def layers(model):
    """(name, QuantLinear) of every quantised layer."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, QuantLinear)]


def put(model, name, matrices, kernel):
    """Puts a quantised layer in the place of the linear layer `name`, whose bias it takes over.

    matrices: one Packed, or those of a stack of experts. ValueError where they differ in kind."""
    layer = model.get_submodule(name)
    if hasattr(layer, "experts"):
        quantised = QuantStack(Packed.stack(matrices, layer.experts), layer.bias, kernel)
    else:
        quantised = QuantLinear(*matrices, layer.bias, kernel)
    model.set_submodule(name, quantised)


@torch.no_grad()
def restore(model, dtype):
    """Puts plain linear layers in `dtype` in the place of quantised ones."""
    for name, m in layers(model):
        model.set_submodule(name, lora.plain(m, m.dense(dtype)))


def refuse_training(model):
    """UserError if the weights of a model are to be trained and some are quantised."""
    if quantised := layers(model):
        raise UserError(
            f"the model is quantised ({quantised[0][1].kind}), and only an adapter can be trained "
            "on it: give lora_rank=, or make plain weights of it (python -m prepare.weights)"
        )


# ---------------------------------------------------------------------- directories of bitsandbytes


Kind4 = Annotated[str, ("nf4 or fp4", lambda x: x in ("nf4", "fp4"))]
Block = Annotated[int, (f"{BLOCK}", lambda x: x == BLOCK)]
Nested = Annotated[int, (f"{NESTED}", lambda x: x == NESTED)]


class QuantState(TypedDict, total=False):
    """What is read of the JSON beside a 4-bit matrix."""

    quant_type: Required[Kind4]
    blocksize: Required[Block]
    shape: Required[list[PositiveInt]]
    nested_blocksize: Nested
    nested_offset: float


def read_packed(dir, tensors, method):
    """Takes the quantised matrices of a directory of bitsandbytes out of `tensors` {name: tensor},
    and leaves tensors of their shapes on the meta device -> {name: Packed}.

    UserError for damaged ones, and for a `method` of another kind."""
    packed = {}
    for key in [key for key in tensors if ".quant_state.bitsandbytes__" in key]:
        name = key.partition(".quant_state.")[0]
        packed[name] = read_4bit(f"{dir}: {name}", tensors, name, tensors.pop(key))
    for key in [key for key in tensors if key.endswith(".SCB")]:
        layer = key.removesuffix(".SCB")
        tensors.pop(f"{layer}.weight_format", None)
        parts = dict(weight=tensors.get(f"{layer}.weight"), absmax=tensors.pop(key))
        shape = tuple(getattr(parts["weight"], "shape", ()))
        wanted = forms("int8", shape, False)
        packed[f"{layer}.weight"] = checked(f"{dir}: {layer}.weight", "int8", parts, wanted, shape)
    for key in [key for key in tensors if key.endswith("_blocks")]:
        name = key.removesuffix("_blocks")
        packed[name] = read_mxfp4(f"{dir}: {name}", tensors, name)
    for name, matrix in packed.items():
        tensors[name] = torch.empty(matrix.shape, device="meta")
        if method.kind not in ("none", matrix.kind) and matrix.kind != "mxfp4":
            raise UserError(f"{dir} is quantised already: leave out quant={method.kind}")
    return packed


@dataclass(frozen=True)
class MXFP4:
    """The matrices of all experts in a file of gpt-oss."""

    blocks: torch.Tensor  # (E, out, in / 32, 16) uint8, two numbers a byte, the low half first
    scales: torch.Tensor  # (E, out, in / 32) uint8: the exponent plus 127
    kind = "mxfp4"

    @property
    def shape(self):
        E, out, blocks, _ = self.blocks.shape
        return E, out, MXFP4_BLOCK * blocks

    def split(self, layout, shapes, cfg):
        """As Packed.split: the matrix of each layer of each expert -> [Packed]."""
        counts = [count for count, _ in shapes]
        parts = [layout.split_rows(t, counts, cfg) for t in (self.blocks, self.scales)]
        packed = []
        for shape, blocks, scales in zip(shapes, *parts, strict=True):
            tensors = dict(weight=blocks.reshape(-1, 1), absmax=scales.reshape(-1))
            packed.append(Packed("mxfp4", tuple(shape), tensors))
        return packed


def read_mxfp4(where, tensors, name):
    """The MXFP4 of the stack `name`. What belongs to it is taken out of `tensors`."""
    blocks, scales = tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales", None)
    fits = scales is not None and blocks.dim() == 4 and blocks.shape == (*scales.shape, 16)
    if not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
        raise UserError(f"{where}: its blocks and scales do not fit: fetch the file again")
    return MXFP4(blocks, scales)


def read_4bit(where, tensors, name, state):
    """The Packed of a 4-bit matrix. What belongs to it is taken out of `tensors`."""
    try:
        state = json.loads(bytes(state.tolist()))
    except (ValueError, TypeError):
        raise UserError(f"{where}: its quant_state is damaged: fetch the file again") from None
    check_json(state, QuantState, f"{where}: its quant_state")
    kind, shape, offset = state["quant_type"], tuple(state["shape"]), state.get("nested_offset")
    parts = {
        "weight": tensors.get(name),
        "offset": None if offset is None else torch.tensor([offset]),
    }
    for key in ("absmax", "nested_absmax", "quant_map", "nested_quant_map"):
        parts[key] = tensors.pop(f"{name}.{key}", None)
    if parts["weight"] is not None:  # bitsandbytes may store the bytes as numbers of another type
        parts["weight"] = parts["weight"].view(torch.uint8).view(-1, 1)
    for key, values in dict(quant_map=kind, nested_quant_map="scale").items():
        if parts[key] is not None and not torch.equal(parts[key], codebook(values)):
            raise UserError(f"{where}: its {key} is not that of {kind} in bitsandbytes")
    return checked(where, kind, parts, forms(kind, shape, offset is not None), shape)


def checked(where, kind, parts, wanted, shape):
    """The Packed of `parts` {name: tensor or None}. UserError unless they have the dtypes and
    shapes of `wanted`, that of forms."""
    for name, (dtype, size) in wanted.items():
        t = parts[name]
        if t is None or t.dtype != dtype or t.shape != size:
            found = "missing" if t is None else f"{t.dtype} {tuple(t.shape)}"
            raise UserError(
                f"{where}: the quantised matrix is damaged, its {name} is {found} and not {dtype} "
                f"{size}: fetch the file again"
            )
    return Packed(kind, shape, {name: parts[name] for name in wanted})
