"""Compiled code for packed weights: instructions of each kind of CPU, present or not."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.cases import slow
from llvmlite import binding

from maskpro_kernels.ops.cpu.packed_gemm import Packed, amx, gathered, rows, strips, weight
from maskpro_kernels.ops.cpu.packed_gemm.instructions import Avx2, Avx512, Neon

BFLOAT16, FLOAT32 = (Packed(2, 4, dtype, dtype) for dtype in (torch.bfloat16, torch.float32))
INT8, INT4 = Packed(2, 4, torch.int8, torch.bfloat16), Packed(2, 4, torch.uint8, torch.bfloat16, 64)
ALL_WEIGHTS = Packed(1, 1, torch.int8, torch.bfloat16)
FOUR_OF_8, GATHERED = INT4._replace(n=4, m=8), "vpshufb 16 vpmaddubsw 9 vpmaddwd 3"
ALL = dict.fromkeys("avx512vbmi2 avx512bf16 avx512vnni amx-tile amx-bf16".split(), True)

BASIC = "+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd,+avx2,+fma,+f16c"
AVX2 = "+avx2,+fma,+f16c"
FULL = f"{BASIC},+avx512vbmi2,+avx512bf16,+avx512vnni,+amx-tile,+amx-bf16"
X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"


@pytest.fixture(autouse=True, scope="module")
def targets():
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()


def innermost_loops(assembly: str, triple: str, features: str) -> list[list[str]]:
    """The names of the instructions of each loop of a module without another one inside."""
    target = binding.Target.from_triple(triple).create_target_machine(features=features, opt=3, reloc="pic")
    module = binding.parse_assembly(assembly)
    module.triple = triple
    builder = binding.create_pass_builder(target, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    lines = [line.split("#")[0].strip() for line in target.emit_assembly(module).splitlines()]
    found, label, names = [], None, []
    for line in filter(None, lines):
        if re.match(r"\.L\w+:", line):
            label, names = line.rstrip(":"), []
        elif not line.startswith("."):
            names.append(line.split()[0])
            if label is not None and label in line.split():
                found.append(names[:])
    return found


ALL_AVX512, AVX512, AVX2_ALONE, NEON = Avx512(ALL), Avx512({}), Avx2({}), Neon({})
ON_NEON = ARM, "+neon"


@pytest.mark.parametrize(
    ("assembly", "target", "expected"),
    [
        (lambda: rows.float_product(BFLOAT16, ALL_AVX512, 1, False), (X86, FULL), "vpexpandw 4 vdpbf16ps 4 kmovd 4"),
        (lambda: rows.float_product(BFLOAT16, ALL_AVX512, 4, True), (X86, FULL), "vpexpandw 1 vdpbf16ps 4"),
        (lambda: rows.float_product(BFLOAT16, ALL_AVX512, 8, True), (X86, FULL), "vpexpandw 2 vdpbf16ps 16"),
        (lambda: rows.float_product(INT4, ALL_AVX512, 8, True), (X86, FULL), "vcvtneps2bf16 2 vdpbf16ps 16"),
        (lambda: rows.float_product(BFLOAT16, ALL_AVX512, 16, True), (X86, FULL), "vpexpandw 1 vdpbf16ps 16"),
        (lambda: rows.float_product(BFLOAT16, AVX512, 1, False), (X86, BASIC), "vpexpandd 8 vfmadd 8"),
        (lambda: rows.float_product(FLOAT32, AVX2_ALONE, 1, False), (X86, AVX2), "vpermd 16 vfmadd 16"),
        (lambda: rows.float_product(FLOAT32, NEON, 1, False), ON_NEON, "tbl 32 fmla 32"),
        (lambda: rows.float_product(BFLOAT16, NEON, 4, False), ON_NEON, "tbl 8 fmla 32"),
        (lambda: rows.float_product(INT8, NEON, 1, False), ON_NEON, "fmla 32"),
        (lambda: weight.unpack(BFLOAT16, ALL_AVX512), (X86, FULL), "vpexpandw 1"),
        (lambda: weight.unpack(BFLOAT16, NEON), ON_NEON, "tbl 8"),
        (lambda: rows.integer_product(INT8, ALL_AVX512, 1, False), (X86, FULL), "vpexpandb 4 vpdpbusd 12 vpshufb 0"),
        (lambda: rows.integer_product(INT4, ALL_AVX512, 1, False), (X86, FULL), "vpexpandb 2 vpdpbusd 6 vpmovzx 2"),
        (lambda: rows.integer_product(INT8, AVX2_ALONE, 1, False), (X86, AVX2), "vpshufb 16 vpmaddwd 16"),
        (lambda: rows.integer_product(ALL_WEIGHTS, ALL_AVX512, 1, False), (X86, FULL), "vpexpandb 0 vpdpbusd 6"),
        (lambda: rows.integer_product(ALL_WEIGHTS, AVX2_ALONE, 1, False), (X86, AVX2), "vpshufb 0 vpmaddwd 8"),
        (lambda: rows.float_product(ALL_WEIGHTS, NEON, 1, False), ON_NEON, "fmla 32"),
        (lambda: amx.tile_product(ALL_WEIGHTS, ALL_AVX512, False), (X86, FULL), "tileloadd 4 tdpbf16ps 4"),
        (lambda: rows.integer_product(FOUR_OF_8, AVX2_ALONE, 1, False), (X86, AVX2), "vpshufb 8 vpmaddwd 8"),
        (lambda: gathered.gathered_product(INT4, AVX2_ALONE, 1, False), (X86, AVX2), GATHERED),
        (lambda: amx.tile_product(BFLOAT16, ALL_AVX512, False), (X86, FULL), "tileloadd 4 tdpbf16ps 4"),
        (lambda: strips.strip_product(BFLOAT16, ALL_AVX512, False), (X86, FULL), "vdpbf16ps 24 vmovaps 2 vmovups 0"),
        (lambda: strips.strip_product(INT4, ALL_AVX512, False), (X86, FULL), "vpexpandw 1 vcvtneps2bf16 1"),
        (lambda: strips.strip_product(ALL_WEIGHTS, ALL_AVX512, False), (X86, FULL), "vpexpandw 0 vdpbf16ps 24"),
    ],
)
def test_each_kind_of_cpu_gets_its_instructions(assembly, target, expected):
    """In the loop that does most of the work nothing else puts values at their places or multiplies them."""
    names, counts = expected.split()[::2], expected.split()[1::2]
    expected = {name: int(count) for name, count in zip(names, counts, strict=True)}
    loops = innermost_loops(assembly(), *target)
    counted = [{name: sum(x.startswith(name) for x in instructions) for name in expected} for instructions in loops]
    assert max(counted, key=lambda counts: sum(counts.values())) == expected


HALF = Packed(2, 4, torch.float16, torch.float16)


@pytest.mark.parametrize("kind", [BFLOAT16, slow(FLOAT32), HALF, slow(INT8), INT4], ids=str)
def test_the_code_asks_for_nothing_that_a_process_may_lack(kind):
    """No helpers of a compiler's run-time library, such as conversions of bfloat16: nobody would link them."""
    for isa, features in ((ALL_AVX512, FULL), (AVX512, BASIC), (AVX2_ALONE, AVX2)):
        assert not calls_of(rows.float_product(kind, isa, 3, True), features)
        assert not calls_of(weight.unpack(kind, isa), features)


@pytest.mark.slow
def test_the_code_of_integers_and_tiles_asks_for_nothing_either():
    for kind in (INT8, INT4, FOUR_OF_8):
        assert not calls_of(rows.quantizer(kind, AVX2_ALONE), AVX2)
    for kind in (INT8, FOUR_OF_8):
        assert not calls_of(rows.integer_product(kind, AVX2_ALONE, 2, True), AVX2)
    for kind in (INT4, INT4._replace(x=torch.float16)):
        assert not calls_of(gathered.gathered_product(kind, AVX2_ALONE, 2, True), AVX2)
    for assembly in (
        rows.integer_product(INT8, ALL_AVX512, 2, True),
        rows.integer_product(INT4, ALL_AVX512, 2, True),
        rows.quantizer(INT8, ALL_AVX512),
        amx.tile_product(INT8, ALL_AVX512, True),
        amx.tile_product(INT4, ALL_AVX512, True),
        amx.tile_product(ALL_WEIGHTS, ALL_AVX512, True),
        amx.tile_product(BFLOAT16, ALL_AVX512, False),
        amx.laid_out(),
    ):
        assert not calls_of(assembly, FULL)


def calls_of(assembly: str, features: str) -> list[str]:
    """The functions that compiled code calls by name, but for those of its own and of OpenMP."""
    target = binding.Target.from_triple(X86).create_target_machine(features=features, opt=3, reloc="pic")
    module = binding.parse_assembly(assembly)
    builder = binding.create_pass_builder(target, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    called = re.findall(r"call\w*\s+(?!\*)(\S+)", target.emit_assembly(module))
    return [name for name in called if not name.startswith(("omp_", "loop"))]
