"""Counting operations and bytes of compiled programs: on small texts, and on compiled products."""

import jax
import jax.numpy as jnp
import pytest

from jgpt.bench import hlo, work

# A product as XLA:TPU writes it, with two batch dimensions as dimensions of a window; one by 8
# heads that slides over none; and a loop that counts to 8 by 2.
PRODUCTS = """HloModule products

%cond (c: (u32[], f32[8,12,256,64])) -> pred[] {
  %c = (u32[], f32[8,12,256,64]) parameter(0)
  %i = u32[] get-tuple-element(%c), index=0
  %end = u32[] constant(8)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}

%body (t: (u32[], f32[8,12,256,64])) -> (u32[], f32[8,12,256,64]) {
  %t = (u32[], f32[8,12,256,64]) parameter(0)
  %j = u32[] get-tuple-element(%t), index=0
  %x = f32[8,12,256,64]{3,2,1,0} get-tuple-element(%t), index=1
  %y = bf16[8,12,512,64]{3,2,1,0} broadcast(%j), dimensions={}
  %scores = f32[8,12,256,512] convolution(%x, %y), WINDOW, dim_labels=01bf_01oi->01bf
  %two = u32[] constant(2)
  %next = u32[] add(%j, %two)
  ROOT %r = (u32[], f32[8,12,256,64]) tuple(%next, %x)
}

ENTRY %main (p: (u32[], f32[8,12,256,64])) -> (u32[], f32[8,12,256,64]) {
  %p = (u32[], f32[8,12,256,64]) parameter(0)
  %a = bf16[10,30]{1,0} constant({...})
  %b = bf16[30,20]{1,0} constant({...})
  %plain = f32[10,20]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %as = f32[10,20]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
  %lib = (f32[10,20], s8[64]) custom-call(%a, %b), custom_call_target="__cublas$gemm", CONFIG
  ROOT %while = (u32[], f32[8,12,256,64]) while(%p), condition=%cond, body=%body
}
"""

PRODUCTS = PRODUCTS.replace("WINDOW", "window={size=8x12 stride=7x11 lhs_dilate=8x12}").replace(
  "CONFIG", 'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}'
)

# What reads slices of a stack of 12 layers in the large memory, what updates it in place, what does
# both in fusions of its own, what stays in the fast memory, and what is copied to it while others
# compute.
TRAFFIC = """HloModule traffic

%read (p0: f32[12,100], p1: s32[]) -> f32[1,100] {
  %p0 = f32[12,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
  ROOT %twice = f32[1,100]{1,0} add(%slice, %slice)
}

%write (q0: f32[12,100], q1: f32[1,100], q2: s32[]) -> f32[12,100] {
  %q0 = f32[12,100]{1,0} parameter(0)
  %q1 = f32[1,100]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %none = s32[] constant(0)
  ROOT %update = f32[12,100]{1,0} dynamic-update-slice(%q0, %q1, %q2, %none)
}

%within (s0: s32[], s1: f32[12,100]) -> f32[1,100] {
  %s0 = s32[] parameter(0)
  %s1 = f32[12,100]{1,0} parameter(1)
  %nought = s32[] constant(0)
  %piece = f32[1,100]{1,0} dynamic-slice(%s1, %s0, %nought), dynamic_slice_sizes={1,100}
  ROOT %cast = f32[1,100]{1,0} bitcast(%piece)
}

%nest (u0: f32[12,100], u1: f32[1,100], u2: s32[]) -> f32[12,100] {
  %u0 = f32[12,100]{1,0} parameter(0)
  %u1 = f32[1,100]{1,0} parameter(1)
  %u2 = s32[] parameter(2)
  %inner = f32[1,100]{1,0} fusion(%u2, %u0), kind=kLoop, calls=%within
  %product = f32[1,100]{1,0} multiply(%inner, %u1)
  ROOT %outer = f32[12,100]{1,0} fusion(%u0, %product, %u2), kind=kLoop, calls=%write
}

%beside (r0: f32[50], r1: f32[10], r2: f32[80]) -> (f32[50], f32[10], f32[80]) {
  %r0 = f32[50]{0} parameter(0)
  %r1 = f32[10]{0} parameter(1)
  %r2 = f32[80]{0} parameter(2)
  %gathered = f32[80]{0} all-gather(%r1), channel_id=5, dimensions={0}
  %negated = f32[50]{0} negate(%r0)
  ROOT %out = (f32[50]{0}, f32[10]{0}, f32[80]{0}) tuple(%negated, %r1, %gathered)
}

ENTRY %main (stack: f32[12,100], i: s32[], part: f32[10], whole: f32[80]) -> f32[12,100] {
  %stack = f32[12,100]{1,0} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %part = f32[10]{0} parameter(2)
  %whole = f32[80]{0} parameter(3)
  %layer = f32[1,100]{1,0} fusion(%stack, %i), kind=kLoop, calls=%read
  %fast = f32[1,100]{1,0:T(8,128)S(1)} copy(%layer)
  %more = f32[1,100]{1,0:T(8,128)S(1)} negate(%fast)
  %new = f32[12,100]{1,0} fusion(%stack, %more, %i), kind=kLoop, calls=%write
  %start = (f32[80]{0:S(1)}, f32[80]{0}, u32[]{:S(2)}) copy-start(%whole)
  %done = f32[80]{0:S(1)} copy-done(%start)
  %fifty = f32[50]{0} slice(%whole), slice={[0:50]}
  %one = (f32[50], f32[10], f32[80]) fusion(%fifty, %part, %whole), kind=kCustom, calls=%beside
  %two = (f32[50], f32[10], f32[80]) fusion(%fifty, %part, %whole), kind=kCustom, calls=%beside
  %nested = f32[12,100]{1,0} fusion(%new, %more, %i), kind=kOutput, calls=%nest
  ROOT %result = f32[12,100]{1,0} bitcast(%nested)
}
"""


def test_products_are_counted_in_each_of_their_forms():
  """A batch dimension of a window is no factor: only one of its places meets an entry."""
  one = 2 * 10 * 20 * 30
  scores = 2 * 8 * 12 * 256 * 512 * 64
  assert work.count_flops(hlo.parse_module(PRODUCTS)) == 3 * one + 4 * scores


@pytest.mark.parametrize("spec", ["BTD,DF->BTF", "BTNH,BSNH->BNTS", "BTCNH,DCNH->BTD"])
def test_the_products_of_einsums_are_counted_as_compiled_here(spec):
  """2 operations for each combination of letters, whatever the compiler makes of it."""
  sizes = dict(zip("BTSDFCNH", (2, 32, 48, 24, 40, 3, 4, 16), strict=True))
  left, right = spec.partition("->")[0].split(",")
  shapes = [jnp.zeros([sizes[c] for c in letters]) for letters in (left, right)]
  compiled = jax.jit(lambda a, b: jnp.einsum(spec, a, b)).lower(*shapes).compile()
  expected = 2
  for letter in {*left, *right}:
    expected *= sizes[letter]
  assert work.count_flops(hlo.parse_module(compiled.as_text())) == expected


def test_bytes_are_those_of_the_large_memory():
  counted = work.count_traffic(hlo.parse_module(TRAFFIC))
  read_layer = 400 + 400  # a slice of the stack, and the result
  to_fast = 400
  update = 400  # in place, from the fast memory
  started = 320
  sliced = 2 * 200
  beside = 2 * (200 + 200) + 320  # what is gathered beside both counts once
  nested = 400 + 400  # a fusion in it reads a slice, another one updates in place
  assert counted == read_layer + to_fast + update + started + sliced + beside + nested
