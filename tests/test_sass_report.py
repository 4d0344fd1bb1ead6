"""The static report's arithmetic, on snippets of what the tools print; no CUDA toolkit."""

import json

import pytest
from benchmarks_on_path import BENCHMARKS
from sass import (
    assumptions,
    built,
    gates,
    hot_loop,
    instructions,
    large,
    lora,
    rivals,
    small,
    toolchain,
    wide,
)
from sass.instructions import unit_of
from sass.launches import Plan, Product, instance_of
from sass.occupancy import occupancy
from sass.work import Work

H100 = assumptions.H100

# As cuobjdump prints it: two nested loops, the inner one with an if; then the branch to itself
# that ends every kernel. The second line of each instruction is the rest of its encoding.
SASS = """
\tcode for sm_90
\t\tFunction : _Z4gemmi
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe20000000800 */
        /*0010*/                   S2R R2, SR_TID.X ;                  /* 0x0000000000027919 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ; /* 0x00 */
        /*0030*/                   LDSM.16.M88.4 R4, [R2] ;            /* 0x00 */
        /*0040*/              @!P1 BRA 0x70 ;                          /* 0x00 */
        /*0050*/                   LDG.E.U16.CONSTANT R3, desc[UR8][R2.64] ; /* 0x00 */
        /*0060*/                   LDG.E.U16.CONSTANT R5, desc[UR8][R2.64+0x2] ; /* 0x00 */
        /*0070*/                   LOP3.LUT R4, R4, 0xf000f, R9, 0xea, !PT ; /* 0x00 */
        /*0080*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ; /* 0x00 */
        /*0090*/                   HMMA.16816.F32.BF16 R12, R4, R7, R12 ; /* 0x00 */
        /*00a0*/               @P0 BRA 0x30 ;                          /* 0x00 */
        /*00b0*/                   STG.E.64 desc[UR4][R2.64], R8 ;     /* 0x00 */
        /*00c0*/              @!P2 BRA 0x20 ;                          /* 0x00 */
        /*00d0*/                   EXIT ;                              /* 0x00 */
        /*00e0*/                   BRA 0xe0;                           /* 0x00 */
\t\tFunction : _Z4copyi
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ; /* 0x00 */
        /*0010*/                   STG.E.128 desc[UR4][R2.64], R4 ;    /* 0x00 */
        /*0020*/                   EXIT ;                              /* 0x00 */
        /*0030*/                   BRA 0x30;                           /* 0x00 */
"""


@pytest.fixture
def gemm():
    return instructions.parse(SASS)["_Z4gemmi"]


def code(*opcodes):
    return [instructions.Instruction(16 * i, op, "") for i, op in enumerate(opcodes)]


# ---- reading ------------------------------------------------------------------------------


def test_functions_instructions_and_predicates(gemm):
    assert list(instructions.parse(SASS)) == ["_Z4gemmi", "_Z4copyi"]
    assert len(gemm) == 15
    assert gemm[4].opcode == "BRA"
    assert gemm[4].predicate == "@!P1"
    assert gemm[4].branch_target == 0x70
    assert gemm[7].operands == "R4, R4, 0xf000f, R9, 0xea, !PT"
    assert gemm[7].branch_target is None


def test_widths(gemm):
    assert instructions.widths(gemm, ["LDG", "LDGSTS"]) == {128: 1, 16: 2}
    assert instructions.widths(gemm, ["STG"]) == {64: 1}


@pytest.mark.parametrize(
    ("opcode", "unit"),
    [
        ("HMMA.16816.F32.BF16", "mma"),
        ("HGMMA.64x128x16.F32.BF16", "mma"),
        ("WARPGROUP.DEPBAR.LE", "control"),
        ("IMAD.MOV.U32", "multiply"),
        ("HADD2.BF16_V2", "half"),
        ("FFMA.FTZ", "float"),
        ("LOP3.LUT", "alu"),
        ("VIADDMNMX", "alu"),
        ("F2FP.BF16.F32.PACK_AB", "alu"),
        ("I2FP.F32.U32", "alu"),
        ("I2F.RP", "special"),
        ("F2I.FTZ.U32.TRUNC.NTZ", "special"),
        ("MUFU.RCP", "special"),
        ("LDSM.16.MT88.4", "shared"),
        ("LDGSTS.E.BYPASS.128", "shared"),
        ("LDG.E.128.CONSTANT", "global"),
        ("LDGDEPBAR", "control"),
        ("LDL.64", "local"),
        ("STL", "local"),
        ("SHFL.BFLY", "shuffle"),
        ("R2UR", "uniform"),
        ("ULOP3.LUT", "uniform"),
        ("BAR.SYNC.DEFER_BLOCKING", "control"),
        ("FROBNICATE.X", "unknown"),
    ],
)
def test_units(opcode, unit):
    assert unit_of(code(opcode)[0]) == unit


def test_shared_memory_cycles():
    """128 bytes a cycle: a warp's 16-byte access takes four, ldmatrix.x4 too."""
    assert instructions.shared_memory_cycles(code("LDS.128")) == 4
    assert instructions.shared_memory_cycles(code("LDS.U16", "STS")) == 2
    assert instructions.shared_memory_cycles(code("LDSM.16.M88.4", "LDSM.16.MT88.2")) == 6
    assert instructions.shared_memory_cycles(code("LDG.E.128", "FFMA")) == 0


def test_registers_shared_memory_and_threads():
    usage = """
 Function _Z4gemmi:
  REG:168 STACK:16 SHARED:1152 LOCAL:0 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert toolchain.parse_resources(usage)["_Z4gemmi"]["REG"] == 168
    assert toolchain.parse_resources(usage)["_Z4gemmi"]["CONSTANT[0]"] == 592
    elf = """
.nv.info._Z4gemmi
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x20 0x8 0x1
"""
    assert toolchain.parse_max_threads(elf) == {"_Z4gemmi": 256}
    assert toolchain.parse_arch(SASS) == "sm_90"


def test_names_lose_what_only_a_compiler_wants_to_know():
    long = "void k<hqq_small<__half, (int)4, (bool)1> >(hqq_arguments, int (*)(int))"
    assert toolchain.short_name(long) == "k<hqq_small<__half, 4, 1> >"
    assert toolchain.short_name("plain(int)") == "plain"
    unnamed = "(anonymous namespace)::f<(int)8>(int)"
    assert toolchain.short_name(unnamed) == "f<8>"
    kernel = "k<hqq_small<__half, 4, 1, 0, 8> >"
    assert instance_of(kernel) == "hqq_small<__half, 4, 1, 0, 8>"
    assert instance_of("dequantize_rows<float, 4, 1>") is None


def test_dependencies_of_a_make_rule():
    rule = "a.o : /x/a.cu \\\n    /x/b.h \\\n    /y/c.h\n"
    assert toolchain.parse_dependencies(rule) == ["/x/a.cu", "/x/b.h", "/y/c.h"]


# ---- the built library ----------------------------------------------------------------------


@pytest.fixture
def cuobjdump(tmp_path, monkeypatch):
    """A stand-in that finds in an object file what its text names; how often it was run."""
    tool, runs = tmp_path / "bin/cuobjdump", tmp_path / "runs"
    tool.parent.mkdir()
    tool.write_text(f"""#!/bin/sh
echo >>{runs}
for arch in $(cat "$3"); do : >a.cu.1.$arch.cubin; done
""")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    return lambda: len(runs.read_text().splitlines())


def test_an_objects_cubins_are_extracted_again_only_when_it_has_changed(tmp_path, cuobjdump):
    compiled, folder = tmp_path / "a.cu.o", tmp_path / "kept"
    compiled.write_text("sm_80 sm_90")
    first = built.extract(compiled, folder)
    assert list(first) == ["sm_80", "sm_90"]
    assert built.extract(compiled, folder) == first
    assert cuobjdump() == 1
    compiled.write_text("sm_90")
    (second,) = built.extract(compiled, folder).values()
    assert cuobjdump() == 2
    assert second.exists()
    assert not first["sm_90"].exists()


def test_a_library_for_other_architectures_is_told(tmp_path, cuobjdump, monkeypatch):
    monkeypatch.setattr(built, "bring_up_to_date", lambda build: None)
    objects = tmp_path / built.OBJECTS
    objects.mkdir(parents=True)
    for source in built.SOURCES.glob("*.cu"):
        (objects / f"{source.name}.o").write_text("sm_80 sm_86")
    with pytest.raises(toolchain.ToolError, match="built for sm_80, sm_86, not for sm_90"):
        built.kernels(tmp_path, ["sm_90"], tmp_path / "kept")


def test_a_tree_without_the_cuda_library_is_told(tmp_path):
    with pytest.raises(toolchain.ToolError, match="no CUDA library was built in"):
        built.kernels(tmp_path, ["sm_90"], tmp_path / "kept")


# ---- loops --------------------------------------------------------------------------------


def test_the_hot_loop_is_the_inner_one_with_the_tensor_cores(gemm):
    assert [len(body) for body in hot_loop.loops(gemm)] == [8, 11]
    loop = hot_loop.hot_loop(gemm)
    assert (loop[0].address, loop[-1].address) == (0x30, 0xA0)
    assert hot_loop.mma_count(loop) == 2


def test_a_kernel_without_loops_is_its_own_hot_loop():
    copy = instructions.parse(SASS)["_Z4copyi"]
    assert hot_loop.hot_loop(copy) == copy


def test_the_fast_path_goes_where_the_loads_are_and_the_idle_one_around_them(gemm):
    loop = hot_loop.hot_loop(gemm)
    assert len(hot_loop.fast_path(loop)) == 8
    assert len(hot_loop.fast_path(loop, idle=True)) == 6


def test_the_fast_path_prefers_wide_loads_to_many():
    """if (aligned) one 16-byte load; else two of 2 bytes."""
    listing = """
\t\tFunction : f
        /*0000*/                   ISETP.NE.AND P0, PT, R0, RZ, PT ;   /* 0x00 */
        /*0010*/              @!P0 BRA 0x40 ;                          /* 0x00 */
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;    /* 0x00 */
        /*0030*/                   BRA 0x60 ;                          /* 0x00 */
        /*0040*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;    /* 0x00 */
        /*0050*/                   LDG.E.U16 R5, desc[UR4][R2.64+0x2] ; /* 0x00 */
        /*0060*/                   STS.128 [R9], R4 ;                  /* 0x00 */
"""
    path = hot_loop.fast_path(instructions.parse(listing)["f"])
    assert [hex(i.address) for i in path] == ["0x0", "0x10", "0x20", "0x30", "0x60"]


# ---- occupancy ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks", "limited_by"),
    [
        # as cudaOccupancyMaxActiveBlocksPerMultiprocessor has it
        ("sm_90", 128, 128, 0, 4, "registers"),
        ("sm_90", 32, 1024, 0, 2, "warps"),
        ("sm_90", 16, 32, 0, 32, "blocks"),
        ("sm_90", 255, 128, 0, 2, "registers"),
        ("sm_90", 64, 128, 60_000, 3, "shared memory"),
        ("sm_80", 64, 128, 60_000, 2, "shared memory"),
        ("sm_89", 64, 128, 60_000, 1, "shared memory"),
        ("sm_89", 32, 256, 0, 6, "warps"),
        ("sm_80", 32, 128, 163 * 1024, 1, "shared memory"),
        ("sm_80", 32, 128, 163 * 1024 + 1, 0, "shared memory"),
    ],
)
def test_occupancy(arch, registers, threads, shared, blocks, limited_by):
    found = occupancy(arch, registers, threads, shared)
    assert (found.blocks, found.limited_by) == (blocks, limited_by)
    assert found.warps == blocks * -(-threads // 32)


# ---- time ---------------------------------------------------------------------------------


def test_work_is_bound_by_its_narrowest_pipe():
    work = Work()
    work.add(Work.of(code("LOP3", "LOP3", "FFMA", "HMMA", "LDS.128")), 1e9)
    seconds = work.seconds(H100)
    cycle = 1e9 / (528 * H100.clock)
    assert seconds["issue"] == pytest.approx(5 * cycle)
    assert seconds["ALU"] == pytest.approx(4 * cycle)  # every other cycle
    assert seconds["FMA"] == pytest.approx(cycle)
    assert seconds["tensor cores"] == pytest.approx(6.5 * cycle)
    assert seconds["shared memory"] == pytest.approx(4 * 4 * cycle)  # one for four quarters


def test_an_unknown_instruction_is_not_free():
    assert Work.of(code("FROBNICATE")).seconds(H100)["ALU"] > 0


def test_blocks_that_do_not_fill_the_device_leave_it_uneven():
    assert small._unevenness(132, 132, 3) == 1
    assert small._unevenness(133, 132, 3) == pytest.approx(2 * 132 / 133)
    assert small._unevenness(132 * 3 + 1, 132, 3) == pytest.approx(4 * 132 / 397)
    assert small._unevenness(1, 132, 0) == float("inf")


def test_a_small_products_instance_is_read_from_its_name():
    found = small.Instance.parse("hqq_small_kernel<hqq_small<__half, 4, 1, 0, 8> >")
    assert found == small.Instance("__half", 4, 1, 0, 8)
    assert found.tokens == 64
    assert found.mma_a_chunk == 16 * 8


def test_a_pair_exchanges_half_its_sums_and_leaves_half_the_parts():
    instance = small.Instance("__nv_bfloat16", 4, 0, 1, 8)
    plan = BLOCKS._replace(units_of_block=4, splits=8, paired=1)
    half = 4 * 64 * 4 * 64 / 2
    cycles = half / 16 + half / 128  # the other's, and into its own shared memory
    waits = assumptions.CLUSTER_BARRIER + assumptions.CLUSTER_LATENCY
    meeting = small._meeting(H100, instance, plan)
    assert meeting == pytest.approx((cycles + waits) / H100.clock)
    # where nothing follows, the last barrier hides behind the way of the stores to L2
    later = assumptions.CLUSTER_BARRIER / H100.clock - assumptions.CACHE_LATENCY
    assert small.last_barrier(H100) == pytest.approx(later)
    alone = small._meeting(H100, instance, plan._replace(splits=2))
    assert alone - meeting == pytest.approx(small.last_barrier(H100))
    parts = small.Parts(Work(), Work(), Work(), reduce_steps_a_split=1.0)
    after = small._reduction(H100, parts, instance, plan)
    others = 3 * half / 64 / H100.clock
    assert after == pytest.approx(assumptions.ARRIVAL_COUNTED + others)


def test_memory_bounds_few_tokens_and_tensor_cores_many():
    def at(M):
        return small.roofline(H100, Product(4096, 14336, M, 0, 1)) - assumptions.LAUNCH

    bytes_of_weight = 4096 * 14336 * 4.5 / 8
    assert at(1) == pytest.approx(bytes_of_weight / H100.memory, rel=1e-2)
    assert at(512) == pytest.approx(2 * 512 * 4096 * 14336 / H100.mma_flops)


def test_dense_products_read_the_weight_or_multiply():
    few = rivals.dense(H100, 1, 4096, 14336)
    read = 2 * 4096 * 14336 / H100.memory / assumptions.ATTAINED
    assert few == pytest.approx(assumptions.LAUNCH + read, rel=1e-2)
    many = rivals.dense(H100, 4096, 4096, 14336)
    assert many >= 2 * 4096 * 4096 * 14336 / H100.dense
    assert many < 1.1 * 2 * 4096 * 4096 * 14336 / H100.dense
    assert rivals.hqq(H100, 1, 4096, 14336) > 5 * few


BLOCKS = Plan(
    small=0,
    tokens=64,
    token_tiles=64,
    units=64,
    units_of_block=64,
    chunks=1,
    chunks_per_split=1,
    busiest_chunks=1,
    ways=1,
    splits=1,
    paired=0,
    width=64,
    wide=0,
    wide_tokens=128,
    wide_token_tiles=4,
    wide_output_tiles=33,
    wide_splits=1,
    wide_chunks_per_split=64,
    wide_cluster=0,
)


def test_blocks_cost_more_launches_but_the_same_gemm():
    p = Product(4096, 4096, 4096, 0, 1)
    work = Work()
    work.add(Work.of(code(*["LOP3"] * 10)), 1 / 16)
    d = large.Dequantize(4, 1, work, work.instructions)

    def seconds(width):
        return large.product_seconds(H100, d, BLOCKS._replace(width=width), p)

    assert seconds(1024) < seconds(512) < seconds(64)


def test_a_wide_product_takes_its_waves_of_tiles():
    p = Product(8448, 4096, 512, 0, 1)  # 33 x 4 tiles of 256 x 128, one each
    kernel = wide.Wide("__nv_bfloat16", 4, 0, 128, Work.of(code(*["HGMMA"] * 8, *["LOP3"] * 9)))
    one = wide.bounds(H100, kernel, BLOCKS, p)
    # eight warps' products of 64 cycles on four tensor cores, 64 times
    assert one.waves["tensor cores"] == pytest.approx(64 * 8 * 8 * 64 / 4 / H100.clock)
    assert one.waves["ALU"] == pytest.approx(64 * 8 * 9 * 2 / 4 / H100.clock)
    assert one.waves["issue"] == pytest.approx(64 * 8 * 17 / 4 / H100.clock)
    moved = 128 * 64 * 2 + 256 * 64 / 2 + 2 * 256 * 2  # tokens, codes, scales and zeros
    assert one.waves["L2"] == pytest.approx(64 * moved * 132 / H100.cache)
    two = wide.bounds(H100, kernel, BLOCKS._replace(wide_output_tiles=34), p)
    assert two.waves["tensor cores"] == pytest.approx(2 * one.waves["tensor cores"])
    assert two.ends == pytest.approx(2 * one.ends)
    split = wide.bounds(
        H100, kernel, BLOCKS._replace(wide_splits=2, wide_chunks_per_split=32), p
    )
    assert split.waves["tensor cores"] == pytest.approx(one.waves["tensor cores"])
    parts = 2 * 4 * 512 * 8448 / H100.cache / assumptions.ATTAINED
    assert split.sums == pytest.approx(assumptions.LAUNCH + parts)
    assert split.ends > two.ends  # parts are fp32


def test_a_wide_product_of_few_tokens_meets_in_its_clusters():
    p = Product(14336, 4096, 64, 1, 1)
    plan = BLOCKS._replace(
        wide_tokens=64, wide_token_tiles=1, wide_output_tiles=16, wide_splits=3, wide_cluster=1
    )
    kernel = wide.Wide("__nv_bfloat16", 4, 1, 64, Work.of(code(*["HGMMA"] * 8)))
    b = wide.bounds(H100, kernel, plan._replace(wide_chunks_per_split=70), p)
    assert b.waves["tensor cores"] == pytest.approx(70 * 8 * 8 * 32 / 4 / H100.clock)
    # all multiprocessors' bytes, idle or not: tokens, codes, a sector of each scale and zero
    moved = 16 * 224 * (64 * 64 * 2 + 256 * 64 / 2 + 64 * 2 * 32)
    assert b.waves["L2"] == pytest.approx(moved / H100.cache)
    sums = 4 * 256 * 64
    waits = assumptions.CLUSTER_BARRIER + assumptions.CLUSTER_LATENCY
    meeting = (sums / 128 + sums * 2 / 3 / 13 + waits) / H100.clock
    assert b.sums == pytest.approx(meeting + small.last_barrier(H100))
    # each byte once: what an H100's tensor cores take for 64 tokens is less
    read = 4096 * 14336 * 4.5 / 8 / H100.memory
    assert wide.roofline(H100, plan, p) == pytest.approx(assumptions.LAUNCH + read, rel=0.1)


def test_multiplications_of_skinny_products_are_counted():
    assert lora.products_of(Work.of(code("FFMA", "FADD"))) == 2 * 32
    # an fp32 factor is multiplied in three parts, which float instructions make
    assert lora.products_of(Work.of(code("FADD", *["HMMA"] * 3))) == 16 * 8 * 16


def test_every_architecture_that_a_device_has_is_known():
    for device in assumptions.DEVICES:
        assert device.arch in assumptions.RATES
        assert occupancy(device.arch, 64, 128, 0).blocks > 0
        assert device.mma_flops <= 1.3 * device.dense


# ---- gates --------------------------------------------------------------------------------

KERNEL = {"name": "k<4>", "arch": "sm_90", "registers": 100, "stack_bytes": 8}


def check(gate, kernels=(KERNEL,)):
    return gates.check_kernels({"kernels": [gate]}, kernels)


def test_a_gate_that_holds():
    assert check({"match": "k<4>", "limits": {"registers": ["<=", 100]}}) == ([], [], 1)


def test_a_broken_gate_names_kernel_metric_and_values():
    (line,) = check({"match": "k", "limits": {"stack_bytes": ["==", 0]}}).failures
    assert line == "sm_90 k<4>: stack_bytes is 8, wanted == 0"


def test_a_gate_that_matches_nothing_fails():
    assert check({"match": "gone", "limits": {"registers": ["<=", 255]}}).failures
    assert check({"match": "k", "arch": "sm_80", "limits": {}}).failures


def test_a_metric_that_is_not_there_fails():
    assert check({"match": "k", "limits": {"spills": ["==", 0]}}).failures


def test_a_missed_target_is_told_and_does_not_fail():
    verdict = check({"match": "k", "limits": {}, "targets": {"registers": ["<=", 64]}})
    assert not verdict.failures
    assert len(verdict.missed) == 1


def test_predictions_are_picked_by_all_that_a_gate_asks():
    rows = [
        {"device": "H100", "operation": "linear", "axis": 1, "N": 8, "K": 8, "M": M}
        | {"times_dense": 3.0 / M}
        for M in (1, 2)
    ]
    gate = {"where": {"device": ["H100"], "M": [1, 2]}, "limits": {"times_dense": [">=", 2]}}
    (line,) = gates.check_predictions({"predictions": [gate]}, rows).failures
    assert "M = 2" in line
    none = {"where": {"device": ["A100"]}, "limits": {"times_dense": [">=", 2]}}
    assert gates.check_predictions({"predictions": [none]}, rows).failures


def test_gates_of_other_architectures_are_not_asked():
    listed = {
        "kernels": [{"match": "a", "arch": "sm_80"}, {"match": "b"}],
        "predictions": [{"where": {"device": ["A100"]}}, {"where": {"device": ["H100"]}}],
    }
    asked = gates.for_archs(listed, ["sm_90"])
    assert asked["kernels"] == [{"match": "b"}]
    assert asked["predictions"] == [{"where": {"device": ["H100"]}}]


def test_the_gates_of_this_repository_are_well_formed():
    listed = json.loads((BENCHMARKS / "gates.json").read_text())
    for gate in listed["kernels"] + listed["predictions"]:
        bounds = {**gate.get("limits", {}), **gate.get("targets", {})}
        assert gate["why"]
        assert bounds
        assert ("match" in gate) != ("where" in gate)
        assert all(comparison in gates.COMPARE for comparison, _ in bounds.values())
