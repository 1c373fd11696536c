import json
from collections.abc import Callable
from pathlib import Path

import pytest

from crosschip.data import ChatTokenizer, Source, open_source, train_tokenizer
from crosschip.recipe import DataSettings

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def gsm8k_path() -> str:
    path = SHARED_DATA / "gsm8k" / "train.jsonl"
    if not path.exists():
        pytest.skip(f"the GSM8K training file is not at {path}")
    return str(path)


@pytest.fixture(scope="session")
def shakespeare_path() -> str:
    path = SHARED_DATA / "text" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip(f"the Shakespeare text is not at {path}")
    return str(path)


@pytest.fixture(scope="session")
def problems() -> Source:
    return open_source(DataSettings(source="arithmetic", levels=[1, 6], num_problems=1_500), seed=3)


@pytest.fixture(scope="session")
def tokenizer(problems: Source) -> ChatTokenizer:
    return train_tokenizer((row.as_text() for row in problems.rows("train")), vocab_size=400)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[object], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
