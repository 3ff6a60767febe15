"""Faults that are planted in compiled kernels are found, each by the check that is there for it."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.compiled import Matrix, adamw, assert_bits_of_reference, mask_score, sample_mask, score_update, top_n_mask
from helpers.compiled_products import PackedProduct, Product, SparseProduct
from helpers.planted import contracted, mutant_of, replaced, what_is_found

from maskpro_kernels.ops.tables import triton as table
from maskpro_kernels.ops.triton import masked_gemm, packed_gemm
from maskpro_kernels.ops.triton.tiles import PACKED_ROWS, Tiles, multiplies_by_warps, tiles_of

pytestmark = pytest.mark.compiled

LINEAR = "masked_linear"

# In AMDGCN: a product in its operand's place, and a sum that it goes into; nothing between has to do with it
PRODUCT_AND_SUM = (
    r"\tv_mul_f32_e32 (v\d+), (0x\w+), \1\n((?:(?!\.LBB|.*v\[|.*\b\1\b).*\n)*)"
    r"\tv_add_f32_e32 (?!\1\b)(v\d+), (v\d+), \1$"
)
# The product is there again after the sum, for what else it goes into
contracted_on_amd = replaced(
    PRODUCT_AND_SUM, r"\3\tv_mov_b32_e32 v200, \2\n\tv_fma_f32 \4, v200, \1, \5\n\tv_mul_f32_e32 \1, v200, \1"
)


def of_one_workgroup(text: str) -> str:
    """All workgroups take themselves for the first: their number is after the arguments that are in registers."""
    register = re.search(r"\.amdhsa_user_sgpr_count (\d+)", text)[1]
    return replaced(r"^(\.LBB0_0:.*\n(?:\t\..*\n)*)", rf"\g<1>\ts_mov_b32 s{register}, 0\n")(text)


def without_a_mask(text: str) -> str:
    """A store's offset, and none beyond the buffer in a masked lane."""
    store = re.search(r"buffer_store_\w+ \S+ (v\d+),", text)
    *_, masked = re.finditer(rf"v_cndmask_b32_e(?:32|64) {store[1]}, v\d+, (v\d+), \S+", text[: store.start()])
    return f"{text[: masked.start()]}v_mov_b32_e32 {store[1]}, {masked[1]}{text[masked.end() :]}"


def product(target: str, row: int = 0, **options):
    tile = tiles_of(LINEAR, target, 2)[row]
    return Product(LINEAR, tile, aligned=True, one_hot=True, **options).assert_right


def sparse_product() -> None:
    SparseProduct(tiles_of("sparse_mma", "sm_80", 2)[0], 8, 32, 64).assert_right()


def swapped(operand: int):
    """The first two registers of an operand of ``mma.sp``, each in the other's place."""
    return replaced(rf"(mma\.sp(?:[^{{]*\{{){{{operand}}}\s*)(%\w+), (%\w+),", r"\1\3, \2,")


def groups(call, **options):
    of = Matrix(2, 4, rows=3, groups=171, **options)
    return lambda: assert_bits_of_reference(lambda: call(of))


def determined() -> None:
    """An update of groups whose draws all are, where every bit of a score shows: the dropped logits are 0."""
    of = Matrix(2, 4, rows=3, groups=171, spread="open")
    kept = torch.arange(of.logits.shape[1]) % 4 < 2
    of.logits.copy_(torch.where(kept, 12.0 + of.logits / 100.0, 0.0))
    assert_bits_of_reference(lambda: score_update(of))


# By fault: what is launched for which target, the text's rewrite, and a kind of finding
PLANTED = {
    "a load one element too far": (
        "sm_80",
        groups(top_n_mask),
        replaced(r"(ld\.global\.v4\.b32[^\[]*\[ %rd\d+) \+ 0 \]", r"\1 + 8192 ]"),
        "out of bounds",
    ),
    "a vector that does not lie at a multiple of its size": (
        "sm_80",
        groups(top_n_mask),
        replaced(r"(ld\.global\.v4\.b32[^\[]*\[ %rd\d+) \+ 0 \]", r"\1 + 4 ]"),
        "misaligned",
    ),
    "a store without its mask": ("sm_80", groups(top_n_mask), replaced(r"@%p\d+ (st\.global)", r"\1"), "out of bounds"),
    "products of 4 x 8 places swapped in an operand": (
        "sm_80",
        product("sm_80"),
        replaced(r"(mma\.sync[^;]*?\{[^}]*\}, \{ )(%\w+), (%\w+),", r"\1\3, \2,", count=0),
        "wrong result",
    ),
    "registers of a sparse operand that are swapped": ("sm_80", sparse_product, swapped(2), "wrong result"),
    "registers of activations beside a sparse operand that are swapped": (
        "sm_80",
        sparse_product,
        swapped(3),
        "wrong result",
    ),
    "the metadata of other rows": (
        "sm_80",
        sparse_product,
        replaced(r"(mma\.sp[^;]*), 0x0;", r"\1, 0x1;"),
        "wrong result",
    ),
    "a row of shared memory that another swizzle belongs to": (
        "sm_80",
        product("sm_80"),
        replaced(r"(xor\.b32\s+%r\d+, %r\d+, )32;", r"\g<1>64;", count=0),
        "wrong result",
    ),
    "shared memory that is read before it is written": (
        "sm_80",
        product("sm_80"),
        replaced(r"^.*st\.shared(?:::cta)?\.v4\.b16[^;]*;", ""),
        "read of unwritten shared memory",
    ),
    "a register that is read before it is written": (
        "sm_80",
        groups(sample_mask),
        replaced(r"^.*add\.rn\.f32[^;]*;", ""),
        "read of an unwritten register",
    ),
    "a product of shared memory by another swizzle": (
        "sm_90",
        # rows of 128 bytes, which no row of the table has
        Product(LINEAR, Tiles(out=64, tokens=128, k=64, num_warps=8), aligned=True, one_hot=True).assert_right,
        # bits 62 and 63 of a descriptor: of 64 bytes where rows lie by 128
        replaced(
            r"(or\.b64\s+%rd\d+, %rd\d+, )(46116862\d+);", lambda found: f"{found[1]}{int(found[2]) + (1 << 62)};", 0
        ),
        "wrong result",
    ),
    "products and sums that are rounded once": ("sm_90", groups(score_update), contracted, "wrong result"),
    "AMD: a load one element too far": (
        "gfx942",
        groups(top_n_mask),
        replaced(r"(buffer_load_dwordx4 .* offen)$", r"\1 offset:4"),
        "out of bounds",
    ),
    "AMD: words that do not lie at a multiple of their size": (
        "gfx942",
        groups(top_n_mask),
        replaced(r"(buffer_load_dwordx4 .* offen)$", r"\1 offset:2"),
        "misaligned",
    ),
    "AMD: a store without its mask": ("gfx942", groups(top_n_mask), without_a_mask, "out of bounds"),
    "AMD: a register that is read before it is written": (
        "gfx942",
        groups(sample_mask),
        replaced(r"^\tbuffer_load_dwordx4.*$", ""),
        "read of an unwritten register",
    ),
    "AMD: a product and a sum that are rounded once": ("gfx942", groups(adamw), contracted_on_amd, "wrong result"),
    "an approximate reciprocal that is not corrected": (
        "sm_80",
        determined,
        replaced(r"fma\.rn\.f32 (%r\d+), e, y, y;", r"mov.b32 \1, y;", count=0),
        "wrong result",
    ),
    "AMD: a division by an approximate reciprocal": (
        "gfx942",
        groups(mask_score),
        replaced(
            r"v_div_fixup_f32 (v\d+), v\d+, (v\d+), (\w+)$",
            r"v_rcp_f32_e32 v200, \2\n\tv_mul_f32_e32 \1, \3, v200",
            count=0,
        ),
        "wrong result",
    ),
    "AMD: programs that write one another's place": ("gfx942", groups(score_update), of_one_workgroup, "race"),
    "programs that write one another's place": (
        "sm_80",
        groups(score_update),
        replaced(r"(mov\.u32\s+%r\d+, )%ctaid\.x;", r"\g<1>0;"),
        "race",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault, compiled_for, emulator):
    target, call, rewrite, kind = PLANTED[fault]
    if "another swizzle" in fault and target == "sm_90" and multiplies_by_warps(target):
        pytest.skip("with this release of Triton tiles for sm_90 have no wgmma")
    compiled_for(target)
    assert not what_is_found(emulator, call, str)
    found = what_is_found(emulator, call, rewrite)
    assert any(kind in each for each in found), found


def test_a_fault_that_cannot_be_planted_is_no_finding(compiled_for, emulator):
    compiled_for("sm_80")
    with pytest.raises(pytest.fail.Exception, match="no such text is not in the kernel"):
        what_is_found(emulator, groups(top_n_mask), replaced("no such text", ""))


# By mutation: of which file, the text, by what it is replaced, a product that uses it, and a kind of finding
MUTANTS = {
    "every block of tokens stores the log-probability": (
        masked_gemm,
        "        if tl.program_id(1) == 0:\n            tl.store(partial",
        "        if tl.program_id(1) >= 0:\n            tl.store(partial",
        Product(LINEAR, tiles_of(LINEAR, "sm_80", 2)[0], log_prob=True),
        "write different values to global memory",
    ),
    "a store's mask is off by a row": (
        packed_gemm,
        "(row[:, None] < rows))",
        "(row[:, None] < rows + 1))",
        PackedProduct(tiles_of("packed_linear", "sm_80", 2)[0]),
        "out of bounds",
    ),
    "chunks loaded together have no scale for a short group at the end of a row": (
        packed_gemm,
        "place = row * tl.cdiv(chunks, GROUP)",
        "place = row * (chunks // GROUP)",
        PackedProduct(PACKED_ROWS[0], values="int4", k=576),
        "wrong result",
    ),
}


@pytest.mark.parametrize("mutation", MUTANTS)
def test_a_mutant_is_found(mutation, compiled_for, emulator, monkeypatch, tmp_path):
    module, before, after, mutated_product, kind = MUTANTS[mutation]
    compiled_for("sm_80")
    mutant = mutant_of(module, before, after, tmp_path)
    mutant.torch = emulator.torch
    if module is packed_gemm:
        mutant.tiles_for = lambda *_: mutated_product.config
        mutant.rows_for = lambda *_: mutated_product.config
        monkeypatch.setattr(table, "nm_linear", mutant.nm_linear)
    else:
        mutant.tiles_for = lambda *_: mutated_product.tile
        monkeypatch.setattr(table, LINEAR, mutant.masked_linear)
    found = what_is_found(emulator, mutated_product.assert_right, str)
    assert any(kind in each for each in found), found
