"""A plain loop in transformers that saves a checkpoint (save) or starts from it (resume), and takes a DPO step.

python plain_restart.py save|resume MODEL FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from transformers import AutoModelForCausalLM

PAIRS, MICRO_BATCH, PROMPT, RESPONSE = 16, 4, 110, 45


def main() -> None:
    """One start: load, step, and save if asked to."""
    action, model_folder, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    if action == "resume":
        state = torch.load(folder / "plain.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    torch.manual_seed(1)
    for _ in range(PAIRS // MICRO_BATCH):
        ids = torch.randint(2, 8000, (2 * MICRO_BATCH, PROMPT + RESPONSE))
        logits = model(ids[:, :-1]).logits[:, PROMPT - 1 :]
        found = logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None]).squeeze(-1).sum(-1)
        chosen, rejected = found.chunk(2)
        (-F.logsigmoid(0.1 * (chosen - rejected)).sum() / PAIRS).backward()
    optimizer.step()
    if action == "save":
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "plain.pt")


if __name__ == "__main__":
    main()
