"""Collectives counted in programs written by hand: loops, steps of two, work done piece by piece."""

from cepe_jax.benchmarks.hlo import arrays, collectives

PROGRAM = """
HloModule jit_step, entry_computation_layout={(f32[8])->f32[8]}

%start.1 (param.1: bf16[2,4]) -> (bf16[2,4], bf16[2,16]) {
  %param.1 = bf16[2,4]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[2,16]{1,0} all-gather(%param.1), channel_id=7, replica_groups=[1,4]<=[4], dimensions={1}
  ROOT %custom-call.1 = (bf16[2,4]{1,0}, bf16[2,16]{1,0}) custom-call(%all-gather.1), custom_call_target="Start"
}

%piece.1 (param.2: bf16[2,4]) -> bf16[2,16] {
  %param.2 = bf16[2,4]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[2,16]{1,0} all-gather(%param.2), channel_id=7, replica_groups=[1,4]<=[4], dimensions={1}
}

%ring_condition (param.3: (f32[4], u32[])) -> pred[] {
  %bound.1 = u32[]{:T(128)} constant(8), metadata={op_name="a(b)/c"}
  %param.3 = (f32[4]{0}, u32[]{:T(128)}) parameter(0)
  %counter.1 = u32[]{:T(128)} get-tuple-element(%param.3), index=1
  ROOT %compare.1 = pred[]{:T(512)} compare(%counter.1, %bound.1), direction=LT
}

%ring_body (param.4: (f32[4], u32[])) -> (f32[4], u32[]) {
  %param.4 = (f32[4]{0}, u32[]) parameter(0)
  %two.1 = u32[] constant(2)
  %x.1 = f32[4]{0} get-tuple-element(%param.4), index=0
  %permute-start.1 = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x.1), channel_id=3
  %permute-done.1 = f32[4]{0} collective-permute-done(%permute-start.1)
  %counter.2 = u32[]{:T(128)} get-tuple-element(%param.4), index=1
  %fusion.9 = bf16[2,16]{1,0} fusion(%x.1), kind=kLoop, calls=%piece.1
  %add.1 = u32[]{:T(128)} add(%counter.2, %two.1), metadata={op_name="a"}
  ROOT %tuple.1 = (f32[4]{0}, u32[]) tuple(%permute-done.1, /*index=1*/%add.1)
}

%layers_condition (param.5: (f32[4], s32[])) -> pred[] {
  %other.1 = s32[] constant(100)
  %bound.2 = s32[]{:T(128)} constant(3)
  %param.5 = (f32[4]{0}, s32[]) parameter(0)
  %counter.3 = s32[] get-tuple-element(%param.5), index=1
  ROOT %compare.2 = pred[] compare(%counter.3, %bound.2), direction=LT
}

%layers_body (param.6: (f32[4], s32[])) -> (f32[4], s32[]) {
  %param.6 = (f32[4]{0}, s32[]) parameter(0)
  %one.1 = s32[] constant(1)
  %x.2 = f32[4]{0} get-tuple-element(%param.6), index=0
  %fusion.1 = (bf16[2,4]{1,0}, bf16[2,16]{1,0}) fusion(%x.2), kind=kCustom, calls=%start.1
  %while.1 = (f32[4]{0}, u32[]) while(%t.1), condition=%ring_condition, body=%ring_body, metadata={op_name="x"}
  %reduced.1 = (f32[4]{0}, bf16[3]{0}) all-reduce(%x.2, %y.2), channel_id=4, to_apply=%sum.1
  %counter.4 = s32[] get-tuple-element(%param.6), index=1
  %add.2 = s32[] add(%counter.4, %one.1)
  ROOT %tuple.2 = (f32[4]{0}, s32[]) tuple(%x.2, %add.2)
}

%sum.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.3 = f32[] add(%a, %b)
}

%texts_condition (param.7: (s32[], s32[])) -> pred[] {
  %param.7 = (s32[], s32[]) parameter(0)
  ROOT %less.1 = pred[] fusion(%param.7), kind=kLoop, calls=%sum.1
}

%texts_body (param.8: (s32[], s32[])) -> (s32[], s32[]) {
  %param.8 = (s32[], s32[]) parameter(0)
  ROOT %tuple.3 = (s32[], s32[]) fusion(%param.8), kind=kLoop, calls=%sum.1
}

ENTRY %main.1 (param.0: f32[8]) -> f32[8] {
  %param.0 = f32[8]{0} parameter(0)
  %while.3 = (s32[], s32[]) while(%t.3), condition=%texts_condition, body=%texts_body
  %while.2 = (f32[4]{0}, s32[]) while(%t.2), condition=%layers_condition, body=%layers_body
  %start.2 = (f32[8]{0}, f32[2]{0}) reduce-scatter-start(%param.0), replica_groups={{0,1,2,3}}, to_apply=%sum.1
  %start.3 = f32[] all-reduce-start(%param.0), channel_id=9, to_apply=%sum.1
  ROOT %done.2 = f32[2]{0} reduce-scatter-done(%start.2)
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    """3 layers; in each a ring of 8 steps, two at a time, and a gather that the ring's work hides.

    A loop that communicates nothing may run as often as its data say.
    """
    assert collectives(PROGRAM) == {
        "all-gather": {"number": 3, "bytes": 3 * 2 * 16 * 2},
        "all-reduce": {"number": 3 + 1, "bytes": 3 * (4 * 4 + 3 * 2) + 4},
        "collective-permute": {"number": 3 * 4, "bytes": 3 * 4 * 4 * 4},
        "reduce-scatter": {"number": 1, "bytes": 2 * 4},
    }


def test_a_program_without_collectives():
    assert collectives("ENTRY %main (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}") == {}


def test_arrays():
    assert list(arrays("%x = (bf16[1,32]{1,0:T(8,128)(2,1)S(1)}, pred[], f32[4]{0}) f(%y)")) == [
        ("bf16", (1, 32)),
        ("pred", ()),
        ("f32", (4,)),
    ]


def test_sums_of_a_shard_map_each_count():
    """They are all under channel 1."""
    program = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %pmax.1 = f32[8]{0} all-reduce(%x), channel_id=1, to_apply=%max, metadata={op_name="jit(f)/shard_map/pmax"}
  %psum.1 = f32[8]{0} all-reduce(%pmax.1), channel_id=1, to_apply=%sum, metadata={op_name="jit(f)/shard_map/psum"}
  ROOT %r = f32[2]{0} all-reduce(%psum.1), channel_id=1, to_apply=%sum, metadata={op_name="jit(f)/shard_map/psum"}
}
"""
    assert collectives(program) == {"all-reduce": {"number": 3, "bytes": 32 + 32 + 8}}


def test_loops_of_gpus_say_how_often_they_run():
    """Their conditions are fusions, which hide the counter."""
    program = PROGRAM.replace(
        "condition=%layers_condition, body=%layers_body",
        'condition=%fused, body=%layers_body, backend_config={"known_trip_count":{"n":"5"},"dynamic_variable":{}}',
    )
    counted = collectives(
        program + "\n%fused (p: s32[]) -> pred[] {\n  ROOT %fusion = pred[] fusion(%p), calls=%sum.1\n}\n"
    )
    assert counted["all-gather"] == {"number": 5, "bytes": 5 * 2 * 16 * 2}
