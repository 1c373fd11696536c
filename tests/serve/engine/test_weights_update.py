"""New weights while the engine answers: versioned, all or nothing, and bit for bit the engine of the new weights."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosschip.errors import CrosschipError, ServeError
from crosschip.model import Transformer, load_model, save_model
from crosschip.rundir import WEIGHTS_MANIFEST, sha256_of, write_json
from crosschip.serve.engine import loading, new_weights
from crosschip.serve.engine.engine import Engine
from crosschip.serve.engine.overwrite import Overwritten, check_overwrite
from crosschip.serve.engine.request import SamplingParams
from crosschip.serve.engine.runner import Runner
from tests.serve.conftest import make_model, tiny_config
from tests.serve.engine.engines import greedy, ids_of, logprobs_of, made_prompts, running

PROMPT = made_prompts(1, 70, 71, seed=31)[0]
OPTIONS: dict[str, Any] = {"max_batch_size": 3, "max_model_len": 512, "cache_tokens": 2048}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one configuration, whose experts' matrices are square, so that they can be transposed unseen."""
    made = []
    for seed in (1, 2):
        config = tiny_config(300, initializer_range=0.2, moe_intermediate_size=64, eos_token_id=2)
        directory = tmp_path_factory.mktemp("weights") / f"model-{seed}"
        save_model(make_model(config, seed), directory, torch.float32)
        made.append(directory)
    return made[0], made[1]


@pytest.fixture
def engine(directories: tuple[Path, Path]) -> Iterator[Engine]:
    with running(directories[0], **OPTIONS) as made:
        yield made


def against_cold(live: Engine, directory: Path) -> Overwritten:
    with running(directory, **OPTIONS) as cold:
        return check_overwrite(live, cold)


def test_after_the_update_it_is_the_engine_of_the_new_weights(engine: Engine, directories: tuple[Path, Path]) -> None:
    first, second = directories
    list(engine.submit(PROMPT, greedy(8)))  # its blocks are known now, and must not be found again
    assert not against_cold(engine, second).passed, "the check tells the two models apart"
    assert engine.update_weights(second) == "2"
    found = against_cold(engine, second)
    assert found.passed
    assert found.num_compared > 100
    with running(second, **OPTIONS) as cold:
        for _ in range(2):  # a miss of the prefix cache, then a hit
            ours, theirs = list(engine.submit(PROMPT, greedy(8))), list(cold.submit(PROMPT, greedy(8)))
            assert (ids_of(ours), logprobs_of(ours)) == (ids_of(theirs), logprobs_of(theirs))
    assert engine.info.directory == second.resolve()
    assert engine.info.weights_version == engine.load.weights_version == "2"
    assert engine.update_weights(first, version="back") == "back"
    assert against_cold(engine, first).passed
    assert engine.load.free_blocks == engine.load.num_blocks


def test_what_is_in_flight_finishes_on_its_version(engine: Engine, directories: tuple[Path, Path]) -> None:
    undisturbed = ids_of(list(engine.submit(PROMPT, greedy(300))))
    flying = [engine.submit(PROMPT, greedy(300)) for _ in range(3)]
    waiting = engine.submit(PROMPT, greedy(5))
    next(iter(flying[2]))
    assert waiting.weights_version is None
    engine.update_weights(directories[1], version="new")
    for handle in flying:
        events = list(handle)
        assert events[-1].finish_reason == "length"
        assert handle.weights_version == "1"
        assert handle.request.output_ids[:20] == undisturbed[:20]
    new = ids_of(list(waiting))
    assert waiting.weights_version == "new"
    with running(directories[1], **OPTIONS) as cold:
        assert new == ids_of(list(cold.submit(PROMPT, greedy(5))))


def test_what_is_in_flight_can_be_ended_instead(engine: Engine, directories: tuple[Path, Path]) -> None:
    flying = engine.submit(PROMPT, greedy(400))
    events = iter(flying)
    next(events)
    engine.update_weights(directories[1], in_flight="abort")
    last = list(events)[-1]
    assert last.finish_reason == "abort"
    assert "version 2" in (last.error or "")
    assert engine.load.free_blocks == engine.load.num_blocks


def test_an_update_that_comes_too_late_is_given_up(engine: Engine, directories: tuple[Path, Path]) -> None:
    flying = engine.submit(PROMPT, greedy(440))
    next(iter(flying))
    with pytest.raises(ServeError, match="old weights go on"):
        engine.update_weights(directories[1], timeout_s=0.0)
    after = engine.submit([1, 2, 3], greedy(3))
    assert len(ids_of(list(after))) == 3, "what came meanwhile is answered by the old weights"
    assert after.weights_version == "1"
    assert list(flying)[-1].finish_reason == "length"


def cut(directory: Path) -> None:
    (path,) = directory.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def without_a_tensor(directory: Path) -> None:
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, path)


def with_nan(directory: Path) -> None:
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path)


def another_eps(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def another_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")


def emptied(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


@pytest.mark.parametrize("damage", [cut, without_a_tensor, with_nan, another_eps, another_tokenizer, emptied])
def test_a_bad_directory_changes_nothing(
    engine: Engine, directories: tuple[Path, Path], tmp_path: Path, damage: Any
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(directories[1], bad)
    damage(bad)
    flying = engine.submit(PROMPT, greedy(200))
    next(iter(flying))
    with pytest.raises(CrosschipError, match="bad"):
        engine.update_weights(bad)
    assert list(flying)[-1].finish_reason == "length"
    assert engine.info.weights_version == "1"
    assert against_cold(engine, directories[0]).passed


def test_weights_that_are_not_those_of_their_manifest_are_refused(
    engine: Engine, directories: tuple[Path, Path], tmp_path: Path
) -> None:
    published = tmp_path / "published"
    shutil.copytree(directories[1], published)
    files = {file.name: sha256_of(file) for file in published.iterdir()}
    write_json(published / WEIGHTS_MANIFEST, {"schema_version": 1, "version": 1, "files": files})
    assert engine.update_weights(published, version="whole") == "whole"
    weights = published / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ServeError, match=r"model\.safetensors is not what was published"):
        engine.update_weights(published, version="torn")
    weights.unlink()
    with pytest.raises(CrosschipError):
        engine.update_weights(published, version="missing")
    write_json(published / WEIGHTS_MANIFEST, ["nothing"])
    with pytest.raises(ServeError, match="lists no files"):
        engine.update_weights(published, version="odd")
    assert engine.info.weights_version == "whole"


def test_a_name_means_the_same_weights_as_long_as_the_engine_runs(
    engine: Engine, directories: tuple[Path, Path], tmp_path: Path
) -> None:
    first, second = directories
    engine.update_weights(second, version="b")
    with pytest.raises(ServeError, match="version '1' has been the name of other weights"):
        engine.update_weights(second, version="1")
    assert engine.info.weights_version == "b"
    assert engine.update_weights(first, version="1") == "1", "back to the weights that had it"
    with pytest.raises(ServeError, match="version 'b' has been the name"):
        engine.update_weights(first, version="b")
    assert engine.update_weights(second, version="0") == "0"
    assert engine.update_weights(first) == "2", "counted up to a name that is free"

    published = [Path(shutil.copytree(first, tmp_path / name)) for name in ("run", "resumed", "odd")]
    for directory in published:
        files = {"model.safetensors": sha256_of(directory / "model.safetensors")}
        odd = {"config.json": sha256_of(directory / "config.json")} if directory.name == "odd" else {}
        write_json(directory / WEIGHTS_MANIFEST, {"schema_version": 1, "version": 1, "files": files | odd})
    engine.update_weights(published[0], version="1-ab")
    engine.update_weights(second)
    assert engine.update_weights(published[1], version="1-ab") == "1-ab", "published again, with the same content"
    engine.update_weights(second)
    with pytest.raises(ServeError, match="version '1-ab' has been the name"):
        engine.update_weights(published[2], version="1-ab")


def test_weights_that_were_not_taken_leave_their_name_free(
    engine: Engine, directories: tuple[Path, Path], tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(directories[1], tmp_path / "bad"))
    with_nan(bad)
    with pytest.raises(CrosschipError, match="NaN"):
        engine.update_weights(bad, version="b")
    assert engine.update_weights(directories[1], version="b") == "b"


def test_only_one_update_at_a_time_and_none_of_the_same_name(engine: Engine, directories: tuple[Path, Path]) -> None:
    with pytest.raises(ServeError, match="served already"):
        engine.update_weights(directories[1], version="1")
    flying = engine.submit(PROMPT, greedy(440))
    next(iter(flying))
    first = threading.Thread(target=engine.update_weights, args=(directories[1],))
    first.start()
    while engine._update is None and first.is_alive():
        time.sleep(0.001)
    if first.is_alive():
        with pytest.raises(ServeError, match="under way"):
            engine.update_weights(directories[1])
    first.join()
    assert engine.info.weights_version == "2"


def test_closing_ends_an_update_that_waits(directories: tuple[Path, Path]) -> None:
    with running(directories[0], **OPTIONS) as engine:
        flying = engine.submit(PROMPT, greedy(440))
        next(iter(flying))
        errors: list[ServeError] = []

        def update() -> None:
            try:
                engine.update_weights(directories[1])
            except ServeError as error:
                errors.append(error)

        thread = threading.Thread(target=update)
        thread.start()
        while engine._update is None and thread.is_alive():
            time.sleep(0.001)
        engine.close()
        thread.join()
        assert errors or engine.info.weights_version == "2"


def test_a_stale_copy_is_caught_by_the_probe(
    engine: Engine, directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault H2: the engine keeps a prepared (transposed, packed) copy of the old output matrix."""
    whole = Runner.decoder

    def stale(self: Runner, decoder: Any) -> None:
        decoder._output = self._decoder._output
        whole.fset(self, decoder)  # type: ignore[attr-defined]

    monkeypatch.setattr(Runner, "decoder", property(whole.fget, stale))  # type: ignore[attr-defined]
    with pytest.raises(ServeError, match="does not give the log-probs of the new weights"):
        engine.update_weights(directories[1])
    monkeypatch.undo()
    assert engine.info.weights_version == "1"
    assert against_cold(engine, directories[0]).passed, "the old weights are back"


def test_a_stale_copy_that_is_older_than_the_probe_is_caught_by_the_check(
    engine: Engine, directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault H2 where both sides of the probe have it: only an engine that was started cold has not."""
    output = engine._runner.decoder._output
    prepare = new_weights.Decoder

    def stale(*args: Any, **options: Any) -> Any:
        decoder = prepare(*args, **options)
        decoder._output = output
        return decoder

    monkeypatch.setattr(new_weights, "Decoder", stale)
    engine.update_weights(directories[1])
    monkeypatch.undo()
    assert not against_cold(engine, directories[1]).passed


def test_experts_that_were_transposed_twice_are_caught_by_the_check(
    engine: Engine, directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault H3. Shapes stay, sums and norms stay; only an engine that was started cold tells."""

    def transposed(*args: Any, **options: Any) -> Transformer:
        model = load_model(*args, **options)
        with torch.no_grad():
            for layer in model.layers:
                experts = getattr(layer.mlp, "experts", None)
                if experts is not None:
                    experts.down_proj.copy_(experts.down_proj.transpose(1, 2).clone())
        return model

    monkeypatch.setattr(new_weights, "load_model", transposed)
    engine.update_weights(directories[1])
    monkeypatch.undo()
    found = against_cold(engine, directories[1])
    assert not found.passed
    assert found.greatest_difference > 0.01


def test_updates_under_load_answer_every_request_on_one_version(engine: Engine, directories: tuple[Path, Path]) -> None:
    """Each answer is the one of the version that it names."""
    expected = {}
    for directory in directories:
        with running(directory, **OPTIONS) as cold:
            expected[directory.name] = ids_of(list(cold.submit(PROMPT, greedy(6))))
    handles = []
    for number in range(6):
        handles += [engine.submit(PROMPT, greedy(6)) for _ in range(5)]
        handles.append(engine.submit(PROMPT, SamplingParams(20, seed=number)))
        engine.update_weights(directories[1 - number % 2], version=f"{directories[1 - number % 2].name} {number}")
    versions = set()
    for handle in handles:
        events = list(handle)
        assert events[-1].finish_reason == "length"
        name = (handle.weights_version or "").split()[0]
        versions.add(handle.weights_version)
        if handle.request.params.greedy:
            assert ids_of(events) == expected[directories[0].name if name == "1" else name]
    assert len(versions) > 3
    assert engine.load.free_blocks == engine.load.num_blocks


def test_weights_are_prepared_in_threads_that_end(
    directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[threading.Thread] = []

    def load(*args: Any, **kwargs: Any) -> Transformer:
        seen.append(threading.current_thread())
        return load_model(*args, **kwargs)

    for module in (loading, new_weights):
        monkeypatch.setattr(module, "load_model", load)
    with running(directories[0], **OPTIONS) as engine:
        engine.update_weights(directories[1])
    assert [each.name for each in seen] == ["crosschip-passing"] * 2
    assert not any(each.is_alive() for each in seen), "their OpenMP threads would slow the engine's down"
