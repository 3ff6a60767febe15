"""The CPU code generator: torch's operations on the columns of a group, one by one, as LLVM's.

Nothing is reassociated, contracted or approximated: bits are those of torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from llvmlite import ir
from torch import Tensor, fx

# bfloat16 as the upper half of a float32's bits, for llvmlite has no such type
TYPES = {
    torch.bool: ir.IntType(1),
    torch.uint8: ir.IntType(8),
    torch.int8: ir.IntType(8),
    torch.int16: ir.IntType(16),
    torch.int32: ir.IntType(32),
    torch.uint32: ir.IntType(32),
    torch.int64: ir.IntType(64),
    torch.float64: ir.DoubleType(),
    torch.float32: ir.FloatType(),
    torch.float16: ir.HalfType(),
    torch.bfloat16: ir.IntType(16),
}
WORD, LONG, POINTER = ir.IntType(32), ir.IntType(64), ir.PointerType()
UNSIGNED = (torch.bool, torch.uint8, torch.uint32)

SAME = ("unsqueeze", "alias", "detach", "clone", "lift_fresh_copy", "expand", "view", "_unsafe_view", "reshape")
INTEGER_OPERATIONS = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "bitwise_and": "and_",
    "bitwise_or": "or_",
    "bitwise_xor": "xor",
    "__and__": "and_",
    "__or__": "or_",
    "__xor__": "xor",
    "logical_and": "and_",
    "logical_or": "or_",
    "__lshift__": "shl",
    "bitwise_left_shift": "shl",
}
FLOAT_OPERATIONS = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
COMPARISONS = {"ge": ">=", "gt": ">", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}


class Columns(NamedTuple):
    """The columns of a group, or numbers that all groups share, as LLVM values."""

    values: list
    dtype: torch.dtype


def traced(function: Callable, sample: Sequence[Tensor]) -> fx.GraphModule:
    """The operations of a function, as it does them for tensors like those of a sample."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function)(*sample)


class Body:
    """The body of the loop, operation by operation."""

    def __init__(self, graph: fx.GraphModule, builder: ir.IRBuilder, group: ir.Value, known: Mapping[fx.Node, Columns]):
        self.graph, self.builder, self.group = graph, builder, group
        self.known: dict[fx.Node, Columns | list[Columns]] = dict(known)

    def run(self) -> list[Columns]:
        """All operations; gives the results."""
        for node in self.graph.graph.nodes:
            if node.op == "get_attr":
                number = getattr(self.graph, node.target)
                self.known[node] = Columns([self.constant(number.item(), number.dtype)], number.dtype)
            elif node.op == "output":
                return [self.known[x] for x in node.args[0]]
            elif node.op == "call_function":
                self.operation(node)
        raise AssertionError("a graph ends with its output")

    def operation(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, i = node.args
            self.known[node] = self.known[source][i]
            return
        name = node.target._schema.name.split("::")[1]
        self.refuse_what_is_not_read(node, name)
        if name == "unbind":
            columns = self.known[node.args[0]]
            self.known[node] = [Columns([value], columns.dtype) for value in columns.values]
        else:
            dtype = node.meta["val"].dtype
            self.known[node] = Columns(self.translated(node, name, dtype), dtype)

    def translated(self, node: fx.Node, name: str, dtype: torch.dtype) -> list:
        """The values of the columns of a result."""
        args, builder = node.args, self.builder
        given = self.known.get(args[0]) if args and isinstance(args[0], fx.Node) else None
        match name:
            case "view" if isinstance(args[1], torch.dtype):
                return [builder.bitcast(value, TYPES[dtype]) for value in given.values]
            case _ if name in SAME:
                return given.values
            case "select":
                return [given.values[args[2]]]
            case "stack":
                return [value for x in args[0] for value in self.known[x].values]
            case "_to_copy":
                return [self.cast(value, given.dtype, dtype) for value in given.values]
            case "arange":
                return [self.group]
            case "scalar_tensor":
                return [self.constant(args[0], dtype)]
            case "full" | "full_like":
                return [self.constant(args[1], dtype)]
            case "zeros" | "zeros_like" | "new_zeros" | "empty_like":
                return [self.constant(0, dtype)]
            case "bitwise_not" | "logical_not":
                return [builder.not_(self.cast(value, given.dtype, dtype)) for value in given.values]
            case "abs":
                magnitude = builder.module.declare_intrinsic("llvm.fabs", [TYPES[dtype]])
                return [builder.call(magnitude, [value]) for value in given.values]
            case "sqrt":
                root = builder.module.declare_intrinsic("llvm.sqrt", [TYPES[dtype]])
                return [builder.call(root, [value]) for value in given.values]
            case "reciprocal":
                return [builder.fdiv(self.constant(1.0, dtype), value) for value in given.values]
            case "where":
                operands = [given.values, *(self.operand(x, dtype) for x in args[1:])]
                return [builder.select(*three) for three in zip(*self.spread(operands), strict=True)]
            case "minimum" | "maximum":
                return [self.extreme(name, dtype, *pair) for pair in self.pairs(node, dtype)]
            case "clamp" | "clamp_min" | "clamp_max":
                return self.clamped(node, name, given, dtype)
            case "rsub":
                subtract = builder.fsub if dtype.is_floating_point else builder.sub
                return [subtract(b, a) for a, b in self.pairs(node, dtype)]
            case _ if name in COMPARISONS:
                return self.compared(node, COMPARISONS[name])
            case "__rshift__" | "bitwise_right_shift":
                shift = builder.lshr if dtype in UNSIGNED else builder.ashr
                return [shift(*pair) for pair in self.pairs(node, dtype)]
        operations = FLOAT_OPERATIONS if dtype.is_floating_point else INTEGER_OPERATIONS
        if name not in operations:
            raise NotImplementedError(f"{node.target} has no translation")
        apply = getattr(builder, operations[name])
        return [apply(*pair) for pair in self.pairs(node, dtype)]

    def refuse_what_is_not_read(self, node: fx.Node, name: str) -> None:
        """Raise where an operation is another one than its name alone says."""
        args, value = node.args, node.meta["val"]
        odd = set(node.kwargs) - {"dtype", "layout", "device", "pin_memory", "memory_format", "min", "max"}
        if name in ("select", "unbind", "stack"):
            columns = value if name == "stack" else args[0].meta["val"]
            if (args[1] if len(args) > 1 else 0) not in (-1, columns.dim() - 1):
                odd.add("dim")
        elif name in SAME and not isinstance(args[-1], torch.dtype):
            before = args[0].meta["val"]
            if (value.numel(), value.shape[:1]) != (before.numel(), before.shape[:1]):
                odd.add("layout")
        elif name == "arange" and len(args) > 1:
            odd.add("start")
        if odd:
            raise NotImplementedError(f"{node.target} has no translation with {', '.join(sorted(odd))}")

    def constant(self, number, dtype: torch.dtype) -> ir.Constant:
        if dtype.is_floating_point:
            # rounded to the dtype, which an IR constant of its type has to be
            return ir.Constant(TYPES[dtype], torch.tensor(number, dtype=dtype).item())
        return ir.Constant(TYPES[dtype], int(number))

    def operand(self, x, dtype: torch.dtype) -> list:
        if not isinstance(x, fx.Node):
            return [self.constant(x, dtype)]
        columns = self.known[x]
        return [self.cast(value, columns.dtype, dtype) for value in columns.values]

    def spread(self, operands: list[list]) -> list[list]:
        count = max(map(len, operands))
        return [values * count if len(values) == 1 else values for values in operands]

    def pairs(self, node: fx.Node, dtype: torch.dtype):
        return zip(*self.spread([self.operand(x, dtype) for x in node.args[:2]]), strict=True)

    def compared(self, node: fx.Node, sign: str) -> list:
        one, other = (x.meta["val"] if isinstance(x, fx.Node) else x for x in node.args[:2])
        dtype = torch.result_type(one, other)
        if dtype.is_floating_point:
            # torch's != holds for NaN, all others do not
            compare = self.builder.fcmp_unordered if sign == "!=" else self.builder.fcmp_ordered
        else:
            compare = self.builder.icmp_unsigned if dtype in UNSIGNED else self.builder.icmp_signed
        return [compare(sign, *pair) for pair in self.pairs(node, dtype)]

    def extreme(self, name: str, dtype: torch.dtype, a, b):
        """The smaller or larger one; NaN where either is."""
        sign = {"minimum": "<", "maximum": ">"}[name]
        if not dtype.is_floating_point:
            compare = self.builder.icmp_unsigned if dtype in UNSIGNED else self.builder.icmp_signed
            return self.builder.select(compare(sign, a, b), a, b)
        of_numbers = self.builder.select(self.builder.fcmp_ordered(sign, a, b), a, b)
        return self.builder.select(self.builder.fcmp_unordered("uno", a, a), a, of_numbers)

    def clamped(self, node: fx.Node, name: str, given: Columns, dtype: torch.dtype) -> list:
        bounds = dict(zip({"clamp_max": ("max",)}.get(name, ("min", "max")), node.args[1:], strict=False)) | node.kwargs
        values = given.values
        for bound, sign in (("min", "<"), ("max", ">")):
            if bounds.get(bound) is not None:
                limit = self.constant(bounds[bound], dtype)
                values = [self.bounded(sign, dtype, value, limit) for value in values]
        return values

    def bounded(self, sign: str, dtype: torch.dtype, value, limit):
        """The limit where the value lies beyond it; what equals it, as the other zero does, or is no number stays."""
        compare = self.builder.fcmp_ordered if dtype.is_floating_point else self.builder.icmp_signed
        return self.builder.select(compare(sign, value, limit), limit, value)

    def cast(self, value, before: torch.dtype, after: torch.dtype):
        if before == after:
            return value
        if after == torch.bool:
            zero = ir.Constant(TYPES[before], 0)
            return (self.builder.fcmp_unordered if before.is_floating_point else self.builder.icmp_signed)(
                "!=", value, zero
            )
        if before == torch.bfloat16:
            bits = self.builder.shl(self.builder.zext(value, TYPES[torch.int32]), TYPES[torch.int32](16))
            return self.cast(self.builder.bitcast(bits, TYPES[torch.float32]), torch.float32, after)
        if after == torch.bfloat16:
            return rounded_to_bfloat16(self.builder, self.cast(value, before, torch.float32))
        if before.is_floating_point and after.is_floating_point:
            wider = after.itemsize > before.itemsize
            return (self.builder.fpext if wider else self.builder.fptrunc)(value, TYPES[after])
        if after.is_floating_point:
            convert = self.builder.uitofp if before in UNSIGNED else self.builder.sitofp
            return convert(value, TYPES[after])
        if before.is_floating_point:
            return self.builder.fptosi(value, TYPES[after])
        if TYPES[after].width < TYPES[before].width:
            return self.builder.trunc(value, TYPES[after])
        return (self.builder.zext if before in UNSIGNED else self.builder.sext)(value, TYPES[after])


def rounded_to_bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The upper half of a float32's bits, to the nearest and ties to even; NaN stays one."""
    bits = builder.bitcast(value, WORD)
    odd = builder.and_(builder.lshr(bits, WORD(16)), WORD(1))
    carried = builder.add(bits, builder.add(odd, WORD(0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    rounded = builder.select(nan, builder.or_(bits, WORD(1 << 22)), carried)
    return builder.trunc(builder.lshr(rounded, WORD(16)), TYPES[torch.bfloat16])
