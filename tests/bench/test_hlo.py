"""Reading the text of compiled programs: on small texts, and on programs compiled for 8 CPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jgpt.bench import hlo

# As XLA:TPU writes it, shortened: a loop of unknown length around one of 12 steps; of these one
# all-reduce stands in each, one in a fusion, and one is split into a start and an end.
TEXT = """HloModule jit_run_steps, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%fused.1 (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.9 = f32[4,8]{1,0:T(8,128)} all-reduce(%p), channel_id=3, to_apply=%add.1
}

%inner_cond (c: (s32[], bf16[16,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(12)
  %c = (s32[]{:T(128)}, bf16[16,8]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%inner (t: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %t = (s32[]{:T(128)}, bf16[16,8]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %x = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%t), index=1
  %all-reduce.2 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-reduce(%x), to_apply=%add.1
  %kernel = bf16[16,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", x={y={
"z":"{\\"w\\": 1}"
}}, metadata={op_name="c"}
  %own = bf16[16,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %f.2 = s32[] fusion(%x), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"1000"}
  ROOT %tuple.2 = (s32[], bf16[16,8]) tuple(%f.2, %all-reduce.2)
}

%outer_cond (c: (s32[], s32[])) -> pred[] {
  %c2 = (s32[], s32[]) parameter(0)
  %i2 = s32[] get-tuple-element(%c2), index=0
  %n = s32[] get-tuple-element(%c2), index=1
  ROOT %lt2 = pred[] compare(%i2, %n), direction=LT
}

%outer (t: (s32[], s32[])) -> (s32[], s32[]) {
  %t3 = (s32[], /*index=1*/s32[]) parameter(0)
  %w = (s32[], bf16[16,8]) while(%t3), condition=%inner_cond, body=%inner, metadata={op_name="a/b"}
  %g = f32[4,8]{1,0:T(8,128)} fusion(%t3), kind=kCustom, calls=%fused.1
  %all-reduce-start.3 = f32[2,4]{1,0} all-reduce-start(%h), to_apply=%add.1
  %all-reduce-done.3 = f32[2,4]{1,0} all-reduce-done(%all-reduce-start.3)
  %odd = f32[] fusion(%g), calls=%none, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %tuple.3 = (s32[], s32[]) tuple(%t3, %t3)
}

ENTRY %main (p0: s32[], p1: f32[2,4]) -> (s32[], s32[]) {
  %p0 = s32[] parameter(0)
  %q = f32[24,16,768]{2,1,0} copy(%p0), backend_config={"estimated_cycles":"7"}
  %ids = s32[24,17]{1,0} copy(%p0)
  %weights = f32[24,16]{1,0} copy(%p0)
  %flat = bf16[384,768]{1,0} copy(%p0)
  %all-gather-start = (f32[1,4], f32[8,4]) all-gather-start(%r), dimensions={0}
  %r = f32[1,4] copy(%p0)
  ROOT %while.1 = (s32[], s32[]) while(%p0), condition=%outer_cond, body=%outer
}
"""


def test_a_programs_collectives_are_counted_with_the_loops_around_them():
  found = hlo.find_collectives(hlo.parse_module(TEXT))
  got = [(c.kind, c.num_bytes, [loop.trips for loop in c.loops], c.trips) for c in found]
  assert got == [
    ("all-gather", 128, [], 1),
    ("all-reduce", 2 * 128, [None, 12], 12),
    ("all-reduce", 4 * 32, [None], 1),
    ("all-reduce", 4 * 8, [None], 1),
  ]
  assert [loop.op for loop in found[1].loops] == ["", "a/b"]


# A loop over what is gathered in a ring: it counts to 4 by 2, and sends a part on each way. And a
# gather that XLA:TPU does beside others: it starts before the loop and goes on in it.
RING = """HloModule ring

%begin (b0: bf16[8,4]) -> (bf16[8,4], bf16[64,4]) {
  %b0 = bf16[8,4] parameter(0)
  %g0 = bf16[64,4] all-gather(%b0), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %t0 = (bf16[8,4], bf16[64,4]) custom-call(%b0, %g0), custom_call_target="Start"
}

%beside (c0: bf16[8,4], c1: bf16[64,4]) -> (f32[], bf16[64,4]) {
  %c0 = bf16[8,4] parameter(0)
  %c1 = bf16[64,4] parameter(1)
  %g1 = bf16[64,4] all-gather(%c0), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %t1 = (f32[], bf16[64,4]) tuple(%c0, %g1)
}

%all-reduce-scatter (d0: f32[16,8]) -> f32[16,1] {
  %d0 = f32[16,8] parameter(0)
  %r0 = f32[16,8] all-reduce(%d0), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %part = f32[16,1] dynamic-slice(%r0, %zero, %zero), dynamic_slice_sizes={16,1}
}

%cond (c: (u32[], f32[4,2])) -> pred[] {
  %c = (u32[], f32[4,2]) parameter(0)
  %i = u32[] get-tuple-element(%c), index=0
  %end = u32[] constant(4)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}

%body (t: (u32[], f32[4,2])) -> (u32[], f32[4,2]) {
  %t = (u32[], f32[4,2]) parameter(0)
  %j = u32[] get-tuple-element(%t), index=0
  %x = f32[4,2] get-tuple-element(%t), index=1
  %s.1 = (f32[4,2], f32[4,2], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %d.1 = f32[4,2] collective-permute-done(%s.1)
  %s.2 = (f32[4,2], f32[4,2], u32[]) collective-permute-start(%x), source_target_pairs={{1,2},{2,1}}
  %d.2 = f32[4,2] collective-permute-done(%s.2)
  %went = (f32[], bf16[64,4]) fusion(%x, %x), kind=kCustom, calls=%beside
  %two = u32[] constant(2)
  %next = u32[] add(%j, %two)
  ROOT %r = (u32[], f32[4,2]) tuple(%next, %d.1)
}

ENTRY %main (p: (u32[], f32[4,2])) -> f32[16,1] {
  %p = (u32[], f32[4,2]) parameter(0)
  %q = f32[16,8] parameter(1)
  %begun = (bf16[8,4], bf16[64,4]) fusion(%q), kind=kCustom, calls=%begin
  %pair = (f32[6], f32[2,2]) all-reduce(%q, %q), channel_id=4, replica_groups={}, to_apply=%add
  %while = (u32[], f32[4,2]) while(%p), condition=%cond, body=%body
  ROOT %kept = f32[16,1] fusion(%q), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_collective_in_pieces_counts_once_and_a_loop_may_count_by_two():
  found = hlo.find_collectives(hlo.parse_module(RING))
  got = [(c.kind, c.num_bytes, c.trips, c.groups) for c in found]
  everyone = (tuple(range(8)),)
  assert got == [
    ("all-gather", 512, 1, everyone),
    ("all-reduce", 2 * 512, 1, ()),
    ("collective-permute", 32, 2, ((0, 1), (1, 0))),
    ("collective-permute", 32, 2, ((1, 2), (2, 1))),
    ("reduce-scatter", 512, 1, ((0, 1, 2, 3),)),
  ]


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("replica_groups={{0,1},{2,3}}, to_apply=%add", ((0, 1), (2, 3))),
    ("replica_groups={{0, 2}, {1, 3}}", ((0, 2), (1, 3))),
    ("source_target_pairs={{0,3},{1,0}}, channel_id=1", ((0, 3), (1, 0))),
    ("replica_groups=[2,4]<=[8], x={1}", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("replica_groups=[4,2]<=[2,4]T(1,0), x=1", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups=[2,2]<=[2,1,2]T(2,1,0)", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", ((0, 1), (2, 3))),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','c'}", ((0, 1, 2, 3),)),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", None),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("replica_groups={}, to_apply=%add", ()),
  ],
)
def test_groups_of_devices_are_read_in_every_notation(text, groups):
  if groups is None:  # 0 2 4 6 1 3 5 7 in two rows, whose columns are the groups
    groups = ((0, 1), (2, 3), (4, 5), (6, 7))
  assert hlo.parse_groups(text) == groups


def test_cycles_and_kernels_are_multiplied_by_the_trips():
  """An estimate that means none is not counted, nor what XLA's own calls do."""
  module = hlo.parse_module(TEXT)
  assert hlo.estimate_cycles(module) == 12 * 1000 + 7
  assert hlo.count_kernels(module) == {"tpu_custom_call": 12}
  plain = hlo.parse_module(TEXT.replace("estimated_cycles", "other"))
  assert hlo.estimate_cycles(plain) is None


def test_arrays_of_the_whole_batch_are_found_but_not_ids_and_weights():
  module = hlo.parse_module(TEXT)
  found = hlo.find_arrays_of_batch(module, 24, 16)
  assert found == [hlo.Shape("f32", (24, 16, 768)), hlo.Shape("bf16", (384, 768))]
  assert hlo.find_arrays_of_batch(module, 12, 16) == []


def test_a_text_without_a_program_is_an_error():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.parse_module("HloModule nothing")


def test_a_compiled_loop_and_its_sum_over_devices_are_found():
  """As this version of XLA writes them: three sums over eight devices in a loop of three."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

  def compute(x):
    def body(total, _):
      return jnp.sin(total + jax.lax.psum(total * x, "data")), None

    return jax.lax.psum(jax.lax.scan(body, x, length=3)[0], "data")

  mapped = jax.shard_map(compute, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
  compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct((8, 4), jnp.float32)).compile()
  found = hlo.find_collectives(hlo.parse_module(compiled.as_text()))
  assert sorted((c.kind, c.num_bytes, c.trips) for c in found) == [
    ("all-reduce", 16, 1),
    ("all-reduce", 16, 3),
  ]
  assert all(c.groups in ((), (tuple(range(8)),)) for c in found)
