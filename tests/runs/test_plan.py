"""Test plan.py: what a run will take is counted before, and is enough."""

import io
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_run
from rich.console import Console
from tiny_run import fuselm
from transformers import AutoModelForCausalLM

from fuselm.cli import main as cli
from fuselm.runs import calibration, config, plan, plan_advice
from fuselm.runs.estimates import Estimate, sum_disk
from fuselm.runs.pipeline import Pipeline
from fuselm.runs.stages import train
from fuselm.sources import prompts, resumable_writing
from fuselm.system import compiling, library_output, manifest
from fuselm.training import adapters
from fuselm.training.objective import fusion_loss


@pytest.fixture
def run_file(tmp_path, byte_level, sentence_piece, texts) -> Path:
    return tiny_run.write(
        tmp_path, target=byte_level, sources={"own": byte_level, "other": sentence_piece}, rows=tiny_run.short(texts)
    )


def pipeline_of(run_file: Path, *given: str) -> Pipeline:
    pipeline = Pipeline(config.load(run_file, given), Console(file=io.StringIO()))
    pipeline.start()
    return pipeline


TITLES = [
    "capture own",
    "capture other",
    "align own",
    "align other",
    "fuse",
    "train clm at 0.003",
    "train fused at 0.003",
    "evaluate base",
    "evaluate other",
    "evaluate clm",
    "evaluate fused",
    "report",
]


def test_plan_prints_json_of_the_same_stages(run_file):
    outcome = fuselm("plan", run_file, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert [stage["title"] for stage in found["stages"]] == TITLES
    assert set(found["tokens"]) == {"target", "own", "other"} and found["problems"] == []
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    assert found["disk_bytes"] > 0 and len(found["captures"]) == 2


def test_plan_prints_a_table_of_what_is_to_come(run_file):
    outcome = fuselm("plan", run_file)
    assert outcome.code == 0, outcome.err
    for heading in (
        "tokens of",
        "train",
        "dev",
        "heldout",
        "stage",
        "keeps",
        "tokens",
        "disk",
        "kept",
        "memory",
        "time",
        "in all",
    ):
        assert heading in outcome.out
    for title in TITLES:
        assert title in outcome.out
    assert re.search(r"sampled 13: \d+\.\d, \d+%", " ".join(outcome.out.split()))
    assert "calibrating" in outcome.err and "calibrating" not in outcome.out
    assert re.search(r"planned in \d+ s$", outcome.out.rstrip())
    assert not (run_file.parent / "out" / "capture").exists()


def test_plan_of_a_finished_run_has_nothing_to_do(run_file):
    assert fuselm("run", run_file).code == 0
    outcome = fuselm("plan", run_file)
    assert outcome.code == 0 and "nothing to do" in outcome.out and "calibrating" not in outcome.err


def test_estimates_are_of_the_steps_of_the_run_with_their_tokens(run_file):
    pipeline = pipeline_of(run_file)
    estimates = {e.title: e for e in plan.estimate(pipeline)}
    assert list(estimates) == TITLES
    counted = manifest.read(pipeline.make_corpus())["counts"]["tokens"]
    own, other = (counted[pipeline.inputs.sources[name].tokenizer_fingerprint] for name in ("own", "other"))
    assert estimates["capture own"].tokens == own["train"] and estimates["capture other"].tokens == other["train"]
    assert estimates["align other"].tokens == estimates["fuse"].tokens == own["train"]
    passes = tiny_run.TRAIN["passes"]
    assert estimates["train fused at 0.003"].tokens == own["train"] * passes
    assert estimates["train clm at 0.003"].tokens == own["train"] * 2
    assert (
        estimates["evaluate other"].tokens == other["heldout"] and estimates["evaluate fused"].tokens == own["heldout"]
    )


def test_disk_is_an_upper_bound(run_file):
    pipeline = pipeline_of(run_file)
    estimates = {e.title.split(",")[0]: e.disk for e in plan.estimate(pipeline)}
    assert fuselm("run", run_file).code == 0
    out = run_file.parent / "out"
    overhead = 80_000  # of a Parquet file, a page, a log, a tokenizer: next to nothing beside real stores and models
    for title, disk in estimates.items():
        stage, _, name = title.partition(" ")
        for folder in (out / stage).glob(f"{name}-*" if name else "*"):
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            assert size <= disk + overhead, title


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft
def test_adapters_need_no_disk_for_all_weights(run_file, byte_level):
    pytest.importorskip("peft")
    pipelines = [
        Pipeline(config.load(run_file, given), Console(file=io.StringIO())) for given in ([], ["train.lora_rank=1"])
    ]
    whole, lora = (next(e.scratch for e in plan.estimate(p) if e.title.startswith("train fused")) for p in pipelines)
    model = AutoModelForCausalLM.from_pretrained(byte_level)
    adapted = adapters.add_adapters(model, rank=1, alpha=2.0, dropout=0.0, modules=None)
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    states = train.CHECKPOINTS * (train.STATE_BYTES + train.MEAN_BYTES) * trained
    assert states <= lora < whole / 3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft
@pytest.mark.parametrize(
    ("given", "least", "most"),
    [("train.batch_documents=1", 1, 1), ("train.pack_tokens=293", 3, 293), ("train.lora_rank=1", 2, 2)],
)
def test_a_training_batch_is_measured_as_it_will_be(run_file, given, least, most, monkeypatch):
    """Check the least number of documents in a batch, or the most tokens where documents are packed."""
    pytest.importorskip("peft")
    given = [given, *(["train.batch_documents=null"] if "pack" in given else [])]
    pipeline = Pipeline(config.load(run_file, given), Console(file=io.StringIO()))
    documents = [d for d in pipeline.documents if d.split == "train"]
    lengths = pipeline.inputs.target_vocabulary.count_tokens([d.text for d in documents])
    seen = []

    def spied(hidden, *arguments):
        seen.append((len(hidden), hidden.requires_grad))
        return fusion_loss(hidden, *arguments)

    monkeypatch.setattr(calibration, "fusion_loss", spied)
    assert calibration.measure_training(
        pipeline, documents, settings=calibration.read_settings(pipeline, "clm", "float32")
    )
    tokens, learns = seen[-1]
    assert learns and tokens >= sum(sorted(lengths)[:least])
    assert tokens <= (most if most == 293 else sum(sorted(lengths)[-most:]))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second disk")
def test_stores_on_another_disk_need_their_room_there(run_file, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as second:
        pipeline = pipeline_of(run_file, f"store_dir={second}/not/made/yet")
        rows = [row for row in plan.estimate(pipeline) if row.is_shared]
        needed = sum(row.disk for row in rows)
        assert {row.title.split()[0] for row in rows} == {"capture", "align"}
        room = {Path(second): needed, pipeline.folder: 1 << 40}
        monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: type("Usage", (), {"free": room[path]})())
        plan.check_disk(pipeline)
        room[Path(second)] -= 1
        with pytest.raises(ValueError, match=rf"{second}: .* free, but .*; make room, set another `store_dir`, "):
            plan.check_disk(pipeline)
        room |= {Path(second): 1 << 40, pipeline.folder: 1}
        with pytest.raises(ValueError, match=r"out: .* free, but .*; make room, set another `output`, "):
            plan.check_disk(pipeline)


def test_the_disk_is_checked_against_what_is_still_to_come(run_file, monkeypatch):
    pipeline = pipeline_of(run_file)
    rows = plan.estimate(pipeline)
    needed = sum(e.disk for e in rows) + max(e.scratch for e in rows)

    def free(count: int) -> None:
        monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: type("Usage", (), {"free": count})())

    free(needed)
    plan.check_disk(pipeline)
    free(needed - 1)
    with pytest.raises(ValueError, match=r"GiB free, but the run may need .*; make room, "):
        plan.check_disk(pipeline)
    monkeypatch.undo()
    pipeline.capture()
    free(needed - 1)
    plan.check_disk(pipeline)


def test_of_several_trainings_only_one_has_checkpoints_at_a_time(run_file):
    one, three = (
        sum_disk(plan.estimate(pipeline_of(run_file, f"train.learning_rate={rates}")))
        for rates in ("[1e-3]", "[1e-3, 2e-3, 3e-3]")
    )
    assert three - one == 4 * pipeline_of(run_file).inputs.target.parameters_bytes  # two more models of each method


def test_what_an_interrupted_training_has_written_is_not_asked_for_again(run_file):
    pipeline = pipeline_of(run_file)
    needed = sum_disk(plan.estimate(pipeline))
    step = next(s for s in pipeline.dry_run() if s.title.startswith("train fused"))
    written = step.folder.with_name(step.folder.name + ".partial") / "checkpoints/checkpoint-2/optimizer.pt"
    written.parent.mkdir(parents=True)
    written.write_bytes(bytes(12_345))
    assert sum_disk(plan.estimate(pipeline)) == needed - 12_345
    written.write_bytes(bytes(99_999_999))  # more than it can need again
    row = next(e for e in plan.estimate(pipeline) if e.title == step.title)
    assert sum_disk(plan.estimate(pipeline)) == needed - row.disk - row.scratch


def test_plan_counts_what_has_to_be_compiled_once(run_file, monkeypatch):
    seconds = {}
    for of_stage in (0.0, 1000.0):
        monkeypatch.setattr(compiling, "estimate_seconds", lambda stage, of_stage=of_stage: of_stage)
        monkeypatch.setattr(calibration, "measure_writing", lambda *_: 1e9)
        for name in ("measure_reading", "measure_training"):
            measured = calibration.Measured(speed=1.0, capture_speed=1.0)
            monkeypatch.setattr(calibration, name, lambda *_, measured=measured, **__: measured)
        rows, _, _ = plan.calibrate(pipeline_of(run_file))
        seconds[of_stage] = {row.title: row.seconds for row in rows}
    later = {title: seconds[1000.0][title] - seconds[0.0][title] for title in seconds[0.0]}
    assert {title: round(s) for title, s in later.items() if s} == {"align own": 1000, "fuse": 1000}


def test_plan_loads_each_model_once_to_read_and_the_target_once_to_train(run_file, monkeypatch):
    loaded = []
    for module, name in ((calibration.capture, "load_source"), (calibration.target_training, "load_target")):
        load = getattr(module, name)

        def count(model, *arguments, load=load, name=name, **options):
            loaded.append((name, Path(model.name).name))
            return load(model, *arguments, **options)

        monkeypatch.setattr(module, name, count)
    plan.calibrate(pipeline_of(run_file))
    assert loaded == [("load_source", "byte_level"), ("load_source", "sentence_piece"), ("load_target", "byte_level")]


def test_time_that_does_not_grow_with_the_text_is_counted(run_file, monkeypatch):
    """Loading is counted for each model that a step loads; scores and checkpoints for each evaluation."""
    seconds = {}
    for loading, bytes_a_second in ((0.0, 1e12), (1000.0, 1e12), (0.0, 1.0)):
        monkeypatch.setattr(calibration, "measure_writing", lambda *_, speed=bytes_a_second: speed)
        for name in ("measure_reading", "measure_training"):
            measured = calibration.Measured(speed=1e9, capture_speed=1e9, loading=loading)
            monkeypatch.setattr(calibration, name, lambda *_, measured=measured, **__: measured)
        rows, _, _ = plan.calibrate(pipeline_of(run_file))
        seconds[loading, bytes_a_second] = {row.title.split(",")[0]: row.seconds for row in rows}
    nothing, loads, writes = seconds.values()
    more = {title: round((loads[title] - nothing[title]) / 1000) for title in nothing}
    assert more == {
        "capture own": 1, "capture other": 1, "align own": 0, "align other": 0, "fuse": 0, "report": 3,
        "train clm at 0.003": 3, "train fused at 0.003": 3,
        "evaluate base": 1, "evaluate other": 1, "evaluate clm": 1, "evaluate fused": 1,
    }  # fmt: skip
    pipeline = pipeline_of(run_file)
    parameters = train.count_trained_parameters(pipeline.inputs.target, None)
    for method in ("clm", "fused"):
        options = pipeline.run.train.for_method(method)
        state = train.STATE_BYTES + (train.MEAN_BYTES if options.average else 0)
        written = options.passes * options.evaluations_per_pass * state * parameters
        written += pipeline.inputs.target.parameters_bytes
        assert writes[f"train {method} at 0.003"] - nothing[f"train {method} at 0.003"] == pytest.approx(
            written, rel=1e-6
        )


def test_what_is_read_in_front_of_documents_is_counted(run_file):
    pipeline = pipeline_of(run_file, "capture.prefix_tokens=11")
    documents = [d for d in pipeline.documents if d.split == "train"]
    whole = calibration.measure_reading(pipeline, "other", documents, dtype="float32")
    part = calibration.measure_reading(pipeline, "other", documents[:5], dtype="float32")
    assert part.capture_speed == pytest.approx(0.8 * part.speed)  # as in a large corpus
    assert 0.5 * whole.speed < whole.capture_speed < whole.speed
    without = calibration.measure_reading(
        pipeline_of(run_file, "capture.prefix_tokens=0"), "other", documents, dtype="auto"
    )
    assert without.capture_speed == without.speed


def test_an_error_comes_below_the_tables_and_leaves_out_one_stage_alone(run_file, monkeypatch):
    def fails(*_, **__):
        raise ValueError("other: cannot be read here")

    read = calibration.measure_reading
    monkeypatch.setattr(
        calibration,
        "measure_reading",
        lambda pipeline, name, *a, **k: (fails if name == "other" else read)(pipeline, name, *a, **k),
    )
    order = []
    monkeypatch.setattr("sys.stdout", _Recorder(order, "out"))
    monkeypatch.setattr("sys.stderr", _Recorder(order, "err"))
    monkeypatch.setattr("sys.argv", ["fuselm", "plan", str(run_file)])
    for name, value in {**library_output.QUIET, "COLUMNS": "211"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    shown = "".join(text for _, text in order)
    for heading in ("tokens of", "GFLOP/s", "capture own", "evaluate fused", "in all"):
        assert heading in shown and shown.index(heading) < shown.index("fuselm: other: cannot be read here")
    assert shown.rstrip().endswith("other: cannot be read here") and shown.count("cannot be read here") == 1


def test_a_disk_that_is_too_small_is_said_below_what_would_be_needed(run_file, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1})())
    outcome = fuselm("plan", run_file)
    assert outcome.code == 2 and "in all" in outcome.out and "GiB free, but the run may need" in outcome.err


class _Recorder(io.StringIO):
    """Record what is written, in the order in which several streams are written to."""

    def __init__(self, order: list[tuple[str, str]], name: str):
        super().__init__()
        self._order, self._name = order, name

    def write(self, text: str) -> int:
        self._order.append((self._name, text))
        return len(text)


def test_a_plan_of_a_sample_estimates_all_texts_and_reads_few(tmp_path, run_file, byte_level, texts):
    rows, texts_file = tiny_run.short(texts), tmp_path / "many.jsonl"
    with open(texts_file, "w") as file:
        for n in range(1200):
            file.writelines(json.dumps(row | {"text": f"{n} {row['text']}"}) + "\n" for row in rows)
    options = [f"corpus.files=[{texts_file}]", f"output={tmp_path / 'sampled'}"]
    outcome = fuselm("plan", run_file, "--json", "--sample", "1", *options)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["sampled_factor"] == pytest.approx(texts_file.stat().st_size / 1e6, rel=0.05)
    vocabulary = Pipeline(config.load(run_file), Console(file=io.StringIO())).inputs.target_vocabulary
    whole = sum(vocabulary.count_tokens([json.loads(line)["text"] for line in texts_file.read_text().splitlines()]))
    assert sum(found["tokens"]["target"].values()) == pytest.approx(whole, rel=0.1)
    parts = {stage["title"]: stage["parts"] for stage in found["stages"]}
    assert parts["capture own"] == -(-found["tokens"]["own"]["train"] // resumable_writing.WINDOW_TOKENS)
    assert parts["align own"] == parts["fuse"] >= 1 and parts["report"] == 0
    assert not (tmp_path / "sampled").exists()


def test_advice_is_to_share_long_stages_and_to_make_many_rows_while_training(run_file):
    hours = {"capture own": 130.0, "align own": 13.0, "train clm": 99.0}
    rows = [
        Estimate(title=title, tokens=1, disk=30 << 30, seconds=3600 * taken, parts=0 if "train" in title else 1009)
        for title, taken in hours.items()
    ]
    share, other, load = plan_advice.advise(config.load(run_file), rows)
    assert share.startswith("capture own: ") and "let 11 share its 1,009 parts" in share and "let 2 share" in other
    assert "30 GiB; fuse.when=load" in load
    assert len(plan_advice.advise(config.load(run_file, ["fuse.when=load"]), rows)) == 2
    assert plan_advice.advise(config.load(run_file), [replace(row, seconds=1.0, disk=1) for row in rows]) == []


def test_a_dataset_is_not_sampled(run_file, tmp_path):
    outcome = fuselm("plan", run_file, "--sample", "1", "corpus.files=[]", f"corpus.dataset={tmp_path}")
    assert outcome.code == 2 and "set corpus.dataset.limit instead" in outcome.err


def test_texts_that_a_source_writes_are_made_in_batches(run_file, monkeypatch):
    monkeypatch.setattr(prompts, "BATCH", 2)
    pipeline = pipeline_of(run_file, "write.ratio={other: 0.5}", "write.tokens=13")
    (written,) = [row for row in plan.estimate(pipeline) if row.title == "write other"]
    assert written.parts == -(-written.tokens // (2 * 13)) > 1
