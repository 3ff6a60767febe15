"""Integer instructions of the AMDGCN emulator against integers of Python's."""

from __future__ import annotations

import numpy as np
import pytest
from hand_written.amdgcn import Run, compute, kinds

from gpu_emulators.findings import Refused

WORD, LONG = (1 << 32) - 1, (1 << 64) - 1
EDGES = [0, 1, 2, 3, 31, 32, 63, 64, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
COUNT = 256


def values(seed: int, dtype: type = np.uint32) -> np.ndarray:
    """Edges and random bits."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 1 << 64, COUNT, dtype=np.uint64)
    edges = random.permutation(np.array(EDGES, np.uint64))
    return np.concatenate([edges, bits >> np.uint64(seed % 7)]).astype(dtype)


def signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


def field(value: int, offset: int, width: int) -> int:
    return value >> (offset & 31) & (1 << (width & 31)) - 1


def permuted(a: int, b: int, select: int) -> int:
    table = (b | a << 32).to_bytes(8, "little")
    result = 0
    for k in range(4):
        chosen = select >> 8 * k & 255
        if chosen < 8:
            byte = table[chosen]
        elif chosen < 12:
            byte = 255 * (table[2 * (chosen - 8) + 1] >> 7)
        else:
            byte = 0 if chosen == 12 else 255
        result |= byte << 8 * k
    return result


# By instruction: what it gives, its low 32 bits, of unsigned operands
OF_WORDS = {
    "v_add_u32_e32 $d, $a, $b": lambda a, b: a + b,
    "v_sub_u32_e32 $d, $a, $b": lambda a, b: a - b,
    "v_subrev_u32_e32 $d, $a, $b": lambda a, b: b - a,
    "v_and_b32_e32 $d, $a, $b": lambda a, b: a & b,
    "v_or_b32_e32 $d, $a, $b": lambda a, b: a | b,
    "v_xor_b32_e32 $d, $a, $b": lambda a, b: a ^ b,
    "v_not_b32_e32 $d, $a": lambda a, b: ~a,
    "v_bfrev_b32_e32 $d, $a": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "v_min_u32_e32 $d, $a, $b": min,
    "v_max_u32_e32 $d, $a, $b": max,
    "v_min_i32_e32 $d, $a, $b": lambda a, b: min(signed(a), signed(b)),
    "v_max_i32_e32 $d, $a, $b": lambda a, b: max(signed(a), signed(b)),
    "v_lshlrev_b32_e32 $d, $a, $b": lambda a, b: b << (a & 31),
    "v_lshrrev_b32_e32 $d, $a, $b": lambda a, b: b >> (a & 31),
    "v_ashrrev_i32_e32 $d, $a, $b": lambda a, b: signed(b) >> (a & 31),
    "v_mul_lo_u32 $d, $a, $b": lambda a, b: a * b,
    "v_mul_hi_u32 $d, $a, $b": lambda a, b: a * b >> 32,
    "v_mul_hi_i32 $d, $a, $b": lambda a, b: signed(a) * signed(b) >> 32,
    "v_mul_u32_u24_e32 $d, $a, $b": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "v_bcnt_u32_b32 $d, $a, $b": lambda a, b: a.bit_count() + b,
    "v_ffbh_u32_e32 $d, $a": lambda a, b: 32 - a.bit_length() if a else -1,
    "v_ffbl_b32_e32 $d, $a": lambda a, b: (a & -a).bit_length() - 1 if a else -1,
    "v_add3_u32 $d, $a, $b, $c": lambda a, b, c: a + b + c,
    "v_or3_b32 $d, $a, $b, $c": lambda a, b, c: a | b | c,
    "v_and_or_b32 $d, $a, $b, $c": lambda a, b, c: a & b | c,
    "v_xad_u32 $d, $a, $b, $c": lambda a, b, c: (a ^ b) + c,
    "v_lshl_add_u32 $d, $a, $b, $c": lambda a, b, c: (a << (b & 31)) + c,
    "v_lshl_or_b32 $d, $a, $b, $c": lambda a, b, c: a << (b & 31) | c,
    "v_bfe_u32 $d, $a, $b, $c": field,
    "v_bfe_i32 $d, $a, $b, $c": lambda a, b, c: signed(field(a, b, c), c & 31) if c & 31 else 0,
    "v_bfi_b32 $d, $a, $b, $c": lambda a, b, c: a & b | ~a & c,
    "v_alignbit_b32 $d, $a, $b, $c": lambda a, b, c: (a << 32 | b) >> (c & 31),
    "v_alignbyte_b32 $d, $a, $b, $c": lambda a, b, c: (a << 32 | b) >> 8 * (c & 3),
    "v_min3_i32 $d, $a, $b, $c": lambda *abc: min(map(signed, abc)),
    "v_max3_u32 $d, $a, $b, $c": max,
    "v_add_u16_e32 $d, $a, $b": lambda a, b: a + b & 0xFFFF,
    "v_lshlrev_b16_e32 $d, $a, $b": lambda a, b: b << (a & 15) & 0xFFFF,
    "v_lshrrev_b16_e32 $d, $a, $b": lambda a, b: (b & 0xFFFF) >> (a & 15),
    "v_perm_b32 $d, $a, $b, $c": permuted,
}


@pytest.mark.parametrize("text", OF_WORDS)
def test_words(text):
    operands = [values(seed) for seed in (1, 2, 3)][: 3 if "$c" in text else 2]
    if text.startswith("v_perm"):
        operands[2] = operands[2] & np.uint32(0x0F0F0F0F)
    found = compute(text, *operands)
    expected = [OF_WORDS[text](*map(int, row)) & WORD for row in zip(*operands, strict=True)]
    assert found.tolist() == expected


OF_LONGS = {
    "v_lshlrev_b64 $d, $b, $a": lambda a, b: a << (b & 63),
    "v_lshrrev_b64 $d, $b, $a": lambda a, b: a >> (b & 63),
    "v_ashrrev_i64 $d, $b, $a": lambda a, b: signed(a, 64) >> (b & 63),
    "v_lshl_add_u64 $d, $a, 3, $a": lambda a, b: (a << 3) + a,
    "v_mad_u64_u32 $d, s[70:71], $b, $b, $a": lambda a, b: b * b + a,
    "v_mov_b64_e32 $d, $a": lambda a, b: a,
}


@pytest.mark.parametrize("text", OF_LONGS)
def test_longs(text):
    long, word = values(4, np.uint64), values(5)
    found = compute(text, long, word, out=np.uint64)
    expected = [OF_LONGS[text](*map(int, row)) & LONG for row in zip(long, word, strict=True)]
    assert found.tolist() == expected


COMPARED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", ["u16", "i16", "u32", "i32", "u64", "i64"])
@pytest.mark.parametrize("name", COMPARED)
def test_comparisons(name, kind):
    bits = int(kind[1:])
    dtype = np.uint64 if bits == 64 else np.uint32
    a, b = values(6, dtype), values(7, dtype)
    b[::5] = a[::5]
    found = compute(f"v_cmp_{name}_{kind}_e64 $d, $a, $b", a, b, out=bool)
    read = (lambda x: signed(x, bits)) if kind[0] == "i" else (lambda x: x & (1 << bits) - 1)
    assert found.tolist() == [COMPARED[name](read(int(x)), read(int(y))) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("v_add_co_u32_e64 $d, s[60:61], $a, $b", lambda a, b: a + b),
        ("v_sub_co_u32_e64 $d, s[60:61], $a, $b", lambda a, b: a - b),
        ("v_subrev_co_u32_e64 $d, s[60:61], $a, $b", lambda a, b: b - a),
    ],
)
def test_carries_go_from_word_to_word(text, exact):
    """Sums and differences of 64 bits by their words."""
    a, b = values(8, np.uint64), values(9, np.uint64)
    name = text.split("_")[1]
    low = text.replace("$d", "v40").replace("$a", "v10").replace("$b", "v12")
    carries = {"add": "addc", "sub": "subb", "subrev": "subbrev"}[name]
    high = f"v_{carries}_co_u32_e64 v41, s[62:63], v11, v13, s[60:61]"
    found = compute(f"{low}\n{high}", a, b, out=np.uint64)
    assert found.tolist() == [exact(int(x), int(y)) & LONG for x, y in zip(a, b, strict=True)]


def test_a_choice_by_lanes():
    which, a, b = values(3) % 2 == 1, values(1), values(2)
    found = compute("v_cndmask_b32_e64 $d, $a, $b, s[54:55]", a, b, which)
    assert found.tolist() == np.where(which, b, a).tolist()


SCALARS = {
    "s_add_u32 s20, s10, s11": lambda a, b: ((a + b) & WORD, a + b > WORD),
    "s_sub_u32 s20, s10, s11": lambda a, b: ((a - b) & WORD, a < b),
    "s_add_i32 s20, s10, s11": lambda a, b: ((a + b) & WORD, signed(a + b) != signed(a) + signed(b)),
    "s_sub_i32 s20, s10, s11": lambda a, b: ((a - b) & WORD, signed(a - b) != signed(a) - signed(b)),
    "s_mul_i32 s20, s10, s11": lambda a, b: (a * b & WORD, None),
    "s_mul_hi_u32 s20, s10, s11": lambda a, b: (a * b >> 32, None),
    "s_lshl_b32 s20, s10, s11": lambda a, b: (a << (b & 31) & WORD, a << (b & 31) & WORD != 0),
    "s_lshr_b32 s20, s10, s11": lambda a, b: (a >> (b & 31), a >> (b & 31) != 0),
    "s_ashr_i32 s20, s10, s11": lambda a, b: (signed(a) >> (b & 31) & WORD, signed(a) >> (b & 31) != 0),
    "s_and_b32 s20, s10, s11": lambda a, b: (a & b, a & b != 0),
    "s_or_b32 s20, s10, s11": lambda a, b: (a | b, a | b != 0),
    "s_xor_b32 s20, s10, s11": lambda a, b: (a ^ b, a != b),
    "s_andn2_b32 s20, s10, s11": lambda a, b: (a & ~b & WORD, a & ~b & WORD != 0),
    "s_min_u32 s20, s10, s11": lambda a, b: (min(a, b), a <= b),
    "s_max_i32 s20, s10, s11": lambda a, b: (max(signed(a), signed(b)) & WORD, signed(a) >= signed(b)),
    "s_lshl2_add_u32 s20, s10, s11": lambda a, b: ((a * 4 + b) & WORD, a * 4 + b > WORD),
    "s_bfe_u32 s20, s10, s11": lambda a, b: scalar_field(a, b, False),
    "s_bfe_i32 s20, s10, s11": lambda a, b: scalar_field(a, b, True),
    "s_mov_b32 s20, s10\ns_addk_i32 s20, 0xfffe": lambda a, b: ((a - 2) & WORD, signed(a - 2) != signed(a) - 2),
    "s_mov_b32 s20, s10\ns_mulk_i32 s20, 0x101": lambda a, b: (a * 0x101 & WORD, None),
    "s_brev_b32 s20, s10": lambda a, b: (int(f"{a:032b}"[::-1], 2), None),
    "s_not_b32 s20, s10": lambda a, b: (~a & WORD, a != WORD),
}


def scalar_field(a: int, b: int, has_sign: bool) -> tuple[int, bool]:
    width = min(b >> 16 & 127, 32)
    bits = a >> (b & 31) & (1 << width) - 1
    if has_sign and width:
        bits = signed(bits, width) & WORD
    return bits, bits != 0


@pytest.mark.parametrize("text", SCALARS)
def test_scalars(text):
    """One wave for each pair; SCC is what it has to be, or what it was."""
    a, b = values(10), values(11)
    body = f"""s_lshl_b32 s12, s2, 2
        s_add_u32 s14, s4, s12
        s_addc_u32 s15, s5, 0
        s_add_u32 s16, s6, s12
        s_addc_u32 s17, s7, 0
        s_load_dword s10, s[14:15], 0x0
        s_load_dword s11, s[16:17], 0x0
        s_waitcnt lgkmcnt(0)
        s_cmp_eq_u32 s10, s10
        {text}
        s_cselect_b32 s21, 1, 0
        v_mov_b32_e32 v10, s20
        v_mov_b32_e32 v11, s21
        v_mov_b32_e32 v2, 0
        s_lshl_b32 s12, s2, 3
        s_add_u32 s14, s8, s12
        s_addc_u32 s15, s9, 0
        s_mov_b64 exec, 1
        global_store_dwordx2 v2, v[10:11], s[14:15]"""
    result = np.zeros((a.size, 2), np.uint32)
    run = Run(body, a, b, result, ctas=a.size)
    assert not run.findings
    expected = [SCALARS[text](int(x), int(y)) for x, y in zip(a, b, strict=True)]
    assert result.tolist() == [[value, 1 if scc is None else int(scc)] for value, scc in expected]


def test_scalar_carries_and_bits_of_pairs():
    body = """s_mov_b32 s10, -1
        s_mov_b32 s11, 7
        s_add_u32 s10, s10, 1
        s_addc_u32 s11, s11, 0
        s_sub_u32 s12, s10, 1
        s_subb_u32 s13, s11, 0
        s_lshl_b64 s[14:15], s[12:13], 4
        s_movk_i32 s16, 0xfffe
        s_bitset1_b32 s16, 0
        s_bitcmp1_b32 s16, 31
        s_cselect_b32 s17, 5, 6
        s_cmpk_eq_i32 s16, 0xffff
        s_cselect_b32 s18, 5, 6
        s_bcnt1_i32_b64 s19, s[12:13]
        s_ff1_i32_b64 s20, s[14:15]
        s_mov_b64 exec, 1
        v_mov_b32_e32 v2, 0
    """ + "\n".join(
        f"v_mov_b32_e32 v10, s{10 + k}\nglobal_store_dword v2, v10, s[4:5] offset:{4 * k}" for k in range(11)
    )
    result = np.zeros(11, np.uint32)
    assert not Run(body, result).findings
    long = ((8 << 32) - 1) << 4
    assert result.tolist() == [0, 8, WORD, 7, long & WORD, long >> 32, WORD, 5, 5, 35, 4]


def test_a_literal_fills_a_pair():
    body = "s_mov_b64 s[10:11], 0x7f800000\nv_mov_b32_e32 v10, s10\nv_mov_b32_e32 v11, s11\nv_mov_b32_e32 v2, 0"
    result = np.ones(2, np.uint32)
    assert not Run(f"{body}\ns_mov_b64 exec, 1\nglobal_store_dwordx2 v2, v[10:11], s[4:5]", result).findings
    assert result.tolist() == [0x7F800000, 0]
    with pytest.raises(Refused, match="as a constant of 64 bits"):
        kinds("s_mov_b64 s[10:11], 0x80000000")


def test_a_condition_that_nothing_has_set_is_found():
    assert kinds("s_cselect_b32 s10, 1, 0") == {"read of an unwritten register"}
