"""Results of nccl-tests: JSON as src/util.cu writes it, text as it prints it."""

import json

import pytest
from tersor.formats.errors import TersorError
from tersor.formats.nccl_tests import Run, read


def rank_line(rank, host, group="Group  0 "):
    return f"#  Rank {rank:2d} {group}Pid {4000 + rank:6d} on {host:>10} device {rank % 8:2d} [0000:{rank:02x}:00] NVIDIA H100\n"


def as_json(program="all_reduce_perf", hosts=("a", "b"), gpus=4, rows=((1024, 31.5), (2048, 40.0)), wrong=0.0):
    return {
        "version": 3,
        "start_time": "2026-01-01 00:00:00",
        "args": [f"./build/{program}", "-J", "out.json"],
        "env": ["PATH=/usr/bin"],
        "nccl_version": 22800,
        "config": {
            "nthreads": 1,
            "ngpus": gpus,
            "graph": 0,
            "blocking_collectives": "false",
            "devices": [
                {
                    "rank": gpus * i,
                    "group": 0,
                    "pid": 7,
                    "hostname": host,
                    "device": 0,
                    "device_hex": "0000:04:00",
                    "device_info": "NVIDIA H100",
                }
                for i, host in enumerate(hosts)
            ],
        },
        "results": [
            {
                "size": size,
                "count": size // 4,
                "type": "float",
                "redop": "sum",
                "root": "    -1",
                "out_of_place": {"time": time, "alg_bw": 1.0, "bus_bw": 1.0, "nwrong": wrong},
                "in_place": {"time": 2 * time, "alg_bw": 1.0, "bus_bw": 1.0, "nwrong": None},
                "actual_iterations": 20,
                "experiment_name": program,
            }
            for size, time in rows
        ],
        "out_of_bounds": {"count": 0, "okay": "true"},
    }


COLUMNS = """#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)
"""
ROWS = """        8192          2048     float     sum      -1    35.15    0.23    0.23       0    30.33    0.27    0.27       0
       16384          4096     float     sum      -1    31.67    0.52    0.52       0    30.75    0.53    0.53     N/A
  1073741824     268435456     float     sum      -1  1.2e+05   8.95    8.95     N/A   119950    8.95    8.95     N/A
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 4.1
#
"""
TWO_NODES = (
    "# nccl-tests version 2.20.0 nccl-headers=23102 nccl-library=23102\n"
    "# Collective test starting: all_reduce_perf\n"
    "# nThread 1 nGpus 1 minBytes 8192 maxBytes 1073741824 step: 2(factor) warmup iters: 10 iters: 100\n"
    "#\n# Using devices\n"
    + rank_line(0, "spark-1")
    + rank_line(1, "spark-2")
    + COLUMNS
    + ROWS
    + "# Collective test concluded: all_reduce_perf\n#\n"
)


def saved(tmp_path, content, name="out.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_json(tmp_path):
    (run,) = read(saved(tmp_path, as_json()))
    assert run == Run("all_reduce", 8, 2, ((1024, pytest.approx(31.5e-6)), (2048, pytest.approx(40e-6))))


@pytest.mark.parametrize(
    ("program", "collective"),
    [
        ("all_gather_perf", "all_gather"),
        ("reduce_scatter_perf", "reduce_scatter"),
        ("alltoall_perf", "all_to_all"),
        ("broadcast_perf", "broadcast"),
        ("sendrecv_perf", "send"),
    ],
)
def test_programs(tmp_path, program, collective):
    assert read(saved(tmp_path, as_json(program)))[0].collective == collective
    assert read(saved(tmp_path, TWO_NODES.replace("all_reduce_perf", program), "a.txt"))[0].collective == collective


def test_json_details(tmp_path):
    content = as_json(hosts=("a",), gpus=8)
    content["results"][0]["out_of_place"] = None  # a replayed trace is measured in place only
    content["results"][1]["out_of_place"] = {"cpu_time": 7.0, "alg_bw": "nan", "bus_bw": 1.0, "nwrong": None}
    content["results"].append({"size": 0, "out_of_place": {"time": 3.0}})
    content["results"].append({"size": 4096, "out_of_place": {"time": "nan"}})
    (run,) = read(saved(tmp_path, content))
    assert (run.ranks, run.nodes) == (8, 1)
    assert run.points == ((1024, pytest.approx(63e-6)), (2048, pytest.approx(7e-6)))


def test_one_communicator_of_several_side_by_side(tmp_path):
    content = as_json(hosts=("a", "b", "a", "b"), gpus=1)
    for entry in content["config"]["devices"][2:]:
        entry["group"] = 1
    assert (read(saved(tmp_path, content))[0].ranks, read(saved(tmp_path, content))[0].nodes) == (2, 2)
    text = TWO_NODES.replace(
        COLUMNS, rank_line(2, "spark-1", "Group  1 ") + rank_line(3, "spark-2", "Group  1 ") + COLUMNS
    )
    assert read(saved(tmp_path, text, "a.txt"))[0].ranks == 2


def test_lists_and_folders(tmp_path):
    saved(tmp_path, [as_json(), as_json("all_gather_perf", ("a",))], "two.json")
    saved(tmp_path, TWO_NODES, "three.txt")
    assert [(run.collective, run.ranks) for run in read(tmp_path)] == [
        ("all_reduce", 2), ("all_reduce", 8), ("all_gather", 4)
    ]  # fmt: skip


def test_text(tmp_path):
    (run,) = read(saved(tmp_path, TWO_NODES, "log"))
    assert (run.collective, run.ranks, run.nodes) == ("all_reduce", 2, 2)
    assert [size for size, _ in run.points] == [8192, 16384, 1073741824]
    assert [seconds for _, seconds in run.points] == pytest.approx([35.15e-6, 31.67e-6, 0.12])


def test_several_runs_in_one_log(tmp_path):
    runs = read(
        saved(tmp_path, "starting\n" + TWO_NODES + TWO_NODES.replace("all_reduce_perf", "alltoall_perf"), "log")
    )
    assert [run.collective for run in runs] == ["all_reduce", "all_to_all"]
    assert runs[0].points == runs[1].points


def test_old_text_without_name_group_and_root(tmp_path):
    text = (
        "# nThread 1 nGpus 2 minBytes 32 maxBytes 64 step: 2(factor) warmup iters: 5 iters: 20 validation: 1\n"
        "# Using devices\n" + rank_line(0, "box", "") + rank_line(1, "box", "") + "#\n"
        "#                                                     out-of-place                       in-place\n"
        "#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error\n"
        "#        (B)    (elements)                     (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)\n"
        "          32             8   float     sum    12.50    0.00    0.00  1e-07    12.10    0.00    0.00  1e-07\n"
    )
    (run,) = read(saved(tmp_path, text, "reduce_scatter.log"))
    assert run == Run("reduce_scatter", 2, 1, ((32, pytest.approx(12.5e-6)),))
    with pytest.raises(TersorError, match="which collective"):
        read(saved(tmp_path, text, "log"))
    assert read(saved(tmp_path, "mpirun -np 2 ./all_gather_perf -b 32\n" + text, "log"))[0].collective == "all_gather"


def test_per_iteration_columns_do_not_matter(tmp_path):
    columns = COLUMNS.replace("#wrong     time", "#wrong   i_min   i_max     time", 1)
    rows = ROWS.replace("       0    30.33", "       0   34.00   36.00    30.33")
    (run,) = read(saved(tmp_path, TWO_NODES.replace(COLUMNS, columns).replace(ROWS, rows), "log"))
    assert run.points[0] == (8192, pytest.approx(35.15e-6))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no measurement"),
        ("hello\n", "no measurement"),
        ("{", "JSON"),
        ("{}", "not a result"),
        ("[3]", "not a result"),
        ("[]", "no measurement"),
        ({"args": ["x_perf"]}, "x_perf"),
        (as_json("gather_perf"), "gather_perf"),
        (as_json(hosts=("a", "a", "b"), gpus=1), "unevenly"),
        (as_json(hosts=("a",), gpus=1), "among 1 ranks"),
        (as_json(wrong=12.0), "12 wrong"),
        (as_json(rows=()), "no time"),
        (TWO_NODES.replace("0.23       0 ", "0.23       5 "), "5 wrong"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, named):
    path = saved(tmp_path, content, "log")
    with pytest.raises(TersorError, match=named) as error:
        read(path)
    assert str(path) in str(error.value) and error.value.hint


def test_nothing_there(tmp_path):
    with pytest.raises(TersorError, match="none"):
        read(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TersorError, match="empty"):
        read(tmp_path / "empty")
