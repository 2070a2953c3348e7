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
