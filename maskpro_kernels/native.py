"""Functions of groups as loops of machine code: torch's operations on columns, one by one, as LLVM's.

A function is traced once with torch; what it does to a group becomes the body of a loop over groups, which LLVM
vectorises, interleaved columns included. Nothing is reassociated, contracted or approximated: bits are those of torch.
"""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from llvmlite import binding, ir
from torch import Tensor, fx

# bfloat16 as the upper half of a float32's bits, for llvmlite has no such type
TYPES = {
    torch.bool: ir.IntType(1),
    torch.uint8: ir.IntType(8),
    torch.int16: ir.IntType(16),
    torch.int32: ir.IntType(32),
    torch.int64: ir.IntType(64),
    torch.float32: ir.FloatType(),
    torch.float16: ir.HalfType(),
    torch.bfloat16: ir.IntType(16),
}
LONG, POINTER = ir.IntType(64), ir.PointerType()
UNSIGNED = (torch.bool, torch.uint8)
ENTRY, SHARED = "loop", "shared"
# of OpenMP
THREAD, THREADS = "omp_get_thread_num", "omp_get_num_threads"

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
    "__rshift__": "ashr",
    "__lshift__": "shl",
    "bitwise_right_shift": "ashr",
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


class _Body:
    """The body of the loop, operation by operation."""

    def __init__(self, graph: fx.GraphModule, builder: ir.IRBuilder, group: ir.Value, fill: Callable):
        self.graph, self.builder, self.group = graph, builder, group
        # writes a value (i, value) into the i-th place of a group
        self.fill = fill
        # of places, their numbers
        self.known: dict[fx.Node, Columns | list[Columns]] = {}

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
        name = "getitem" if node.target is operator.getitem else node.target._schema.name.split("::")[1]
        args, given = node.args, self.known.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        dtype = node.meta["val"].dtype if isinstance(node.meta.get("val"), Tensor) else None
        if name == "getitem":
            self.known[node] = given[args[1]]
            return
        self.refuse_what_is_not_read(node, name)
        if name == "unbind":
            self.known[node] = [Columns([value], given.dtype) for value in given.values]
            return
        if name == "copy_":
            filled = self.known[args[1]]
            self.fill(given.values[0], self.cast(filled.values[0], filled.dtype, given.dtype))
            return
        if name == "view" and isinstance(args[1], torch.dtype):
            values = [self.builder.bitcast(value, TYPES[dtype]) for value in given.values]
        elif name in SAME:
            values = given.values
        elif name == "select":
            values = [given.values[args[2]]]
        elif name == "stack":
            values = [value for x in args[0] for value in self.known[x].values]
        elif name == "_to_copy":
            values = [self.cast(value, given.dtype, dtype) for value in given.values]
        elif name == "arange":
            values = [self.group]
        elif name in ("scalar_tensor", "full", "full_like", "zeros_like", "zeros", "new_zeros", "empty_like"):
            number = args[0] if name == "scalar_tensor" else args[1] if name.startswith("full") else 0
            values = [self.constant(number, dtype)]
        elif name in COMPARISONS:
            values = self.compared(node, COMPARISONS[name])
        elif name in ("bitwise_not", "logical_not"):
            values = [self.builder.not_(self.cast(value, given.dtype, dtype)) for value in given.values]
        elif name == "abs":
            magnitude = self.builder.module.declare_intrinsic("llvm.fabs", [TYPES[dtype]])
            values = [self.builder.call(magnitude, [value]) for value in given.values]
        elif name == "reciprocal":
            values = [self.builder.fdiv(self.constant(1.0, dtype), value) for value in given.values]
        elif name == "where":
            chosen = zip(*self.spread([given.values, *(self.operand(x, dtype) for x in args[1:])]), strict=True)
            values = [self.builder.select(*three) for three in chosen]
        elif name in ("minimum", "maximum"):
            values = [self.extreme(name, dtype, *pair) for pair in self.pairs(node, dtype)]
        elif name in ("clamp", "clamp_min", "clamp_max"):
            values = self.clamped(node, name, given, dtype)
        elif name == "rsub":
            subtract = self.builder.fsub if dtype.is_floating_point else self.builder.sub
            values = [subtract(b, a) for a, b in self.pairs(node, dtype)]
        else:
            operations = FLOAT_OPERATIONS if dtype.is_floating_point else INTEGER_OPERATIONS
            if name not in operations:
                raise NotImplementedError(f"{node.target} has no translation")
            apply = getattr(self.builder, operations[name])
            if dtype in UNSIGNED and name.endswith(("rshift__", "right_shift")):
                apply = self.builder.lshr
            values = [apply(*pair) for pair in self.pairs(node, dtype)]
        self.known[node] = Columns(values, dtype)

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
            return self.rounded_to_bfloat16(self.cast(value, before, torch.float32))
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

    def rounded_to_bfloat16(self, value):
        """The upper half of a float32's bits, to the nearest and ties to even; NaN stays one."""
        word, half = TYPES[torch.int32], TYPES[torch.int16]
        bits = self.builder.bitcast(value, word)
        odd = self.builder.and_(self.builder.lshr(bits, word(16)), word(1))
        carried = self.builder.add(bits, self.builder.add(odd, word(0x7FFF)))
        nan = self.builder.fcmp_unordered("uno", value, value)
        return self.builder.trunc(
            self.builder.lshr(self.builder.select(nan, self.builder.or_(bits, word(1 << 22)), carried), word(16)), half
        )


def lowered(
    graph: fx.GraphModule, groups: Sequence[tuple], rest: Sequence[tuple], places: tuple | None
) -> tuple[str, tuple[tuple, ...]]:
    """(LLVM's assembly of ``loop(start, stop, *addresses)``, (dtype, *shape of a group) of each result).

    The addresses are those of tensors of groups, of the groups that places belong to unless they are filled in place,
    of the rest, and of results. ``groups``, ``rest`` and ``places`` are as in ``graphs.Graph``.
    """
    module = ir.Module("maskpro_kernels")
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    results = tuple((x.meta["val"].dtype, *x.meta["val"].shape[1:]) for x in output.args[0])
    own = bool(places) and not places.in_place
    count = len(groups) + own + len(rest) + len(results)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [LONG, LONG, *[POINTER] * count]), ENTRY)
    # some CPUs are tuned for half of such registers, and gain from whole ones here
    set.add(function.attributes, '"prefer-vector-width"="512"')
    start, stop, *pointers = function.args
    for pointer in pointers:
        pointer.add_attribute("noalias")
    entry, loop, done = (function.append_basic_block(name) for name in ("entry", "loop", "done"))
    before, builder = ir.IRBuilder(entry), ir.IRBuilder(loop)
    group = builder.phi(LONG)

    def address(pointer, i: int, size: int, dtype: torch.dtype):
        index = builder.add(builder.mul(group, LONG(size)), LONG(i))
        return builder.gep(pointer, [index], source_etype=TYPES[dtype])

    filled = pointers[len(groups)] if own else pointers[0]
    body = _Body(
        graph, builder, group, lambda i, value: builder.store(value, address(filled, i, places.count, places.dtype))
    )
    for node, pointer, (dtype, *shape) in zip(nodes, pointers, groups, strict=False):
        size = math.prod(shape)
        values = [builder.load(address(pointer, i, size, dtype), typ=TYPES[dtype]) for i in range(size)]
        body.known[node] = Columns(values, dtype)
    if places:
        body.known[nodes[len(groups)]] = Columns(list(range(places.count)), places.dtype)
    shared, outputs = pointers[len(groups) + own :][: len(rest)], pointers[count - len(results) :]
    for node, pointer, (dtype, *shape) in zip(nodes[len(groups) + bool(places) :], shared, rest, strict=True):
        addresses = [before.gep(pointer, [LONG(i)], source_etype=TYPES[dtype]) for i in range(math.prod(shape))]
        body.known[node] = Columns([before.load(x, typ=TYPES[dtype]) for x in addresses], dtype)
    before.cbranch(before.icmp_signed("<", start, stop), loop, done)
    for pointer, (dtype, *_), columns in zip(outputs, results, body.run(), strict=True):
        for i, value in enumerate(columns.values):
            builder.store(value, address(pointer, i, len(columns.values), dtype))
    following = builder.add(group, LONG(1))
    group.add_incoming(start, entry)
    group.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, stop), loop, done)
    ir.IRBuilder(done).ret_void()
    _add_shared(module, function, count)
    return str(module), results


@functools.cache
def _initialize() -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()


@functools.cache
def machine() -> binding.TargetMachine:
    """This one, with all that its processor has."""
    _initialize()
    target = binding.Target.from_default_triple()
    features = binding.get_host_cpu_features().flatten()
    return target.create_target_machine(binding.get_host_cpu_name(), features, opt=3, reloc="pic", codemodel="default")


def compiled(assembly: str) -> bytes:
    """The object file of a module."""
    module = binding.parse_assembly(assembly)
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = True
    builder = binding.create_pass_builder(machine(), options)
    builder.getModulePassManager().run(module, builder)
    return machine().emit_object(module)


def loaded(code: bytes, addresses: int) -> Callable[..., None]:
    """``loop(count, threads, *addresses)`` of an object file: all groups, without the GIL."""
    _initialize()
    jit = binding.create_lljit_compiler()
    builder = binding.JITLibraryBuilder().add_object_img(code).export_symbol(ENTRY).export_symbol(SHARED)
    openmp = _openmp()
    for name in (THREAD, THREADS):
        # where there is no OpenMP nothing calls them, but they have to be something
        builder.import_symbol(name, ctypes.cast(getattr(openmp, name, _NO_THREAD), ctypes.c_void_p).value)
    library = builder.link(jit, ENTRY)
    whole = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * addresses)(library[ENTRY])
    given = ctypes.c_int64 * (1 + addresses)

    def loop(count: int, threads: int, *tensors: int) -> None:
        if threads > 1 and openmp:
            openmp.GOMP_parallel(ctypes.c_void_p(library[SHARED]), given(count, *tensors), threads, 0)
        else:
            whole(0, count, *tensors)

    # the code lives as long as these
    loop.kept = jit, library
    return loop


_NO_THREAD = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """The library whose threads torch's own loops run in, where that is GNU's: no second one is loaded."""
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
    except (OSError, AttributeError):
        return None
    library.GOMP_parallel.restype = None
    return library


def _add_shared(module: ir.Module, loop: ir.Function, addresses: int) -> None:
    """``shared(data)``, what a thread of OpenMP runs: its share of the loop, data being [count, *addresses]."""
    number = ir.FunctionType(ir.IntType(32), [])
    thread, threads = (ir.Function(module, number, name) for name in (THREAD, THREADS))
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), SHARED)
    builder = ir.IRBuilder(function.append_basic_block("entry"))

    def datum(i: int, type_):
        return builder.load(builder.gep(function.args[0], [LONG(i)], source_etype=LONG), typ=type_)

    own, all_ = (builder.sext(builder.call(f, []), LONG) for f in (thread, threads))
    count = datum(0, LONG)
    bounds = [builder.sdiv(builder.mul(count, x), all_) for x in (own, builder.add(own, LONG(1)))]
    builder.call(loop, [*bounds, *(datum(1 + i, POINTER) for i in range(addresses))])
    builder.ret_void()
