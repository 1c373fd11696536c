import json
from pathlib import Path

from crosschip.data import open_source, train_tokenizer
from crosschip.recipe import DataSettings
from crosschip.train.sft import questions


def test_a_conversation_in_which_nobody_asks_gives_no_sample(tmp_path: Path) -> None:
    greeting = [{"role": "assistant", "content": "Hello, how can I help?"}]
    path = tmp_path / "chats.jsonl"
    rows = [[*({"role": "user", "content": f"Who is {n}?"} for _ in range(n % 2)), *greeting] for n in range(40)]
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    source = open_source(DataSettings(path=str(path), validation_fraction=0.9), seed=0)
    tokenizer = train_tokenizer(["Who? Hello"], 300)
    prompts = questions(source, tokenizer, 60)
    assert len(prompts) == 4
    assert all(prompt.text.startswith("Who is ") for prompt in prompts)
