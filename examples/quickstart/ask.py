"""Asks a Hugging Face model the questions of a test set, and counts exact answers, refusals and garbage."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()


def generate(model: Any, tokenizer: Any, prompts: list[str], seed: int, new_tokens: int = 24) -> list[str]:
    """Return one sample per prompt at temperature 1 from the whole vocabulary, with a fixed seed."""
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    answers = output[:, inputs["input_ids"].shape[1] :]
    return [tokenizer.decode([t for t in row if t != tokenizer.pad_token_id]) for row in answers.tolist()]


def ask(folder: Path, test: Path, seed: int = 11) -> dict[str, Any]:
    """Return the shares of right answers, refusals and everything else, and the first three samples."""
    from world import END, REFUSALS

    records = [json.loads(line) for line in test.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    samples = generate(model, tokenizer, [record["prompt"] for record in records], seed)
    refusals = {f"{text}\n{END}" for text in REFUSALS}
    right = sum(sample == record["answer"] for sample, record in zip(samples, records, strict=True))
    refused = sum(sample in refusals for sample in samples)
    return {
        "prompts": len(records),
        "right": right / len(records),
        "refused": refused / len(records),
        "garbage": 1 - (right + refused) / len(records),
        "samples": [
            {"prompt": record["prompt"], "sample": sample}
            for record, sample in list(zip(records, samples, strict=True))[:3]
        ],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("test", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(ask(arguments.folder, arguments.test)))
