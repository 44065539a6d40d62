"""A reader of GGUF files (versions 2 and 3) in numpy: metadata, tensors and their dequantisation.

Sources: ggml's docs/gguf.md for the file, and the block structs of ggml for the quantised types.
"""

import re
import struct
from pathlib import Path

import numpy as np
import torch

from nano.config import UserError

SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9
TYPES = {  # ggml type: name, weights in a block, bytes of a block
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
STRETCH = 1 << 22  # weights that are dequantised at once


class Gguf:
    """.meta is {key: value}; .tensors is {name: (shape, type name)}, shapes in numpy's order.

    The first part of a file that was split stands for all parts, which lie beside it. Raises
    UserError for a file that is missing, damaged, or has a type that is not supported.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.data = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as e:
            raise UserError(f"{path} cannot be opened: {e}") from None
        try:
            self.parse()
        except (struct.error, ValueError, KeyError, OverflowError, MemoryError, RecursionError):
            raise UserError(
                f"{path} is damaged or incomplete: its header cannot be read; download it again"
            ) from None
        self.files = dict.fromkeys(self.tensors, self)  # the part that holds a tensor
        self.add_parts()

    def add_parts(self):
        """Takes in the tensors of the other parts, if this is the first one of several.

        UserError for a part that is missing."""
        number, count = self.meta.get("split.no", 0), self.meta.get("split.count", 1)
        if number or type(count) is not int or count < 2:
            return
        name = re.fullmatch(r"(.+)-00001-of-(\d{5})\.gguf", self.path.name)
        if not name or int(name[2]) != count:
            raise UserError(
                f"{self.path} is the first of {count} parts: its name must be "
                f"NAME-00001-of-{count:05d}.gguf, and the others beside it have the numbers up to "
                f"{count:05d}"
            )
        for i in range(2, count + 1):
            part = Gguf(self.path.with_name(f"{name[1]}-{i:05d}-of-{name[2]}.gguf"))
            self.tensors |= part.tensors
            self.files |= dict.fromkeys(part.tensors, part)

    def parse(self):
        if bytes(self.data[:4]) != b"GGUF":
            raise UserError(f"{self.path} is no GGUF file")
        self.position = 4
        version = self.scalar("<I")
        if version not in (2, 3):
            raise UserError(f"{self.path} is of GGUF version {version} (2 and 3 are supported)")
        tensors, pairs = self.scalar("<Q"), self.scalar("<Q")
        self.meta = {self.string(): self.value(self.scalar("<I")) for _ in range(pairs)}
        self.places = {}
        for _ in range(tensors):
            name = self.string()
            shape = tuple(self.scalar("<Q") for _ in range(self.scalar("<I")))[::-1]
            self.places[name] = (shape, self.scalar("<I"), self.scalar("<Q"))
        align = self.meta.get("general.alignment", 32)
        start = -(-self.position // align) * align
        self.tensors = {}
        for name, (shape, kind, offset) in self.places.items():
            if kind not in TYPES:
                known = ", ".join(t[0] for t in TYPES.values())
                raise UserError(
                    f"{self.path}: {name} is of ggml type {kind}, "
                    f"which is not supported ({known} are)"
                )
            label, block, width = TYPES[kind]
            count = int(np.prod(shape, dtype=object))
            if start + offset + count // block * width > len(self.data):
                raise UserError(
                    f"{self.path} is incomplete: it ends before the data of {name}; "
                    "download it again"
                )
            self.places[name] = (shape, kind, start + offset, count // block)
            self.tensors[name] = (shape, label)

    def scalar(self, form):
        (value,) = struct.unpack_from(form, self.data, self.position)
        self.position += struct.calcsize(form)
        return value

    def string(self):
        length = self.scalar("<Q")
        self.position += length
        if self.position > len(self.data):
            raise ValueError("past the end")
        return bytes(self.data[self.position - length : self.position]).decode()

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.scalar("<I"), self.scalar("<Q")
            if kind in (STRING, ARRAY):
                return [self.value(kind) for _ in range(count)]
            values = np.frombuffer(self.data, SCALARS[kind], count, self.position)
            self.position += values.nbytes
            return values.tolist()
        return self.scalar(
            {"u1": "B", "i1": "b"}.get(SCALARS[kind])
            or np.dtype(SCALARS[kind]).newbyteorder("<").char
        )

    def read(self, name, dtype=torch.float32):
        """The tensor of that name in `dtype`, dequantised in fp32, STRETCH weights at once."""
        if self.files[name] is not self:
            return self.files[name].read(name, dtype)
        shape, kind, start, blocks = self.places[name]
        _, block, width = TYPES[kind]
        out = torch.empty(blocks * block, dtype=dtype)
        step = STRETCH // block
        for i in range(0, blocks, step):
            n = min(step, blocks - i)
            raw = self.data[start + i * width : start + (i + n) * width].reshape(n, width)
            out[i * block : (i + n) * block] = torch.from_numpy(
                dequantize(raw, TYPES[kind][0]).reshape(-1)
            )
        return out.view(shape)


def dequantize(b, kind):
    """uint8 (N, bytes of a block) -> float32 (N, weights of a block). kind: a name of TYPES."""
    b = np.array(b)  # a copy, because the mapped file is read-only

    def half(i):  # the float16 at byte i of each block
        return np.ascontiguousarray(b[:, i : i + 2]).view("<f2").astype(np.float32)

    def nibbles(q):  # byte j has weight j in its low half and weight j + 16 in its high half
        return np.concatenate([q & 15, q >> 4], axis=1)

    if kind == "F32":
        return b.view("<f4")
    if kind == "F16":
        return b.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if kind == "Q8_0":
        return half(0) * b[:, 2:].view(np.int8)
    if kind == "Q4_0":
        return half(0) * (nibbles(b[:, 2:]).astype(np.float32) - 8)
    if kind == "Q4_1":
        return half(0) * nibbles(b[:, 4:]) + half(2)
    if kind in ("Q5_0", "Q5_1"):
        i = 2 if kind == "Q5_0" else 4
        fifth = np.unpackbits(b[:, i : i + 4], axis=1, bitorder="little")
        q = (nibbles(b[:, i + 4 :]) | fifth << 4).astype(np.float32)
        return half(0) * (q - 16) if kind == "Q5_0" else half(0) * q + half(2)

    n = len(b)
    # Q4_K, Q5_K: d, dmin, 12 bytes of 8 scales and 8 minima in 6 bits each, 32 bytes of fifth bits
    # in Q5_K alone, 128 bytes of nibbles
    if kind in ("Q4_K", "Q5_K"):
        a, c, e = b[:, 4:8], b[:, 8:12], b[:, 12:16]
        scale = np.concatenate([a & 63, e & 15 | a >> 6 << 4], axis=1).astype(np.float32)[
            :, :, None
        ]
        low = np.concatenate([c & 63, e >> 4 | c >> 6 << 4], axis=1).astype(np.float32)[:, :, None]
        shifts = np.array([0, 4], np.uint8)[:, None]
        q = (b[:, -128:].reshape(n, 4, 1, 32) >> shifts & 15).reshape(n, 8, 32)
        if kind == "Q5_K":
            q = (
                q
                | (b[:, 16:48].reshape(n, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
            )
        return (half(0)[:, :, None] * scale * q - half(2)[:, :, None] * low).reshape(n, 256)
    # Q6_K: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 scales in int8, d
    low = b[:, :128].reshape(n, 2, 1, 64) >> np.array([0, 4], np.uint8)[:, None] & 15
    high = b[:, 128:192].reshape(n, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = (low.reshape(n, 2, 4, 32) | high << 4).reshape(n, 16, 16).astype(np.int8) - 32
    return (half(208)[:, :, None] * b[:, 192:208].view(np.int8)[:, :, None] * q).reshape(n, 256)
