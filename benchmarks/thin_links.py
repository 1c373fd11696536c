"""Two groups over links of 1 Gb/s, 100 Mb/s and 10 Mb/s with delay: utilisation, bytes on the wire, and the loss.

python benchmarks/thin_links.py --json docs/results/thin_links.json        (as root: it makes network namespaces)

For each link the way to train is chosen as `mode = "auto"` does, from the link and the measured time of a step; beside
it stand a few steps that average each step over the same link. `--loss-steps` compares the validation loss at equal
tokens between averaging each step and DiLoCo, over the loopback interface. `--slow-drill` trains a recipe with
`crosschip train` over such a link, which really becomes slow meanwhile, in both ways: how soon that is told.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the namespaces and the relay are those of the tests of the links exam

from thin_links_group import Options  # noqa: E402

from crosschip.chips import find_chip, fingerprint  # noqa: E402
from crosschip.recipe import GroupSettings  # noqa: E402
from crosschip.rundir import write_json, write_text  # noqa: E402
from crosschip.thin_links import Choice, Link, choose  # noqa: E402
from crosschip.train.outer.lighthouse import Lighthouse  # noqa: E402
from tests.qualify.exams.links.namespaces import ADDRESS_A, MASTER_PORT, shaped_link, why_not  # noqa: E402
from tests.train.outer.slow_link_drill import DELAY_MS, RATE_MBIT, drill_slow_link  # noqa: E402

LINKS = ((1000, 0.5), (100, 25.0), (10, 25.0))  # Mbit/s, and milliseconds one way
EACH_STEP = Choice("every-step", "none", "each step")
LIMIT_S = 3600
SLOW_DRILL_SETTINGS = (
    "train.steps=1000000", "train.batch_size=8", "train.checkpoint_every=1000", "train.validate_every=1000000",
    "train.sample_every=1000000", f"links.bandwidth_mbit_s={RATE_MBIT}", f"links.latency_ms={DELAY_MS}",
)  # fmt: skip
SLOW_DRILLS = {"every-step": ("groups.mode=every-step",), "diloco": ("groups.mode=diloco", "groups.sync_every=10")}


def run_groups(all_options: Sequence[Options], nodes: Sequence[str] | None) -> list[dict[str, Any]]:
    """Train all groups at once, each in its namespace where there are some; what each measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    if nodes is not None:
        environment["GLOO_SOCKET_IFNAME"] = "eth0"
    processes = []
    try:
        for number, options in enumerate(all_options):
            where = [] if nodes is None else ["ip", "netns", "exec", nodes[number]]
            processes.append(
                subprocess.Popen([*where, *options.command()], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
            )
        found = []
        for process in processes:
            output, _ = process.communicate(timeout=LIMIT_S)
            if process.returncode != 0:
                raise SystemExit(f"a group ended with exit code {process.returncode}")
            found.append(json.loads(output))
        return found
    finally:
        for process in processes:
            process.kill()
            process.wait()


def together(arguments: argparse.Namespace, choice: Choice, num_groups: int, num_steps: int, lighthouse: str,
             nodes: Sequence[str] | None = None) -> list[dict[str, Any]]:  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="crosschip-thin-") as directory:
        options = [
            Options(
                group=group,
                num_groups=num_groups,
                lighthouse=lighthouse,
                log=f"{directory}/{group}.log",
                num_steps=num_steps,
                choice=asdict(choice),
                hidden_size=arguments.hidden_size,
                num_layers=arguments.num_layers,
                batch_size=arguments.batch_size,
                seq_len=arguments.seq_len,
                learning_rate=arguments.learning_rate,
                chip=arguments.chip,
                vocabulary=arguments.vocabulary,
                contexts=arguments.contexts,
            )
            for group in range(num_groups)
        ]
        return run_groups(options, nodes)


def step_of_two(arguments: argparse.Namespace) -> tuple[float, int]:
    """Seconds of a step when two groups compute at once on this machine, and the number of parameters."""
    lighthouses = [Lighthouse(), Lighthouse()]
    try:
        with tempfile.TemporaryDirectory(prefix="crosschip-thin-") as directory:
            options = [
                Options(0, 1, lighthouse.address, f"{directory}/{number}.log", 6, asdict(EACH_STEP),
                        hidden_size=arguments.hidden_size, num_layers=arguments.num_layers,
                        batch_size=arguments.batch_size // 2)
                for number, lighthouse in enumerate(lighthouses)
            ]  # fmt: skip
            found = run_groups(options, None)
    finally:
        for lighthouse in lighthouses:
            lighthouse.close()
    return sum(each["computing_s"] for each in found) / 12, int(found[0]["num_parameters"])


def summary(found: Sequence[dict[str, Any]], num_steps: int, sync_every: int) -> dict[str, Any]:
    computing, wall = sum(each["computing_s"] for each in found), sum(each["wall_s"] for each in found)
    # Groups that share a machine take turns at being the slower one, and who comes first waits whatever the link: what
    # even the last to come has waited in an interval is what the exchange took.
    waits = [[*each["waits_s"][:-2], sum(each["waits_s"][-2:])] for each in found]
    last_waited_s = sum(
        min(sum(each[first : first + sync_every]) for each in waits) for first in range(0, num_steps, sync_every)
    )
    return {
        "utilisation": computing / wall,
        "utilisation_of_the_last": 1 - last_waited_s * len(found) / wall,
        "wire_bytes_per_step": max(each["wire_bytes"] or 0 for each in found) / num_steps,
        "sent_bytes_per_step": found[0]["sent_bytes"] / num_steps,
        "validation_loss": found[0]["validation_loss"],
        "num_steps": num_steps,
    }


def over_a_link(arguments: argparse.Namespace, rate_mbit: int, delay_ms: float, step_s: float, num: int) -> Any:
    """One link: the way that is chosen for it, and averaging each step."""
    link = Link(rate_mbit * 1e6 / 8, delay_ms / 1e3)
    choice = choose(GroupSettings(num_groups=2), link, num, step_s)
    print(f"{rate_mbit} Mbit/s, {delay_ms} ms: {choice.reason}", flush=True)
    result: dict[str, Any] = {"rate_mbit_s": rate_mbit, "delay_ms": delay_ms, "choice": asdict(choice)}
    for name, way, num_steps in (
        ("chosen", choice, arguments.steps),
        ("each_step", EACH_STEP, arguments.each_steps),
    ):
        with shaped_link(rate_mbit, delay_ms) as nodes:
            beacon = subprocess.Popen(
                ["ip", "netns", "exec", nodes[0], sys.executable, "-m", "crosschip.train.outer.lighthouse", "--bind",
                 f"{ADDRESS_A}:{MASTER_PORT}"], cwd=ROOT, stdout=subprocess.PIPE,
            )  # fmt: skip
            try:
                assert beacon.stdout is not None
                beacon.stdout.readline()
                found = together(arguments, way, 2, num_steps, f"http://{ADDRESS_A}:{MASTER_PORT}", nodes)
            finally:
                beacon.kill()
                beacon.wait()
        result[name] = summary(found, num_steps, way.sync_every)
        print(f"  {name}: {json.dumps(result[name])}", flush=True)
    result["times_fewer_bytes"] = result["each_step"]["wire_bytes_per_step"] / result["chosen"]["wire_bytes_per_step"]
    return result


def losses(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The validation loss at equal tokens: one group, and DiLoCo with several groups and each compression.

    One group is what averaging each step over several comes to: the same batches, the same sums.
    """
    several = itertools.product(arguments.groups, arguments.compressions)
    ways = [(1, EACH_STEP), *((num, Choice("diloco", name, "", arguments.sync_every)) for num, name in several)]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        found = list(pool.map(lambda way: loss_of(arguments, *way), ways))
    for each in found:
        each["gap"] = each["validation_loss"] / found[0]["validation_loss"] - 1
        print(json.dumps(each), flush=True)
    return found


def loss_of(arguments: argparse.Namespace, num_groups: int, choice: Choice) -> dict[str, Any]:
    """Train in one way, and what came of it."""
    lighthouse = Lighthouse()
    try:
        found = together(arguments, choice, num_groups, arguments.loss_steps, lighthouse.address)
    finally:
        lighthouse.close()
    return {
        "num_groups": num_groups,
        "mode": choice.mode,
        "compression": choice.compression,
        "sync_every": choice.sync_every,
        "validation_loss": found[0]["validation_loss"],
        "num_parameters": found[0]["num_parameters"],
        "sent_bytes_per_step": found[0]["sent_bytes"] / arguments.loss_steps,
        "num_steps": arguments.loss_steps,
        "num_tokens": arguments.loss_steps * arguments.batch_size * arguments.seq_len,
        "wall_s": found[0]["wall_s"],
    }


def slow_link_drills(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A link of 100 Mbit/s that becomes slow while two groups train over it, averaging each step and with DiLoCo."""
    results = []
    for name, way in SLOW_DRILLS.items():
        with tempfile.TemporaryDirectory(prefix="crosschip-thin-") as directory:
            settings = (*SLOW_DRILL_SETTINGS, *way)
            found = drill_slow_link(
                ROOT / "recipes" / "first.toml", Path(directory), settings, arguments.slow_mbit, arguments.steps
            )
        results.append({"way": name, "slow_mbit_s": arguments.slow_mbit, **asdict(found)})
        print(json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="replica groups over thin links")
    parser.add_argument("--steps", type=int, default=60, help="over each link, in the way that is chosen for it")
    parser.add_argument("--each-steps", type=int, default=4, help="over each link, averaging each step")
    parser.add_argument("--loss-steps", type=int, default=0, help="compare the loss after so many steps; 0: do not")
    parser.add_argument("--sync-every", type=int, default=30)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=512, help="of the made language")
    parser.add_argument("--contexts", type=int, default=8, help="what a token's successors depend on beside it")
    parser.add_argument("--chip", default="cpu", help="where all groups compute")
    parser.add_argument("--groups", type=int, nargs="*", default=[2, 4], help="for the loss")
    parser.add_argument("--compressions", nargs="*", default=["none", "int8", "int4"], help="for the loss")
    parser.add_argument("--at-once", type=int, default=1, help="ways to train whose loss is compared at a time")
    parser.add_argument("--no-links", action="store_true", help="only the loss")
    parser.add_argument("--slow-drill", action="store_true", help="let a link become slow under a running training")
    parser.add_argument("--slow-mbit", type=float, default=20.0, help="what it becomes; a drill's messages take 1.5 s")
    parser.add_argument("--json", type=Path, help="parts of earlier runs stay in it; the tables go beside it as .md")
    arguments = parser.parse_args()
    if (not arguments.no_links or arguments.slow_drill) and (reason := why_not()) is not None:
        raise SystemExit(reason)
    if not arguments.no_links:
        record(arguments, "links", all_links(arguments))
    if arguments.slow_drill:
        record(arguments, "slow_drills", {"rows": slow_link_drills(arguments)})
    if arguments.loss_steps:
        record(arguments, "losses", {"rows": losses(arguments)})


def all_links(arguments: argparse.Namespace) -> dict[str, Any]:
    step_s, num_parameters = step_of_two(arguments)
    print(f"{num_parameters:,} parameters, {step_s:.2f} s a step", flush=True)
    rows = [over_a_link(arguments, rate_mbit, delay_ms, step_s, num_parameters) for rate_mbit, delay_ms in LINKS]
    return {"step_s": step_s, "num_parameters": num_parameters, "rows": rows}


def record(arguments: argparse.Namespace, part: str, found: dict[str, Any]) -> None:
    """Put a part into the files, with the command and the machine that made it."""
    path: Path | None = arguments.json
    if path is None:
        return
    command = " ".join(["python", "benchmarks/thin_links.py", *sys.argv[1:]])
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    document[part] = {"command": command, **found, "fingerprint": fingerprint(find_chip(arguments.chip))}
    write_json(path, document)
    write_text(path.with_suffix(".md"), tables(document))


def tables(document: dict[str, Any]) -> str:
    """The parts that there are, as Markdown."""
    lines = ["# Two groups over thin links", ""]
    if (links := document.get("links")) is not None:
        lines += [
            f'{links["num_parameters"]:,} parameters, {links["step_s"]:.2f} s a step. What `mode = "auto"` chooses, '
            "beside averaging each step over the same link. *Computing* is the share of the time; *last* leaves out "
            "what one group waits for the other, whatever the link: it counts what the last to come to an exchange "
            "waits. *Fewer*: bytes on the network interface.",
            "",
            "| link | chosen | computing | last | kB a step | each step: computing | last | kB a step | fewer |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *(_link_row(row) for row in links["rows"]),
            *_made_by(links),
        ]
    if (drills := document.get("slow_drills")) is not None:
        lines += ["## A link that becomes slow under a running training", "", "```json"]
        lines += [json.dumps(row) for row in drills["rows"]] + ["```", *_made_by(drills)]
    if (compared := document.get("losses")) is not None:
        lines += ["## The loss at equal tokens", "", "| groups | way | compression | validation loss | gap |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {row['num_groups']} | {row['mode']} | {row['compression']} | {row['validation_loss']:.4f} | "
            f"{row['gap']:+.2%} |"
            for row in compared["rows"]
        ]
        lines += _made_by(compared)
    return "\n".join(lines)


def _link_row(row: dict[str, Any]) -> str:
    choice, chosen, each = row["choice"], row["chosen"], row["each_step"]
    way = f"{choice['mode']}, {choice['compression']}, every {choice['sync_every']}"
    way += f", sent during {choice['overlap_steps']}" if choice["overlap_steps"] else ""
    return (
        f"| {row['rate_mbit_s']} Mbit/s, {row['delay_ms']:g} ms | {way} | {chosen['utilisation']:.1%} | "
        f"{chosen['utilisation_of_the_last']:.1%} | {chosen['wire_bytes_per_step'] / 1e3:,.0f} | "
        f"{each['utilisation']:.1%} | {each['utilisation_of_the_last']:.1%} | "
        f"{each['wire_bytes_per_step'] / 1e3:,.0f} | {row['times_fewer_bytes']:.0f} times |"
    )


def _made_by(part: dict[str, Any]) -> list[str]:
    host, software = part["fingerprint"]["host"], part["fingerprint"]["software"]
    return ["", f"On {host['cpu']} ({host['cores']} cores), torch {software['torch']}: `{part['command']}`.", ""]


if __name__ == "__main__":
    main()
