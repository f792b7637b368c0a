"""What a run takes, what cannot fit, and what breaks first."""

import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from readapt_ray import cli, planner
from readapt_ray.catalog.models import open_model
from readapt_ray.errors import InputError
from readapt_ray.planner import plan_report, scaling
from readapt_ray.planner.cluster_files import read_cluster
from readapt_ray.planner.corpus import Corpus
from readapt_ray.planner.cost import stage_usd
from readapt_ray.planner.prices import PRICES_FILE
from readapt_ray.recipes.chain import RunConfig
from readapt_ray.stages.ingest import IngestConfig, ingest
from tests import factories
from tests.planner.plans import CLUSTER, MACHINES, PRICES, REPOSITORY, launcher, make_plan, stage, stage_named, write


def test_tokens_are_those_that_pack_and_embed_would_count(run_file: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(run_file / "base"))
    tables = [pq.read_table(file) for file in sorted((run_file / "root/corpus/passages").iterdir())]
    texts = [f"{row['title']} {row['text']}".strip() for table in tables for row in table.to_pylist()]
    lengths = [min(64, 2 + len(ids)) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    corpus = make_plan(run_file).setting.corpus
    assert (corpus.num_passages, corpus.num_queries) == (300, 20)
    assert corpus.train_tokens == pytest.approx(sum(lengths) / 300, rel=0.02)
    assert 0 < corpus.error < 0.1


def test_each_stage_of_the_run_is_planned_and_the_sum_is_the_cost(run_file: Path) -> None:
    found = make_plan(run_file)
    assert [each.stage for each in found.stages] == [
        *("ingest", "pack", "train", "merge", "embed", "index", "embed", "index", "search", "search", "evaluate")
    ]
    low, mid, high = found.costs
    assert low.seconds < mid.seconds < high.seconds and low.usd < mid.usd < high.usd
    assert mid.usd == pytest.approx(mid.seconds / 3600 * found.setting.cluster.usd_per_hour), "all nodes are always up"
    assert found.problems == []
    shown = plan_report.text(found)
    assert "from 16 GPUs: train shares out batch_size = 16 blocks a step" in shown
    assert "rate not measured" in shown


def test_work_grows_linearly_and_gpus_divide_it(run_file: Path) -> None:
    found = make_plan(run_file, num_passages=10_000_000)
    embed = next(each for each in found.stages if each.stage == "embed")
    assert embed.work == pytest.approx(
        1e7
        * found.setting.corpus.embed_tokens
        * found.setting.retriever.forward_flops(found.setting.corpus.embed_tokens)
    )
    assert embed.workers == 16
    more = write(run_file, {"nodes": [{**CLUSTER["nodes"][0], "count": 16}, CLUSTER["nodes"][1]]}, "more.yaml")
    assert make_plan(run_file, cluster=more, num_passages=10_000_000).costs[1].seconds < found.costs[1].seconds
    larger = make_plan(run_file, num_passages=100_000_000)
    assert larger.costs[1].seconds == pytest.approx(10 * found.costs[1].seconds, rel=0.05)


def test_embed_has_as_many_shards_as_the_stage_cuts(run_file: Path) -> None:
    cluster = write(run_file, {"nodes": [{"name": "head", "cpus": 64, "memory_gb": 256}]}, "wide.yaml")
    assert stage(make_plan(run_file, cluster=cluster, num_passages=32 * 1000), "embed").workers == 32
    assert stage(make_plan(run_file, cluster=cluster, num_passages=10 * 256), "embed").workers == 10


@pytest.mark.parametrize(("cpus", "told"), [(2, "more CPUs make it faster"), (1_000_000, "")])
def test_gpus_wait_for_the_cpus_that_tokenise(run_file: Path, cpus: int, told: str) -> None:
    """The model has 48 dimensions, so that GPUs encode more than thousands of CPUs tokenise."""
    gpu = {"name": "gpu", "count": 4, "cpus": cpus, "memory_gb": 900, "gpus": 1, "gpu": "H100"}
    cluster = write(run_file, {"nodes": [{"name": "head", "cpus": 4, "memory_gb": 16}, gpu]}, "few.yaml")
    found = make_plan(run_file, cluster=cluster, num_passages=100_000_000)
    corpus, embed, num_cpus = found.setting.corpus, stage(found, "embed"), 4 + 4 * cpus
    per_cpu = found.setting.rates.rate_of("pack", "CPU", 0, is_16_bit=False).value
    assert embed.seconds > corpus.num_passages * corpus.embed_tokens / (num_cpus * per_cpu)
    assert told in embed.note and (f"{num_cpus} CPUs tokenise" in embed.note) == bool(told)


def test_encoders_that_share_a_gpu_count_as_one_and_share_its_memory(run_file: Path) -> None:
    cluster = write(run_file, launcher(max_workers=8, gpu=8, cpu=0), "launcher.yaml")
    whole, half = (
        stage(
            make_plan(
                run_file,
                {"embed": {"num_gpus_per_worker": each, "num_workers": 8, "rows_per_shard": 10}},
                cluster=cluster,
            ),
            "embed",
        )
        for each in (1, 0.5)
    )
    assert (whole.workers, half.workers) == (8, 4)
    assert half.memory.available == whole.memory.available / 2 and half.memory.where == f"0.5 of {whole.memory.where}"


@pytest.mark.parametrize(("dtype", "each"), [("float32", 4 * 24), ("float16", 2 * 24), ("int8", 24 + 4)])
@pytest.mark.parametrize("by", ["option", "encoding"])
def test_vectors_take_the_bytes_of_their_type_and_of_the_numbers_that_are_kept(
    run_file: Path, dtype: str, each: int, by: str
) -> None:
    embed: dict[str, Any] = {"vector_dtype": dtype}
    if by == "option":
        embed["dimensions"] = 24
    else:
        encoding = open_model(str(run_file / "retriever")).encoding.model_copy(update={"dimensions": 24})
        (run_file / "encoding.json").write_text(encoding.model_dump_json())
        embed["encoding"] = str(run_file / "encoding.json")
    found = make_plan(run_file, {"embed": embed}, num_passages=1_000_000, num_queries=100)
    assert stage(found, "embed").out_bytes == 1e6 * (each + 30)
    stored = 2 if dtype == "float16" else 4
    assert (stage(found, "index").work, stage(found, "index").out_bytes) == (4e6 * 24, stored * 1e6 * 24)
    assert stage(found, "search").work == 2 * 100 * 1e6 * 24
    whole = make_plan(run_file, num_passages=1_000_000)
    hidden = whole.setting.retriever.hidden
    ours, theirs = ([limit.at for limit in each.passage_limits if "flat scan" in limit.what] for each in (found, whole))
    assert ours[0] == pytest.approx(theirs[0] * hidden / 24)


def test_bytes_of_indexes_are_those_of_the_options(run_file: Path) -> None:
    options = {"kind": "ivf-pq", "code_bytes": 8, "storage": "float16"}
    found = make_plan(run_file, {"index": options, "embed": {"dimensions": 32}}, num_passages=1_000_000)
    codes, stored = 8 + 8, 2 * 32  # a code and an id; a float16 vector to rank again by
    assert found.index_bytes["ivf-pq"] == stage(found, "index").out_bytes == 1e6 * (codes + stored)
    assert found.index_bytes["flat"] == 1e6 * stored
    assert "rabitq 84 MB" in plan_report.text(found)
    small = make_plan(run_file, {"index": options | {"refine": False}}, num_passages=1_000_000)
    assert small.index_bytes["ivf-pq"] == 1e6 * codes
    factory = {"index": {"factory": "IVF4,Flat"}}
    assert "time and bytes of a flat index" in stage(make_plan(run_file, factory), "index").note
    chosen = make_plan(run_file, {"index": {"kind": "auto"}}, num_passages=1_000_000)
    assert stage(chosen, "index").out_bytes == chosen.index_bytes["hnsw"], "auto takes graphs of so many"


def test_auto_is_float32_on_cpus_that_may_lack_units_for_less(run_file: Path) -> None:
    cluster = write(run_file, {"nodes": [{"name": "head", "cpus": 8, "memory_gb": 32}]}, "cpus.yaml")
    plans = {
        dtype: make_plan(
            run_file, {"train": {"block_tokens": 64, "dtype": dtype}, "embed": {"dtype": dtype}}, cluster=cluster
        )
        for dtype in ("auto", "float32", "bfloat16")
    }
    for name in ("train", "embed"):
        auto, float32, bfloat16 = (stage(each, name) for each in plans.values())
        assert auto.rate == float32.rate and auto.rate.value == pytest.approx(bfloat16.rate.value / 2.5)
        assert auto.memory == float32.memory != bfloat16.memory
        assert "in float32, as dtype auto is on CPUs without bfloat16 units" in auto.note
        assert "float32" not in float32.note + bfloat16.note + stage(make_plan(run_file), name).note


@pytest.mark.parametrize("has_units", [False, True])
def test_of_this_machine_it_is_known(monkeypatch: pytest.MonkeyPatch, has_units: bool) -> None:
    monkeypatch.setattr("readapt_ray.hardware.has_bfloat16_units", lambda: has_units)
    assert read_cluster("local", PRICES).computes_in_16_bits("auto") is has_units


def test_one_step_and_one_block_are_written_in_the_singular(run_file: Path) -> None:
    sections = {"train": {"block_tokens": 64, "batch_size": 1}}
    assert stage(make_plan(run_file, sections, num_passages=1), "train").note.startswith("1 step of 1 block;")
    assert " steps of 1 block;" in stage(make_plan(run_file, sections), "train").note


def test_limits_come_in_the_order_in_which_they_are_met(run_file: Path) -> None:
    found = make_plan(run_file, num_passages=1_000_000)
    for limits in (found.passage_limits, found.worker_limits):
        assert [limit.at for limit in limits] == sorted(limit.at for limit in limits)
    files = next(limit for limit in found.passage_limits if "files of vectors" in limit.what)
    assert files.at > 4096 * 100_000  # a shard of such a small model is larger


def test_what_cannot_fit_is_refused_with_the_arithmetic(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = write(run_file, {"nodes": [{"name": "head", "cpus": 2, "memory_gb": 1}]}, "small.yaml")
    assert cli.main(["plan", "--config", str(run_file / "run.yaml"), "--cluster", cluster]) == 2
    said = capsys.readouterr()
    assert "TOO BIG adapter" in said.out
    assert "adapter cannot run: a worker needs frozen weights" in said.err
    assert "lower train.micro_batch_tokens" in said.err


def test_the_plan_is_json_on_request(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--config", str(run_file / "run.yaml"), "--cluster", str(run_file / "cluster.yaml"), "--json"]
    assert cli.main(arguments) == 0
    values = json.loads(capsys.readouterr().out)
    taken = {each["name"]: each["seconds"]["expected"] for each in values["stages"]}
    beside = min(taken["adapted"], taken["vectors/retriever"]) + min(taken["index/retriever"], taken["vectors/adapted"])
    assert values["seconds"]["expected"] == pytest.approx(sum(taken.values()) - beside)
    assert set(values["grid"]) == {str(size) for size in scaling.PASSAGES}
    assert {"passages", "workers"} == set(values["limits"]) and values["limits"]["passages"][0]["at"] > 0


def test_a_price_table_of_ones_own_replaces_ours(run_file: Path) -> None:
    values = yaml.safe_load(PRICES_FILE.read_text())
    values["machines"]["p5.48xlarge"]["spot"] = 1000.0
    prices = write(run_file, values, "prices.yaml")
    assert make_plan(run_file, prices=prices).setting.cluster.usd_per_hour == pytest.approx(2000.4)
    with pytest.raises(InputError, match="option 'gpus' is required"):
        make_plan(run_file, prices=str(run_file / "cluster.yaml"))


def test_a_source_that_was_not_ingested_is_sampled(run_file: Path, tmp_path: Path) -> None:
    rows = [{"_id": p.doc_id, "title": p.title, "text": p.text} for p in factories.small_corpus(120)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunConfig.parse(yaml.safe_load((run_file / "run.yaml").read_text())).model_copy(
        update={"source": str(tmp_path / "corpus.jsonl"), "root": str(tmp_path / "new")}
    )
    found = planner.plan(run, planner.PlanConfig(cluster="local"))
    assert found.setting.corpus.num_passages == 120
    assert [each.stage for each in found.stages][-1] == "index"
    assert not (tmp_path / "new").exists()


def test_a_corpus_without_its_tokenizer_is_estimated_from_its_bytes(run_file: Path) -> None:
    run = RunConfig.parse(yaml.safe_load((run_file / "run.yaml").read_text())).model_copy(
        update={"pretrained": "mistralai/Mistral-7B-v0.1", "retriever": "e5-mistral"}
    )
    corpus: Corpus = planner.plan(run, planner.PlanConfig(cluster=str(run_file / "cluster.yaml"))).setting.corpus
    assert corpus.error >= 0.3
    assert "the tokenizer is not on this machine" in corpus.note


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_flat_index_breaks_where_it_does_not_fit_by_its_own_bytes(run_file: Path, dtype: str) -> None:
    found = make_plan(run_file, {"embed": {"vector_dtype": dtype}}, num_passages=1_000_000)
    limit = next(limit for limit in found.passage_limits if "a flat index" in limit.what)
    memory_bytes = found.setting.cluster.largest.memory_bytes
    assert limit.at * found.index_bytes["flat"] / 1_000_000 == pytest.approx(0.7 * memory_bytes)
    assert found.index_bytes["flat"] == stage(found, "index").out_bytes


def test_tables_are_read_on_all_cpus_that_last_and_other_sources_by_one_process(run_file: Path, tmp_path: Path) -> None:
    """By hand: a thousand million bytes are 239 pieces of 4 MiB, and the cluster has 20 CPUs besides its GPU nodes."""
    nodes = [{"name": "head", "cpus": 4, "memory_gb": 32}, {"name": "cpu", "cpus": 16, "memory_gb": 64}]
    cluster = write(run_file, {"nodes": nodes}, "split.yaml")
    rows = "".join(json.dumps({"_id": str(number), "text": "x" * 100}) + "\n" for number in range(200))
    (tmp_path / "corpus.jsonl").write_text(rows)
    (tmp_path / "packed").mkdir()
    for number in range(3):
        with gzip.open(tmp_path / f"packed/{number}.jsonl.gz", "wt") as file:
            file.write(rows.replace('"_id": "', f'"_id": "{number}-'))

    def plan_of(name: str, **sections: Any) -> planner.Plan:
        own = {"source": str(tmp_path / name), "root": str(tmp_path / "none"), **sections}
        return make_plan(run_file, own, cluster=cluster, num_passages=10_000_000)

    split, packed = plan_of("corpus.jsonl"), plan_of("packed")
    near = plan_of("corpus.jsonl", ingest={"deduplicate": "near"})
    (tmp_path / "notes").mkdir()
    for number in range(9):
        (tmp_path / f"notes/{number}.txt").write_text(f"{number} " + "x" * 100)
    notes = plan_of("notes", ingest={"deduplicate": "near"})
    assert [stage(each, "ingest").workers for each in (split, packed, near, notes)] == [20, 3, 20, 1]
    per_byte = [(stage(each, "ingest").seconds - 1) / each.setting.corpus.text_bytes for each in (split, notes)]
    assert per_byte[0] == pytest.approx(per_byte[1] / 20)
    assert split.setting.corpus.with_num_passages(8_000_000).num_pieces == 191
    assert split.setting.corpus.with_num_passages(600_000).num_pieces == 1, "less than 64 MiB"
    said = [plan_report.text(each) for each in (split, notes)]
    assert "ingest takes over a day on 20 CPUs; more CPU nodes" in said[0] and "ingest holds" not in said[0]
    assert "ingest is one process: over a day" in said[1] and "ingest holds 4096 bytes" in said[1]


def test_what_ingest_holds_in_one_process_is_what_was_measured() -> None:
    file = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "ingesting.json"
    sizes = json.loads(file.read_text())
    small, large = (sizes[size]["one_process"]["driver_peak_mb"] for size in ("1000000", "4000000"))
    assert scaling._ID_BYTES["exact"] == pytest.approx((large - small) * 1e6 / 3_000_000, rel=0.15)


def test_drivers_hold_no_more_for_more_passages() -> None:
    file = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "bookkeeping.json"
    small, large = (json.loads(file.read_text())["sizes"][size] for size in ("1000000", "100000000"))
    grown = {stage: large[stage]["driver_GB"] - small[stage]["driver_GB"] for stage in small}
    assert len(grown) == 5
    assert max(grown.values()) <= 0.06


def test_the_table_of_other_sizes_says_of_this_size_what_the_plan_says(run_file: Path) -> None:
    found = make_plan(run_file, num_passages=10_000_000)
    same = write(run_file, {"nodes": [{**CLUSTER["nodes"][0], "count": 1}, CLUSTER["nodes"][1]]}, "one-node.yaml")
    alone = make_plan(run_file, num_passages=10_000_000, cluster=same)
    cell = found.grid[10_000_000][8]
    assert cell.seconds == pytest.approx(alone.costs[1].seconds)
    assert cell.usd == pytest.approx(alone.costs[1].usd)
    line = next(line for line in plan_report.text(found).splitlines() if line.startswith("10 M "))
    assert all(plan_report.duration(each.seconds) in line for each in found.grid[10_000_000].values())


def test_training_takes_a_week_at_the_size_from_which_the_plan_says_so(run_file: Path) -> None:
    found = make_plan(run_file, num_passages=1_000_000)
    limit = next(limit for limit in found.passage_limits if "over a week" in limit.what)
    at_limit = make_plan(run_file, num_passages=int(limit.at))
    assert stage(at_limit, "train").seconds == pytest.approx(7 * 86_400, rel=0.05)


def test_a_size_from_which_more_workers_do_not_help_shows_in_the_table(run_file: Path) -> None:
    """The limit of workers and the table come from the same estimates: beyond the limit the hours stay."""
    found = make_plan(run_file, num_passages=1_000_000)
    stuck = next(limit.at for limit in found.worker_limits if "get no faster" in limit.what)
    hours = found.grid[1_000_000]
    at = scaling.WORKERS.index(int(stuck))
    for fewer, more in itertools.pairwise(scaling.WORKERS[at:]):
        assert hours[more].seconds > 0.5 * hours[fewer].seconds
    assert hours[1].seconds > hours[8].seconds


def test_a_batch_that_cannot_feed_all_workers_is_a_problem_with_the_number_that_would(run_file: Path) -> None:
    (problem,) = make_plan(run_file, {"train": {"block_tokens": 64, "batch_size": 4}}).problems
    assert problem == (
        "adapter cannot run: a step has 4 blocks for 16 workers; give batch_size 16 or more, or num_workers 4 or fewer"
    )


def test_a_batch_of_its_own_choice_feeds_every_gpu_of_a_large_corpus_and_few_of_a_small_one(run_file: Path) -> None:
    train = {"block_tokens": 1024, "batch_size": "auto", "mode": "packed"}
    large = make_plan(run_file, {"train": train}, num_passages=10_000_000)
    assert stage(large, "train").workers == 16 and large.problems == []
    small = make_plan(run_file, {"train": train}, num_passages=500_000)
    tokens = 500_000 * small.setting.corpus.train_tokens
    assert stage(small, "train").workers == int(tokens / 500 / 16_384) < 16
    limit = next(limit.at for limit in small.worker_limits if "stay out of training" in limit.what)
    assert limit == stage(small, "train").workers


def test_gpu_nodes_that_are_asked_for_cost_their_start_their_work_and_their_idle_minutes(run_file: Path) -> None:
    """By hand: they are up from the start of training to the end of the last embedding, and five minutes on either side."""
    values = launcher(max_workers=10, cpu=2, gpu=8, idle_timeout_minutes=4)
    values["available_node_types"]["cpu"]["min_workers"] = 2
    found = make_plan(run_file, cluster=write(run_file, values, "launcher.yaml"), num_passages=10_000_000)
    prices = {name: PRICES.machines[kind].on_demand for name, kind in MACHINES.items()}
    train, merge, base, adapted, *_ = (
        stage_named(found, name).seconds for name in ("adapter", "adapted", "vectors/retriever", "vectors/adapted")
    )
    index = stage_named(found, "index/retriever").seconds
    working_s = train + max(merge, base) + max(index, adapted)
    before_s = sum(stage_named(found, name).seconds for name in ("corpus", "blocks"))
    cost = found.costs_of(
        [stage_named(found, name) for name in ("corpus", "blocks", "adapter", "adapted")] + found.stages[4:7]
    )[1]
    assert cost.seconds == pytest.approx(before_s + 300 + working_s)
    lasting, growing = prices["head"] + 2 * prices["cpu"], 8 * prices["gpu"]
    assert cost.waiting_usd == pytest.approx(growing * (300 + 240) / 3600)
    assert cost.usd == pytest.approx(lasting * cost.seconds / 3600 + growing * (300 + working_s + 240) / 3600)
    assert "4 idle minutes" in plan_report.text(found)


def test_ms_marco_on_eight_h100_takes_under_four_hours_and_150_usd(tmp_path: Path) -> None:
    """Adapter, merge and both arms of vectors, at 35% of the peak in training and 45% in embedding, nothing fetched."""
    values = yaml.safe_load((REPOSITORY / "jobs" / "e5-mistral.yaml").read_text())
    run = RunConfig.parse(values | {"source": "msmarco-passage", "root": str(tmp_path / "root")})
    found = planner.plan(run, planner.PlanConfig(cluster=str(REPOSITORY / "clusters" / "aws.yaml")))
    assert found.problems == []
    assert found.setting.corpus.num_passages == 8_841_823 and found.setting.corpus.error >= 0.3
    cost = found.costs_of(found.model_stages)[1]
    assert cost.seconds < 4 * 3600 and cost.usd < 150
    assert {each.workers for each in found.model_stages if each.needs_gpus} == {8}
    h100 = 8 * 989e12
    for each in found.model_stages:
        if each.needs_gpus:
            assert each.work / each.seconds / h100 <= (0.35 if each.stage == "train" else 0.45)
    said = plan_report.text(found)
    assert "train at 35% of a GPU's peak" in said and "embed at 45% of a GPU's peak" in said
    on_demand = found.on_demand_usd(found.model_stages)
    assert on_demand > 150
    (line,) = [line for line in said.splitlines() if " for adapter, merge and vectors, " in line]
    assert line.endswith(f"; {on_demand:,.0f} USD if no node is on spot")
    assert "gpu, p5.4xlarge, 2.96 on spot: computed, 43% of on demand" in said
    assert "gpu, p5.4xlarge, 6.88 on demand: github.com/datareceipts/data-receipts" in said


def test_each_price_of_the_aws_cluster_has_a_source_and_a_date() -> None:
    cluster = read_cluster(str(REPOSITORY / "clusters" / "aws.yaml"), PRICES)
    for group in cluster.groups:
        for spot in (False, True):
            source = PRICES.source_of(group.machine_type, spot=spot)
            assert "github.com/" in source and re.search(r"\b2026-\d\d\b", source)
    computed = {name: each for name, each in PRICES.machines.items() if each.spot_from == "ratio"}
    measured = PRICES.machines["p5en.48xlarge"]
    assert {"m7i.4xlarge", "p5.4xlarge"} <= computed.keys()
    for machine in computed.values():
        assert machine.spot == pytest.approx(machine.on_demand * measured.spot / measured.on_demand, rel=0.005)


def test_a_run_costs_more_where_no_node_is_on_spot(run_file: Path) -> None:
    """By hand: the same hours at the prices on demand."""
    nodes = [
        {"name": "gpu", "machine": "p5.48xlarge", "spot": True, "count": 2},
        {"name": "head", "machine": "m7i.xlarge"},
    ]
    found = make_plan(run_file, cluster=write(run_file, {"nodes": nodes}, "spot.yaml"), num_passages=1_000_000)
    hours = found.costs[1].seconds / 3600
    prices = PRICES.machines["p5.48xlarge"], PRICES.machines["m7i.xlarge"].on_demand
    assert found.costs[1].usd == pytest.approx(hours * (2 * prices[0].spot + prices[1]))
    assert found.on_demand_usd(found.stages) == pytest.approx(hours * (2 * prices[0].on_demand + prices[1]))
    assert plan_report.values(found)["usd"]["expected_on_demand"] == found.on_demand_usd(found.stages)
    without = make_plan(run_file, cluster=write(run_file, {"nodes": [{**nodes[0], "spot": False}]}, "no-spot.yaml"))
    assert "if no node is on spot" not in plan_report.text(without)


def test_a_corpus_of_the_catalog_is_planned_without_fetching_it(tmp_path: Path, run_file: Path) -> None:
    values = yaml.safe_load((run_file / "run.yaml").read_text()) | {"source": "scifact", "root": str(tmp_path / "new")}
    corpus = planner.plan(RunConfig.parse(values), planner.PlanConfig(cluster="local")).setting.corpus
    assert (corpus.num_passages, corpus.num_queries, corpus.text_bytes) == (5183, 300, pytest.approx(6 * 213.63))


def test_a_head_that_is_too_small_for_the_corpus_is_refused_before_anything_costs(run_file: Path) -> None:
    """8 GB hold 0.7 * 8e9 / 126 = 44 million passages of ingest's driver."""
    nodes = [{**CLUSTER["nodes"][0]}, {**CLUSTER["nodes"][1], "memory_gb": 8}]
    cluster = write(run_file, {"nodes": nodes}, "small-head.yaml")
    assert make_plan(run_file, cluster=cluster, num_passages=44_000_000).problems == []
    (problem,) = make_plan(run_file, cluster=cluster, num_passages=45_000_000).problems
    assert (
        problem.startswith("corpus cannot be made of 45,000,000 passages") and "(8 GB), from 44,444,444 on" in problem
    )


def test_a_stage_pays_for_as_many_gpu_nodes_as_it_has_workers(run_file: Path) -> None:
    cluster = write(run_file, launcher(max_workers=8, gpu=8, cpu=0), "launcher.yaml")
    few, all_of_them = (
        make_plan(run_file, {"train": {"block_tokens": 64, "batch_size": 8, "num_workers": count}}, cluster=cluster)
        for count in (2, 8)
    )
    trained = [stage(each, "train") for each in (few, all_of_them)]
    hourly = PRICES.machines[MACHINES["gpu"]].on_demand
    head = PRICES.machines[MACHINES["head"]].on_demand
    by_hand = [each.seconds / 3600 * (head + each.workers * hourly) for each in trained]
    assert [stage_usd(each, few.setting.cluster) for each in trained] == pytest.approx(by_hand)
    waiting = few.costs_of(trained[:1])[1]
    assert waiting.usd == pytest.approx(by_hand[0] + 300 / 3600 * head + waiting.waiting_usd)


@pytest.mark.parametrize(
    ("value", "as_count", "as_bytes"),
    [
        (0, "0", "0 B"),
        (999.6, "1 K", "1 KB"),
        (8.84e6, "8.84 M", "8.84 MB"),
        (1e9, "1 B", "1 GB"),
        (3e12, "3 T", "3 TB"),
        (2.4e16, "24,000 T", "24 PB"),
    ],
)
def test_numbers_have_the_units_that_people_use_and_bytes_those_of_bytes(value, as_count, as_bytes):
    assert (plan_report.count(value), plan_report.size(value)) == (as_count, as_bytes)


def test_the_week_of_training_is_the_same_seen_from_a_small_corpus_and_from_a_large_one(run_file: Path) -> None:
    def week(**options: Any) -> float:
        return next(limit.at for limit in make_plan(run_file, **options).passage_limits if "over a week" in limit.what)

    assert week(num_passages=300) == pytest.approx(week(num_passages=10_000_000), rel=0.01)
    at = int(week(num_passages=300))
    assert stage(make_plan(run_file, num_passages=at), "train").seconds == pytest.approx(7 * 86_400, rel=0.01)


def test_only_queries_that_are_judged_in_the_split_count(tmp_path: Path, run_file: Path) -> None:
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text("".join(f'{{"_id": "d{n}", "text": "text {n}"}}\n' for n in range(30)))
    (beir / "queries.jsonl").write_text("".join(f'{{"_id": "q{n}", "text": "query {n}"}}\n' for n in range(20)))
    for split, numbers in (("train", range(17)), ("test", (17, 18))):
        rows = "".join(f"q{n}\td{n}\t1\n" for n in numbers)
        (beir / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    own = {"source": str(beir), "root": str(tmp_path / "none")}
    assert make_plan(run_file, own).setting.corpus.num_queries == 2
    assert make_plan(run_file, {**own, "split": "train"}).setting.corpus.num_queries == 17
    corpus = ingest(IngestConfig(source=str(beir), output=str(tmp_path / "root" / "corpus")))
    assert corpus.manifest.counts["num_queries"] == 20
    known = make_plan(run_file, {"source": str(beir), "root": str(tmp_path / "root")}).setting.corpus
    assert (known.num_queries, known.num_passages) == (2, 30)
    given = {name: str(tmp_path / f"{name}.tsv") for name in ("queries", "qrels")}
    Path(given["queries"]).write_text("a\tone\nb\ttwo\nc\tthree\n")
    Path(given["qrels"]).write_text("a\t0\td1\t1\nc\t0\td2\t1\nc\t0\td3\t0\n")
    assert make_plan(run_file, {**own, **given}).setting.corpus.num_queries == 2


def test_a_general_collection_is_planned_by_its_own_size(tmp_path: Path, run_file: Path) -> None:
    (tmp_path / "general.jsonl").write_text("".join(f'{{"_id": "d{n}", "text": "text {n}"}}\n' for n in range(30)))
    plain, planned = make_plan(run_file), make_plan(run_file, {"general": {"source": str(tmp_path / "general.jsonl")}})
    assert planned.setting.general is not None
    assert planned.setting.general.num_passages == 30
    own, general = (
        next(each for each in planned.stages if each.name == f"{prefix}vectors/adapted") for prefix in ("", "general/")
    )
    tokens = [each.num_passages * each.embed_tokens for each in (planned.setting.corpus, planned.setting.general)]
    assert general.work / tokens[1] == pytest.approx(own.work / tokens[0], rel=0.2)
    assert tokens[1] < tokens[0] / 10
    assert "general/report" in {each.name for each in planned.stages}
    assert planned.passage_limits == plain.passage_limits
    assert "general  30 passages counted" in plan_report.text(planned)


def test_passages_are_planned_as_long_as_the_models_positions_let_pack_make_them(
    tmp_path: Path, run_file: Path
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"_id": "d1", "text": "tide " * 3000}) + "\n")
    planned = make_plan(
        run_file, {"source": str(tmp_path / "long.jsonl"), "root": str(tmp_path / "none"), "train": {"batch_size": 16}}
    )
    positions = json.loads((run_file / "base" / "config.json").read_text())["max_position_embeddings"]
    assert planned.setting.corpus.train_tokens == positions < 1024
