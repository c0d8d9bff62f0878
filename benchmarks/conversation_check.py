"""The look at every conversation before training: time per record, and that nothing else is found.

    python benchmarks/conversation_check.py --records 20000 --workers 0 2

Records are made up in the kinds of LLaVA's 665k list: many short questions about one picture, a conversation
of a few turns, one long answer, text alone. The tokenizer has Llama's or Qwen2's layout and as many pieces,
trained on texts of the same words. Beside the time on the clock stands that of all cores together, which
other work on the machine changes less. With `--against FILE` what is found is compared with an earlier run's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from vlm_vision.train.conversation_check import measure
from vlm_vision.train.conversations import ChatFormat, Conversations, read_template

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from real_tokenizers import llama_tokenizer, qwen_tokenizer

PICTURES = 100
TOKENIZERS = {"v1": lambda texts: llama_tokenizer(legacy=False, texts=texts, size=32000)}
TOKENIZERS["chatml"] = lambda texts: qwen_tokenizer(texts=texts, size=32000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=20000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--save", type=Path, help="write what is found to this .npy")
    parser.add_argument("--against", type=Path, help="compare what is found with this .npy")
    arguments = parser.parse_args()
    random = np.random.default_rng(0)
    words = make_words(random)
    with tempfile.TemporaryDirectory() as folder:
        records = [make_record(random, words, number) for number in range(arguments.records)]
        (Path(folder) / "images").mkdir()
        for number in range(PICTURES):
            (Path(folder) / "images" / f"{number}.jpg").touch()
        path = Path(folder) / "records.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        began = time.perf_counter()
        conversations = Conversations(path, Path(folder) / "images")
        seconds = time.perf_counter() - began
        turns = sum(len(record["conversations"]) for record in records) / len(records)
        print(f"{len(records):,} records of {turns:.1f} turns, opened in {seconds:.1f} s")
        texts = [turn["value"] for record in records[:4000] for turn in record["conversations"]]
        found = []
        for template, make in TOKENIZERS.items():
            chat = ChatFormat(make(texts), 576, read_template(template))
            for workers in arguments.workers:
                began, worked = time.perf_counter(), sum(os.times()[:4])
                measures = measure(conversations, chat, max_length=2048, workers=workers)
                seconds, worked = time.perf_counter() - began, sum(os.times()[:4]) - worked
                found.append(measures.records)
                each, work = 1000 * seconds / len(records), 1000 * worked / len(records)
                tokens = measures.records["tokens"].mean()
                print(
                    f"{template:6} {len(chat.tokenizer):,} tokens, workers {workers}: {seconds:6.1f} s, "
                    f"{each:.2f} ms a record of {tokens:.0f} tokens; of a core's time {work:.2f} ms"
                )
    if arguments.save:
        np.save(arguments.save, np.stack(found))
    if arguments.against:
        assert (np.load(arguments.against) == np.stack(found)).all(), "what is found differs"
        print(f"what is found is that of {arguments.against}")


def make_words(random: np.random.Generator) -> list[str]:
    """30,000 words of one to four syllables, the first of which are the shortest."""
    syllables = [
        "".join(parts) for parts in itertools.product("bcdfghklmnprstvwz", "aeiou", ["", "n", "r", "s", "t"])
    ]
    made = {"".join(random.choice(syllables, random.integers(1, 5))) for _ in range(40000)}
    return sorted(made, key=lambda word: (len(word), word))[:30000]


def make_record(random: np.random.Generator, words: list[str], number: int) -> dict[str, Any]:
    def text(length: int) -> str:
        places = (len(words) * random.random(length) ** 3).astype(int)  # short words are frequent ones
        return " ".join(words[place] for place in places).capitalize()

    kind = number % 5
    pairs = [(10, 4, 3), (4, 12, 50), (1, 12, 150), (2, 30, 120), (7, 8, 6)][kind]
    turns = []
    for _ in range(int(random.integers(1, 2 * pairs[0] + 1))):
        turns.append({"from": "human", "value": text(pairs[1]) + "?"})
        turns.append({"from": "gpt", "value": text(pairs[2]) + "."})
    record: dict[str, Any] = {"id": str(number), "conversations": turns}
    if kind != 3:
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        record["image"] = f"{number % PICTURES}.jpg"
    return record


if __name__ == "__main__":
    main()
