"""From a recipe and a cluster to a plan, and what bad input is told."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from crosschip.cli.guard import guarded
from crosschip.cli.planning import plan, plan_app, validate
from crosschip.errors import CrosschipError, RecipeError
from crosschip.plan.cluster import parse_cluster, read_cluster
from crosschip.plan.document import explain, plan_document
from crosschip.plan.hardware import kind_named
from crosschip.plan.host import host_cluster
from crosschip.plan.job import Job
from crosschip.plan.known_architectures import known_architecture
from crosschip.plan.layout_check import check_layout
from crosschip.plan.planning import plan_run, thin_link_of
from crosschip.plan.search import find_layouts
from crosschip.plan.step import Layout
from crosschip.plan.whole_run import Asked, plan_whole_run
from crosschip.recipe import Recipe, load_recipe, parse_recipe
from crosschip.thin_links import Link, choose

ROOT = Path(__file__).parent.parent.parent
FIRST, CLUSTERS = ROOT / "recipes" / "first.toml", ROOT / "clusters"


def test_shipped_clusters() -> None:
    names = {path.stem for path in CLUSTERS.glob("*.toml")}
    assert {"h800x2048", "h100x16384", "ascend910b-x8192", "cloudmatrix384", "h200x8"} <= names
    for path in CLUSTERS.glob("*.toml"):
        if path.stem.startswith("cambricon"):
            with pytest.raises(RecipeError, match="no figures are known for Cambricon MLU590: bf16_tflops"):
                read_cluster(path)
        else:
            assert all(figure.source for figure in read_cluster(path).figures.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chip": "Unheard-of 9000"}, "no figures are known"),
        ({"num_chips": 0}, "num_chips"),
        ({"num_chips": "8"}, "num_chips"),
        ({"prise": {}}, "prise"),
        ({"figures": {"bf16_tflop": {"value": 1.0, "origin": "measured", "source": "x"}}}, "bf16_tflop is no figure"),
        ({"figures": {"bf16_tflops": {"value": -1.0, "origin": "measured", "source": "x"}}}, "greater than 0"),
        ({"figures": {"bf16_tflops": {"value": 1.0, "origin": "guessed", "source": "x"}}}, "origin"),
        ({"figures": {"bf16_tflops": {"value": 1.0, "origin": "measured", "source": ""}}}, "source"),
        ({"figures": {"product_share": {"value": 80.0, "origin": "measured", "source": "x"}}}, "product_share = 80"),
    ],
)
def test_a_wrong_cluster_is_refused_by_key(change: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_cluster({"name": "x", "chip": "H100", "num_chips": 8, **change}, "x.toml")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Atlas 800T A2", "Ascend 910B"),
        ("Atlas 900 A3 SuperPoD", "Ascend 910C"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA A2", None),  # a small card of another vendor
        ("NVIDIA A30", None),
    ],
)
def test_a_chip_is_told_by_its_name(name: str, kind: str | None) -> None:
    found = kind_named(name)
    assert (found.kind if found else None) == kind


def test_given_figures_count_more_and_complete_an_unknown_chip() -> None:
    def given(value: float) -> dict[str, object]:
        return {"value": value, "origin": "measured", "source": "me"}

    keys = ("bf16_tflops", "memory_gb", "memory_gb_s", "link_gb_s", "network_gb_s")
    document = {"name": "x", "chip": "MLU", "num_chips": 8, "node_size": 8, "figures": {k: given(100.0) for k in keys}}
    found = parse_cluster(document, "x.toml")
    assert found.hardware.bf16_flops == 100e12
    with pytest.raises(RecipeError, match="node_size is not given") as caught:
        parse_cluster({key: value for key, value in document.items() if key != "node_size"}, "x.toml")
    assert "`node_size = 8`" in caught.value.remedy
    known = parse_cluster({**document, "chip": "H100"}, "x.toml")
    assert known.figures["bf16_tflops"].origin == "measured"
    assert known.figures["fp8_tflops"].origin == "published"


def test_the_search_is_best_first_and_says_why_others_lose() -> None:
    model, chip = known_architecture("Llama 3.1 405B"), kind_named("H100")
    assert model is not None
    assert chip is not None
    job = Job(model, 8192, 2048)
    found = find_layouts(job, 16384, chip)
    times = [each.step_s for each in found.best]
    assert times == sorted(times)
    assert all(each.memory_bytes <= chip.memory_bytes for each in found.best)
    assert all(check_layout(job, each.layout, 16384) is None for each in found.best)
    assert any("does not fit" in each.reason for each in found.losers)
    assert any("slower, most of it" in each.reason for each in found.losers)


def test_what_cannot_be_is_told() -> None:
    model, chip = known_architecture("Llama 3.1 405B"), kind_named("A100-40GB")
    assert model is not None
    assert chip is not None
    with pytest.raises(RecipeError, match="does not fit on 8"):
        find_layouts(Job(model, 8192, 8), 8, chip)
    reason = check_layout(Job(model, 8192, 10), Layout(data=8), 8)
    assert reason is not None
    assert "no multiple" in reason
    recipe = load_recipe(FIRST)
    with pytest.raises(RecipeError, match=r"train\.batch_size = 32 cannot be shared") as caught:
        plan_run(recipe, read_cluster(CLUSTERS / "h800x2048.toml"))
    assert "train.batch_size = 2048" in caught.value.remedy


def test_stages_beyond_the_layers_are_for_the_embedding_and_the_output_of_a_pipeline_of_more_than_two() -> None:
    model, chip = known_architecture("Llama 3.1 405B"), kind_named("H100")
    assert model is not None
    assert chip is not None
    model = replace(model, num_layers=30)

    def refused(pipeline: int, interleave: int) -> str | None:
        layout = Layout(data=1, pipeline=pipeline, interleave=interleave)
        return check_layout(Job(model, 8192, 64), layout, pipeline)

    assert refused(4, 8) is None  # 32 chunks: 30 of a layer each, and two without
    assert refused(5, 7) == "5 x 7 stages are more than 30 layers and one each for the embedding and the output"
    assert refused(2, 15) is None
    assert refused(2, 16) == "2 x 16 stages are more than 30 layers"


def test_a_plan_of_this_machine_as_a_document() -> None:
    cluster, asked, recipe = host_cluster(), Asked(date.today(), num_trials=50), load_recipe(FIRST)
    document = plan_document(plan_whole_run(recipe, cluster, asked))
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert sum(document["step"]["parts_s"].values()) == pytest.approx(document["step"]["step_s"]["value"])
    for figure in document["step"]["figures"].values():
        assert figure["unit"]
        assert figure["origin"] in ("measured", "published", "assumed", "computed", "given")
    assert recipe.train is not None
    assert explain(document, "counts.steps")["value"] == recipe.train.steps
    with pytest.raises(RecipeError, match="there is no 'nothing'"):
        explain(document, "step.nothing")
    with pytest.raises(CrosschipError, match="before"):
        plan_whole_run(load_recipe(FIRST), cluster, replace(asked, by=date.today() - timedelta(2)))


def command_line() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    plan_app.registered_commands.clear()
    plan_app.command("run", hidden=True)(guarded(plan))
    plan_app.command("validate")(guarded(validate))
    app.add_typer(plan_app, name="plan")
    return app


def test_the_verb(tmp_path: Path) -> None:
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    arguments = [
        "plan",
        str(FIRST),
        "--cluster",
        str(CLUSTERS / "h200x8.toml"),
        "--json",
        str(out),
        "--page",
        str(page),
    ]
    ended = CliRunner().invoke(command_line(), arguments)
    assert ended.exit_code == 0, ended.output
    assert "of the datasheet's rate" in ended.output
    assert json.loads(out.read_text())["document"] == "plan"
    assert "<html" in page.read_text()


REFUSED = [["--by", "2020-01-01"], ["--by", "soon"], ["--cluster", "nowhere.toml"], ["--explain", "x"]]


@pytest.mark.parametrize("more", REFUSED)
def test_the_verb_refuses(more: list[str]) -> None:
    ended = CliRunner().invoke(command_line(), ["plan", str(FIRST), *more])
    assert ended.exit_code == 2
    assert "what to do" in ended.output


def recipe(text: str) -> Recipe:
    return parse_recipe({"name": "r", "data": {"source": "arithmetic"}, **tomllib.loads(text)}, "r.toml")


GROUPS = "[train]\nsteps = 100\n[links]\nbandwidth_mbit_s = 100\n[groups]\nnum_groups = 2\n"


BIG, STEP_S, RANKS = 35_000_000, 1.0, 2


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ('mode = "every-step"', (1, 4.0, 1, True)),
        ('mode = "every-step"\ncompression = "int8"', (1, 1.03125, 1, True)),
        ('mode = "diloco"\nsync_every = 30\ncompression = "int8"', (30, 1.03125, 1, False)),
        ('mode = "diloco"\nsync_every = 30\ncompression = "none"\nfragments = 3', (30, 4.0, 3, False)),
    ],
)
def test_what_groups_send_is_what_the_trainer_sends(more: str, expected: tuple[int, float, int, bool]) -> None:
    link, _ = thin_link_of(recipe(GROUPS + more), BIG, STEP_S, RANKS)
    assert (link.sync_every, link.bytes_per_parameter, link.fragments, link.averages_gradients) == expected


def test_what_is_left_open_between_groups_is_what_the_trainer_chooses(tmp_path: Path) -> None:
    thin = recipe(GROUPS)
    link, reason = thin_link_of(thin, BIG, STEP_S, RANKS)
    chosen = choose(thin.groups, Link(12.5e6, 0.0), BIG, STEP_S, RANKS)
    assert (link.sync_every, link.overlap_steps, reason) == (chosen.sync_every, chosen.overlap_steps, chosen.reason)
    assert chosen.mode == "diloco"
    assert thin_link_of(recipe(GROUPS.replace("= 100\n[groups", "= 1e6\n[groups")), BIG, STEP_S, RANKS)[
        0
    ].averages_gradients
    report = tmp_path / "links.json"
    report.write_text(json.dumps([{"check": "pairs", "bandwidth_gb_s": 0.0125, "latency_s": 0.0}]))
    told = recipe(GROUPS.replace("bandwidth_mbit_s = 100", f'report = "{report}"'))
    assert thin_link_of(told, BIG, STEP_S, RANKS)[0] == link
    with pytest.raises(RecipeError, match="nothing is known of the link") as caught:
        thin_link_of(recipe(GROUPS.replace("[links]\nbandwidth_mbit_s = 100\n", "")), BIG, STEP_S, RANKS)
    assert "bandwidth_mbit_s" in caught.value.remedy


def test_the_plan_of_groups_loses_what_the_trainer_predicts_to_lose() -> None:
    of = recipe(GROUPS.replace("steps = 100", "steps = 100\nbatch_size = 64"))
    found = plan_run(of, read_cluster(CLUSTERS / "h200x8.toml"))
    (told,) = [note for note in found.notes if "pretrain: DiLoCo" in note]
    alone_s = found.best.step_s - found.best.parts["outer step"]
    assert f"utilisation {alone_s / found.best.step_s:.1%}" in told


def test_what_the_trainer_does_otherwise_is_said() -> None:
    one = read_cluster(CLUSTERS / "h200x8.toml")
    text = '[train]\nsteps = 100\nbatch_size = 4096\ndtype = "float32"\nlora_rank = 4\n'
    notes = plan_run(recipe(text), one).notes
    for words in ("lora_rank", "fp32 is slower", "train.gradient_accumulation = "):
        assert any(words in note for note in notes), words
    (parts,) = (each.split("gradient_accumulation = ")[1].split()[0] for each in notes if "accumulation" in each)
    told = plan_run(recipe(text + f"gradient_accumulation = {parts}\n"), one).notes
    assert not any("accumulation" in note for note in told)
    held = plan_run(recipe(text), one, fixed={"recompute": "full"}).notes
    assert any("recomputes no activations" in note for note in held)
