"""Two processes train a small model with the NaN doctor, and each writes down what it did. Run by torchrun."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from vlm_lora_lab.debug.nan import NanDoctor, NonFiniteStep


class Rows(torch.utils.data.Dataset):
    def __init__(self, bad):
        self.x, self.bad = torch.randn(64, 6, generator=torch.Generator().manual_seed(5)), bad

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i] * (i not in self.bad), "number": torch.tensor(i)}


class InOrder(Trainer):
    "Row 27 is in the step before that of row 37, and with the other process."

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Unit(nn.Module):
    """A root at zero for rows of zeros; or a loss that one process alone sees, with gradients that are fine. The loss
    of row 27 is large, and healthy."""

    def __init__(self, hidden):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.fc, self.head = hidden, nn.Linear(6, 6, bias=False), nn.Linear(6, 1)

    def forward(self, x, number):
        x = self.fc(x)
        if self.hidden:
            loss = (self.head(x) - 1).pow(2).mean()
            return {"loss": loss + x.detach().pow(2).sum(-1).reciprocal().log().mean() * 0.1}
        loss = (self.head(x / x.pow(2).sum(-1, keepdim=True).sqrt().clamp(min=1e-6)) - 1).pow(2).mean()
        return {"loss": loss * (1 + 8 * (number == 27).any())}


def main(folder, policy, kind):
    folder, said = Path(folder), []
    model = Unit(kind == "loss")
    doctor = NanDoctor(policy, folder / "nan", copy_every=1, say=said.append)
    args = TrainingArguments(
        str(folder / "run"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        seed=1,
    )
    trainer = InOrder(model, args, train_dataset=Rows({37}), callbacks=[doctor])
    stopped = None
    try:
        trainer.train()
    except NonFiniteStep as e:
        stopped = str(e)
    rank = int(os.environ["RANK"])
    result = {
        "steps": trainer.state.global_step,
        "stopped": stopped,
        "said": said,
        "bad": [[step, d.cause, list(d.samples or ())] for step, d in doctor.bad_steps],
        "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
        "weights": [p.flatten().tolist() for p in model.parameters()],
    }
    (folder / f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    sys.stdout.flush()
    # All was done. A group that is taken apart while gloo's thread still holds its last exchange waits for ever
    # (pytorch/pytorch#56297): two of 57 runs on a busy machine.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
