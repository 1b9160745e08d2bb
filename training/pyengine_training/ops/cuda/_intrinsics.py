"""The few instructions that Python has no word for. Everything else in this package is plain Numba.

load, store       one element of a flat array; bfloat16 (as uint16) is widened and rounded half to even
float_of_bits, bits_of_float   reinterpretation as int32
add_rn, sub_rn, mul_rn, div_rn   IEEE, never approximated or fused
round_half        float32 -> half precision -> float32            rint             half to even
pack_bf16         two float32 -> a pair of bfloat16 in uint32     load_pair        two neighbours of a bfloat16 array
mma_bf16          one tensor core instruction
load8, store8     eight neighbours at once, to and from a local array of float32, in accesses of 16 bytes

Each has a Python twin in the tests' simulator, which is how kernels that use them run without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda.extending import intrinsic

I16, I32, F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
LLVM = {types.float32: F32, types.int32: I32, types.uint32: I32, types.uint16: I16, types.int16: I16}


def _instruction(function: Callable[..., Any]) -> Any:
    """Make an instruction of a function that types it and returns its code generator."""
    return intrinsic(function)


def _asm(name: str, text: str, constraints: str, result: Any, *arguments: Any) -> Any:
    """An intrinsic ``name`` that is one PTX instruction without side effects."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        function = ir.FunctionType(LLVM[result], [LLVM[a] for a in arguments])
        return builder.call(ir.InlineAsm(function, text, constraints), values)

    signature = result(*arguments)
    # numba reads an intrinsic's parameter names, so there must be exactly as many as arguments
    if len(arguments) == 1:

        def typing1(_typing_context: Any, _a: Any) -> Any:
            return signature, codegen

        typing: Any = typing1
    else:

        def typing2(_typing_context: Any, _a: Any, _b: Any) -> Any:
            return signature, codegen

        typing = typing2
    typing.__name__ = name
    return _instruction(typing)


bits_of_float = _asm("bits_of_float", "mov.b32 $0, $1;", "=r,f", types.int32, types.float32)
float_of_bits = _asm("float_of_bits", "mov.b32 $0, $1;", "=f,r", types.float32, types.int32)
rint = _asm("rint", "cvt.rni.f32.f32 $0, $1;", "=f,f", types.float32, types.float32)
add_rn = _asm("add_rn", "add.rn.f32 $0, $1, $2;", "=f,f,f", *([types.float32] * 3))
sub_rn = _asm("sub_rn", "sub.rn.f32 $0, $1, $2;", "=f,f,f", *([types.float32] * 3))
div_rn = _asm("div_rn", "div.rn.f32 $0, $1, $2;", "=f,f,f", *([types.float32] * 3))
mul_rn = _asm("mul_rn", "mul.rn.f32 $0, $1, $2;", "=f,f,f", *([types.float32] * 3))
round_half = _asm(
    "round_half",
    "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; cvt.f32.f16 $0, h; }",
    "=f,f",
    types.float32,
    types.float32,
)
# the first source of the instruction goes to the upper half
pack_bf16 = _asm("pack_bf16", "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", types.uint32, types.float32, types.float32)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any = None) -> Any:
    """Pointer to an element of an array, the first by default: no wraparound of negative indices, no bounds check."""
    data = context.make_array(array_type)(context, builder, value=array).data
    return data if index is None else builder.gep(data, [index])


@_instruction
def load(_typing_context: Any, array: Any, _index: Any) -> Any:
    """array[index] of a flat array; uint16 elements are bfloat16 and come out as float32."""
    is_bf16 = array.dtype == types.uint16
    result = types.float32 if is_bf16 else array.dtype

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        value = builder.load(_pointer(context, builder, signature.args[0], *values[:2]))
        if is_bf16:
            wide = builder.shl(builder.zext(value, I32), ir.Constant(I32, 16))
            return builder.bitcast(wide, F32)
        return value

    return result(array, types.int64), codegen


@_instruction
def store(_typing_context: Any, array: Any, _index: Any, _value: Any) -> Any:
    """array[index] = value; a float32 going into a uint16 array is rounded to bfloat16."""
    is_bf16 = array.dtype == types.uint16
    element = types.float32 if is_bf16 else array.dtype

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        value = values[2]
        if is_bf16:
            function = ir.FunctionType(I16, [F32])
            text = "cvt.rn.bf16.f32 $0, $1;"
            value = builder.call(ir.InlineAsm(function, text, "=h,f"), [value])
        builder.store(value, _pointer(context, builder, signature.args[0], *values[:2]))
        return context.get_dummy_value()

    return types.void(array, types.int64, element), codegen


@_instruction
def load_pair(_typing_context: Any, array: Any, _index: Any) -> Any:
    """array[index] (low half) and array[index + 1] of a flat uint16 array as one uint32; index is even."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *values[:2])
        return builder.load(builder.bitcast(pointer, I32.as_pointer()), align=4)

    return types.uint32(array, types.int64), codegen


@_instruction
def load8(_typing_context: Any, values: Any, array: Any, _index: Any) -> Any:
    """values[0:8] = array[index:index + 8], widened; the address of array[index] is a multiple of 16 bytes."""
    is_bf16 = array.dtype == types.uint16
    word = I32 if is_bf16 else F32

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out = _pointer(context, builder, signature.args[0], arguments[0])
        source = _pointer(context, builder, signature.args[1], *arguments[1:])
        source = builder.bitcast(source, ir.VectorType(word, 4).as_pointer())
        floats = []
        for part in range(1 if is_bf16 else 2):
            vector = builder.load(builder.gep(source, [I32(part)]), align=16)
            for i in range(4):
                value = builder.extract_element(vector, I32(i))
                if is_bf16:  # the lower half of a word is the element before
                    low = builder.bitcast(builder.shl(value, I32(16)), F32)
                    floats += [low, builder.bitcast(builder.and_(value, I32(0xFFFF0000)), F32)]
                else:
                    floats.append(value)
        for i, value in enumerate(floats):
            builder.store(value, builder.gep(out, [I32(i)]))
        return context.get_dummy_value()

    return types.void(values, array, types.int64), codegen


@_instruction
def store8(_typing_context: Any, array: Any, _index: Any, values: Any) -> Any:
    """array[index:index + 8] = values[0:8], rounded; the address of array[index] is a multiple of 16 bytes."""
    is_bf16 = array.dtype == types.uint16
    word = I32 if is_bf16 else F32

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target = _pointer(context, builder, signature.args[0], *arguments[:2])
        target = builder.bitcast(target, ir.VectorType(word, 4).as_pointer())
        source = _pointer(context, builder, signature.args[2], arguments[2])
        floats = [builder.load(builder.gep(source, [I32(i)])) for i in range(8)]
        if is_bf16:
            function = ir.FunctionType(I32, [F32, F32])
            pack = ir.InlineAsm(function, "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f")
            elements = [builder.call(pack, floats[i : i + 2]) for i in range(0, 8, 2)]
        else:
            elements = floats
        for part in range(len(elements) // 4):
            vector = ir.Constant(ir.VectorType(word, 4), ir.Undefined)
            for i in range(4):
                vector = builder.insert_element(vector, elements[4 * part + i], I32(i))
            builder.store(vector, builder.gep(target, [I32(part)]), align=16)
        return context.get_dummy_value()

    return types.void(array, types.int64, values), codegen


@_instruction
def mma_bf16(
    _typing_context: Any,
    _a0: Any, _a1: Any, _a2: Any, _a3: Any,
    _b0: Any, _b1: Any,
    _c0: Any, _c1: Any, _c2: Any, _c3: Any,
) -> Any:  # fmt: skip
    """D = A B + C for a warp: A (16, 16), B (16, 8) bfloat16 in pairs of uint32, C and D (16, 8) float32.

    Lane = 4 g + t holds A[g, 2t:2t+2], A[g+8, 2t:2t+2], A[g, 2t+8:2t+10], A[g+8, 2t+8:2t+10]; B[2t:2t+2, g],
    B[2t+8:2t+10, g]; C[g, 2t], C[g, 2t+1], C[g+8, 2t], C[g+8, 2t+1].
    """
    u, f = types.uint32, types.float32
    text = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3},{$4,$5,$6,$7},{$8,$9},{$10,$11,$12,$13};"

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function = ir.FunctionType(ir.LiteralStructType([F32] * 4), [I32] * 6 + [F32] * 4)
        constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
        asm = ir.InlineAsm(function, text, constraints, side_effect=True)
        out = builder.call(asm, values)
        parts = [builder.extract_value(out, i) for i in range(4)]
        return context.make_tuple(builder, signature.return_type, parts)

    four: Any = types.UniTuple
    return four(f, 4)(u, u, u, u, u, u, f, f, f, f), codegen
