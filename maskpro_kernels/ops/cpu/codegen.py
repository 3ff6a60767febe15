"""CPU code generator: translates torch's operations on the columns of a group to LLVM's, and makes loops over groups.

Nothing is reassociated, contracted or approximated: bits are those of torch. A traced function is the body of a loop,
which LLVM vectorises with interleaved columns. If a function leaves groups undetermined, its loop runs over a block of
groups. Undetermined groups are then gathered, a second loop draws them, and its results are scattered.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from llvmlite import ir
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# bfloat16 as the upper half of a float32's bits, since llvmlite has no such type
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
I32 = ir.IntType(32)
I64 = ir.IntType(64)
POINTER = ir.PointerType()
UNSIGNED = (torch.bool, torch.uint8, torch.uint32)

# Operations that keep the values of all columns
VIEWS = ("unsqueeze", "alias", "detach", "clone", "lift_fresh_copy", "expand", "view", "_unsafe_view", "reshape")
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

ENTRY = "loop"
SHARED = "shared"
# Names of the loops over many layers
LAYERS = "layers"
SHARED_LAYERS = "shared_layers"
# Functions of OpenMP
THREAD = "omp_get_thread_num"
THREADS = "omp_get_num_threads"

# Groups of a block for the bounds, and undetermined groups to draw at a time
BLOCK = 1 << 11
BATCH = 1 << 8
# A multiple of the lanes of any CPU's unrolled vectors
VECTORS = 1 << 6

LEVEL = (torch.uint8,)
NUMBER = (torch.uint32,)


class Columns(NamedTuple):
    """Columns of a group, or numbers that all groups share, as LLVM values."""

    values: list
    dtype: torch.dtype


def traced(function: Callable, sample: Sequence[Tensor]) -> fx.Graph:
    """Record the operations of a function on a sample; each node has its tensor as ``meta["val"]``.

    ``make_fx`` records the same at ten times the cost: with a fake tensor and a stack trace for each operation.
    """
    graph = fx.Graph()
    nodes = {}

    def record(x: Tensor, node: fx.Node) -> None:
        if not isinstance(x, Tensor):
            raise NotImplementedError(f"{node.target}: its result is no tensor")
        # kept alive by its node, so that no other tensor gets its id
        node.meta["val"] = x
        nodes[id(x)] = node

    def node_of(x: Tensor) -> fx.Node:
        if id(x) not in nodes:
            record(x, graph.create_node("get_attr", f"constant_{len(nodes)}"))
        return nodes[id(x)]

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            node = graph.call_function(operation, *tree_map_only(Tensor, node_of, (args, kwargs or {})))
            if isinstance(result, (list, tuple)):
                for i, x in enumerate(result):
                    record(x, graph.call_function(operator.getitem, (node, i)))
            else:
                record(result, node)
            return result

    for i, x in enumerate(sample):
        record(x, graph.placeholder(f"tensor_{i}"))
    with Recorder():
        results = function(*sample)
    graph.output([node_of(x) for x in results])
    graph.eliminate_dead_code()
    return graph


class Body:
    """Body of a loop, translated operation by operation."""

    def __init__(self, graph: fx.Graph, builder: ir.IRBuilder, group: ir.Value, columns: Mapping[fx.Node, Columns]):
        self.graph = graph
        self.builder = builder
        self.group = group
        self.columns: dict[fx.Node, Columns | list[Columns]] = dict(columns)

    def run(self) -> list[Columns]:
        """All operations; gives the results."""
        *nodes, output = self.graph.nodes
        for node in nodes:
            if node.op == "get_attr":
                number = node.meta["val"]
                self.columns[node] = Columns([self.constant(number.item(), number.dtype)], number.dtype)
            elif node.target is operator.getitem:
                source, i = node.args
                self.columns[node] = self.columns[source][i]
            elif node.op == "call_function":
                name = node.target._schema.name.split("::")[1]
                if name == "unbind":
                    source = self.columns[node.args[0]]
                    self.columns[node] = [Columns([value], source.dtype) for value in source.values]
                else:
                    dtype = node.meta["val"].dtype
                    self.columns[node] = Columns(self.translated(node, name, dtype), dtype)
        return [self.columns[x] for x in output.args[0]]

    def translated(self, node: fx.Node, name: str, dtype: torch.dtype) -> list:
        """Values of the columns of a result."""
        args = node.args
        builder = self.builder
        operand = self.columns.get(args[0]) if args and isinstance(args[0], fx.Node) else None
        match name:
            case "view" if isinstance(args[1], torch.dtype):
                return [builder.bitcast(value, TYPES[dtype]) for value in operand.values]
            case _ if name in VIEWS:
                return operand.values
            case "select":
                return [operand.values[args[2]]]
            case "stack":
                return [value for x in args[0] for value in self.columns[x].values]
            case "_to_copy":
                return [self.cast(value, operand.dtype, dtype) for value in operand.values]
            case "arange":
                return [self.group]
            case "scalar_tensor":
                return [self.constant(args[0], dtype)]
            case "full" | "full_like":
                return [self.constant(args[1], dtype)]
            case "zeros" | "zeros_like" | "new_zeros" | "empty_like":
                return [self.constant(0, dtype)]
            case "bitwise_not" | "logical_not":
                return [builder.not_(self.cast(value, operand.dtype, dtype)) for value in operand.values]
            case "abs" | "sqrt":
                intrinsic = builder.module.declare_intrinsic(f"llvm.{name.replace('abs', 'fabs')}", [TYPES[dtype]])
                return [builder.call(intrinsic, [value]) for value in operand.values]
            case "reciprocal":
                return [builder.fdiv(self.constant(1.0, dtype), value) for value in operand.values]
            case "where":
                operands = [operand.values, *(self.operand(x, dtype) for x in args[1:])]
                columns = zip(*self.broadcast(operands), strict=True)
                return [builder.select(condition, x, y) for condition, x, y in columns]
            case "minimum" | "maximum":
                sign = "<" if name == "minimum" else ">"
                pairs = list(self.pairs(node, dtype))
                values = [builder.select(self.compare(sign, dtype, a, b), a, b) for a, b in pairs]
                if not dtype.is_floating_point:
                    return values
                # the selection already takes the second if that is NaN
                nans = [builder.fcmp_unordered("uno", a, a) for a, _ in pairs]
                return [builder.select(nan, a, x) for nan, (a, _), x in zip(nans, pairs, values, strict=True)]
            case "clamp" | "clamp_min" | "clamp_max":
                names = ("max",) if name == "clamp_max" else ("min", "max")
                limits = dict(zip(names, args[1:], strict=False)) | node.kwargs
                values = operand.values
                for sign, limit in (("<", limits.get("min")), (">", limits.get("max"))):
                    if limit is not None:
                        limit = self.constant(limit, dtype)
                        # NaN stays, and so does a value equal to the limit, such as the other zero
                        values = [builder.select(self.compare(sign, dtype, x, limit), limit, x) for x in values]
                return values
            case "rsub":
                subtract = builder.fsub if dtype.is_floating_point else builder.sub
                return [subtract(b, a) for a, b in self.pairs(node, dtype)]
            case _ if name in COMPARISONS:
                dtype = torch.result_type(*(x.meta["val"] if isinstance(x, fx.Node) else x for x in args[:2]))
                return [self.compare(COMPARISONS[name], dtype, *pair) for pair in self.pairs(node, dtype)]
            case "__rshift__" | "bitwise_right_shift":
                shift = builder.lshr if dtype in UNSIGNED else builder.ashr
                return [shift(*pair) for pair in self.pairs(node, dtype)]
        operations = FLOAT_OPERATIONS if dtype.is_floating_point else INTEGER_OPERATIONS
        if name not in operations:
            raise NotImplementedError(f"{node.target} has no translation")
        apply = getattr(builder, operations[name])
        return [apply(*pair) for pair in self.pairs(node, dtype)]

    def constant(self, number, dtype: torch.dtype) -> ir.Constant:
        if dtype.is_floating_point:
            # rounded to the dtype, as an IR constant of its type must be
            return ir.Constant(TYPES[dtype], torch.tensor(number, dtype=dtype).item())
        return ir.Constant(TYPES[dtype], int(number))

    def operand(self, x, dtype: torch.dtype) -> list:
        if not isinstance(x, fx.Node):
            return [self.constant(x, dtype)]
        columns = self.columns[x]
        return [self.cast(value, columns.dtype, dtype) for value in columns.values]

    def broadcast(self, operands: list[list]) -> list[list]:
        count = max(map(len, operands))
        return [values * count if len(values) == 1 else values for values in operands]

    def pairs(self, node: fx.Node, dtype: torch.dtype):
        return zip(*self.broadcast([self.operand(x, dtype) for x in node.args[:2]]), strict=True)

    def compare(self, sign: str, dtype: torch.dtype, a, b):
        """Compare like torch: with NaN only != is true."""
        if dtype.is_floating_point:
            return (self.builder.fcmp_unordered if sign == "!=" else self.builder.fcmp_ordered)(sign, a, b)
        return (self.builder.icmp_unsigned if dtype in UNSIGNED else self.builder.icmp_signed)(sign, a, b)

    def cast(self, value, before: torch.dtype, after: torch.dtype):
        if before == after:
            return value
        if after == torch.bool:
            return self.compare("!=", before, value, ir.Constant(TYPES[before], 0))
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
    """Upper half of a float32's bits, rounded to the nearest, ties to even; NaN stays NaN."""
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
    carried = builder.add(bits, builder.add(odd, I32(0x7FFF)))
    nan = builder.fcmp_unordered("uno", value, value)
    rounded = builder.select(nan, builder.or_(bits, I32(1 << 22)), carried)
    return builder.trunc(builder.lshr(rounded, I32(16)), TYPES[torch.bfloat16])


def lowered(graph: fx.Graph, groups: Sequence[tuple], rest: Sequence[tuple],
            in_place: int | None = None, levels: fx.Graph | None = None,
            full: fx.Graph | None = None) -> tuple[str, tuple[tuple, ...]]:  # fmt: skip
    """(LLVM's assembly of ``loop(start, stop, *addresses)``, (dtype, *shape of a group) of each result).

    The addresses are of tensors of groups, of the rest, with ``full`` of the shard, and of results, except a first
    result in place of a tensor of groups. Other arguments are those of ``CompiledLoop``, traced. The module also has
    ``layers(start, stop, count, table)``, a loop over the groups of many layers, see ``_add_layers``.
    """
    module = ir.Module("maskpro_kernels")
    if full is None:
        function, results = _add_loop(module, ENTRY, graph, groups, rest, in_place)
    else:
        level, _ = _add_loop(module, "level", levels, [NUMBER], rest, None)
        by_bounds, _ = _add_loop(module, "by_bounds", graph, [*groups, LEVEL], rest, in_place)
        draw, results = _add_loop(module, "draw", full, [*groups, NUMBER], rest, in_place)
        function = _add_draws(module, level, by_bounds, draw, groups, rest, in_place, *results)
    add_shared(module, function)
    add_shared(module, _add_layers(module, function), SHARED_LAYERS)
    return str(module), results


def add_function(module: ir.Module, name: str, longs: int, pointers: int) -> tuple[ir.Function, ir.IRBuilder]:
    """Add a function with ``longs`` and ``pointers`` as arguments and no result; return it and its builder."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [*[I64] * longs, *[POINTER] * pointers]), name)
    return function, ir.IRBuilder(function.append_basic_block())


def prefer_512_bit_vectors(function: ir.Function) -> None:
    """Use the widest registers, which is faster here; LLVM's tuning for some CPUs uses half of them."""
    # llvmlite does not support attributes with values
    set.add(function.attributes, '"prefer-vector-width"="512"')


def _address(builder: ir.IRBuilder, pointer: ir.Value, group: ir.Value, i: int, count: int, dtype: torch.dtype):
    """Address of the i-th of ``count`` columns of a group."""
    index = builder.add(builder.mul(group, I64(count)), I64(i))
    return builder.gep(pointer, [index], source_etype=TYPES[dtype])


def for_range(builder: ir.IRBuilder, start: ir.Value, stop: ir.Value, body: Callable[[ir.Value], None], step: int = 1):
    """Add a loop over [start, stop); the builder continues after it."""
    before = builder.block
    loop = builder.append_basic_block()
    done = builder.append_basic_block()
    builder.cbranch(builder.icmp_signed("<", start, stop), loop, done)
    builder.position_at_end(loop)
    i = builder.phi(I64)
    i.add_incoming(start, before)
    body(i)
    following = builder.add(i, I64(step))
    i.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, stop), loop, done)
    builder.position_at_end(done)


def _add_loop(module: ir.Module, name: str, graph: fx.Graph, groups: Sequence[tuple],
              rest: Sequence[tuple], in_place: int | None) -> tuple[ir.Function, tuple[tuple, ...]]:  # fmt: skip
    """``loop`` of a function by itself, and its results, as ``lowered`` says."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in graph.nodes if node.op == "output")
    results = tuple((x.meta["val"].dtype, *x.meta["val"].shape[1:]) for x in output.args[0])
    inputs = len(groups) + len(rest)
    function, builder = add_function(module, name, 2, inputs + len(results) - (in_place is not None))
    prefer_512_bit_vectors(function)
    # inlined, its arguments would lose noalias
    function.attributes.add("noinline")
    start, stop, *pointers = function.args
    for pointer in pointers:
        pointer.add_attribute("noalias")
    outputs = pointers[inputs:] if in_place is None else [pointers[in_place], *pointers[inputs:]]
    shared = {}
    for node, pointer, (dtype, *shape) in zip(nodes[len(groups) :], pointers[len(groups) : inputs], rest, strict=True):
        addresses = [builder.gep(pointer, [I64(i)], source_etype=TYPES[dtype]) for i in range(math.prod(shape))]
        shared[node] = Columns([builder.load(x, typ=TYPES[dtype]) for x in addresses], dtype)

    def body(group: ir.Value) -> None:
        columns_of = dict(shared)
        for node, pointer, (dtype, *shape) in zip(nodes, pointers, groups, strict=False):
            columns_of[node] = Columns(_loaded(builder, pointer, group, dtype, math.prod(shape)), dtype)
        operations = Body(graph, builder, group, columns_of)
        # all loads before all stores: a result may overwrite a tensor of groups
        for pointer, (dtype, *shape), columns in zip(outputs, results, operations.run(), strict=True):
            count = math.prod(shape)
            _store(builder, columns.values * (count // len(columns.values)), pointer, group, dtype)

    for_range(builder, start, stop, body)
    builder.ret_void()
    return function, results


def _loaded(builder: ir.IRBuilder, pointer: ir.Value, group: ir.Value, dtype: torch.dtype, count: int) -> list:
    """Load the columns of a group."""
    addresses = [_address(builder, pointer, group, i, count, dtype) for i in range(count)]
    # views of files or of other tensors may be unaligned
    return [builder.load(x, typ=TYPES[dtype], align=1) for x in addresses]


def _store(builder: ir.IRBuilder, values: Sequence, pointer: ir.Value, group: ir.Value, dtype: torch.dtype) -> None:
    """Store values of the columns of a group."""
    for i, value in enumerate(values):
        builder.store(value, _address(builder, pointer, group, i, len(values), dtype), align=1)


class _Numbers:
    """Writer of group indices in the whole layer into memory of ``NUMBER``, by the shard's address."""

    def __init__(self, builder: ir.IRBuilder, shard: ir.Value, memory: ir.Value):
        self.builder = builder
        self.memory = memory
        first, self.columns, row_stride, self.offset = _loaded(builder, shard, I64(0), torch.int64, 4)
        self.shift = builder.add(first, self.offset)
        self.gap = builder.sub(row_stride, self.columns)

    def put(self, i: ir.Value, group: ir.Value) -> None:
        """Write the i-th index, that of ``group``, as if rows were adjacent."""
        _store(self.builder, [self.builder.trunc(self.builder.add(group, self.shift), I32)], self.memory, i, *NUMBER)

    def set_apart(self, count: ir.Value) -> None:
        """Correct ``count`` indices if rows are not adjacent; adjacent rows need no division."""
        builder = self.builder

        def correct(i: ir.Value) -> None:
            (number,) = _loaded(builder, self.memory, i, *NUMBER, 1)
            row = builder.sdiv(builder.sub(builder.zext(number, I64), self.offset), self.columns)
            skipped = builder.trunc(builder.mul(row, self.gap), I32)
            _store(builder, [builder.add(number, skipped)], self.memory, i, *NUMBER)

        with builder.if_then(builder.icmp_signed("!=", self.gap, I64(0))):
            for_range(builder, I64(0), count, correct)


def _add_draws(module: ir.Module, level: ir.Function, by_bounds: ir.Function, draw: ir.Function,
               groups: Sequence[tuple], rest: Sequence[tuple], in_place: int | None,
               result: tuple) -> ir.Function:  # fmt: skip
    """Add ``loop``, which tries BLOCK groups at a time by the bounds, and draws BATCH undetermined groups at a time."""
    batch = _add_batch(module, draw, groups, rest, in_place, result)
    inputs = len(groups) + len(rest)
    has_result = in_place is None
    function, builder = add_function(module, ENTRY, 2, inputs + 1 + has_result)
    start, stop, *pointers = function.args
    group_pointers = pointers[: len(groups)]
    rest_pointers = pointers[len(groups) : inputs]
    result_pointers = pointers[inputs + 1 :]
    byte = ir.IntType(8)
    # read eight at a time; the last ones may be beyond the block
    flags_type = ir.ArrayType(byte, BLOCK + 8)
    flags = builder.alloca(flags_type)
    undrawn = builder.alloca(I64, BATCH)
    filled = builder.alloca(I64)
    levels = builder.alloca(byte, BLOCK)
    memory = builder.alloca(I32, BLOCK)
    numbers = _Numbers(builder, pointers[inputs], memory)
    builder.store(flags_type(None), flags)
    builder.store(I64(0), filled)

    def draw_undrawn(size: ir.Value) -> None:
        builder.call(batch, [size, undrawn, *pointers])
        builder.store(I64(0), filled)

    def draw_block(first: ir.Value) -> None:
        end = minimum(builder, builder.add(first, I64(BLOCK)), stop)
        size = builder.sub(end, first)
        for_range(builder, I64(0), size, lambda i: numbers.put(i, builder.add(first, i)))
        numbers.set_apart(size)
        builder.call(level, [I64(0), size, memory, *rest_pointers, levels])
        # by the index of a group instead of its index in the block
        group_flags, group_levels = (builder.gep(x, [builder.neg(first)], source_etype=byte) for x in (flags, levels))
        arguments = [*group_pointers, group_levels, *rest_pointers, *result_pointers, group_flags]
        builder.call(by_bounds, [first, end, *arguments])

        def collect(group: ir.Value) -> None:
            size = builder.load(filled, typ=I64)
            builder.store(group, builder.gep(undrawn, [size], source_etype=I64))
            size = builder.add(size, builder.zext(_load_flag(builder, group_flags, group, byte), I64))
            builder.store(size, filled)
            with builder.if_then(builder.icmp_signed("==", size, I64(BATCH)), likely=False):
                draw_undrawn(size)

        def collect_eight(group: ir.Value) -> None:
            eight_flags = _load_flag(builder, group_flags, group, I64)
            with builder.if_then(builder.icmp_signed("!=", eight_flags, I64(0)), likely=False):
                for_range(builder, group, minimum(builder, builder.add(group, I64(8)), end), collect)

        for_range(builder, first, end, collect_eight, step=8)

    for_range(builder, start, stop, draw_block, step=BLOCK)
    size = builder.load(filled, typ=I64)
    with builder.if_then(builder.icmp_signed("!=", size, I64(0))):
        draw_undrawn(size)
    builder.ret_void()
    return function


def minimum(builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return builder.select(builder.icmp_signed("<", x, y), x, y)


def maximum(builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return builder.select(builder.icmp_signed(">", x, y), x, y)


def _load_flag(builder: ir.IRBuilder, flags: ir.Value, group: ir.Value, type_: ir.Type) -> ir.Value:
    """Load a group's flag; a larger type than a byte also has the flags of later groups."""
    return builder.load(builder.gep(flags, [group], source_etype=ir.IntType(8)), typ=type_, align=1)


def _copy(builder: ir.IRBuilder, source: tuple, target: tuple, type_: ir.VectorType) -> None:
    """Copy a group as a vector of bytes; source and target are (pointer, index of the group)."""
    # the stride of vectors would be rounded up to a power of two
    source_group, target_group = (
        builder.gep(pointer, [builder.mul(group, I64(type_.count))], source_etype=ir.IntType(8))
        for pointer, group in (source, target)
    )
    builder.store(builder.load(source_group, typ=type_, align=1), target_group, align=1)


def _add_batch(module: ir.Module, draw: ir.Function, groups: Sequence[tuple], rest: Sequence[tuple],
               in_place: int | None, result: tuple) -> ir.Function:  # fmt: skip
    """Add ``batch(size, undetermined groups, *addresses)``: gather up to BATCH groups, draw and scatter them."""
    inputs = len(groups) + len(rest)
    has_result = in_place is None
    function, builder = add_function(module, "batch", 1, 1 + inputs + 1 + has_result)
    function.attributes.add("noinline")
    size, undrawn, *pointers = function.args
    # copy each group as a vector: loops over columns would use slow gather and scatter instructions
    *types, result_type = (
        ir.VectorType(ir.IntType(8), dtype.itemsize * math.prod(shape)) for dtype, *shape in (*groups, result)
    )
    gathered = [builder.alloca(group, BATCH) for group in types]
    drawn = builder.alloca(result_type, BATCH) if has_result else gathered[in_place]
    for buffer in (*gathered, drawn):
        # aligned for the vectors that are read and written there
        buffer.align = 64
    memory = builder.alloca(I32, BATCH)
    numbers = _Numbers(builder, pointers[inputs], memory)
    out = pointers[inputs + 1] if has_result else pointers[in_place]
    # pad to whole vectors with copies of the last group: a remainder would be processed one by one
    padded = builder.and_(builder.add(size, I64(VECTORS - 1)), I64(-VECTORS))
    last = builder.sub(size, I64(1))

    def undrawn_at(i: ir.Value) -> ir.Value:
        return builder.load(builder.gep(undrawn, [i], source_etype=I64), typ=I64)

    def gather(i: ir.Value) -> None:
        group = undrawn_at(builder.select(builder.icmp_signed("<", i, last), i, last))
        for source, target, type_ in zip(pointers, gathered, types, strict=False):
            _copy(builder, (source, group), (target, i), type_)
        numbers.put(i, group)

    def scatter(i: ir.Value) -> None:
        _copy(builder, (drawn, i), (out, undrawn_at(i)), result_type)

    for_range(builder, I64(0), padded, gather)
    numbers.set_apart(padded)
    results = [drawn] if has_result else []
    builder.call(draw, [I64(0), padded, *gathered, memory, *pointers[len(groups) : inputs], *results])
    for_range(builder, I64(0), size, scatter)
    builder.ret_void()
    return function


def _add_layers(module: ir.Module, loop: ir.Function) -> ir.Function:
    """Add ``layers(start, stop, count, table)``: the loop over groups [start, stop) of all layers, layer after layer.

    A row of the table has the number of groups before the layer, and the addresses for the loop. One more row after
    those of ``count`` layers has the number of all groups.
    """
    function, builder = add_function(module, LAYERS, 3, 1)
    start, stop, count, table = function.args
    width = I64(len(loop.args) - 1)

    def entry(row: ir.Value, i: int, type_: ir.Type) -> ir.Value:
        index = builder.add(builder.mul(row, width), I64(i))
        return builder.load(builder.gep(table, [index], source_etype=I64), typ=type_)

    def layer(row: ir.Value) -> None:
        first = entry(row, 0, I64)
        end = entry(builder.add(row, I64(1)), 0, I64)
        low = maximum(builder, first, start)
        high = minimum(builder, end, stop)
        with builder.if_then(builder.icmp_signed("<", low, high)):
            addresses = [entry(row, 1 + i, x.type) for i, x in enumerate(loop.args[2:])]
            builder.call(loop, [builder.sub(low, first), builder.sub(high, first), *addresses])

    for_range(builder, I64(0), count, layer)
    builder.ret_void()
    return function


def add_shared(module: ir.Module, loop: ir.Function, name: str = SHARED) -> None:
    """Add ``shared(data)``, an OpenMP thread's share of the loop; data is [count, *other arguments]."""
    openmp_type = ir.FunctionType(I32, [])
    thread_num, num_threads = (module.globals.get(x) or ir.Function(module, openmp_type, x) for x in (THREAD, THREADS))
    function, builder = add_function(module, name, 0, 1)

    def load_argument(i: int, type_: ir.Type) -> ir.Value:
        return builder.load(builder.gep(function.args[0], [I64(i)], source_etype=I64), typ=type_)

    thread, threads = (builder.sext(builder.call(f, []), I64) for f in (thread_num, num_threads))
    count = load_argument(0, I64)
    bounds = [builder.sdiv(builder.mul(count, x), threads) for x in (thread, builder.add(thread, I64(1)))]
    builder.call(loop, [*bounds, *(load_argument(1 + i, x.type) for i, x in enumerate(loop.args[2:]))])
    builder.ret_void()
