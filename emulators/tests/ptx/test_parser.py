"""PTX text into instructions and basic blocks, and what is refused before anything runs."""

from __future__ import annotations

import numpy as np
import pytest
from hand_written.ptx import Run, kernel

from gpu_emulators.ptx import Program, Refused
from gpu_emulators.ptx.parser import Address, Immediate, Label, Pair, Parameter, Register, Sink, Special, Vector, parse


def parsed(body, **options):
    return parse(kernel(body, **options))


def last(body):
    """The last instruction but one, before ret."""
    found = parsed(f"{body}\nret;")
    return found, list(found.instructions())[-2]


def test_operands():
    found, ins = last("@!%p1 st.shared.v2.b32 [ %r5 + 16 ], {%r1, _};")
    assert ins.opcode == ["st", "shared", "v2", "b32"]
    assert (found.names[ins.guard], ins.negated) == ("%p1", True)
    address, vector = ins.operands
    assert found.names[address.base.index] == "%r5" and address.offset == 16
    assert isinstance(vector, Vector) and vector.operands[1] == Sink()
    _, ins = last("mov.u32 %r1, %ctaid.y;")
    assert ins.operands[1] == Special("%ctaid.y")
    for text, value in (("-7", Immediate(-7)), ("0x1F", Immediate(31)), ("0f3F800000", Immediate(0x3F800000, 32))):
        assert last(f"mov.b32 %r1, {text};")[1].operands[1] == value
    _, ins = last("ld.shared.b32 %r1, [global_smem-4];")
    assert ins.operands[1] == Address(Immediate(0), -4)
    _, ins = last("elect.sync %r1|%p1, -1;")
    assert isinstance(ins.operands[0], Pair) and isinstance(ins.operands[0].first, Register)


def test_lines_and_sources():
    text = kernel(".loc 1 7 3 // by_hand.py:7:3\nadd.s32 %r1,\n  %r70,\n  1;\n.loc 1 9 1, function_name $L__info\nret;")
    instructions = list(parse(text).instructions())
    add, end = instructions[-2:]
    lines = text.splitlines()
    assert lines[add.line - 1].startswith("add.s32") or "add.s32" in lines[add.line - 1]
    assert lines[end.line - 1].strip() == "ret;"
    assert (add.where, end.where) == ("by_hand.py:7", "by_hand.py:9")
    assert add.text == "add.s32 %r1, %r70, 1"


def test_parameters_threads_and_shared_memory():
    text = kernel("ret;", arrays=2, threads=96).replace(
        ".param .u64 .ptr .global .align 1 kernel_param_1", ".param .f32 kernel_param_1"
    )
    text = text.replace(".extern", ".shared .align 8 .b8 own[20];\n.extern").replace(
        "ld.param.b64 %rd1", "ld.param.b32 %r1"
    )
    found = parse(text.replace("ret;", "mov.b32 %r2, own;\n mov.b32 %r3, global_smem;\n ret;"))
    assert found.params == [Parameter("kernel_param_0", "u64"), Parameter("kernel_param_1", "f32")]
    assert (found.threads, found.target) == (96, "sm_100a")
    # what is sized at launch comes behind what the kernel declares
    own, dynamic = (ins.operands[1].value for ins in list(found.instructions())[-3:-1])
    assert (own, dynamic, found.shared) == (0, 32, 32)


def test_blocks_end_at_branches_barriers_and_labels_that_are_gone_to():
    found = parsed(
        """
        setp.eq.s32 %p1, %r70, 0;
    $L__tmp0:
        add.s32 %r1, %r70, 1;
        @%p1 bra $L__BB0_2;
        bar.sync 0;
    $L__BB0_1:
        add.s32 %r2, %r70, 1;
        bra.uni $L__BB0_2;
    $L__BB0_2:
        ret;
        """
    )
    ends = [block[-1].text.split()[0] for block in found.blocks]
    assert ends == ["@%p1", "bar.sync", "bra.uni", "ret"]
    assert found.blocks[0][-1].operands == found.blocks[2][-1].operands == [Label(3)]


def test_registers_and_labels_in_braces_are_of_their_own():
    scope = "{\n.reg .pred done;\nsetp.eq.s32 done, %r70, %r70;\nwait:\n@!done bra.uni wait;\n}\n"
    found = parsed(f"{scope}{scope}ret;")
    guards = {found.names[ins.guard]: ins.guard for ins in found.instructions() if ins.guard is not None}
    assert [name for name in found.names if name == "done"] == ["done"] * 2
    targets = [ins.operands[0].block for ins in found.instructions() if ins.opcode[0] == "bra"]
    assert len(set(targets)) == 2 and guards
    Program(kernel(f"{scope}{scope}ret;"))


SKIPPED = """
    mov.b32 %r1, 7;
    {{
        setp.eq.s32 %p1, %r70, %r70;
        {branch}
        mov.b32 %r1, 1;
    {label}
    }}
    mad.wide.u32 %rd9, %r72, 4, %rd0;
    st.global.b32 [%rd9], %r1;
    ret;
skip:
    st.global.b32 [%rd0], 99;
    ret;
"""


@pytest.mark.parametrize(
    ("branch", "label", "stored"),
    [
        # the inner label comes later, in the scope itself or around another one
        ("@%p1 bra skip;", "skip:", 7),
        ("{ @%p1 bra skip; }", "skip:", 7),
        ("{ @%p1 bra skip; skip: }", "", 1),
        # scopes that stand before it have their own
        ("{ skip: } { } @%p1 bra skip;", "skip:", 7),
        # there is none but the kernel's
        ("@%p1 bra skip;", "", 99),
    ],
)
def test_a_branch_goes_to_the_label_of_the_innermost_scope_around_it(branch, label, stored):
    result = np.zeros(32, np.uint32)
    Run(SKIPPED.format(branch=branch, label=label), result)
    assert result[0] == stored


def test_a_label_of_another_scope_is_none():
    with pytest.raises(Refused, match="nothing is named inside"):
        Program(kernel("{ inside: } bra inside; ret;"))
    with pytest.raises(Refused, match="second label"):
        Program(kernel("twice: twice: ret;"))


@pytest.mark.parametrize("name", ["%r80", "%r999", "%r07", "%rs40"])
def test_registers_beyond_those_that_are_declared_are_refused(name):
    with pytest.raises(Refused, match=name):
        Program(kernel(f"mov.b32 {name}, 1; ret;"))
    with pytest.raises(Refused, match=name):
        Program(kernel(f"mov.b32 %r1, {name}; ret;"))


def test_a_register_in_braces_hides_that_of_the_kernel():
    found = parsed("mov.b32 %r5, 1; { .reg .b32 %r5; mov.b32 %r5, 2; } mov.b32 %r5, 3; ret;")
    first, second, third = (ins.operands[0].index for ins in list(found.instructions())[-4:-1])
    assert first == third != second


@pytest.mark.parametrize(
    ("text", "value"), [("017", 15), ("-010", -8), ("0b11", 3), ("0U", 0), ("12U", 12), ("0x1FU", 31)]
)
def test_integers_of_all_bases(text, value):
    assert last(f"mov.b32 %r1, {text};")[1].operands[1] == Immediate(value)
    if "U" not in text:
        assert last(f"ld.shared.b32 %r1, [%r2+{text}];")[1].operands[1].offset == value


@pytest.mark.parametrize("text", ["08", "0b12", "0xg"])
def test_what_is_no_integer_is_refused(text):
    with pytest.raises(Refused, match=text):
        Program(kernel(f"mov.b32 %r1, {text}; ret;"))
    with pytest.raises(Refused):
        Program(kernel(f"ld.shared.b32 %r1, [%r2+{text}]; ret;"))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (".reqntid 32", ".reqntid 32, 2", "one dimension"),
        (".reqntid 32", ".reqntid 33", "multiple of 32"),
        (".reqntid 32", ".reqntid 32\n.reqnctapercluster 2", "reqnctapercluster"),
        (".reqntid 32", "", "reqntid"),
        (".extern", ".global .align 4 .b8 table[16];\n.extern", "table"),
        (".extern", ".extern .func (.param .b32 r) vprintf ();\n.extern", "func"),
        ("ret;", "call.uni foo, (%r1);\nret;", "call.uni"),
        ("ret;", ".maxntid 3;\nret;", "maxntid"),
        ("ret;", ".local .align 4 .b32 stack[4];\nret;", "stack"),
        ("ret;", "bra $L__nowhere;\nret;", "nowhere"),
        ("ret;", "mov.u32 %r1, __local_depot0;\nret;", "__local_depot0"),
        ("}", "", "brace"),
        (".u64 .ptr", ".b64 .const", "parameter"),
    ],
)
def test_what_is_not_known_outside_of_instructions_is_refused(old, new, told):
    text = kernel("ret;")
    assert old in text
    with pytest.raises(Refused, match=told):
        Program(text.replace(old, new, 1))


def test_two_kernels_are_refused():
    with pytest.raises(Refused, match="one kernel"):
        Program(kernel("ret;") * 2)


@pytest.mark.parametrize(
    "text",
    [
        "frobnicate.b32 %r1, %r70;",
        "sin.approx.f32 %r1, %r70;",
        "tanh.approx.f32 %r1, %r70;",
        "add.ftz.f32 %r1, %r70, %r70;",
        "add.rn.ftz.f32 %r1, %r70, %r70;",
        "add.rz.f32 %r1, %r70, %r70;",
        "add.sat.s32 %r1, %r70, %r70;",
        "add.s32.s32 %r1, %r70, %r70;",
        "add.s32 %r1, %r70;",
        "add.s32 %r1, %r70, %r70, %r70;",
        "add.s32 %rd1, %r70, %r70;",
        "add.s32 %r1, %p1, %r70;",
        "add.s32 1, %r70, %r70;",
        "add.rn.f32 %r1, %r70, 1;",
        "add.rn.f32 %r1, %r70, 0d3FF0000000000000;",
        "add.s64 %rd1, %r70, %rd0;",
        "mul.s32 %r1, %r70, %r70;",
        "mul.hi.s64 %rd1, %rd0, %rd0;",
        "mul.wide.s64 %rd1, %rd0, %rd0;",
        "mad.lo.s32 %r1, %r70, %r70;",
        "mad.lo.cc.s32 %r1, %r70, %r70, %r70;",
        "fma.f32 %r1, %r70, %r70, %r70;",
        "fma.rz.f32 %r1, %r70, %r70, %r70;",
        "fma.rp.f16 %rs1, %rs1, %rs1, %rs1;",
        "fma.rn.relu.f16 %rs1, %rs1, %rs1, %rs1;",
        "div.approx.f32 %r1, %r70, %r70;",
        "div.approx.f32 %r1, %r70, %r70;",
        "sqrt.rz.f32 %r1, %r70;",
        "rcp.rn.f32 %r1, %r70;",
        "rcp.approx.f32 %r1, %r70;",
        "min.xorsign.abs.f32 %r1, %r70, %r70;",
        "setp.lt.b32 %p1, %r70, %r70;",
        "setp.lo.s32 %p1, %r70, %r70;",
        "setp.equ.s32 %p1, %r70, %r70;",
        "setp.lt.ftz.f32 %p1, %r70, %r70;",
        "setp.lt.and.s32 %p1, %r70, %r70;",
        "setp.lt.s32 %p1, %r70, %r70, %p2;",
        "setp.lt.s32 %r1, %r70, %r70;",
        "selp.b32 %r1, %r70, %r70;",
        "selp.b32 %r1, %r70, %r70, %r70;",
        "shl.s32 %r1, %r70, 1;",
        "shf.l.b32 %r1, %r70, %r70, 1;",
        "prmt.b32.f4e %r1, %r70, %r70, 1;",
        "lop3.b32 %r1, %r70, %r70, %r70, %r70;",
        "cvt.u32 %r1, %r70;",
        "cvt.f32.s32 %r1, %r70;",
        "cvt.s32.f32 %r1, %r70;",
        "cvt.rn.s32.s16 %r1, %rs1;",
        "cvt.rz.bf16.f32 %rs1, %r70;",
        "cvt.rn.satfinite.bf16.f32 %rs1, %r70;",
        "cvt.rn.relu.bf16x2.f32 %r1, %r70, %r70;",
        "cvt.rn.bf16x2.f32 %r1, %r70;",
        "cvt.u64.u32 %r1, %r70;",
        "mov.b32 {%r1, %r2}, %r70;",
        "mov.b128 %rd1, %rd0;",
        "mov.u32 %r1, %clock;",
        "ld.const.b32 %r1, [%rd0];",
        "ld.b32 %r1, [%r70];",
        "cvta.shared.u64 %rd1, %rd0;",
        "cvta.to.local.u64 %rd1, %rd0;",
        "cvta.local.u32 %r1, %r70;",
        "ld.acquire.gpu.global.b32 %r1, [%rd0];",
        "ld.volatile.global.b32 %r1, [%rd0];",
        "ld.global.nc.b32 %r1, [%rd0];",
        "ld.global.cv.b32 %r1, [%rd0];",
        "ld.global.v2.ca.b32 {%r1, %r2}, [%rd0];",
        "ld.global.v2.b32 %r1, [%rd0];",
        "ld.global.v4.b32 {%r1, %r2}, [%rd0];",
        "ld.global.b64 %r1, [%rd0];",
        "ld.global.b32 %r1, %rd0;",
        "ld.global.b32 %r1, [%r70];",
        "ld.param.b64 %rd1, [kernel_param_0+4];",
        "ld.param.b64 %rd1, [%rd0];",
        "st.global.b64 [%rd0], %r70;",
        "st.release.gpu.global.b32 [%rd0], %r70;",
        "atom.global.add.u32 %r1, [%rd0], 1;",
        "red.global.add.u32 [%rd0], 1;",
        "membar.gl;",
        "cp.async.ca.shared.global.L2::128B [%r70], [%rd0], 16;",
        "cp.async.cg.shared.global [%r70], [%rd0], 8;",
        "cp.async.ca.shared.global [%r70], [%rd0], 3;",
        "cp.async.wait_group %r70;",
        "cp.async.bulk.commit_group;",
        "bar.sync %r70;",
        "bar.sync 16;",
        "bar.sync 0, 16;",
        "bar.sync;",
        "bar.arrive 0, 32;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "@%p1 bar.sync 0;",
        "barrier.cluster.arrive;",
        "bar.warp.sync 1;",
        "shfl.bfly.b32 %r1, %r70, 1, 31;",
        "shfl.sync.bfly.b32 %r1, %r70, 1, 31, 255;",
        "shfl.sync.rot.b32 %r1, %r70, 1, 31, -1;",
        "redux.sync.add.f32 %r1, %r70, -1;",
        "redux.sync.and.s32 %r1, %r70, -1;",
        "vote.sync.all.b32 %r1, %p1, -1;",
        "vote.sync.ballot.b32 %r1, %p1, 1;",
        "elect.sync %r1, -1;",
        "bra.uni 5;",
        "ret.uni;",
    ],
)
def test_instructions_that_are_not_known_are_refused_by_name(text):
    with pytest.raises(Refused) as refused:
        Program(kernel(f"{text}\nret;"))
    assert " ".join(text.removesuffix(";").split()) in str(refused.value)
